"""Biases of class rows, for margins that leave embeddings and rows as they are."""

from __future__ import annotations

from torch import Tensor

from partial_fc.softmax.row_tiles import RowTiles


def biases_of(rows: RowTiles, at: slice | Tensor) -> Tensor:
    """Return the biases of a tile, or of single rows, in the dtype of the statistics."""
    assert rows.bias is not None
    return rows.bias[at if rows.index is None else rows.index[at]].to(rows.dtype)
