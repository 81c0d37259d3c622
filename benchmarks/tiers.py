"""What rows in files cost: a step against a head in memory, the first step after construction, resident memory.

    python benchmarks/tiers.py [--folder DISK] [--repetitions 20] [--only CASE ...] [--quick] [--out runs/bench-tiers]

Two ranks (gloo, one thread each), SGD with momentum, fp32, N = 512, in new processes for each case:

    cached    C = 2M, D = 128, r = 0.01: a step over that of a head in memory, in turn in the same processes; a median
              of ratios; files that the page cache holds
    rows      C = 20M, D = 64, r = 0.001, row by row: seconds to build the head and take a step; memory of a rank
    blocks    C = 100M, D = 64, r = 0.001, sample_block=1024: the same; then steps, over those of a head of 2M classes
              with as many selected rows
    growth    seconds of a step with as many selected rows, C = 0.5M to 8M, in blocks of 1,024
    saves     C = 4M, D = 64, r = 0.0005, all rows touched, 20 steps between saves: seconds and bytes of a checkpoint of
              what has changed, over those of a whole one; loading the last of four, over loading a whole one
    resumed   C = 100M, D = 64, r = 0.001, sample_block=1024, saved after ten steps: a new head that loads it
    larger    C = 100M, D = 64, r = 0.001, sample_block=1024, after a cycle that has touched every row, so that 51 GB of
              files stand beside less memory: steps, over those of a head of 2M classes in memory with as many selected
              rows; beside it what the disk needs for the bytes of such a step at its bandwidth, measured before. Wants
              60 GB of disk and takes a quarter of an hour; left out unless named

Memory is what is no page of a file (RssAnon of /proc) beyond that of a process that has imported torch. Prints one
Markdown table; writes it to OUT/table.md and raw figures to OUT/results.json. Files of rows are below --folder, have no
name, and go with the process. --quick: sizes of a thousandth, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import status
from ranks import interleaved, over_ranks, ratio, run_ranks
from tqdm import tqdm

from partial_fc import ArcFace, Checkpointer, FileRows, PartialFC, RowOptimizer

MIB = 1 << 20
N = 512
CASES = "cached", "rows", "blocks", "growth", "saves", "resumed"
LONG_CASES = ("larger",)
PIECE = 256 << 10  # bytes, of one reading or writing of the disk

Step = Callable[[], None]


def stepping(C: int, D: int, rate: float, block: int, folder: str | None) -> tuple[Step, PartialFC, RowOptimizer]:
    """A step of a new head with random embeddings and labels, the head and its optimizer."""
    storage = None if folder is None else FileRows(folder)
    head = PartialFC(D, C, ArcFace(), rate, sample_block=block, storage=storage)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        n = N // dist.get_world_size()
        x = torch.randn(n, D, generator=generator).requires_grad_()
        head(x, torch.randint(0, C, (n,), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, head, optimizer


def in_turn(sizes: dict[str, tuple[int, float, int, str | None]], D: int, repetitions: int, warm_up: int) -> Any:
    """Times of a step of each of these heads, in turn."""
    steps = {name: stepping(C, D, rate, block, folder)[0] for name, (C, rate, block, folder) in sizes.items()}
    return interleaved(steps, repetitions, warm_up)


def first_step(C: int, D: int, rate: float, block: int, folder: str, more: int) -> dict[str, Any]:
    """What a head costs until its first step is done, and then."""
    before, start = status("RssAnon"), time.perf_counter()
    step, head, _ = stepping(C, D, rate, block, folder)
    step()
    dist.barrier()
    first, after_first = time.perf_counter() - start, status("RssAnon") - before
    store = head.class_rows.store
    assert store is not None
    seconds, waited = [], store.waited
    for _ in range(more):
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "first": first,
        "memory": max(after_first, status("RssAnon") - before),
        "seconds": seconds,
        "waited": store.waited - waited,
        "touched": store.count - store.untouched,
    }


def saves(C: int, D: int, rate: float, steps: int, folder: str) -> dict[str, Any]:
    """Seconds and bytes of checkpoints with the rows that have changed since the one before, and with all rows."""
    step, head, optimizer = stepping(C, D, rate, 1, folder)
    step()
    head.class_rows.catch_up()
    found: dict[str, Any] = {}
    for kind, incremental in (("changed", True), ("whole", False)):
        checkpointer = Checkpointer(Path(folder) / kind, keep_last=1, incremental=incremental)
        checkpointer.save(0, head=head, optimizer=optimizer)
        seconds = []
        for number in range(1, 4):
            for _ in range(steps):
                step()
            dist.barrier()
            start = time.perf_counter()
            checkpointer.save(number, head=head, optimizer=optimizer)
            seconds.append(time.perf_counter() - start)
        data = checkpointer.path(3) / "data-0001"
        own = sum(file.stat().st_size for file in data.iterdir() if file.is_file())
        dist.barrier()
        start = time.perf_counter()
        checkpointer.load(head=head, optimizer=optimizer)
        found[kind] = {"save": statistics.median(seconds), "load": time.perf_counter() - start, "bytes": own}
        checkpointer.release()
        dist.barrier()
    return found


def resumed(C: int, D: int, rate: float, block: int, steps: int, folder: str) -> dict[str, Any]:
    """What it costs to go on from a checkpoint in a new head."""

    def on_disk(head: PartialFC) -> int:
        store = head.class_rows.store
        assert store is not None
        return sum(os.fstat(rows.file).st_blocks * 512 for rows in store.tensors.values() if rows.file is not None)

    step, head, optimizer = stepping(C, D, rate, block, folder)
    for _ in range(steps):
        step()
    checkpointer = Checkpointer(Path(folder) / "saved")
    checkpointer.save(steps, head=head, optimizer=optimizer)
    saved = on_disk(head)
    dist.barrier()
    before, start = status("RssAnon"), time.perf_counter()
    step, head, optimizer = stepping(C, D, rate, block, folder)
    checkpointer.load(head=head, optimizer=optimizer)
    dist.barrier()
    seconds = time.perf_counter() - start
    checkpointer.release()
    return {"seconds": seconds, "disk": on_disk(head) / saved, "bytes": saved, "memory": status("RssAnon") - before}


def timed(step: Step, steps: int) -> float:
    """Mean seconds of a step: what a run of them takes, bursts of the disk included."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / steps


