"""Optimizers that touch only the rows that have a gradient, and one gradient norm over replicated and sharded parameters."""

from partial_fc.optim.clipping import clip_grad_norm_
from partial_fc.optim.row_optimizer import HasRows, RowOptimizer

__all__ = ["HasRows", "RowOptimizer", "clip_grad_norm_"]
