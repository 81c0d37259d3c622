"""The class rows of a forward elsewhere than on a CPU: lengths and directions are made for all of them at once.

A tile that stays in a cache saves nothing there, and every launch costs. Directions of all rows stand in the memory of
the gradient that follows them, in the dtype of the products, so that backward need not make them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.batch.row_sums import add_to_rows
from partial_fc.softmax.by_vectors import project
from partial_fc.softmax.gathered_rows import GatheredRows
from partial_fc.softmax.row_tiles import inverse_length


class RowsAtOnce(GatheredRows):
    """As `GatheredRows`. Where all rows take part, `held` has the dtype of the products."""

    def measure(self, product: torch.dtype, whole_gradient: bool) -> None:
        """whole_gradient: there will be a gradient of all rows at once, and so memory for it."""
        if self.held is not None:
            self.directions(0, self.count, self.dtype)
            self.lengths_known = True
        elif self.inverse is not None and self.index is None:
            self.inverse, self.lengths_known = inverse_length(self.weight, self.dtype), True
            if whole_gradient and self.weight.dtype == self.dtype:
                self.memory = self.gradient_memory(self.count)
                self.held = self.memory.view(product)[:, : self.memory.shape[1]]  # the beginning of each row
                torch.mul(self.weight, self.inverse, out=self.held)

    def directions(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        if self.index is None and self.held is not None and self.inverse is not None and dtype != self.held.dtype:
            return torch.mul(self.weight[a:b], self.inverse[a:b]).to(dtype)
        return super().directions(a, b, dtype)

    @property
    def overlaps(self) -> bool:
        return self.held is not None and self.index is not None

    @property
    def _projects_at_end(self) -> bool:
        """Whether the gradient of all rows goes through the normalisation at once, not tile by tile."""
        return self.held is not None and self.index is None

    def through_lengths(self, grad: Tensor, directions: Tensor, a: int, b: int, out: Tensor) -> None:
        if self.inverse is None or not self._projects_at_end:
            super().through_lengths(grad, directions, a, b, out)
        elif grad is not out:
            torch.mul(grad, self.inverse[a:b], out=out)

    def release(self, grad: Tensor) -> None:
        if self._projects_at_end and self.held is not None and self.inverse is not None:
            scaled = self.held.dtype != self.dtype  # products of another dtype were divided by the lengths tile by tile
            project(grad if scaled else grad.mul_(self.inverse), self.weight, self.inverse)
        super().release(grad)

    def add_at(self, out: Tensor, positions: Tensor, values: Tensor) -> None:
        add_to_rows(out, positions, values)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.inverse is None or not self.lengths_known:
            return super().at(positions)
        inverse = self.inverse.index_select(0, positions)
        if self.held is not None and self.index is not None:
            return self.held.index_select(0, positions), inverse
        return self.weight.index_select(0, positions) * inverse, inverse
