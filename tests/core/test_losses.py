"""Every margin and every option of the loss at every world size against one dense float64 process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from dense_losses import Loss
from shards import everyones, local, samples_of, two_by_two, whole
from side_by_side import Case, D, check_cases, check_soft_labels

from partial_fc import PartialFC, RowOptimizer, margins

C = 23
COUNTS = [1, 5, 900, 40, 3] + [7 * i for i in range(C - 5)]
MAGFACE = {"l_a": 1.5, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sphereface": ("SphereFace", {}),
    "subcenter": ("SubCenterArcFace", {"scale": 16.0, "centers": 3}),
    "curricular": ("CurricularFace", {"scale": 16.0, "momentum": 0.3}),
    "adaface": ("AdaFace", {"scale": 16.0, "momentum": 0.4}),
    "magface": ("MagFace", {"scale": 16.0, **MAGFACE}),
    "elastic-arc": ("ElasticFace", {"scale": 16.0, "deviation": 0.2}),
    "elastic-arc+": ("ElasticFace", {"scale": 16.0, "deviation": 0.2, "plus": True}),
    "elastic-cos": ("ElasticFace", {"scale": 16.0, "kind": "cos"}),
    "adaptive": ("AdaptiveMargin", {"class_counts": COUNTS, "scale": 16.0}),
    "arcface": ("ArcFace", {"scale": 16.0}),
}


def alone_with_the_target(rank: int, world: int) -> None:
    """Where no other class takes part, the loss is 0 and nothing has a gradient, however small the exponential of the
    target logit is."""
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


ALL = [
    Case(*LOSSES[loss], sample_rate=rate, budget=budget)
    for loss, rate, budget in itertools.product(LOSSES, (1.0, 0.4), (0, None))
]
OPTIONS = [
    Case(*LOSSES[loss], sample_rate=rate, budget=budget, smoothing=smoothing, beyond=beyond, class_weights=weights)
    for loss, (rate, budget), (smoothing, beyond, weights) in itertools.product(
        ("arcface", "subcenter", "curricular", "magface"),
        ((1.0, None), (0.4, 0)),
        ((0.1, None, False), (0.0, 0.3, False), (0.2, 0.2, True), (0.0, None, True), (0.2, None, True)),
    )
]
SHAPES = [
    Case(*LOSSES[loss], sample_rate=rate, counts=counts)
    for loss, rate, counts in itertools.product(
        ("subcenter", "curricular", "adaface", "elastic-arc+"), (1.0, 0.3), ((1, 1, 1, 1), (3, 0, 0, 0), (0, 2, 9, 0))
    )
]
GROUPS = {"all": ALL, "options": OPTIONS, "shapes": SHAPES}


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3, 4))])
@pytest.mark.parametrize("name", GROUPS)
def test_equals_dense_float64(ranks, world, name):
    ranks(world).run(check_cases, GROUPS[name])


def soft_labels(rank: int, world: int) -> None:
    """Two labels a sample, some of them twice the same or ignored; rules compare with the mean of the targets, weighted
    as they are."""
    for name, rate, budget in itertools.product(
        ("ArcFace", "SubCenterArcFace", "CurricularFace", "SphereFace2"), (1.0, 0.4), (0, None)
    ):
        margin = getattr(margins, name)(scale=10.0)
        head = PartialFC(D, C, margin, rate, dtype=torch.float64, init_std=1.0, logits_budget=budget)
        reference = Loss(name, {"scale": 10.0, "momentum": 0.0})
        if isinstance(margin, margins.CurricularFace):
            margin.t.fill_(0.3)
            reference.state["t"] = 0.3
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
        here = samples_of(counts, rank)
        case = f"{name}, r={rate}, budget {budget}, world {world}"
        check_soft_labels(case, head, reference, x_all, labels, weights, here)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_soft_labels_with_rules_and_centers(ranks, world):
    ranks(world).run(soft_labels)


def on_mesh(rank: int, world: int, mesh: bool) -> dict[str, list[float]]:
    """Losses, state and a class row of three steps of 8 samples, with shards over 4 ranks or 2 replicas of 2 shards."""
    group = two_by_two() if mesh else None
    found = {}
    kept = {"scale": 1.0, "margin": 4.0, "normalize_embeddings": False, "annealing": 5.0}
    more = {"sphereface2": ("SphereFace2", {"scale": 10.0}), "a-softmax": ("SphereFace", kept)}
    for name, (cls, arguments) in {**LOSSES, **more}.items():
        margin = getattr(margins, cls)(**arguments)
        weights = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
        head = PartialFC(
            D, C, margin, 0.5, group=group, dtype=torch.float64, init_std=1.0, class_weights=weights,
            inter_topk=3 if name == "arcface" else 0,
        )  # fmt: skip
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
            numbers += everyones(own.grad.norm().item())
        full = whole(head.weight)
        found[name] = [*numbers, float(full.norm()), float(full.flatten()[7])]
    return found


def test_every_loss_is_the_same_on_replicas_of_shards(ranks):
    plain = ranks(4).run(on_mesh, False)
    replicated = ranks(4).run(on_mesh, True)
    for results in (plain, replicated):
        for found in results:
            for name, numbers in found.items():
                assert numbers == pytest.approx(plain[0][name], rel=1e-9, abs=1e-12), name
