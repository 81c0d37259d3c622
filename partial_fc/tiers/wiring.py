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

WRITTEN = (
    "class rows in {storage} were written before they had their initial values, which would take the place of what was "
    "written when a step first uses a row: call catch_up() of the RowOptimizer before, which gives all rows theirs; or "
    "bring your own rows by load_state_dict, init_from_embeddings or import_weights"
)
