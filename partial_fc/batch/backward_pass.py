"""`BackwardPass`: what a training step keeps of each of its backward passes, for its check."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from partial_fc.batch.exchange import GlobalBatch

MOST = 64  # backward passes of one step whose losses are kept apart


@dataclass
class BackwardPass:
    """A forward whose backward has run in this step."""

    losses: Tensor  # [N] of the replica's batch, or the reduced loss
    grad: Tensor  # ∂objective/∂loss
    batch: GlobalBatch
    ignore_index: int


def add_up(backwards: list[BackwardPass]) -> None:
    """Make the first one the sum of the two oldest, in place."""
    first = backwards[0]
    second = backwards.pop(1)
    first.losses = first.losses.sum() + second.losses.sum()
    first.grad = first.grad.sum() + second.grad.sum()
