"""Inputs and expected values of other projects' tests, each named by its source, and other libraries on the same weights.

Paddle      test/collective/fleet/parallel_margin_cross_entropy.py, parallel_class_center_sample.py
Megatron    tests/unit_tests/tensor_parallel/test_cross_entropy.py, megatron/core/tensor_parallel/cross_entropy.py
torch       test/distributed/tensor/test_math_ops.py, its loss_parallel
pytorch-metric-learning   its losses, installed
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import needs
from near import assert_near
from shards import classes_of, local, part_of
from torch import Tensor

from partial_fc import (
    ArcFace,
    CombinedMargin,
    CosFace,
    Margin,
    NormFace,
    PartialFC,
    RankFiles,
    Softmax,
    SphereFace,
    SubCenterArcFace,
    import_weights,
)

# ---------------------------------------------------------------------------------------------------- Paddle

MARGINS = ((1.0, 0.5, 0.0), (1.0, 0.0, 0.35), (1.35, 0.0, 0.0))  # margin1, margin2, margin3; scale 64
CLASSES_PER_CARD = ((4, 8), (2, 2), (4, 2), (3, 9))
BATCH, FEATURES, SCALE, PADDLE_SEED = 2, 4, 64.0, 1025


def paddle_loss(cosines: Tensor, labels: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    """The reference of that test: the angle is multiplied and added to, its cosine reduced, whatever it is."""
    moved = torch.cos(m1 * torch.acos(cosines) + m2) - m3
    own = F.one_hot(labels, cosines.shape[1])
    return F.cross_entropy((cosines + own * (moved - cosines)) * SCALE, labels)


def as_paddle(rank: int, world: int, folder: str, dtype: torch.dtype) -> None:
    """Shards of uneven size come as files of each rank; ours are even."""
    import numpy as np

    draw = np.random.RandomState(PADDLE_SEED)  # their labels are drawn from this seed in this order
    torch.manual_seed(PADDLE_SEED)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]  # at a scale of 64
    for cards in CLASSES_PER_CARD:
        for number, (m1, m2, m3) in enumerate(MARGINS):
            for _ in range(5):
                labels = torch.from_numpy(draw.randint(0, sum(cards), (BATCH,)))
                x, w = torch.randn(BATCH, FEATURES, dtype=dtype), torch.randn(sum(cards), FEATURES, dtype=dtype)
                dist.broadcast(x, 0)
                dist.broadcast(w, 0)
                paths = [f"{folder}/{cards}_{number}_{card}.pt" for card in range(len(cards))]
                if rank == 0:
                    for path, rows in zip(paths, w.split(list(cards)), strict=True):
                        torch.save({"weight": rows.clone()}, path)
                dist.barrier()
                margin = CombinedMargin(SCALE, m1, m2, m3, past_pi="plain")
                head = PartialFC(FEATURES, sum(cards), margin, dtype=dtype)
                import_weights(RankFiles(paths), head)
                here = part_of(BATCH, rank, world)
                own = x[here].clone().requires_grad_()
                loss = head(own, labels[here])
                loss.backward()

                leaves = x.double().requires_grad_(), w.double().requires_grad_()
                expected = paddle_loss(F.normalize(leaves[0]) @ F.normalize(leaves[1]).T, labels, m1, m2, m3)
                on_x, on_w = torch.autograd.grad(expected, leaves)
                case = f"{cards}, m1 {m1}, m2 {m2}, m3 {m3}"
                assert_near(f"{case}: loss", loss.double(), expected, tolerance)
                assert own.grad is not None and head.weight.grad is not None
                assert_near(f"{case}: embeddings", own.grad.double(), on_x[here] * world, 10 * tolerance)
                mine = classes_of(sum(cards), rank, world)
                assert_near(f"{case}: rows", local(head.weight.grad).double(), on_w[mine], 10 * tolerance)
                dist.barrier()


@needs("numpy")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margin_cross_entropy_as_paddle(ranks, tmp_path, dtype):
    ranks(2).run(as_paddle, str(tmp_path), dtype)


def as_center_sample(rank: int, world: int) -> None:
    """20 labels, 10 to 14 classes and at least 6 sampled centers a rank: all classes of the batch are among the sampled
    ones of their owner, and a label becomes the place of its class among the sampled centers of all ranks."""
    import numpy as np

    draw = np.random.RandomState(PADDLE_SEED)
    for _ in range(10):
        classes = int(draw.randint(10, 15, (world,)).sum())
        labels = torch.from_numpy(draw.randint(0, classes, (20,)))
        head = PartialFC(FEATURES, classes, NormFace(SCALE), 6 * world / classes, dtype=torch.float64, init_std=1.0)
        x = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        here = part_of(20, rank, world)
        loss = head(x[here], labels[here])
        mine = classes_of(classes, rank, world)
        positive = [c for c in labels.unique().tolist() if mine.start <= c < mine.stop]
        assert set(positive) <= set(head.selected.tolist()) <= set(range(mine.start, mine.stop))
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (head.selected.tolist(), local(head.weight.detach()).clone()))
        sampled = torch.tensor([each for ids, _ in everyone for each in ids])
        assert len(sampled) >= max(6 * world, len(labels.unique()))
        remapped = torch.tensor([sampled.tolist().index(label) for label in labels.tolist()])
        rows = torch.cat([rows for _, rows in everyone])[sampled]
        assert_near("loss", loss, F.cross_entropy(SCALE * F.normalize(x) @ F.normalize(rows).T, remapped))


@needs("numpy")
def test_center_sampling_as_paddle(ranks):
    ranks(2).run(as_center_sample)


# ---------------------------------------------------------------------------------------------------- Megatron

EXPECTED = [10.2309, 8.2309, 6.2309, 4.2309] * 4


def as_megatron(rank: int, world: int, smoothing: float) -> list[float]:
    """Logits 0 to 7, sixteen times over a vocabulary of 128; targets 0, 2, ... 30."""
    head = PartialFC(1, 128, Softmax(bias=False), dtype=torch.float64, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        local(head.weight).copy_((head.selected % 8)[:, None].double())
    targets = torch.arange(0, 32, 2)[part_of(16, rank, world)]
    return head(torch.ones(len(targets), 1, dtype=torch.float64), targets).tolist()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_vocab_parallel_cross_entropy_as_megatron(ranks, world):
    losses = [loss for part in ranks(world).run(as_megatron, 0.0) for loss in part]
    assert losses == pytest.approx(EXPECTED, abs=5e-5)


def test_label_smoothing_as_megatron(ranks):
    """There α goes to the other classes: s = α K/(K − 1) of `F.cross_entropy`, over all K = 128 classes. The mean logit
    is 3.5, so that −mean log p is 10.2309 − 3.5."""
    alpha, classes = 0.1, 128
    s = alpha * classes / (classes - 1)
    losses = [loss for part in ranks(2).run(as_megatron, s) for loss in part]
    assert losses == pytest.approx([(1 - s) * each + s * (10.2309 - 3.5) for each in EXPECTED], abs=5e-5)


# ---------------------------------------------------------------------------------------------------- torch


def as_loss_parallel(rank: int, world: int) -> None:
    """8 samples, 16 classes, random class weights, every reduction; besides, an ignored sample, which loss_parallel
    does not take together with class weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    generator = torch.Generator().manual_seed(7)
    mesh = init_device_mesh("cpu", (world,))
    x, w = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (8, 16))
    of_classes, labels = torch.rand(16, generator=generator).double(), torch.randint(16, (8,), generator=generator)
    for reduction, ignored in (("mean", False), ("sum", False), ("none", False), ("mean", True), ("sum", True)):
        weights = None if ignored else of_classes
        labels[5] = -100 if ignored else 11
        rows = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
        embeddings = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        with loss_parallel():
            theirs = F.cross_entropy(F.linear(embeddings, rows), labels, weights, reduction=reduction)
            theirs.sum().backward()
        head = PartialFC(
            5, 16, Softmax(bias=False), dtype=torch.float64, class_weights=weights, reduction=reduction,  # type: ignore[arg-type]
        )  # fmt: skip
        with torch.no_grad():
            local(head.weight).copy_(w[classes_of(16, rank, world)])
        here = part_of(8, rank, world)
        loss = head(x[here], labels[here])
        # with "none" each rank's scalar counts as averaged over the ranks
        (loss.sum() * world if reduction == "none" else loss).backward()
        expected = theirs.to_local() if hasattr(theirs, "to_local") else theirs
        assert_near(reduction, loss, expected[here] if reduction == "none" else expected)
        assert head.weight.grad is not None and rows.grad is not None
        assert_near(f"{reduction}: rows", local(head.weight.grad), rows.grad.to_local())


