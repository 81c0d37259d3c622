"""Variants: SphereFace, CosFace and NormFace, a plain linear classifier, ArcFace with several centers a class."""

from __future__ import annotations

from torch import Tensor

from partial_fc.distributed.given import as_whole
from partial_fc.margins.base import Margin, at_least, flag, require
from partial_fc.margins.fixed import ArcFace, CombinedMargin, Gradient
from partial_fc.margins.positives import Positives


class SphereFace(CombinedMargin):
    """cos(m·θ) (arXiv 1704.08063, equation 7, both sides normalised): the target angle is multiplied.

    The paper's m = 4 with ‖x‖ as scale needs annealing; 1.35 with a fixed scale is used since (ArcFace paper, table 1).

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, at least 1.
    """

    other_names = {"m1": "margin"}

    def __init__(self, scale: float = 64.0, margin: float = 1.35) -> None:
        super().__init__(scale, m1=at_least(1, "margin multiplies the target angle and", margin), m2=0.0)


class CosFace(CombinedMargin):
    """cos θ − m (arXiv 1801.09414, equation 4): the margin is taken from the target *cosine*.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, at least 0.
    """

    other_names = {"m3": "margin"}

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        super().__init__(scale, m2=0.0, m3=at_least(0, "margin is taken from the target cosine and", margin))


class NormFace(CombinedMargin):
    """cos θ: normalised features and weights without a margin (arXiv 1704.06369).

    Args:
        scale: s > 0, the factor of all logits.
    """

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__(scale, m2=0.0)


class Softmax(Margin):
    """A plain linear classifier, `w·x + b`: features and weights as they are, no scale.

    Args:
        bias: whether there is a b.
    """

    normalize = False

    def __init__(self, bias: bool = True) -> None:
        super().__init__(scale=1.0)
        self.bias = flag("bias", bias)

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        return cosine


class SubCenterArcFace(ArcFace):
    """cos(θ + m) with K centers a class: cos θ_j = max_k x·w_jk.

    Deng et al., "Sub-center ArcFace", ECCV 2020, equations 3 and 4. The head's weight is `[C, K, D]`; a sample's
    gradient goes to the nearest center of each class.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, radians in [0, π).
        centers: K, the rows a class has, at least 1.
        gradient: "exact" or "straight_through", as for `CombinedMargin`.
    """

    def __init__(
        self, scale: float = 64.0, margin: float = 0.5, centers: int = 3, gradient: Gradient = "exact"
    ) -> None:
        super().__init__(scale, margin, gradient)
        rows = as_whole(centers)
        require("centers, the rows a class has, must be a whole number of at least 1", centers, (rows or 0) >= 1)
        self.centers = rows or 1
