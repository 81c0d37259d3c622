"""Rows that stand in a sampled forward twice, as pads (softmax/draws.py): stepped as the rows that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from partial_fc.rows import Pads


def blocks_with_pads(
    grad: Tensor, pads: Pads, blocks: Callable[[int, Tensor], Iterable[tuple[int, int]]]
) -> Iterator[tuple[int, int]]:
    """Yield blocks of rows with gradients `[S, ...]`. A pad gets the gradient of the row that it is, in its block.

    blocks: yields those of a number of rows.
    """
    first = len(grad)
    if pads is not None:
        window, are = pads
        grad[window:] = torch.where(are.view(-1, *[1] * (grad.ndim - 1)), grad[window - 1], grad[window:])
        if len(list(blocks(len(grad), grad))) > 1:
            first = window - 1
    if first or not len(grad):
        yield from blocks(first, grad)
    if first < len(grad):
        yield first, len(grad)
