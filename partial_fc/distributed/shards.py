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

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from partial_fc.distributed.groups import device_of
from partial_fc.distributed.ranks import Ranks, wrap_rows
from partial_fc.distributed.ranks import local_part as local_part

PICKLED = (
    "a head in a process group cannot be pickled (torch.save(model), multiprocessing), because its rows are on several "
    "ranks: use partial_fc.save_checkpoint(path, model=model) and load_checkpoint, at any number of ranks, or "
    "export_weights for the class weights alone"
)


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
        if self.mesh is None:
            return local
        return DTensor.from_local(local, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.ranks.group is not None:
            raise TypeError(PICKLED)
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, object]) -> ClassShards:
        return self  # immutable, and process groups cannot be copied


_own_meshes: dict[int, weakref.ref[DeviceMesh]] = {}


def is_own_mesh(mesh: DeviceMesh) -> bool:
    """Return whether a loss of this process was split over this very mesh: it did not come from a file."""
    known = _own_meshes.get(id(mesh))
    return known is not None and known() is mesh


def _mesh(ranks: Ranks, device_type: str) -> DeviceMesh | None:
    if ranks.group is None:
        return None
    if device_type == "meta":  # is no device of a mesh; the one that rows will have is taken, as far as it is known
        device_type = device_of(ranks).type
    mesh = ranks.mesh or DeviceMesh.from_group(ranks.group, device_type, mesh_dim_names=("shard",))
    _own_meshes[id(mesh)] = weakref.ref(mesh)
    return mesh
