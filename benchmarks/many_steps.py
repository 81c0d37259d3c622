"""Many steps of a small head, once in few pieces and once restarted twenty times: what a process holds must not grow,
and the losses must be the same.

    python benchmarks/many_steps.py                    100,000 steps, twice; the report is in runs/many_steps
    python benchmarks/many_steps.py --steps 2000       the same at a fiftieth; also a slow test

Two ranks (gloo, one thread each): a backbone in DistributedDataParallel, a head that samples a tenth of its classes,
`RowOptimizer` whose skipped rows make their steps later, two micro-batches a step, clipping, a schedule. Every hundredth
of the run a `Checkpointer` saves (in every other start asynchronously); at each tenth the head gets more classes
(`expand`), and loses others (`remap`) half a tenth later.

    whole        from one end to the other, in parts of at most --part minutes
    restarted    the same, with new processes at each twentieth, which load the newest checkpoint

Between two checkpoints each rank notes its resident memory, open files, threads and child processes. A part that is
stopped, or a command that is killed, goes on from the newest checkpoint when the same command is given again.

Exit code 1, and FAIL in the table, if something grows, or if a loss of the last hundredth differs in a single bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from cases import status
from ranks import run_ranks
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    Checkpointer,
    PartialFC,
    Progress,
    RandomState,
    RowOptimizer,
    clip_grad_norm_,
)

RANKS, WIDTH, CLASSES, MORE, BATCH, MICRO = 2, 16, 1000, 24, 16, 2
MIB = 1 << 20
WARM_UP = 0.1  # of a process: memory that is allocated once
MEMORY_LIMIT = 4 * MIB  # 40 bytes a step, at 100,000 steps: less than any Python object
COLORS = ("#0072b2", "#d55e00")


@dataclass(frozen=True)
class Plan:
    """What happens when; all in steps. Intervals divide `steps`."""

    steps: int
    seed: int

    @property
    def save(self) -> int:
        return self.steps // 100

    @property
    def restart(self) -> int:
        return self.steps // 20

    @property
    def change(self) -> int:
        return self.steps // 10

    def classes_after(self, step: int) -> int:
        """Classes of the head when this many steps are done."""
        return CLASSES + (MORE if step >= self.change and step % self.change < self.change // 2 else 0)


# ---------------------------------------------------------------------------------------------------- a rank


class Run:
    """The objects of a run on this rank."""

    def __init__(self, plan: Plan, folder: Path, step: int, asynchronous: bool) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.folder = plan, folder
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.model = nn.parallel.DistributedDataParallel(self.backbone)
        self.head = PartialFC(
            WIDTH, plan.classes_after(step), ArcFace(scale=16.0, margin=0.2), sample_rate=0.1, seed=plan.seed
        )
        self.optimizer = torch.optim.SGD(self.backbone.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.head_optimizer = RowOptimizer(
            torch.optim.SGD, self.head, lr=0.05, momentum=0.9, weight_decay=5e-4, skipped_rows="dense"
        )
        both = (self.optimizer, self.head_optimizer)
        self.schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, plan.steps) for each in both]
        self.progress = Progress()
        self.checkpointer = Checkpointer(folder / "checkpoints", keep_last=2, asynchronous=asynchronous)

    def named(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone,
            "optimizer": self.optimizer,
            "head": self.head,
            "head_optimizer": self.head_optimizer,
            "schedule": self.schedules[0],
            "head_schedule": self.schedules[1],
            "progress": self.progress,
            "random": RandomState(),
        }

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """The images and labels of this rank: prototypes of their classes, with noise."""
        generator = torch.Generator().manual_seed(
            ((self.plan.seed * 1_000_003 + step) * MICRO + micro) * RANKS + dist.get_rank()
        )
        labels = torch.randint(0, self.head.num_classes, (BATCH,), generator=generator)
        places = torch.arange(WIDTH)
        images = torch.sin((labels[:, None] * 37 + places * 11).float()) + 0.3 * torch.randn(
            BATCH, WIDTH, generator=generator
        )
        return images, labels

    def step(self, step: int) -> float:
        """One step; the sum of its losses."""
        total = 0.0
        for micro in range(MICRO):
            images, labels = self.batch(step, micro)
            if micro < MICRO - 1:
                with self.model.no_sync():
                    loss = self.head(self.model(images), labels) / MICRO
                    loss.backward()
            else:
                loss = self.head(self.model(images), labels) / MICRO
                loss.backward()
            total += float(loss.detach())
        clip_grad_norm_(self.model.parameters(), self.head, max_norm=1.0)
        self.optimizer.step()
        self.head_optimizer.step()
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        return total

    def change_classes(self, done: int) -> None:
        """More classes, or fewer, if this many steps are done and that is due."""
        wanted = self.plan.classes_after(done)
        if wanted > self.head.num_classes:
            self.head.expand(wanted - self.head.num_classes)
        elif wanted < self.head.num_classes:
            dropped = set(
                range(0, self.head.num_classes, self.head.num_classes // MORE)[:MORE]
            )  # old ones and new ones
            kept = [c for c in range(self.head.num_classes) if c not in dropped]
            self.head.remap({**dict.fromkeys(dropped, -1), **{c: new for new, c in enumerate(kept)}})


def train(plan: Plan, folder: str, until: int, seconds: float, asynchronous: bool) -> int:
    """Go on to the step `until`, or until the time is up; return the steps that are saved."""
    began, rank, path = time.monotonic(), dist.get_rank(), Path(folder)
    saved = Checkpointer(path / "checkpoints").steps()
    start = [saved[-1] if saved else 0]
    dist.broadcast_object_list(start)
    run = Run(plan, path, start[0], asynchronous)
    if start[0]:
        run.checkpointer.load(step=start[0], **run.named())
    losses: list[str] = []
    notes: list[dict[str, int]] = []
    for step in range(start[0], until):
        losses.append(run.step(step).hex())
        done = step + 1
        run.change_classes(done)
        if done % plan.save == plan.save // 2:
            run.checkpointer.wait()
            notes.append(noted(done, start[0]))
        if done % plan.save == 0:
            run.progress.step = done
            run.checkpointer.save(done, **run.named())
            if rank == 0:
                append(path / "losses.jsonl", [[done - len(losses) + i, loss] for i, loss in enumerate(losses)])
            append(path / f"notes-{rank}.jsonl", notes)
            losses, notes = [], []
            stop = torch.tensor(time.monotonic() - began > seconds)
            dist.broadcast(stop, 0)
            if stop:
                break
    run.checkpointer.wait()
    return run.progress.step


def noted(done: int, start: int) -> dict[str, int]:
    """What this process holds."""
    process = psutil.Process()
    return {
        "step": done,
        "start": start,
        "memory": status("VmRSS"),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def append(path: Path, rows: list[Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------- the command


def go_on(plan: Plan, folder: Path, ends: list[int], part: float) -> None:
    """Train what is left of a run, with new processes at each of the steps `ends`."""
    folder.mkdir(parents=True, exist_ok=True)
    while (done := saved_step(folder)) < plan.steps:
        end = next(each for each in ends if each > done)
        asynchronous = len(list(folder.glob("start-*"))) % 2 == 0
        (folder / f"start-{time.time_ns()}").touch()
        run_ranks(RANKS, train, plan, str(folder), end, 60 * part, asynchronous, timeout=60 * part + 600)
        print(f"{folder.name}: {saved_step(folder):,} of {plan.steps:,} steps", file=sys.stderr, flush=True)


def saved_step(folder: Path) -> int:
    return next(reversed(Checkpointer(folder / "checkpoints").steps()), 0)


def losses_of(folder: Path) -> dict[int, str]:
    """The loss of each step; of those that were computed again, the last."""
    return dict(json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines())


def notes_of(folder: Path, rank: int) -> list[dict[str, int]]:
    by_step = {}
    for line in (folder / f"notes-{rank}.jsonl").read_text().splitlines():
        note = json.loads(line)
        by_step[note["step"]] = note
    return [by_step[step] for step in sorted(by_step)]


@dataclass
class Check:
    what: str
    found: str
    limit: str
    fine: bool


def checks(plan: Plan, out: Path) -> list[Check]:
    rows = []
    whole, restarted = (losses_of(out / name) for name in ("whole", "restarted"))
    last = range(plan.steps - plan.save, plan.steps)
    equal = sum(whole.get(step) is not None and whole.get(step) == restarted.get(step) for step in last)
    rows.append(
        Check(
            "losses of the last hundredth that are equal bit for bit",
            f"{equal:,} of {len(last):,}",
            "all",
            equal == len(last),
        )
    )
    all_equal = sum(
        whole.get(step) is not None and whole.get(step) == restarted.get(step) for step in range(plan.steps)
    )
    rows.append(
        Check("losses of all steps that are", f"{all_equal:,} of {plan.steps:,}", "all", all_equal == plan.steps)
    )
    starts = len(list((out / "restarted").glob("start-*")))
    rows.append(Check("starts of the restarted run", str(starts), "at least 20", starts >= 20))
    for rank in range(RANKS):
        notes = after_warm_up(notes_of(out / "whole", rank))
        early, late = thirds(notes, "memory")
        growth = late - early
        words = f"{growth / MIB:+.2f} MiB ({early / MIB:.1f} to {late / MIB:.1f})"
        rows.append(
            Check(
                f"rank {rank}: memory, last third against first",
                words,
                f"{MEMORY_LIMIT >> 20} MiB",
                growth <= MEMORY_LIMIT,
            )
        )
        for name in ("files", "threads", "children"):
            found = sorted({note[name] for note in notes})
            words = " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))
            first, last = thirds(notes, name)  # medians: a thread that was joined may be seen for a moment more
            rows.append(Check(f"rank {rank}: {name}", words, "as many at the end", last <= first))
    return rows


def after_warm_up(notes: list[dict[str, int]]) -> list[dict[str, int]]:
    """The notes of the longest piece of a run without its beginning."""
    starts = [note["start"] for note in notes]
    longest = max(sorted(set(starts)), key=starts.count)
    piece = [note for note in notes if note["start"] == longest]
    return piece[int(len(piece) * WARM_UP) :]


def thirds(notes: list[dict[str, int]], name: str) -> tuple[float, float]:
    third = max(1, len(notes) // 3)
    return statistics.median(n[name] for n in notes[:third]), statistics.median(n[name] for n in notes[-third:])


def draw(plan: Plan, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.4), sharex=True, layout="constrained")
    kinds = [
        ("memory", "resident memory, MiB", MIB),
        ("files", "open files", 1),
        ("threads", "threads", 1),
        ("children", "child processes", 1),
    ]
    for axis, (name, label, unit) in zip(axes.flat, kinds, strict=True):
        highest = 0.0
        for run, color in zip(("whole", "restarted"), COLORS, strict=True):
            for rank in range(RANKS):
                notes = notes_of(out / run, rank)
                values = [note[name] / unit for note in notes]
                highest = max(highest, *values)
                axis.plot(
                    [note["step"] for note in notes],
                    values,
                    color=color,
                    lw=1.2,
                    ls="-" if rank == 0 else ":",
                    label=f"{run}, rank {rank}",
                )
        axis.set_ylabel(label)
        axis.set_ylim(0, max(highest * 1.15, 1))
        axis.grid(color="#dddddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(5))
        axis.margins(x=0.02)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(out / "many_steps.png", dpi=110)


def report(plan: Plan, out: Path, found: list[Check]) -> str:
    lines = [f"| {plan.steps:,} steps, seed {plan.seed} | measured | limit | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.found} | {row.limit} | {'pass' if row.fine else '**FAIL**'} |" for row in found]
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="a multiple of 200 (100,000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, draws and batches")
    parser.add_argument(
        "--part", type=float, default=110, help="minutes after which a part ends at its next checkpoint (110)"
    )
    parser.add_argument(
        "--out", default="runs/many_steps", help="folder of both runs and the report; go on with what it holds"
    )
    asked = parser.parse_args()
    if asked.steps < 200 or asked.steps % 200:
        parser.error("--steps must be a multiple of 200")
    plan, out = Plan(asked.steps, asked.seed), Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    note = out / "plan.json"
    if note.exists() and json.loads(note.read_text()) != vars(plan):
        parser.error(f"{out} holds another run ({note.read_text().strip()}); give another --out")
    note.write_text(json.dumps(vars(plan)) + "\n")
    began = time.monotonic()
    go_on(plan, out / "whole", [plan.steps], asked.part)
    go_on(plan, out / "restarted", list(range(plan.restart, plan.steps + 1, plan.restart)), asked.part)
    found = checks(plan, out)
    draw(plan, out)
    print(report(plan, out, found), end="")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes on {os.cpu_count()} cores")
    return 0 if all(row.fine for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
