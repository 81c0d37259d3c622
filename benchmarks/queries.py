"""What questions cost: `topk` and `nearest_classes` against the bare matrix products, and against the products with
`torch.topk`.

    python benchmarks/queries.py [--quick] [--worlds 1 2] [--only topk] [--nearest_classes 200000] [--nearest_width 512]

Float32, one thread a rank. In the same processes, in turn:

    ours          head.topk of 1,024 embeddings, head.nearest_classes; k = 10, tiles of 64 MiB
    product       the products of the same tiles into one buffer, rows as they are: no lengths, no selection, nothing
                  sent
    torch.topk    the same products, `torch.topk` of every tile, and of what was found with what was found before

On one rank nearest_classes computes a tile [i, j] once for both sides; `product` is then of those tiles alone, which is
half of all. `all products` are all tiles, what brute force computes. The defaults of nearest_classes are smaller than
those of topk, since its work grows with C²: with --nearest_classes 200000 --nearest_width 512 every repetition is some
half an hour of one core. Ratios of processor time are there for machines on which others work too. The table is on
standard output.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from ranks import Times, interleaved, over_ranks, ratio, run_ranks  # noqa: E402

from partial_fc import NormFace, PartialFC  # noqa: E402
from partial_fc.classes.queries import DEFAULT_TILE_BYTES  # noqa: E402
from partial_fc.distributed.shards import local_part  # noqa: E402

K, QUERIES = 10, 1024
MARK = 1.3  # times the product, at most
Tiles = list[tuple[slice, slice]]


def spans(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def walk(left: Tensor, right: Tensor, tiles: Tiles, select: bool) -> Callable[[], None]:
    """All `tiles` of left · rightᵀ into one buffer; with `select`, the best k of each row of `left` over them."""
    buffer = torch.empty(max((a.stop - a.start) * (b.stop - b.start) for a, b in tiles))

    def run() -> None:
        best, ids = left.new_full((len(left), K), -torch.inf), torch.zeros(len(left), K, dtype=torch.int64)
        for a, b in tiles:
            x, w = left[a], right[b]
            tile = torch.mm(x, w.T, out=buffer[: len(x) * len(w)].view(len(x), len(w)))
            if select:
                values, places = tile.topk(min(K, len(w)))
                both, names = torch.cat((best[a], values), 1), torch.cat((ids[a], places + b.start), 1)
                best[a], top = both.topk(K)
                ids[a] = names.gather(1, top)

    return run


def topk_times(classes: int, width: int, queries: int, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """On one rank: its share of the embeddings asks, its class rows are multiplied with all of them."""
    head = PartialFC(width, classes, NormFace())
    rows, world = local_part(head.weight.detach()), head.shards.ranks.world
    everyone = torch.randn(queries, width, generator=torch.Generator().manual_seed(1))
    mine = everyone.chunk(world)[head.shards.ranks.rank]
    tiles = [(slice(0, queries), b) for b in spans(len(rows), max(1, DEFAULT_TILE_BYTES // 4 // queries))]
    things = {
        "product": walk(everyone, rows, tiles, False),
        "ours": lambda: head.topk(mine, K),
        "torch.topk": walk(everyone, rows, tiles, True),
    }
    return interleaved(things, repetitions, warm_up=1)


def nearest_times(classes: int, width: int, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """On one rank: its class rows against all; in the products rows of its own stand for those of other ranks."""
    head = PartialFC(width, classes, NormFace())
    rows, world = local_part(head.weight.detach()), head.shards.ranks.world
    blocks = spans(len(rows), math.isqrt(DEFAULT_TILE_BYTES // 4))
    whole = [(a, b) for _ in range(world) for b in blocks for a in blocks]
    once = [(a, b) for a, b in whole if b.start >= a.start]
    things = {
        "product": walk(rows, rows, once if world == 1 else whole, False),
        "ours": lambda: head.nearest_classes(K),
    }
    if world == 1:
        things["all products"] = walk(rows, rows, whole, False)
    things["torch.topk"] = walk(rows, rows, whole, True)
    return interleaved(things, repetitions, warm_up=0)


def line(what: str, classes: int, width: int, world: int, times: dict[str, Times]) -> str:
    """A row of the table: seconds, and ratios of neighbours in time."""
    ours, product = times["ours"].wall, times["product"].wall
    everything = times.get("all products", times["product"]).wall
    cells = [what, f"{classes:,}", str(width), str(world), f"{times['ours'].seconds:.3g}"]
    cells += [f"{ratio(ours, product):.2f}", f"{ratio(times['ours'].cpu, times['product'].cpu):.2f}"]
    cells += [f"{ratio(ours, everything):.2f}", f"{ratio(times['torch.topk'].wall, everything):.2f}", str(MARK)]
    return f"| {' | '.join(cells)} |"


HEADING = (
    "| question | C | D | ranks | seconds | ours / its products | the same, processor time | ours / all products "
    "| with torch.topk / all products | wanted, at most |\n" + "|---" * 10 + "|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that it runs")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--classes", type=int, default=200_000, help="of topk (D = 512)")
    parser.add_argument("--nearest_classes", type=int, default=100_000, help="of nearest_classes")
    parser.add_argument(
        "--nearest_width", type=int, default=128, help="D of nearest_classes; 512 takes four times as long"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="of nearest_classes; topk has three times as many")
    parser.add_argument("--only", choices=("topk", "nearest_classes"), default=None)
    asked = parser.parse_args(arguments)
    width, queries = 512, QUERIES
    if asked.quick:
        asked.classes, asked.nearest_classes, asked.nearest_width, asked.repetitions, width, queries = (
            3000,
            1500,
            16,
            1,
            16,
            32,
        )
    lines = [HEADING]
    for world in asked.worlds:
        if asked.only != "nearest_classes":
            times = over_ranks(run_ranks(world, topk_times, asked.classes, width, queries, 3 * asked.repetitions))
            lines.append(line(f"topk, {queries:,} embeddings, k = {K}", asked.classes, width, world, times))
        if asked.only != "topk":
            taken = run_ranks(
                world, nearest_times, asked.nearest_classes, asked.nearest_width, asked.repetitions, timeout=7200
            )
            lines.append(
                line(f"nearest_classes, k = {K}", asked.nearest_classes, asked.nearest_width, world, over_ranks(taken))
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
