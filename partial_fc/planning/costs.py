"""The work of a training step on one rank: floating-point operations, bytes of memory traffic, bytes on the network.

    Sizes          C_local, S, T, kept or tiled logits: from the rules and constants of the head itself; all formulas
                   use them
    operations     of the matrix products, and an estimate of the elementwise ones
    traffic        bytes that these operations read and write
    collectives    bytes that a rank contributes, sends and receives

memory.py has the bytes of memory in each phase of a step.

The formulas describe a head with a normalising margin (`ArcFace` by default) and its `RowOptimizer`: one label per
sample, embeddings in the dtype of the statistics, the same number of samples on every rank. docs/cost-model.md lists
the formulas and what they leave out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from partial_fc.batch.status import HALF, Status
from partial_fc.classes.head_state import DEFAULT_LOGITS_BUDGET
from partial_fc.classes.queries import DEFAULT_TILE_BYTES
from partial_fc.distributed.ranks import MOST_GATHERED
from partial_fc.distributed.shards import shard_bounds
from partial_fc.optim import skipped_rows as moved_later
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.forms import Moves
from partial_fc.optim.moves import Probe
from partial_fc.optim.optimizer_class import (
    LowPrecision,
    check_rows_apart,
    checked_form,
    construct,
    initial_state,
    trial,
)
from partial_fc.optim.row_state import SkippedRowsChoice
from partial_fc.sampling import Windows, window_size
from partial_fc.softmax.tiles import compute_dtypes, logits_bytes, tile_rows, tile_size

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


# ---------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """The numbers that all formulas use, as `z`.

    w, s, p, q: bytes per number of the weights, the statistics, the matrix products and the optimizer state.
    """

    N: int  # samples of the global batch
    N_local: int
    C_local: int  # classes of the largest shard
    S: int  # selected rows per step: C_local·centers, or under sampling the expected number, give or take about √S
    D: int
    T: int  # rows of a tile
    window: int  # classes drawn across ranks; 0 without sampling
    tabled: bool  # a rank finds once a cycle in which step each of its classes is drawn
    world: int
    w: int
    s: int
    p: int
    q: int
    states: int  # numbers of optimizer state per weight
    wide: str | None  # how half-precision weights get float32 updates: "master", "stochastic" or not at all
    fused: bool  # the optimizer has a kernel without temporaries
    in_backward: bool
    logits: int  # bytes of the logits if they are kept
    kept: bool
    bounded: bool  # exponentials need no maximum and are computed in the dtype of the products
    cpu: bool
    C: int
    hard: int  # hard negatives of a class
    centers: int  # rows of a class
    storage: str | None  # where rows are kept: in memory, "host" or "files"
    skipped: SkippedRowsChoice | None  # what becomes of rows that a step does not select; None without sampling
    moves: type[Moves] | None  # how those rows make steps later; None if they miss none

    @property
    def rows_local(self) -> int:
        """Rows of the largest shard."""
        return self.C_local * self.centers

    @property
    def current(self) -> int:
        """Bytes of the selected rows and their state, brought up to date; 0 if that is done in their own place."""
        if self.moves is None:
            return 0
        taken = (1 + self.states) * self.S * self.D * self.wider
        return taken if taken <= moved_later.TAKEN_BYTES else 0

    @property
    def wider(self) -> int:
        """Bytes per number of rows that are brought up to date."""
        return max(self.w, 4)

    @property
    def gathered(self) -> bool:
        """Whether selected rows are gathered out of the shard in forward, backward and update."""
        return self.window > 0 and not self.current

    @property
    def tiles(self) -> int:
        return -(-self.S // self.T)

    @property
    def low(self) -> bool:
        """Whether products have a lower precision than the statistics."""
        return self.p != self.s

    @property
    def held(self) -> bool:
        """Whether selected rows are gathered once, into the memory that their gradient takes over."""
        return self.gathered and self.w == self.s

    @property
    def reduced(self) -> bool:
        """Whether statistics are reduced on the way between ranks, rather than gathered."""
        return (3 + (not self.bounded)) * self.N * self.s * self.world > MOST_GATHERED

    @property
    def overlap(self) -> bool:
        """Whether backward passes over the tiles twice, and reduces the embeddings' gradient during the second pass."""
        return self.kept and self.world > 1 and not self.in_backward


