"""Optimizers that touch only the rows that have a gradient, and one gradient norm over replicated and sharded
parameters.

row_optimizer    RowOptimizer: one step of a torch optimizer class over class rows, block by block
in_backward      the same inside backward (update_in_backward)
low_precision    half-precision weights that move by float32 rows
rounding         stochastic rounding of half-precision weights
pads             rows that stand in a forward twice
row_state        how it is built, and its state dict: row state as DTensors
optimizer_class  what a torch optimizer class does to rows, found by trying it
clipping         clip_grad_norm_
shard_norms      norms of FSDP2's gradients, and maxima over ranks
"""

from partial_fc.optim.clipping import clip_grad_norm_
from partial_fc.optim.row_optimizer import RowOptimizer

__all__ = ["RowOptimizer", "clip_grad_norm_"]
