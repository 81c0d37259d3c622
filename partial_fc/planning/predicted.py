"""What a step takes with kernels, on cards that are known by their data sheets alone. Predicted: nothing is measured.

    Sizes ──> what the rule of `partial_fc.kernels.choice` takes on the card, its operations, the bytes that it reads
              and writes, and milliseconds: if everything overlaps, if nothing does; and those of plain PyTorch

A kernel's time is that of its blocks, counted: tensor cores, shared memory, second-level cache, exponentials, float
instructions; and that of its bytes. Products of the matrix library run at a rate that such libraries reach. It holds
for one label a sample, a margin that normalises, `bfloat16` products; docs/cost-model.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partial_fc.kernels import logits
from partial_fc.kernels.choice import STREAM_INSTEAD, Case, Kernels, rows_problem, stream_problem, tiles_problem
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.planning.costs import Sizes, traffic
from partial_fc.softmax.kernel_tiles import stream_tile

INSTRUCTIONS = 6  # a logit, beside its exponential: multiply, compare, select, add, half of two conversions


@dataclass(frozen=True)
class Card:
    """By the data sheet, but for what is marked: assumed between published microbenchmarks."""

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float  # in a second
    matrix: int  # bfloat16 operations of a processor in a clock
    memory: float  # bytes in a second
    cache: float  # the same of the second-level cache; assumed
    library: float  # operations in a second of large products in cuBLAS; assumed
    exponentials: int = 16  # of a processor in a clock
    instructions: int = 128  # float32 ones
    shared: int = 128  # bytes of shared memory


CARDS = (
    Card("H100", (9, 0), 132, 1.755e9, 4096, 3.35e12, 6.5e12, 700e12),
    Card("H200", (9, 0), 132, 1.755e9, 4096, 4.8e12, 6.5e12, 700e12),
    Card("A100", (8, 0), 108, 1.41e9, 2048, 2.0e12, 4.0e12, 250e12),
)


@dataclass(frozen=True)
class Prediction:
    """Of one rank's step on a card. Milliseconds without the network."""

    card: str
    kernels: str  # those that serve
    mode: str  # "kept", "tiled" or "streamed"
    operations: int  # of matrix products
    traffic: dict[str, int]  # bytes read and written
    fastest: float  # milliseconds, if everything overlaps that can
    slowest: float  # if nothing does
    plain: float  # of plain PyTorch: its products and its bytes, one after another


def predict(z: Sizes) -> tuple[Prediction, ...]:
    """Return a prediction for each card; none where products are not bfloat16, or the statistics not float32."""
    return tuple(_on(z, card) for card in CARDS) if z.p == 2 and z.bounded and z.s == 4 and not z.cpu else ()


def _on(z: Sizes, card: Card) -> Prediction:
    kernels = _kernels(z, card)
    kept = z.kept and not kernels.instead
    mode = "kept" if kept else "streamed" if kernels.stream else "tiled"
    products = (4 if mode == "streamed" else 3 if kept else 4) * 2 * z.N * z.S * z.D
    moved = _traffic(z, kernels, mode)
    rows = sum(moved.values()) - moved["logits"]
    if mode == "streamed":
        both = [_stream(z, card, logits.STREAM, of_rows=False), _stream(z, card, logits.STREAM_ROWS, of_rows=True)]
    elif kernels.tiles:
        count = 1 if kept else 2
        both = [_tile(z, card, stored=kept)] + [_tile(z, card, stored=True)] * (count - 1)
        both += [_library(z, card)] * 2
    else:
        both = [(_products(z, card, 3 if kept else 4) + moved["logits"] / card.memory,) * 2]
    fastest, slowest = (sum(each[i] for each in both) + rows / card.memory for i in (0, 1))
    plain = _products(z, card, 3 if z.kept else 4) + sum(traffic(z).values()) / card.memory
    return Prediction(card.name, str(kernels), mode, products, moved, 1e3 * fastest, 1e3 * slowest, 1e3 * plain)


def _kernels(z: Sizes, card: Card) -> Kernels:
    """Return what the rule takes for a head of these sizes on a card."""
    weight = torch.float32 if z.w == 4 else torch.bfloat16
    case = Case(
        torch.device("cuda"), weight, torch.float32, torch.bfloat16, z.D, centers=1, normalize=True, bounded=True,
        ruled=False, binary=False, bias=False, smoothing=False, metrics=False, correction=False,
    )  # fmt: skip
    if rows_problem(case):
        return Kernels(False, False, False)
    stream = not stream_problem(case, card.capability)
    tiles = not tiles_problem(case, card.capability)
    return Kernels(True, tiles, stream, instead=stream and z.D <= STREAM_INSTEAD)


