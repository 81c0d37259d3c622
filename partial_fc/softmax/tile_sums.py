"""Sums over the logits of this rank, tile by tile.

for rows a to b:   logits = s · x wᵀ, targets masked   [N, T]
                   e = exp(logits − m)                 m [N, 1] the running maximum, 0 where logits are bounded
                   total += Σ_j e_ij                   rescaled when m rises
                   kept[:, a:b] = e                    for backward, in kept mode
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.decisions import softplus
from partial_fc.softmax.inputs import LossOptions, Selection
from partial_fc.softmax.row_tiles import OwnTargets, RowTiles
from partial_fc.softmax.ruled import Rule, ruled_logits
from partial_fc.softmax.smoothing import SmoothingSums
from partial_fc.softmax.tiles import is_bounded, mask_targets, tile_logits


class TileSums:
    """Call `add` for each tile of rows.

    maximum `[N, 1]`: largest logit so far, 0 where logits are bounded. total `[N, 1]`: sum of exponentials less the
    maximum. kept `[N · S]`: exponentials for backward, tile after tile, empty in tiled mode; maxima `[tiles, N, 1]`: what
    was subtracted from them. For margins of binary decisions total is the sum of their losses, kept holds their
    derivatives, and active `[N]` is the sum of these. hardest `[N]`: largest cosine, for metrics.
    """

    def __init__(
        self,
        x: Tensor,
        rows: RowTiles,
        targets: OwnTargets,
        selection: Selection,
        options: LossOptions,
        rule: Rule | None,
        tile: int,
        product: torch.dtype,
        keep: bool,
    ) -> None:
        self.rows = rows
        self.targets = targets
        self.options = options
        self.rule = rule
        self.keep = keep
        self.stats = x.dtype
        self.samples = samples = len(x)
        self.bounded = is_bounded(options, self.stats, product)
        self.maximum = x.new_full((samples, 1), 0.0 if self.bounded else torch.finfo(self.stats).min)
        self.total = x.new_zeros(samples, 1)
        self.kept = x.new_empty(0)
        if keep:
            name = "logits" if selection.rows is None else "selected logits"
            self.kept = rows.workspace.take(name, (samples * rows.count,), product, x.device)
        self.maxima = x.new_empty(-(-rows.count // tile) if keep else 0, samples, 1)
        # bounded exponentials may be computed in the products' dtype at once; their sum is in that of the statistics
        work = product if self.bounded and not options.ruled else self.stats
        in_place = keep and product == work
        self.scratch = None if in_place else x.new_empty(samples * min(tile, max(rows.count, 1)), dtype=work)
        self.scaled = (x if options.ruled else x * options.margin.scale).to(product)
        self.smoothing = SmoothingSums(x, options.ruled) if options.label_smoothing else None
        self.active = x.new_zeros(samples) if options.margin.binary else None
        self.hardest = x.new_full((samples,), torch.finfo(self.stats).min) if options.metrics else None

    def add(self, t: int, a: int, b: int) -> None:
        """Add tile t: rows a to b."""
        samples, shape = self.samples, (self.samples, b - a)
        w = self.rows.tile(a, b)
        bias = self.rows.tile_bias(a, b)
        where = self.kept[samples * a : samples * b] if self.scratch is None else self.scratch[: samples * (b - a)]
        logits = tile_logits(self.scaled, w, bias, where.view(shape))
        slope = None
        if self.options.ruled:
            cosines = logits
            logits, slope = ruled_logits(self.options, self.rule, cosines, self.targets, a)
            if self.smoothing is not None:
                self.smoothing.add_logits(logits)
            if self.hardest is not None:
                self._find_hardest(torch.where(logits > -torch.inf, cosines, -torch.inf), 1.0)
        else:
            mask_targets(logits, self.targets, samples, a)
            self._find_hardest(logits, self.options.margin.scale)
            if self.smoothing is not None:
                self.smoothing.add_rows(w, bias)
        if self.active is not None:
            self.total.add_(softplus(logits).sum(1, keepdim=True))
            self.active.add_(logits.sigmoid_().sum(1))
        else:
            self._exponentiate(logits)
        if self.keep:
            self.maxima[t] = self.maximum
            if slope is not None:
                logits.mul_(slope)  # backward then needs no rule
            if self.scratch is not None or self.options.ruled:
                self.kept[samples * a : samples * b].view(shape).copy_(logits)

    def _exponentiate(self, logits: Tensor) -> None:
        """Replace a tile of logits by exponentials and add them up."""
        if not self.bounded and self.samples:
            before = self.maximum
            self.maximum = torch.maximum(before, logits.amax(1, keepdim=True))
            logits.sub_(self.maximum)
            self.total.mul_((before - self.maximum).exp_())
        self.total.add_(logits.exp_().sum(1, keepdim=True, dtype=self.stats))

    def _find_hardest(self, logits: Tensor, scale: float) -> None:
        if self.hardest is not None and logits.numel():
            self.hardest = torch.maximum(self.hardest, logits.amax(1).to(self.stats) / scale)
