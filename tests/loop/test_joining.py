"""Ranks with different numbers of batches train as one dense process on all samples, each of which counts once."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from common import message_of
from dense_losses import Loss
from dense_training import dense_training
from near import near
from shards import two_by_two, whole
from torch import Tensor, nn

from partial_fc import ArcFace, CenterLoss, JoinedBatches, PartialFC, RowOptimizer, Softmax, clip_grad_norm_, gather
from partial_fc.loop import joining

D, C, WIDTH = 6, 11, 4
Pair = namedtuple("Pair", ["images", "labels"])


@dataclass
class Fields:
    images: Tensor
    labels: Tensor


class Attributes:
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels


FORMS: dict[str, Any] = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "named tuple": (Pair, lambda b: (b.images, b.labels)),
    "dict": (lambda x, y: {"images": x, "labels": y, "note": "n"}, lambda b: (b["images"], b["labels"])),
    "dataclass": (Fields, lambda b: (b.images, b.labels)),
    "object": (Attributes, lambda b: (b.images, b.labels)),
}


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a rank at a step: 2 to 4 samples, so that the last one is odd."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    n = 2 + (rank + step) % 3
    return torch.randn(n, WIDTH, generator=generator, dtype=torch.float64), torch.randint(
        0, C, (n,), generator=generator
    )


def trained(rank: int, world: int, counts: tuple[int, ...], form: str) -> tuple[list[float], int, Tensor, Tensor]:
    """(losses, samples given that count, backbone weight, class weights) after an epoch of ranks with `counts`
    batches."""
    pack, unpack = FORMS[form]
    torch.manual_seed(5)
    model = nn.parallel.DistributedDataParallel(nn.Linear(WIDTH, D, dtype=torch.float64))
    head = PartialFC(D, C, ArcFace(scale=8.0), dtype=torch.float64, init_std=1.0)
    optimizer, head_optimizer = torch.optim.SGD(model.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.1)
    losses, samples = [], 0
    joined = JoinedBatches(pack(*batch_of(rank, step)) for step in range(counts[rank]))
    for step, batch in enumerate(joined):
        images, labels = unpack(batch)
        assert joined.ended == (step >= counts[rank]) == bool((labels == -100).all())
        if not joined.ended:
            assert torch.equal(images, batch_of(rank, step)[0]) and torch.equal(labels, batch_of(rank, step)[1])
        samples += int((labels != -100).sum())
        loss = head(model(images), labels)
        loss.backward()
        clip_grad_norm_(model.parameters(), head, max_norm=1.0)
        optimizer.step()
        head_optimizer.step()
        optimizer.zero_grad()
        head_optimizer.zero_grad()
        losses.append(loss.item())
    return losses, samples, model.module.weight.detach(), whole(head.weight)  # type: ignore[union-attr]


def many(rank: int, world: int, cases: list[tuple[tuple[int, ...], str]]) -> list[Any]:
    return [trained(rank, world, counts, form) for counts, form in cases]


def all_batches(counts: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    """The batches that there are at a step."""
    pairs = [batch_of(rank, step) for rank, count in enumerate(counts) if step < count]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [((3, 1), "tuple"), ((0, 2), "dict"), ((1, 1), "list")]),
        (
            3,
            [
                ((3, 1, 0), "tuple"),
                ((0, 2, 1), "dataclass"),
                ((0, 0, 2), "object"),
                ((2, 0, 3), "named tuple"),
                ((0, 0, 0), "list"),
            ],
        ),
    ],
)
def test_ranks_whose_data_end_train_as_one_dense_process(ranks, world, cases):
    start = PartialFC(D, C, dtype=torch.float64, init_std=1.0).weight.detach()
    torch.manual_seed(5)
    backbone, loss = nn.Linear(WIDTH, D, dtype=torch.float64), Loss("ArcFace", {"scale": 8.0})
    results = ranks(world).run(many, cases)
    for case, (counts, _) in enumerate(cases):
        batch = partial(all_batches, counts)
        dense = dense_training(backbone, start, loss, batch, max(counts), {"lr": 0.1}, max_norm=1.0)
        samples = sum(len(batch_of(rank, step)[1]) for rank, count in enumerate(counts) for step in range(count))
        assert sum(result[case][1] for result in results) == samples, "every sample counts once"
        for losses, _, weight, rows in (result[case] for result in results):
            near(
                [torch.tensor(losses), weight, rows],
                [torch.tensor(dense.losses), dense.backbone["weight"], dense.rows],
                1e-9,
            )


def other_losses(rank: int, world: int) -> int:
    """BatchNorm, a sampled head and center loss on labels by name, with an ignore_index of each."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, D), nn.BatchNorm1d(D)))
    heads = PartialFC(D, C, sample_rate=0.5), PartialFC(D, 3, Softmax(), ignore_index=255)
    optimizer, center = RowOptimizer(torch.optim.SGD, heads[0], lr=0.1), CenterLoss(D, C)
    batches = [(torch.randn(3, WIDTH), {"faces": torch.tensor([0, 1, 10]), "kinds": torch.tensor([0, 1, 2])})] * (
        2 - rank
    )
    before, steps = whole(center.centers).clone(), 0
    joined = JoinedBatches(batches, ignore_index={"faces": -100, "kinds": 255})
    for images, labels in joined:
        assert bool((labels["kinds"] == 255).all()) == bool((labels["faces"] == -100).all()) == joined.ended
        batch = gather(model(images), labels)
        loss = heads[0](batch["faces"]) + heads[1](batch["kinds"]) + center(batch["faces"])
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        center.step()
        steps += 1
    assert not torch.equal(whole(center.centers), before)
    return steps


