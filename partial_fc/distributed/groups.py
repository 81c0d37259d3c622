"""From what users call a group to `Ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from partial_fc.distributed.host_groups import host_group_of
from partial_fc.distributed.machines import register_process
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


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Return the backend of a group for each type of device that it can exchange: {"cpu": "gloo", "cuda": "nccl"}.

    `dist.get_backend` is of no use here: it says "undefined" of a group that was made without a name, and the whole
    list of one that has a backend for each type.
    """
    pairs = (each.partition(":") for each in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, _, backend in pairs}


def device_of(ranks: Ranks) -> torch.device:
    """Return the device of tensors that the group can exchange: the CPU, or the current device of the accelerator whose
    backend the group has, if it has none for the CPU (NCCL alone)."""
    if ranks.group is None:
        return torch.device("cpu")
    kinds = backends_of(ranks.group)
    return torch.device("cpu") if "cpu" in kinds else current_device(next(iter(kinds)))


def device_of_rows(asked: torch.device | str | None, ranks: Ranks) -> torch.device:
    """Return the device that is asked for, else torch's default device, or the current GPU where the group cannot
    exchange tensors of the CPU (NCCL)."""
    if asked is not None:
        return torch.device(asked)
    default = torch.empty(0).device  # torch.get_default_device() of torch 2.6 overlooks `with torch.device(...)`
    return device_of(ranks) if default.type == "cpu" else default


def current_device(kind: str) -> torch.device:
    """Return the device of this type that this process uses where none is named."""
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)
