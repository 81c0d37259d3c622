"""Find the classes that are nearest to an embedding or to a class, over sharded class rows. Exact, in tiles.

    topk              embeddings [N_local, D]  ── all-gather, 1,024 of all ranks at a time ──>  unit queries [Q, D]
                      queries x local class rows, a tile of cosines [Q, M] at a time  ──>  best k local rows, [Q, k]
                      ── all-gather ──>  candidates of all ranks [Q, world · k]  ──>  best k, for this rank's queries
    nearest_classes   class rows [M, D] of one owner after another  ── broadcast ──>  the same rows on every rank
                      local class rows x these rows, cosines [I, M] at a time  ──>  best k of each local class
                      On a single rank each tile is used by row and by column: only tiles [i, j >= i] are computed.

`BestClasses` (best_classes.py) keeps the best k while tiles arrive in the order of class ids. Of equal cosines the
lower id comes first.

Memory: no tensor is larger than `tile_bytes`, except the result, the best so far, and the 1,024 queries. A rank holds
one tile of cosines; the unit rows of the tile (one or two sides, each at most as many bytes); on several ranks the
received rows and the next ones, in the weight's dtype; and temporaries of selection of at most as many bytes. A tile
has at least one row on each side, however small `tile_bytes` is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch.exchange import exchange_payload
from partial_fc.classes import best_classes
from partial_fc.classes.best_classes import BestClasses, largest
from partial_fc.classes.query_arguments import QUERY, check_query, unit_factors
from partial_fc.distributed.given import whole_if_any
from partial_fc.distributed.ranks import Ranks, all_gather, all_gather_mesh, naming_the_missing
from partial_fc.distributed.shards import local_part, shard_bounds
from partial_fc.errors import NonFiniteError
from partial_fc.rows import ClassRows
from partial_fc.tiers.travel import to_device

DEFAULT_TILE_BYTES = 64 << 20
QUERIES = 1024  # embeddings of all ranks that are searched at a time
NO_CLASS = 2**62  # larger than any class id


class Neighbours(NamedTuple):
    """The nearest classes of each row: class ids int64 `[rows, k]` and cosines `[rows, k]`, descending."""

    ids: Tensor
    cosines: Tensor


def topk(
    class_rows: ClassRows,
    embeddings: Tensor,
    k: int,
    *,
    tile_bytes: int = DEFAULT_TILE_BYTES,
    progress: bool = False,
    scale: float | None = None,
) -> Neighbours:
    """Return the k classes nearest to each embedding; see `ChangeableLoss.topk` for the arguments.

    With a scale, the k classes of the largest `scale · x·w + b`, of embeddings and rows as they are, and these numbers
    in the place of cosines.
    """
    k, tile_bytes = whole_if_any(k), whole_if_any(tile_bytes)
    rows = UnitRows(class_rows, embeddings.dtype if isinstance(embeddings, Tensor) else None, plain=scale is not None)
    ranks = rows.ranks
    world = ranks.world
    all_counts = check_query(class_rows, k, class_rows.shards.num_classes, tile_bytes, embeddings)
    counts = all_counts[ranks.replica * world : (ranks.replica + 1) * world]
    kept = min(
        k, -(-class_rows.shards.num_classes // world)
    )  # candidates of a rank: k, or all classes of the largest shard
    per_rank = max(1, min(QUERIES, tile_bytes // (8 * world * kept)) // world)  # queries of a rank in a round
    elements = tile_bytes // rows.dtype.itemsize
    step = rows.fitting(elements // (per_rank * world * rows.centers), elements)
    tiles = -(-len(rows.weight) // step)
    rounds = -(-max(counts) // per_rank)
    results = [Neighbours(embeddings.new_empty(0, k, dtype=torch.int64), embeddings.new_empty(0, k, dtype=rows.dtype))]
    with _progress_bar(rounds * tiles, "topk", progress, ranks) as advance, _exact_products(rows.device):
        buffer = rows.buffer(per_rank * world * step * rows.centers)
        unit_buffer = rows.buffer(step * rows.centers * rows.width)
        for start in range(0, max(counts), per_rank):
            now = tuple(max(0, min(count - start, per_rank)) for count in counts)
            mine = embeddings.detach()[start : start + per_rank].to(rows.dtype)
            mine = mine * (unit_factors(mine) if scale is None else scale)
            (queries,) = exchange_payload([mine], now, max(now), ranks.group)
            best = BestClasses(len(queries), kept, queries, elements)
            for first in range(0, len(rows.weight), step):
                unit = rows.unit(rows.weight[first : first + step], unit_buffer, rows.lo + first)
                values = _cosines(queries[:, None], unit, buffer)
                values = values if rows.bias is None else values.add_(rows.bias[first : first + step])
                best.update(slice(None), values, rows.lo + first)
                advance()
            results.append(_merge_ranks(best, now, k, ranks))
    rows.raise_nonfinite()
    values = torch.cat([r.cosines for r in results])
    return Neighbours(torch.cat([r.ids for r in results]), values.clamp_(-1, 1) if scale is None else values)


def nearest_classes(
    class_rows: ClassRows, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
) -> Neighbours:
    """Return the k classes nearest to each class of this rank's shard; see `ChangeableLoss.nearest_classes`."""
    k, tile_bytes = whole_if_any(k), whole_if_any(tile_bytes)
    rows = UnitRows(class_rows, None)
    check_query(class_rows, k, class_rows.shards.num_classes - 1, tile_bytes, None)
    elements = tile_bytes // rows.dtype.itemsize
    step = rows.fitting(math.isqrt(elements) // rows.centers, elements)
    best = BestClasses(len(rows.weight), k, rows.buffer(0), elements)
    blocks = -(-len(rows.weight) // step)
    schedule = [(owner, *span) for owner in range(rows.ranks.world) for span in _spans(*rows.shard(owner), step)]
    total = blocks * (blocks + 1) // 2 if rows.ranks.world == 1 else blocks * len(schedule)
    with (
        _progress_bar(total, "nearest classes", progress, rows.ranks) as advance,
        _exact_products(rows.device),
    ):
        if rows.ranks.world == 1:
            _search_one_rank(rows, best, step, advance)
        else:
            _search_all_ranks(rows, best, step, schedule, advance)
    rows.raise_nonfinite()
    return Neighbours(best.ids, best.values.clamp_(-1, 1))


def _search_one_rank(rows: UnitRows, best: BestClasses, step: int, advance: Callable[[], object]) -> None:
    """Compute each pair of blocks (i, j >= i) once, and use the tile for both.

    Block j sees blocks 0, 1, ... in this order: those before j by column, then itself and the later ones by row.
    """
    tile = rows.buffer((step * rows.centers) ** 2)
    unit_buffer = rows.buffer(step * rows.centers * rows.width)
    other_buffer = rows.buffer(step * rows.centers * rows.width)
    spans = _spans(0, len(rows.weight), step)
    for i, (a, b) in enumerate(spans):
        unit = rows.unit(rows.weight[a:b], unit_buffer, a)
        for c, d in spans[i:]:
            other = unit if a == c else rows.unit(rows.weight[c:d], other_buffer, c)
            cosines = _cosines(unit, other, tile)
            if a == c:
                cosines.fill_diagonal_(-torch.inf)
            else:
                best.update(slice(c, d), cosines, a, by_column=True)
            best.update(slice(a, b), cosines, c)
            advance()


def _search_all_ranks(
    rows: UnitRows, best: BestClasses, step: int, schedule: list[tuple[int, int, int]], advance: Callable[[], object]
) -> None:
    """Compare local classes with those of every rank, in the order of ids, while the next rows are being received.

    schedule: (owner, first id, end id) of each broadcast.
    """
    tile = rows.buffer((step * rows.centers) ** 2)
    unit_buffer = rows.buffer(step * rows.centers * rows.width)
    other_buffer = rows.buffer(step * rows.centers * rows.width)
    wait = rows.start_broadcast(*schedule[0])
    for place, (_, c, d) in enumerate(schedule):
        received = wait()
        if place + 1 < len(schedule):
            wait = rows.start_broadcast(*schedule[place + 1])
        other = rows.unit(received, other_buffer, c)
        for a, b in _spans(rows.lo, rows.hi, step):
            unit = rows.unit(rows.weight[a - rows.lo : b - rows.lo], unit_buffer, a)
            cosines = _cosines(unit, other, tile)
            both = range(max(a, c), min(b, d))  # classes on both sides: leave out the class itself
            if both:
                cosines[both.start - a : both.stop - a, both.start - c : both.stop - c].fill_diagonal_(-torch.inf)
            best.update(slice(a - rows.lo, b - rows.lo), cosines, c)
            advance()


class UnitRows:
    """This rank's class rows `[C_local, K, D]` (K = 1 without sub-centers): tiles of unit rows, and their broadcast.

    plain: rows as they are in the place of unit rows, and bias `[C_local]` where there is one.
    """

    def __init__(self, class_rows: ClassRows, embeddings_dtype: torch.dtype | None, *, plain: bool = False) -> None:
        class_rows.check_group()
        class_rows.catch_up()
        shards = class_rows.shards
        local = local_part(class_rows.main.detach())
        self.ranks = shards.ranks
        self.lo = shards.lo
        self.hi = shards.hi
        self.num_classes = shards.num_classes
        self.weight = local if local.ndim == 3 else local[:, None]
        self.centers, self.width = self.weight.shape[1:]
        self.device = class_rows.device  # of the queries; rows that are elsewhere (storage) come tile by tile
        self.dtype = torch.float64 if torch.float64 in (local.dtype, embeddings_dtype) else torch.float32
        bias = class_rows.parameters.get("bias") if plain else None
        self.plain, self.bias = plain, None if bias is None else local_part(bias.detach()).to(self.device, self.dtype)
        self._nonfinite = torch.full((), NO_CLASS, dtype=torch.int64, device=self.device)

    def fitting(self, classes: int, elements: int) -> int:
        """Return how many classes a tile has: at most `classes`, with at most `elements` numbers in their unit rows.

        A multiple of `best_classes.BIN`, unless it is smaller.
        """
        largest_shard = -(-self.num_classes // self.ranks.world)
        classes = max(1, min(classes, elements // (self.centers * self.width), largest_shard))
        return classes if classes < best_classes.BIN else classes // best_classes.BIN * best_classes.BIN

    def shard(self, owner: int) -> tuple[int, int]:
        return shard_bounds(self.num_classes, owner, self.ranks.world)

    def buffer(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self.device)

    def unit(self, rows: Tensor, buffer: Tensor, first: int) -> Tensor:
        """Return `rows [m, K, D]` of the classes from id `first` on, at unit length unless plain, in `buffer`."""
        rows = to_device(rows, self.device)
        factors = unit_factors(rows.to(self.dtype) if rows.dtype != self.dtype else rows)
        bad = ~factors.isfinite().flatten(1).all(1)
        if self.bias is not None:
            bad |= ~self.bias[first - self.lo :][: len(rows)].isfinite()
        ids = torch.arange(first, first + len(rows), device=rows.device)
        self._nonfinite = torch.minimum(self._nonfinite, torch.where(bad, ids, NO_CLASS).amin())
        out = buffer[: rows.numel()].view(rows.shape)
        return out.copy_(rows) if self.plain else torch.mul(rows, factors, out=out)

    def unit_of(self, ids: Tensor) -> Tensor:
        """Return the rows `[q, K, D]` of single classes of this rank at unit length."""
        rows = self.weight[(ids - self.lo).to(self.weight.device)].to(self.device, self.dtype)
        factors = unit_factors(rows)
        bad = ~factors.isfinite().flatten(1).all(1)
        none = self._nonfinite.reshape(1)
        self._nonfinite = torch.cat((none, torch.where(bad, ids, NO_CLASS))).amin()
        return rows * factors

    def start_broadcast(self, owner: int, first: int, last: int) -> Callable[[], Tensor]:
        """Start to broadcast the rows of classes [first, last) from their owner; call the result to wait for them."""
        if owner == self.ranks.rank:
            rows = self.weight[first - self.lo : last - self.lo].contiguous().to(self.device)
        else:
            rows = self.weight.new_empty(last - first, self.centers, self.width, device=self.device)
        group = self.ranks.group
        assert group is not None
        with naming_the_missing(QUERY, group):
            work = dist.broadcast(rows, src=dist.get_global_rank(group, owner), group=group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                with naming_the_missing(QUERY, group):
                    work.wait()
            return rows

        return finish

    def raise_nonfinite(self) -> None:
        """Raise the same NonFiniteError on every rank if any rank has seen a row without a finite length."""
        worst = int(all_gather_mesh(self._nonfinite, self.ranks).min())
        if worst != NO_CLASS:
            or_bias = "" if self.bias is None else ", or its bias,"
            raise NonFiniteError(
                f"the length of the row of class {worst}{or_bias} is not finite (a NaN, infinity or overflow): "
                "the head has diverged"
            )


def _merge_ranks(best: BestClasses, counts: tuple[int, ...], k: int, ranks: Ranks) -> Neighbours:
    """Return, for this rank's queries, the best k of the candidates of all ranks."""
    start = sum(counts[: ranks.rank])
    own = slice(start, start + counts[ranks.rank])
    # [world, queries, kept] -> [own, world * kept]: in the order of ranks and so of class ids, also for equal cosines
    values, ids = (all_gather(each, ranks.group)[:, own].transpose(0, 1).flatten(1) for each in (best.values, best.ids))
    top = largest(values, k)
    return Neighbours(ids.gather(1, top), values.gather(1, top))


def _cosines(unit: Tensor, other: Tensor, buffer: Tensor) -> Tensor:
    """Return the cosines `[n, m]` of unit rows `[n, K1, D]` and `[m, K2, D]`, the largest over all pairs of centers."""
    n, own, width = unit.shape
    m, centers, _ = other.shape
    products = buffer[: n * own * m * centers].view(n * own, m * centers)
    torch.mm(unit.reshape(-1, width), other.reshape(-1, width).T, out=products)
    return products if own == centers == 1 else products.view(n, own, m, centers).amax((1, 3))


def _spans(lo: int, hi: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, hi)) for start in range(lo, hi, step)]


# ---------------------------------------------------------------------------------------------------- contexts


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Compute products in the dtype of the tiles, also under autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _progress_bar(total: int, what: str, shown: bool, ranks: Ranks) -> Iterator[Callable[[], object]]:
    """Yield a function to call once per tile. It advances a bar on the first rank if `shown`."""
    if not shown:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install tqdm") from error
    with tqdm(total=total, desc=what, unit="tile", disable=ranks.rank + ranks.replica > 0, mininterval=0.5) as bar:
        yield bar.update
