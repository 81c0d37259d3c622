"""Nearest classes by an index of faiss on the CPU of each rank: not exact, and at millions of classes much less work.

    class rows [M, D] of one owner after another  ── broadcast ──>  the same rows on every rank
    rows [M, D], index of this rank's unit rows   ── search ──>     k candidates of this rank, [M, k]
                                                  ── all-gather ──> those of all ranks [M, world · k] ──> the owner's k

The index (IVF) puts rows into about 4·√C_local cells and looks into some of the cells nearest to a row: so many that
`TARGET` of the true neighbours of a few rows are found on this rank. How many are found over all ranks is measured
afterwards by the exact `topk`, of classes all over the range of ids. What is found depends on the shards, and so on the
number of ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.classes.best_classes import largest
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, Neighbours, UnitRows, topk
from partial_fc.classes.query_arguments import QUERY, check_query
from partial_fc.distributed.ranks import all_gather
from partial_fc.rows import ClassRows

FLAT_BELOW = 20_000  # rows of a rank that are compared one by one
ROWS_OF_A_CELL = 50  # that faiss wants for its means
ROWS_AT_ONCE = 1 << 14
SAMPLE = 256  # rows by which the number of cells is chosen, and recall is measured
TARGET = 0.95


class Approximate(NamedTuple):
    """What a search has found, and the share of the true neighbours in it."""

    found: Neighbours
    recall: float


def faiss_module() -> Any:
    """Return faiss. ModuleNotFoundError that says what to install."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'hard_negatives_search="faiss" needs faiss: pip install faiss-cpu (or partial_fc[faiss])'
        ) from error
    return faiss


@torch.no_grad()
def approximate_classes(class_rows: ClassRows, k: int) -> Approximate:
    """Return about the k nearest other classes of each class of this rank's shard, as `nearest_classes` does; a
    collective. ids are −1 where an index has found fewer. Of one row a class."""
    faiss, rows = faiss_module(), UnitRows(class_rows, None)
    check_query(class_rows, k, class_rows.shards.num_classes - 1, DEFAULT_TILE_BYTES, None)
    ranks, device = rows.ranks, rows.weight.device
    step = min(ROWS_AT_ONCE, max(1, DEFAULT_TILE_BYTES // (12 * ranks.world * (k + 1))))
    buffer = torch.empty(step * rows.width, dtype=rows.dtype, device=device)

    def unit(given: Tensor, first: int) -> Any:
        # a copy, because the buffer is used again
        return rows.unit(given, buffer, first)[:, 0].to("cpu", torch.float32, copy=True).numpy()

    spans = [(a, min(a + step, rows.hi)) for a in range(rows.lo, rows.hi, step)]
    blocks = [unit(rows.weight[a - rows.lo : b - rows.lo], a) for a, b in spans]
    rows.raise_nonfinite()  # an index of a NaN would find anything
    index = _index(faiss, blocks, rows.width, k + 1)
    ids = torch.full((len(rows.weight), k), -1, device=device)
    values = torch.zeros(len(rows.weight), k, device=device)
    for owner in range(ranks.world):
        lo, hi = rows.shard(owner)
        for a in range(lo, hi, step):
            b = min(a + step, hi)
            given = rows.weight[a - lo : b - lo] if ranks.group is None else rows.start_broadcast(owner, a, b)()
            cosines, places = index.search(unit(given, a), k + 1)
            near, cosines = torch.from_numpy(places).to(device), torch.from_numpy(cosines).to(device)
            near = torch.where(near < 0, -1, near + rows.lo)
            own = torch.arange(a, b, device=device)[:, None]
            cosines.masked_fill_((near < 0) | (near == own), -torch.inf)
            near, cosines = (all_gather(x, ranks.group, QUERY).transpose(0, 1).flatten(1) for x in (near, cosines))
            if owner == ranks.rank:
                best = largest(cosines, k)
                cosines, near = cosines.gather(1, best), near.gather(1, best)
                none = cosines == -torch.inf
                ids[a - lo : b - lo] = near.masked_fill_(none, -1)
                values[a - lo : b - lo] = cosines.masked_fill_(none, 0.0)
    return Approximate(Neighbours(ids, values.clamp_(-1, 1)), _recall(class_rows, rows, ids, k))


def _index(faiss: Any, blocks: list[Any], width: int, k: int) -> Any:
    """Return an index of unit rows, which looks into as many cells as `TARGET` needs. Blocks are freed when added."""
    count = sum(map(len, blocks))
    flat = faiss.IndexFlatIP(width)
    cells = min(int(4 * count**0.5), count // ROWS_OF_A_CELL)
    index = (
        flat if count < FLAT_BELOW or cells < 2 else faiss.IndexIVFFlat(flat, width, cells, faiss.METRIC_INNER_PRODUCT)
    )
    if index is flat:
        return _filled(flat, blocks)
    wanted = ROWS_OF_A_CELL * cells  # of rows that the means of cells are computed from, evenly over the shard
    chosen = [torch.from_numpy(block[:: max(1, count // wanted)]) for block in blocks]
    index.train(torch.cat(chosen).numpy())
    exact = _exact(blocks, k)
    _filled(index, blocks)
    index.nprobe = 1
    while index.nprobe < cells:
        _, places = index.search(exact[0], k)
        if _share(torch.from_numpy(places), exact[1][:, 1:]) >= TARGET:  # all but the first, the row itself
            break
        index.nprobe = min(cells, 2 * index.nprobe)
    return index


def _filled(index: Any, blocks: list[Any]) -> Any:
    while blocks:
        index.add(blocks.pop(0))
    return index


def _exact(blocks: list[Any], k: int) -> tuple[Any, Tensor]:
    """Return some rows of the blocks, evenly chosen, and the places of their k nearest rows."""
    every = max(1, sum(map(len, blocks)) // SAMPLE)
    sample = torch.cat([torch.from_numpy(block[::every]) for block in blocks])[:SAMPLE]
    best, first = sample.new_empty(len(sample), 0), 0
    places = sample.new_empty(len(sample), 0, dtype=torch.int64)
    for block in blocks:
        cosines = sample @ torch.from_numpy(block).T
        pool = torch.cat((best, cosines), 1)
        top = largest(pool, min(k, pool.shape[1]))
        here = torch.arange(first, first + len(block), device="cpu").expand(len(sample), -1)
        best, places = pool.gather(1, top), torch.cat((places, here), 1).gather(1, top)
        first += len(block)
    return sample.numpy(), places


def _share(found: Tensor, exact: Tensor) -> float:
    """Return which share of `exact [n, k]` is in the same row of `found [n, m]`."""
    return float((found[:, None, :] == exact[:, :, None]).any(2).double().mean())


def _recall(class_rows: ClassRows, rows: UnitRows, ids: Tensor, k: int) -> float:
    """Return which share of the exact neighbours of `SAMPLE` classes was found; a collective."""
    count = class_rows.shards.num_classes
    sample = torch.linspace(0, count - 1, min(SAMPLE, count), device="cpu").round().long().unique()
    own = sample[(sample >= rows.lo) & (sample < rows.hi)].to(ids.device)
    exact = topk(class_rows, rows.weight[own - rows.lo, 0], k + 1).ids
    itself = exact == own[:, None]
    itself[:, -1] |= ~itself.any(1)  # of many equal rows the class itself may not be among them
    exact = exact[~itself].view(len(own), k)
    hits = (ids[own - rows.lo][:, None, :] == exact[:, :, None]).any(2).sum(dtype=torch.float64)
    return float(all_gather(hits, rows.ranks.group, QUERY).sum()) / (len(sample) * k)
