"""Evaluation while a run trains, which it must not notice, and the best checkpoint so far.

due(step, epochs)      every so many epochs, or optimizer steps
undisturbed(model)     random numbers, modes and batch statistics are afterwards as they were: losses are bit for bit those of a run
                       that evaluates at its end alone
history.jsonl          one more line, {"step", "epoch", "lfw/accuracy", "holdout/tar@1e-3", ...}
the chosen figure      goes with the checkpoint of that step, by which `Checkpointer` keeps the best
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from partial_fc import RandomState
from partial_fc.training.config import EvaluationConfig
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import FARS, Evaluation
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import Task, first_twice

SET_FIGURES = (*(f"tar@{far}" for far in FARS), "eer", "accuracy", "rank1")


def direction(metric: str | None) -> Literal["max", "min"]:
    """Whether more of a figure is better, or less: of error rates less."""
    return "min" if metric is not None and metric.endswith("/eer") else "max"


def check_metric(config: EvaluationConfig, sets: Sequence[str], tasks: Sequence[Task]) -> None:
    """UserError where two data sets have one name, there is nothing to evaluate during training, or `best` is none of the figures."""
    names = [*sets, *(task.name for task in tasks)]
    twice = first_twice(names)
    if twice is not None:
        raise UserError(f"two sets to evaluate on are called {twice!r}; rename a file or folder of --evaluation")
    if (config.every or config.every_steps) and not names:
        raise UserError(
            "--evaluation.every is given, but there is nothing to evaluate on; hold identities out, or name files of pairs"
        )
    if config.best is None:
        return
    known = [f"{name}/{figure}" for name in sets for figure in SET_FIGURES]
    known += [f"{task.name}/{figure}" for task in tasks for figure in task.figures()]
    if config.best not in known:
        raise UserError(f"--evaluation.best {config.best} is no figure of this run; choose one of {', '.join(known)}")


def is_due(config: EvaluationConfig, step: int, epochs: int | None, last: bool) -> bool:
    """Whether to evaluate after `step`; epochs: how many are complete if this step completed one; last: it was the run's last step."""
    if config.every is None and config.every_steps is None:
        return False
    by_epoch = config.every is not None and epochs is not None and epochs % config.every == 0
    by_step = config.every_steps is not None and step > 0 and step % config.every_steps == 0
    return last or by_epoch or by_step


def figures_of(evaluations: Sequence[Evaluation], results: Sequence[Result]) -> dict[str, float]:
    """All figures there are, as "set/figure"."""
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
    """(rows of training, rows of evaluation)."""
    return [row for row in history if "loss" in row], [row for row in history if "loss" not in row]


def during_training(rows: Sequence[dict[str, float]], metric: str | None) -> dict[str, Any]:
    """For metrics.json: the rows, and of the chosen figure its best value (of equal ones the newest) and the step of its checkpoint."""
    best = None
    known = [row for row in rows if metric is not None and metric in row]
    if metric is not None and known:
        sign = 1 if direction(metric) == "max" else -1
        row = max(known, key=lambda row: (sign * row[metric], row["step"]))
        best = {"metric": metric, "value": row[metric], "step": int(row["step"])}
    return {"best": best, "rows": list(rows)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Every rank must enter and leave it: afterwards random states, modes and buffers of `model` are as before."""
    random = RandomState()
    state, modes = random.state_dict(), [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        random.load_state_dict(state)
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
