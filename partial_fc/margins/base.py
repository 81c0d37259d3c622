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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.margins.positives import Positives
from partial_fc.shards import local_part


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
        settings = {
            k: v for k, v in vars(self).items() if isinstance(v, plain) and not k.startswith("_") and k != "training"
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def frozen(self) -> Margin:
        """This margin with buffers of its own, which later steps do not move."""
        other = copy.copy(self)
        other._buffers = {name: None if b is None else b.clone() for name, b in self._buffers.items()}
        other._parameters = {
            name: None if p is None else nn.Parameter(local_part(p.detach()).clone())
            for name, p in self._parameters.items()
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


def require(what: str, value: Any, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{what}, not {value}")
