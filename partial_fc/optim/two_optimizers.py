"""Rows of an exact head that another optimizer moves as well as the head's `RowOptimizer`, by one gradient: refused.

`SGD(model.parameters())` of a model that has the head in it takes the rows, too. Under sampling they have no gradient
of their own, and nothing happens.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class MovedTwice(RuntimeError):
    """Two optimizers would move a weight by one gradient."""


class _Move(NamedTuple):
    """A step of an optimizer by a gradient as it was then."""

    mover: weakref.ref[torch.optim.Optimizer]
    grad: weakref.ref[Tensor]
    version: int


# the last move of each parameter by name, for each RowOptimizer
_moves: weakref.WeakKeyDictionary[Any, dict[str, _Move]] = weakref.WeakKeyDictionary()


def watch(optimizer: Any) -> None:
    """Look at the steps of all optimizers of torch from here on, for the rows of this `RowOptimizer`."""
    _moves[optimizer] = {}
    _look_at_steps()


@lru_cache
def _look_at_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_a_second_move)


def _refuse_a_second_move(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    for own, moves in _moves.items():
        rows = own.class_rows
        for name, parameter in rows.parameters.items():
            grad = parameter.grad
            if grad is None or rows.live_optimizer is not own or not _moves_it(optimizer, parameter, own):
                continue
            last, now = moves.get(name), grad._version  # noqa: SLF001
            mover = None if last is None or last.grad() is not grad or last.version != now else last.mover()
            if mover not in (None, optimizer):
                raise MovedTwice(
                    f"the {name} of this {rows.owner} was moved by {type(mover).__name__}, and "
                    f"{type(optimizer).__name__} would move it once more by the same gradient: give the optimizer of "
                    "torch the parameters of the backbone alone, or train the head without a RowOptimizer"
                )
            moves[name] = _Move(weakref.ref(optimizer), weakref.ref(grad), now)


def _moves_it(optimizer: torch.optim.Optimizer, parameter: Tensor, own: Any) -> bool:
    """Return whether a step of the optimizer moves the parameter; one that wraps `own` leaves that to it."""
    if optimizer in _moves:  # another RowOptimizer of these rows refuses to step
        return optimizer is own
    theirs = (group for group in optimizer.param_groups if not any(group is each for each in own.param_groups))
    return any(parameter is each for group in theirs for each in group["params"])
