"""From what users call a group to `Ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from partial_fc.distributed.host_groups import host_group_of
from partial_fc.distributed.inquiry import register_process
from partial_fc.distributed.ranks import Group, Ranks


def ranks_of(group: Group) -> Ranks:
    """Return the ranks of a process group, a 1-D or 2-D (replicate, shard) mesh, or of None.

    None stands for all ranks, or for this process alone where there is no process group.
    """
    if group is None:
        if not dist.is_initialized():
            return Ranks()
        group = dist.group.WORLD
    register_process()
    if isinstance(group, DeviceMesh):
        if group.ndim not in (1, 2):
            raise ValueError(
                f"group is a {group.ndim}-D mesh; a head takes a 1-D (shard) or 2-D (replicate, shard) one"
            )
        shard = group.get_group(group.ndim - 1)
        replicate = group.get_group(0) if group.ndim == 2 else None
        hosts = host_group_of(shard), host_group_of(replicate)
        return Ranks(*_place(shard), *(_place(replicate) if replicate else (0, 1)), shard, replicate, group, *hosts)
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"group must be a ProcessGroup that holds this rank, a DeviceMesh or None, not {group!r}")
    return Ranks(*_place(group), group=group, host_group=host_group_of(group))


def device_of(ranks: Ranks) -> torch.device:
    """Return the device of tensors that the group can exchange: the current GPU if it has no backend for the CPU."""
    if ranks.group is None or "cpu:" in dist.get_backend_config(ranks.group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)
