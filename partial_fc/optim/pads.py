"""Rows that stand in a sampled forward twice, as pads (softmax/draws.py): stepped as the rows that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def blocks_with_pads(
    grad: Tensor, pads: tuple[int, Tensor], blocks: Callable[[int, Tensor], Iterable[tuple[int, int]]]
) -> list[tuple[int, int]]:
    """Return blocks of rows with gradients `[S, ...]`. A pad gets the gradient of the row that it is, in its block.

    pads: as of `ClassRows`. blocks: yields those of a number of rows.
    """
    window, are = pads
    grad[window:] = torch.where(are.view(-1, *[1] * (grad.ndim - 1)), grad[window - 1], grad[window:])
    found = list(blocks(len(grad), grad))
    if len(found) == 1:
        return found
    last = window - 1  # the row that all pads are
    return [*(blocks(last, grad) if last else ()), (last, len(grad))]
