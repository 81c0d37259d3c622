"""Which GPU of its machine a rank uses. Every process begins with GPU 0: unless it chooses, all ranks share that one.

take_own_gpu      makes the GPU of LOCAL_RANK the current one; called before anything is on a GPU
check_own_gpus    refuses ranks of one machine that use the same GPU of several, when a head is built

The ranks compare over the process group's store: NCCL refuses one GPU for two ranks itself, in its first collective and
in words that do not say what to do.

    each rank     its GPU ── compare_set ──> the rank that has claimed it
    all ranks     count themselves and wait; if a GPU was claimed twice, all raise the same ValueError
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch

from partial_fc.distributed.groups import backends_of
from partial_fc.distributed.ranks import Ranks, naming_the_missing
from partial_fc.distributed.store import default_store, machine_id

KEY = "partial_fc/gpus"  # in the store, followed by the ranks that build a head, and the number of the building


def take_own_gpu() -> None:
    """Make the GPU of LOCAL_RANK the current device, where a process sees several and a launcher has set LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", "")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1 and local.isdecimal():
        torch.cuda.set_device(int(local) % gpus)


def check_own_gpus(ranks: Ranks, device: torch.device, what: str) -> None:
    """Raise ValueError on every rank if two ranks of one machine use the same GPU, and could each have another one.

    Every rank must call it: a collective, over the store. It does nothing in a group without NCCL: gloo lets ranks
    share a GPU. device: of the head. what: for a `RankMissing`.
    """
    if ranks.group is None or "nccl" not in backends_of(ranks.group).values():
        return
    try:
        store = default_store()
    except NotImplementedError:
        return
    everyone = [ranks.global_rank(flat) for flat in range(ranks.total)]
    place = f"{KEY}/{hashlib.blake2b(repr(everyone).encode(), digest_size=8).hexdigest()}"
    with naming_the_missing(what, ranks.group):
        turn = f"{place}/{(store.add(f'{place}/came', 1) - 1) // ranks.total}"
        _claim(store, turn, everyone[ranks.replica * ranks.world + ranks.rank], device)
        if store.add(f"{turn}/claimed", 1) == ranks.total:
            store.set(f"{turn}/done", "1")
        store.wait([f"{turn}/done"])
        shared = json.loads(store.get(f"{turn}/shared")) if store.check([f"{turn}/shared"]) else None
    if shared is not None:
        one, other, gpu, gpus = shared
        raise ValueError(
            f"ranks {one} and {other} both use GPU {gpu} of the {gpus} that they see: call "
            "torch.cuda.set_device(LOCAL_RANK), with the number that the launcher has put into the environment, before "
            "the process group, the head or anything else is built; or give the head device=f'cuda:{LOCAL_RANK}'"
        )


def _claim(store: Any, turn: str, rank: int, device: torch.device) -> None:
    """Write to the store which GPU this rank uses, and, if another rank of this machine has written it before, that."""
    machine, gpus = machine_id(), torch.cuda.device_count()
    if device.type != "cuda" or not machine or gpus < 2:  # or it has been given one of its own, and need not choose
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # numbers depend on CUDA_VISIBLE_DEVICES
    gpu = f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}:{index}" if uuid is None else str(uuid)
    claimed = int(store.compare_set(f"{turn}/{machine}/{gpu}", "", str(rank)))
    if claimed != rank:
        shared = json.dumps([*sorted((claimed, rank)), index, gpus])
        store.set(f"{turn}/shared", shared)
