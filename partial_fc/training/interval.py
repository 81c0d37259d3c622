"""Evaluation during training, without any effect on it, and the figure that selects the best checkpoint.

is_due(...)            whether to evaluate now: every so many epochs, or every so many steps
undisturbed(model)     restores random states, modes and batch statistics after an evaluation: the losses are, bit for
                       bit, those of a run that evaluates only at its end
history.jsonl          gets one line, {"step", "epoch", "lfw/accuracy", "holdout/tar@1e-3", ...}
the chosen figure      is saved with the checkpoint of that step; `Checkpointer` keeps the best by it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from partial_fc import RandomState
from partial_fc.training.config import EvaluationConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import FARS, MIN_FALSE_ACCEPTS, Evaluation
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import Task, first_twice

SET_FIGURES = (*(f"tar@{far}" for far in FARS), "eer", "accuracy", "rank1")


def direction(metric: str | None) -> Literal["max", "min"]:
    """Return whether a larger ("max") or smaller ("min") figure is better; smaller for error rates."""
    return "min" if metric is not None and metric.endswith("/eer") else "max"


def check_metric(config: EvaluationConfig, sets: Sequence[str], tasks: Sequence[Task]) -> None:
    """Validate the settings of the evaluation against the names of data sets and tasks.

    Raises UserError if two of them have the same name, if there is nothing to evaluate during training, or if `best`
    is not one of the figures.
    """
    names = [*sets, *(task.name for task in tasks)]
    twice = first_twice(names)
    if twice is not None:
        raise UserError(f"two evaluation sets are called {twice!r}; rename a file or folder of --evaluation")
    if (config.every or config.every_steps) and not names:
        raise UserError(
            "--evaluation.every is given, but there is nothing to evaluate on; hold out identities, or give files of "
            "pairs"
        )
    if config.best is None:
        return
    known = [f"{name}/{figure}" for name in sets for figure in SET_FIGURES]
    known += [f"{task.name}/{figure}" for task in tasks for figure in task.figures()]
    if config.best not in known:
        raise UserError(
            f"--evaluation.best {config.best} is not a figure of this run; choose one of {', '.join(known)}"
        )


def check_best(config: EvaluationConfig, sets: Mapping[str, IdentityDataset]) -> None:
    """UserError if `best` is a figure that its data set is too small for: no checkpoint would be kept by it."""
    name, _, figure = (config.best or "").rpartition("/")
    if name not in sets or not figure.startswith("tar@"):
        return
    counts = torch.bincount(sets[name].labels)
    impostors = (int(counts.sum()) ** 2 - int((counts**2).sum())) // 2
    needed = math.ceil(MIN_FALSE_ACCEPTS / FARS[figure.removeprefix("tar@")])
    if impostors < needed:
        raise UserError(
            f"--evaluation.best {config.best} is a figure that needs {needed:,} pairs of different identities, and "
            f"the {name} set has {impostors:,}, so no checkpoint would be kept; choose another, such as {name}/eer, "
            "or hold out more identities"
        )


def is_due(config: EvaluationConfig, step: int, epochs: int | None, last: bool) -> bool:
    """Return whether to evaluate after `step`.

    epochs: number of complete epochs, if this step completed one, else None. last: whether it was the last step of
    the run.
    """
    if config.every is None and config.every_steps is None:
        return False
    by_epoch = config.every is not None and epochs is not None and epochs % config.every == 0
    by_step = config.every_steps is not None and step > 0 and step % config.every_steps == 0
    return last or by_epoch or by_step


def figures_of(evaluations: Sequence[Evaluation], results: Sequence[Result]) -> dict[str, float]:
    """Return all figures that are not None, with keys "set/figure"."""
    figures: dict[str, float] = {}
    for each in evaluations:
        values = {
            **{f"tar@{far}": tar for far, tar in each.tar.items()},
            "eer": each.eer,
            "accuracy": each.accuracy,
            "rank1": each.rank1,
        }
        figures |= {f"{each.name}/{key}": value for key, value in values.items() if value is not None}
    for result in results:
        figures |= result.metrics()
    return figures


def split_history(history: Sequence[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return (rows of training, rows of evaluation)."""
    return [row for row in history if "loss" in row], [row for row in history if "loss" not in row]


def during_training(rows: Sequence[dict[str, float]], metric: str | None) -> dict[str, Any]:
    """Return the entry of metrics.json: the rows, and the best value of the chosen figure with its step.

    If several values are equal, the newest counts.
    """
    best = None
    known = [row for row in rows if metric is not None and metric in row]
    if metric is not None and known:
        sign = 1 if direction(metric) == "max" else -1
        row = max(known, key=lambda row: (sign * row[metric], row["step"]))
        best = {"metric": metric, "value": row[metric], "step": int(row["step"])}
    return {"best": best, "rows": list(rows)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore random states, and modes and buffers of `model`, on exit. Every rank must enter and leave it."""
    random = RandomState()
    state = random.state_dict()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        random.load_state_dict(state)
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
