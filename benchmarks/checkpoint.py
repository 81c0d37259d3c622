"""What saving and loading cost: time against torch.save of the same bytes, memory against the shard, a step while a
save is under way.

    python benchmarks/checkpoint.py [--classes 1000000] [--width 512] [--repetitions 5] [--quick] [--out
    runs/bench-checkpoint]

Two ranks (gloo, one thread each) hold a head of C classes and its SGD momentum, fp32; a rank's *shard* is the bytes of
both on it.

    time      save_checkpoint, load_checkpoint, and in the same processes torch.save and torch.load(mmap) of the same
              bytes, a file a rank,
              flushed to the disk (fsync) as checkpoints are; in turn, medians
    memory    new processes for each: peak of resident memory (VmHWM, reset before) over what was resident when it began
    step      steps of training with no save, and those during which an asynchronous save was under way; the call of
              save() itself

Prints one Markdown table; writes it to OUT/table.md and raw figures to OUT/results.json. Files are written below OUT
and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import local_bytes, reset_peak, status, trimmed
from ranks import run_ranks

from partial_fc import Checkpointer, PartialFC, RowOptimizer, load_checkpoint, save_checkpoint
from partial_fc.distributed.shards import local_part

MIB = 1 << 20
N = 512


def build(classes: int, width: int, sample_rate: float = 1.0) -> tuple[PartialFC, RowOptimizer]:
    """A head and its optimizer, which has taken a step: its momentum exists."""
    head = PartialFC(width, classes, sample_rate=sample_rate)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    optimizer.load_state_dict(optimizer.state_template())
    return head, optimizer


def shard_bytes(head: PartialFC, optimizer: RowOptimizer) -> int:
    return local_bytes(
        [head.weight, *(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))]
    )


def tensors_of(head: PartialFC, optimizer: RowOptimizer) -> dict[str, torch.Tensor]:
    (state,) = optimizer.state.values()
    return {"weight": local_part(head.weight.detach()), "momentum": local_part(state["momentum_buffer"])}


def actions(folder: Path, head: PartialFC, optimizer: RowOptimizer) -> dict[str, Callable[[], None]]:
    """What is measured, by name; what loads comes after what has saved."""
    file = folder / f"rank-{dist.get_rank()}.pt"

    def torch_save() -> None:
        with file.open("wb") as out:
            torch.save(tensors_of(head, optimizer), out)
            out.flush()
            os.fsync(out.fileno())

    def torch_load() -> None:
        stored, here = torch.load(file, mmap=True, weights_only=True), tensors_of(head, optimizer)
        for name, tensor in here.items():
            tensor.copy_(stored[name])

    return {
        "save": lambda: save_checkpoint(folder / "checkpoint", head=head, optimizer=optimizer),
        "torch.save": torch_save,
        "load": lambda: load_checkpoint(folder / "checkpoint", head=head, optimizer=optimizer),
        "torch.load": torch_load,
    }


def times(folder: str, classes: int, width: int, repetitions: int) -> dict[str, list[float]]:
    head, optimizer = build(classes, width)
    taken: dict[str, list[float]] = {}
    for i in range(repetitions + 1):
        for name, action in actions(Path(folder), head, optimizer).items():
            dist.barrier()
            started = time.perf_counter()
            action()
            dist.barrier()
            if i:  # the first writes to files and pages that do not exist yet
                taken.setdefault(name, []).append(time.perf_counter() - started)
    return taken


def memory(folder: str, classes: int, width: int, what: str) -> tuple[int, int]:
    """(bytes of the shard, peak of resident bytes beyond those at the beginning) of one action."""
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    (here / "small").mkdir(exist_ok=True)
    for action in actions(here / "small", *build(1000, width)).values():  # whatever is loaded or allocated once
        action()
    head, optimizer = build(classes, width)
    checkpointer = Checkpointer(here / "run", asynchronous=True, keep_last=1)

    def save_asynchronously() -> None:
        for step in (1, 2):
            checkpointer.save(step, head=head, optimizer=optimizer)
        checkpointer.wait()

    action = save_asynchronously if what == "async save" else actions(here, head, optimizer)[what]
    dist.barrier()
    before = trimmed()
    if not reset_peak():
        raise RuntimeError("the peak of resident memory cannot be reset here (/proc/self/clear_refs)")
    action()
    return shard_bytes(head, optimizer), status("VmHWM") - before


def steps(folder: str, classes: int, width: int, count: int) -> dict[str, list[float]]:
    """Seconds of steps without and with a save under way, and of the calls of save()."""
    head, optimizer = build(classes, width)
    checkpointer = Checkpointer(Path(folder) / "run", asynchronous=True, keep_last=1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, labels = torch.randn(N // 2, width, generator=generator), torch.randint(classes, (N // 2,), generator=generator)

    def step() -> float:
        started = time.perf_counter()
        head(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    checkpointer.save(0, head=head, optimizer=optimizer)  # makes the copy's memory
    checkpointer.wait()
    step()
    taken: dict[str, list[float]] = {"step": [], "step during save": [], "call of save": []}
    for i in range(1, count + 1):
        dist.barrier()
        taken["step"] += [step() for _ in range(2)]
        started = time.perf_counter()
        checkpointer.save(i, head=head, optimizer=optimizer)
        taken["call of save"].append(time.perf_counter() - started)
        taken["step during save"] += [step() for _ in range(2)]
        checkpointer.wait()
    return taken


def row(title: str, value: float, unit: str, limit: float | None, note: str = "") -> dict[str, Any]:
    return {"title": title, "value": value, "unit": unit, "limit": limit, "note": note}


def slowest(results: list[dict[str, list[float]]], name: str) -> list[float]:
    return [max(each) for each in zip(*(rank[name] for rank in results), strict=True)]


def measure(folder: Path, classes: int, width: int, repetitions: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, raw = [], {}
    timed = run_ranks(2, times, str(folder / "times"), classes, width, repetitions)
    raw["times"] = {name: slowest(timed, name) for name in timed[0]}
    for ours, theirs in (("save", "torch.save"), ("load", "torch.load")):
        ratio = statistics.median(a / b for a, b in zip(raw["times"][ours], raw["times"][theirs], strict=True))
        note = ", ".join(f"{name} {statistics.median(raw['times'][name]):.2f} s" for name in (ours, theirs))
        rows.append(row(f"time of {ours}, over {theirs} of the same bytes", ratio, "×", None, note))
    shutil.rmtree(folder / "times")
    for what in ("save", "load", "async save"):
        # what is loaded is what the save before it has written
        found = run_ranks(2, memory, str(folder / "memory"), classes, width, what)
        raw[f"memory of {what}"] = found
        shard, peak = max(found, key=lambda pair: pair[1])
        title = "two asynchronous saves" if what == "async save" else what
        limit = None if what == "async save" else 0.1
        rows.append(
            row(
                f"memory of {title}, over the shard",
                peak / shard,
                "×",
                limit,
                f"{peak / MIB:.1f} MiB of {shard / MIB:.0f}",
            )
        )
    shutil.rmtree(folder / "memory")
    stepped = run_ranks(2, steps, str(folder / "steps"), classes, width, repetitions)
    raw["steps"] = {name: slowest(stepped, name) for name in stepped[0]}
    medians = {name: statistics.median(values) for name, values in raw["steps"].items()}
    note = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
    rows.append(
        row(
            "a step while a save is under way, over a step",
            medians["step during save"] / medians["step"],
            "×",
            None,
            note,
        )
    )
    rows.append(
        row("the call of an asynchronous save, over a step", medians["call of save"] / medians["step"], "×", None)
    )
    shutil.rmtree(folder / "steps")
    return rows, raw


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| measured | figure | at most | |", "|---|---|---|---|"]
    for each in rows:
        limit = "" if each["limit"] is None else f"{each['limit']:g}"
        lines.append(f"| {each['title']} | {each['value']:.3f} {each['unit']} | {limit} | {each['note']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="sizes at which it says nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-checkpoint"))
    asked = parser.parse_args()
    if asked.quick:
        asked.classes, asked.width, asked.repetitions = 2000, 32, 2
    asked.out.mkdir(parents=True, exist_ok=True)
    rows, raw = measure(asked.out, asked.classes, asked.width, asked.repetitions)
    title = f"{asked.classes:,} x {asked.width}, fp32 with momentum, 2 ranks"
    text = f"{title}{' (--quick: the figures say nothing)' if asked.quick else ''}\n\n{table(rows)}"
    (asked.out / "table.md").write_text(text)
    (asked.out / "results.json").write_text(json.dumps({"title": title, "rows": rows, "raw": raw}, indent=1))
    print(text)


if __name__ == "__main__":
    sys.exit(main())
