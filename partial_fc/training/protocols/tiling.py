"""Who computes what: blocks of rows dealt to ranks, tiles of columns, and numbers of every row put together again.

rows [n, D]            dealt in blocks, round-robin: block b belongs to rank b mod world
columns [m, D]         in tiles; those of one identity stay together, so that their largest cosine is known within a tile
block x tile           cosines [block, tile]: all that is ever held of the n x m, in about 30 bytes each
a number of each row   filled in by the rank that has the row, 0 elsewhere; their sum is everybody's
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
TIE = 1e-6  # cosines that differ by less are equal: float32 products of the same two rows differ by as much in other tiles


def unit_rows(embeddings: Tensor, what: str, width: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`embeddings` `[n, D]` at unit length (one of zero length stays 0). UserError unless finite, [n, D], and D is `width` if given."""
    if embeddings.ndim != 2 or (width is not None and embeddings.shape[1] != width):
        wanted = "[n, D]" if width is None else f"[n, {width}]"
        raise UserError(f"the {what} embeddings are {list(embeddings.shape)}; give {wanted}")
    check_finite(embeddings)
    return F.normalize(embeddings.detach().to(dtype), dim=1)


def check_labels(labels: Tensor, count: int, what: str) -> Tensor:
    """The labels as int64; UserError unless there is one integer for each of `count` embeddings."""
    if labels.shape != (count,) or labels.is_floating_point():
        raise UserError(
            f"the {what} labels are {list(labels.shape)} {labels.dtype}; give one integer for each of the {count} embeddings"
        )
    return labels.long()


def check_tile(tile: int) -> None:
    if tile < 1:
        raise UserError(f"the evaluation tile is {tile}: give at least 1 image a side (2048 is usual)")


def dealt(count: int, block: int, rank: int, world: int, what: str, progress: bool) -> Iterator[Tensor]:
    """The rows of this rank's blocks, a tensor of positions each; with a bar if `progress`."""
    starts = range(0, count, block)[rank::world]
    for start in tqdm(starts, desc=what, unit="block", disable=not progress, leave=False):
        yield torch.arange(start, min(start + block, count))


def groups(sizes: Tensor, tile: int) -> Iterator[tuple[int, int]]:
    """Ranges lo..hi of identities that have at most `tile` images together; one that has more by itself is a range of its own.

    sizes: images of each identity `[identities]`, which lie one after another.
    """
    ends = sizes.cumsum(0)
    lo = 0
    while lo < len(sizes):
        before = int(ends[lo - 1]) if lo else 0
        hi = max(lo + 1, int(torch.searchsorted(ends, before + tile, right=True)))
        yield lo, hi
        lo = hi


class Together:
    """Numbers of `count` rows, each filled in by one rank; `everyone()` is all of them, on every rank, after one call of `reduce`."""

    def __init__(self, count: int, *columns: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros(count, *columns, dtype=dtype)

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        self.values[rows] = values.to(self.values)

    def everyone(self, reduce: Reduce | None) -> Tensor:
        return self.values if reduce is None else reduce(self.values)
