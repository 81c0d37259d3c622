"""What a gallery costs and finds at a million embeddings: making, opening, searching, changing; recall against exact search.

    python benchmarks/gallery.py [--rows 1000000] [--width 512] [--threads 2] [--folder DIR] [--quick]

The embeddings are drawn: identities of five images, in a space whose variances fall as i^-0.75, which has about 94
directions that count of 512; two images of an identity have a cosine of about 0.6. Queries are new images of enrolled
identities, and images of strangers. `--index exact` measures the exact search instead.

A recall of k is the share of the k nearest identities, by the product with every row, that the gallery answers with.
Searches a second are given by the clock and by the seconds that the processor worked, for machines that are shared. The
table is on standard output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from partial_fc.training.gallery import Gallery  # noqa: E402

IMAGES = 5  # of an identity
NOISE = 0.82  # of an image, beside its identity's centre of length 1
BLOCK = 20_000


def main() -> None:
    options = parsed()
    import faiss

    faiss.omp_set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=1000, help="of each kind")
    parser.add_argument("--index", choices=("auto", "exact", "codes"), default="auto")
    parser.add_argument(
        "--folder", default=None, help="where 5 GB are free for a while (default: the temporary folder)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to try the command")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.width, options.queries, options.index = 4000, 32, 50, "codes"
    return options


class Drawn:
    """Identities and their images, the same whenever they are drawn."""

    def __init__(self, width: int) -> None:
        self.spread = (np.arange(1, width + 1) ** -0.375).astype(np.float32)
        self.spread /= np.linalg.norm(self.spread)

    def images(self, first: int, count: int, each: int, seed: int) -> np.ndarray:
        """Float32 [count * each, width]: `each` images of the identities `first` ... of a draw `seed`."""
        width = len(self.spread)
        centres = np.stack(
            [np.random.default_rng(first + i).standard_normal(width, dtype=np.float32) for i in range(count)]
        )
        noise = np.random.default_rng([seed, first]).standard_normal((count, each, width), dtype=np.float32)
        return ((centres[:, None] + NOISE * noise) * self.spread).reshape(-1, width)


def measure(folder: Path, options: argparse.Namespace) -> None:
    drawn, people = Drawn(options.width), options.rows // IMAGES
    rows = np.lib.format.open_memmap(
        folder / "rows.npy", mode="w+", dtype=np.float32, shape=(people * IMAGES, options.width)
    )
    for first in range(0, people, BLOCK):
        count = min(BLOCK, people - first)
        rows[first * IMAGES : (first + count) * IMAGES] = drawn.images(first, count, IMAGES, seed=1)
    rows.flush()
    names = [f"{identity:07d}" for identity in range(people) for _ in range(IMAGES)]
    print(f"| {len(rows):,} embeddings of {options.width}, {options.threads} threads | | processor |\n|---|---|---|")
    built = timed(
        "build",
        lambda: Gallery.build(folder / "g", rows, names, backbone="drawn", per_identity="all", index=options.index),
    )
    print(f"| {built.index} | | |")
    del built
    gallery = timed("open", lambda: Gallery.open(folder / "g"))
    stride = max(1, people // options.queries)
    new = np.concatenate([drawn.images(i * stride, 1, 1, seed=2) for i in range(options.queries)])
    own = [f"{i * stride:07d}" for i in range(options.queries)]
    strangers = drawn.images(people + 10, options.queries, 1, seed=3)
    for what, queries, known in (("enrolled", new, own), ("strangers", strangers, None)):
        report_recall(gallery, what, queries, known, rows)
    report_speed(gallery, new)
    more = drawn.images(people + 10**6, 1000, 1, seed=4)
    timed("add 1,000 identities", lambda: gallery.add(more, [f"new{i}" for i in range(1000)]))
    timed("add 1 identity", lambda: gallery.add(more[:1] + more[1:2], ["one"]))
    timed("remove 1,000 identities", lambda: gallery.remove([f"new{i}" for i in range(1000)]))
    print(f"| memory, without files that are mapped | {anonymous_memory():.1f} GiB | |")


def timed(what: str, work: Callable[[], object]) -> object:
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    print(f"| {what} | {time.perf_counter() - clock:.1f} s | {time.process_time() - cpu:.1f} s |", flush=True)
    return found


def report_recall(gallery: Gallery, what: str, queries: np.ndarray, own: list[str] | None, rows: np.ndarray) -> None:
    exact = nearest_identities(queries, rows, 10)
    found = [[int(match.identity) for match in answer.matches] for answer in gallery.search(queries, 10)]
    first = np.mean([each[0] == best[0] for each, best in zip(found, exact, strict=True)])
    ten = np.mean([len(set(each) & set(best)) / 10 for each, best in zip(found, exact, strict=True)])
    print(f"| recall of 1 and of 10, {what} | {first:.2%}, {ten:.2%} | |", flush=True)
    if own is not None:
        right = [
            np.mean([int(name) == each[0] for name, each in zip(own, some, strict=True)]) for some in (found, exact)
        ]
        print(f"| right at the first place, here and by exact search | {right[0]:.2%}, {right[1]:.2%} | |")


def nearest_identities(queries: np.ndarray, rows: np.ndarray, k: int) -> list[list[int]]:
    """The k identities with the nearest row to each query, by the product with every row."""
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    best = np.full((len(unit), 0), 0, dtype=np.float32)
    names = np.full((len(unit), 0), 0, dtype=np.int64)
    for start in range(0, len(rows), BLOCK * IMAGES):
        block = rows[start : start + BLOCK * IMAGES]
        cosines = unit @ (block / np.linalg.norm(block, axis=1, keepdims=True)).T
        of_identity = cosines.reshape(len(unit), -1, IMAGES).max(2)
        here = np.arange(start // IMAGES, start // IMAGES + of_identity.shape[1])
        best = np.concatenate((best, of_identity), axis=1)
        names = np.concatenate((names, np.broadcast_to(here, of_identity.shape)), axis=1)
        kept = np.argsort(-best, axis=1)[:, :k] if best.shape[1] <= 10 * k else np.argpartition(-best, k, axis=1)[:, :k]
        best, names = np.take_along_axis(best, kept, 1), np.take_along_axis(names, kept, 1)
    order = np.argsort(-best, axis=1)
    return np.take_along_axis(names, order, 1).tolist()


def report_speed(gallery: Gallery, queries: np.ndarray) -> None:
    for size in (1, 64, len(queries)):
        some = queries[: min(len(queries), 300)] if size == 1 else queries
        gallery.search(some[:size], 5)
        clock, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(some), size):
            gallery.search(some[start : start + size], 5)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        print(
            f"| searches a second, {size} at a time | {len(some) / clock:,.0f} | {len(some) / cpu:,.0f} a second of one "
            "processor |",
            flush=True,
        )


def anonymous_memory() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    main()
