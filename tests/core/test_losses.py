"""Every margin and every option of the loss at every world size against one dense float64 process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import local
from dense import Dense, turned
from torch import Tensor

import partial_fc
from partial_fc import Margin, PartialFC, RowOptimizer, margins

D, C = 8, 23
TOLERANCE = 1e-9
COUNTS = [1, 5, 900, 40, 3] + [7 * i for i in range(C - 5)]
MAGFACE = {"l_a": 1.5, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}

LOSSES: dict[str, tuple[type[Margin], dict[str, Any], str, dict[str, Any]]] = {
    "sphereface": (margins.SphereFace, {}, "sphereface", {"margin": 1.35}),
    "subcenter": (margins.SubCenterArcFace, {"scale": 16.0, "centers": 3}, "subcenter", {"margin": 0.5}),
    "curricular": (
        margins.CurricularFace,
        {"scale": 16.0, "momentum": 0.3},
        "curricular",
        {"margin": 0.5, "momentum": 0.3},
    ),
    "adaface": (
        margins.AdaFace,
        {"scale": 16.0, "momentum": 0.4},
        "adaface",
        {"margin": 0.4, "h": 0.333, "momentum": 0.4},
    ),
    "magface": (margins.MagFace, {"scale": 16.0, **MAGFACE}, "magface", MAGFACE),
    "elastic-arc": (margins.ElasticFace, {"scale": 16.0, "deviation": 0.2}, "elastic-arc", {}),
    "elastic-arc+": (margins.ElasticFace, {"scale": 16.0, "deviation": 0.2, "plus": True}, "elastic-arc", {}),
    "elastic-cos": (margins.ElasticFace, {"scale": 16.0, "kind": "cos"}, "elastic-cos", {}),
    "adaptive": (margins.AdaptiveMargin, {"class_counts": COUNTS, "scale": 16.0}, "adaptive", {"class_counts": COUNTS}),
    "arcface": (margins.ArcFace, {"scale": 16.0}, "arcface", {"margin": 0.5}),
}


@dataclass
class Case:
    loss: str
    sample_rate: float = 1.0
    budget: int | None = None
    smoothing: float = 0.0
    beyond: float | None = None
    class_weights: bool = False
    counts: tuple[int, ...] = (5, 3, 0, 4)
    options: dict[str, Any] = field(default_factory=dict)


def assert_near(what: str, mine: Tensor, expected: Tensor) -> None:
    error = float((mine - expected).abs().max()) if mine.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: off by {error:.3e}"


def union(ids: Tensor) -> Tensor:
    everyone: list[Any] = [None] * dist.get_world_size() if dist.is_initialized() else [ids]
    if dist.is_initialized():
        dist.all_gather_object(everyone, ids)
    return torch.cat(everyone)


def check_case(rank: int, world: int, case: Case) -> None:
    """Three steps of head and oracle side by side."""
    cls, arguments, name, formula = LOSSES[case.loss]
    margin = cls(**arguments)
    weights = (
        torch.rand(C, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
        if case.class_weights
        else None
    )
    head = PartialFC(
        D, C, margin, case.sample_rate, dtype=torch.float64, init_std=1.0, logits_budget=case.budget, label_smoothing=case.smoothing,
        interclass_filter=case.beyond, class_weights=weights,
    )  # fmt: skip
    dense = Dense(name, formula, margin.scale, case.smoothing, case.beyond, weights)
    shape = (C, D) if margin.centers == 1 else (C, margin.centers, D)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    chunk = -(-C // world)
    mine = slice(min(rank * chunk, C), min((rank + 1) * chunk, C))
    with torch.no_grad():
        local(head.weight).copy_(w[mine])
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.05)
    start = sum(case.counts[:rank])
    for step in range(3):
        generator = torch.Generator().manual_seed(50 + step)
        n = sum(case.counts[:world])
        x_all = torch.randn(n, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (n,), generator=generator)
        labels[torch.randperm(n, generator=generator)[:1]] = -100
        here = slice(start, start + case.counts[rank])
        x = x_all[here].clone().requires_grad_()
        drawn = random_margins(head, x_all, w, labels) if isinstance(margin, margins.ElasticFace) else None
        loss = head(x, labels[here])
        loss.backward()

        chosen = union(head.selected)
        x_all.requires_grad_()
        w_chosen = w[chosen].clone().requires_grad_()
        position = torch.full((C,), -1).index_copy_(0, chosen, torch.arange(len(chosen)))
        expected = dense(x_all, w_chosen, torch.where(labels < 0, labels, position[labels.clamp(min=0)]), chosen, drawn)
        expected.backward()
        assert_near(f"loss of step {step}", loss.detach(), expected.detach())
        assert x.grad is not None and x_all.grad is not None and w_chosen.grad is not None
        assert_near("embedding gradient", x.grad, x_all.grad[here] * world)
        grad = torch.zeros_like(w)
        grad[chosen] = w_chosen.grad
        own = head.row_grad[1] if head.row_grad is not None else local(head.weight.grad)  # type: ignore[arg-type]
        assert_near("class gradient", own, grad[head.selected])
        optimizer.step()
        optimizer.zero_grad()
        w -= 0.05 * grad
        assert_near("weights", local(head.weight).detach(), w[mine])
        for key in ("t", "mean", "std"):
            if hasattr(margin, key):
                assert abs(float(getattr(margin, key)) - dense.state[key]) <= TOLERANCE, key


def random_margins(head: PartialFC, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """What ElasticFace draws in the next forward: its draws are its own; what is made of them is compared."""
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    target = cosines.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    positives = margins.Positives(
        labels, torch.arange(len(x)), x.norm(dim=1), labels >= 0, partial_fc.sampling.mix(0, head.forward_count)
    )
    assert isinstance(head.margin, margins.ElasticFace)
    return head.margin._margins(target, positives)


def alone_with_the_target(rank: int, world: int) -> None:
    """Where no other class takes part, the loss is 0 and nothing has a gradient, however small the exponential of the target logit is."""
    for dtype, (classes, beyond), budget in itertools.product(
        (torch.float32, torch.float64), ((1, None), (5, -0.99999)), (None, 0)
    ):
        head = PartialFC(
            D,
            classes,
            margins.CosFace(scale=64.0, margin=1.0),
            dtype=dtype,
            interclass_filter=beyond,
            logits_budget=budget,
        )
        with torch.no_grad():
            local(head.weight).copy_(torch.eye(D)[0].expand(len(local(head.weight)), D))
        x = (
            (torch.eye(D)[1] - 4 * torch.eye(D)[0]).to(dtype).repeat(2, 1).requires_grad_()
        )  # at 166 degrees: logits of -126 and -62
        loss = head(x, torch.tensor([0, 0]))
        loss.backward()
        assert x.grad is not None and head.weight.grad is not None
        case = f"{dtype}, {classes} classes, budget {budget}"
        assert loss.item() == pytest.approx(0.0, abs=1e-4), case
        assert x.grad.abs().max() < 1e-4 and not (local(head.weight.grad).abs() > 1e-4).any(), case


@pytest.mark.parametrize("world", [1, 2])
def test_a_target_without_other_classes(ranks, world):
    ranks(world).run(alone_with_the_target)


def check_cases(rank: int, world: int, cases: list[Case]) -> None:
    partial_fc.softmax.tiles.TILE_BYTES["cpu"] = 1  # tiles of 64 rows
    for case in cases:
        try:
            check_case(rank, world, case)
        except Exception as error:
            raise AssertionError(f"{case} at world {world}: {type(error).__name__} {error}") from error


ALL = [Case(loss, rate, budget) for loss, rate, budget in itertools.product(LOSSES, (1.0, 0.4), (0, None))]
OPTIONS = [
    Case(loss, rate, budget, smoothing, beyond, weights)
    for loss, (rate, budget), (smoothing, beyond, weights) in itertools.product(
        ("arcface", "subcenter", "curricular", "magface"),
        ((1.0, None), (0.4, 0)),
        ((0.1, None, False), (0.0, 0.3, False), (0.2, 0.2, True), (0.0, None, True)),
    )
]
SHAPES = [
    Case(loss, rate, None, counts=counts)
    for loss, rate, counts in itertools.product(
        ("subcenter", "curricular", "adaface", "elastic-arc+"), (1.0, 0.3), ((1, 1, 1, 1), (3, 0, 0, 0), (0, 2, 9, 0))
    )
]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("cases", [ALL, OPTIONS, SHAPES], ids=["all", "options", "shapes"])
def test_equals_dense_float64(ranks, world, cases):
    ranks(world).run(check_cases, cases)


def soft_labels(rank: int, world: int) -> None:
    """Two labels a sample, some of them twice the same or ignored; rules compare with the mean of the targets, weighted as they are."""
    partial_fc.softmax.tiles.TILE_BYTES["cpu"] = 1
    for make, rate, budget in itertools.product(
        (margins.ArcFace, margins.SubCenterArcFace, margins.CurricularFace, margins.SphereFace2), (1.0, 0.4), (0, None)
    ):
        margin = make(scale=10.0)
        head = PartialFC(D, C, margin, rate, dtype=torch.float64, init_std=1.0, logits_budget=budget)
        if isinstance(margin, margins.CurricularFace):
            margin.t.fill_(0.3)
            margin.momentum = 0.0
        counts = (3, 2, 0, 4)[:world]
        n = sum(counts)
        generator = torch.Generator().manual_seed(1)
        x_all = torch.randn(n, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (n, 2), generator=generator)
        labels[0, 1] = labels[0, 0]
        labels[1, 1] = -100
        share = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        weights = torch.cat((share, 1 - share), 1)
        here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        x = x_all[here].clone().requires_grad_()
        loss = head(partial_fc.gather(x, labels[here], label_weights=weights[here]))
        loss.backward()

        chosen = union(head.selected)
        x_all.requires_grad_()
        w = (
            partial_fc.sharded_module.initial_rows(0, C, tuple(head.weight.shape[1:]), std=1.0, seed=0)
            .double()
            .requires_grad_()
        )
        unit_w = (w / w.norm(dim=-1, keepdim=True)).view(C, -1, D)
        cosines = torch.einsum("nd,ckd->nck", x_all / x_all.norm(dim=1, keepdim=True), unit_w).amax(2)
        losses = []
        for i in range(n):
            share_of: dict[int, float] = {}
            for label, weight in zip(labels[i].tolist(), weights[i].tolist(), strict=True):
                if label >= 0:
                    share_of[label] = share_of.get(label, 0.0) + weight
            others = [c for c in chosen.tolist() if c not in share_of]
            losses.append(one_soft_loss(margin, cosines[i], share_of, others))
        expected = torch.stack(losses).mean()
        expected.backward()
        name = f"{make.__name__}, r={rate}, budget {budget}, world {world}"
        assert_near(f"{name}: loss", loss.detach(), expected.detach())
        assert x.grad is not None and x_all.grad is not None and w.grad is not None
        assert_near(f"{name}: embedding gradient", x.grad, x_all.grad[here] * world)
        own = head.row_grad[1] if head.row_grad is not None else local(head.weight.grad)  # type: ignore[arg-type]
        assert_near(f"{name}: class gradient", own, w.grad[head.selected])


def one_soft_loss(margin: Margin, cosine: Tensor, share_of: dict[int, float], others: list[int]) -> Tensor:
    """Of one sample with a cosine to every class."""
    own, shares = cosine[list(share_of)], torch.tensor(list(share_of.values()), dtype=torch.float64)
    rest = cosine[others]
    if isinstance(margin, margins.SphereFace2):
        b, r = local(margin.offset).detach(), margin.scale
        g_own, g_rest = (2 * ((c + 1) / 2) ** 3 - 1 for c in (own, rest))
        of_own = 0.7 / r * torch.log1p(torch.exp(-(r * (g_own - 0.4) + b)))
        return (shares * of_own).sum() + (0.3 / r * torch.log1p(torch.exp(r * (g_rest + 0.4) + b))).sum()
    z = turned(own, torch.tensor(0.5, dtype=torch.float64))
    if isinstance(margin, margins.CurricularFace):
        rest = torch.where(rest > (z * shares).sum().detach() / shares.sum(), rest * (0.3 + rest), rest)
    logits = 10.0 * torch.cat((z, rest))
    return (shares * (logits.logsumexp(0) - 10.0 * z)).sum()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_soft_labels_with_rules_and_centers(ranks, world):
    ranks(world).run(soft_labels)


def on_mesh(rank: int, world: int, shape: tuple[int, int] | None) -> dict[str, list[float]]:
    """Losses, state and a class row of three steps of 8 samples, with shards over 4 ranks or 2 replicas of 2 shards."""
    mesh = (
        None
        if shape is None
        else torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    )
    found = {}
    for name, (cls, arguments, _, _) in {
        **LOSSES,
        "sphereface2": (margins.SphereFace2, {"scale": 10.0}, "", {}),
    }.items():
        margin = cls(**arguments)
        weights = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
        head = PartialFC(D, C, margin, 0.5, group=mesh, dtype=torch.float64, init_std=1.0, class_weights=weights)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.05, momentum=0.9)
        numbers: list[float] = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, D, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, C, (8,), generator=generator)
            labels[3] = -100
            own = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
            loss = head(own, labels[2 * rank : 2 * rank + 2])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            numbers += [
                loss.item(),
                *(float(b) for b in margin.buffers() if b.ndim == 0),
                *(local(p).item() for p in margin.parameters()),
            ]
            assert own.grad is not None
            norms: list[Any] = [None] * world
            dist.all_gather_object(norms, own.grad.norm().item())
            numbers += norms
        full = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
        found[name] = [*numbers, float(full.norm()), float(full.flatten()[7])]
    return found


def test_every_loss_is_the_same_on_replicas_of_shards(ranks):
    plain = ranks(4).run(on_mesh, None)
    replicated = ranks(4).run(on_mesh, (2, 2))
    for results in (plain, replicated):
        for found in results:
            for name, numbers in found.items():
                assert numbers == pytest.approx(plain[0][name], rel=1e-9, abs=1e-12), name