def test_losses_are_those_of_loss_parallel(ranks):
    ranks(2).run(as_loss_parallel)


# ---------------------------------------------------------------------------------------------------- metric learning

LOSSES: dict[str, tuple[Callable[[], Margin], str, dict[str, Any]]] = {
    "ArcFaceLoss": (
        lambda: ArcFace(16.0, 1.2, past_pi="sine"),
        "ArcFaceLoss",
        {"margin": math.degrees(1.2), "scale": 16},
    ),
    "CosFaceLoss": (lambda: CosFace(16.0, 0.35), "CosFaceLoss", {"margin": 0.35, "scale": 16}),
    "SphereFaceLoss": (lambda: SphereFace(2.0, 4.0, False), "SphereFaceLoss", {"margin": 4, "scale": 2.0}),
    "SubCenterArcFaceLoss": (
        lambda: SubCenterArcFace(16.0, 1.2, 3, past_pi="sine"),
        "SubCenterArcFaceLoss",
        {"margin": math.degrees(1.2), "scale": 16, "sub_centers": 3},
    ),
    "NormalizedSoftmaxLoss": (lambda: NormFace(1 / 0.05), "NormalizedSoftmaxLoss", {"temperature": 0.05}),
    "NormalizedSoftmaxLoss, lengths": (
        lambda: NormFace(1 / 0.05, False),
        "NormalizedSoftmaxLoss",
        {"temperature": 0.05},
    ),
}


