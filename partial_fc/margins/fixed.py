"""Margins that are the same for every sample: ArcFace, CosFace and their relatives."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from partial_fc.margins.base import Margin, angular, require
from partial_fc.margins.positives import Positives

Gradient = Literal["exact", "straight_through"]


class CombinedMargin(Margin):
    """cos(m1·θ + m2) − m3 (ArcFace paper, section 2.1): m1 = 1, m3 = 0 is ArcFace; m1 = 1, m2 = 0 is CosFace.

    scale: s > 0. m1: factor of the angle, >= 1. m2: added to the angle, radians in [0, π). m3: taken from the cosine, >= 0.
    gradient: "exact" differentiates the formula, bounded at cos θ = ±1 where the angle's slope is not; "straight_through" takes
    1 for the derivative of the target logit by the cosine, as many published implementations do.
    """

    def __init__(
        self, scale: float = 64.0, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0, gradient: Gradient = "exact"
    ) -> None:
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
        require("margin multiplies the target angle and must be at least 1", margin, 1 <= margin < math.inf)
        super().__init__(scale, m1=margin, m2=0.0)


class ArcFace(CombinedMargin):
    """cos(θ + m) (arXiv 1801.07698, equation 3): the margin is added to the target *angle*. margin: radians in [0, π)."""

    def __init__(self, scale: float = 64.0, margin: float = 0.5, gradient: Gradient = "exact") -> None:
        require("margin is an angle in radians in [0, pi)", margin, 0 <= margin < math.pi)
        super().__init__(scale, m2=margin, gradient=gradient)


class CosFace(CombinedMargin):
    """cos θ − m (arXiv 1801.09414, equation 4): the margin is taken from the target *cosine*. margin: >= 0."""

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        require("margin is taken from the target cosine and must be at least 0", margin, 0 <= margin < math.inf)
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

    def __init__(
        self, scale: float = 64.0, margin: float = 0.5, centers: int = 3, gradient: Gradient = "exact"
    ) -> None:
        super().__init__(scale, margin, gradient)
        require(
            "centers, the rows a class has, must be a whole number of at least 1",
            centers,
            isinstance(centers, int) and centers >= 1,
        )
        self.centers = centers