def sizes(
    num_classes: int,
    embedding_size: int,
    world_size: int,
    batch_size: int,
    sample_rate: float,
    optimizer: str | type[torch.optim.Optimizer],
    dtype: torch.dtype,
    logits_budget: int | None,
    autocast: torch.dtype | None,
    update_in_backward: bool,
    low_precision: LowPrecision | None,
    device: str,
    hard_negatives: int = 0,
    skipped_rows: SkippedRowsChoice | None = None,
    storage: str | None = None,
    sample_block: int = 1,
    disk: int | None = None,
    centers: int = 1,
) -> Sizes:
    """Return the sizes for the arguments of `plan.plan`. Raises ValueError if `RowOptimizer` rejects the optimizer."""
    C, D, N = num_classes, embedding_size, batch_size
    lo, hi = shard_bounds(C, 0, world_size)
    local = hi - lo
    window = min(C, window_size(C, sample_rate, sample_block)) if sample_rate < 1 else 0
    rows = local
    if window:  # this rank's share of the window, and of the batch's classes and their neighbours outside the window
        rows = min(local, math.ceil((window + (1 - window / C) * min(N * (1 + hard_negatives), C)) * local / C))
        if hard_negatives and torch.device(device).type != "cpu":  # a slot for each, whosever class it is
            rows = math.ceil(window * local / C) + N * (1 + hard_negatives)
    rows *= centers  # until here classes
    none = torch.empty(0, dtype=dtype, device="cpu")
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        stats, product = compute_dtypes(none, none)
    logits = logits_bytes(N, rows, product)
    drawn = Windows().fit(C, sample_rate, 0, lo, hi, torch.device(device), sample_block)
    device = torch.device(device).type
    named: tuple[Any, dict[str, Any]] = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else (optimizer, {})
    cls, options = named
    wide = low_precision if dtype in HALF else None
    skipped, moves = _skipped(cls, tuple(options.items()), skipped_rows, sampled=bool(window))
    return Sizes(
        N=N,
        N_local=-(-N // world_size),
        C_local=local,
        S=rows,
        D=D,
        T=min(tile_size(rows, tile_rows(N, D, device), centers, device), max(rows, 1)),
        window=window,
        tabled=bool(window) and drawn.tabled,
        world=world_size,
        w=dtype.itemsize,
        s=stats.itemsize,
        p=product.itemsize,
        q=4 if wide else dtype.itemsize,
        states=_row_states(cls, tuple(options.items())),
        wide=wide,
        fused="fused" in signature(cls).parameters,
        in_backward=update_in_backward,
        logits=logits,
        kept=logits <= (DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget),
        bounded=product is not torch.float16,
        cpu=device == "cpu",
        C=C,
        hard=hard_negatives,
        centers=centers,
        storage=storage,
        skipped=skipped if window else None,
        moves=moves if window else None,
    )


@lru_cache(maxsize=64)
def _row_states(cls: Any, options: tuple[tuple[str, Any], ...]) -> int:
    """Return how many state tensors of the weights' size `RowOptimizer` holds for an optimizer class. One number a row
    counts as none.

    Raises ValueError if `RowOptimizer` rejects the class.
    """
    check_rows_apart(cls, dict(options))
    row = torch.zeros(1, 2, dtype=torch.float64, device="cpu")
    state = trial(cls, dict(options), row, [row]).state
    return sum(key in state and state[key].shape == row.shape for key in initial_state(cls, dict(options)))


@lru_cache(maxsize=64)
def _skipped(
    cls: Any, options: tuple[tuple[str, Any], ...], choice: SkippedRowsChoice | None, sampled: bool
) -> tuple[SkippedRowsChoice, type[Moves] | None]:
    """Return what `RowOptimizer` does with rows that a step does not select, and how they make the steps that they
    missed; None if no step moves them. ValueError for "dense" with a class that cannot do it."""
    if choice == "still" or (choice is None and not sampled):
        return choice or "dense", None
    group = construct(cls, [nn.Parameter(torch.zeros(1, device="cpu"))], dict(options)).defaults
    try:
        form = checked_form(cls, group)
    except ValueError:
        if choice == "dense":
            raise
        return "still", None
    probe, table = Probe(cls, group, {}), form(tuple(sorted(initial_state(cls, dict(options)))))
    moves = [table.changes_rows(table.find(probe, group)) for _ in range(2)]  # Adam's first step moves none
    return "dense", form if any(moves) else None


# ----------------------------------------------------------------------------------------------- operations and traffic


def operations(z: Sizes) -> dict[str, int]:
    """Return the floating-point operations of matrix products, and an estimate of the elementwise ones.

    The time of the elementwise ones depends on memory traffic, not on arithmetic.
    """
    logits = z.N * z.S
    rows = z.S * z.D
    elementwise = logits * (2 if z.kept else 3)  # exponential and sum; tiled: the exponential again
    elementwise += rows * (3 + direction_passes(z) + 5)  # lengths and directions; directions in backward; the tangent
    elementwise += rows * (2 + 4 * z.states)  # the optimizer
    elementwise += rows * _move(z)[0]  # the steps that rows missed
    elementwise += 2 * z.tiles * z.N * z.D  # sums of the tiles' shares of the embeddings' gradient
    return {"matrix products": 2 * logits * z.D * (3 if z.kept else 4), "elementwise (estimate)": elementwise}


def direction_passes(z: Sizes) -> int:
    """Return how often backward computes the rows' directions again."""
    if z.held:
        return 0
    return 2 if z.overlap else 1


def traffic(z: Sizes) -> dict[str, int]:
    """Return bytes of memory that the operations read and write, if nothing stays in a cache between two of them."""
    rows = z.S * z.D

    # forward: product (write), exponential (read, write), sum (read); backward: read by two products.
    # Tiled: product and exponential again in backward.
    logits = z.N * z.S * z.p * (6 if z.kept else 9)
    if not z.bounded:  # widened, the maximum subtracted, lowered again
        logits += z.N * z.S * (3 * z.s + 2 * z.p) * (1 if z.kept else 2)

    directions = 2 * z.w * z.gathered
    directions += z.w + (z.s if z.held else z.p)  # divided by the length
    used = z.p + (z.s + z.p) * (z.low and z.held)  # read by a product; lowered for it
    lengths = z.w
    class_rows = rows * (lengths + (1 + direction_passes(z)) * directions + (2 if z.kept else 3) * used)

    gradient = rows * (z.w + 9 * z.s)  # the product; the tangent
    if not z.p == z.s == z.w:
        gradient += rows * (2 * z.p + 2 * z.s * (z.w != z.s))

    update = rows * (3 * z.w + 2 * z.states * z.q)
    if z.window:  # gathered and written back
        update += rows * (2 + 2 * z.gathered) * (z.w + z.states * z.q)
    found = {"logits": logits, "class rows": class_rows, "row gradients": gradient, "update": update}
    return found if z.moves is None else found | {"steps that rows missed": rows * _missed_steps(z)}


def _move(z: Sizes) -> tuple[int, int]:
    """Return (operations, numbers read and written) for each number of a row that makes the steps that it missed."""
    n = 1 + z.states
    if z.moves is None:
        return 0, 0
    if z.moves is AdamMoves:
        return 13 + z.states, 26 + 2 * z.states
    return n * (2 * n - 1), n * (3 * n - 1)


def _missed_steps(z: Sizes) -> int:
    """Return the bytes that this reads and writes: gathered, widened, moved, written."""
    n, own = 1 + z.states, (4 if z.wide == "master" else z.w) + z.states * z.q
    wide = n * z.wider
    widened, lowered = (own + wide) * (own != wide), (wide + z.w) * (z.w != z.wider)
    written = 2 * wide if z.current else wide + own
    return 2 * own + widened + _move(z)[1] * z.wider + written + lowered


# ---------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    own: bytes that a rank contributes. sent, received: bytes of a rank in a ring, the algorithm of NCCL and gloo.
    """

    name: str
    own: int
    sent: int
    received: int


def collectives(z: Sizes) -> tuple[Collective, ...]:
    """Return the collectives of a step; none on a single rank."""
    if z.world == 1:
        return ()
    others = z.world - 1
    gradient = z.N_local * z.D * z.s
    statistics = (3 + (not z.bounded)) * z.N * z.s
    gathers = {"status": 8 * len(Status._fields), "payload": payload_bytes(z)}
    if not z.reduced:
        gathers["statistics"] = statistics
    found = [Collective(f"{name} (all-gather)", own, own * others, own * others) for name, own in gathers.items()]
    if z.reduced:
        found.append(all_reduce("statistics", statistics, z.world))
    scatter = Collective(
        "embedding gradient (reduce-scatter)", gradient * z.world, gradient * others, gradient * others
    )
    return (*found, scatter)


def all_reduce(name: str, own: int, world: int) -> Collective:
    """Return an all-reduce, which in a ring is a reduce-scatter and an all-gather."""
    sent = 2 * own * (world - 1) // world
    return Collective(f"{name} (all-reduce)", own, sent, sent)


# ---------------------------------------------------------------------------------------------------- hard negatives


@dataclass(frozen=True)
class Search:
    """One search for hard negatives on a rank, every `hard_negatives_every` training forwards.

    table: bytes of the ids of all classes, which every rank holds. memory: bytes besides, while it searches.
    operations: of the matrix products. collectives: of all tiles, or pieces, together.
    """

    table: int
    memory: int
    operations: int
    collectives: tuple[Collective, ...]


def search(z: Sizes) -> Search | None:
    """Return what a search takes (classes/queries.py says how); None without hard negatives."""
    if not z.hard:
        return None
    table, lists, rows = 4 * z.C * z.hard, z.C_local * z.hard, z.rows_local * z.D * z.w
    elements = DEFAULT_TILE_BYTES // z.s
    T = max(1, min(math.isqrt(elements), elements // z.D, z.C_local))  # rows of a tile, on either side
    selecting = min(DEFAULT_TILE_BYTES, 4 * T * T * z.s)
    memory = lists * (z.s + 8) + T * T * z.s + 2 * T * z.D * (z.s + z.w * (z.world > 1)) + selecting
    operations = 2 * z.rows_local * z.C * z.centers * z.D
    if z.world == 1:  # each tile is used by row and by column
        return Search(table, memory, operations // 2, ())
    others = z.world - 1
    broadcast = Collective("class rows (broadcasts)", rows, rows * others, rows * others)
    gather = Collective("neighbours (all-gather)", 4 * lists, 4 * lists * others, 4 * lists * others)
    return Search(table, memory, operations, (broadcast, gather))


def payload_bytes(z: Sizes) -> int:
    """Return the bytes of a rank's embeddings (padded to a multiple of 8) and labels."""
    return -(-z.N_local * z.D * z.s // 8) * 8 + 8 * z.N_local
