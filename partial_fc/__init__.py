"""Classification heads whose class weights are sharded over ranks, for recognisers with very many classes.

The core imports torch alone. Someone with their own training loop needs nothing but the names below; `partial_fc.training` is an
application built on them.
"""

from partial_fc.centers import CenterLoss
from partial_fc.check import check_margin
from partial_fc.checkpoint import load_checkpoint, save_checkpoint
from partial_fc.checkpointer import Checkpointer
from partial_fc.collectives import GlobalBatch, NonFiniteError, gather
from partial_fc.divergence import DivergenceError, DivergenceWatch
from partial_fc.doctor import Report, doctor
from partial_fc.exchange import export_weights, import_weights
from partial_fc.head import PartialFC
from partial_fc.joining import JoinedBatches
from partial_fc.margins import (
    AdaFace,
    AdaptiveMargin,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
    SphereFace,
    SphereFace2,
    SubCenterArcFace,
)
from partial_fc.migration import RankFiles
from partial_fc.missing import RankMissing, naming_the_missing
from partial_fc.moves import class_mapping
from partial_fc.nonfinite import check_gradients
from partial_fc.optim import RowOptimizer, clip_grad_norm_
from partial_fc.plan import Plan, plan
from partial_fc.preemption import PreemptionGuard
from partial_fc.queries import Neighbours
from partial_fc.random_state import RandomState

__version__ = "0.1.0"

__all__ = [
    "AdaFace",
    "AdaptiveMargin",
    "ArcFace",
    "CenterLoss",
    "Checkpointer",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "DivergenceError",
    "DivergenceWatch",
    "ElasticFace",
    "GlobalBatch",
    "JoinedBatches",
    "MagFace",
    "Margin",
    "Neighbours",
    "NonFiniteError",
    "NormFace",
    "PartialFC",
    "Plan",
    "PreemptionGuard",
    "RandomState",
    "RankFiles",
    "RankMissing",
    "Report",
    "RowOptimizer",
    "Softmax",
    "SphereFace",
    "SphereFace2",
    "SubCenterArcFace",
    "check_gradients",
    "check_margin",
    "class_mapping",
    "clip_grad_norm_",
    "doctor",
    "export_weights",
    "gather",
    "import_weights",
    "load_checkpoint",
    "naming_the_missing",
    "plan",
    "save_checkpoint",
]
