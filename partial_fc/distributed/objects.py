"""Objects of the ranks, pickled. They travel between hosts, whatever device a group is for.

NCCL would send them by the GPU that is current, which a head with `device=f"cuda:{LOCAL_RANK}"` need not be on (several
ranks on one GPU, which NCCL refuses), and the host would wait for all that was launched there.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.ranks import naming_the_missing


def group_of_objects(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """Return the group by which objects of these ranks travel; None without a process group."""
    return ranks_of(group).host_group or group if dist.is_initialized() else None


def gather_objects(mine: Any, what: str, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the object of every rank of the group; a collective. Objects are small, and of plain types. what: for a
    `RankMissing`."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with naming_the_missing(what, group):
        dist.all_gather_object(everyone, mine, group=group_of_objects(group))
    return everyone
