"""What agreement costs: looking for bad inputs, judging losses and gradients, watching for ranks that diverge; as
shares of a step.

    python benchmarks/agreement.py [--worlds 1 2] [--num_classes 100000] [--repetitions 15] [--quick]

N = 512 samples, D = 512, float32, one thread a rank. A step is forward, backward, RowOptimizer(SGD, momentum 0.9),
zero_grad. In turn, in the same processes, for each line of the table; shares are medians of ratios of neighbours in
time:

    always / never          whole steps of validate="always" against "never", both without clipping: all that is looked
                            at
    the same, clipped       both with clip_grad_norm_, whose norm judges the step
    inspection              what the exchange of a step looks at on this rank, alone, over the step: 100 of them are
                            timed
    its collective          one all-reduce of two numbers and the wait for it: what a step without clipping says besides
    gradients               the pass over the gradients of a step without clipping, alone, over the step
    watch                   DivergenceWatch.step() of a backbone of --watched parameters (25 million: a ResNet-50) with
                            the head, every=100

The difference of two whole steps is less than what they vary by on most machines; the parts measured alone are the
surer figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from ranks import interleaved, over_ranks, ratio, run_ranks  # noqa: E402

from partial_fc import DivergenceWatch, PartialFC, RowOptimizer, clip_grad_norm_  # noqa: E402
from partial_fc.batch.status import LabelSet, inspect  # noqa: E402
from partial_fc.nonfinite.check_gradients import sum_of_flags  # noqa: E402
from partial_fc.nonfinite.describe import not_finite  # noqa: E402

INSPECTIONS = 100
MARK = 1.0  # per cent of a step, at most


def step_of(
    head: PartialFC, optimizer: RowOptimizer, validate: str, clipped: bool, x: Tensor, labels: Tensor
) -> Callable[[], None]:
    """A step of the head, which serves all of them in turn, so that memory is one head's."""

    def step() -> None:
        head.validate = validate  # type: ignore[assignment]
        head(x, labels).backward()
        if clipped:
            clip_grad_norm_([], head, max_norm=1e9)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def times(
    classes: int, width: int, samples: int, watched: int, repetitions: int
) -> dict[str, list[tuple[float, float]]]:
    """On one rank: seconds of every thing."""
    world, rank = dist.get_world_size(), dist.get_rank()
    head = PartialFC(width, classes)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(samples // world, width, generator=generator).requires_grad_()
    labels = torch.randint(classes, (samples // world,), generator=generator)
    sets, flags = [LabelSet(None, labels)], torch.zeros(3, dtype=torch.float64)
    gradient = torch.randn(head.shards.local, width)
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(max(1, watched // (width * (width + 1))))]
    watch = DivergenceWatch(nn.Sequential(*layers), head, every=100)

    def inspect_often() -> None:
        for _ in range(INSPECTIONS):
            inspect(x.detach(), sets, "", True, True)

    def collective() -> None:
        for _ in range(INSPECTIONS):
            sum_of_flags(flags, head.shards.ranks, "the agreement on a step").tolist()

    def watch_some() -> None:
        for _ in range(4):
            watch.step()

    things: dict[str, Callable[[], Any]] = {
        "never": step_of(head, optimizer, "never", False, x, labels),
        "always": step_of(head, optimizer, "always", False, x, labels),
        "inspection": inspect_often,
        "never, clipped": step_of(head, optimizer, "never", True, x, labels),
        "always, clipped": step_of(head, optimizer, "always", True, x, labels),
        "collective": collective,
        "gradients": lambda: not_finite(gradient),
        "watch": watch_some,
    }
    return interleaved(things, repetitions)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num_classes", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--samples", type=int, default=512, help="N, of all ranks")
    parser.add_argument("--watched", type=int, default=25_000_000, help="parameters of the backbone that is watched")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that it runs")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.num_classes, asked.width, asked.samples, asked.watched, asked.repetitions = 500, 16, 16, 2000, 2
    print("| per cent of a step | C | D | N | ranks | wall | processor time | a step, ms | wanted, at most |")
    print("|---" * 9 + "|")
    for world in asked.worlds:
        sizes = (asked.num_classes, asked.width, asked.samples, asked.watched)
        found = over_ranks(run_ranks(world, times, *sizes, asked.repetitions))
        lines = (
            ("validate always less never", "always", "never", 1, True, MARK),
            ("the same, clipped", "always, clipped", "never, clipped", 1, True, MARK),
            ("inspection alone", "inspection", "never", INSPECTIONS, False, MARK),
            ("collective and wait alone", "collective", "never", INSPECTIONS, False, None),
            ("pass over gradients alone", "gradients", "never", 1, False, None),
            ("watch", "watch", "never", 4, False, None),
        )
        for title, of, over, times_each, less, mark in lines:
            shares = [
                100 * (ratio(getattr(found[of], kind), getattr(found[over], kind)) / times_each - float(less))
                for kind in ("wall", "cpu")
            ]
            cells = [title, f"{asked.num_classes:,}", str(asked.width), str(asked.samples), str(world)]
            cells += [f"{share:.2f}" for share in shares] + [
                f"{1e3 * found[over].seconds:.1f}",
                "" if mark is None else str(mark),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
