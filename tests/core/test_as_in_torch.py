"""What is said to be as in torch, beside torch itself: `F.cross_entropy`, `clip_grad_norm_`; and where it is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import message_of
from dense_losses import Loss, share_of
from near import assert_near
from shards import classes_of, local, samples_of, selected_by_all, whole
from side_by_side import small_tiles
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    CenterLoss,
    CurricularFace,
    MagFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SubCenterArcFace,
    clip_grad_norm_,
    gather,
)

D, C = 6, 71  # more than a tile of 64 rows
MAGFACE = {"l_a": 1.5, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}


def class_weights() -> Tensor:
    """Some of them 0."""
    weights = torch.rand(C, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    weights[::5] = 0.0
    return weights


def samples(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Embeddings and labels, some ignored, some of a class of weight 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (sum(counts),), generator=generator)
    labels[0], labels[1], labels[2] = 5, -100, 7
    return x, labels


# ---------------------------------------------------------------------------------------------------- F.cross_entropy


def cross_entropy(rank: int, world: int) -> None:
    """Loss and all gradients of a softmax head; the objective of "none" is the mean over ranks of each rank's sum."""
    counts = (5, 3, 0, 4)[:world]
    x_all, labels = samples(counts)
    here, mine = samples_of(counts, rank), classes_of(C, rank, world)
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    b = torch.randn(C, generator=generator, dtype=torch.float64)
    for reduction, smoothing, weighted, budget in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.3), (False, True), (0, None)
    ):
        weights = class_weights() if weighted else None
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        head = PartialFC(D, C, Softmax(), dtype=torch.float64, class_weights=weights, logits_budget=budget, **options)
        with torch.no_grad():
            local(head.weight).copy_(w[mine])
            local(head.bias).copy_(b[mine])
        x = x_all[here].clone().requires_grad_()
        with small_tiles():
            loss = head(x, labels[here])
            (loss.sum() if reduction == "none" else loss).backward()
        leaves = [t.clone().requires_grad_() for t in (x_all, w, b)]
        expected = F.cross_entropy(F.linear(*leaves), labels, weights, **options)
        (expected.sum() / world if reduction == "none" else expected).backward()
        case = f"{reduction}, smoothing {smoothing}, weights {weighted}, budget {budget}"
        assert_near(f"{case}: loss", loss, expected[here] if reduction == "none" else expected)
        grads = [leaf.grad for leaf in leaves]
        assert_near(f"{case}: embeddings", x.grad, grads[0][here] * world)  # type: ignore[index]
        assert_near(f"{case}: classes", local(head.weight.grad), grads[1][mine])  # type: ignore[index]
        assert_near(f"{case}: bias", local(head.bias.grad), grads[2][mine])  # type: ignore[index,union-attr]


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3, 4))])
def test_cross_entropy_is_that_of_torch(ranks, world):
    ranks(world).run(cross_entropy)


def test_soft_labels_are_torchs_probabilities():
    """Without class weights: with them, torch weighs each class's term, and divides by the number of samples."""
    x_all, _ = samples((5,))
    shares = torch.softmax(torch.randn(5, 3, dtype=torch.float64), 1)
    labels = torch.stack([torch.randperm(C)[:3] for _ in range(5)])
    probabilities = torch.zeros(5, C, dtype=torch.float64).scatter_add_(1, labels, shares)
    for reduction, smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.2)):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        head = PartialFC(D, C, Softmax(), dtype=torch.float64, init_std=1.0, **options)
        x, dense = (x_all.clone().requires_grad_() for _ in range(2))
        loss = head(gather(x, labels, label_weights=shares))
        expected = F.cross_entropy(F.linear(dense, head.weight.detach()), probabilities, **options)
        torch.testing.assert_close(loss, expected)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, dense.grad)


