"""Rows that a forward takes make the steps that they have missed by one kernel, which makes their directions too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import local_part
from partial_fc.kernels.rows import catch_up_rows
from partial_fc.kernels.small_problems import MovesCase
from partial_fc.kernels.trial import moves_tried
from partial_fc.optim.moves import LinearMoves

Memory = dict[str, list[Tensor]]  # by parameter: of rows [S, ...] and of each piece of their state


def take_by_kernels(behind: Any, index: Tensor, outs: Memory) -> dict[str, Tensor] | None:
    """Write what `SkippedRows.move` writes; return "directions" `[S, D]` and "inverse", 1/length `[S, 1]`, of the rows:
    an empty dict if nobody wants them, None where no kernel served."""
    rows, dtype = behind.rows, behind.rows.kernels.directions
    directions, main = {}, local_part(rows.main.detach())
    if dtype is not None and main.ndim == 2 and any(each.parameter is rows.main for each in behind.parameters.values()):
        directions["directions"] = main.new_empty(len(index), main.shape[1], dtype=dtype)
        directions["inverse"] = main.new_empty(len(index), 1, dtype=torch.float32)
    return directions if moved_by_kernel(behind, index, outs, taken_directions(directions)) else None


def taken_directions(taken: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return directions `[S, D]` and 1/length `[S, 1]` of what a forward took, if they are in it."""
    return (taken["directions"], taken["inverse"]) if "directions" in taken else None


def moved_by_kernel(behind: Any, index: Tensor, outs: Memory, directions: tuple[Tensor, Tensor] | None = None) -> bool:
    """Write what `SkippedRows.move` writes, and directions of the class weights or centers; False where no kernel
    serves these. Other parameters, such as biases, go without one where none serves."""
    for name, out in outs.items():
        is_main = behind.parameters[name].parameter is behind.rows.main
        if not _move(behind, name, index, out, directions if is_main else None):
            if is_main:
                return False
            behind.move(index, {name: out})
    return True


def _move(behind: Any, name: str, index: Tensor, outs: list[Tensor], directions: tuple[Tensor, Tensor] | None) -> bool:
    """Write rows of one parameter; False where no kernel serves them."""
    rows, each = behind.rows, behind.parameters[name]
    tensors, linear = each.tensors(), isinstance(each.moves, LinearMoves)
    served = rows.kernels.rows and linear and len(tensors) <= 2 and each.dtype == torch.float32
    if not served or tensors[0].ndim < 2 or not all(tensor.is_contiguous() for tensor in tensors):
        return False
    width = math.prod(tensors[0].shape[1:])
    flat, written = ([tensor.view(-1, width) for tensor in some] for some in (tensors, outs))

    def case() -> MovesCase:
        made = None if directions is None else directions[0].dtype
        return MovesCase(index.device, width, tuple(tensor.dtype for tensor in tensors), made, rows.main.dtype)

    given = flat, index, behind.coefficients(name, index), written, directions, rows.main.dtype
    return moves_tried(case, index.device) and catch_up_rows(*given)
