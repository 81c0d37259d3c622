"""`predict` and `outliers` against dense float64: at every world size, in small tiles, with ties, with bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import any_message_of, outcome_of
from shards import local, two_by_two
from torch import Tensor

from partial_fc import (
    AdaptiveMargin,
    ArcFace,
    CombinedMargin,
    CurricularFace,
    Margin,
    NormFace,
    PartialFC,
    Softmax,
    SphereFace,
    SphereFace2,
    SubCenterArcFace,
    outliers,
)
from partial_fc.classes import best_classes, queries

D, C, K = 7, 83, 3


class Doubled(Margin):
    """Nothing normalised, and a scale."""

    normalize = False

    def target(self, cosine: Tensor, positives: Any) -> Tensor:
        return cosine


MARGINS = {
    "softmax": lambda: Softmax(),
    "without bias": lambda: Softmax(bias=False),
    "scaled": lambda: Doubled(2.5),
    "arcface": lambda: ArcFace(20.0),
    "curricular": lambda: CurricularFace(20.0),
    "adaptive": lambda: AdaptiveMargin(range(C), scale=30.0),
    "sphereface2": lambda: SphereFace2(),
    "sphereface2-a": lambda: SphereFace2(t=1.5, kind="arc"),
    "a-softmax": lambda: SphereFace(1.0, 4.0, normalize_embeddings=False, annealing=5.0),
    "normalized softmax": lambda: NormFace(20.0, normalize_embeddings=False),
    "subcenter": lambda: SubCenterArcFace(20.0, centers=K),
    "combined": lambda: CombinedMargin(m1=1.2, past_pi="plain"),
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_logits(name: str, margin: Any, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """`[n, C]`: what a user would write for inference."""
    if name in ("softmax", "without bias", "scaled"):
        return margin.scale * x @ w.T + (bias if name == "softmax" else 0.0)
    unit = torch.nn.functional.normalize
    cosines = torch.einsum("nd,ckd->nck", unit(x), unit(w.view(C, -1, D), dim=2)).amax(2)
    if name.startswith("sphereface2"):
        return margin.scale * (2 * ((cosines + 1) / 2) ** margin.t - 1) + local(margin.offset).double()
    if name in ("a-softmax", "normalized softmax"):
        return margin.scale * x.norm(dim=1)[:, None] * cosines
    return margin.scale * cosines


def predictions(rank: int, world: int, samples: list[int]) -> None:
    best_classes.BIN = 4
    for name, build in MARGINS.items():
        margin = build()
        head = PartialFC(D, C, margin, dtype=torch.float64)
        w, bias = random(1, C, *([K] if margin.centers > 1 else []), D), random(2, C)
        lo, hi = head.shards.lo, head.shards.hi
        local(head.weight.detach()).copy_(w[lo:hi])
        if head.bias is not None:
            local(head.bias.detach()).copy_(bias[lo:hi])
        x = random(10 + rank, samples[rank], D).requires_grad_()
        logits = dense_logits(name, margin, x.detach(), w, bias)
        for k, tile_bytes in ((1, 1), (3, 1600), (C, 64 << 20)):
            head.train(k == 1)
            found = head.predict(x, k, tile_bytes=tile_bytes)
            expected = logits.topk(k, dim=1)
            assert found.ids.dtype == torch.int64 and found.ids.shape == (len(x), k) and not found.logits.requires_grad
            torch.testing.assert_close(found.logits, expected.values, rtol=0, atol=1e-10, msg=name)
            assert torch.equal(found.ids, expected.indices), name
        if name == "arcface":
            assert torch.equal(head.topk(x, 3).ids, head.predict(x, 3).ids)


@pytest.mark.parametrize(
    ("world", "samples"),
    [
        (1, [13]),
        (2, [5, 0]),
        pytest.param(3, [0, 9, 2], marks=pytest.mark.slow),
        pytest.param(4, [1, 4, 2, 8], marks=pytest.mark.slow),
    ],
)
def test_predictions_are_those_of_a_dense_classifier(ranks, world, samples):
    ranks(world).run(predictions, samples)


def test_of_equal_logits_the_lower_id_comes_first():
    head = PartialFC(2, 6, Softmax())
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 1], [1, 0], [0, 1], [2, 0], [1, 0], [0, 0]]))
        head.bias.copy_(torch.tensor([0.0, 1, 0, 0, 1, 2]))  # type: ignore[union-attr]
    found = head.predict(torch.tensor([[1.0, 0.0]]), 6)
    assert found.ids.tolist() == [[1, 3, 4, 5, 0, 2]]
    assert found.logits.tolist() == [[2, 2, 2, 2, 0, 0]]


def test_a_prediction_is_that_of_the_loss():
    """In eval() without a margin the loss of a label is that of these logits."""
    for margin in (Softmax(), NormFace(9.0), NormFace(3.0, normalize_embeddings=False)):
        head = PartialFC(D, C, margin, dtype=torch.float64, init_std=1.0).eval()
        x = random(3, 4, D)
        ids, logits = head.predict(x, C)
        by_class = torch.empty_like(logits).scatter_(1, ids, logits)
        labels = torch.tensor([0, 5, 80, 82])
        torch.testing.assert_close(head(x, labels), torch.nn.functional.cross_entropy(by_class, labels))


def bad_predictions(rank: int, world: int) -> list[str]:
    head = PartialFC(D, C, Softmax())
    x = torch.randn(2, D)
    found = [
        any_message_of(lambda: head.predict(x[:, :3] if rank else x, 2)),
        any_message_of(lambda: head.predict(x, C + rank)),
        any_message_of(lambda: head.predict(x * torch.nan if rank else x, 2)),
    ]
    if rank:
        local(head.bias.detach())[-1] = torch.inf  # type: ignore[union-attr]
    return [*found, any_message_of(lambda: head.predict(x, 2))]


def test_bad_arguments_are_refused_alike(ranks):
    results = ranks(2).run(bad_predictions)
    assert results[0] == results[1]
    width, k, nan, bias = results[0]
    assert "rank 1: embeddings have width 3, the head has embedding_size 7" in width
    assert "rank 1: k is 84; valid are 1 to 83" in k
    assert "rank 1: the length of embeddings[0] is not finite" in nan
    assert "the length of the row of class 82, or its bias, is not finite" in bias


# ---------------------------------------------------------------------------------------------------- outliers


def dense_outliers(x: Tensor, labels: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(angles to the dominant center, nearest, dominant) of all samples, class by class."""
    unit = torch.nn.functional.normalize
    angles, nearest, dominant = torch.full((len(x),), math.nan).double(), labels * 0 - 1, labels * 0 - 1
    for label in labels.unique().tolist():
        if label < 0:
            continue
        of_class = (labels == label).nonzero()[:, 0]
        cosines = unit(x[of_class]) @ unit(w[label]).T
        nearest[of_class] = cosines.argmax(1)
        winner = int(torch.bincount(cosines.argmax(1), minlength=w.shape[1]).argmax())
        dominant[of_class] = winner
        angles[of_class] = torch.acos(cosines[:, winner])
    return angles, nearest, dominant


