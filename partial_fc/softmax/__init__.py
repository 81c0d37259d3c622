"""The sharded cross-entropy over class rows, with a margin on the target logits.

cross_entropy   the equations, and the autograd Function
inputs          what one forward takes: LossOptions, Selection, RowGradientSink
forward         target logits, sums over tiles, one combination over ranks, losses
backward        gradients of embeddings and class rows, tile by tile
row_tiles       class rows and targets of this rank
tiles           one tile of logits: how large it is, its product, its memory

Only where an option asks for it: ruled (rules for other classes, filter, sub-centers), smoothing (label smoothing),
decisions (margins that take every class for a binary decision), penalty (MagFace's), float16, measured (metrics).
"""
