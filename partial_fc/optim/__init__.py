"""Optimizers that touch only the rows that have a gradient, and one gradient norm over replicated and sharded
parameters.

row_optimizer    RowOptimizer: one step of a torch optimizer class over class rows, block by block
in_backward      the same inside backward (update_in_backward)
rounding         stochastic rounding of half-precision weights
row_state        its state dict: row state as DTensors
optimizer_class  what a torch optimizer class does to rows, found by trying it
clipping         clip_grad_norm_
"""

from partial_fc.optim.clipping import clip_grad_norm_
from partial_fc.optim.row_optimizer import RowOptimizer

__all__ = ["RowOptimizer", "clip_grad_norm_"]
