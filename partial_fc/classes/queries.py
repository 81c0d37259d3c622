"""Questions asked of class rows that are split over ranks: which classes are nearest, to an embedding or to a class. Exact, and in tiles.

    topk              embeddings [N_local, D]  ── all-gather, 1,024 of all ranks at a time ──>  queries [Q, D], at unit length
                      queries x my class rows, a tile [Q, M] of cosines at a time  ──>  the best k of my rows, [Q, k]
                      ── all-gather ──>  candidates of all ranks [Q, world · k]  ──>  the best k of all, for the rank's own queries
    nearest_classes   class rows [M, D] of one owner after another ── broadcast ──>  the same tile on every rank
                      my class rows x the tile, [I, M] cosines at a time  ──>  the best k so far of each of my classes, [C_local, k]
                      On a single rank a tile counts for its rows and for its columns, and only tiles [i, j >= i] are computed.

Selection reads a tile once: maxima of groups of 32 neighbours. Only groups whose maximum is above the k-th best so far can hold anything
better, and of these the k with the largest maxima hold the best k; their members are put beside the best so far and sorted out. Classes
arrive in the order of their ids and whoever was first stays, so of equal cosines the lower id is the first.

Memory: no tensor beyond `tile_bytes` but the answer, the best so far and the 1,024 queries. On one rank that is one tile of
cosines; unit rows of the tile (one or two sides, as many bytes at most each), a received tile and the next one of the same rows in the
weight's dtype, temporaries of selection of at most as many bytes. A tile has at least one row on each side, however few bytes are given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch.exchange import exchange_payload
from partial_fc.batch.status import DTYPES, embeddings_problem
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import Ranks, all_gather, all_gather_mesh
from partial_fc.distributed.texts import gather_texts
from partial_fc.errors import NonFiniteError
from partial_fc.rows import ClassRows
from partial_fc.shards import local_part, shard_bounds

DEFAULT_TILE_BYTES = 64 << 20
QUERIES = 1024  # embeddings of all ranks that are answered at a time
GROUP = 32  # neighbours of which selection looks at the largest only
COLUMN_GROUP = 16  # the same in the columns of a tile, where each member is far from the next in memory
ROWS = 512  # that are sorted out together
NO_DIRECTION = 1e-12  # a row that is shorter has cosine 0 to everything
NOBODY = 2**62
EXCHANGE = "the exchange of rows of a question"  # in a `RankMissing`


class Neighbours(NamedTuple):
    """The nearest classes of each row: global class ids int64 `[rows, k]` and cosines `[rows, k]`, the largest first."""

    ids: Tensor
    cosines: Tensor


def topk(
    head: ClassRows, embeddings: Tensor, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
) -> Neighbours:
    """The k classes nearest to each embedding; `ShardedLoss.topk` says how to ask."""
    rows = _RowTiles(head, embeddings.dtype if isinstance(embeddings, Tensor) else None)
    ranks, world = rows.ranks, rows.ranks.world
    counts = _agree(head, k, head.shards.num_classes, tile_bytes, embeddings)[
        ranks.replica * world : (ranks.replica + 1) * world
    ]
    kept = min(k, -(-head.shards.num_classes // world))  # candidates of a rank: k, or all classes of the largest shard
    each = max(1, min(QUERIES, tile_bytes // (8 * world * kept)) // world)  # queries of a rank in a round
    elements = tile_bytes // rows.dtype.itemsize
    step = rows.fitting(elements // (each * world * rows.centers), elements)
    tiles, rounds = -(-len(rows.weight) // step), -(-max(counts) // each)
    answers = [Neighbours(embeddings.new_empty(0, k, dtype=torch.int64), embeddings.new_empty(0, k, dtype=rows.dtype))]
    with _bar(rounds * tiles, "topk", progress, ranks) as advance, _exact_products(rows.weight.device):
        buffer, unit_buffer = (
            rows.buffer(each * world * step * rows.centers),
            rows.buffer(step * rows.centers * rows.width),
        )
        for start in range(0, max(counts), each):
            now = tuple(max(0, min(count - start, each)) for count in counts)
            mine = embeddings.detach()[start : start + each].to(rows.dtype)
            mine = mine * _factors(mine)
            (queries,) = exchange_payload([mine], now, max(now), ranks.group)
            best = _Best(len(queries), kept, queries, elements)
            for first in range(0, len(rows.weight), step):
                unit = rows.unit(rows.weight[first : first + step], unit_buffer, rows.lo + first)
                best.update(slice(None), _cosines(queries[:, None], unit, buffer), rows.lo + first)
                advance()
            answers.append(_combined(best, now, k, ranks))
    rows.raise_nonfinite()
    return Neighbours(torch.cat([a.ids for a in answers]), torch.cat([a.cosines for a in answers]).clamp_(-1, 1))


def nearest_classes(
    head: ClassRows, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
) -> Neighbours:
    """The k classes nearest to each class of this rank's shard; `ShardedLoss.nearest_classes` says how to ask."""
    rows = _RowTiles(head, None)
    _agree(head, k, head.shards.num_classes - 1, tile_bytes, None)
    elements = tile_bytes // rows.dtype.itemsize
    step = rows.fitting(math.isqrt(elements) // rows.centers, elements)
    best = _Best(len(rows.weight), k, rows.weight.new_empty(0, dtype=rows.dtype), elements)
    blocks = -(-len(rows.weight) // step)
    received = [(owner, *span) for owner in range(rows.ranks.world) for span in _spans(*rows.shard(owner), step)]
    total = blocks * (blocks + 1) // 2 if rows.ranks.world == 1 else blocks * len(received)
    with _bar(total, "nearest classes", progress, rows.ranks) as advance, _exact_products(rows.weight.device):
        if rows.ranks.world == 1:
            _walk_triangle(rows, best, step, advance)
        else:
            _walk_received(rows, best, step, received, advance)
    rows.raise_nonfinite()
    return Neighbours(best.ids, best.values.clamp_(-1, 1))


def _walk_triangle(rows: _RowTiles, best: _Best, step: int, advance: Callable[[], object]) -> None:
    """All classes on this rank: each pair of blocks once. Block j sees blocks 0, 1, ... in this order, by column and then by row."""
    tile, first_unit, second_unit = (
        rows.buffer((step * rows.centers) ** 2),
        *(rows.buffer(step * rows.centers * rows.width) for _ in "ij"),
    )
    spans = _spans(0, len(rows.weight), step)
    for i, (a, b) in enumerate(spans):
        unit = rows.unit(rows.weight[a:b], first_unit, a)
        for c, d in spans[i:]:
            other = unit if a == c else rows.unit(rows.weight[c:d], second_unit, c)
            cosines = _cosines(unit, other, tile)
            if a == c:
                cosines.fill_diagonal_(-torch.inf)
            else:
                best.update(slice(c, d), cosines, a, by_column=True)
            best.update(slice(a, b), cosines, c)
            advance()


def _walk_received(
    rows: _RowTiles, best: _Best, step: int, schedule: list[tuple[int, int, int]], advance: Callable[[], object]
) -> None:
    """Every rank's classes, in the order of their ids; while one tile is worked on, the next one travels."""
    tile, unit_buffer, other_buffer = (
        rows.buffer((step * rows.centers) ** 2),
        *(rows.buffer(step * rows.centers * rows.width) for _ in "ij"),
    )
    coming = rows.start_broadcast(*schedule[0])
    for place, (_, c, d) in enumerate(schedule):
        received = coming()
        if place + 1 < len(schedule):
            coming = rows.start_broadcast(*schedule[place + 1])
        other = rows.unit(received, other_buffer, c)
        for a, b in _spans(rows.lo, rows.hi, step):
            unit = rows.unit(rows.weight[a - rows.lo : b - rows.lo], unit_buffer, a)
            cosines = _cosines(unit, other, tile)
            both = range(max(a, c), min(b, d))
            if both:
                cosines[both.start - a : both.stop - a, both.start - c : both.stop - c].fill_diagonal_(-torch.inf)
            best.update(slice(a - rows.lo, b - rows.lo), cosines, c)
            advance()


class _RowTiles:
    """This rank's class rows `[C_local, K, D]` (K = 1 but for sub-centers) and how tiles are made of them."""

    def __init__(self, head: ClassRows, of_embeddings: torch.dtype | None) -> None:
        head.check_group()
        shards, local = head.shards, local_part(head.main.detach())
        self.ranks, self.lo, self.hi, self.num_classes = shards.ranks, shards.lo, shards.hi, shards.num_classes
        self.weight = local if local.ndim == 3 else local[:, None]
        self.centers, self.width = self.weight.shape[1:]
        self.dtype = torch.float64 if torch.float64 in (local.dtype, of_embeddings) else torch.float32
        self._nonfinite = torch.full((), NOBODY, dtype=torch.int64, device=local.device)

    def fitting(self, classes: int, elements: int) -> int:
        """At most `classes` a tile and so few that their unit rows have `elements` numbers; whole groups if there are any."""
        classes = max(
            1, min(classes, elements // (self.centers * self.width), -(-self.num_classes // self.ranks.world))
        )
        return classes if classes < GROUP else classes // GROUP * GROUP

    def shard(self, owner: int) -> tuple[int, int]:
        return shard_bounds(self.num_classes, owner, self.ranks.world)

    def buffer(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self.weight.device)

    def unit(self, rows: Tensor, buffer: Tensor, first: int) -> Tensor:
        """`rows [m, K, D]` of the classes from `first` on, at unit length, in `buffer`."""
        factors = _factors(rows.to(self.dtype) if rows.dtype != self.dtype else rows)
        bad = ~factors.isfinite().flatten(1).all(1)
        ids = torch.arange(first, first + len(rows), device=rows.device)
        self._nonfinite = torch.minimum(self._nonfinite, torch.where(bad, ids, NOBODY).amin())
        return torch.mul(rows, factors, out=buffer[: rows.numel()].view(rows.shape))

    def start_broadcast(self, owner: int, first: int, last: int) -> Callable[[], Tensor]:
        """Begin to send the rows of these classes from their owner to all; call the result to wait and get them, `[m, K, D]`."""
        if owner == self.ranks.rank:
            rows = self.weight[first - self.lo : last - self.lo].contiguous()
        else:
            rows = self.weight.new_empty(last - first, self.centers, self.width)
        group = self.ranks.group
        assert group is not None
        with naming_the_missing(EXCHANGE, group):
            work = dist.broadcast(rows, src=dist.get_global_rank(group, owner), group=group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                with naming_the_missing(EXCHANGE, group):
                    work.wait()
            return rows

        return finish

    def raise_nonfinite(self) -> None:
        """The same NonFiniteError on every rank if any has met a row whose length is no number."""
        worst = int(all_gather_mesh(self._nonfinite, self.ranks).min())
        if worst != NOBODY:
            raise NonFiniteError(
                f"the row of class {worst} has no finite length (a NaN, infinity or overflow): the head has diverged"
            )


class _Best:
    """The k largest cosines so far of each of `rows` rows `[rows, k]`, and whose they are. Starts with -inf of nobody (-1)."""

    def __init__(self, rows: int, k: int, like: Tensor, elements: int) -> None:
        self.values = like.new_full((rows, k), -torch.inf)
        self.ids = torch.full_like(self.values, -1, dtype=torch.int64)
        self.k, self.room = (
            k,
            elements // 8,
        )  # numbers that selection may work on at a time: several tensors of 8 bytes each

    def update(self, rows: slice, tile: Tensor, first: int, *, by_column: bool = False) -> None:
        """Take in `tile [rows, m]` (`[m, rows]` if by_column): cosines to the m classes from `first` on, all beyond those seen so far."""
        values, ids = self.values[rows], self.ids[rows]
        side, group = (tile.T, COLUMN_GROUP) if by_column else (tile, GROUP)
        classes = side.shape[1]
        grouped = classes // group * group if 2 * self.k * group <= classes else 0  # else a row is sorted out whole
        if by_column:
            maxima = tile[:grouped].unflatten(0, (-1, group)).amax(1).T
        else:
            maxima = tile[:, :grouped].unflatten(1, (-1, group)).amax(2)
        within = torch.arange(group, device=tile.device)
        rest = torch.arange(grouped, classes, device=tile.device)
        for part, picked in self._hopeful(values[:, -1], maxima, side[:, grouped:], group):
            places = (picked[:, :, None] * group + within).flatten(1)
            nothing = places >= grouped
            found = side[part[:, None], places.clamp_(max=classes - 1)].masked_fill_(nothing, -torch.inf)
            places = torch.cat((places, rest.expand(len(part), -1)), 1)
            pool = torch.cat((values[part], found, side[part[:, None], rest]), 1)
            top = _largest(pool, self.k)
            values[part] = pool.gather(1, top)
            ids[part] = torch.cat((ids[part], places + first), 1).gather(1, top)

    def _hopeful(self, least: Tensor, maxima: Tensor, rest: Tensor, group: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Some at a time, the rows that have anything above `least [rows]`, and the groups `[rows, at most k]` that may hold their best.

        maxima `[rows, groups]`; rest `[rows, m]`: what is in no group. Rows that have as many groups to look into are taken together;
        where one has fewer than the others, the number of groups stands for no group.
        """
        above = (maxima > least[:, None]).contiguous()
        counts = above.sum(1)
        hopeful = counts > 0
        if rest.shape[1]:
            hopeful |= rest.amax(1) > least
        chosen = hopeful.nonzero()[:, 0]
        if not len(chosen):
            return
        counts, order = counts[chosen].sort()
        chosen = chosen[order]
        most = min(self.k, int(counts[-1]))
        size = max(1, min(ROWS, self.room // (self.k + most * group + rest.shape[1])))
        largest = [*counts[size - 1 :: size].tolist(), int(counts[-1])]
        for part, number, looked_into in zip(chosen.split(size), counts.split(size), largest, strict=False):
            if looked_into > self.k:
                yield part, _largest(maxima[part], self.k).sort(1).values
                continue
            row, which = above[part].nonzero(as_tuple=True)
            place = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
            picked = row.new_full((len(part), looked_into), maxima.shape[1])
            picked[row, place] = which
            yield part, picked


def _largest(values: Tensor, k: int) -> Tensor:
    """Positions `[rows, k]` of the k largest of `values [rows, n]`, the largest first, of equal ones the first."""
    count = values.shape[1]
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # the bits of a float32, as an integer of the same order, before the position from the end: all keys differ
    bits = (values + 0.0).view(torch.int32)  # of -0.0 that makes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) | torch.arange(count - 1, -1, -1, device=values.device)
    return count - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


def _combined(best: _Best, counts: tuple[int, ...], k: int, ranks: Ranks) -> Neighbours:
    """For this rank's queries, the best k of what every rank found among its own classes."""
    start = sum(counts[: ranks.rank])
    own = slice(start, start + counts[ranks.rank])
    # [world, queries, kept] -> [own, world * kept]: ranks follow each other as their classes do, so equal cosines stay in the order of ids
    values, ids = (all_gather(each, ranks.group)[:, own].transpose(0, 1).flatten(1) for each in (best.values, best.ids))
    top = _largest(values, k)
    return Neighbours(ids.gather(1, top), values.gather(1, top))


def _cosines(unit: Tensor, other: Tensor, buffer: Tensor) -> Tensor:
    """`[n, m]` in `buffer`: cosines of unit rows `[n, K1, D]` and `[m, K2, D]`; the largest over centers, where there are several."""
    (n, own, width), (m, centers, _) = unit.shape, other.shape
    products = buffer[: n * own * m * centers].view(n * own, m * centers)
    torch.mm(unit.reshape(-1, width), other.reshape(-1, width).T, out=products)
    return products if own == centers == 1 else products.view(n, own, m, centers).amax((1, 3))


def _factors(rows: Tensor) -> Tensor:
    """What makes unit rows of `rows [..., D]`, `[..., 1]`: 0 where there is no direction, NaN where the length is no number."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(length < NO_DIRECTION, 0.0, torch.where(length.isfinite(), 1 / length, torch.nan))


def _spans(lo: int, hi: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, hi)) for start in range(lo, hi, step)]


# ---------------------------------------------------------------------------------------------------- what can be wrong


@dataclass(frozen=True)
class _Question:
    """What one rank asks, as numbers that all ranks compare."""

    problem: int  # 0: none; 1: an argument; 2: an embedding that is not finite
    k: int
    tile_bytes: int
    dtype: int  # of the embeddings: index into DTYPES; -1 where there are none
    samples: int


def _agree(head: ClassRows, k: Any, limit: int, tile_bytes: Any, embeddings: Any) -> list[int]:
    """Samples of every rank; the same ValueError or NonFiniteError on all if one asks what cannot be answered, or another thing."""
    ranks, device = head.shards.ranks, head.device
    problem, kind = _number_problem(k, limit, tile_bytes), 1
    if not problem and embeddings is not None:
        problem, kind = _query_problem(embeddings, head.main.shape[-1], device)
    if problem:
        mine = _Question(kind, 0, 0, 0, 0)
    elif embeddings is None:
        mine = _Question(0, k, tile_bytes, -1, 0)
    else:
        mine = _Question(0, k, tile_bytes, DTYPES.index(embeddings.dtype), len(embeddings))
    table = all_gather_mesh(torch.tensor(list(vars(mine).values()), device=device), ranks, EXCHANGE).tolist()
    everyone = [_Question(*row) for row in table]
    wrong = next((flat for flat, each in enumerate(everyone) if each.problem), None)
    if wrong is not None:
        text = f"{ranks.name(wrong)}: {gather_texts(problem, ranks, device)[wrong]}"
        raise NonFiniteError(text) if everyone[wrong].problem == 2 else ValueError(text)
    for what in ("k", "tile_bytes", "dtype"):
        here, flat = (
            getattr(everyone[0], what),
            next((f for f, q in enumerate(everyone) if getattr(q, what) != getattr(everyone[0], what)), 0),
        )
        if flat:
            there, name = getattr(everyone[flat], what), "embedding dtype" if what == "dtype" else what
            here, there = (DTYPES[here], DTYPES[there]) if what == "dtype" else (here, there)
            raise ValueError(
                f"ranks disagree: {name} is {here} on {ranks.name(0)} and {there} on {ranks.name(flat)}; all must ask the same"
            )
    return [each.samples for each in everyone]


def _number_problem(k: Any, limit: int, tile_bytes: Any) -> str:
    for name, value in (("k", k), ("tile_bytes", tile_bytes)):
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{name} must be an int, not {type(value).__name__}"
    if not limit:
        return "the only class has no other beside it"
    if not 1 <= k <= limit:
        return f"k is {k}; there are 1 to {limit} classes to ask for"
    return "" if 1 <= tile_bytes < NOBODY else f"tile_bytes is {tile_bytes}; give at least 1"


def _query_problem(embeddings: Any, width: int, device: torch.device) -> tuple[str, int]:
    """(what is wrong with the embeddings or "", its kind)."""
    if not isinstance(embeddings, Tensor):
        return f"embeddings must be a tensor [N, D], not {type(embeddings).__name__}", 1
    problem = embeddings_problem(embeddings)
    if problem:
        return problem, 1
    if embeddings.device != device:
        return f"the head is on {device}, embeddings on {embeddings.device}", 1
    if embeddings.shape[1] != width:
        return f"embeddings have width {embeddings.shape[1]}, the head has embedding_size {width}", 1
    for start in range(0, len(embeddings), QUERIES):
        part = embeddings.detach()[start : start + QUERIES]
        bad = _factors(part if part.dtype == torch.float64 else part.float()).isnan().nonzero()
        if len(bad):
            return f"embeddings[{start + int(bad[0, 0])}] has no finite length (a NaN, infinity or overflow)", 2
    return "", 1


# ---------------------------------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Products in the dtype of the tiles, whatever autocast says."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _bar(total: int, what: str, shown: bool, ranks: Ranks) -> Iterator[Callable[[], object]]:
    """Call what it yields once a tile; a bar on the first rank if `shown`."""
    if not shown:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress=True draws its bar with tqdm: pip install tqdm") from error
    with tqdm(total=total, desc=what, unit="tile", disable=ranks.rank + ranks.replica > 0, mininterval=0.5) as bar:
        yield bar.update
