"""SphereFace2: binary decisions over sharded classes, and the one offset that all shards share and train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import local
from oracle import DenseAdamW, DenseSGD
from torch import Tensor

import partial_fc
from partial_fc import PartialFC, RowOptimizer, SphereFace2, clip_grad_norm_, load_checkpoint, save_checkpoint

D, C = 8, 23
COUNTS = (5, 3, 0, 4)
TOLERANCE = 1e-9
DENSE: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Any]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, lambda: DenseSGD(0.05)),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}, lambda: DenseAdamW(0.02)),
}


def dense_loss(x: Tensor, w: Tensor, offset: Tensor, labels: Tensor, margin: SphereFace2) -> Tensor:
    """Equations 5 to 8 of the paper, over the rows w; the mean over valid samples."""
    valid = labels >= 0
    x, labels = x[valid], labels[valid]
    cosine = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    g = 2 * ((cosine + 1) / 2) ** margin.t - 1
    r, balance = margin.scale, margin.balance
    own = torch.zeros_like(g, dtype=torch.bool)
    own[torch.arange(len(x)), labels] = True
    of_own = balance / r * torch.log1p(torch.exp(-(r * (g - margin.margin) + offset)))
    of_others = (1 - balance) / r * torch.log1p(torch.exp(r * (g + margin.margin) + offset))
    return torch.where(own, of_own, of_others).sum() / len(x)


def near(what: str, mine: Tensor, expected: Tensor) -> None:
    error = float((mine - expected).abs().max()) if mine.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: off by {error:.3e}"


def steps(rank: int, world: int, rate: float, budget: int | None, kind: str, early: bool = False) -> None:
    partial_fc.softmax.tiles.TILE_BYTES["cpu"] = 1
    margin = SphereFace2(scale=10.0)
    head = PartialFC(D, C, margin, rate, dtype=torch.float64, init_std=1.0, logits_budget=budget)
    cls, options, dense_class = DENSE[kind]
    optimizer = RowOptimizer(cls, head, update_in_backward=early, **options)
    dense, dense_offset = dense_class(), dense_class()
    w = partial_fc.sharded_module.initial_rows(0, C, (D,), std=1.0, seed=0).double()
    offset = torch.full((1,), local(margin.offset).item(), dtype=torch.float64)
    start = sum(COUNTS[:rank])
    here = slice(start, start + COUNTS[rank])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        n = sum(COUNTS[:world])
        x_all = torch.randn(n, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (n,), generator=generator)
        labels[0] = -100
        x = x_all[here].clone().requires_grad_()
        loss = head(x, labels[here])
        loss.backward()
        everyone: list[Tensor] = [torch.empty(0)] * world
        dist.all_gather_object(everyone, head.selected)
        chosen = torch.cat(everyone)
        position = torch.full((C,), -1).index_copy_(0, chosen, torch.arange(len(chosen)))
        x_all.requires_grad_()
        w_chosen, b = w[chosen].clone().requires_grad_(), offset.clone().requires_grad_()
        expected = dense_loss(
            x_all, w_chosen, b, torch.where(labels < 0, labels, position[labels.clamp(min=0)]), margin
        )
        expected.backward()
        near("loss", loss.detach(), expected.detach())
        near("embedding gradient", x.grad, x_all.grad[here] * world)  # type: ignore[arg-type, index]
        near("gradient of the offset", local(margin.offset.grad), b.grad)  # type: ignore[arg-type]
        grad = torch.zeros_like(w)
        grad[chosen] = w_chosen.grad  # type: ignore[assignment]
        if not early:
            own = head.row_grad[1] if head.row_grad is not None else local(head.weight.grad)  # type: ignore[arg-type]
            near("class gradient", own, grad[head.selected])
        optimizer.step()
        optimizer.zero_grad()
        assert margin.offset.grad is None
        dense.step(w, grad, chosen)
        dense_offset.step(offset, b.grad, torch.tensor([0]))
        near("weights", local(head.weight).detach(), w[head.shards.lo : head.shards.hi])
        near("offset", local(margin.offset).detach(), offset)


def all_steps(rank: int, world: int) -> None:
    for rate, budget, kind in ((1.0, None, "sgd"), (1.0, 0, "adamw"), (0.4, None, "adamw"), (0.4, 0, "sgd")):
        steps(rank, world, rate, budget, kind)
    steps(rank, world, 1.0, 0, "adamw", early=True)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_dense_float64_with_its_offset_trained(ranks, world):
    ranks(world).run(all_steps)


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
    part = slice(rank * 12 // world, (rank + 1) * 12 // world)
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
