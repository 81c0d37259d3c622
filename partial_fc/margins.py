"""Margins: what happens to the cosine between an embedding and the center of its own class.

A margin maps the target cosines `[P]` (one a sample and label) to target logits before scaling; all other logits stay `cosine`. The head
multiplies both by `scale` and takes the cross-entropy. Only a vector passes through a margin, never the matrix of logits, so its
derivative comes from autograd at no cost. Angles are in radians.

    NormFace          cos θ                               Wang et al. 2017, arXiv 1704.06369
    CosFace           cos θ − m                           Wang et al. 2018, arXiv 1801.09414
    ArcFace           cos(θ + m)                          Deng et al. 2019, arXiv 1801.07698
    CombinedMargin    cos(m1·θ + m2) − m3                 the same, section 2.1
    Softmax           w·x + b, nothing normalised

cos(m1·θ + m2) rises again once its argument passes π, which would reward embeddings for moving away from their class. From there on the
target is continued by −2 − cos(m1·θ + m2), then 2 + cos(...) and so on: the monotonic extension of SphereFace (arXiv 1704.08063,
ψ(θ) = (−1)^k cos(·) − 2k), continuous, with a continuous derivative.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Gradient = Literal["exact", "straight_through"]


class Margin(nn.Module):
    """Base of all margins.

    normalize: take embeddings and class weights at unit length, so that logits are cosines; else as they are.
    bias: whether the head adds a bias a class (only where nothing is normalised).
    scale: factor s of all logits.
    """

    normalize: bool = True
    bias: bool = False

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, not {scale}")
        self.scale = scale

    def target(self, cosine: Tensor) -> Tensor:
        """Target logits before scaling, `[P]`, of target cosines `[P]`; differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define target(cosine)")


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

    def target(self, cosine: Tensor) -> Tensor:
        if self.gradient == "straight_through":
            with torch.no_grad():
                target = self._target(cosine)
            return target + (cosine - cosine.detach())
        return self._target(cosine)

    def _target(self, cosine: Tensor) -> Tensor:
        if self.m1 == 1 and self.m2 == 0:
            return cosine - self.m3
        # acos has infinite slope at ±1: a step inside, the slope stays finite. The step is the dtype's resolution of an angle near 0,
        # so the value is unharmed: cos changes by at most its own rounding.
        edge = 1 - torch.finfo(cosine.dtype).eps
        theta = torch.acos(cosine.clamp(-edge, edge))
        beyond = (cosine < -edge) | (cosine > edge)
        argument = self.m1 * theta + self.m2
        turns = torch.floor(argument.detach() / math.pi)
        extended = torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(argument) - 2 * turns
        # a clamped cosine passes no gradient; it gets that of cos θ itself, which is 1
        return extended + torch.where(beyond, 1.0, 0.0) * (cosine - cosine.detach()) - self.m3


class ArcFace(CombinedMargin):
    """cos(θ + m) (arXiv 1801.07698, equation 3): the margin is added to the target *angle*. margin: radians in [0, π)."""

    def __init__(self, scale: float = 64.0, margin: float = 0.5, gradient: Gradient = "exact") -> None:
        _check_margin("margin is an angle in radians in [0, pi)", margin, 0 <= margin < math.pi)
        super().__init__(scale, m2=margin, gradient=gradient)


class CosFace(CombinedMargin):
    """cos θ − m (arXiv 1801.09414, equation 4): the margin is taken from the target *cosine*. margin: >= 0."""

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        _check_margin("margin is taken from the target cosine and must be at least 0", margin, 0 <= margin < math.inf)
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

    def target(self, cosine: Tensor) -> Tensor:
        return cosine


def _check_margin(what: str, margin: float, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{what}, not {margin}")
