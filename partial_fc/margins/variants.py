"""ArcFace, SphereFace, CosFace and NormFace, a plain linear classifier, ArcFace with several centers a class."""

from __future__ import annotations

from torch import Tensor

from partial_fc.distributed.given import as_whole
from partial_fc.margins.angles import Gradient, PastPi
from partial_fc.margins.base import Margin, angle, at_least, flag, require
from partial_fc.margins.fixed import CombinedMargin
from partial_fc.margins.positives import Positives


class ArcFace(CombinedMargin):
    """cos(θ + m) (arXiv 1801.07698, equation 3): the margin is added to the *angle*.

    Args:
        scale: s > 0, the factor of all logits.
        margin: m, radians in [0, π).
        gradient: "exact" or "straight_through", as for `CombinedMargin`.
        past_pi: the target where θ + m is above π: "monotonic", "plain", "sine" or "joined", as for `CombinedMargin`.
        easy_margin: no margin beyond θ = π/2.
    """

    other_names = {"m2": "margin"}

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        gradient: Gradient = "exact",
        past_pi: PastPi = "monotonic",
        easy_margin: bool = False,
    ) -> None:
        super().__init__(scale, 1.0, angle("margin", margin), 0.0, gradient, past_pi, easy_margin)


class SphereFace(CombinedMargin):
    """cos(m·θ) (arXiv 1704.08063, equation 7, both sides normalised): the target angle is multiplied.

    1.35 with a fixed scale is used since (ArcFace paper, table 1). The paper's own form keeps the embeddings' lengths,
    with logits ‖x‖ cos θ_j and m = 4, and needs annealing: the target is (λ cos θ + ψ(θ)) / (1 + λ), ψ the continued
    cos(m·θ), and λ falls from 1000 to 5 (`MarginSchedule(argument="annealing", shape="harmonic")`).

    Args:
        scale: s > 0, the factor of all logits; 1 in the paper's own form.
        margin: m, at least 1.
        normalize_embeddings: False keeps their lengths, as the paper does.
        annealing: λ, at least 0, the weight of the cosine without a margin in the target.
    """

    other_names = {"m1": "margin"}

    def __init__(
        self, scale: float = 64.0, margin: float = 1.35, normalize_embeddings: bool = True, annealing: float = 0.0
    ) -> None:
        super().__init__(scale, m1=at_least(1, "margin multiplies the target angle and", margin), m2=0.0)
        self.normalize_embeddings = flag("normalize_embeddings", normalize_embeddings)
        self.annealing = at_least(0, "annealing, the weight of the cosine without a margin,", annealing)

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.normalize_embeddings:
            moved = super().target(cosine)
        else:
            assert positives is not None
            length = positives.norm
            moved = length * super().target(cosine / length.clamp(min=1e-12))
        return (self.annealing * cosine + moved) / (1 + self.annealing) if self.annealing else moved


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

    Without normalised embeddings logits are s ‖x‖ cos θ, as of pytorch-metric-learning's NormalizedSoftmaxLoss with a
    distance that does not normalise; its temperature is 1/s (arXiv 1811.12649).

    Args:
        scale: s > 0, the factor of all logits.
        normalize_embeddings: False takes embeddings as they are; class weights are normalised nevertheless.
    """

    def __init__(self, scale: float = 64.0, normalize_embeddings: bool = True) -> None:
        super().__init__(scale, m2=0.0)
        self.normalize_embeddings = flag("normalize_embeddings", normalize_embeddings)


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
        past_pi: the target where θ + m is above π: "monotonic", "plain", "sine" or "joined", as for `CombinedMargin`.
        easy_margin: no margin beyond θ = π/2.
    """

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        centers: int = 3,
        gradient: Gradient = "exact",
        past_pi: PastPi = "monotonic",
        easy_margin: bool = False,
    ) -> None:
        super().__init__(scale, margin, gradient, past_pi, easy_margin)
        rows = as_whole(centers)
        require("centers, the rows a class has, must be a whole number of at least 1", centers, (rows or 0) >= 1)
        self.centers = rows or 1
