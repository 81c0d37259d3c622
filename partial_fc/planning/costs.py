"""What a training step costs a rank: bytes of memory, floating-point operations, bytes read and written, bytes on the network.

    sizes         C_local, S, T, kept or tiled: by the rules and constants of the head itself; all formulas are made of them
    items         bytes of every large tensor, in each phase of a step that has it
    operations    of the matrix products, and an estimate of those number by number
    traffic       bytes that these operations read and write
    collectives   bytes that a rank puts in, sends and receives

Counted is what a head with a normalising margin (`ArcFace` by default) and its `RowOptimizer` allocate: one label a sample, embeddings in
the dtype of the statistics, the same number of samples on every rank. docs/cost-model.md has the formulas, and what is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from inspect import signature
from typing import Any

import torch

from partial_fc.batch.status import Status
from partial_fc.head import DEFAULT_LOGITS_BUDGET
from partial_fc.optim.optimizer_class import LowPrecision, check_rows_apart, initial_state
from partial_fc.optim.row_optimizer import BLOCK_BYTES
from partial_fc.optim.row_state import HALF
from partial_fc.sampling import window_size
from partial_fc.sharded_module import INIT_BLOCK
from partial_fc.shards import shard_bounds
from partial_fc.softmax.tiles import compute_dtypes, logits_bytes, tile_rows

PHASES = ("build", "gather", "select", "forward", "combine", "backward", "update")
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}
WINDOW_TEMPORARIES = 41  # bytes a class of the window that `draw_window` holds at most: five numbers and a mask
ROUNDING_TEMPORARIES = 24  # bytes a number that stochastic rounding of a block holds at most


@dataclass(frozen=True)
class Item:
    """One kind of tensor on a rank: its size in words, and its bytes in every phase of a step that has it."""

    name: str
    formula: str
    bytes: dict[str, int]

    @property
    def largest(self) -> int:
        return max(self.bytes.values(), default=0)


@dataclass(frozen=True)
class Collective:
    """One collective of a step. `own`: bytes that a rank puts in; `sent` and `received`: what it moves in a ring, as NCCL and gloo do."""

    name: str
    own: int
    sent: int
    received: int


# ---------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """What all formulas are made of. w, s, p, q: bytes of one number of the weights, statistics, products and optimizer state."""

    N: int  # samples of the global batch
    N_local: int
    C_local: int  # classes of the rank with the most
    S: int  # rows of a step: C_local, or the expected number under sampling, from which a step differs by about its square root
    D: int
    T: int  # rows of a tile
    window: int  # classes drawn over all ranks; 0 without sampling
    world: int
    w: int
    s: int
    p: int
    q: int
    states: int  # numbers of optimizer state a weight
    wide: str | None  # how half-precision weights are updated in float32: "master", "stochastic" or not
    fused: bool  # the optimizer has a kernel that needs no temporaries
    in_backward: bool
    logits: int  # bytes that kept logits take, or would
    kept: bool
    bounded: bool  # exponentials need no maximum and are made in the dtype of the products
    cpu: bool

    @property
    def tiles(self) -> int:
        return -(-self.S // self.T)

    @property
    def low(self) -> bool:
        """Whether products are of a lower precision than the statistics."""
        return self.p != self.s

    @property
    def held(self) -> bool:
        """Whether rows are gathered once, into the memory of their gradient."""
        return self.window > 0 and self.w == self.s

    @property
    def overlap(self) -> bool:
        """Whether backward goes through the tiles twice, so that the embeddings' gradient travels meanwhile."""
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
) -> Sizes:
    """The arguments are as of `plan.plan`; ValueError for an optimizer that a `RowOptimizer` refuses."""
    C, D, N = num_classes, embedding_size, batch_size
    lo, hi = shard_bounds(C, 0, world_size)
    local, window = hi - lo, window_size(C, sample_rate) if sample_rate < 1 else 0
    rows = local
    if window:  # its share of the window, and of the batch's classes outside the window
        rows = min(local, math.ceil((window + (1 - window / C) * min(N, C)) * local / C))
    none = torch.empty(0, dtype=dtype, device="cpu")
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        stats, product = compute_dtypes(none, none)
    logits = logits_bytes(N, rows, product)
    device = torch.device(device).type
    named: tuple[Any, dict[str, Any]] = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else (optimizer, {})
    cls, options = named
    wide = low_precision if dtype in HALF else None
    return Sizes(
        N=N,
        N_local=-(-N // world_size),
        C_local=local,
        S=rows,
        D=D,
        T=min(tile_rows(N, D, device), rows),
        window=window,
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
    )


@lru_cache(maxsize=64)
def _row_states(cls: Any, options: tuple[tuple[str, Any], ...]) -> int:
    """Tensors of state as large as the weights that `RowOptimizer` holds for the class; ValueError for a class that it refuses."""
    check_rows_apart(cls, dict(options))
    return len(initial_state(cls, dict(options)))


# ---------------------------------------------------------------------------------------------------- memory


def items(z: Sizes) -> tuple[Item, ...]:
    """Every large tensor of a rank, by phase. On the CPU the two largest buffers are held from step to step, so they are in all phases."""
    step = PHASES[1:]
    shard = z.C_local * z.D
    master = 4 * (z.wide == "master")
    logits, tiles = _tile_logits(z), {"forward": _tile_forward(z), "backward": _tile_backward(z)}
    block = 0 if z.in_backward else _block(z, _block_elements(z))
    # glibc does not find room in all that was freed: up to as much again as tiles and blocks take (docs/cost-model.md)
    heap = block + max(logits[phase] + rows for phase, rows in tiles.items()) if z.cpu else 0
    return (
        Item("weights", "C_local·D", dict.fromkeys(PHASES, shard * z.w)),
        Item("initial rows", "C_local·D, float32", {"build": (shard + 2 * INIT_BLOCK * z.D) * 4 if z.cpu else 0}),
        Item(
            "optimizer state",
            f"{z.states + bool(master)}·C_local·D",
            dict.fromkeys(step, shard * (z.states * z.q + master)),
        ),
        _gradient(z),
        Item(
            "kept logits",
            "N·S",
            dict.fromkeys(step if z.cpu else ("forward", "combine", "backward"), z.logits if z.kept else 0),
        ),
        Item("logits of a tile", "N·T", logits),
        Item("rows of a tile", "T·D, several", tiles),
        Item("embeddings and their gradient", "N·D, several", _embeddings(z)),
        Item("selection", "row numbers and lengths", _selection(z)),
        Item("collectives' buffers", "", _buffers(z)),
        Item("blocks of the optimizer", "", {"update": block}),
        Item("heap", "freed tiles and blocks, on the CPU", dict.fromkeys(step, heap)),
    )


def _gradient(z: Sizes) -> Item:
    """Of the weight or of its selected rows; where those are held, they are in its memory from forward on."""
    since = "gather" if z.cpu else "forward" if z.held else "backward"
    until = "backward" if z.in_backward and not z.cpu else "update"
    phases = PHASES[PHASES.index(since) : PHASES.index(until) + 1]
    name = "row gradients" if z.window else "weight gradient"
    if z.in_backward:
        return Item(name, "T·D, a tile at a time", dict.fromkeys(phases, z.T * z.D * z.w))
    return Item(name, "S·D, before that the rows" if z.held else "S·D", dict.fromkeys(phases, z.S * z.D * z.w))


def _tile_logits(z: Sizes) -> dict[str, int]:
    """A tile of logits where it is not a part of the kept ones: in the products' dtype, or made in that of the statistics and lowered."""
    one, made = z.N * z.T, z.p if z.bounded else z.s
    forward = 0 if z.kept and z.bounded else one * made
    backward = 0 if z.kept else one * (made if z.bounded else made + z.p)
    return {"forward": forward, "combine": forward, "backward": backward}


def _directions(z: Sizes) -> tuple[int, int]:
    """(bytes of a tile's directions beside the rows that are held, what it takes to make them: rows picked out, widened, divided)."""
    each = z.T * z.D
    if z.held:
        return 0, 0
    return each * z.s, each * (z.w * (z.window > 0) + z.s * (z.w != z.s) + z.s)


def _tile_forward(z: Sizes) -> int:
    """What lives beside the logits while forward works on a tile: the largest of the moments between two operations."""
    directions, made = _directions(z)
    lowered = z.T * z.D * z.p * z.low
    narrow = 0 if z.bounded else z.N * z.T * z.p  # logits before they are widened
    summed = z.N * z.T * z.s * (z.cpu and z.low and z.bounded)  # the CPU widens what it sums
    return max(made, directions + lowered + narrow, directions + summed)


def _tile_backward(z: Sizes) -> int:
    """As `_tile_forward`, for backward."""
    directions, made = _directions(z)
    rows, samples = z.T * z.D, z.N * z.D
    narrow = 0 if z.bounded else z.N * z.T * z.p
    own = (
        0 if z.p == z.s == z.w and not z.held else rows * z.s
    )  # the gradient, where the product cannot be written to its place
    product = rows * z.p * z.low + own
    if not z.bounded:  # float16 is scaled back after it is widened
        product = 2 * rows * z.s
    turned = z.N * z.T * z.p * (z.cpu and z.low and z.bounded)  # the CPU turns half precision round
    return max(
        made + directions * (z.tiles > 1),  # beside the directions of the tile before
        directions + rows * z.p * z.low + max(narrow, samples * z.p * z.low),
        directions + product + turned + samples * z.p * z.low,
        directions + own + rows * z.s,  # the gradient's share along the directions
        directions + 2 * samples * z.s,  # the targets' own terms
        directions + _block(z, rows) if z.in_backward else 0,
    )


def _embeddings(z: Sizes) -> dict[str, int]:
    one = z.N * z.D
    gathered = one * z.s * (z.world > 1)
    # unit vectors, their gradient, the targets' rows, weighted unit vectors; scaled ones; a tile's share of the gradient
    backward = one * (4 * z.s + z.p + (0 if z.overlap else z.s))
    return {
        "gather": gathered,
        "select": gathered,
        "forward": gathered + one * 4 * z.s,  # unit vectors, those of the targets, their rows, the product of both
        "combine": gathered + one * (z.s + z.p),
        "backward": gathered + backward,
        "update": gathered + z.N_local * z.D * z.s,
    }


def _selection(z: Sizes) -> dict[str, int]:
    """Row numbers, which are known until there are new ones, and 1/length of the rows."""
    numbers = 8 * z.S * (z.window > 0)
    drawing = max(WINDOW_TEMPORARIES * z.window, 8 * (2 * (z.window + z.N) + 4 * z.S)) if z.window else 0
    after = dict.fromkeys(("forward", "combine", "backward", "update"), numbers + z.S * z.s)
    return {"gather": numbers, "select": numbers + drawing, **after}


def _payload(z: Sizes) -> int:
    """Bytes of the embeddings and labels of a rank."""
    return -(-z.N_local * z.D * z.s // 8) * 8 + 8 * z.N_local


def _buffers(z: Sizes) -> dict[str, int]:
    if z.world == 1:
        return {"combine": 7 * z.N * z.s}
    return {
        "gather": (1 + z.world) * _payload(z),
        "combine": (4 + 7 * z.world) * z.N * z.s,  # own, everyone's, and three temporaries of [world, N]
        "backward": z.N_local * z.D * z.s,
    }


def _block_elements(z: Sizes) -> int:
    return min(z.S, max(1, BLOCK_BYTES // (z.D * z.w))) * z.D


def _block(z: Sizes, elements: int) -> int:
    """What the optimizer needs besides for a block: gathered rows and state, widened copies, temporaries of a class without a kernel."""
    state, working = z.states * z.q, 0 if z.fused else z.q
    rows = (4 if z.wide == "master" else z.w) * (z.window > 0)
    rows += 4 * (z.wide == "stochastic") + 4 * bool(z.wide)  # widened, and their gradient
    storing = {None: 0, "master": z.w, "stochastic": ROUNDING_TEMPORARIES}[z.wide]
    return elements * (
        rows + state + max(working, storing)
    )  # without sampling a block has state of its own in the first step only


# ---------------------------------------------------------------------------------------------------- work and network


def operations(z: Sizes) -> dict[str, int]:
    """Floating-point operations: matrix products, and an estimate of those number by number, which memory rules and not arithmetic."""
    logits, rows = z.N * z.S, z.S * z.D
    elementwise = logits * (2 if z.kept else 3)  # exponential and sum, and the exponential again
    elementwise += rows * (3 + _remade(z) + 5)  # lengths and directions forward, directions backward, the tangent
    elementwise += rows * (2 + 4 * z.states) + 2 * z.tiles * z.N * z.D
    return {"matrix products": 2 * logits * z.D * (3 if z.kept else 4), "elementwise (estimate)": elementwise}


def _remade(z: Sizes) -> int:
    """How often backward makes the directions again."""
    return 0 if z.held else 2 if z.overlap else 1


def traffic(z: Sizes) -> dict[str, int]:
    """Bytes of memory that the operations read and write, as if nothing stayed in a cache between two of them."""
    rows = z.S * z.D
    # forward: product w, exponential r w, sum r; backward: r in two products, and in tiled mode product and exponential again
    logits = z.N * z.S * z.p * (6 if z.kept else 9)
    if not z.bounded:
        logits += (
            z.N * z.S * (3 * z.s + 2 * z.p) * (1 if z.kept else 2)
        )  # widened, its maximum taken off, lowered again
    directions = 2 * z.w * (z.window > 0) + z.w + z.s + 2 * z.s * (z.w != z.s)  # picked out, widened, divided
    used = z.p + (z.s + z.p) * z.low  # by a product; lowered for it
    class_rows = rows * (z.w + (1 + _remade(z)) * directions + (2 if z.kept else 3) * used)  # first of all measured
    gradient = rows * (z.w + 9 * z.s)  # of the product; the tangent
    if not z.p == z.s == z.w:
        gradient += rows * (2 * z.p + 2 * z.s * (z.w != z.s))
    update = rows * (3 * z.w + 2 * z.states * z.q)
    if z.window:  # gathered and put back
        update += rows * 4 * (z.w + z.states * z.q)
    return {"logits": logits, "class rows": class_rows, "row gradients": gradient, "update": update}


def collectives(z: Sizes) -> tuple[Collective, ...]:
    """None on a single rank."""
    if z.world == 1:
        return ()
    others, part = z.world - 1, z.N_local * z.D * z.s
    gathers = {"status": 8 * len(fields(Status)), "payload": _payload(z), "statistics": 4 * z.N * z.s}
    found = [Collective(f"{name} (all-gather)", own, own * others, own * others) for name, own in gathers.items()]
    return (*found, Collective("embedding gradient (reduce-scatter)", part * z.world, part * others, part * others))
