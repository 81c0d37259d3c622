"""In which step of a cycle each class of a rank is drawn: the rank's classes, sorted by step.

    local rows, some at a time  ── their places in the permutation ──>  step  ── sort ──>  rows of step 0, of step 1 ...

A piece of so many rows is sorted at a time, which bounds what that takes; a step then reads one range of each piece.
A cycle's last window ends with the first places of the permutation once more. Classes that stand there are a range of
their own, before those of step 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.arriving import Arriving
from partial_fc.permutation import Permutation

PIECE, PIECE_ELSEWHERE = 1 << 18, 1 << 22  # rows; a GPU is bound by launches, a CPU by its cache


class CycleTable(NamedTuple):
    """rows `[C_local]`: int32. bounds `[pieces, steps + 2]`: of a piece, range 0 and then one for each step."""

    rows: Tensor
    bounds: Tensor | Arriving


def make_table(
    permutation: Permutation, size: int, lo: int, hi: int, device: torch.device, block: int = 1
) -> CycleTable:
    """Return that of the classes `[lo, hi)`. permutation: of blocks of so many consecutive ids. size: blocks a step."""
    steps = -(-permutation.size // size)
    again = steps * size - permutation.size  # places that the last window takes once more
    piece = PIECE if device.type == "cpu" else PIECE_ELSEWHERE
    rows = torch.empty(hi - lo, dtype=torch.int32, device=device)
    ranges = torch.arange(steps + 2, device=device, dtype=torch.int32)
    bounds = []
    for start in range(0, hi - lo, piece):
        end = min(start + piece, hi - lo)
        first, last = (lo + start) // block, -(-(lo + end) // block)
        place = permutation.positions_of(torch.arange(first, last, device=device))
        where = (place.div(size, rounding_mode="floor") + (place >= again)).int()
        if block > 1:
            where = where[:, None].expand(-1, block).reshape(-1)[lo + start - first * block :][: end - start]
        ordered, order = where.sort(stable=True)
        torch.add(order, start, out=rows[start:end])
        bounds.append(torch.searchsorted(ordered, ranges) + start)
    found = torch.stack(bounds)
    return CycleTable(rows, found if device.type == "cpu" else Arriving(found))
