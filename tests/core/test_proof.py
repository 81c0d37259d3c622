"""The claim of this project: at any world size the sharded head equals one dense float64 process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from shards import part_of
from side_by_side import Case, D, check_cases

from partial_fc import ArcFace, PartialFC, RowOptimizer

WIDE = {"scale": 16.0, "margin": 1.4}
COMBINED = {"scale": 32.0, "m1": 1.3, "m2": 0.3, "m3": 0.2}
MARGINS = [
    ("ArcFace", {}),
    ("ArcFace", WIDE),
    ("CosFace", {}),
    ("CombinedMargin", COMBINED),
    ("NormFace", {"scale": 20.0}),
    ("Softmax", {}),
]
FULL = [
    Case(margin, settings, optimizer=optimizer, budget=budget)
    for (margin, settings), optimizer, budget in itertools.product(MARGINS, ("sgd", "adamw"), (0, None))
]
SAMPLED = [
    Case(margin, sample_rate=rate, optimizer=optimizer, budget=budget)
    for margin, rate, optimizer, budget in itertools.product(
        ("ArcFace", "Softmax"), (0.1, 0.4), ("sgd", "adamw"), (0, None)
    )
]
SHAPES = [
    Case(classes=1),
    Case(classes=2),
    Case(classes=2, sample_rate=0.5),
    Case(classes=3, counts=(2, 3, 4, 1)),
    Case(classes=1024 + 37, counts=(1, 6, 2, 3), sample_rate=0.05),
    Case(counts=(0, 0, 0, 0), ignored=0),
    Case(counts=(0, 4, 1, 0)),
    Case(counts=(7, 7, 2, 1)),
    Case(counts=(3, 0, 0, 0), ignored=3),
    Case(counts=(2, 1, 1, 0), ignored=4, sample_rate=0.5),
    Case(counts=(1, 1, 1, 1), ignored=0),
    Case(counts=(1, 1, 1, 1), ignored=1),
    Case(classes=300, budget=0),
    Case(counts=(4, 4, 4, 4), joint=True),
    Case(sample_rate=0.3, joint=True),
]
OPTIONS = [
    Case("ArcFace", smoothing=0.1),
    Case("ArcFace", smoothing=0.1, sample_rate=0.4, budget=0),
    Case("Softmax", smoothing=0.2, reduction="sum", budget=0),
    Case("Softmax", smoothing=0.1, sample_rate=0.4),
    Case("CosFace", reduction="sum", sample_rate=0.4),
    Case("ArcFace", reduction="none"),
    Case("CombinedMargin", COMBINED, smoothing=0.1, reduction="none", sample_rate=0.4, budget=0),
]


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
@pytest.mark.parametrize("cases", [FULL, SAMPLED, SHAPES, OPTIONS], ids=["full", "sampled", "shapes", "options"])
def test_equals_dense_float64(ranks, world, cases):
    ranks(world).run(check_cases, cases)


def sampled_run(rank: int, world: int, rate: float, steps: int) -> list[float]:
    """Losses of one global run of 12 samples a step, whatever the world size."""
    torch.manual_seed(rank * 77 + world)
    head = PartialFC(D, 101, ArcFace(scale=16.0), rate, seed=5, dtype=torch.float64, init_std=1.0)
    backbone = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.5, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 101, (12,), generator=generator)
        part = part_of(12, rank, world)
        loss = head(x[part] @ backbone, labels[part])
        loss.backward()
        assert backbone.grad is not None
        grad = backbone.grad / world  # as DDP does
        dist.all_reduce(grad)
        with torch.no_grad():
            backbone -= 0.05 * grad
        backbone.grad = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rate", [0.1, 0.37, 1.0])
def test_a_run_has_the_same_losses_at_every_world_size(ranks, rate):
    runs = {world: ranks(world).run(sampled_run, rate, 8) for world in (1, 2, 3)}
    expected = runs[1][0]
    assert len(set(expected)) == len(expected)
    for results in runs.values():
        for losses in results:
            assert losses == pytest.approx(expected, rel=1e-12)