def weighted_smoothing(rank: int, world: int) -> None:
    """Class weights with label smoothing beside margins, rules, sub-centers and the filter, soft labels, weights of
    samples, and sampling: the dense loss is written from the formula."""
    counts = (5, 3, 0, 4)[:world]
    x_all, labels = samples(counts)
    generator = torch.Generator().manual_seed(5)
    pairs = torch.stack((labels, labels.roll(1)), 1)
    share = torch.rand(len(labels), 1, generator=generator, dtype=torch.float64)
    shares = torch.cat((share, 1 - share), 1)
    worth = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    here = samples_of(counts, rank)
    kinds: list[tuple[Any, dict[str, Any], float | None]] = [
        (Softmax(), {}, None),
        (ArcFace(scale=10.0), {"scale": 10.0}, None),
        (ArcFace(scale=10.0), {"scale": 10.0}, 0.3),
        (SubCenterArcFace(scale=10.0), {"scale": 10.0}, None),
        (MagFace(scale=10.0, **MAGFACE), {"scale": 10.0, **MAGFACE}, None),
        (CurricularFace(scale=10.0, momentum=0.5), {"scale": 10.0, "momentum": 0.5}, None),
    ]
    for (margin, settings, beyond), rate, budget in itertools.product(kinds, (1.0, 0.4), (0, None)):
        name = type(margin).__name__
        head = PartialFC(
            D, C, margin, rate, dtype=torch.float64, init_std=1.0, label_smoothing=0.3, interclass_filter=beyond,
            class_weights=class_weights(), logits_budget=budget,
        )  # fmt: skip
        margin.reset()
        x = x_all[here].clone().requires_grad_()
        with small_tiles():
            loss = head(gather(x, pairs[here], label_weights=shares[here], sample_weights=worth[here]))
            loss.backward()
        chosen = selected_by_all(head)
        reference = Loss(name, settings, 0.3, beyond=beyond, class_weights=class_weights())
        dense = x_all.clone().requires_grad_()
        w = whole(head.weight).clone().requires_grad_()
        bias = torch.zeros(len(chosen), dtype=torch.float64)
        of_classes = share_of(pairs, C, shares)[0]
        expected = reference(dense, w[chosen], of_classes[:, chosen], chosen, bias=bias, sample_weights=worth)
        expected.backward()
        case = f"{name}, r={rate}, filter {beyond}, budget {budget}"
        assert_near(f"{case}: loss", loss, expected)
        assert dense.grad is not None and w.grad is not None
        assert_near(f"{case}: embeddings", x.grad, dense.grad[here] * world)
        mine = head.row_grad[1] if head.row_grad is not None else local(head.weight.grad)
        assert_near(f"{case}: classes", mine, w.grad[head.selected])


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
def test_class_weights_with_label_smoothing(ranks, world):
    ranks(world).run(weighted_smoothing)


def test_a_mean_over_nothing_is_0_where_torch_says_nan():
    """docs/losses.md says so: batches without samples are usual on one rank of many."""
    x, w = torch.randn(2, D), class_weights()
    for labels, smoothing, torchs in (([-100, -100], 0.0, "nan"), ([5, 10], 0.0, "nan"), ([5, 10], 0.2, "nan")):
        head = PartialFC(D, C, Softmax(), class_weights=w, label_smoothing=smoothing)
        given, dense = (x.clone().requires_grad_() for _ in range(2))
        loss = head(given, torch.tensor(labels))
        loss.backward()
        expected = F.cross_entropy(
            F.linear(dense, head.weight.detach()), torch.tensor(labels), w.float(), label_smoothing=smoothing
        )
        assert str(expected.item()) == torchs
        assert loss.item() == 0 and given.grad is not None and not given.grad.any()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_class_weights_that_torch_would_take(bad):
    weights = torch.tensor([1.0, bad, 1.0])
    said = message_of(PartialFC, D, 3, class_weights=weights)
    assert said == f"ValueError: class_weights[1] is {bad}; a weight must be finite and at least 0"


