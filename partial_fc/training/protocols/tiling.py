"""How identification and retrieval share their work: blocks of rows per rank, tiles of columns, one result per row.

rows [n, D]            split into blocks, assigned round-robin: block b belongs to rank b mod world
columns [m, D]         visited in tiles; in identification, a tile holds all images of an identity if they fit into it
block x tile           cosines [block, tile]: the only part of the n x m matrix in memory, about 30 bytes per cosine
values of each row     set by the rank that owns the row, 0 on the others; their sum over ranks is the full result
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import check_finite

Reduce = Callable[[Tensor], Tensor]
TIE = 1e-6  # cosines closer than this are equal: float32 products of the same two rows differ that much between tiles


def unit_rows(embeddings: Tensor, what: str, width: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `embeddings` `[n, D]` scaled to unit length; a row of zeros stays zero.

    Raises UserError if they are not finite or not `[n, D]`, or if D is not `width` (where given). `what` names them.
    """
    if embeddings.ndim != 2 or (width is not None and embeddings.shape[1] != width):
        wanted = "[n, D]" if width is None else f"[n, {width}]"
        raise UserError(f"the {what} embeddings have shape {list(embeddings.shape)}; give {wanted}")
    check_finite(embeddings)
    return F.normalize(embeddings.detach().to(dtype), dim=1)


def check_labels(labels: Tensor, count: int, what: str) -> Tensor:
    """Return the labels as int64. Raises UserError unless there is one integer for each of `count` embeddings."""
    if labels.shape != (count,) or labels.is_floating_point():
        raise UserError(
            f"the {what} labels have shape {list(labels.shape)} and dtype {labels.dtype}; "
            f"give one integer for each of the {count} embeddings"
        )
    return labels.long()


def check_tile(tile: int) -> None:
    """Raise UserError for a tile size below 1."""
    if tile < 1:
        raise UserError(f"the evaluation tile is {tile}; give at least 1 image per side (2048 is usual)")


def rank_blocks(count: int, block: int, rank: int, world: int, what: str, progress: bool) -> Iterator[Tensor]:
    """Yield the row indices of each block of this rank; `progress` shows a bar with the label `what`."""
    starts = range(0, count, block)[rank::world]
    for start in tqdm(starts, desc=what, unit="block", disable=not progress, leave=False):
        yield torch.arange(start, min(start + block, count))


def identity_ranges(sizes: Tensor, tile: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges lo..hi of identities with at most `tile` images in total.

    sizes: number of images of each identity `[identities]`. An identity with more than `tile` images gets a range of
    its own.
    """
    ends = sizes.cumsum(0)
    lo = 0
    while lo < len(sizes):
        before = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(torch.searchsorted(ends, before + tile, right=True)))
        yield lo, hi
        lo = hi


class RowValues:
    """Values of `count` rows `[count, *columns]`, each row computed by one rank.

    Assign with `values[rows] = ...`; `sum_over_ranks` then returns the values of all rows on every rank.
    """

    def __init__(self, count: int, *columns: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros(count, *columns, dtype=dtype)

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        self.values[rows] = values.to(self.values)

    def sum_over_ranks(self, reduce: Reduce | None) -> Tensor:
        """Return the values of all rows; calls `reduce` once, unless it is None (a single rank)."""
        return self.values if reduce is None else reduce(self.values)
