"""The sentence that the project stands on: the sharded head at any world size equals one dense float64 process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import local
from oracle import DenseAdamW, DenseSGD, Loss
from torch import Tensor

from partial_fc import ArcFace, CombinedMargin, CosFace, Margin, NormFace, PartialFC, RowOptimizer, Softmax, gather

TOLERANCE = 1e-9
D = 8

MARGINS: dict[str, tuple[type[Margin], dict[str, Any], Loss]] = {
    "arcface": (ArcFace, {}, Loss()),
    "arcface_wide": (ArcFace, {"scale": 16.0, "margin": 1.4}, Loss(scale=16.0, m2=1.4)),
    "cosface": (CosFace, {}, Loss(m2=0.0, m3=0.35)),
    "combined": (
        CombinedMargin,
        {"scale": 32.0, "m1": 1.3, "m2": 0.3, "m3": 0.2},
        Loss(scale=32.0, m1=1.3, m2=0.3, m3=0.2),
    ),
    "normface": (NormFace, {"scale": 20.0}, Loss(scale=20.0, m2=0.0)),
    "softmax": (Softmax, {}, Loss(name="linear")),
}


@dataclass
class Case:
    margin: str = "arcface"
    classes: int = 23
    counts: tuple[int, ...] = (5, 3, 0, 4)  # samples of each rank; a world takes the first ones
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    budget: int | None = None
    smoothing: float = 0.0
    reduction: str = "mean"
    ignored: int = 1
    joint: bool = False


def assert_near(what: str, mine: Tensor, expected: Tensor) -> None:
    assert mine.shape == expected.shape, f"{what}: {tuple(mine.shape)} is not {tuple(expected.shape)}"
    error = float((mine - expected).abs().max()) if mine.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: off by {error:.3e}"


def rows_of(full: Tensor, rank: int, world: int) -> slice:
    chunk = -(-len(full) // world)
    return slice(min(rank * chunk, len(full)), min((rank + 1) * chunk, len(full)))


def global_batch(case: Case, world: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    n = sum(case.counts[:world])
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, case.classes, (n,), generator=generator)
    labels[torch.randperm(n, generator=generator)[: case.ignored]] = -100
    return x, labels


def check_case(rank: int, world: int, case: Case) -> None:
    """Several optimizer steps of head and oracle side by side, compared at every step."""
    cls, arguments, loss_of = MARGINS[case.margin]
    loss_of = Loss(**{**loss_of.__dict__, "smoothing": case.smoothing, "reduction": case.reduction})
    head = PartialFC(
        D, case.classes, cls(**arguments), case.sample_rate, dtype=torch.float64,
        logits_budget=case.budget, label_smoothing=case.smoothing, reduction=case.reduction,  # type: ignore[arg-type]
    )  # fmt: skip
    w = torch.randn(case.classes, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    bias = torch.zeros(case.classes, dtype=torch.float64)
    mine = rows_of(w, rank, world)
    with torch.no_grad():
        local(head.weight).copy_(w[mine])
    if case.optimizer == "sgd":
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.05, momentum=0.9, weight_decay=5e-4)
        dense: list[Any] = [DenseSGD(0.05), DenseSGD(0.05)]
    else:
        optimizer = RowOptimizer(torch.optim.AdamW, head, lr=0.02)
        dense = [DenseAdamW(0.02), DenseAdamW(0.02)]
    start = sum(case.counts[:rank])
    for step in range(4):
        x_all, labels = global_batch(case, world, step)
        here = slice(start, start + case.counts[rank])
        x = x_all[here].clone().requires_grad_()
        kept = x.detach().clone(), labels[here].clone()
        batch = (gather(x, labels[here]),) if case.joint else (x, labels[here])
        loss = head(*batch)
        objective = loss.sum() * (rank + 1) if case.reduction == "none" else loss
        objective.backward()
        assert torch.equal(x, kept[0]) and torch.equal(labels[here], kept[1]), "a caller's tensor was modified"

        chosen = torch.arange(case.classes) if world == 1 and case.sample_rate == 1 else union(head.selected)
        x_all.requires_grad_()
        w_chosen, b_chosen = w[chosen].clone().requires_grad_(), bias[chosen].clone().requires_grad_()
        position = torch.full((case.classes,), -1).index_copy_(0, chosen, torch.arange(len(chosen)))
        labels_chosen = torch.where(labels < 0, labels, position[labels.clamp(min=0)])
        expected = loss_of(x_all, w_chosen, b_chosen if case.margin == "softmax" else None, labels_chosen)
        if case.reduction == "none":  # each rank's scalar counts as averaged over the ranks
            factor = torch.repeat_interleave(torch.arange(1, world + 1), torch.tensor(case.counts[:world]))
            (expected * factor).sum().div(world).backward()
            expected = expected[here]
        else:
            expected.backward()
        assert_near(f"loss of step {step}", loss.detach(), expected.detach())
        assert x_all.grad is not None and x.grad is not None
        assert_near("embedding gradient", x.grad, x_all.grad[here] * world)
        grads = [torch.zeros_like(w), torch.zeros_like(bias)]
        for grad, source in zip(grads, (w_chosen, b_chosen), strict=True):
            if source.grad is not None:
                grad[chosen] = source.grad
        check_class_gradients(head, case, grads, mine)
        before = local(head.weight).detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        dense[0].step(w, grads[0], chosen)
        dense[1].step(bias, grads[1], chosen)
        assert_near(f"weights after step {step}", local(head.weight).detach(), w[mine])
        if case.margin == "softmax":
            assert head.bias is not None
            assert_near(f"bias after step {step}", local(head.bias).detach(), bias[mine])
        untouched = [c for c in range(mine.start, mine.stop) if c not in set(chosen.tolist())]
        at = torch.tensor(untouched, dtype=torch.int64) - mine.start
        assert torch.equal(local(head.weight)[at], before[at]), "a row that was not drawn moved"


def check_class_gradients(head: PartialFC, case: Case, grads: list[Tensor], mine: slice) -> None:
    if case.sample_rate == 1:
        assert head.row_grad is None and head.weight.grad is not None
        assert_near("class gradient", local(head.weight.grad), grads[0][mine])
        if head.bias is not None:
            assert head.bias.grad is not None
            assert_near("bias gradient", local(head.bias.grad), grads[1][mine])
    else:
        assert head.row_grad is not None and head.weight.grad is None
        ids, values = head.row_grad
        assert torch.equal(ids, head.selected)
        assert_near("row gradient", values, grads[0][ids])


def union(ids: Tensor) -> Tensor:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ids)
    return torch.cat(everyone)


def check_cases(rank: int, world: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            check_case(rank, world, case)
        except Exception as error:
            raise AssertionError(f"{case} at world {world}: {error}") from error


FULL = [
    Case(margin, optimizer=optimizer, budget=budget)
    for margin, optimizer, budget in itertools.product(MARGINS, ("sgd", "adamw"), (0, None))
]
SAMPLED = [
    Case(margin, sample_rate=rate, optimizer=optimizer, budget=budget)
    for margin, rate, optimizer, budget in itertools.product(
        ("arcface", "softmax"), (0.1, 0.4), ("sgd", "adamw"), (0, None)
    )
]
SHAPES = [
    Case(classes=1),
    Case(classes=2, sample_rate=0.5),
    Case(classes=3, counts=(2, 3, 4, 1)),
    Case(classes=1024 + 37, counts=(1, 6, 2, 3), sample_rate=0.05),
    Case(counts=(0, 0, 0, 0), ignored=0),
    Case(counts=(3, 0, 0, 0), ignored=3),
    Case(counts=(1, 1, 1, 1), ignored=0),
    Case(counts=(4, 4, 4, 4), joint=True),
    Case(sample_rate=0.3, joint=True),
]
OPTIONS = [
    Case(margin, smoothing=smoothing, reduction=reduction, sample_rate=rate, budget=budget)
    for margin, smoothing, reduction, rate, budget in [
        ("arcface", 0.1, "mean", 1.0, None),
        ("arcface", 0.1, "mean", 0.4, 0),
        ("softmax", 0.2, "sum", 1.0, 0),
        ("softmax", 0.1, "mean", 0.4, None),
        ("cosface", 0.0, "sum", 0.4, None),
        ("arcface", 0.0, "none", 1.0, None),
        ("combined", 0.1, "none", 0.4, 0),
    ]
]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
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
        part = slice(rank * 12 // world, (rank + 1) * 12 // world)
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
