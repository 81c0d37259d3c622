"""Which trackers a run may name: those of `NAMES`, and a class of the user's own by its import path."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from partial_fc.training.class_settings import ClassSettings
from partial_fc.training.errors import UserError
from partial_fc.training.trackers.secrets import NAME

PACKAGES = {  # modules, one of which a tracker needs; what to install
    "tensorboard": (("tensorboard", "tensorboardX"), "partial_fc[train]"),
    "wandb": (("wandb",), "partial_fc[wandb]"),
    "mlflow": (("mlflow",), "partial_fc[mlflow]"),
}
NAMES = tuple(PACKAGES)
OTHERS = tuple(sorted({str(each) for each in LoggerType} - {*NAMES, "all"}))
"""Those of Accelerate that no run can have; settings of earlier runs may name them."""
_CHOOSE = f"choose among {', '.join(NAMES)}, or give a class by its import path: --output.own_tracker"


@dataclass
class OwnTracker(ClassSettings):
    """A tracker of the user's own: a subclass of accelerate.tracking.GeneralTracker, by its import path."""

    base = GeneralTracker
    names = {}
    skip = frozenset({"run_name", "project_name", "logging_dir"})


def check_names(names: Sequence[str]) -> None:
    """UserError for a tracker that nobody knows, or that is named twice."""
    for name in names:
        if name not in (*NAMES, *OTHERS):
            raise UserError(f"--output.trackers names {name}, {_CHOOSE}")
    if len(set(names)) < len(names):
        raise UserError(f"--output.trackers names one twice: {', '.join(names)}")


def check_own(own: OwnTracker | None) -> None:
    """UserError for an argument that looks like a secret: settings are saved, and shown in the report."""
    for name in () if own is None else own.init_args:
        if NAME.search(name):
            raise UserError(
                f"--output.own_tracker.{name} looks like a secret, and settings are saved and shown; let the class "
                "read it from the environment"
            )


def check_installed(names: Sequence[str]) -> None:
    """UserError for a tracker that a run cannot have: its package is not installed, or it is one of `OTHERS`."""
    for name in names:
        if name in OTHERS:
            raise UserError(
                f"--output.trackers names {name}, which Accelerate knows, but in which a resumed run would not "
                f"continue; {_CHOOSE}"
            )
        modules, extra = PACKAGES[name]
        if not any(importlib.util.find_spec(module) for module in modules):
            raise UserError(
                f"--output.trackers names {name}, which is not installed: pip install '{extra}', or leave it out"
            )
