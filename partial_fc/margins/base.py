"""Margins: what happens to the cosine between an embedding and the center of its own class, and to the others.

A margin maps the target cosines `[P]` (one a sample and label) to target logits before scaling. Only a vector passes through it, never the
matrix of logits, so its derivative comes from autograd at no cost. All other logits stay `cosine`, unless the margin has a rule for them.
The head multiplies all by `scale` and takes the cross-entropy. Angles are in radians.

    Softmax           w·x + b, nothing normalised
    NormFace          cos θ                                         Wang et al. 2017, arXiv 1704.06369
    SphereFace        cos(m·θ)                                      Liu et al. 2017, arXiv 1704.08063
    CosFace           cos θ − m                                     Wang et al. 2018, arXiv 1801.09414
    ArcFace           cos(θ + m)                                    Deng et al. 2019, arXiv 1801.07698
    CombinedMargin    cos(m1·θ + m2) − m3                           the same, section 2.1
    SubCenterArcFace  cos(θ + m), θ to the nearest of K centers     Deng et al. 2020, ECCV
    CurricularFace    cos(θ + m); harder others cos θ (t + cos θ)   Huang et al. 2020, arXiv 2004.00288
    AdaFace           cos(θ − m ẑ) − m (ẑ + 1), ẑ by length         Kim et al. 2022, arXiv 2204.00964
    MagFace           cos(θ + m(a)) and a penalty g(a), a length    Meng et al. 2021, arXiv 2103.06627
    ElasticFace       cos(θ + m) or cos θ − m, m drawn at random    Boutros et al. 2022, arXiv 2109.09416
    AdaptiveMargin    cos(θ + m(n)), n samples of the class         Ha et al. 2020, arXiv 2010.05350
    SphereFace2       g(cos θ) ∓ m, each class a binary decision    Wen et al. 2022, arXiv 2108.01513

cos(m1·θ + m2) rises again once its argument passes π, which would reward embeddings for moving away from their class. From there on the
target is continued by −2 − cos(m1·θ + m2), then 2 + cos(...) and so on: the monotonic extension of SphereFace (arXiv 1704.08063,
ψ(θ) = (−1)^k cos(·) − 2k), continuous, with a continuous derivative. All angular margins here share it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.batch import all_gather
from partial_fc.sampling import keyed_below
from partial_fc.shards import local_part

Gradient = Literal["exact", "straight_through"]


@dataclass
class Positives:
    """What a margin may know of the P targets besides their cosines.

    label: `[P]` global class ids, -1 where there is no target. sample: `[P]` which sample of the global batch, counted over all ranks.
    norm: `[P]` lengths of the embeddings as they came, differentiable. exists: `[P]` where there is a target.
    draw: an integer that differs from step to step and is the same on every rank, to key random numbers with.
    """

    label: Tensor
    sample: Tensor
    norm: Tensor
    exists: Tensor
    draw: int
    replicas: dist.ProcessGroup | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values [P]` over the targets of the whole global batch (0-d, without gradient); NaN if there are none.

        The values must be known on every rank: lengths and labels are, cosines where the margin `sees_all`.
        """
        total = torch.where(self.exists, values.detach(), 0.0).sum()
        return all_gather(total, self.replicas).sum(0) / self.count()

    def count(self) -> Tensor:
        """How many targets the global batch has (0-d)."""
        return all_gather(self.exists.sum(), self.replicas).sum(0)

    def of_all_replicas(self, values: Tensor) -> tuple[Tensor, slice]:
        """(`values` of all replicas of a 2-D mesh, one after another; where this one's are). With replicas it waits for the host."""
        if self.replicas is None:
            return values, slice(0, len(values))
        counts = all_gather(torch.tensor([len(values)], device=values.device), self.replicas).flatten().tolist()
        padded = values.new_zeros(max(counts))
        padded[: len(values)] = values
        rows = all_gather(padded, self.replicas)
        start = sum(counts[: dist.get_rank(self.replicas)])
        return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)]), slice(start, start + len(values))

    def uniform(self, stream: int) -> Tensor:
        """`[P]` float64 in (0, 1): keyed by step and sample, so the same at every world size; another for every `stream`."""
        return (keyed_below(self.sample, self.draw + 0x9E3779B1 * stream, 1 << 31) + 0.5) / (1 << 31)


