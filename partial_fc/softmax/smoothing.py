"""Label smoothing: ε (lse_i − mean over selected logits) is added to each loss.

Its derivative by a selected logit, −∂L/∂loss_i ε/|S|, is the same for all rows of a sample. So forward needs sums only:
where logits are scaled cosines, the sum of all directions; else the sum and number of the logits that take part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.row_tiles import TargetRows


class SmoothingSums:
    """Sums over the logits of this rank, tile by tile.

    row_sum `[D + 1]`: of the rows' directions and biases, where logits are scaled cosines; empty where they are ruled.
    """

    def __init__(self, x: Tensor, ruled: bool) -> None:
        self.x = x
        self.ruled = ruled
        self.row_sum = x.new_zeros(0 if ruled else x.shape[1] + 1)
        self.logit_sum = x.new_zeros(len(x))
        self.count = x.new_zeros(len(x))

    def add_rows(self, w: Tensor, bias: Tensor | None) -> None:
        """Add a tile of directions `[T, D]`."""
        self.row_sum[:-1] += w.sum(0)
        if bias is not None:
            self.row_sum[-1] += bias.sum()

    def add_logits(self, logits: Tensor) -> None:
        """Add a tile of ruled logits `[N, T]`."""
        present = logits > -torch.inf
        self.logit_sum += torch.where(present, logits, 0.0).sum(1)
        self.count += present.sum(1)

    def finish(
        self, targets: TargetRows, target_logits: Tensor, cosines: Tensor, scale: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Return (sum of this rank's logits, targets with their margin, `[N]`; how many there are, `[1]` or `[N]`)."""
        if self.ruled:
            sums = self.logit_sum.index_add(0, targets.sample, target_logits)
            return sums, self.count.index_add(0, targets.sample, targets.own.to(sums.dtype))
        sums = (self.x @ self.row_sum[:-1] + self.row_sum[-1]) * scale
        with_margin = torch.where(targets.own, target_logits - scale * cosines, 0.0)
        sums.index_add_(0, targets.sample, with_margin)
        return sums, sums.new_full((1,), float(rows))
