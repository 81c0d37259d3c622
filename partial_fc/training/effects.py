"""Settings that have no effect with the others of a run: a new run that has one is refused by its name.

A run that was saved with such a setting goes on as it began, and so does one of a version before a rule. What turns a
whole part off (augment.enabled, output.trackers []) leaves the settings of that part alone: they are for turning it on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from partial_fc.training.config import RunConfig, flat
from partial_fc.training.data.config import DataConfig, MixedSet
from partial_fc.training.data.formats.detect import find_format
from partial_fc.training.data.formats.packed import is_packed
from partial_fc.training.errors import UserError

Why = Callable[[RunConfig], str | None]
"""Why a setting has no effect, in words that go on after "which has no effect"; None if it has one."""
OF_SHAPES = {"power": ("polynomial",), "final": ("cosine", "polynomial"), "drop": ("step", "multistep")}
OF_FILES = ("format", "image_column", "label_column")


def check_effects(config: RunConfig, before: RunConfig | None = None) -> None:
    """UserError for a setting that differs from its default and has no effect.

    before: the settings of the run that goes on; what had no effect there is left alone.
    """
    known = {} if before is None else without_effect(before)
    for name, words in without_effect(config).items():
        if name not in known:
            raise UserError(words)


def without_effect(config: RunConfig) -> dict[str, str]:
    """Return the settings that differ from their defaults and have no effect, each with what to tell the user."""
    now, defaults = flat(config), flat(RunConfig())
    found = {}
    for name, why in RULES.items():
        reason = why(config) if now[name] != defaults[name] else None
        if reason is not None:
            instead = f"leave it out, or give {_in_words(defaults[name])} if a file sets it"
            found[name] = f"--{name} is {_in_words(now[name])}, which has no effect {reason}; {instead}"
    for each in config.data.mix:
        for name in OF_FILES:
            value = getattr(each, name)
            reason = _of_files(name, each) if value != getattr(MixedSet, name) else None
            if reason is not None:
                found[f"data.mix.{each.name}.{name}"] = (
                    f"--data.mix: {name} of {each.name} is {value}, which has no effect {reason}; leave it out"
                )
    return found


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _unless(has_effect: Callable[[RunConfig], object], why: str) -> Why:
    return lambda config: None if has_effect(config) else why


def _of_shape(name: str, config: RunConfig) -> str | None:
    shapes = {config.schedule.shape}
    if getattr(config.head_schedule, name) is None:  # the head has the backbone's
        shapes.add(config.head_schedule.shape or config.schedule.shape)
    return _of_other_shape(name, "schedule", sorted(shapes))


def _of_heads_shape(name: str, config: RunConfig) -> str | None:
    return _of_other_shape(name, "head_schedule", [config.head_schedule.shape or config.schedule.shape])


def _of_other_shape(name: str, schedule: str, shapes: list[str]) -> str | None:
    owners = OF_SHAPES[name]
    if set(owners) & set(shapes):
        return None
    return f"with --{schedule}.shape {' and '.join(shapes)} (it is for {' and '.join(owners)})"


def _of_files(name: str, data: DataConfig | MixedSet) -> str | None:
    """Why the format or a column of the files of a data set has no effect."""
    if data.folder is None:
        return "without a folder: the embedded glyphs are used"
    if is_packed(data.folder):
        return f"with the packed data set {data.folder}"
    if name == "format":
        return None
    try:
        found, _ = find_format(Path(data.folder), data.format)
    except UserError:  # to be told where the data are opened
        return None
    return None if found == "parquet" else f"with {found} data (it is for parquet)"


def _of_trackers(*names: str, own: bool) -> Why:
    words = ", ".join(names) + (" and a tracker of your own" if own else "")

    def why(config: RunConfig) -> str | None:
        given = config.output.trackers
        if not given or set(names) & set(given) or (own and config.output.own_tracker is not None):
            return None
        return f"with --output.trackers [{', '.join(given)}] (it is for {words})"

    return why


def _changes(config: RunConfig) -> bool:
    """Whether the learning rate of the backbone, or of a head that has its `by`, changes at all."""
    both = [config.schedule, *([] if config.head_schedule.by else [config.head_schedule.over(config.schedule)])]
    return any(each.shape != "constant" or each.warmup(config.train.epochs) for each in both)


RULES: dict[str, Why] = {
    **{f"schedule.{name}": partial(_of_shape, name) for name in OF_SHAPES},
    **{f"head_schedule.{name}": partial(_of_heads_shape, name) for name in OF_SHAPES},
    "schedule.by": _unless(_changes, "with --schedule.shape constant without warm-up"),
    **{f"data.{name}": partial(lambda name, config: _of_files(name, config.data), name) for name in OF_FILES},
    "augment.blur_sigma": _unless(
        lambda c: c.augment.blur_probability or not c.augment.enabled, "while --augment.blur_probability is 0"
    ),
    "augment.erase_size": _unless(
        lambda c: c.augment.erase_probability or not c.augment.enabled, "while --augment.erase_probability is 0"
    ),
    "head.hard_negatives_every": _unless(lambda c: c.head.hard_negatives, "while --head.hard_negatives is 0"),
    "head.hard_negatives_search": _unless(lambda c: c.head.hard_negatives, "while --head.hard_negatives is 0"),
    "head.inter_topk_penalty": _unless(lambda c: c.head.inter_topk, "while --head.inter_topk is 0"),
    # the heads of further sets are drawn
    "head.init_std": _unless(
        lambda c: c.head.weights is None or c.data.mix, "with --head.weights, which replaces what is drawn"
    ),
    "center.alpha": _unless(lambda c: c.center.weight, "while --center.weight is 0"),
    "train.max_skips": _unless(lambda c: c.train.on_nonfinite == "skip", "unless --train.on_nonfinite is skip"),
    "train.deepspeed": _unless(
        lambda c: os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true",
        "under this launcher, whose own configuration says how DeepSpeed is used",
    ),
    "evaluation.flip": _unless(
        lambda c: c.evaluation.verification or c.evaluation.templates,
        "without --evaluation.verification or --evaluation.templates",
    ),
    "evaluation.align": _unless(lambda c: c.evaluation.templates, "without --evaluation.templates"),
    "evaluation.label_pattern": _unless(lambda c: c.evaluation.retrieval, "without --evaluation.retrieval"),
    "evaluation.camera_pattern": _unless(lambda c: c.evaluation.retrieval, "without --evaluation.retrieval"),
    "output.project": _of_trackers("wandb", "mlflow", own=True),
    "output.run_name": _of_trackers("wandb", "mlflow", own=False),
}
"""Setting -> when it has no effect. All others always have one, or are refused where they are read.

Not here: what holds anyway (head_skipped_rows while all rows are selected), and what says how, not what
(data.prefetch while the trainer loads by itself).
"""
