"""Margins that are the same for every sample: the combined margin cos(m1·θ + m2) − m3, and ArcFace."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from partial_fc.margins.base import Margin, angle, at_least, require
from partial_fc.margins.positives import Positives

Gradient = Literal["exact", "straight_through"]


def angular(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """Return cos(factor · θ + added) `[P]`, continued monotonically past π; 1 below 0. added: radians."""
    # acos has infinite slope at ±1: a step inside, the slope stays finite. The step is the dtype's resolution of an
    # angle near 0, so the value is unharmed: cos changes by at most its own rounding.
    edge = 1 - torch.finfo(cosine.dtype).eps
    theta = torch.acos(cosine.clamp(-edge, edge))
    beyond = (cosine < -edge) | (cosine > edge)
    argument = (factor * theta + added).clamp(min=0)
    turns = torch.floor(argument.detach() / math.pi)
    extended = torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(argument) - 2 * turns
    # a clamped cosine passes no gradient; it gets that of cos θ itself, which is 1
    return extended + torch.where(beyond, 1.0, 0.0) * (cosine - cosine.detach())


class CombinedMargin(Margin):
    """cos(m1·θ + m2) − m3 (ArcFace paper, section 2.1): m1 = 1, m3 = 0 is ArcFace; m1 = 1, m2 = 0 is CosFace.

    Args:
        scale: s > 0, the factor of all logits.
        m1: factor of the target angle, at least 1.
        m2: added to the target angle, radians in [0, π).
        m3: taken from the target cosine, at least 0.
        gradient: "exact" differentiates the formula, bounded at cos θ = ±1 where the angle's slope is not;
            "straight_through" takes 1 for ∂(target logit)/∂cosine, as many published implementations do.
    """

    def __init__(
        self, scale: float = 64.0, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0, gradient: Gradient = "exact"
    ) -> None:
        super().__init__(scale)
        self.m1, self.m2 = at_least(1, "m1 multiplies the target angle and", m1), angle("m2", m2)
        self.m3 = at_least(0, "m3 is taken from the target cosine and", m3)
        known = gradient in ("exact", "straight_through")
        require('gradient must be "exact" or "straight_through"', repr(gradient), known)
        self.gradient = gradient

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.gradient == "straight_through":
            with torch.no_grad():
                target = self._target(cosine)
            return target + (cosine - cosine.detach())
        return self._target(cosine)

    def _target(self, cosine: Tensor) -> Tensor:
        return (cosine if self.m1 == 1 and self.m2 == 0 else angular(cosine, self.m1, self.m2)) - self.m3


class ArcFace(CombinedMargin):
    """cos(θ + m) (arXiv 1801.07698, equation 3): the margin is added to the *angle*.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, radians in [0, π).
        gradient: "exact" or "straight_through", as for `CombinedMargin`.
    """

    other_names = {"m2": "margin"}

    def __init__(self, scale: float = 64.0, margin: float = 0.5, gradient: Gradient = "exact") -> None:
        super().__init__(scale, m2=angle("margin", margin), gradient=gradient)