def found_outliers(rank: int, world: int, samples: list[int]) -> None:
    queries.QUERIES = 6
    classes = 11
    head = PartialFC(D, classes, SubCenterArcFace(centers=K), 0.5, dtype=torch.float64)
    w = random(1, classes, K, D)
    local(head.weight.detach()).copy_(w[head.shards.lo : head.shards.hi])
    x, labels = (
        random(2, sum(samples), D),
        torch.randint(0, classes, (sum(samples),), generator=torch.Generator().manual_seed(4)),
    )
    labels[labels == 3] = -100  # nothing of class 3
    angles, nearest, dominant = dense_outliers(x, labels, w)
    here = slice(sum(samples[:rank]), sum(samples[: rank + 1]))
    before = local(head.weight.detach()).clone()
    for threshold in (None, math.radians(75)):
        found = outliers(head, x[here], labels[here], threshold=threshold)
        expected = (nearest != dominant) if threshold is None else angles > threshold
        assert torch.equal(found.found, (expected & (labels >= 0))[here])
        torch.testing.assert_close(found.angles, angles[here], rtol=0, atol=1e-12, equal_nan=True)
        assert torch.equal(found.nearest, nearest[here]) and torch.equal(found.dominant, dominant[here])
        by_class = [int(dominant[labels == c][0]) if bool((labels == c).any()) else -1 for c in range(classes)]
        assert found.centers.tolist() == by_class[head.shards.lo : head.shards.hi]
    assert torch.equal(local(head.weight.detach()), before)


