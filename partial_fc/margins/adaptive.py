"""Margins that depend on the sample, its class or the stage of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from partial_fc.distributed.given import real
from partial_fc.margins.base import Margin, above_zero, angle, at_least, flag, momentum_of, require
from partial_fc.margins.fixed import angular
from partial_fc.margins.positives import Positives
from partial_fc.margins.variants import ArcFace


def _moved(old: Tensor, new: Tensor, rate: float) -> None:
    """In place: old ← (1 − rate) · old + rate · new, unless new is not finite (no targets, or a batch that is)."""
    old.copy_(torch.where(new.isfinite(), old.lerp(new.to(old.dtype), rate), old))


class CurricularFace(ArcFace):
    """cos(θ + m); another class that is nearer than that, cos θ_j > cos(θ + m), has cos θ_j (t + cos θ_j).

    arXiv 2004.00288, equation 9. t, the running mean of target cosines over the global batches (equation 10, `momentum`
    for the new batch, 0 at first), grows while embeddings come nearer to their classes, and with it the weight of hard
    negatives. A buffer `t`.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, radians in [0, π).
        momentum: weight of the new batch in the running mean, in (0, 1].
    """

    sees_all = True
    t: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.5, momentum: float = 0.01) -> None:
        super().__init__(scale, margin)
        self.momentum = momentum_of(momentum)
        self.register_buffer("t", torch.zeros((), dtype=torch.float64))

    def reset(self) -> None:
        self.t.zero_()

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.training and positives is not None:
            _moved(self.t, positives.mean(cosine), self.momentum)
        return super().target(cosine)

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        return torch.where(cosine > target, cosine * (self.t.to(cosine.dtype) + cosine), cosine)


class AdaFace(Margin):
    """cos(θ − m·ẑ) − (m·ẑ + m), ẑ = clip(h (‖x‖ − μ)/σ, −1, 1) (arXiv 2204.00964, equations 14 to 17).

    The length of an embedding stands for the quality of its image: a sharp one (ẑ = 1) gets a margin like CosFace's, a
    poor one like ArcFace's, of which it feels less. μ, σ: running mean and deviation of the lengths over the global
    batches, buffers `mean` and `std` that begin at 20 and 100 as the paper's code does; no gradient goes through ẑ.
    Embeddings must come unnormalised.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, radians in [0, π/2).
        h: concentration of the lengths, above 0.
        momentum: weight of the new batch in the running statistics, in (0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__(scale)
        self.margin = angle("margin", margin, math.pi / 2, "pi/2")
        self.h = above_zero("h", "h, the concentration of the lengths,", h)
        self.momentum = momentum_of(momentum)
        self.register_buffer("mean", torch.empty((), dtype=torch.float64))
        self.register_buffer("std", torch.empty((), dtype=torch.float64))
        self.reset()

    def reset(self) -> None:
        self.mean.fill_(20.0)
        self.std.fill_(100.0)

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        norm = positives.norm.detach().clamp(
            1e-3, 100.0
        )  # the paper's code, so that one outlier does not move the statistics
        if self.training:
            mean, count = positives.mean(norm), positives.count()
            variance = positives.mean((norm - mean) ** 2) * count / (count - 1)
            _moved(self.mean, mean, self.momentum)
            _moved(self.std, variance.sqrt(), self.momentum)
        z = (self.h * (norm - self.mean) / (self.std + 1e-3)).clamp(-1, 1).to(cosine.dtype)
        return angular(cosine, 1.0, -self.margin * z) - (self.margin * z + self.margin)


class MagFace(Margin):
    """cos(θ + m(a)), a = ‖x‖ clamped to [l_a, u_a], m linear from l_m to u_m; each loss + λ g(a).

    arXiv 2103.06627, equations 3 and 6. g(a) = a/u_a² + 1/a rewards length, the margin makes it costly for hard
    samples: length becomes a measure of quality. The gradient goes through a. The defaults are the paper's values for
    faces. Embeddings must come unnormalised.

    Args:
        scale: s > 0, the factor of all logits.
        l_a: least length, above 0.
        u_a: greatest length, above l_a.
        l_m: margin at l_a, radians in [0, π).
        u_m: margin at u_a, radians, at least l_m.
        penalty_weight: λ, at least 0.
    """

    def __init__(
        self,
        scale: float = 64.0,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        penalty_weight: float = 35.0,
    ) -> None:
        super().__init__(scale)
        l_a, u_a, l_m, u_m = real("l_a", l_a), real("u_a", u_a), real("l_m", l_m), real("u_m", u_m)
        require("l_a and u_a are lengths with 0 < l_a < u_a", (l_a, u_a), 0 < l_a < u_a < math.inf)
        require("l_m and u_m are angles in radians with 0 <= l_m <= u_m < pi", (l_m, u_m), 0 <= l_m <= u_m < math.pi)
        self.l_a, self.u_a, self.l_m, self.u_m = l_a, u_a, l_m, u_m
        self.penalty_weight = at_least(0, "penalty_weight", penalty_weight)

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        length = positives.norm.clamp(self.l_a, self.u_a)
        return angular(cosine, 1.0, self.l_m + (length - self.l_a) * ((self.u_m - self.l_m) / (self.u_a - self.l_a)))

    def penalty(self, norm: Tensor) -> Tensor | None:
        length = norm.clamp(self.l_a, self.u_a)
        return self.penalty_weight * (length / self.u_a**2 + 1 / length)


class ElasticFace(Margin):
    """cos(θ + m_i) or cos θ − m_i with m_i drawn for each sample from N(margin, deviation).

    arXiv 2109.09416, equations 5 and 6. Draws are keyed by seed, step and sample: the same at every world size. In
    eval() every sample has the mean.

    Args:
        scale: s > 0, the factor of all logits.
        kind: "arc", m_i is added to the angle, or "cos", it is taken from the cosine.
        margin: mean of the margins; if not given, 0.5 for "arc", 0.35 for "cos".
        deviation: of the margins, at least 0; if not given, 0.0125, and with plus 0.0175 for "arc", 0.025 for "cos".
        plus: sort the drawn margins and give the largest to the sample farthest from its class (ElasticFace+).
    """

    def __init__(
        self,
        scale: float = 64.0,
        kind: Literal["arc", "cos"] = "arc",
        margin: float | None = None,
        deviation: float | None = None,
        plus: bool = False,
    ) -> None:
        super().__init__(scale)
        require('kind must be "arc" or "cos"', repr(kind), kind in ("arc", "cos"))
        plus = flag("plus", plus)
        margin = {"arc": 0.5, "cos": 0.35}[kind] if margin is None else real("margin", margin)
        deviation = ({"arc": 0.0175, "cos": 0.025}[kind] if plus else 0.0125) if deviation is None else deviation
        require(
            "margin is an angle in radians in [0, pi), or at least 0 for cos",
            margin,
            0 <= margin < (math.pi if kind == "arc" else math.inf),
        )
        self.kind, self.margin = kind, margin
        self.deviation, self.plus = at_least(0, "deviation, of the drawn margins,", deviation), plus
        self.sees_all = plus

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        margins = self._margins(cosine.detach(), positives).to(cosine.dtype)
        return angular(cosine, 1.0, margins) if self.kind == "arc" else cosine - margins

    def _margins(self, cosine: Tensor, positives: Positives) -> Tensor:
        if not self.training:
            return torch.full_like(cosine, self.margin)
        # Box and Muller's method: two uniform numbers make a normal one
        normal = (-2 * positives.uniform(0).log()).sqrt() * (2 * math.pi * positives.uniform(1)).cos()
        drawn = self.margin + self.deviation * normal
        if not self.plus:
            return drawn
        # only existing targets take part: the others are sorted behind all of them, in both orders
        cosines, own = positives.of_all_replicas(torch.where(positives.exists, cosine, torch.inf))
        drawn, _ = positives.of_all_replicas(torch.where(positives.exists, drawn, -torch.inf))
        given = drawn.index_copy(0, cosines.argsort(), drawn.sort(descending=True).values)[own]
        return torch.where(positives.exists, given, self.margin)


class AdaptiveMargin(Margin):
    """cos(θ + m_y), m_y by the number n of training samples of class y: the rarer the larger.

    arXiv 2010.05350, section 2.3. n^(−exponent), brought linearly to [smallest, largest]: the rarest class has the
    largest margin. For long-tailed landmarks, products.

    Args:
        class_counts: samples of each class `[C]`, in the order of the labels; a class without samples counts as one
            with one.
        scale: s > 0, the factor of all logits.
        largest: margin of the rarest class, radians, below π.
        smallest: margin of the most frequent class, radians, at least 0.
        exponent: above 0.
    """

    by_class = True
    margins: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        scale: float = 64.0,
        largest: float = 0.5,
        smallest: float = 0.05,
        exponent: float = 0.25,
    ) -> None:
        super().__init__(scale)
        counts = torch.as_tensor(class_counts, device="cpu")
        require(
            "class_counts must be one number a class, [C]", list(counts.shape), counts.ndim == 1 and len(counts) > 0
        )
        bad = (~counts.double().isfinite() | (counts < 0)).nonzero()
        if len(bad):
            raise ValueError(f"class_counts[{int(bad[0])}] is {counts[int(bad[0])].item()}; a count is at least 0")
        smallest, largest = real("smallest", smallest), real("largest", largest)
        require(
            "0 <= smallest <= largest < pi must hold, in radians",
            (smallest, largest),
            0 <= smallest <= largest < math.pi,
        )
        exponent = above_zero("exponent", "exponent", exponent)
        self.largest, self.smallest, self.exponent = largest, smallest, exponent
        weights = counts.double().clamp(min=1) ** -exponent
        low, high = weights.min(), weights.max()
        place = (weights - low) / (high - low) if high > low else torch.ones_like(weights)
        self._initial = (smallest + (largest - smallest) * place).float()
        # made of what the caller gives again, so no part of a checkpoint
        self.register_buffer("margins", self._initial.clone(), persistent=False)

    def reset(self) -> None:
        self.margins.copy_(self._initial)

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        return angular(cosine, 1.0, self.margins[positives.label.clamp(min=0)].to(cosine.dtype))

    def prepare(self, num_classes: int, selected: int) -> None:
        require(
            f"class_counts must hold {num_classes} numbers, one a class",
            f"{len(self.margins)}",
            len(self.margins) == num_classes,
        )
