"""Rows that a forward takes make the steps that they have missed by one kernel, which makes their directions too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partial_fc.distributed.dtensors import local_part
from partial_fc.kernels.rows import catch_up_rows
from partial_fc.kernels.small_problems import MovesCase
from partial_fc.kernels.trial import moves_tried
from partial_fc.optim.moves import LinearMoves

if TYPE_CHECKING:
    from partial_fc.optim.forms import Moves
    from partial_fc.rows import ClassRows

TAKEN_DIRECTIONS = ("directions", "inverse")  # of the rows that a forward took, beside the names of parameters


def directions_memory(rows: ClassRows, parameter: Tensor, count: int) -> list[Tensor]:
    """Return memory for directions `[count, D]` and 1/length `[count, 1]` of rows of a parameter; none if nobody takes
    them."""
    weight, dtype = local_part(parameter.detach()), rows.kernels.directions
    if dtype is None or weight.ndim != 2 or parameter is not rows.main:
        return []
    return [weight.new_empty(count, weight.shape[1], dtype=dtype), weight.new_empty(count, 1, dtype=torch.float32)]


def taken_directions(taken: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return directions `[S, D]` and 1/length `[S, 1]` of what a forward took, if they are in it."""
    return (taken["directions"], taken["inverse"]) if "directions" in taken else None


def moved_by_kernel(
    rows: ClassRows,
    moves: Moves,
    tensors: list[Tensor],
    index: Tensor,
    coefficients: Tensor,
    outs: list[Tensor] | None,
) -> list[Tensor] | None:
    """Return the rows `index [S]` and their state after the steps of `coefficients [S, n]`, then directions and
    1/length if there is memory for them; None where no kernel did it. tensors: rows and state of the shard."""
    width, keys = math.prod(tensors[0].shape[1:]), len(moves.keys)
    served = rows.kernels.rows and isinstance(moves, LinearMoves) and keys <= 1 and coefficients.dtype == torch.float32
    if not served or tensors[0].ndim < 2 or not all(each.is_contiguous() for each in tensors):
        return None
    if outs is None:
        outs = [each.new_empty(len(index), *each.shape[1:], dtype=torch.float32) for each in tensors]
    flat = [each.view(-1, width) for each in (*tensors, *outs[: 1 + keys])]
    directions = (outs[1 + keys], outs[2 + keys]) if len(outs) > 1 + keys else None
    given = flat[: 1 + keys], index, coefficients, flat[1 + keys :], directions, rows.main.dtype

    def case() -> MovesCase:
        made = None if directions is None else directions[0].dtype
        return MovesCase(index.device, width, tuple(each.dtype for each in tensors), made, rows.main.dtype)

    return outs if moves_tried(case, index.device) and catch_up_rows(*given) else None
