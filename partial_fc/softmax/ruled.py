"""Logits of other classes that are more than scaled cosines: a margin's rule, the inter-class filter, sub-centers.

A tile goes through `ruled_logits` before the exponential, and what is kept are exponentials times the rule's
derivative, so that backward does not know the difference. Only label smoothing then needs the logits themselves again:
with both, logits are always tiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margins.angles import nearer
from partial_fc.margins.base import Margin
from partial_fc.softmax.corrections import Correction
from partial_fc.softmax.float16 import scaled_values
from partial_fc.softmax.inputs import LossOptions
from partial_fc.softmax.row_tiles import RowTiles, TargetRows
from partial_fc.softmax.smoothing import Smoothing


@dataclass(frozen=True)
class Rule:
    """A margin's rule for other classes as it was in one forward.

    margin: a copy with buffers of its own, because logits that are computed again in backward must be those of the
    forward.
    target: `[N, 1]`, what the rule compares cosines with: the sample's target logits before scaling, averaged by the
    targets' weights.
    near: `[N, 1]`, the cosine from which on a class is one of the nearest, whose angle counts as less by `penalty`
    (nearest_others.py); None without such a penalty.
    """

    margin: Margin
    target: Tensor
    near: Tensor | None = None
    penalty: float = 0.0

    @classmethod
    def of(cls, margin: Margin, target_logits: Tensor, weights: Tensor) -> Rule:
        """Freeze the rule of a margin. target_logits: `[P]`, on every rank. weights: `[N, L]`."""
        total = weights.sum(1, keepdim=True)
        mean = (target_logits.view_as(weights) * weights).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return cls(margin.frozen(), mean / margin.scale)

    def __call__(self, cosines: Tensor) -> Tensor:
        """Return logits before scaling `[N, T]`, elementwise, of the cosines of other classes."""
        if self.near is not None:
            cosines = torch.where(cosines >= self.near, nearer(cosines, self.penalty), cosines)
        return self.margin.negative(cosines, self.target)


def rows_of_classes(classes: Tensor | None, centers: int) -> Tensor | None:
    """Return the rows `[n · K]` of the K sub-centers of each class `[n]`; None for all."""
    if classes is None or centers == 1:
        return classes
    return (classes[:, None] * centers + torch.arange(centers, device=classes.device)).reshape(-1)


def nearest_centers(x: Tensor, rows: RowTiles, targets: TargetRows, centers: int) -> Tensor:
    """Return for each target the position `[P]` of that center of its class which is nearest to the sample."""
    positions = targets.first[:, None] + torch.arange(centers, device=x.device)
    directions = rows.at(positions.reshape(-1))[0].view(len(targets.first), centers, x.shape[1])
    return targets.first + torch.linalg.vecdot(targets.of_samples(x)[:, None], directions).argmax(1)


def ruled_logits(
    options: LossOptions, rule: Rule | None, cosines: Tensor, targets: TargetRows, a: int
) -> tuple[Tensor, Tensor | None]:
    """Return (logits `[N, T]`, −inf where a class takes no part; ∂logit/∂(scaled cosine), None where it is 1).

    Of the sub-centers of a class only the nearest takes part. Beyond `interclass_filter` a class is taken for the
    sample's own under another label, and takes no part either.
    """
    slope = None
    if rule is not None and torch.is_inference_mode_enabled():  # which nothing is differentiated in
        logits = rule(cosines) * options.scale
    elif rule is not None:
        with torch.enable_grad():  # on one tile; the rule is elementwise, so the derivative of the sum is that of each
            leaf = cosines.detach().requires_grad_()
            ruled = rule(leaf)
            slope = torch.autograd.grad(ruled.sum(), leaf)[0]
        logits = ruled.detach() * options.scale
    else:
        logits = cosines * options.scale
    if options.interclass_filter is not None:
        logits.masked_fill_(cosines > options.interclass_filter, -torch.inf)
    centers = options.margin.centers
    if centers > 1 and logits.numel():
        by_class = cosines.view(len(cosines), -1, centers)
        nearest = by_class.argmax(2, keepdim=True)
        others = torch.ones_like(by_class, dtype=torch.bool).scatter_(2, nearest, False)
        logits.view_as(by_class).masked_fill_(others, -torch.inf)
    mask_targets(logits, targets, a, centers)
    return logits, slope


def mask_targets(logits: Tensor, targets: TargetRows, a: int, centers: int) -> None:
    """Write −inf where a column of the tile `[N, T]` is a pad or a center of the class of a target: targets count with
    their margin elsewhere. a: row of the first column."""
    width = logits.shape[1]
    if not logits.numel():
        return
    if targets.slots is not None:
        targets.slots.mask(logits, a, a + width, centers)
    first, own = ((t.view(targets.exists.shape)) for t in (targets.first - a, targets.own))
    # a sample without a target in this tile writes back what it reads; several targets a sample go one by one, so that
    # none undoes another
    for each in range(first.shape[1]):
        for center in range(centers):
            at = first[:, each : each + 1] + center
            here = own[:, each : each + 1] & (at >= 0) & (at < width)
            at = at.clamp(0, width - 1)
            logits.scatter_(1, at, torch.where(here, -torch.inf, logits.gather(1, at)))


def ruled_gradient(
    cosines: Tensor,
    a: int,
    options: LossOptions,
    rule: Rule | None,
    targets: TargetRows,
    lse: Tensor,
    d_lse: Tensor,
    d_every: Tensor | None,
    smoothing: Smoothing | None,
    correction: Correction | None,
    product: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return (e `[N, T]`, factor `[N, 1]`) with ∂L/∂(scaled cosine) = e · factor, where the class is no target.

    lse, d_lse: `[N, 1]`. d_every `[N]`: ∂L/∂(every selected logit), of label smoothing, but for the class's weight.
    """
    logits, slope = ruled_logits(options, rule, cosines, targets, a)
    e = logits.sigmoid() if options.binary else (logits - lse).exp_()
    if correction is not None:
        e *= correction.weights(a, a + e.shape[1])
    if smoothing is not None and d_every is not None:
        share = torch.where(d_lse != 0, d_every[:, None] / d_lse, 0.0)
        e += share * (logits > -torch.inf) * smoothing.row_weights(a, a + e.shape[1])
    if slope is not None:
        e *= slope
    if product is not torch.float16:
        return e.to(product), d_lse
    e, factor = scaled_values(e)
    return e, d_lse * factor
