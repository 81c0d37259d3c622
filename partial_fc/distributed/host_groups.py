"""A group for what the host must know: counts, digests, flags. It exchanges tensors of the CPU.

A group with a backend for the CPU (`gloo`, `cpu:gloo,cuda:nccl`) is its own. A group of NCCL alone gets a gloo group of
the same ranks beside it, once, when the first loss is built on it: else every exchange of counts would wait until the
device has done all that was launched before.
"""

from __future__ import annotations

import weakref

import torch.distributed as dist

from partial_fc.distributed.inquiry import RankMissing
from partial_fc.distributed.ranks import naming_the_missing

NO_GROUP = (
    "a loss in a group of NCCL exchanges counts by a gloo group beside it, which could not be made: set "
    "GLOO_SOCKET_IFNAME to the network interface that the machines reach each other by (lo on a single machine), or "
    'begin with init_process_group("cpu:gloo,cuda:nccl")'
)
_beside: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def host_group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group of the same ranks that exchanges tensors of the CPU; None where torch has no gloo.

    A collective the first time, where the group itself has no such backend.
    """
    if group is None or "cpu:" in dist.get_backend_config(group):
        return group
    if not dist.is_gloo_available():
        return None
    if group not in _beside:
        ranks = dist.get_process_group_ranks(group)
        try:
            with naming_the_missing("the making of a group for counts", group):
                _beside[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        except RankMissing:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"{NO_GROUP} ({error})") from error
    return _beside[group]