def errors(rank: int, world: int) -> list[str]:
    """What each kind of failure raises, and whether the next pass works."""

    def failing() -> Any:
        yield from [(torch.zeros(1), torch.tensor([1]))] * 2
        if rank == world - 1:
            raise OSError("the disk is gone")
        yield torch.zeros(1), torch.tensor([1])

    found = []
    for loader in (
        failing(),
        [(torch.zeros(1), torch.zeros(1))]
        if rank
        else [(torch.zeros(1), torch.tensor([1]))],  # labels that are no integers
        [torch.zeros(1)] if rank else [{"labels": torch.tensor([1])}],  # a batch without labels
    ):
        with pytest.raises(RuntimeError) as caught:
            list(JoinedBatches(loader))  # type: ignore[arg-type]
        found.append(str(caught.value))
        assert len(list(JoinedBatches([(0, torch.tensor([1]))] * rank))) == world - 1
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_other_losses_and_what_a_loader_raises(ranks, world):
    assert ranks(world).run(other_losses) == [2] * world
    results = ranks(world).run(errors)
    assert all(result == results[0] for result in results)
    assert results[0][0] == f"rank {world - 1} failed to load its next batch: OSError: the disk is gone"
    assert "rank 1" in results[0][1] and "must be an integer tensor, not torch.float32" in results[0][1]
    assert "rank 1" in results[0][2] and "a batch of type Tensor has no 'labels'" in results[0][2]


def on_a_mesh(rank: int, world: int) -> list[tuple[float, float, bool]]:
    """Two replicas of two shards; only the last rank has data, two batches."""
    mesh = two_by_two()
    head = PartialFC(D, C, Softmax(), group=mesh, dtype=torch.float64, init_std=1.0)
    joined = JoinedBatches([batch_of(3, step) for step in range(2)] if rank == 3 else [], group=mesh)
    return [
        (images.sum().item(), head(images @ torch.ones(WIDTH, D).double(), labels).item(), joined.ended)
        for images, labels in joined
    ]


