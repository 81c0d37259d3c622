"""Between DTensors, which the outside sees, and the local tensors that the mathematics runs on."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows of a DTensor on this rank; a plain tensor as it is. Differentiable."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap_rows(local: Tensor, mesh: DeviceMesh | None, rows: int) -> Tensor:
    """Return the DTensor `[rows, ...]` whose local part is `local`, split by rows over the last dimension of the mesh.

    Without a mesh `local` itself. On a 2-D mesh it is replicated over the first dimension.
    """
    if mesh is None:
        return local
    shape = torch.Size((rows, *local.shape[1:]))
    # without an explicit shape DTensor assumes that all ranks hold as many rows as this one, and is silently wrong
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def same_storage(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """Return whether the tensor still has this storage: `tensor.data = other` gives it another."""
    return tensor.untyped_storage()._cdata == storage._cdata
