"""A run of `sampling.py` on names of places: the training of examples/place_names.py with another share of the classes.

    names [n] -> hashes [n, 72] -> backbone, DDP -> head of 100,000 places, SGD at 2.0 with momentum 0.9

Verified on names of places that are not trained on, and by names of trained places that were left out: which of all
places is it?
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_
from partial_fc.training.evaluation import evaluate_embeddings

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, HELD, UNSEEN, COUNT_EVERY = 1024, 1000, 2000, 50
FARS = ("1e-3", "1e-4")


@dataclass
class Settings:
    """skipped_rows: None for what a RowOptimizer does by itself."""

    rate: float
    skipped_rows: str | None
    seed: int
    classes: int
    epochs: int


def run(settings: Settings, world: int) -> dict[str, Any]:
    """The figures of a run, in the form of `sampling_report`."""
    found = run_ranks(world, train, settings, timeout=6 * 3600.0)
    counts = [each for rank in found for each in rank["counts"]]
    rows = statistics.fmean(each["rows"] for each in counts)
    shares = [statistics.fmean(each[name] for each in counts) / rows for name in ("window", "batch", "hard")]
    return {**found[0]["figures"], "rows": rows, "shares": shares}


def train(settings: Settings) -> dict[str, Any]:
    """On a rank: train, and evaluate; the figures are those of all ranks."""
    sys.path.insert(0, str(EXAMPLES))
    from place_names import LEAST_NAMES, NameBackbone, hashes, read_places

    rank, world = dist.get_rank(), dist.get_world_size()
    places = read_places()
    held, places = places[:HELD], places[HELD:][: settings.classes]
    unseen = dict([(label, names[0]) for label, names in enumerate(places) if len(names) > LEAST_NAMES][:UNSEEN])
    samples = [(label, name) for label, names in enumerate(places) for name in names if unseen.get(label) != name]
    torch.manual_seed(settings.seed)
    backbone = NameBackbone()
    model = DistributedDataParallel(backbone)
    head = PartialFC(128, len(places), ArcFace(scale=24.0, margin=0.2), sample_rate=settings.rate, seed=settings.seed)
    skipped: dict[str, Any] = {} if settings.skipped_rows is None else {"skipped_rows": settings.skipped_rows}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(model.parameters(), lr=3e-3),
        RowOptimizer(torch.optim.SGD, head, lr=2.0, momentum=0.9, **skipped),
    ]
    steps = len(samples) // BATCH
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, settings.epochs * steps) for o in optimizers]
    counts, began = [], time.monotonic()
    for epoch in range(settings.epochs):
        order = np.random.default_rng([1, settings.seed, epoch]).permutation(len(samples))
        for step in range(steps):
            mine = order[step * BATCH : (step + 1) * BATCH][rank::world]
            labels, names = zip(*(samples[i] for i in mine), strict=True)
            loss = head(model(hashes(list(names))), torch.tensor(labels))
            loss.backward()
            clip_grad_norm_(model.parameters(), head, max_norm=5.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
            if step % COUNT_EVERY == 0:
                counts.append({name: int(value) for name, value in head.selected_counts.items()})
                if rank == 0:
                    print(f"  epoch {epoch + 1}, step {step + 1} of {steps}: loss {loss.item():.3f}", file=sys.stderr)
    seconds = time.monotonic() - began
    labels = torch.tensor([label for label, names in enumerate(held) for _ in names])
    with torch.no_grad():
        embeddings = backbone(hashes([name for names in held for name in names]))
        nearest = head.topk(backbone(hashes(list(unseen.values()))), k=1).ids[:, 0]
    verified = evaluate_embeddings(embeddings, labels, name="held")
    figures = {
        "identities": len(places),
        "samples": len(samples),
        "steps": settings.epochs * steps,
        "batch_size": BATCH,
        "seconds_per_step": seconds / (settings.epochs * steps),
        "sets": {
            "other places": {**{f"TAR @ FAR {far}": verified.tar[far] for far in FARS}, "rank-1": verified.rank1},
            "unseen names": {"rank-1": (nearest == torch.tensor(list(unseen))).double().mean().item()},
        },
    }
    return {"counts": counts, "figures": figures}
