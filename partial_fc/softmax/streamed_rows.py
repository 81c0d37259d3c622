"""All class rows of a forward that computes on a GPU while they are on the host: they come tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.row_sums import add_to_rows
from partial_fc.softmax.row_tiles import RowTiles
from partial_fc.tiers.travel import to_device


class StreamedRows(RowTiles):
    """As `RowTiles`, of all rows. device: where the forward computes."""

    def __init__(self, *given: Any, device: torch.device) -> None:
        super().__init__(*given)
        self.device = device
        self.inverse = None if self.inverse is None else torch.empty_like(self.inverse, device=device)

    def part(self, a: int, b: int) -> Tensor:
        return to_device(self.weight[a:b], self.device)

    def single(self, positions: Tensor) -> Tensor:
        return to_device(self.weight.index_select(0, positions.to(self.weight.device)), self.device)

    def add_at(self, out: Tensor, positions: Tensor, values: Tensor) -> None:
        add_to_rows(out, positions, values)
