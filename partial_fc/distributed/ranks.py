"""The ranks of a loss, and the collectives of a training step.

all_gather            [...] of each rank  ──>  [world, ...]
all_gather_mesh       the same over all ranks of a 2-D mesh, two collectives there
start_reduce_scatter  gradient [N, D]     ──>  [N_r, D], summed over the ranks
sum_over_replicas     in place, between the replicas of a 2-D mesh
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.named_ranks import NamedRanks
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
