"""Sums over tiles of logits beyond the usual Σ exp(logit). Each is taken only where something asks for it.

maximum    logits are not bounded: what is left when the largest so far is subtracted goes into the exponential
ruled      logits of other classes are more than scaled cosines (ruled.py)
smoothing  the sum of all logits, or of all directions (smoothing.py)
active     binary decisions: the sum of their losses stands for Σ exp, and that of their derivatives is new
hardest    the largest cosine of another class, for metrics

All but maximum and active are of logits before a correction (corrections.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.corrections import Correction
from partial_fc.softmax.decisions import softplus
from partial_fc.softmax.inputs import LossOptions
from partial_fc.softmax.row_tiles import TargetRows
from partial_fc.softmax.ruled import Rule, ruled_logits
from partial_fc.softmax.smoothing import Smoothing, SmoothingSums


class FurtherSums:
    """Call `add` for each tile.

    maximum `[N, 1]`: largest logit so far. maxima `[tiles, N, 1]`: subtracted from the exponentials that are kept.
    active `[N]`: Σ sigmoid(logit). hardest `[N]`. All but the maxima are None where they are not asked for.
    """

    def __init__(
        self,
        x: Tensor,
        options: LossOptions,
        targets: TargetRows,
        rule: Rule | None,
        smoothing: Smoothing | None,
        correction: Correction | None,
        bounded: bool,
        kept: int,
    ) -> None:
        """kept: how many tiles are kept for backward."""
        self.options = options
        self.targets = targets
        self.rule = rule
        self.stats = x.dtype
        self.kept = kept
        lowest = torch.finfo(x.dtype).min
        self.maximum = None if bounded else x.new_full((len(x), 1), lowest)
        self.maxima = x.new_empty(0 if bounded else kept, len(x), 1)
        self.correction = correction if correction is not None and correction.late else None
        self.smoothing = None if smoothing is None else SmoothingSums(x, smoothing)
        self.active = x.new_zeros(len(x)) if options.binary else None
        self.hardest = x.new_full((len(x),), lowest) if options.metrics else None

    def add(
        self, t: int, logits: Tensor, total: Tensor, w: Tensor, bias: Tensor | None, a: int, b: int
    ) -> tuple[Tensor, Tensor]:
        """Return (what backward needs of tile t `[N, T]`, total `[N, 1]`) with rows a to b in all sums.

        logits: scaled cosines, −inf for targets unless ruled; they are overwritten. total: of the tiles before, in
        terms of the maximum so far; for binary decisions the sum of their losses. w, bias: of the rows.
        """
        slope = None
        if self.options.ruled:
            cosines = logits
            logits, slope = ruled_logits(self.options, self.rule, cosines, self.targets, a)
            if self.smoothing is not None:
                self.smoothing.add_logits(logits, a, b)
            if self.hardest is not None:
                self._find_hardest(torch.where(logits > -torch.inf, cosines, -torch.inf), 1.0)
        else:
            self._find_hardest(logits, self.options.scale)
            if self.smoothing is not None:
                self.smoothing.add_rows(w, bias, a, b)
        if self.active is not None:
            losses = softplus(logits)
            logits.sigmoid_()
            if self.correction is not None:
                weights = self.correction.weights(a, b)
                losses.mul_(weights)
                logits.mul_(weights)
            total = total.add_(losses.sum(1, keepdim=True))
            self.active.add_(logits.sum(1))
        else:
            total = self._exponentiate(t, logits, total, a, b)
        if slope is not None and self.kept:
            logits.mul_(slope)  # backward then needs no rule
        return logits, total

    def _exponentiate(self, t: int, logits: Tensor, total: Tensor, a: int, b: int) -> Tensor:
        """Replace a tile of logits by exponentials; return the total with them."""
        if self.maximum is not None and self.correction is not None:
            logits.add_(self.correction.of_rows[a:b])
        if self.maximum is not None and len(logits):
            before = self.maximum
            self.maximum = torch.maximum(before, logits.amax(1, keepdim=True))
            logits.sub_(self.maximum)
            if t:
                total.mul_((before - self.maximum).exp_())
            if len(self.maxima):
                self.maxima[t] = self.maximum
        logits.exp_()
        if self.maximum is None and self.correction is not None:  # logits in half precision would lose what is added
            logits.mul_(self.correction.weights(a, b))
        of_tile = logits.sum(1, keepdim=True, dtype=self.stats)
        return of_tile if t == 0 else total.add_(of_tile)

    def _find_hardest(self, logits: Tensor, scale: float) -> None:
        if self.hardest is not None and logits.numel():
            self.hardest = torch.maximum(self.hardest, logits.amax(1).to(self.stats) / scale)

    def parts(self, z: Tensor, cosines: Tensor, rows: int) -> dict[str, Tensor]:
        """Return by name what the ranks combine. z, cosines `[P]`: of the targets. rows: of this rank."""
        parts: dict[str, Tensor] = {}
        if self.smoothing is not None:
            parts |= self.smoothing.finish(self.targets, z, cosines, self.options.scale, rows)
        if self.active is not None:
            parts["active"] = self.active
        if self.maximum is not None:
            parts["maximum"] = self.maximum[:, 0]
        if self.hardest is not None:
            parts["hardest"] = self.hardest
        return parts

    def for_backward(self) -> tuple[Tensor, Tensor]:
        """Return (maxima, the weighted sum of directions and biases `[D + 1]` for label smoothing, or empty)."""
        return self.maxima, self.maxima.new_empty(0) if self.smoothing is None else self.smoothing.row_sum
