"""Module paths of version 0.1, which keep working for one release: `partial_fc.queries`, `partial_fc.missing`, ...

    import partial_fc.queries             a module without contents
    partial_fc.queries.topk               looked up in the modules that took its place, with a DeprecationWarning

CHANGELOG.md lists the new paths. `partial_fc.margins`, `.optim`, `.checkpoint` and `.nonfinite` are packages now and
stay.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "agreement": ("distributed.agreement",),
    "check": ("diagnosis.check_margin",),
    "checkpointer": ("checkpoint.checkpointer",),
    "collectives": (
        "batch.exchange", "batch.gather", "batch.status", "distributed.ranks", "distributed.texts", "errors",
    ),
    "comms": ("planning.measure_comms", "planning.comms_report"),
    "costs": ("planning.costs", "planning.memory"),
    "divergence": ("loop.divergence", "loop.checksums"),
    "doctor": ("diagnosis.doctor", "diagnosis.checks"),
    "exchange": ("weights.single_file",),
    "joining": ("loop.joining",),
    "locks": ("checkpoint.locks",),
    "manifest": ("checkpoint.manifest",),
    "means": ("classes.class_means",),
    "migration": ("weights.rank_files", "weights.rank_paths", "weights.torch_file"),
    "missing": ("distributed.ranks", "distributed.inquiry"),
    "moves": ("classes.mapping", "classes.moves"),
    "plan": ("planning.plan", "planning.advice", "planning.memory"),
    "preemption": ("loop.preemption",),
    "queries": ("classes.queries", "classes.best_classes"),
    "random_state": ("checkpoint.random_state",),
    "safetensors_file": ("weights.safetensors_file",),
    "shards": ("distributed.shards",),
    "storage": ("checkpoint.layout", "checkpoint.safe_reader"),
    "targets": ("batch.targets",),
    "tiles": ("softmax.tiles", "softmax.row_tiles", "softmax.inputs", "softmax.measured"),
    "trial": ("diagnosis.trial",),
    "undo": ("diagnosis.undo",),
    "wiring": ("diagnosis.wiring",),
    "workspace": ("softmax.tiles",),
    "wrapping": ("distributed.wrapping",),
}  # fmt: skip


class _OldModule(ModuleType):
    """Finds each name in the modules that took this one's place."""

    def __getattr__(self, name: str) -> Any:
        for new in () if name.startswith("__") else MOVED[self.__name__.removeprefix("partial_fc.")]:
            module = importlib.import_module(f"partial_fc.{new}")
            if hasattr(module, name):
                text = f"{self.__name__}.{name} has moved to partial_fc.{new}; the old path works for this release only"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def install() -> None:
    """Make the old paths importable. A function of the same name, such as `partial_fc.plan`, stays the attribute."""
    package = sys.modules["partial_fc"]
    for old in MOVED:
        module = _OldModule(f"partial_fc.{old}", f"Moved: see {', '.join(f'partial_fc.{n}' for n in MOVED[old])}.")
        sys.modules[module.__name__] = module
        if not hasattr(package, old):
            setattr(package, old, module)
