"""The memory of a training step on one rank: bytes of every large tensor, in each phase of the step that has it.

    build       the head is constructed: initial rows (not part of a step)
    gather      the global batch is collected
    select      classes are drawn, their rows selected and brought up to date
    forward     logits, tile by tile
    combine     statistics of all ranks become the loss
    backward    gradients, tile by tile
    update      the optimizer updates the rows, block by block

Each item adds its bytes to its phases; the peak is the largest sum over a phase. On the CPU the two largest buffers,
kept logits and gradient, are held from step to step, and the heap does not reuse all freed memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from partial_fc.cycle_table import PIECE, PIECE_ELSEWHERE
from partial_fc.optim import skipped_rows
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.row_optimizer import BLOCK_BYTES, BLOCK_BYTES_ELSEWHERE
from partial_fc.planning.costs import Sizes, payload_bytes, search
from partial_fc.tiers.initial import PAIRS, TEMPORARIES, rows_at_a_time

PHASES = ("build", "gather", "select", "forward", "combine", "backward", "update")
WINDOW_TEMPORARIES = 41  # most bytes per class while its place in a permutation is found: five numbers and a mask
ROUNDING_TEMPORARIES = 24  # most bytes per number that stochastic rounding of a block holds


@dataclass(frozen=True)
class Item:
    """One kind of tensor on a rank: its size as a formula, and its bytes in every phase of a step that has it."""

    name: str
    formula: str
    bytes: dict[str, int]

    @property
    def largest(self) -> int:
        return max(self.bytes.values(), default=0)


def _initial_block(z: Sizes) -> int:
    """Bytes of a block of initial rows, in float32, and of what they are drawn with."""
    return rows_at_a_time(z.D) * z.D * 4 + max(PAIRS, z.D // 2) * 8 * TEMPORARIES


def items(z: Sizes) -> tuple[Item, ...]:
    """Return every large tensor of a rank with its bytes in each phase."""
    return _on_device(z) if z.storage and not z.cpu else _items(z)


def _on_device(z: Sizes) -> tuple[Item, ...]:
    """Return those on a GPU whose rows are on the host: rows, state and their update are not among them."""
    away = {"weights", "initial rows", "optimizer state", "blocks of the optimizer", "heap"}
    rest = [item for item in _items(replace(z, storage=None, states=0, moves=None, wide=None)) if item.name not in away]
    rows = z.S if z.window else z.T  # all rows come tile by tile
    travelling = dict.fromkeys(("select", "forward", "combine", "backward"), rows * z.D * z.w)
    return Item("rows of the step", "S·D, from the host" if z.window else "T·D, from the host", travelling), *rest


def _items(z: Sizes) -> tuple[Item, ...]:
    step = PHASES[1:]
    rows = "C_local" if z.centers == 1 else "C_local·K"
    shard = z.rows_local * z.D * (z.storage != "files")
    master = 4 * (z.wide == "master")
    logits = _tile_logits(z)
    tiles = {"forward": _tile_forward(z), "backward": _tile_backward(z)}
    block = 0 if z.in_backward else block_bytes(z, _block_elements(z))
    # glibc does not reuse all freed memory: up to as much again as tiles and blocks take (docs/cost-model.md), those of
    # the first step, too, in which no row has missed a step and rows and state are gathered
    first = 0 if z.in_backward else block_bytes(replace(z, moves=None), _block_elements(z))
    heap = max(block, first) + max(logits[phase] + of_rows for phase, of_rows in tiles.items()) if z.cpu else 0
    return (
        Item("weights", f"{rows}·D", dict.fromkeys(PHASES, shard * z.w)),
        Item("initial rows", "a block of them", {"build": _initial_block(z) if z.cpu else 0}),
        Item(
            "optimizer state",
            f"{z.states + bool(master)}·{rows}·D",
            dict.fromkeys(step, shard * (z.states * z.q + master)),
        ),
        *([Item("which rows were touched", "C_local", dict.fromkeys(PHASES, z.C_local))] if z.storage else []),
        _gradient(z),
        Item(
            "kept logits",
            "N·S",
            dict.fromkeys(step if z.cpu else ("forward", "combine", "backward"), z.N * z.T * z.tiles * z.p * z.kept),
        ),
        Item("logits of a tile", "N·T", logits),
        Item("rows of a tile", "T·D, several", tiles),
        Item("embeddings and their gradient", "N·D, several", _embeddings(z)),
        Item("selection", "row numbers and lengths", _selection(z)),
        *([Item("steps of a cycle", "C_local, int32", dict.fromkeys(step, _table(z)))] if z.tabled else []),
        *_skipped_rows(z),
        *_hard_negatives(z),
        Item("collectives' buffers", "", _collective_buffers(z)),
        Item("blocks of the optimizer", "", _blocks(z, block)),
        Item("heap", "freed tiles and blocks, on the CPU", dict.fromkeys(step, heap)),
    )


def _gradient(z: Sizes) -> Item:
    """The gradient of the weight or of its selected rows. Rows that are held occupy its memory from forward on."""
    if z.cpu:
        since = "gather"
    else:
        since = "forward" if z.held else "backward"
    until = "backward" if z.in_backward and not z.cpu else "update"
    phases = PHASES[PHASES.index(since) : PHASES.index(until) + 1]
    name = "row gradients" if z.window else "weight gradient"
    if z.in_backward:
        return Item(name, "T·D, a tile at a time", dict.fromkeys(phases, z.T * z.D * z.w))
    return Item(name, "S·D, before that the rows" if z.held else "S·D", dict.fromkeys(phases, z.S * z.D * z.w))


# ---------------------------------------------------------------------------------------------------- tiles


def _tile_logits(z: Sizes) -> dict[str, int]:
    """A tile of logits that is not a view of the kept ones.

    It has the dtype of the products, or is computed in the dtype of the statistics and then lowered.
    """
    one = z.N * z.T
    computed = z.p if z.bounded else z.s
    forward = 0 if z.kept and z.bounded else one * computed
    backward = 0 if z.kept else one * (computed if z.bounded else computed + z.p)
    return {"forward": forward, "combine": forward, "backward": backward}


def _directions(z: Sizes) -> tuple[int, int]:
    """Return (bytes of a tile's directions in the dtype of the products, bytes while they are computed); 0 if rows are
    held in that dtype.

    They are computed from rows that may have to be gathered first; the CPU widens what it divides.
    """
    elements = z.T * z.D
    if z.held:
        return elements * z.p * z.low, elements * z.p * z.low
    return elements * z.p, elements * (z.w * z.gathered + z.s * z.low + z.s * (z.w != z.s) + z.p)


def _tile_forward(z: Sizes) -> int:
    """Bytes beside the logits while forward computes a tile: the largest of the moments between two operations."""
    directions, computing = _directions(z)
    narrow = 0 if z.bounded else z.N * z.T * z.p  # logits before they are widened
    summed = z.N * z.T * z.s * (z.low and z.bounded)  # the CPU widens what it sums
    return max(computing, directions + narrow, directions + summed)


def _tile_backward(z: Sizes) -> int:
    """As `_tile_forward`, for backward."""
    directions, computing = _directions(z)
    rows = z.T * z.D
    samples = z.N * z.D
    narrow = 0 if z.bounded else z.N * z.T * z.p
    # the gradient, unless the product can be written to its final place
    own = 0 if z.s == z.w and not z.held else rows * z.s
    low = rows * (z.p if z.bounded else z.s) * z.low  # float16 is unscaled after it is widened
    product = low + (own if z.bounded else rows * z.s)
    # the rows themselves in the dtype of the statistics, where their directions are not in it
    vectors = rows * z.s * (z.low and not z.held and (z.w != z.s or z.gathered))
    transposed = z.N * z.T * z.p * (z.cpu and z.low and z.bounded)  # the CPU transposes half precision
    return max(
        computing + directions * (z.tiles > 1),  # beside the directions of the previous tile
        directions + max(narrow, samples * z.p * z.low),
        directions + product + transposed + samples * z.p * z.low,
        directions + vectors + low + own + rows * z.s,  # the component of the gradient along the directions
        directions + 2 * samples * z.s,  # the terms of the targets
        directions + block_bytes(z, rows) if z.in_backward else 0,
    )


# -------------------------------------------------------------------------------------------------- batch and selection


def _embeddings(z: Sizes) -> dict[str, int]:
    one = z.N * z.D
    gathered = one * z.s * (z.world > 1)
    # unit vectors, their gradient, the targets' rows, weighted unit vectors [s each]; scaled unit vectors [p];
    # without overlap a tile's share of the gradient [s]
    backward = one * (4 * z.s + z.p + (0 if z.overlap else z.s))
    return {
        "gather": gathered,
        "select": gathered,
        "forward": gathered + one * max(3 * z.s, 2 * z.s + z.p),  # unit vectors, the targets' rows, their product
        "combine": gathered + one * (2 * z.s + z.p),
        "backward": gathered + backward,
        "update": gathered + z.N_local * z.D * z.s,
    }


def _selection(z: Sizes) -> dict[str, int]:
    """Row numbers, which are kept until the next selection, and 1/length of the rows."""
    numbers = 8 * z.S * (z.window > 0)
    after = dict.fromkeys(("forward", "combine", "backward", "update"), numbers + z.S * z.s)
    return {"gather": numbers, "select": numbers + _drawing(z), **after}


def _drawing(z: Sizes) -> int:
    """Bytes while the step's rows are selected; in the first step of a cycle its table is made beside the last one."""
    if not z.window:
        return 0
    if z.tabled:
        making = WINDOW_TEMPORARIES * min(z.C_local, PIECE if z.cpu else PIECE_ELSEWHERE) + _table(z)
    else:
        making = WINDOW_TEMPORARIES * z.window
    own = -(-z.window * z.C_local // z.C)
    return max(making, 8 * (3 * own + 2 * z.N * (1 + z.hard) + 4 * z.S // z.centers))


def _table(z: Sizes) -> int:
    """Bytes of the table which step of a cycle draws which of the rank's classes (cycle_table.py)."""
    return 4 * z.C_local * z.tabled


def _skipped_rows(z: Sizes) -> tuple[Item, ...]:
    """How many steps each row has had; the selected rows as they are after the steps that they missed."""
    if z.moves is None:
        return ()
    done = Item("steps of each row", "C_local, int32", dict.fromkeys(PHASES[1:], 4 * z.C_local))
    step = dict.fromkeys(("forward", "combine", "backward"), z.current + _lowered(z))
    rows = Item(
        "rows and state, up to date",
        f"{1 + z.states}·S·D, wide",
        {"select": z.current, **step, "update": z.current},
    )
    return (done, rows) if z.current else (done,)


def _lowered(z: Sizes) -> int:
    """Bytes of rows that are up to date, in the dtype of the weights where that is another."""
    return z.S * z.D * z.w * (z.current > 0 and z.w != z.wider)


def _hard_negatives(z: Sizes) -> tuple[Item, ...]:
    """The neighbours of all classes; in the forwards that search them, what the search takes."""
    found = search(z)
    if found is None:
        return ()
    table = Item("hard negatives", "4·C·K", dict.fromkeys(PHASES, found.table))
    return table, Item("search for hard negatives", "tiles of rows and cosines, lists", {"select": found.memory})


def _collective_buffers(z: Sizes) -> dict[str, int]:
    if z.world == 1:
        return {"combine": 7 * z.N * z.s}
    return {
        "gather": (1 + z.world) * payload_bytes(z),
        # this rank's, those of all ranks, three temporaries of [world, N]
        "combine": (4 + 7 * (1 if z.reduced else z.world)) * z.N * z.s,
        "backward": z.N_local * z.D * z.s,
    }


# ---------------------------------------------------------------------------------------------------- optimizer


def _blocks(z: Sizes, block: int) -> dict[str, int]:
    """Bytes while rows make the steps that they missed, beyond those of drawing; and in the update.

    Then all rows do after every so many steps, for which the table of steps has room (`Moves.MOST`).
    """
    if z.moves is None:
        return {"update": block}
    moving = moving_bytes(z, z.S, in_place=not z.current)
    if z.current:  # what they become is what is kept; Adam's weight has two temporaries more
        kept = 1 + z.states - 2 * (z.moves is AdamMoves)
        moving -= min(z.S, moved_at_once(z)) * z.D * kept * z.wider
    selecting = max(moving, _lowered(z), _drawing(z))
    return {"select": selecting - _drawing(z), "update": max(block, moving_bytes(z, z.rows_local, in_place=True))}


def moving_bytes(z: Sizes, rows: int, *, in_place: bool) -> int:
    """Bytes that are allocated while so many rows make the steps that they missed, block by block."""
    size = min(rows, moved_at_once(z))
    kinds = 1 + z.states
    numbers = 2 * kinds + 4 * (z.moves is AdamMoves)  # before and after; √v and what divides the moment, term by term
    storing = {None: z.w * (z.w != z.wider), "master": z.w, "stochastic": ROUNDING_TEMPORARIES}[z.wide]
    return size * z.D * max(numbers * z.wider, (kinds * z.wider + storing) * in_place)


def moved_at_once(z: Sizes) -> int:
    """Rows of a block that makes the steps that it missed."""
    most = skipped_rows.BLOCK_BYTES if z.cpu else skipped_rows.BLOCK_BYTES_ELSEWHERE
    return max(1, most // (4 * z.D))


def _block_elements(z: Sizes) -> int:
    most = BLOCK_BYTES if z.cpu else BLOCK_BYTES_ELSEWHERE
    return min(z.S, max(1, most // (z.D * z.w))) * z.D


def block_bytes(z: Sizes, elements: int) -> int:
    """Bytes that the optimizer allocates for a block: gathered rows and state, widened copies, temporaries.

    Without sampling a block has state of its own in the first step only, which is counted.
    """
    if z.current:  # there are rows and state already, in float32 or wider
        narrow = z.w != z.wider and not z.wide
        rows, state = z.w if narrow else 4 * bool(z.wide), z.states * z.q * narrow
    else:
        state = z.states * z.q
        rows = (4 if z.wide == "master" else z.w) * (z.window > 0)
        rows += 4 * (z.wide == "stochastic") + 4 * bool(z.wide)  # widened, and their gradient
    working = 0 if z.fused else z.q
    storing = {None: 0, "master": z.w, "stochastic": ROUNDING_TEMPORARIES}[z.wide]
    return elements * (rows + state + max(working, storing))
