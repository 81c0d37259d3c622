"""The class rows of a forward that are some of the shard's, and no copies of them: where none has missed a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.softmax.row_tiles import RowTiles, inverse_length


class GatheredRows(RowTiles):
    """As `RowTiles`, of the rows `index` of the weight, or of all. They are gathered once a forward, into the memory of
    their gradient.

    weight: `[C_local, D]` or `[C_local, K, D]`. index: sorted rows of the flat weight `[C_local · K, D]`, or None.
    """

    def __init__(self, weight: Tensor, *given: Any, index: Tensor | None, needs_grad: bool) -> None:
        super().__init__(weight, *given)
        self.index = index
        if index is not None:
            self.count = len(index)
            self.inverse = None if self.inverse is None else self.inverse.new_empty(self.count, 1)
        self.held: Tensor | None = None  # directions of gathered rows
        self.memory: Tensor | None = None  # of their gradient, if they are held there
        if index is not None and needs_grad and weight.dtype == self.dtype:
            self.held = self.memory = self.gradient_memory(self.count)

    def gradient_memory(self, length: int) -> Tensor:
        return super().gradient_memory(length) if self.memory is None else self.memory

    def release(self, grad: Tensor) -> None:
        self.held = self.memory = None  # a second backward makes the directions again

    @property
    def overlaps(self) -> bool:
        return self.held is not None

    def directions(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        if self.held is None:
            return super().directions(a, b, dtype)
        held = self.held[a:b]
        if not self.lengths_known and self.index is not None:
            torch.index_select(self.weight, 0, self.index[a:b], out=held)
            if self.inverse is not None:
                self.inverse[a:b] = inverse_length(held, self.dtype)
                held.mul_(self.inverse[a:b])
        return held.to(dtype)

    def part(self, a: int, b: int) -> Tensor:
        return super().part(a, b) if self.index is None else self.weight.index_select(0, self.index[a:b])

    def through_lengths(self, grad: Tensor, directions: Tensor, a: int, b: int, out: Tensor) -> None:
        super().through_lengths(grad, directions if self.held is None else self.held[a:b], a, b, out)

    def single(self, positions: Tensor) -> Tensor:
        return super().single(positions if self.index is None else self.index[positions])
