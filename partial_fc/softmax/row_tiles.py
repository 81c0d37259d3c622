"""The class rows and the targets of this rank in one forward.

RowTiles    directions w [T, D] of rows a to b; lengths are measured once
TargetRows  which selected row is the class of which sample, for all P = N · L targets

A class may have K sub-centers: K rows, one after another. A tile never cuts a class in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.softmax.inputs import Selection
from partial_fc.softmax.tiles import Workspace, mask_targets

TINY = 1e-12  # a vector shorter than this has no direction: its cosines are 0 and it gets no gradient


def inverse_length(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/length `[n, 1]` of vectors `[n, D]`, in `dtype`; 0 for a vector without a direction."""
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype)
    return torch.where(norm > TINY, norm.reciprocal(), 0.0)


def unit(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (vectors `[n, D]` at unit length, 1/length `[n, 1]`), in `dtype`; both 0 without a direction."""
    inverse = inverse_length(vectors, dtype)
    return vectors.to(dtype) * inverse, inverse


def tangent(grad: Tensor, direction: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Return ∂/∂v from g = ∂/∂u, u = v/‖v‖: `(g − (g·u) u) / ‖v‖`, rows `[n, D]`. out may be either input's memory."""
    along = torch.linalg.vecdot(grad, direction).unsqueeze(1)
    return torch.addcmul(grad, direction, along, value=-1, out=out).mul_(inverse)


class RowTiles:
    """The selected class rows of this rank, tile by tile, in the dtype of the statistics.

    index: sorted rows of the flat weight `[C_local · K, D]`, or None for all. normalize: give directions; else rows as
    they are. Rows that are picked out of the shard are gathered once a forward, into the memory of their gradient.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        normalize: bool,
        dtype: torch.dtype,
        workspace: Workspace,
        needs_grad: bool,
    ) -> None:
        self.weight = weight.reshape(-1, weight.shape[-1])
        self.bias = bias
        self.index = index
        self.dtype = dtype
        self.workspace = workspace
        self.count = len(self.weight) if index is None else len(index)
        self.inverse = weight.new_empty(self.count, 1, dtype=dtype) if normalize else None
        self.measured = False  # the lengths of all tiles are known
        self.held: Tensor | None = None  # directions of gathered rows
        if index is not None and needs_grad and weight.dtype == dtype:
            self.held = self.gradient_memory(self.count)

    def gradient_memory(self, length: int) -> Tensor:
        """Return memory `[length, D]` for the gradient of the rows: that of the held directions if there are any."""
        if self.held is not None:
            return self.held
        name = "rows" if self.index is None else "selected rows"
        return self.workspace.take(name, (length, self.weight.shape[1]), self.weight.dtype, self.weight.device)

    def tile(self, a: int, b: int) -> Tensor:
        """Return directions `[b − a, D]` of rows a to b."""
        held = None if self.held is None else self.held[a:b]
        if held is not None and self.measured:
            return held
        part = self.weight[a:b]
        if self.index is not None:
            part = torch.index_select(self.weight, 0, self.index[a:b], out=held)
        if self.inverse is None:
            return part.to(self.dtype)
        if not self.measured:
            self.inverse[a:b] = inverse_length(part, self.dtype)
        return torch.mul(part.to(self.dtype), self.inverse[a:b], out=held)

    def tile_bias(self, a: int, b: int) -> Tensor | None:
        if self.bias is None:
            return None
        return (self.bias[a:b] if self.index is None else self.bias[self.index[a:b]]).to(self.dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (directions `[P, D]`, 1/length `[P, 1]`; 1 where nothing is normalised) of single rows."""
        part = self.weight.index_select(0, positions if self.index is None else self.index[positions])
        if self.inverse is not None:
            return unit(part, self.dtype)
        return part.to(self.dtype), part.new_ones(len(part), 1, dtype=self.dtype)

    def bias_at(self, positions: Tensor) -> Tensor | float:
        if self.bias is None:
            return 0.0
        return self.bias[positions if self.index is None else self.index[positions]].to(self.dtype)

    def tiles(self, size: int) -> Iterator[tuple[int, int]]:
        for a in range(0, self.count, size):
            yield a, min(a + size, self.count)


@dataclass(frozen=True)
class TargetRows:
    """The P = N · L targets of all samples as this rank sees them, in the order of the samples."""

    sample: Tensor  # [P] which sample
    first: (
        Tensor  # [P] position of the class's first center among the selected rows; 0 where another rank owns the class
    )
    row: Tensor  # [P] position of the center that is nearest to the sample; `first` until that is known
    own: Tensor  # [P] whether this rank owns the class
    exists: Tensor  # [N, L] whether there is a target

    @classmethod
    def locate(cls, selection: Selection, local_classes: int, centers: int) -> TargetRows:
        n, each = selection.targets.shape
        flat = selection.targets.reshape(-1)
        local = flat - selection.lo
        own = (local >= 0) & (local < local_classes) & (flat >= 0)
        if selection.rows is not None and len(selection.rows):
            local = torch.searchsorted(selection.rows, local)
        first = torch.where(own, local, 0) * centers
        sample = torch.arange(n, device=flat.device)
        if each > 1:
            sample = sample.repeat_interleave(each)
        return cls(sample, first, first, own, selection.targets >= 0)

    def mask(self, logits: Tensor, a: int, centers: int = 1) -> None:
        """Write −inf at the targets in the tile `[N, T]` that begins with row a."""
        shape = self.exists.shape
        mask_targets(logits, (self.first - a).view(shape), self.own.view(shape), centers)
