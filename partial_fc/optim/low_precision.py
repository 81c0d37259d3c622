"""Half-precision weights that move by float32 rows: `RowOptimizer(..., low_precision=...)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partial_fc.distributed.ranks import local_part
from partial_fc.optim.rounding import round_rows
from partial_fc.optim.row_state import COUNT, MASTER, RowState, written

ROWS_AT_ONCE = 1 << 14


def follow_writes(optimizer: RowState) -> None:
    """Take what somebody has written to the weights since the last step into their float32 twins, in blocks."""
    rows, known = optimizer.class_rows, optimizer.written
    note_writes(optimizer)
    if known is None or known == optimizer.written:
        return
    if rows.store is not None:
        rows.store.ready(None)
    for parameter in rows.parameters.values():
        if MASTER not in optimizer.state[parameter]:
            continue
        master, weight = local_part(optimizer.state[parameter][MASTER]), local_part(parameter.detach())
        for a in range(0, len(weight), ROWS_AT_ONCE):
            own, there = master[a : a + ROWS_AT_ONCE], weight[a : a + ROWS_AT_ONCE]
            same = own.to(there.dtype) == there
            if not bool(same.all()):
                own.copy_(torch.where(same, own, there.float()))


def note_writes(optimizer: RowState) -> None:
    """The weights are those of the twins."""
    optimizer.written = written(optimizer.class_rows)


class WideRows:
    """One update of a half-precision parameter.

    source: local rows that the update starts from: float32 weights in the state ("master"), or the weight itself.
    """

    def __init__(self, optimizer: RowState, parameter: nn.Parameter, weight: Tensor) -> None:
        self.class_rows = optimizer.class_rows
        self.state = optimizer.state[parameter]
        self.dtype = weight.dtype
        self.source = weight
        self.stochastic = optimizer.low_precision == "stochastic"
        if self.stochastic:
            self.state[COUNT] = self.state.get(COUNT, 0) + 1
            return
        if MASTER not in self.state:
            self.state[MASTER] = optimizer.allocate(parameter, torch.float32, MASTER)
        self.source = local_part(self.state[MASTER])

    def narrow(self, block: Tensor, index: Tensor | None, a: int, b: int) -> Tensor:
        """Return float32 rows `[n, ...]`, the local rows `index`, or a to b, in the dtype of the weight."""
        if self.stochastic:
            block = round_rows(block, self.class_rows, self.state[COUNT], index, a, b)
        return block.to(self.dtype)