class Margin(nn.Module):
    """Base of all margins. A margin of your own defines `target`; see docs/margins.md.

    normalize: take embeddings and class weights at unit length, so that logits are cosines; else as they are.
    bias: whether the head adds a bias a class (only where nothing is normalised).
    centers: K rows a class, of which the nearest to a sample counts.
    sees_all: `target` gets the cosines of all targets on every rank (one more small collective), not only those of the rank's own
        classes (0 elsewhere). Always so where `negative` is defined.
    binary: (a, b) if every class is a binary decision instead of one softmax over all: the loss is then
        a · softplus(−z_y) + b · Σ softplus(z_j) over the other selected classes, z the logits.
    by_class: whether it holds a number for each class, so that other classes need another instance (`PartialFC.expand`, `remap`).
    scale: factor s of all logits.
    """

    normalize: bool = True
    bias: bool = False
    centers: int = 1
    sees_all: bool = False
    binary: tuple[float, float] | None = None
    by_class: bool = False

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, not {scale}")
        self.scale = scale

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        """Target logits before scaling, `[P]`, of target cosines `[P]`: elementwise, differentiable by cosine and `positives.norm`.

        Called once in every forward; buffers that are moved here (in training only) must move alike on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(cosine, positives)")

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        """Logits before scaling `[N, T]` of other classes' cosines, given the samples' target logits before scaling `[N, 1]`.

        Elementwise and differentiable by `cosine`; no gradient goes to `target`.
        """
        return cosine

    def penalty(self, norm: Tensor) -> Tensor | None:
        """What is added to each sample's loss `[N]`, of embedding lengths `[N]`; differentiable. None for nothing."""
        return None

    def prepare(self, num_classes: int, selected: int) -> None:
        """Called by the head that takes this margin, with its number of classes and how many of them a step selects.

        Raise ValueError if this margin is not for so many.
        """

    def reset(self) -> None:
        """Set buffers to what they are at the start."""

    def describe(self) -> str:
        """Its name and settings, "ArcFace(scale=64.0, m1=1.0, m2=0.5, ...)": what must be the same on all ranks and in a checkpoint."""
        plain = (bool, int, float, str, tuple)
        settings = {k: v for k, v in vars(self).items() if isinstance(v, plain) and not k.startswith("_") and k != "training"}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def frozen(self) -> Margin:
        """This margin with buffers of its own, which later steps do not move."""
        other = copy.copy(self)
        other._buffers = {name: None if b is None else b.clone() for name, b in self._buffers.items()}
        other._parameters = {
            name: None if p is None else nn.Parameter(local_part(p.detach()).clone()) for name, p in self._parameters.items()
        }
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Margin:
        """Running statistics move between devices, but keep their dtype: half precision would swallow what a step adds."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self

    @property
    def has_rule(self) -> bool:
        """Whether other classes' logits are more than their cosines."""
        return type(self).negative is not Margin.negative


