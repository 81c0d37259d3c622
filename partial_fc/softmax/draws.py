"""The rows of a sampled forward where the host must not wait for the device: elsewhere than on a CPU.

    window     this rank's share of w classes: known for a whole cycle (cycle_table.py), and its size sent to the host
               then, long before it is needed
    slots      one place a label of the batch, behind the window: the class, where it is this rank's, is not in the
               window and no earlier slot has it; else a *pad*, which takes no part

So how many rows there are depends on no label, and nothing here waits. The rows are those of `select_rows`. A pad is
the last row of the window once more: its logits are −inf, so that its gradient is 0. An optimizer gives it the gradient
of that row, in the same block, and so writes the same to the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.batch.row_sums import Pads
from partial_fc.sampling import Windows


@dataclass(frozen=True)
class Slots:
    """The last M of the rows of a forward."""

    window: int  # rows before them
    ids: Tensor  # [M] sorted local rows of the labels; −1 or C_local for those of other ranks or none
    pads: Tensor  # [M] which take no part
    place: Tensor  # [M] where the window has them
    drawn: Tensor  # [M] whether it has

    def find(self, rows: Tensor, local: Tensor) -> Tensor:
        """Return where each of `local [P]`, rows of the shard, stands in the forward's `rows`; any place if nowhere."""
        window = rows[: self.window]
        place = torch.searchsorted(window, local).clamp_(max=self.window - 1)
        slot = torch.searchsorted(self.ids, local).clamp_(max=len(self.ids) - 1)
        return torch.where(window.index_select(0, place) == local, place, slot + self.window)

    def mask(self, logits: Tensor, a: int, b: int, centers: int = 1) -> None:
        """Write −inf to the pads among the columns of a tile `[N, T]`, rows a to b, of which a class has `centers`."""
        window = self.window * centers
        first = max(window, a)
        if first < b:
            pads = self.pads if centers == 1 else self.pads.repeat_interleave(centers)
            logits[:, first - a :].masked_fill_(pads[first - window : b - window], -torch.inf)

    def as_pads(self) -> Pads:
        """Return the pads among the rows of the forward, as their gradient has them."""
        return Pads(self.window, self.pads)


class Draws(Windows):
    """Windows of one head on this rank, that of the coming step known before the host needs its size."""

    def select(self, step: int, labels: Tensor) -> tuple[Tensor, Slots | None]:
        """Return (local rows `[S]` of the forward, its slots). labels: class ids, −1 for none.

        Where nothing of the window is this rank's, or a cycle has no table, there are none: rows are sorted, the host
        waits.
        """
        lo, hi = self.key[3:5]
        window = self.rows(step)
        if self.tabled:
            self.table((step + 1) // self.steps)
        local = (labels.reshape(-1) - lo).clamp_(-1, hi - lo)
        if not (self.tabled and len(window) and len(local)):
            found = torch.cat((window, local)).unique()
            return found[(found >= 0) & (found < hi - lo)], None
        ids = local.sort().values
        before = torch.nn.functional.pad(ids, (1, 0), value=-1)
        repeated = ids == before[:-1]  # or −1
        place = torch.searchsorted(window, ids).clamp_(max=len(window) - 1)
        drawn = window.index_select(0, place) == ids
        pads = (drawn | repeated).logical_or_(ids == hi - lo)
        return torch.cat((window, torch.where(pads, window[-1], ids))), Slots(len(window), ids, pads, place, drawn)