def _traffic(z: Sizes, kernels: Kernels, mode: str) -> dict[str, int]:
    """Return bytes that are read and written, as `costs.traffic` does."""
    numbers, rows, m = z.N * z.S, z.S * z.D, z.states
    plain = traffic(z)
    if mode == "streamed":  # sums and weighted directions of each split
        launches, splits, _ = _launches(z, _blocks(logits.STREAM, z.D))
        of_logits = launches * splits * z.N * (z.D + 1) * 2 * z.s
    elif kernels.tiles:
        of_logits = numbers * z.p * 3
    else:
        of_logits = plain["logits"]
    if not kernels.rows:
        return {**plain, "logits": of_logits}
    gathered = z.w + z.p
    read = z.p * (2 if mode != "tiled" else 3)
    by_directions = 2 * (z.s if mode == "streamed" else z.p)
    found = {"logits": of_logits, "class rows": rows * (gathered + read)}
    through_lengths = (z.w + z.s) * (not z.in_backward)  # one kernel does that and the update
    found["row gradients"] = rows * (by_directions + through_lengths)
    found["update"] = rows * (z.s * (not z.in_backward) + 2 * z.w + 2 * m * z.q)
    if z.moves is AdamMoves:
        found["steps that rows missed"] = plain["steps that rows missed"]
    elif z.moves is not None:  # beside what is gathered anyway
        found["steps that rows missed"] = rows * (z.w + 2 * m * z.q)
    return found


def _products(z: Sizes, card: Card, count: int) -> float:
    return count * 2 * z.N * z.S * z.D / card.library


def _library(z: Sizes, card: Card) -> tuple[float, float]:
    """Return (the seconds, if all overlaps, if nothing does) of a product over e, read once, in the matrix library."""
    seconds = max(_products(z, card, 1), (z.N * z.S * z.p + z.S * z.D * 2 * z.p) / card.memory)
    return seconds, seconds


def _blocks(table: dict[int, logits.Blocks], width: int) -> logits.Blocks:
    return table[max(min(table), 1 << (width - 1).bit_length())]


def _launches(z: Sizes, how: logits.Blocks) -> tuple[int, int, int]:
    """Return how often the stream kernel of the forward is launched, its splits, and the rows of each."""
    rows = min(z.S, stream_tile(z.D))
    return -(-z.S // rows), *logits.splits_of(z.N, rows, how)


def _tile(z: Sizes, card: Card, *, stored: bool) -> tuple[float, float]:
    """Return the seconds of the tile kernel over all rows."""
    how = logits.TILE
    block, depth = how.samples * how.rows, -(-z.D // how.depth) * how.depth
    count = -(-z.N // how.samples) * -(-z.S // how.rows)
    tensor = 2 * block * depth / card.matrix
    # two groups of 64 samples, each of which reads its samples and all rows of a block
    shared = depth * 2 * (how.samples + 2 * how.rows) / card.shared
    cached = (how.samples + how.rows) * depth * z.p * card.processors * card.clock / card.cache
    products = max(tensor, shared, cached)
    others = block / card.exponentials + block * INSTRUCTIONS / card.instructions
    waves = -(-count // card.processors)
    moved = (z.N * z.S * z.p * stored + z.S * z.D * z.p) / card.memory
    return max(moved, waves * max(products, others) / card.clock), max(moved, waves * (products + others) / card.clock)


def _stream(z: Sizes, card: Card, table: dict[int, logits.Blocks], *, of_rows: bool) -> tuple[float, float]:
    """Return the seconds of a stream kernel over all rows: two products. of_rows: it owns rows and reads samples."""
    how = _blocks(table, z.D)
    wide = max(min(table), 1 << (z.D - 1).bit_length())
    launches, splits, each = _launches(z, how)
    rows = min(z.S, stream_tile(z.D))
    if of_rows:
        keep, read, programs, others = how.rows, how.samples, -(-rows // how.rows), z.N
    else:
        keep, read, programs, others = how.samples, how.rows, -(-z.N // how.samples) * splits, min(each, rows)
    steps = launches * -(-programs // card.processors) * -(-others // read)
    # two groups of warps: side by side, or where there are 64 rows alone, each with half of the other side
    split = keep < 128
    first, second = (read // 2, wide // 2) if split else (read, wide)
    tensor = 2 * keep * read * wide * 2 / card.matrix
    shared = 2 * (wide / 16 * (64 + first) * 32 + read / 16 * second * 32) / card.shared
    products = max(tensor, shared)
    cached = read * wide * z.p * card.processors * card.clock / card.cache
    block = keep * read
    rest = block / card.exponentials + block * (INSTRUCTIONS + of_rows) / card.instructions
    moved = z.S * z.D * (z.p + z.s * of_rows) / card.memory
    seconds = [steps * max(clocks, cached) / card.clock for clocks in (max(products, rest), products + rest)]
    return max(moved, seconds[0]), max(moved, seconds[1])


def lines(found: tuple[Prediction, ...]) -> list[str]:
    """Return what `plan` prints of them."""
    if not found:
        return []
    out = ["", "one step with kernels, without the network: predicted from data sheets, not measured (docs/kernels.md)"]
    for p in found:
        work = f"{p.operations / 1e12:.3f} * 10^12 operations of products"
        moved = f"{sum(p.traffic.values()) / 1e9:.2f} GB read and written"
        out.append(f"  {p.card}: {p.fastest:.2f} to {p.slowest:.2f} ms, plain PyTorch {p.plain:.2f} ms")
        out.append(f"    kernels of {p.kernels}; logits are {p.mode}; {work}, {moved}")
    return out
