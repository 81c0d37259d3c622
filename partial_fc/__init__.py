"""Classification heads whose class weights are sharded over ranks, for recognisers with very many classes.

The core imports torch alone. Someone with their own training loop needs nothing but the names below; `partial_fc.training` is an
application built on them.
"""

from partial_fc.checkpoint import load_checkpoint, save_checkpoint
from partial_fc.collectives import GlobalBatch, NonFiniteError, gather
from partial_fc.head import PartialFC
from partial_fc.margins import ArcFace, CombinedMargin, CosFace, Margin, NormFace, Softmax
from partial_fc.optim import RowOptimizer, clip_grad_norm_

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "GlobalBatch",
    "Margin",
    "NonFiniteError",
    "NormFace",
    "PartialFC",
    "RowOptimizer",
    "Softmax",
    "clip_grad_norm_",
    "gather",
    "load_checkpoint",
    "save_checkpoint",
]
