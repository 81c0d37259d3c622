"""The rows of a sampled forward where the host must not wait for the device: elsewhere than on a CPU.

    window     this rank's share of w classes: drawn for several steps at a time, and its size is sent to the host then,
               long before it is needed
    slots      one place a label of the batch, behind the window: the class, where it is this rank's, is not in the
               window and no earlier slot has it; else a *pad*, which takes no part

So how many rows there are depends on no label, and nothing here waits. The rows are those of `select_rows`. A pad is
the last row of the window once more: its logits are −inf, so that its gradient is 0. An optimizer gives it the gradient
of that row, in the same block, and so writes the same to the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.shards import ClassShards
from partial_fc.sampling import draw_window, window_size

MOST_DRAWN = 1 << 22  # class ids drawn at a time


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

    def mask(self, logits: Tensor, a: int, b: int) -> None:
        """Write −inf to the pads among the columns of a tile `[N, T]`, rows a to b."""
        first = max(self.window, a)
        if first < b:
            logits[:, first - a :].masked_fill_(self.pads[first - self.window : b - self.window], -torch.inf)


class Draws:
    """Windows of the coming steps of one head on this rank."""

    def __init__(
        self,
        num_classes: int,
        sample_rate: float,
        seed: int,
        shards: ClassShards,
        device: torch.device,
        block: int = 1,
    ) -> None:
        self.key = (num_classes, sample_rate, seed, shards.lo, shards.hi, device, block)
        self.known: dict[int, tuple[Tensor, _Arriving, int]] = {}  # by step: sorted rows, sizes, which of them

    def __getstate__(self) -> dict[str, Any]:
        return {"key": self.key, "known": {}}

    def select(self, step: int, labels: Tensor, slots: bool) -> tuple[Tensor, Slots | None]:
        """Return (local rows `[S]` of the forward, its slots). labels: class ids, −1 for none.

        Without slots, and where nothing of the window is this rank's, rows are sorted, and the host waits.
        """
        lo, hi = self.key[3:5]
        window = self._window(step)
        local = (labels.reshape(-1) - lo).clamp_(-1, hi - lo)
        if not (slots and len(window) and len(local)):
            found = torch.cat((window, local)).unique()
            return found[(found >= 0) & (found < hi - lo)], None
        ids = local.sort().values
        repeated = torch.nn.functional.pad(ids[1:] == ids[:-1], (1, 0))
        place = torch.searchsorted(window, ids).clamp_(max=len(window) - 1)
        drawn = window.index_select(0, place) == ids
        pads = (drawn | repeated).logical_or_(ids == hi - lo).logical_or_(ids < 0)
        return torch.cat((window, torch.where(pads, window[-1], ids))), Slots(len(window), ids, pads, place, drawn)

    def _window(self, step: int) -> Tensor:
        """Return the sorted local rows of the step's window."""
        if step not in self.known:
            self.known = {}
            self._draw(step)
        rows, sizes, place = self.known.pop(step)
        window = rows[: sizes.values()[place]]
        if step + 1 not in self.known:
            self._draw(step + 1)
        return window

    def _draw(self, step: int) -> None:
        """Draw some windows from that of `step` on, all of one cycle, and send their sizes to the host."""
        num_classes, sample_rate, seed, lo, hi, device, block = self.key
        size = window_size(num_classes, sample_rate, block)
        blocks = -(-num_classes // block)
        steps_in_cycle = -(-blocks // (size // block))
        count = max(1, min(steps_in_cycle - step % steps_in_cycle, MOST_DRAWN // size))
        ids = draw_window(num_classes, sample_rate, seed=seed, step=step, device=device, steps=count, block=block)
        local = ids.view(count, size) - lo
        inside = (local >= 0) & (local < hi - lo)
        rows = torch.where(inside, local, hi - lo).sort(1).values
        every = hi - lo == num_classes and num_classes % block == 0
        sizes = _Arriving([size] * count if every else inside.sum(1))
        self.known |= {step + i: (rows[i], sizes, i) for i in range(count)}


class _Arriving:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor | list[int]) -> None:
        self.numbers = numbers
        self.event: Any = None
        if isinstance(numbers, Tensor):
            device, pinned = numbers.device, numbers.device.type == "cuda"
            host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=pinned)
            self.numbers = host.copy_(numbers, non_blocking=True)
            self.event = torch.get_device_module(device).Event()
            self.event.record()

    def values(self) -> list[int]:
        """Return them; they have long arrived, but in the first step."""
        if self.event is not None and isinstance(self.numbers, Tensor):
            if not self.event.query():
                self.event.synchronize()
            self.numbers, self.event = self.numbers.tolist(), None
        return self.numbers  # type: ignore[return-value]