def moved() -> dict[str, int]:
    """Bytes that this process has had read from and will have written to a disk."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    counts = {name: int(value) for name, value in lines}
    return {"read": counts["read_bytes"], "written": counts["write_bytes"]}


def larger(C: int, D: int, rate: float, block: int, beside: int, steps: int, folder: str) -> dict[str, Any]:
    """Steps of a head whose files memory does not hold, between those of one in memory."""
    step, head, _ = stepping(C, D, rate, block, folder)
    store = head.class_rows.store
    assert store is not None
    for _ in tqdm(range(20), "touching every row", disable=dist.get_rank() != 0):
        timed(step, math.ceil(1 / rate / 20))
    assert store.untouched == 0
    in_memory, *_ = stepping(beside, D, rate * C / beside, block, None)
    timed(in_memory, 2)
    seconds = {"memory": [timed(in_memory, steps)]}
    before, waited = moved(), store.waited
    seconds["files"] = [timed(step, steps)]
    after, waited = moved(), store.waited - waited
    seconds["memory"].append(timed(in_memory, steps))
    return {
        "memory": statistics.mean(seconds["memory"]),
        "files": statistics.mean(seconds["files"]),
        "waited": waited / steps,
        **{kind: (after[kind] - before[kind]) / steps for kind in after},
    }


def bandwidth(folder: str, size: int) -> dict[str, float]:
    """Bytes a second that the disk writes, and reads in pieces in random order, of a file that memory does not hold."""
    piece = os.urandom(PIECE)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(size // PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        written = size / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        places = torch.randperm(size // PIECE, generator=torch.Generator().manual_seed(0)).tolist()
        start = time.perf_counter()
        for place in places:
            os.pread(file.fileno(), PIECE, place * PIECE)
        return {"written": written, "read": size / (time.perf_counter() - start)}


def measure(case: str, folder: str, repetitions: int, scale: int) -> list[dict[str, Any]]:
    """The rows of the table of one case."""
    if case == "cached":
        C = 2_000_000 // scale
        cycle = 100 if scale == 1 else 2  # then every row has been touched
        sizes = {"memory": (C, 0.01, 1, None), "files": (C, 0.01, 1, folder)}
        times = over_ranks(run_ranks(2, in_turn, sizes, 128, repetitions, cycle))
        value = ratio(times["files"].wall, times["memory"].wall)
        return [{"case": case, "what": "step, files over memory", "value": value, "unit": "×", "limit": 1.15}]
    if case == "growth":
        chosen = 20_000
        sizes = {
            f"{C}": (C // scale, chosen / C, max(1, 1024 // scale), folder)
            for C in (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)
        }
        times = over_ranks(run_ranks(2, in_turn, sizes, 64, repetitions, 3))
        smallest = times["500000"].seconds
        return [
            {"case": case, "what": f"step at C = {int(C):,} over C = 500,000", "value": each.seconds / smallest,
             "unit": "×", "limit": 1.2}
            for C, each in times.items()
        ]  # fmt: skip
    if case == "saves":
        with tempfile.TemporaryDirectory(dir=folder) as own:
            each = run_ranks(2, saves, 4_000_000 // scale, 64, 0.0005 * min(scale, 100), 20, own)
        most = {kind: {k: max(one[kind][k] for one in each) for k in each[0][kind]} for kind in each[0]}
        units = {"bytes": "bytes written", "save": "seconds of a save", "load": "seconds of a load"}
        return [
            {"case": case, "what": f"{what}, changed rows over all rows ({most['whole'][k]:.3g})",
             "value": most["changed"][k] / most["whole"][k], "unit": "×", "limit": None}
            for k, what in units.items()
        ]  # fmt: skip
    if case == "resumed":
        with tempfile.TemporaryDirectory(dir=folder) as own:
            each = run_ranks(2, resumed, 100_000_000 // scale, 64, 0.001, max(1, 1024 // scale), 10, own)
        most = {key: max(one[key] for one in each) for key in each[0]}
        return [
            {"case": case, "what": "build and load", "value": most["seconds"], "unit": "s", "limit": None},
            {"case": case, "what": f"its files over those of the run that saved it ({most['bytes']:.3g} bytes a rank)",
             "value": most["disk"], "unit": "×", "limit": None},
            {"case": case, "what": "memory of a rank, without pages of files", "value": most["memory"] / MIB,
             "unit": "MiB", "limit": None},
        ]  # fmt: skip
    if case == "larger":
        disk = bandwidth(folder, (4 << 30) // scale)
        C, block = 100_000_000 // scale, max(1, 1024 // scale)
        each = run_ranks(2, larger, C, 64, 0.001, block, 2_000_000 // scale, 2 * repetitions, folder, timeout=3600.0)
        of_a_step = {kind: sum(one[kind] for one in each) for kind in disk}
        beside = max(one["memory"] for one in each)
        needed = sum(of_a_step[kind] / disk[kind] for kind in disk)
        speeds = ", ".join(f"{kind} at {value / 1e6:.0f} MB/s" for kind, value in disk.items())
        return [
            {"case": case, "what": "step, files larger than memory, over that of 2M classes in memory",
             "value": max(one["files"] for one in each) / beside, "unit": "×", "limit": max(2.0, needed / beside)},
            {"case": case, "what": f"the bytes of a step, {speeds}, over that step in memory",
             "value": needed / beside, "unit": "×", "limit": None},
            *({"case": case, "what": f"bytes {kind} in a step, both ranks", "value": value / 1e6, "unit": "MB",
               "limit": None} for kind, value in of_a_step.items()),
            {"case": case, "what": "share of a step spent waiting for rows",
             "value": max(one["waited"] / one["files"] for one in each), "unit": "", "limit": None},
        ]  # fmt: skip
    C, block = (20_000_000, 1) if case == "rows" else (100_000_000, 1024)
    C, block, rate = C // scale, max(1, block // scale), 0.001
    found = run_ranks(2, first_step, C, 64, rate, block, folder, 0 if case == "rows" else repetitions)
    limits = (20, 600) if case == "rows" else (20, 1536)
    rows = [
        {"case": case, "what": "build and first step", "value": max(each["first"] for each in found), "unit": "s",
         "limit": limits[0]},
        {"case": case, "what": "memory of a rank, without pages of files",
         "value": max(each["memory"] for each in found) / MIB, "unit": "MiB", "limit": limits[1]},
    ]  # fmt: skip
    if case == "blocks":
        sizes = {"memory": (2_000_000 // scale, rate * C / (2_000_000 // scale), block, None)}
        beside = over_ranks(run_ranks(2, in_turn, sizes, 64, repetitions, 2))["memory"].seconds
        seconds = [max(each) for each in zip(*(one["seconds"] for one in found), strict=True)]
        value = statistics.median(seconds) / beside
        what = "step, of rows that nobody has touched yet, over that of 2M classes in memory"
        rows.append({"case": case, "what": what, "value": value, "unit": "×", "limit": None})
        share = max(one["waited"] / max(sum(one["seconds"]), 1e-9) for one in found)
        rows.append({"case": case, "what": "share of that step spent waiting for rows", "value": share, "unit": "",
                     "limit": None})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-tiers/rows"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tiers"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=CASES + LONG_CASES, default=CASES)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    given.folder.mkdir(parents=True, exist_ok=True)
    for case in given.only:
        rows += measure(case, str(given.folder), 2 if given.quick else given.repetitions, 1000 if given.quick else 1)
        print(rows[-1], flush=True)
    lines = ["| case | what | measured | limit |", "|---|---|---|---|"]
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:g} {row['unit']}"
        lines.append(f"| {row['case']} | {row['what']} | {row['value']:.3g} {row['unit']} | {limit} |")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text("\n".join(lines) + "\n")
    (given.out / "results.json").write_text(json.dumps(rows, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
