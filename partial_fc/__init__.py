"""Classification heads whose class weights are sharded over ranks, for recognisers with very many classes.

The core imports torch alone. Someone with their own training loop needs nothing but the names below;
`partial_fc.training` is an application built on them.
"""

from partial_fc import old_paths
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.gather import gather
from partial_fc.centers import CenterLoss
from partial_fc.checkpoint.checkpointer import Checkpointer
from partial_fc.checkpoint.progress import Progress
from partial_fc.checkpoint.random_state import RandomState
from partial_fc.checkpoint.save_load import load_checkpoint, save_checkpoint
from partial_fc.classes.mapping import class_mapping
from partial_fc.classes.outliers import Outliers, outliers
from partial_fc.classes.predictions import Predictions
from partial_fc.classes.queries import Neighbours
from partial_fc.diagnosis.check_margin import check_margin
from partial_fc.diagnosis.doctor import Report, doctor
from partial_fc.distributed.inquiry import RankMissing
from partial_fc.distributed.ranks import naming_the_missing
from partial_fc.errors import NonFiniteError
from partial_fc.head import PartialFC
from partial_fc.loop.divergence import DivergenceError, DivergenceWatch
from partial_fc.loop.joining import JoinedBatches
from partial_fc.loop.margin_schedule import MarginSchedule
from partial_fc.loop.preemption import PreemptionGuard
from partial_fc.margins.adaptive import AdaFace, AdaptiveMargin, CurricularFace, ElasticFace, MagFace
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import CombinedMargin
from partial_fc.margins.sphereface2 import SphereFace2
from partial_fc.margins.variants import ArcFace, CosFace, NormFace, Softmax, SphereFace, SubCenterArcFace
from partial_fc.nonfinite.check_gradients import check_gradients
from partial_fc.optim.clipping import clip_grad_norm_
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_wise import RowWiseAdagrad
from partial_fc.planning.plan import Plan, plan
from partial_fc.tiers.kinds import FileRows, HostRows
from partial_fc.weights.rank_files import RankFiles
from partial_fc.weights.single_file import export_weights, import_weights

old_paths.install()

__version__ = "0.2.0"

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
    "FileRows",
    "GlobalBatch",
    "HostRows",
    "JoinedBatches",
    "MagFace",
    "Margin",
    "MarginSchedule",
    "Neighbours",
    "NonFiniteError",
    "NormFace",
    "Outliers",
    "PartialFC",
    "Plan",
    "Predictions",
    "PreemptionGuard",
    "Progress",
    "RandomState",
    "RankFiles",
    "RankMissing",
    "Report",
    "RowOptimizer",
    "RowWiseAdagrad",
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
    "outliers",
    "plan",
    "save_checkpoint",
]
