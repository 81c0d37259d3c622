"""Heads of another shape: a plain linear classifier, several centers a class."""

from __future__ import annotations

from torch import Tensor

from partial_fc.margins.base import Margin, require
from partial_fc.margins.fixed import ArcFace, Gradient
from partial_fc.margins.positives import Positives


class Softmax(Margin):
    """A plain linear classifier, `w·x + b`: features and weights as they are, no scale. bias: whether there is a b."""

    normalize = False

    def __init__(self, bias: bool = True) -> None:
        super().__init__(scale=1.0)
        self.bias = bias

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        return cosine


class SubCenterArcFace(ArcFace):
    """cos(θ + m) with K centers a class (Deng et al., "Sub-center ArcFace", ECCV 2020, equations 3 and 4): cos θ_j =
    max_k x·w_jk.

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
