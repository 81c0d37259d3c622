"""`sampling_correction="importance"`: what the rows of a sampled forward count for, so that they stand for all classes.

A row that takes part only because the window drew its class does so with probability π = w / C, w the classes of a
window; the rows of classes that are always taken (those of the batch) have π = 1. Of the classes j that are no target:

    softmax            Σ_j exp(z_j − ln π_j)       −ln π_j is added to the logit, behind the margin's rule
    binary decisions   Σ_j softplus(z_j) / π_j     each class's term is multiplied by 1/π_j

The mean of either sum over the windows is the sum over all classes: exactly so over one cycle, where w divides C. A
target has π = 1, so its logit is not changed. Nothing leaves its range: 1/π is at most C/w, so that the sum is below
(C + classes of the batch) times the largest exponential, and `is_bounded` has room for twice C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.softmax.draws import Slots


def log_weights(rows: Tensor, slots: Slots | None, always: Tensor, lo: int, share: float, dtype: torch.dtype) -> Tensor:
    """Return −ln π `[S]` of the local rows `[S]` of a forward. Nothing waits for the device.

    rows: sorted but for slots. always: ids of the classes that are always taken, in any shape and number, those that
    `rows` were selected with; ids of other ranks, or of nobody, are passed over. Slots, which were made from the same
    ids, know where the window has them. share: π of the rows of the window.
    """
    drawn = len(rows) if slots is None else slots.window
    if not drawn:  # without a window there are no slots
        return rows.new_zeros(len(rows), dtype=dtype)
    if slots is None:
        local = always.reshape(-1) - lo
        place = torch.searchsorted(rows, local).clamp_(max=drawn - 1)
        found = rows.index_select(0, place) == local
    else:
        place, found = slots.place, slots.drawn
    out = rows.new_zeros(len(rows) + 1, dtype=dtype)  # slots are always taken; one place more for what is not found
    out[:drawn].fill_(-math.log(share))
    return out.index_fill_(0, torch.where(found, place, len(rows)), 0.0)[:-1]


@dataclass(frozen=True)
class Correction:
    """The correction of one forward."""

    of_rows: Tensor  # [S · K] −ln π of each row, sub-centers as their class
    late: bool  # something else looks at the tile's logits first: a rule, a decision, a metric

    @classmethod
    def of(cls, of_classes: Tensor, centers: int, late: bool) -> Correction:
        """of_classes: −ln π `[S]` of the selected classes."""
        return cls(of_classes if centers == 1 else of_classes.repeat_interleave(centers), late)

    def in_product(self, bias: Tensor | None, a: int, b: int) -> Tensor | None:
        """Return what the forward's product of a tile takes for the biases `[T]` of rows a to b."""
        return bias if self.late else self.with_bias(bias, a, b)

    def with_bias(self, bias: Tensor | None, a: int, b: int) -> Tensor:
        """Return what is added to the logits of rows a to b, `[T]`."""
        return self.of_rows[a:b] if bias is None else bias + self.of_rows[a:b]

    def weights(self, a: int, b: int) -> Tensor:
        """Return 1/π of rows a to b, `[T]`."""
        return self.of_rows[a:b].exp()
