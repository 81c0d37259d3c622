"""Stochastic rounding of half-precision weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partial_fc.permutation import keyed_below
from partial_fc.rows import ClassRows
from partial_fc.sampling import mix


def round_at_random(values: Tensor, ids: Tensor, key: int) -> Tensor:
    """Round float32 rows `[n, ...]` to bfloat16's grid, up or down so that the mean stays; keyed by class id and place.

    bfloat16 is the upper half of a float32: a uniform 16-bit number is added to the lower half, which is then cut off.
    """
    flat = values.reshape(len(values), math.prod(values.shape[1:]))  # -1 cannot be inferred where there are no rows
    places = ids[:, None] * flat.shape[1] + torch.arange(flat.shape[1], device=values.device)
    noise = keyed_below(places, key, 1 << 16).int()
    rounded = (flat.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(flat.isfinite(), rounded.view(torch.float32), flat).view(values.shape)


def round_rows(block: Tensor, rows: ClassRows, count: int, index: Tensor | None, a: int, b: int) -> Tensor:
    """Round the local rows `index`, or a to b, of a loss. count: of the optimizer's steps, which keys the draw."""
    ids = rows.shards.lo + (torch.arange(a, b, device=block.device) if index is None else index)
    return round_at_random(block, ids, mix(rows.seed, count))
