"""How the time of a step grows: with the classes at one sample rate, with the samples, with the ranks.

All sizes of one sweep are timed in turn in the same processes. The slope of log(time) against log(size) is fitted over
the upper half of the sizes, because the lower ones are ruled by what every step costs whatever its size; 1 is linear
growth. Ranks share the processors that there are: with more ranks than processors a step cannot get quicker, so what is
shown against the ranks is time × processors in use, which stays level where being many costs nothing.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from cases import Work, ours
from ranks import Times, interleaved, over_ranks, run_ranks

CLASSES = (10_000, 40_000, 100_000, 400_000, 1_000_000, 4_000_000)
SAMPLES = (64, 128, 256, 512, 1024, 2048)
WORLDS = (1, 2, 4)
PER_CLASS = Work(512, CLASSES[-1], 128, 0.1, repetitions=7)
PER_SAMPLE = Work(SAMPLES[-1], 400_000, 128, 0.1, repetitions=9)
PER_RANK = Work(512, 400_000, 128, 0.1, repetitions=9)


def sweep(works: list[tuple[int, Work]]) -> dict[str, list[tuple[float, float]]]:
    """On a rank: the steps of all works, in turn."""
    return interleaved({str(size): ours(work)[0].step for size, work in works}, works[0][1].repetitions)


def sweep_worlds(work: Work, worlds: list[int]) -> dict[str, list[tuple[float, float]]]:
    """On a rank of the largest world: steps of the first 1, 2, ... ranks, while the others wait at a barrier."""
    things: dict[str, Callable[[], Any]] = {}
    for world in worlds:
        group = dist.new_group(list(range(world)))
        things[str(world)] = ours(work, group)[0].step if dist.get_rank() < world else _nothing
    return interleaved(things, work.repetitions)


def _nothing() -> None:
    pass


def measure(quick: bool) -> dict[str, dict[str, Any]]:
    """Sweep name -> what against, sizes, seconds a step, slopes, raw times."""
    share = 100 if quick else 1
    small = {"D": 32, "repetitions": 3} if quick else {}
    per_class, per_sample, per_rank = (
        replace(w, N=min(w.N, 64), **small) if quick else w for w in (PER_CLASS, PER_SAMPLE, PER_RANK)
    )
    classes = [c // share for c in CLASSES]
    samples = [n // 8 for n in SAMPLES] if quick else list(SAMPLES)
    by_class = over_ranks(run_ranks(2, sweep, [(c, replace(per_class, C=c)) for c in classes]))
    of_sample = replace(per_sample, C=per_sample.C // share)
    by_sample = over_ranks(run_ranks(2, sweep, [(n, replace(of_sample, N=n)) for n in samples]))
    per_rank = replace(per_rank, C=per_rank.C // share)
    by_rank = over_ranks(run_ranks(max(WORLDS), sweep_worlds, per_rank, list(WORLDS)))
    processors = len(os.sched_getaffinity(0))
    return {
        "classes": _fitted(f"classes (N={per_class.N}, D={per_class.D}, r={per_class.r})", by_class),
        "samples": _fitted(f"samples ({of_sample})", by_sample),
        "ranks": _fitted(f"ranks (N={per_rank.N}, {per_rank})", by_rank, lambda world: min(world, processors)),
    }


def _fitted(against: str, times: dict[str, Times], processors: Callable[[int], int] = lambda size: 1) -> dict[str, Any]:
    sizes = [int(size) for size in times]
    seconds = [t.seconds * processors(size) for size, t in zip(sizes, times.values(), strict=True)]
    xs, ys = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    steepest = max((y1 - y0) / (x1 - x0) for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False))
    return {
        "against": against,
        "sizes": sizes,
        "seconds": seconds,
        "slope": statistics.linear_regression(xs[half:], ys[half:]).slope,
        "slope_of_all": statistics.linear_regression(xs, ys).slope,
        "steepest": steepest,
        "wall": {size: t.wall for size, t in times.items()},
        "cpu": {size: t.cpu for size, t in times.items()},
    }