# ------------------------------------------------------------------------------------------------- clip_grad_norm_


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 3.0, 0.5, "inf"])
def test_the_norm_is_that_of_torch(norm_type):
    backbone, head = nn.Linear(3, D), PartialFC(D, 12, ArcFace(), init_std=1.0)
    RowOptimizer(torch.optim.SGD, head, lr=0.1)
    head(backbone(torch.randn(5, 3)), torch.arange(5)).backward()
    parameters = [*backbone.parameters(), head.weight]
    before = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    mine = clip_grad_norm_(backbone.parameters(), head, max_norm=0.5, norm_type=norm_type)
    clipped = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    expected = nn.utils.clip_grad_norm_(parameters, 0.5, float(norm_type))
    assert mine.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, parameter in zip(clipped, parameters, strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_norms_that_are_none_are_refused():
    """A number of non-zero entries (0) is no norm to clip by, though torch takes it; nor is anything below."""
    head = PartialFC(D, 12, ArcFace())
    for norm_type in (0, 0.0, -1.0, float("nan")):
        assert "norm_type is the order of the norm, above 0 or infinity" in message_of(
            clip_grad_norm_, [], head, max_norm=1.0, norm_type=norm_type
        )
    for max_norm in (-1.0, float("nan")):
        assert "max_norm is the largest norm, at least 0" in message_of(clip_grad_norm_, [], head, max_norm=max_norm)


# ------------------------------------------------------------------------------------------------- second derivatives


def second_derivatives(rank: int, world: int) -> dict[str, str]:
    """A penalty on the gradient, by a head, a sampled one, a center loss and through `gather`: words; a first
    derivative with create_graph=True works as without."""
    labels = torch.arange(3)
    found = {}
    losses: dict[str, Any] = {
        "head": PartialFC(D, 12, ArcFace(), init_std=1.0),
        "sampled": PartialFC(D, 12, ArcFace(), 0.5, init_std=1.0),
        "center": CenterLoss(D, 12),
        "gather": lambda x, labels: 2 * gather(x, labels).embeddings.square().sum(),
    }
    optimizer = RowOptimizer(torch.optim.SGD, losses["sampled"], lr=0.1)
    for name, loss_of in losses.items():
        x = torch.randn(3, D, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        if name == "sampled":
            loss_of.eval()  # the same classes twice
        (plain,) = torch.autograd.grad(loss_of(x, labels), x)
        (grad,) = torch.autograd.grad(loss_of(x, labels), x, create_graph=True)
        torch.testing.assert_close(grad, plain)
        found[name] = message_of(torch.autograd.grad, grad.square().sum(), x)
        # beside the loss it would train nothing, without a word
        loss = loss_of(x, labels)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        assert message_of((loss + grad.square().sum()).backward) == found[name]
    optimizer.zero_grad()
    return found


def test_a_second_derivative_is_refused_in_words(ranks):
    for found in ranks(2).run(second_derivatives):
        names = {"head": "PartialFC", "sampled": "PartialFC", "center": "CenterLoss", "gather": "gather"}
        for key, name in names.items():
            assert f"RuntimeError: {name} has no second derivative" in found[key]
            assert "Put a penalty on gradients of the backbone's own output" in found[key]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_first_derivative_with_a_graph_trains_as_without():
    grads = []
    for graph in (False, True):
        head = PartialFC(D, 12, ArcFace(), 0.5, init_std=1.0)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        x = torch.linspace(-1, 1, 3 * D).view(3, D).requires_grad_()
        head(x, torch.arange(3)).backward(create_graph=graph)
        assert x.grad is not None
        assert x.grad.requires_grad == graph
        optimizer.step()
        grads.append((x.grad.detach().clone(), head.weight.detach().clone()))
        x.grad = None
    for plain, with_graph in zip(*grads, strict=True):
        assert torch.equal(plain, with_graph)
