"""Margins: what happens to the cosine between an embedding and the center of its own class, and to the others."""

from partial_fc.margins.adaptive import AdaFace, AdaptiveMargin, CurricularFace, ElasticFace, MagFace, SphereFace2
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import ArcFace, CombinedMargin, CosFace, NormFace, Softmax, SphereFace, SubCenterArcFace
from partial_fc.margins.positives import Positives

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
