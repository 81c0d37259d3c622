"""Part `two`: two ranks on one device, beside one dense float64 process (gpu_proof.py says what is compared).

NCCL refuses two ranks on one GPU, so they meet by gloo, which takes CUDA tensors through the host's memory: what is
shown is that the mathematics over ranks holds on the device, not how fast it is. Batches are uneven, and empty on a
rank.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_proof import Case, errors_of, judged, small
from gpu_run import FAIL, NO_TIME, Outcome, Run
from ranks import run_ranks
from shards import everyones

STARTED = 20.0  # seconds that two new processes may take until they compute


def cases(quick: bool) -> list[Case]:
    uneven, lopsided, empty = (28, 20), (5, 43), (0, 48)
    found = [Case(margin, counts=uneven) for margin in ("ArcFace", "Softmax", "CurricularFace", "SphereFace2")]
    found += [Case(counts=uneven, tiled=True, optimizer="adamw"), Case(counts=lopsided, classes=701)]
    found += [
        Case(rate=0.3, counts=counts, tiled=t) for counts, t in ((uneven, False), (lopsided, True), (empty, False))
    ]
    found += [Case(counts=empty), Case(counts=lopsided, smoothing=0.1, class_weights=True)]
    found += [Case(dtype="float32", counts=uneven), Case(dtype="float32", rate=0.3, counts=lopsided)]
    found += [Case(dtype="bf16", rate=0.3, counts=uneven)]
    found += [Case(center=update, counts=lopsided) for update in ("paper", "gradient")]
    return [replace(small(case), steps=1) for case in found] if quick else found


def two(run: Run) -> None:
    """A case that fails ends both ranks, because one may wait for the other; the rest runs on two new ones."""
    waiting = [case for case in cases(run.quick) if run.done(str(case)) is None]
    while waiting:
        if run.left() < STARTED:
            for case in waiting:
                run.note(str(case), Outcome(NO_TIME))
            return
        with tempfile.TemporaryDirectory() as folder:
            path, error = Path(folder) / "done", ""
            path.touch()
            try:
                run_ranks(2, on_a_rank, str(run.device), waiting, path, timeout=run.left(), start=run.start)
            except RuntimeError as problem:
                error = str(problem)
            done = [json.loads(line) for line in path.read_text().splitlines()]
        for case, errors in zip(waiting, done, strict=False):
            run.note(str(case), judged(case, errors))
        waiting = waiting[len(done) :]
        if waiting:
            words = (error.strip().splitlines() or ["the ranks ended"])[-1]
            run.note(str(waiting.pop(0)), Outcome(FAIL, words, {"traceback": error}))


def on_a_rank(device: str, waiting: Sequence[Case], path: Path) -> None:
    """Rank 0 writes a line for each case: the largest error of each kind on either rank."""
    where, rank = torch.device(device), dist.get_rank()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    for case in waiting:
        found: dict[str, float] = {}
        for errors in everyones(errors_of(case, where, rank, 2)):
            found = {kind: max(found.get(kind, 0.0), errors.get(kind, 0.0)) for kind in {**found, **errors}}
        if rank == 0:
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