def angular(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """cos(factor · θ + added) `[P]`, continued monotonically past π; 1 where the argument is below 0. added: radians, a number or `[P]`."""
    # acos has infinite slope at ±1: a step inside, the slope stays finite. The step is the dtype's resolution of an angle near 0,
    # so the value is unharmed: cos changes by at most its own rounding.
    edge = 1 - torch.finfo(cosine.dtype).eps
    theta = torch.acos(cosine.clamp(-edge, edge))
    beyond = (cosine < -edge) | (cosine > edge)
    argument = (factor * theta + added).clamp(min=0)
    turns = torch.floor(argument.detach() / math.pi)
    extended = torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(argument) - 2 * turns
    # a clamped cosine passes no gradient; it gets that of cos θ itself, which is 1
    return extended + torch.where(beyond, 1.0, 0.0) * (cosine - cosine.detach())


def _moved(old: Tensor, new: Tensor, rate: float) -> None:
    """In place: old ← (1 − rate) · old + rate · new, unless new is not finite (no targets, or a batch that is)."""
    old.copy_(torch.where(new.isfinite(), old.lerp(new.to(old.dtype), rate), old))


class CombinedMargin(Margin):
    """cos(m1·θ + m2) − m3 (ArcFace paper, section 2.1): m1 = 1, m3 = 0 is ArcFace; m1 = 1, m2 = 0 is CosFace.

    scale: s > 0. m1: factor of the angle, >= 1. m2: added to the angle, radians in [0, π). m3: taken from the cosine, >= 0.
    gradient: "exact" differentiates the formula, bounded at cos θ = ±1 where the angle's slope is not; "straight_through" takes
    1 for the derivative of the target logit by the cosine, as many published implementations do.
    """

    def __init__(self, scale: float = 64.0, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0, gradient: Gradient = "exact") -> None:
        super().__init__(scale)
        if not (math.isfinite(m1) and m1 >= 1):
            raise ValueError(f"m1 multiplies the target angle and must be at least 1, not {m1}")
        if not 0 <= m2 < math.pi:
            raise ValueError(f"m2 is an angle in radians in [0, pi), not {m2}")
        if not (math.isfinite(m3) and m3 >= 0):
            raise ValueError(f"m3 is taken from the target cosine and must be at least 0, not {m3}")
        if gradient not in ("exact", "straight_through"):
            raise ValueError(f'gradient must be "exact" or "straight_through", not {gradient!r}')
        self.m1, self.m2, self.m3, self.gradient = float(m1), float(m2), float(m3), gradient

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.gradient == "straight_through":
            with torch.no_grad():
                target = self._target(cosine)
            return target + (cosine - cosine.detach())
        return self._target(cosine)

    def _target(self, cosine: Tensor) -> Tensor:
        return (cosine if self.m1 == 1 and self.m2 == 0 else angular(cosine, self.m1, self.m2)) - self.m3


class SphereFace(CombinedMargin):
    """cos(m·θ) (arXiv 1704.08063, equation 7, both sides normalised): the target angle is multiplied. margin: m >= 1.

    The paper's m = 4 with ‖x‖ as scale needs annealing; 1.35 with a fixed scale is what has since been used (ArcFace paper, table 1).
    """

    def __init__(self, scale: float = 64.0, margin: float = 1.35) -> None:
        _check("margin multiplies the target angle and must be at least 1", margin, 1 <= margin < math.inf)
        super().__init__(scale, m1=margin, m2=0.0)


class ArcFace(CombinedMargin):
    """cos(θ + m) (arXiv 1801.07698, equation 3): the margin is added to the target *angle*. margin: radians in [0, π)."""

    def __init__(self, scale: float = 64.0, margin: float = 0.5, gradient: Gradient = "exact") -> None:
        _check("margin is an angle in radians in [0, pi)", margin, 0 <= margin < math.pi)
        super().__init__(scale, m2=margin, gradient=gradient)


class CosFace(CombinedMargin):
    """cos θ − m (arXiv 1801.09414, equation 4): the margin is taken from the target *cosine*. margin: >= 0."""

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        _check("margin is taken from the target cosine and must be at least 0", margin, 0 <= margin < math.inf)
        super().__init__(scale, m2=0.0, m3=margin)


class NormFace(CombinedMargin):
    """cos θ: normalised features and weights without a margin (arXiv 1704.06369)."""

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__(scale, m2=0.0)


class Softmax(Margin):
    """A plain linear classifier, `w·x + b`: features and weights as they are, no scale. bias: whether there is a b."""

    normalize = False

    def __init__(self, bias: bool = True) -> None:
        super().__init__(scale=1.0)
        self.bias = bias

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        return cosine


class SubCenterArcFace(ArcFace):
    """cos(θ + m) with K centers a class (Deng et al., "Sub-center ArcFace", ECCV 2020, equations 3 and 4): cos θ_j = max_k x·w_jk.

    The head's weight is `[C, K, D]`; a sample's gradient goes to the nearest center of each class. centers: K >= 1.
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.5, centers: int = 3, gradient: Gradient = "exact") -> None:
        super().__init__(scale, margin, gradient)
        _check("centers, the rows a class has, must be a whole number of at least 1", centers, isinstance(centers, int) and centers >= 1)
        self.centers = centers


class CurricularFace(ArcFace):
    """cos(θ + m); another class that is nearer than that, cos θ_j > cos(θ + m), has cos θ_j (t + cos θ_j) (arXiv 2004.00288, equation 9).

    t, the running mean of target cosines over the global batches (equation 10, `momentum` for the new batch, 0 at first), grows while
    embeddings come nearer to their classes, and with it the weight of hard negatives. A buffer `t`.
    """

    sees_all = True
    t: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.5, momentum: float = 0.01) -> None:
        super().__init__(scale, margin)
        _check("momentum is the weight of the new batch, in (0, 1]", momentum, 0 < momentum <= 1)
        self.momentum = momentum
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

    The length of an embedding stands for the quality of its image: a sharp one (ẑ = 1) gets a margin like CosFace's, a poor one like
    ArcFace's, of which it feels less. μ, σ: running mean and deviation of the lengths over the global batches, buffers `mean` and `std`
    that begin at 20 and 100 as the paper's code does; no gradient goes through ẑ. Embeddings must come unnormalised.
    margin: m in [0, π/2). h: concentration, > 0. momentum: weight of the new batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__(scale)
        _check("margin is an angle in radians in [0, pi/2)", margin, 0 <= margin < math.pi / 2)
        _check("h, the concentration of the lengths, must be a positive number", h, 0 < h < math.inf)
        _check("momentum is the weight of the new batch, in (0, 1]", momentum, 0 < momentum <= 1)
        self.margin, self.h, self.momentum = margin, h, momentum
        self.register_buffer("mean", torch.empty((), dtype=torch.float64))
        self.register_buffer("std", torch.empty((), dtype=torch.float64))
        self.reset()

    def reset(self) -> None:
        self.mean.fill_(20.0)
        self.std.fill_(100.0)

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        norm = positives.norm.detach().clamp(1e-3, 100.0)  # the paper's code, so that one outlier does not move the statistics
        if self.training:
            mean, count = positives.mean(norm), positives.count()
            variance = positives.mean((norm - mean) ** 2) * count / (count - 1)
            _moved(self.mean, mean, self.momentum)
            _moved(self.std, variance.sqrt(), self.momentum)
        z = (self.h * (norm - self.mean) / (self.std + 1e-3)).clamp(-1, 1).to(cosine.dtype)
        return angular(cosine, 1.0, -self.margin * z) - (self.margin * z + self.margin)


class MagFace(Margin):
    """cos(θ + m(a)), a = ‖x‖ clamped to [l_a, u_a], m linear from l_m to u_m; each loss + λ g(a) (arXiv 2103.06627, equations 3 and 6).

    g(a) = a/u_a² + 1/a rewards length, the margin makes it costly for hard samples: length becomes a measure of quality. The gradient
    goes through a. scale, l_a, u_a, l_m, u_m, penalty_weight λ: the paper's values for faces. Embeddings must come unnormalised.
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
        _check("l_a and u_a are lengths with 0 < l_a < u_a", (l_a, u_a), 0 < l_a < u_a < math.inf)
        _check("l_m and u_m are angles in radians with 0 <= l_m <= u_m < pi", (l_m, u_m), 0 <= l_m <= u_m < math.pi)
        _check("penalty_weight must be at least 0", penalty_weight, 0 <= penalty_weight < math.inf)
        self.l_a, self.u_a, self.l_m, self.u_m, self.penalty_weight = l_a, u_a, l_m, u_m, penalty_weight

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        length = positives.norm.clamp(self.l_a, self.u_a)
        return angular(cosine, 1.0, self.l_m + (length - self.l_a) * ((self.u_m - self.l_m) / (self.u_a - self.l_a)))

    def penalty(self, norm: Tensor) -> Tensor | None:
        length = norm.clamp(self.l_a, self.u_a)
        return self.penalty_weight * (length / self.u_a**2 + 1 / length)


class ElasticFace(Margin):
    """cos(θ + m_i) or cos θ − m_i with m_i drawn for each sample from N(margin, deviation) (arXiv 2109.09416, equations 5 and 6).

    kind: "arc" (margin 0.5) or "cos" (margin 0.35). plus: the drawn margins are sorted and given out by distance, the largest to the
    sample farthest from its class (ElasticFace+; deviation 0.0175 for arc, 0.025 for cos, else 0.0125). Draws are keyed by seed, step
    and sample: the same at every world size. In eval() every sample has the mean.
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
        _check('kind must be "arc" or "cos"', repr(kind), kind in ("arc", "cos"))
        margin = {"arc": 0.5, "cos": 0.35}[kind] if margin is None else margin
        deviation = ({"arc": 0.0175, "cos": 0.025}[kind] if plus else 0.0125) if deviation is None else deviation
        _check(
            "margin is an angle in radians in [0, pi), or at least 0 for cos",
            margin,
            0 <= margin < (math.pi if kind == "arc" else math.inf),
        )
        _check("deviation, of the drawn margins, must be at least 0", deviation, 0 <= deviation < math.inf)
        self.kind, self.margin, self.deviation, self.plus = kind, margin, deviation, plus
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
    """cos(θ + m_y), m_y by the number n of training samples of class y: the rarer the larger (arXiv 2010.05350, section 2.3).

    n^(−exponent), brought linearly to [smallest, largest]: the rarest class has the largest margin. For long-tailed landmarks, products.
    class_counts: samples of each class `[C]`, in the order of the labels; a class without samples counts as one with one.
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
        counts = torch.as_tensor(class_counts)
        _check("class_counts must be one number a class, [C]", list(counts.shape), counts.ndim == 1 and len(counts) > 0)
        bad = (~counts.double().isfinite() | (counts < 0)).nonzero()
        if len(bad):
            raise ValueError(f"class_counts[{int(bad[0])}] is {counts[int(bad[0])].item()}; a count is at least 0")
        _check("0 <= smallest <= largest < pi must hold, in radians", (smallest, largest), 0 <= smallest <= largest < math.pi)
        _check("exponent must be a positive number", exponent, 0 < exponent < math.inf)
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
        _check(f"class_counts must hold {num_classes} numbers, one a class", f"{len(self.margins)}", len(self.margins) == num_classes)


class SphereFace2(Margin):
    """A binary decision for every class (arXiv 2108.01513, equations 5 to 8, margin as in CosFace: "SphereFace2-C"):

        λ/r · log(1 + exp(−(r (g(cos θ_y) − m) + b))) + (1 − λ)/r · Σ_{j≠y} log(1 + exp(r (g(cos θ_j) + m) + b)),
        g(z) = 2 ((z + 1)/2)^t − 1

    No sum over classes is compared with another, so classes need no normalisation over ranks. b is one trained number for all classes,
    the parameter `offset [1]`; a `RowOptimizer` of the head trains it. At the start it balances the pulls of one own and of all other
    classes at right angles. Under sampling the sum is over the selected classes.
    scale: r > 0. margin: m >= 0. t >= 1: makes room at large similarities. balance: λ in (0, 1).
    """

    offset: nn.Parameter

    def __init__(self, scale: float = 40.0, margin: float = 0.4, t: float = 3.0, balance: float = 0.7) -> None:
        super().__init__(scale)
        _check("margin is taken from the target cosine and must be at least 0", margin, 0 <= margin < math.inf)
        _check("t, the exponent of the similarities, must be at least 1", t, 1 <= t < math.inf)
        _check("balance, the share of the own class in the loss, must be in (0, 1)", balance, 0 < balance < 1)
        self.margin, self.t, self.balance = margin, t, balance
        self.binary = (balance / scale, (1 - balance) / scale)
        self._start = 0.0
        self.offset = nn.Parameter(torch.zeros(1))

    def prepare(self, num_classes: int, selected: int) -> None:
        """`offset` at which λ σ(−(y + b)) = (1 − λ)(selected − 1) σ(o + b), y and o the logits at right angles without b."""
        ratio = self.balance / ((1 - self.balance) * max(1, selected - 1))
        own, other = (self.scale * (2 * 0.5**self.t - 1 + sign * self.margin) for sign in (-1, 1))
        # a quadratic equation in exp(other + b), its positive root by the one of two formulas that does not cancel
        square = math.exp(own - other)
        root_of = math.sqrt((1 - ratio) ** 2 + 4 * ratio * square)
        root = 2 * ratio / (1 - ratio + root_of) if ratio < 1 else (ratio - 1 + root_of) / (2 * square)
        self._start = math.log(root) - other
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            local_part(self.offset).fill_(self._start)

    def _similarity(self, cosine: Tensor) -> Tensor:
        return 2 * ((cosine.clamp(-1, 1) + 1) / 2) ** self.t - 1 + local_part(self.offset.detach()).to(cosine.dtype) / self.scale

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        return self._similarity(cosine) - self.margin

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        return self._similarity(cosine) + self.margin


def _check(what: str, value: Any, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{what}, not {value}")