@pytest.mark.parametrize(
    ("world", "samples"),
    [
        (1, [50]),
        (2, [41, 0]),
        pytest.param(3, [7, 20, 0], marks=pytest.mark.slow),
        pytest.param(4, [5, 30, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_outliers_are_those_of_a_loop_over_classes(ranks, world, samples):
    ranks(world).run(found_outliers, samples)


def on_mesh(rank: int, world: int, mesh: bool) -> list[Any]:
    """Shards over 4 ranks, or 2 replicas of 2 shards: each rank gets what is true of its own samples."""
    group = two_by_two() if mesh else None
    found: list[Any] = []
    x = random(10 + rank, 3 + rank, D)
    for margin in (Softmax(), SubCenterArcFace(20.0, centers=K)):
        head = PartialFC(D, 11, margin, group=group, dtype=torch.float64, init_std=1.0)
        ids, logits = head.predict(x, 4)
        found += [ids.tolist(), logits.tolist()]
    labels = torch.arange(len(x)) % 3
    nearer, angles, *places, _ = outliers(head, x, labels)
    return [*found, nearer.tolist(), angles.tolist(), *(each.tolist() for each in places)]


@pytest.mark.slow
def test_answers_are_the_same_on_replicas_of_shards(ranks):
    plain, replicated = (ranks(4).run(on_mesh, mesh) for mesh in (False, True))
    for one, other in zip(plain, replicated, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-6)


def test_outliers_without_a_group(monkeypatch):
    monkeypatch.setattr(queries, "QUERIES", queries.QUERIES)
    found_outliers(0, 1, [50])


def test_of_centers_with_equally_many_samples_the_first_is_dominant():
    head = PartialFC(2, 1, SubCenterArcFace(centers=2))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    found = outliers(head, torch.tensor([[3.0, 0.1], [0.1, 2.0]]), torch.zeros(2, dtype=torch.int64))
    assert found.centers.tolist() == [0] and found.found.tolist() == [False, True]


def bad_outliers(rank: int, world: int) -> list[str]:
    head, plain = PartialFC(D, C, SubCenterArcFace()), PartialFC(D, C)
    x, labels = torch.randn(2, D), torch.tensor([0, 5])
    last = rank == world - 1
    return [
        outcome_of(lambda: outliers(plain, x, labels), fine="nothing"),
        outcome_of(lambda: outliers(head, x, labels + 100 if last else labels), fine="nothing"),
        outcome_of(lambda: outliers(head, x, labels[:1] if last else labels), fine="nothing"),
        outcome_of(lambda: outliers(head, x, labels.float() if last else labels), fine="nothing"),
        outcome_of(lambda: outliers(head, x, labels, threshold=75 if last else 1.3), fine="nothing"),
        outcome_of(lambda: outliers(head, x[:, :2] if last else x, labels), fine="nothing"),
        outcome_of(lambda: outliers(head, x * torch.inf if last else x, labels), fine="nothing"),
    ]


def test_what_outliers_refuse_is_refused_alike(ranks):
    results = ranks(2).run(bad_outliers)
    assert results[0] == results[1]
    for message, words in zip(
        results[0],
        (
            "the head needs a margin with several, SubCenterArcFace(centers=3)",
            "rank 1: labels[0] is 100; valid are 0 to 82, and -100 for none",
            "rank 1: there are 2 embeddings and 1 labels",
            "rank 1: labels must be an int64 tensor [N], not torch.float32 [2]",
            "rank 1: threshold is an angle in radians in (0, pi], not 75.0",
            "rank 1: embeddings have width 2",
            "NonFiniteError",
        ),
        strict=True,
    ):
        assert words in message, message


def test_outliers_are_those_of_pytorch_metric_learning():
    """Its `get_outliers`: the angle to the dominant center above a threshold in degrees."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    head = PartialFC(5, 7, SubCenterArcFace(centers=3), dtype=torch.float64, init_std=1.0)
    theirs = losses.SubCenterArcFaceLoss(num_classes=7, embedding_size=5, sub_centers=3)
    theirs.W.data = head.weight.detach().reshape(-1, 5).T.clone()
    x, labels = random(5, 60, 5), torch.arange(60) % 7
    indices, centers = theirs.get_outliers(x, labels, threshold=75)
    found = outliers(head, x, labels, threshold=math.radians(75))
    assert found.found.nonzero()[:, 0].tolist() == sorted(indices.tolist())
    assert 5 < int(found.found.sum()) < 55
    kept = head.weight.detach()[torch.arange(7), found.centers]
    torch.testing.assert_close(kept, centers.T)
