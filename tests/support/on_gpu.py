"""The same scenario on the pretend GPU and on CPUs: nothing is mixed, and the numbers are the same.

    def scenario(place: Place, ...) -> Any      builds and trains on `place.device`; returns numbers and tensors
    on_both(gpu_ranks, ranks, layout, scenario, ...)

A layout is where it runs: one process without a group, two ranks, or a 2-D mesh of two replicas with one shard each.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pretend_gpu import NAME, PretendGpu, group_of_both
from runner import Ranks, seed
from shards import whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

from partial_fc import HostRows
from partial_fc.distributed.ranks import Group
from partial_fc.tiers.kinds import Storage

ALONE, RANKS, REPLICAS = "one process", "two ranks", "two replicas"
ALONE_ON_HOST, RANKS_ON_HOST = "one process, rows on the host", "two ranks, rows on the host"
ON_HOST = (ALONE_ON_HOST, RANKS_ON_HOST)  # rows of a head on the device; its group is for tensors of the CPU, too
LAYOUTS = (ALONE, RANKS, REPLICAS)
SLOW_ON_REPLICAS = (ALONE, RANKS, pytest.param(REPLICAS, marks=pytest.mark.slow))  # test_gpu_losses.py has all three

CLASSES, WIDTH = 150, 6  # three tiles of 64 class rows, where a tile is as small as it may be


def on_layouts(names: Iterable[Any], of_replicas: Collection[Any]) -> list[tuple[str, Any]]:
    """(layout, name) of all names; on replicas only these, for which a mesh does something else than ranks."""
    return [(layout, name) for layout in LAYOUTS for name in names if layout != REPLICAS or name in of_replicas]


HALF = {"rtol": 0.02, "atol": 0.02}  # weights in half precision: another last bit before they are rounded

Pools = Callable[[int], Ranks]


@dataclass(frozen=True)
class Place:
    """Where a scenario runs, and what all of them train on."""

    device: torch.device
    rank: int
    world: int
    group: Group
    storage: Storage | None = None

    def batch(self, step: int, classes: int = CLASSES, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """This rank's embeddings `[n, D]`, which require grad, and labels; another number of them on each rank."""
        generator = torch.Generator().manual_seed(100 * step + self.rank)
        n = 6 - 2 * self.rank
        x = scale * torch.randn(n, WIDTH, generator=generator)
        labels = torch.randint(0, classes, (n,), generator=generator)
        return x.to(self.device).requires_grad_(), labels.to(self.device)

    def filled(self, *shape: int, key: int = 0) -> Tensor:
        """Numbers that are the same on all ranks and devices."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(key)).to(self.device)


def plain(found: Any) -> Any:
    """What a scenario returns as numbers and tensors of the CPU, DTensors whole."""
    return tree_map(lambda each: whole(each).cpu() if isinstance(each, Tensor) else each, found)


def run(rank: int, world: int, scenario: Callable[..., Any], layout: str, kind: str, arguments: tuple[Any, ...]) -> Any:
    """What it returns on one rank; the text of its error, if it raises."""
    seed(0)
    try:
        if kind == "cpu":
            return plain(scenario(_place(rank, world, layout, torch.device("cpu")), *arguments))
        with PretendGpu(counting=False) as gpu:
            found = plain(scenario(_place(rank, world, layout, gpu.device), *arguments))
        assert not gpu.mistakes, gpu.mistakes
        return found
    except Exception:
        return traceback.format_exc()


def _place(rank: int, world: int, layout: str, device: torch.device) -> Place:
    group = None
    if layout == REPLICAS:
        group = init_device_mesh(device.type, (2, 1), mesh_dim_names=("replicate", "shard"))
    storage = HostRows() if layout in ON_HOST and device.type == NAME else None
    if layout == RANKS_ON_HOST and device.type == NAME:
        group = group_of_both()
    return Place(device, rank, world, group, storage)


def on_both(
    gpu_ranks: Pools,
    ranks: Pools,
    layout: str,
    scenario: Callable[..., Any],
    *arguments: Any,
    rtol: float = 1e-4,
    atol: float = 3e-5,
) -> None:
    """Run it on both; the results are finite and equal, but for what float32 loses: the device takes other sums."""
    if layout in (ALONE, ALONE_ON_HOST):
        on_cpu = [run(0, 1, scenario, layout, "cpu", arguments)]
    else:
        on_cpu = ranks(2).run(run, scenario, layout, "cpu", arguments)
    on_gpu = gpu_ranks(len(on_cpu)).run(run, scenario, layout, NAME, arguments)
    for found in (*on_cpu, *on_gpu):
        assert not isinstance(found, str), found
    leaves = tree_leaves(on_gpu)
    assert leaves, "a scenario returns numbers to compare"
    for each in leaves:
        finite = bool(each.isfinite().all()) if isinstance(each, Tensor) else math.isfinite(each)
        assert finite, on_gpu
    torch.testing.assert_close(on_gpu, on_cpu, rtol=rtol, atol=atol)
