"""Margins: what happens to the cosine between an embedding and the center of its own class, and to the others.

A margin maps the target cosines `[P]` (one a sample and label) to target logits before scaling. Only a vector passes
through it, never the matrix of logits, so its derivative comes from autograd at no cost. All other logits stay
`cosine`, unless the margin has a rule for them. The head multiplies all by `scale` and takes the cross-entropy. Angles
are in radians.

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

cos(m1·θ + m2) rises again once its argument passes π, which would reward embeddings for moving away from their class.
From there on the target is continued by −2 − cos(m1·θ + m2), then 2 + cos(...) and so on: the monotonic extension of
SphereFace (arXiv 1704.08063, ψ(θ) = (−1)^k cos(·) − 2k), continuous, with a continuous derivative. All angular margins
here share it.
"""

from partial_fc.margins.adaptive import AdaFace, AdaptiveMargin, CurricularFace, ElasticFace, MagFace
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import CombinedMargin
from partial_fc.margins.positives import Positives
from partial_fc.margins.sphereface2 import SphereFace2
from partial_fc.margins.variants import ArcFace, CosFace, NormFace, Softmax, SphereFace, SubCenterArcFace

__all__ = [
    "AdaFace",
    "AdaptiveMargin",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "MagFace",
    "Margin",
    "NormFace",
    "Positives",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "SubCenterArcFace",
]
