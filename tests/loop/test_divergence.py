"""DivergenceWatch: equal replicas raise nothing; a planted difference is found at its step, with its name and rank."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shards import local
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from watching import collectives

from partial_fc import AdaFace, ArcFace, DivergenceError, DivergenceWatch, PartialFC, RowOptimizer, SphereFace2
from partial_fc.loop.checksums import checksums

D, C = 4, 9


class Run:
    """A backbone with batch normalisation, a head, both optimizers, and a watch over all of them."""

    def __init__(self, rank: int, world: int, margin: Any, rate: float = 1.0, replicas: int = 1, **watch: Any) -> None:
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (replicas, world // replicas)) if replicas > 1 else None
        self.rank, self.world = rank, world
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
        margin = copy.deepcopy(margin)  # tensors that are sent to processes lie in memory that all of them share
        self.head = PartialFC(D, C, margin, rate, group=mesh, init_std=1.0)
        self.optimizer = torch.optim.Adam(self.backbone.parameters(), lr=0.01)
        self.head_optimizer = RowOptimizer(torch.optim.SGD, self.head, lr=0.1, momentum=0.9)
        self.watch = DivergenceWatch(self.backbone, self.head, self.optimizer, **{"every": 5, **watch})

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(10 * number + self.rank)
        self.head(
            self.backbone(torch.randn(3, D, generator=generator)), torch.randint(C, (3,), generator=generator)
        ).backward()
        for parameter in self.backbone.parameters():
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.head_optimizer.step()
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()


def planted(rank: int, world: int, kind: str, at: int, margin: Any, options: dict[str, Any]) -> tuple[str, int]:
    """(the error, the step that was made last), where the last rank changes one bit of something at step `at`."""
    run = Run(rank, world, margin, **options)
    targets: dict[str, Any] = {
        "weight": lambda: run.backbone[0].weight,
        "moment": lambda: run.optimizer.state[run.backbone[0].bias]["exp_avg"],
        "margin": lambda: run.head.margin.mean,  # type: ignore[union-attr]
        "offset": lambda: local(run.head.margin.offset),  # type: ignore[arg-type]
        "rows": lambda: local(run.head.weight),
        "statistics": lambda: run.backbone[1].running_mean,
    }
    for number in range(1, 21):
        run.step(number)
        if number == at and rank == world - 1:
            if kind == "forwards":
                run.head.forward_count += 1
            else:
                target = targets[kind]().detach()
                place = (-1, 0) if target.ndim == 2 else (0,) if target.ndim else ()
                if kind == "rows" and run.head.selected_rows is not None:
                    place = (int(run.head.selected_rows[0]), 0)
                target[place] = torch.nextafter(target[place], torch.tensor(9.0, dtype=target.dtype))
        try:
            run.watch.step()
        except DivergenceError as error:
            return str(error), number
    return "", 20


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("kind", "margin", "options", "name"),
    [
        ("weight", ArcFace(), {}, "0.weight"),
        ("moment", ArcFace(), {}, "exp_avg of 0.bias"),
        ("margin", AdaFace(), {}, "PartialFC.margin.mean"),
        ("offset", SphereFace2(10.0), {}, "PartialFC.margin.offset"),
        ("forwards", ArcFace(), {}, "PartialFC.forward count"),
        ("statistics", ArcFace(), {"buffers": True}, "1.running_mean"),
    ],
)
def test_a_planted_difference_is_found_at_its_step(ranks, world, kind, margin, options, name):
    # batch statistics differ from the first step on, without a plant; counts of forwards are compared by the next one
    at = {"statistics": 0, "forwards": 10}.get(kind, 7)
    texts = ranks(world).run(planted, kind, at, margin, options, timeout=120)
    assert len(set(texts)) == 1, texts
    text, last = texts[0]
    if kind == "statistics":
        assert last == 5 and "at step 1 1.running_mean" in text and "no earlier step was equal on all ranks" in text
        return
    others = "rank 0" if world == 2 else "the other ranks"
    assert (
        text == f"ranks diverged: at step {at} {name} on rank {world - 1} differs from {others} "
        f"(all ranks were equal at step {at - 1})"
    )
    assert last == 10, "looked at every fifth step, and yet the very step"


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_replicas_of_rows_are_compared_with_those_of_the_same_shard(ranks, rate):
    (answer,) = set(ranks(2).run(planted, "rows", 4, ArcFace(), {"replicas": 2, "rate": rate}, timeout=120))
    assert answer == (
        "ranks diverged: at step 4 PartialFC.weight on rank 1 differs from rank 0 (all ranks were equal at step 3)",
        5,
    )


def alike(rank: int, world: int) -> list[int]:
    for options in ({}, {"rate": 0.5}):
        text, last = planted(rank, world, "weight", 99, AdaFace(), options)
        assert (text, last) == ("", 20)
    return [len(Run(rank, world, ArcFace()).watch.found)]


@pytest.mark.parametrize("world", [2, 3])
def test_equal_ranks_never_differ(ranks, world):
    """Twenty steps in which the batch statistics of every rank are others, and shards are."""
    ranks(world).run(alike, timeout=120)


def logged(rank: int, world: int) -> list[tuple[str, int, int | None, tuple[int, ...]]]:
    run = Run(rank, world, ArcFace(), every=3, on_divergence="log")
    for number in range(1, 10):
        if number in (2, 5) and rank == 1:
            with torch.no_grad():
                run.backbone[0].weight[number - 2, 0] += 1.0
                run.backbone[1].bias[0] += float(number == 5)
        run.watch.step(100 + number)
    run.watch.compare()
    return [(found.name, found.step, found.since, found.ranks) for found in run.watch.found.values()]


def test_a_log_names_each_tensor_once_and_goes_on(ranks):
    for found in ranks(3).run(logged, timeout=120):
        assert found == [("0.weight", 102, 101, (1,)), ("1.bias", 105, 101, (1,))]


def exchanges(rank: int, world: int) -> list[tuple[str, int]]:
    """What is sent over ten steps."""
    run = Run(rank, world, ArcFace(), every=5)
    with collectives() as sent:
        for _ in range(10):
            run.watch.step()
    return sent


def test_one_small_exchange_every_so_many_steps(ranks):
    exchange = [("all_gather", 24 * 8), ("all_gather", 12 * 8)]  # how many steps; two kinds, five steps and the shard
    assert ranks(2).run(exchanges, timeout=120) == [exchange * 2] * 2


def test_checksums_see_every_bit_and_no_layout():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for size in (1, 3, 1023, 2048, 5001):
            tensor = (torch.randn(size, generator=generator) * 100).to(dtype)
            start = checksums([tensor])
            assert torch.equal(checksums([torch.ones(7), tensor.clone()])[1:], start)
            for place in {0, size // 2, size - 1}:
                changed = tensor.clone()
                changed.view(torch.uint8)[place * tensor.element_size()] ^= 1
                assert not torch.equal(checksums([changed]), start)
    square = torch.randn(64, 64, generator=generator)
    assert torch.equal(checksums([square.t().contiguous().t()]), checksums([square]))
    swapped = square.flatten().clone()
    swapped[[0, 4000]] = swapped[[4000, 0]]
    assert not torch.equal(checksums([swapped]), checksums([square]))
    assert torch.equal(
        checksums([square.flatten()[1:5]]), checksums([square.flatten()[1:5].clone()])
    )  # where words do not begin


def test_without_ranks_nothing_is_done_and_bad_arguments_are_named():
    watch = DivergenceWatch(nn.Linear(2, 2))
    watch.step()
    watch.compare()
    assert not watch.found
    with pytest.raises(ValueError, match="every"):
        DivergenceWatch(nn.Linear(2, 2), every=0)
    with pytest.raises(ValueError, match="on_divergence"):
        DivergenceWatch(nn.Linear(2, 2), on_divergence="mend")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="modules and optimizers"):
        DivergenceWatch(torch.ones(2))  # type: ignore[arg-type]


class Sent(Exception):
    """Enough was seen."""


def devices_of_what_is_sent(rank: int, world: int) -> list[str]:
    """Where the numbers of a comparison are in a group of NCCL alone; the meta device stands for the GPU."""
    watch = DivergenceWatch(nn.Linear(2, 2), every=9)  # all that it watches is on the CPU
    watch.step()
    seen: list[str] = []

    def met(what: str, ranks: Any, device: torch.device, values: Any) -> list[Any]:
        seen.append(device.type)
        return [values] * world

    def gathered(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        seen.append(tensor.device.type)
        raise Sent

    with (
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
        mock.patch("partial_fc.distributed.groups.current_device", return_value=torch.device("meta")),
        mock.patch("partial_fc.loop.divergence.meet", met),
        mock.patch("partial_fc.loop.divergence.all_gather", gathered),
        pytest.raises(Sent),
    ):
        watch.compare()
    return seen


def test_what_is_compared_travels_on_the_device_of_the_group(ranks):
    assert ranks(2).run(devices_of_what_is_sent) == [["meta", "meta"]] * 2


def test_a_row_optimizer_is_refused():
    head = PartialFC(D, 6)
    with pytest.raises(TypeError, match="give the DivergenceWatch its head"):
        DivergenceWatch(head, RowOptimizer(torch.optim.SGD, head, lr=0.1))
