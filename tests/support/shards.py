"""Shards: which classes a rank has, its part of a parameter and of a gradient, and what all ranks have together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All of a DTensor, detached; a plain tensor as it is. All ranks must call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def classes_of(count: int, rank: int, world: int) -> slice:
    """The classes that a rank owns."""
    chunk = -(-count // world)
    return slice(min(rank * chunk, count), min((rank + 1) * chunk, count))


def part_of(count: int, rank: int, world: int) -> slice:
    """A rank's samples of a batch of `count`."""
    return slice(rank * count // world, (rank + 1) * count // world)


def samples_of(counts: Any, rank: int) -> slice:
    """A rank's samples, where `counts` says how many each rank has."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def everyones(thing: Any) -> list[Any]:
    """What each rank gives, in the order of ranks; without a process group this one's."""
    if not dist.is_initialized():
        return [thing]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def selected_by_all(head: Any) -> Tensor:
    """The classes of the last forward on all ranks, ascending."""
    return torch.cat(everyones(head.selected)).unique()


def positions(labels: Tensor, ids: Tensor, classes: int, ignore: int = -100) -> Tensor:
    """Labels as positions in `ids`; ignored ones are -100."""
    place = torch.full((classes,), -100).index_copy_(0, ids, torch.arange(len(ids)))
    return torch.where(labels == ignore, -100, place[labels.masked_fill(labels == ignore, 0)])


def row_gradient(loss: Any) -> Tensor:
    """This rank's gradient of the rows that were selected, or of all its rows."""
    grad = loss.row_grad[1] if loss.row_grad is not None else loss.weight.grad
    assert grad is not None
    return local(grad)


def two_by_two() -> DeviceMesh:
    """Four ranks as two replicas of two shards."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
