"""Which rank owns which class, and what its rows hold at the start.

`C` classes are split by rows over `world` ranks with the chunk rule of `torch.chunk` and of DTensor: `ceil(C / world)` rows a rank,
the last ranks shorter, possibly empty. Rank `r` owns the global class ids `[lo, hi)`, its *shard*: a local tensor `[C_local, ...]`.

With a process group every sharded parameter is a `DTensor [C, ...]`, `Shard(0)` over a mesh of the group (and `Replicate` over the
first dimension of a 2-D mesh). The maths runs on the local tensor; the DTensor is there for what surrounds it: DDP, Accelerate, ZeRO
and FSDP refuse to wrap it instead of broadcasting or averaging it, and distributed checkpoints reshard it to any world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from partial_fc.distributed.ranks import Ranks

INIT_BLOCK = 1024  # rows drawn by one generator; part of the format of a seed, so never to be changed


def shard_bounds(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """The class ids `[lo, hi)` that `rank` of `world` owns: the chunk rule; `lo == hi` for an empty shard."""
    chunk = -(-num_classes // world)
    return min(rank * chunk, num_classes), min((rank + 1) * chunk, num_classes)


@dataclass(frozen=True)
class ClassShards:
    """The split of `num_classes` rows over the ranks of one head, as this rank sees it."""

    num_classes: int
    ranks: Ranks
    mesh: DeviceMesh | None
    lo: int
    hi: int

    @classmethod
    def split(cls, num_classes: int, ranks: Ranks, device: torch.device) -> ClassShards:
        lo, hi = shard_bounds(num_classes, ranks.rank, ranks.world)
        return cls(num_classes, ranks, _mesh(ranks, device.type), lo, hi)

    def resized(self, num_classes: int) -> ClassShards:
        """The split of another number of classes over the same ranks."""
        lo, hi = shard_bounds(num_classes, self.ranks.rank, self.ranks.world)
        return replace(self, num_classes=num_classes, lo=lo, hi=hi)

    @property
    def local(self) -> int:
        """`C_local`, the number of rows on this rank."""
        return self.hi - self.lo

    @property
    def placements(self) -> list[Placement]:
        """Replicated over the first dimension of a 2-D mesh, split by rows over the last one."""
        assert self.mesh is not None
        return [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]

    def wrap(self, local: Tensor, rows: int | None = None) -> Tensor:
        """The `[C, ...]` DTensor whose local part is `local [C_local, ...]`; `local` itself where there is no group.

        `rows` replaces `C` for tensors that hold another number of rows than the shard (row gradients).
        """
        if self.mesh is None:
            return local
        shape = torch.Size((self.num_classes if rows is None else rows, *local.shape[1:]))
        # without an explicit shape DTensor assumes that all ranks hold as many rows as this one, and is silently wrong
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def wrap_shared(self, local: Tensor) -> Tensor:
        """A DTensor of a tensor that all ranks hold alike; `local` itself where there is no group."""
        if self.mesh is None:
            return local
        return DTensor.from_local(local, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)

    def __deepcopy__(self, memo: dict[int, object]) -> ClassShards:
        return self  # immutable, and process groups cannot be copied


def _mesh(ranks: Ranks, device_type: str) -> DeviceMesh | None:
    if ranks.mesh is not None:
        return ranks.mesh
    if ranks.group is None:
        return None
    return DeviceMesh.from_group(ranks.group, device_type, mesh_dim_names=("shard",))


def local_part(tensor: Tensor) -> Tensor:
    """The rows on this rank of a DTensor; a plain tensor as it is. Differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
