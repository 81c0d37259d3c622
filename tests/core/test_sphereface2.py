"""SphereFace2: binary decisions over sharded classes, and one trained offset that all ranks share."""

from __future__ import annotations

import math

import pytest
import torch
from shards import local, part_of
from side_by_side import Case, D, check_cases

from partial_fc import PartialFC, RowOptimizer, SphereFace2, clip_grad_norm_, load_checkpoint, save_checkpoint

C = 23
SCALE = {"scale": 10.0}
CASES = [
    Case("SphereFace2", SCALE),
    Case("SphereFace2", SCALE, optimizer="adamw", budget=0),
    Case("SphereFace2", SCALE, optimizer="adamw", sample_rate=0.4),
    Case("SphereFace2", SCALE, sample_rate=0.4, budget=0),
    Case("SphereFace2", SCALE, optimizer="adamw", budget=0, early=True),
]


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3, 4))])
def test_equals_dense_float64_with_its_offset_trained(ranks, world):
    ranks(world).run(check_cases, CASES)


def trained(head: PartialFC, optimizer: RowOptimizer, rank: int, step: int) -> float:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(3, D, generator=generator, dtype=torch.float64)
    loss = head(x, torch.randint(0, C, (3,), generator=generator))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def saved(rank: int, world: int, path: str) -> float:
    head = PartialFC(D, C, SphereFace2(10.0), 0.5, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.Adam, head, lr=0.1)
    for step in range(3):
        trained(head, optimizer, rank, step)
    save_checkpoint(path, head=head, optimizer=optimizer)
    return local(head.margin.offset).item()


def loaded(rank: int, world: int, path: str) -> tuple[float, float, float]:
    head = PartialFC(D, C, SphereFace2(10.0), 0.5, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.Adam, head, lr=0.1)
    load_checkpoint(path, head=head, optimizer=optimizer)
    at_once = local(head.margin.offset).item()
    moment = local(optimizer.state[head.margin.offset]["exp_avg"]).item()  # type: ignore[index]
    trained(head, optimizer, 0, 9)
    return at_once, moment, local(head.margin.offset).item()


def test_the_offset_is_checkpointed_at_any_world_size(ranks, tmp_path):
    path = str(tmp_path / "checkpoint")
    expected = ranks(2).run(saved, path)
    assert expected[0] == expected[1]
    found = {world: ranks(world).run(loaded, path) for world in (1, 2, 3)}
    for results in found.values():
        assert {at_once for at_once, _, _ in results} == {expected[0]}
        assert len({moment for _, moment, _ in results}) == 1
        assert results[0][1] != 0


def clipped(rank: int, world: int) -> list[float]:
    head = PartialFC(D, C, SphereFace2(10.0), dtype=torch.float64, init_std=1.0)
    x = torch.randn(12, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12)
    part = part_of(12, rank, world)
    head(x[part], labels[part]).backward()
    norm = clip_grad_norm_([], head, max_norm=0.01)
    return [norm.item(), local(head.margin.offset.grad).item()]  # type: ignore[union-attr, arg-type]


def test_clipping_counts_the_offset_once(ranks):
    runs = [result for world in (1, 2, 3) for result in ranks(world).run(clipped)]
    assert all(run == pytest.approx(runs[0], rel=1e-9) for run in runs)
    assert abs(runs[0][1]) > 1e-6


def scaled(rank: int, world: int) -> list[float]:
    head = PartialFC(D, C, SphereFace2(10.0), 0.5, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    values = []
    for step in range(2):
        x = torch.randn(4, D, generator=torch.Generator().manual_seed(step)).requires_grad_()
        scaler.scale(head(x, torch.arange(4))).backward()
        if step and rank == 0:
            head.margin.offset.grad.mul_(torch.inf)  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        values.append(local(head.margin.offset.grad).item())  # type: ignore[union-attr, arg-type]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values.append(local(head.margin.offset).item())
    return values


def test_a_scaler_unscales_the_offset_and_skips_on_all_ranks(ranks):
    first, second = ranks(2).run(scaled)
    assert first[:2] == pytest.approx(second[:2])
    assert first[1] == first[3] == second[3]  # the second step was skipped on both
    alone = PartialFC(D, C, SphereFace2(10.0), 0.5, init_std=1.0)
    assert first[1] == pytest.approx(alone.margin.offset.item() - 0.1 * first[0], rel=1e-5)  # type: ignore[union-attr, operator]


def test_the_offset_balances_own_and_others_at_right_angles():
    for classes, rate in ((2, 1.0), (1000, 1.0), (100_000, 0.1)):
        margin = SphereFace2()
        PartialFC(4, classes, margin, rate)
        b = margin.offset.item()
        g = 2 * 0.5**3 - 1
        own, other = 40 * (g - 0.4) + b, 40 * (g + 0.4) + b
        pulls = 0.7 / (1 + math.exp(own)), 0.3 * (classes * rate - 1) / (1 + math.exp(-other))
        assert pulls[0] == pytest.approx(pulls[1], rel=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SphereFace2(balance=1.0), "balance.*not 1.0"),
        (lambda: SphereFace2(t=0.5), "t, the exponent.*not 0.5"),
        (lambda: SphereFace2(margin=-0.1), "margin.*not -0.1"),
        (lambda: PartialFC(4, 3, SphereFace2(), label_smoothing=0.1), "label_smoothing must be 0 with SphereFace2"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
