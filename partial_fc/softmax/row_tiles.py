"""The class rows and the targets of this rank in one forward.

RowTiles    directions w [T, D] of rows a to b; lengths are measured once
TargetRows  which selected row is the class of which sample, for all P = N · L targets

A class may have K sub-centers: K rows, one after another. A tile never cuts a class in two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.softmax.by_vectors import tangent_at
from partial_fc.softmax.draws import Slots
from partial_fc.softmax.inputs import Selection
from partial_fc.softmax.tiles import Workspace, row_dots

TINY = 1e-12  # a vector shorter than this has no direction: its cosines are 0 and it gets no gradient


def inverse_of(length: Tensor) -> Tensor:
    """Return 1/length, 0 where there is no direction."""
    return torch.nn.functional.threshold(length, TINY, math.inf).reciprocal_()


def inverse_length(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/length `[n, 1]` of vectors `[n, D]`, in `dtype`; 0 for a vector without a direction."""
    return inverse_of(torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype))


def tangent(grad: Tensor, direction: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Return ∂/∂v from g = ∂/∂u, u = v/‖v‖: `(g − (g·u) u) / ‖v‖`, rows `[n, D]`. out may be either input's memory."""
    return torch.addcmul(grad, direction, row_dots(grad, direction), value=-1, out=out).mul_(inverse)


class RowTiles:
    """The class rows of this rank that take part, tile by tile, while a tile is in the cache.

    weight: `[S, D]` or `[S, K, D]`, these rows (else gathered_rows.py). normalize: give directions; else rows as they
    are. dtype: of the statistics. prefix: of what it takes from the workspace.
    """

    index: Tensor | None = None  # which rows of a larger weight they are

    def __init__(
        self, weight: Tensor, bias: Tensor | None, normalize: bool, dtype: torch.dtype, workspace: Workspace,
        prefix: str,
    ) -> None:  # fmt: skip
        self.weight, self.device = weight.reshape(-1, weight.shape[-1]), weight.device
        self.bias, self.dtype, self.workspace, self.prefix = bias, dtype, workspace, prefix
        self.count = len(self.weight)
        self.inverse = weight.new_empty(self.count, 1, dtype=dtype) if normalize else None
        self.lengths_known = False  # the lengths of all tiles are known

    def gradient_memory(self, length: int) -> Tensor:
        """Return memory `[length, D]` for the gradient of the rows."""
        return self.workspace.get(f"{self.prefix}rows", (length, self.weight.shape[1]), self.weight.dtype, self.device)

    def release(self, grad: Tensor) -> None:
        """All tiles have written to the gradient."""

    @property
    def overlaps(self) -> bool:
        """Whether the gradient is written over the directions that it is projected with."""
        return False

    def directions(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """Return directions `[b − a, D]` of rows a to b."""
        part = self.part(a, b)
        if self.inverse is None:
            return part.to(dtype)
        if not self.lengths_known:
            self.inverse[a:b] = inverse_length(part, self.dtype)
        return torch.mul(part, self.inverse[a:b], out=torch.empty_like(part, dtype=dtype))

    def part(self, a: int, b: int) -> Tensor:
        """Return rows a to b as they are `[b − a, D]`."""
        return self.weight[a:b]

    def through_lengths(self, grad: Tensor, directions: Tensor, a: int, b: int, out: Tensor) -> None:
        """Write to `out [T, D]` the gradient of rows a to b, given that of their directions; both may be one memory."""
        if self.inverse is not None:
            final = out if out.dtype == self.dtype else torch.empty_like(grad, dtype=self.dtype)
            if directions.dtype == self.dtype:
                grad = tangent(grad.to(self.dtype), directions, self.inverse[a:b], out=final)
            else:
                grad = tangent_at(grad, self.part(a, b).to(self.dtype), self.inverse[a:b], out=final)
        if grad is not out:
            out.copy_(grad)

    def add_at(self, out: Tensor, positions: Tensor, values: Tensor) -> None:
        """Add `values [P, ...]` to single rows of `out`; the same order of sums in every run."""
        out.index_add_(0, positions, values.to(out.dtype))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (directions `[P, D]`, 1/length `[P, 1]`; 1 where nothing is normalised) of single rows."""
        part = self.single(positions)
        if self.inverse is None:
            return part.to(self.dtype), part.new_ones(len(part), 1, dtype=self.dtype)
        inverse = inverse_length(part, self.dtype)
        return part * inverse, inverse

    def single(self, positions: Tensor) -> Tensor:
        """Return single rows as they are `[P, D]`."""
        return self.weight.index_select(0, positions)

    def tiles(self, size: int) -> Iterator[tuple[int, int]]:
        for a in range(0, self.count, size):
            yield a, min(a + size, self.count)


@dataclass(frozen=True)
class TargetRows:
    """The P = N · L targets of all samples as this rank sees them, in the order of the samples."""

    labels_each: int  # L
    sample: Tensor  # [P] which sample
    first: Tensor  # [P] position of the class's first center among the selected rows; any where the class is elsewhere
    row: Tensor  # [P] position of the center that is nearest to the sample; `first` until that is known
    own: Tensor  # [P] whether this rank owns the class
    directions: tuple[Tensor, ...]  # [P, D] of the rows, and [P, 1] 1/length, once they are known
    exists: Tensor  # [N, L] whether there is a target
    slots: Slots | None = None  # among the selected rows

    @classmethod
    def locate(cls, selection: Selection, centers: int) -> TargetRows:
        n, each = selection.targets.ids.shape
        local = selection.targets.ids.reshape(-1)
        local = local - selection.lo if selection.lo else local
        # classes of other ranks are spread over the rows, so that no row gets the zeros of all of them
        first = local.remainder(max(selection.hi - selection.lo, 1))
        own = first == local
        if selection.rows is not None and selection.slots is not None:
            first = selection.slots.find(selection.rows, first)
        elif selection.rows is not None and len(selection.rows):
            first = torch.searchsorted(selection.rows, first).clamp_(max=len(selection.rows) - 1)
        first = first if centers == 1 else first * centers
        sample = torch.arange(n, device=local.device)
        sample = sample if each == 1 else sample.repeat_interleave(each)
        return cls(each, sample, first, first, own, (), selection.targets.exists, selection.slots)

    def of_samples(self, values: Tensor) -> Tensor:
        """Return what `[N, ...]` holds for the sample of each target, `[P, ...]`."""
        return values if self.labels_each == 1 else values.index_select(0, self.sample)

    def sum_of_samples(self, values: Tensor) -> Tensor:
        """Return the sum of `[P, ...]` over each sample's targets, `[N, ...]`: always in the same order."""
        return values if self.labels_each == 1 else values.unflatten(0, self.exists.shape).sum(1)

    def places(self, rows: int, size: int, *, apart: bool) -> Tensor:
        """Return `[tiles, P]`: where the target stands in the memory of a tile `[N, size]`, and behind the end of the
        memory where it is not in the tile. apart: each tile has memory of its own, one after another."""
        samples, elsewhere, tiles = len(self.exists), ~self.own, -(-max(rows, 1) // size)
        if tiles == 1:
            place = torch.add(self.first, self.sample, alpha=size)[None]
        else:
            starts = torch.arange(0, rows, size, device=self.first.device)[:, None]
            column = self.first - starts
            elsewhere = (column != column.clamp(0, size - 1)).logical_or_(elsewhere)
            place = column.add_(self.sample, alpha=size)
            place = place.add_(starts, alpha=samples) if apart else place
        return place.masked_fill_(elsewhere, samples * size * (tiles if apart else 1))
