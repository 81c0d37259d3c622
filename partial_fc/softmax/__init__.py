"""The sharded cross-entropy over class rows, with a margin on the target logits.

cross_entropy   the autograd Function, and the equations of forward and backward
inputs          what one forward takes: LossOptions, Selection, RowGradientSink
forward         target logits, sums over tiles, one combination over ranks, losses
tile_sums       the sums over the logits of this rank, tile by tile
backward        gradients of embeddings and class rows, tile by tile
row_tiles       class rows and targets of this rank
tiles           products on one tile of logits; how large a tile is
workspace       buffers that are used again in the next step

Only where an option asks for it: ruled (rules for other classes, filter, sub-centers), smoothing (label smoothing),
decisions (margins that take every class for a binary decision), measured (metrics).
"""
