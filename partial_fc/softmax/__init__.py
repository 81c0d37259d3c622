"""The sharded cross-entropy over class rows, with a margin on the target logits.

cross_entropy   the equations, the autograd Function, and which gradients are computed and sent
inputs          what one forward takes: LossOptions, Selection, RowGradientSink
forward         target logits, sums over tiles, one combination over ranks, losses
backward        derivatives, and gradients of embeddings and class rows, tile by tile
row_tiles       class rows and targets of this rank
tiles           one tile of logits: how large it is, its product, its memory

Only where an option asks for it:

further_sums       sums over tiles beyond Σ exp: maxima, rules, smoothing, decisions, metrics
other_losses       losses that are not lse − z of a sample's one target
other_derivatives  their derivatives
other_tiles        gradients with biases, smoothing, float16, tiles computed again, rows that move in backward
ruled              rules for other classes, the filter, sub-centers
smoothing          label smoothing
decisions          margins that take every class for a binary decision
corrections        what sampled rows count for, so that they stand for all classes
penalty            MagFace's
float16, by_vectors, recompute, measured (metrics)

Elsewhere than on a CPU: at_once (lengths and directions of all rows at once), draws (rows without a wait for the
device).
"""