def with_metric_learning(rank: int, world: int) -> None:
    """Theirs: weight [D, C·K], margins of ArcFace in degrees; of lengths as they come, some samples beyond π − m."""
    from pytorch_metric_learning import distances, losses

    for name, (build, cls, options) in LOSSES.items():
        margin = build()
        if name.endswith("lengths"):
            options = {**options, "distance": distances.DotProductSimilarity(normalize_embeddings=False)}
        theirs = getattr(losses, cls)(num_classes=7, embedding_size=5, **options)
        head = PartialFC(5, 7, margin, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(7, margin.centers, 5, generator=generator, dtype=torch.float64)
        x = 2 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
        labels = torch.arange(12) % 7
        theirs.W.data = w.reshape(-1, 5).T.clone()
        leaf = x.clone().requires_grad_()
        expected = theirs(leaf, labels)
        expected.backward()
        mine, here = classes_of(7, rank, world), part_of(12, rank, world)
        with torch.no_grad():
            local(head.weight).copy_(w[mine].view_as(local(head.weight)))
        own = x[here].clone().requires_grad_()
        loss = head(own, labels[here])
        loss.backward()
        assert_near(f"{name}: loss", loss, expected, 1e-8)
        assert own.grad is not None and leaf.grad is not None and head.weight.grad is not None
        # theirs clamps sums of squares, so its gradients are right to about 1e-7
        assert_near(f"{name}: embeddings", own.grad, leaf.grad[here] * world, 1e-6)
        on_w = theirs.W.grad.T.reshape(7, -1, 5)[mine]
        assert_near(f"{name}: rows", local(head.weight.grad).reshape(on_w.shape), on_w, 1e-6)


@needs("pytorch_metric_learning")
def test_losses_are_those_of_pytorch_metric_learning(ranks):
    ranks(2).run(with_metric_learning)
