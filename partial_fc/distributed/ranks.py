"""The ranks of a loss: tensors whose rows are split over them, and the collectives of a training step.

local_part            DTensor [C, ...], as the outside sees it  ──>  the rows of this rank, for the mathematics
all_gather            [...] of each rank  ──>  [world, ...]
all_gather_mesh       the same over all ranks of a 2-D mesh, two collectives there
start_reduce_scatter  gradient [N, D]     ──>  [N_local, D], summed over the ranks
sum_over_replicas     in place, between the replicas of a 2-D mesh
naming_the_missing    around them all: their errors name the rank that is missing
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.profiler import record_function

from partial_fc.distributed.inquiry import RankMissing, explain_failure
from partial_fc.distributed.named_ranks import NamedRanks
from partial_fc.distributed.operation import current_operation
from partial_fc.distributed.padding import padded_rows

Group = dist.ProcessGroup | DeviceMesh | None

# torch 2.13 renamed them
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

MOST_GATHERED = 1 << 20  # bytes of all ranks: more numbers that are only added up are reduced on the way (sums.py)
IN_BACKWARD = "the sum of the embeddings' gradients in backward"


@dataclass(frozen=True)
class Ranks(NamedRanks):
    """The ranks that share a loss: `world` shards, repeated in `replicas` replicas of a 2-D mesh."""

    rank: int = 0
    world: int = 1
    replica: int = 0
    replicas: int = 1
    group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    # the same ranks, for tensors of the CPU: what the host must know does not wait for a device (host_groups.py)
    host_group: dist.ProcessGroup | None = None
    host_replica_group: dist.ProcessGroup | None = None

    @property
    def total(self) -> int:
        """The number of all ranks, over which an engine averages the backbone's gradients."""
        return self.world * self.replicas


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows of a DTensor on this rank; a plain tensor as it is. Differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap_rows(local: Tensor, mesh: DeviceMesh | None, rows: int) -> Tensor:
    """Return the DTensor `[rows, ...]` whose local part is `local`, split by rows over the last dimension of the mesh
    and replicated over the first of two; `local` itself without a mesh."""
    if mesh is None:
        return local
    shape = torch.Size((rows, *local.shape[1:]))
    # without an explicit shape DTensor assumes that all ranks hold as many rows as this one, and is silently wrong
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None, what: str = "an exchange") -> Tensor:
    """Return every rank's tensor, `[world, *tensor.shape]`; `[1, ...]` without a group. what: for a `RankMissing`."""
    tensor = tensor.contiguous()
    if group is None:
        return tensor[None]
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    with naming_the_missing(what, group):
        _all_gather_single(out.view(-1), tensor.view(-1), group=group)
    return out


def all_gather_mesh(tensor: Tensor, ranks: Ranks, what: str = "an exchange") -> Tensor:
    """Return `[replicas * world, *tensor.shape]`, in the order of the mesh."""
    host = tensor.device.type == "cpu" and ranks.host_group is not None
    group, replicas = (ranks.host_group, ranks.host_replica_group) if host else (ranks.group, ranks.replica_group)
    gathered = all_gather(tensor, group, what)
    return all_gather(gathered, replicas, what).flatten(0, 1) if replicas else gathered


def sum_over_replicas(tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
    """Sum it in place over the replicas of a 2-D mesh; without replicas it stays as it is."""
    if ranks.replica_group is not None:
        with record_function("partial_fc::replicas"), naming_the_missing(what, ranks.replica_group):
            dist.all_reduce(tensor, group=ranks.replica_group)
    return tensor


def start_reduce_scatter(grad: Tensor, ranks: Ranks, counts: tuple[int, ...]) -> Callable[[], Tensor]:
    """Begin to sum `grad [N, D]` over ranks, each keeping its own rows; call the result to wait for `[N_local, D]`."""
    if ranks.group is None:
        return lambda: grad
    longest = max(counts)
    padded = grad.contiguous() if min(counts) == longest else padded_rows(grad, counts)
    out = grad.new_empty(longest, grad.shape[1])
    with naming_the_missing(IN_BACKWARD, ranks.group):
        work = _reduce_scatter_single(out.view(-1), padded.view(-1), group=ranks.group, async_op=True)

    def finish() -> Tensor:
        with naming_the_missing(IN_BACKWARD, ranks.group):
            work.wait()
        return out[: counts[ranks.rank]]

    return finish


class naming_the_missing:  # noqa: N801 (reads as a function; a plain class, because every collective of a step enters one)
    """A context manager that turns an error caused by a missing peer into a `RankMissing` that names the peer.

    If a peer has exited, a collective fails at once on the remaining ranks; if it is stopped or busy elsewhere, at the
    process group's timeout. The remaining ranks find out which rank is missing (inquiry.py). The block may hold one
    collective or a whole training step, with its backward and DistributedDataParallel's reductions. Other errors pass
    unchanged, and the ranks that wait are told. Without a process group it does nothing.

    Args:
        what: the purpose of the collectives, for the message.
        group: the group of the collectives; None for all ranks.
    """

    __slots__ = ("_group", "_start", "_what")

    def __init__(self, what: str = "a collective", group: dist.ProcessGroup | None = None) -> None:
        self._what, self._group, self._start = what, group, 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RankMissing) or not dist.is_initialized():
            return
        told = explain_failure(error, current_operation(self._what), self._group, time.monotonic() - self._start)
        if told is not None:
            raise RankMissing(*told) from error
