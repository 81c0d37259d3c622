"""The class rows of a forward by kernels: one pass makes lengths and directions, one takes the gradient through them.

    directions        rows [T, D], gathered or not ──>  directions in the products' dtype, 1/length      4 + 2 bytes
    through_lengths   gradient by directions      ──>  gradient by rows                                 2 + 4 + 4 bytes

Bytes are those of an element: float32 rows, bfloat16 products. Where a kernel fails, `GatheredRows` goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.kernels.rows import gather_rows, project_rows
from partial_fc.softmax.at_once import RowsAtOnce
from partial_fc.softmax.gathered_rows import GatheredRows


class KernelRows(RowsAtOnce):
    """As `GatheredRows`. `held` has the dtype of the products, and is written from the first row on, up to `filled`."""

    filled = 0
    apart = False  # the directions have memory of their own, not that of the gradient

    def measure(self, product: torch.dtype, whole_gradient: bool) -> None:
        self.memory = self.held = None
        if whole_gradient and self.inverse is not None and product.itemsize <= self.weight.dtype.itemsize:
            self.memory = self.gradient_memory(self.count)
            self.held = self.memory.view(product)[:, : self.memory.shape[1]]  # the beginning of each row

    def know(self, directions: Tensor, inverse: Tensor) -> None:
        """Take directions `[S, D]` and 1/length `[S, 1]` that were made when the rows were taken."""
        self.held, self.inverse, self.filled = directions, inverse, self.count
        self.lengths_known = self.apart = True

    def directions(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        held = self.held if self.held is not None and self.held.dtype == dtype else None
        if held is not None and b <= self.filled:
            return held[a:b]
        if self.inverse is None and (self.index is None or self.weight.dtype == dtype):
            return super().directions(a, b, dtype)  # nothing to compute
        if held is not None and a == self.filled:
            self.filled, out = b, held[a:b]
        else:
            out = self.weight.new_empty(b - a, self.weight.shape[1], dtype=dtype)
        index = None if self.index is None else self.index[a:b]
        rows = self.weight[a:b] if index is None else self.weight
        if gather_rows(rows, index, out, None if self.inverse is None else self.inverse[a:b]):
            return out
        self.held, self.filled = None, 0
        return GatheredRows.directions(self, a, b, dtype)

    def through_lengths(self, grad: Tensor, directions: Tensor, a: int, b: int, out: Tensor) -> None:
        index = None if self.index is None else self.index[a:b]
        rows = self.weight[a:b] if index is None else self.weight
        if self.inverse is None or not project_rows(grad, rows, index, self.inverse[a:b], out):
            GatheredRows.through_lengths(self, grad, directions, a, b, out)

    def release(self, grad: Tensor) -> None:
        self.filled = 0
        GatheredRows.release(self, grad)

    @property
    def overlaps(self) -> bool:
        return self.held is not None and not self.apart

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.inverse is None or not self.lengths_known:
            return GatheredRows.at(self, positions)
        inverse = self.inverse.index_select(0, positions)
        rows = self.weight.index_select(0, positions if self.index is None else self.index[positions])
        return rows * inverse, inverse
