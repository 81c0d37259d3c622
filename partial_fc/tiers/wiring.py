"""What a head whose rows are in a store cannot do, in words."""

from __future__ import annotations

WHOLE_GRADIENT = (
    "this head keeps its rows in {storage}, and with sample_rate=1.0 their gradient would be another whole matrix in "
    "memory: build RowOptimizer(torch.optim.SGD, head, ..., update_in_backward=True), which moves rows while they are "
    "read (without clipping), or give a sample_rate below 1"
)
MOVED = (
    "rows in {storage} keep their device and dtype: build the head with dtype=..., or save a checkpoint and load it "
    "into a head without storage"
)
COPIED = (
    "a head whose rows are in files cannot be copied or pickled: save a checkpoint, and load it into a head that is "
    "built with another FileRows, or without storage"
)
