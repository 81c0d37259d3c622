"""Rows of an exact head that another optimizer would move as well as the head's `RowOptimizer`: refused before it does.

`SGD(model.parameters())` of a model that has the head in it takes the rows, too. Under sampling they have no gradient
of their own, and nothing happens.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

_watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # RowOptimizers


def watch(optimizer: Any) -> None:
    """Look at the steps of all optimizers of torch from here on, for the rows of this `RowOptimizer`."""
    _watched.add(optimizer)
    _look_at_steps()


@lru_cache
def _look_at_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_rows_of_another)


def _refuse_rows_of_another(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for own in _watched if optimizer not in _watched else ():
        rows: Any = own.class_rows  # type: ignore[attr-defined]
        names = {id(p): name for name, p in rows.parameters.items() if p.grad is not None}
        if not names or rows.live_optimizer is not own:
            continue
        theirs = [group for group in optimizer.param_groups if not any(group is each for each in own.param_groups)]
        both = [names[id(p)] for group in theirs for p in group["params"] if id(p) in names]
        if both:
            raise RuntimeError(
                f"the {' and '.join(both)} of this {rows.owner} would be moved twice, by its RowOptimizer and by "
                f"{type(optimizer).__name__}: give that one the parameters of the backbone alone, or train the head "
                "without a RowOptimizer (sample_rate=1.0)"
            )
