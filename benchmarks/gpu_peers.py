"""Part `peers`: the same work done by others on the device (peers.py says by whom), where their packages are installed.

They need a process group, as their users have one: a new process of one rank, NCCL on a GPU, runs all of them, this
head among them. Time of a step by events of the device; memory is the peak of torch's allocator in a step, less what
was allocated before a peer was built.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from typing import Any

import peers
import torch
from cases import Trained, Work
from gpu_run import ERROR, SKIPPED, Outcome, Run
from gpu_speed import allocated, peak_of, seconds_of, timed
from ranks import run_ranks

OURS = "partial_fc"
STARTED = 15.0  # seconds that a new process may take


def compare(run: Run) -> None:
    exact, sampled = Work(1024, 100_000, 512, 1.0), Work(1024, 1_000_000, 512, 0.1)
    if run.quick:
        exact, sampled = Work(32, 1000, 32, 1.0), Work(32, 1000, 32, 0.1)
    asked = [(exact, name) for name in peers.BUILDERS] + [(sampled, name) for name in peers.SAMPLING]
    there = [(work, name) for work, name in asked if not peers.missing(name)]
    for work, name in asked:
        if (work, name) not in there:
            run.note(f"{work}: {name}", Outcome(SKIPPED, "not installed"))
    found: list[dict[str, Any]] = []

    def measure() -> Outcome:
        backend = "nccl" if run.device.type == "cuda" else "gloo"
        arguments = (str(run.device), there, run.tf32, seconds_of(run.quick))
        (answer,) = run_ranks(1, on_a_rank, *arguments, timeout=run.left(), start=run.start, backend=backend)
        found.extend(answer)
        return Outcome("", f"{len(answer)} peers on one rank by {backend}")

    run.measure("the process of the peers", measure, STARTED, most=run.left() + STARTED)
    ours = {each["work"]: each["ms"] for each in found if each["peer"] == OURS and "ms" in each}
    for each in found:
        case = f"{each['work']}: {each['peer']}"
        if "traceback" in each:
            run.note(case, Outcome(ERROR, each["traceback"].strip().splitlines()[-1], each))
            continue
        each["ratio"] = each["ms"] / ours[each["work"]] if each["work"] in ours else None
        text = f"{each['ms']:.2f} ms" + (f", {each['ratio']:.2f} × ours" if each["ratio"] else "")
        run.note(case, Outcome("", text + (f", {each['peak'] / 2**30:.2f} GiB" if each["peak"] else ""), each))


def on_a_rank(device: str, asked: Sequence[tuple[Work, str]], tf32: bool, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds and bytes of each; a traceback where it failed."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.set_default_device(where)
    rows = []
    for work, name in asked:
        row: dict[str, Any] = {"work": str(work), "peer": name}
        made: Trained | None = None
        try:
            before = allocated(where)
            made = peers.BUILDERS[name](work)
            made.step()
            row["ms"] = timed(made.step, where, seconds)
            peak = peak_of(made.step, where)
            row["peak"] = None if peak is None else peak - before
        except Exception:
            row["traceback"] = traceback.format_exc()
        made = None
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    return rows
