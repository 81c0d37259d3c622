"""Label smoothing, as `F.cross_entropy` defines it, over the selected classes S of a sample that take part.

    loss_i = (1 − ε) w_i Σ_l weight_il (lse_i − z_il) + ε/|S| Σ_{c in S} w_c (lse_i − z_ic)

w are the class weights, 1 without; w_i is the mean of those of the sample's classes. A sample whose own classes weigh 0
still takes part in the second term.

The derivative of that term by a selected logit, −∂L/∂loss_i ε/|S| w_c, is a number of the sample times one of the
class. So forward needs sums only: where logits are scaled cosines, the weighted sum of all directions; else the sum
and number of the logits that take part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.softmax.inputs import LossOptions, Selection
from partial_fc.softmax.row_tiles import TargetRows


@dataclass(frozen=True)
class Smoothing:
    """One forward's label smoothing. Weights are those of classes: None, or 1, without class weights."""

    share: float  # ε
    ruled: bool  # logits of other classes are more than scaled cosines
    of_rows: Tensor | None  # [S] of the rows of this rank, 0 for pads
    of_targets: Tensor | float  # [N, L] of each target's class
    of_samples: Tensor | float  # [N] the mean over a sample's targets
    real: Tensor | None = None  # [S] 1 for rows that take part, 0 for pads; None where there are none, or ruled logits

    @classmethod
    def of(cls, options: LossOptions, selection: Selection, dtype: torch.dtype) -> Smoothing:
        """Return what a forward with label smoothing needs."""
        real = None if selection.slots is None or options.ruled else selection.slots.as_pads().real().to(dtype)
        if options.class_weights is None:
            return cls(options.label_smoothing, options.ruled, real, 1.0, 1.0, real)
        weights = options.class_weights.to(dtype)
        of_rows = weights[selection.lo : selection.hi]
        if selection.rows is not None:
            of_rows = of_rows[selection.rows]
        of_targets = weights[selection.targets.ids.clamp(min=0)]
        total = selection.targets.weights.sum(1)
        of_samples = (of_targets * selection.targets.weights).sum(1) / torch.where(total > 0, total, 1.0)
        of_rows = of_rows.repeat_interleave(options.margin.centers) if real is None else of_rows * real
        return cls(options.label_smoothing, options.ruled, of_rows, of_targets, of_samples, real)

    @property
    def weighted(self) -> bool:
        """Whether there are class weights: the same on all ranks, of which some have slots and some may have none."""
        return isinstance(self.of_targets, Tensor)

    def row_weights(self, a: int, b: int) -> Tensor | float:
        """Return the weights `[T]` of rows a to b, or 1."""
        return 1.0 if self.of_rows is None else self.of_rows[a:b]

    def flat_target_weights(self) -> Tensor | float:
        """Return the weights `[P]` of the targets' classes, or 1."""
        return self.of_targets.reshape(-1) if isinstance(self.of_targets, Tensor) else self.of_targets

    def combined(self, found: dict[str, Tensor]) -> Tensor:
        """Return (number of a sample's classes, their mean weight) `[2, 1]` or `[2, N]`, from sums over all ranks."""
        count = found["count"].clamp(min=1)
        return torch.stack((count, found["weight"] / count if "weight" in found else torch.ones_like(count)))

    def losses(self, plain: Tensor, lse: Tensor, logits: Tensor, combined: Tensor) -> Tensor:
        """Return losses `[N]`. plain `[N]`: without smoothing. logits `[N]`: the weighted sum of those of all ranks."""
        count, weight = combined
        return (1 - self.share) * self.of_samples * plain + self.share * (weight * lse - logits / count)

    # ------------------------------------------------------------------------------------------------ backward

    def counted(self, target_weights: Tensor, combined: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a loss counts its targets for `[N, L]`, and all of its classes together, `[1]` or `[N]`."""
        of_samples = self.of_samples[:, None] if isinstance(self.of_samples, Tensor) else self.of_samples
        return (1 - self.share) * of_samples * target_weights, self.share * combined[1]

    def of_every(self, d_loss: Tensor, combined: Tensor) -> Tensor:
        """Return ∂L/∂(every selected logit) `[N]`, but for the class's weight."""
        return -d_loss * self.share / combined[0]

    def of_cosines(self, d_every: Tensor, targets: TargetRows, scale: float) -> Tensor | float:
        """Return `[P]`: what every row gets below, and the rows of targets must not, whose logit a margin replaces."""
        if self.ruled:
            return 0.0
        return torch.where(targets.own, scale * targets.of_samples(d_every) * self.flat_target_weights(), 0.0)

    def shares(self, d_every: Tensor, x: Tensor, row_sum: Tensor, scale: float) -> SmoothingShares | None:
        """Return the gradients of the second term where logits are scaled cosines; None where they are ruled."""
        return None if self.ruled else SmoothingShares(self, d_every, x, row_sum, scale)


class SmoothingShares:
    """The second term's gradients where logits are scaled cosines: products of a number of the row and a vector."""

    def __init__(self, smoothing: Smoothing, d_every: Tensor, x: Tensor, row_sum: Tensor, scale: float) -> None:
        self.smoothing = smoothing
        self.of_row = (d_every @ x) * scale  # [D]
        self.of_bias = d_every.sum()
        self.of_x = d_every[:, None] * (row_sum[:-1] * scale)  # [N, D]

    def add_to_rows(self, grad: Tensor, a: int, b: int) -> None:
        """Add to the gradient `[T, D]` of the directions of rows a to b."""
        weights = self.smoothing.of_rows
        grad += self.of_row if weights is None else weights[a:b, None] * self.of_row

    def of_biases(self, a: int, b: int) -> Tensor:
        """Return the gradient of the biases of rows a to b, `[T]` or 0-d."""
        return self.of_bias * self.smoothing.row_weights(a, b)


class SmoothingSums:
    """Sums over the logits of this rank, tile by tile, each weighted by its class.

    row_sum `[D + 1]`: of the rows' directions and biases, where logits are scaled cosines; empty where they are ruled.
    """

    def __init__(self, x: Tensor, smoothing: Smoothing) -> None:
        self.x = x
        self.smoothing = smoothing
        self.row_sum = x.new_zeros(0 if smoothing.ruled else x.shape[1] + 1)
        self.logit_sum = x.new_zeros(len(x))
        self.count = x.new_zeros(len(x))
        self.weight = x.new_zeros(len(x))

    def add_rows(self, w: Tensor, bias: Tensor | None, a: int, b: int) -> None:
        """Add a tile of directions `[T, D]`: rows a to b."""
        weights = self.smoothing.of_rows
        self.row_sum[:-1] += w.sum(0) if weights is None else weights[a:b] @ w
        if bias is not None:
            self.row_sum[-1] += bias.sum() if weights is None else weights[a:b] @ bias

    def add_logits(self, logits: Tensor, a: int, b: int) -> None:
        """Add a tile of ruled logits `[N, T]`."""
        weights = self.smoothing.row_weights(a, b)
        present = logits > -torch.inf
        self.logit_sum += torch.where(present, logits * weights, 0.0).sum(1)
        self.count += present.sum(1)
        if self.smoothing.of_rows is not None:
            self.weight += (present * weights).sum(1)

    def finish(
        self, targets: TargetRows, target_logits: Tensor, cosines: Tensor, scale: float, rows: int
    ) -> dict[str, Tensor]:
        """Return by name: the sum of this rank's logits, targets with their margin, `[N]`; how many there are, and with
        class weights the sum of these, `[1]` or `[N]`."""
        weights = self.smoothing.of_rows
        of_targets = self.smoothing.flat_target_weights()
        if self.smoothing.ruled:
            own = targets.own.to(self.count.dtype)
            sums = self.logit_sum + targets.sum_of_samples(target_logits * of_targets)
            found = {"logits": sums, "count": self.count + targets.sum_of_samples(own)}
            if weights is not None:
                found["weight"] = self.weight + targets.sum_of_samples(own * of_targets)
            return found
        sums = (self.x @ self.row_sum[:-1] + self.row_sum[-1]) * scale
        with_margin = torch.where(targets.own, target_logits - scale * cosines, 0.0)
        sums += targets.sum_of_samples(with_margin * of_targets)
        real = self.smoothing.real
        found = {"logits": sums, "count": sums.new_full((1,), float(rows)) if real is None else real.sum()[None]}
        if weights is not None and self.smoothing.weighted:
            found["weight"] = weights.sum()[None]
        return found
