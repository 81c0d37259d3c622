"""Which rank owns which class.

`C` classes are split by rows over `world` ranks with the chunk rule of `torch.chunk` and of DTensor: `ceil(C / world)`
rows a rank, the last ranks shorter, possibly empty. Rank `r` owns the class ids `[lo, hi)`, its *shard*: a local tensor
`[C_local, ...]`.

With a process group every sharded parameter is a `DTensor [C, ...]`, `Shard(0)` over a mesh of the group (and
`Replicate` over the first dimension of a 2-D mesh). The mathematics runs on the local tensor. The DTensor is for the
outside: DDP, Accelerate, ZeRO and FSDP refuse to wrap it instead of broadcasting or averaging it, and distributed
checkpoints reshard it to any world size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from partial_fc.distributed.dtensors import local_part as local_part
from partial_fc.distributed.dtensors import wrap_rows, wrap_shared
from partial_fc.distributed.ranks import Ranks


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

    def wrap(self, local: Tensor) -> Tensor:
        """Return the DTensor `[C, ...]` of `local [C_local, ...]`; `local` itself where there is no group."""
        return wrap_rows(local, self.mesh, self.num_classes)

    def wrap_shared(self, local: Tensor) -> Tensor:
        """Return a DTensor of a tensor that is equal on all ranks; `local` itself where there is no group."""
        return wrap_shared(local, self.mesh)

    def __deepcopy__(self, memo: dict[int, object]) -> ClassShards:
        return self  # immutable, and process groups cannot be copied


def _mesh(ranks: Ranks, device_type: str) -> DeviceMesh | None:
    if ranks.mesh is not None:
        return ranks.mesh
    if ranks.group is None:
        return None
    if device_type == "meta":  # is no device of a mesh; the one that rows will have is taken, as far as it is known
        device_type = "cuda" if dist.get_backend(ranks.group) == "nccl" else "cpu"
    return DeviceMesh.from_group(ranks.group, device_type, mesh_dim_names=("shard",))
