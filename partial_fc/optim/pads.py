"""Rows that stand in a sampled forward twice, as pads (softmax/draws.py): stepped as the rows that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from partial_fc.batch.row_sums import Pads
from partial_fc.rows import ClassRows

Blocks = Callable[[int, Tensor], Iterable[tuple[int, int]]]  # of so many rows like these


def join_far_pads(rows: ClassRows, blocks: Blocks) -> None:
    """Drop pads of the gradient that would be stepped in another block than the rows that they are, and so twice. The
    host then waits for how many rows are left."""
    assert rows.pads is not None and rows.grad_rows is not None
    grads = rows.gradients()
    if rows.pads.of is not None and any(len(list(blocks(len(grad), grad))) > 1 for grad in grads):
        real = rows.pads.real().nonzero()[:, 0]
        left = rows.grad_rows[real]
        rows.grad_rows = None  # nothing is to be added to
        rows.accumulate(left, [grad[real] for grad in grads])


def blocks_with_pads(grad: Tensor, pads: Pads, blocks: Blocks) -> list[tuple[int, int]]:
    """Return blocks of rows with gradients `[S, ...]`. A pad gets the gradient of the row that it is, in its block."""
    pads.set(grad, as_rows=True)
    found = list(blocks(len(grad), grad))
    if len(found) == 1:
        return found
    last = pads.first - 1  # the row that all pads are
    return [*(blocks(last, grad) if last else ()), (last, len(grad))]