def test_replicas_that_never_had_a_batch(ranks):
    results = ranks(4).run(on_a_mesh)
    first = batch_of(3, 0)[0].sum().item()
    for rank, steps in enumerate(results):
        assert [loss for _, loss, _ in steps] == [loss for _, loss, _ in results[0]] and len(steps) == 2
        assert [ended for _, _, ended in steps] == [rank != 3] * 2
        assert steps[0][0] == first, "the stand-in is made of the first batch that a rank had"


def test_without_a_group_batches_pass_through():
    assert not dist.is_initialized()
    batches = [(torch.zeros(1), "labels of any kind")]
    joined = JoinedBatches(batches)
    assert list(joined) == batches and not joined.ended


def test_a_place_of_the_labels_or_a_stand_in_of_ones_own():
    from partial_fc.loop.joining import _with_ignored_labels

    images, labels = torch.ones(2), torch.tensor([3, 4])
    left, right = _with_ignored_labels((labels, images), 0, -1)
    assert left.tolist() == [-1, -1] and right is images and labels.tolist() == [3, 4]
    assert _with_ignored_labels({"y": labels}, "y", 9)["y"].tolist() == [9, 9]
    with pytest.raises(TypeError, match="is not an index of a tuple"):
        _with_ignored_labels((labels, images), "y", 0)
    with pytest.raises(TypeError, match="ignore_index is a dict"):
        _with_ignored_labels((images, labels), None, {"a": 1})
    assert JoinedBatches([], stand_in=lambda batch: batch * 0)._make_stand_in(torch.ones(2)).tolist() == [0, 0]  # type: ignore[attr-defined, misc]


def test_two_items_that_may_be_labels_are_asked_about():
    """(images, labels, index): the index is the last item, and ignoring it would train the stand-in's labels."""
    batch = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([7, 8])
    with pytest.raises(TypeError, match=r"2 items of a batch may be its labels .* labels=1"):
        joining._with_ignored_labels(batch, None, -100)
    _, labels, index = joining._with_ignored_labels(batch, 1, -100)
    assert labels.tolist() == [-100, -100] and index.tolist() == [7, 8]


def stand_in_of_a_gpu(rank: int, world: int) -> list[str]:
    """Where a batch from GPU 1 goes on a rank that never had one; the group exchanges tensors of the CPU too."""
    places: list[str] = []
    storage = mock.Mock(to=lambda device: places.append(str(device)))

    def load(file: Any, map_location: Any, weights_only: bool) -> Any:
        map_location(storage, "cuda:1")
        assert map_location(storage, "cpu") is storage
        return torch.ones(2, 3), torch.tensor([1, 2])

    with mock.patch.object(torch.cuda, "current_device", return_value=0), mock.patch.object(torch, "load", load):
        joined = JoinedBatches([(torch.ones(2, 3), torch.tensor([1, 2]))] if rank else [])
        assert len(list(joined)) == 1
    return places


def test_a_stand_in_goes_to_the_ranks_own_gpu(ranks):
    assert ranks(2).run(stand_in_of_a_gpu) == [["cuda:0"], []]


def bad_batches(rank: int, world: int, kind: str) -> str:
    """One rank's loader gives None, or labels that cannot be ignored."""
    labels = torch.zeros(2, dtype={"uint8": torch.uint8, "bool": torch.bool}.get(kind, torch.int64))
    batches = [(torch.zeros(2, D), labels), None if kind == "None" else (torch.zeros(2, D), labels)]
    return message_of(list, JoinedBatches(batches[: 2 - rank]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("None", "rank 0 failed to load its next batch: TypeError: the loader gave None for a batch"),
        ("uint8", "labels of torch.uint8 cannot hold ignore_index, -100"),
        ("bool", "labels of torch.bool cannot hold ignore_index, -100"),
    ],
)
def test_batches_that_no_stand_in_can_be_made_of(ranks, kind, words):
    for said in ranks(2).run(bad_batches, kind):
        assert words in said
