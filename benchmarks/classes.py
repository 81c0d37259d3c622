"""What the rows of new classes should start from: the first steps of training after `PartialFC.expand`, on the embedded
characters.

    python benchmarks/classes.py [--seeds 0 1 2] [--out runs/classes]

One process trains the quick start's backbone and head (ArcFace, scale 32, SGD with momentum and lr 0.1) on 800
characters, then adds 200 and trains on all 1,000; only what the 200 rows start from differs:

    fresh         drawn, as at the beginning
    directions    expand(init=batches): class means, as long as the rows that are there are on average
    raw means     expand(init=means): the same means at their own length

By the number of steps since: the mean training loss of these steps, and the share of the new characters' images (all
ten typefaces, without the margin) that are nearest to their own row of 1,000. Writes table.md and results.json to OUT;
little more than a minute a seed on one free core.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from partial_fc import ArcFace, PartialFC, RowOptimizer  # noqa: E402
from partial_fc.training.backbones import build_backbone  # noqa: E402
from partial_fc.training.data import GlyphIdentities  # noqa: E402
from partial_fc.training.data.augment import AugmentConfig  # noqa: E402
from partial_fc.training.data.loader import BatchLoader  # noqa: E402

D = 128
STARTS = ("fresh", "directions", "raw means")
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Work:
    """How much: classes before and after, batch, steps before, and the numbers of steps after which to look."""

    before: int = 800
    after: int = 1000
    batch: int = 256
    steps: int = 200
    looks: tuple[int, ...] = (0, 10, 30, 100)


QUICK = Work(before=30, after=40, batch=64, steps=3, looks=(0, 2))


class Model:
    """A backbone and a head with their optimizers."""

    def __init__(self, classes: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.backbone: nn.Module = build_backbone("small", image_shape=(1, 32, 32), embedding_size=D)
        self.optimizer = torch.optim.SGD(self.backbone.parameters(), **SGD)
        self.head = PartialFC(D, classes, ArcFace(scale=32.0), seed=seed, metrics=True)
        self.head_optimizer = RowOptimizer(torch.optim.SGD, self.head, **SGD)

    def parts(self) -> list[Any]:
        return [self.backbone, self.optimizer, self.head, self.head_optimizer]

    def like(self, other: Model) -> Model:
        for mine, its in zip(self.parts(), other.parts(), strict=True):
            mine.load_state_dict(copy.deepcopy(its.state_dict()))
        return self

    def train(self, data: GlyphIdentities, work: Work, seed: int, steps: int, skip: int = 0) -> Iterator[float]:
        """The loss of every step."""
        loader = BatchLoader(data, batch_size=work.batch, seed=seed, augment=AugmentConfig())
        for step in range(skip, skip + steps):
            loader.set_epoch(step // len(loader))
            batch = next(loader.iterate(step % len(loader)))
            loss = self.head(self.backbone(batch.images), batch.labels)
            loss.backward()
            self.optimizer.step()
            self.head_optimizer.step()
            self.optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            yield loss.item()

    @torch.no_grad()
    def embedded(self, data: GlyphIdentities, first: int) -> tuple[Tensor, Tensor]:
        """(embeddings, labels) of all images of the classes from `first` on."""
        self.backbone.eval()
        batches = list(BatchLoader(data, batch_size=500, shuffle=False, drop_last=False))
        wanted = [(batch.images[new], batch.labels[new]) for batch in batches if (new := batch.labels >= first).any()]
        found = [(self.backbone(images), labels) for images, labels in wanted]
        self.backbone.train()
        return torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])

    @torch.no_grad()
    def accuracy(self, data: GlyphIdentities, first: int) -> float:
        self.head.eval()
        self.head(*self.embedded(data, first))
        self.head.train()
        return self.head.metrics["accuracy"].item()


def measure(work: Work, seed: int) -> dict[str, Any]:
    """Start -> losses of all steps, accuracies at the looks, lengths."""
    base = Model(work.before, seed)
    for step, loss in enumerate(base.train(GlyphIdentities("train", work.before), work, seed, work.steps)):
        if step % 50 == 0:
            print(f"  seed {seed}, step {step}: {loss:.2f}", file=sys.stderr)
    data = GlyphIdentities("train", work.after)
    found: dict[str, Any] = {}
    for start in STARTS:
        model = Model(work.before, seed).like(base)
        x, labels = model.embedded(data, work.before)
        new = work.after - work.before
        sums = torch.zeros(new, D).index_add_(0, labels - work.before, x)
        means = sums / torch.bincount(labels - work.before, minlength=new)[:, None]
        model.head.expand(new, {"fresh": "fresh", "directions": [(x, labels)], "raw means": means}[start])
        lengths = [rows.norm(dim=1).mean().item() for rows in model.head.weight.detach().split([work.before, new])]
        losses: list[float] = []
        accuracies = []
        for look in work.looks:
            losses += model.train(data, work, seed + 100, look - len(losses), skip=len(losses))
            accuracies.append(model.accuracy(data, work.before))
        found[start] = {
            "losses": losses,
            "accuracies": accuracies,
            "length_before": lengths[0],
            "length_new": lengths[1],
        }
    return found


def table(results: dict[str, Any], work: Work) -> str:
    """Mean and range over the seeds."""

    def cell(values: list[float], digits: int) -> str:
        spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    looks = [look for look in work.looks if look]
    heads = [f"loss, first {look} steps" for look in looks] + [f"accuracy after {look}" for look in work.looks]
    lines = [f"| new rows | length | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for start in STARTS:
        runs = [seed[start] for seed in results.values()]
        cells = [cell([run["length_new"] for run in runs], 2)]
        cells += [cell([statistics.mean(run["losses"][:look]) for run in runs], 2) for look in looks]
        cells += [cell([run["accuracies"][k] for run in runs], 3) for k in range(len(work.looks))]
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of a few characters, which say nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/classes"))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work = QUICK if asked.quick else Work()
    results = {str(seed): measure(work, seed) for seed in asked.seeds}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (asked.out / "table.md").write_text(table(results, work))
    print(table(results, work), end="")


if __name__ == "__main__":
    main()
