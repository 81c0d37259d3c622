"""The store of the process group, beside its collectives: what ranks tell each other when these have failed."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SILENCE = 5.0  # seconds after which a store is considered not to respond
# and after which one whose host takes connections is: torch's server looks up the name of every new peer, and a name
# server that loses a question holds up all ranks for five seconds
BUSY = 15.0


def default_store() -> Any:
    """Return the store of the process group. NotImplementedError where torch does not have it by that name."""
    if not hasattr(dist.distributed_c10d, "_get_default_store"):
        raise NotImplementedError(f"torch {torch.__version__} does not tell its store")
    return dist.distributed_c10d._get_default_store()


def own_connection(store: Any) -> Any:
    """Return the same store on a connection of its own, because the existing one may be locked by a waiting thread.

    Where nobody takes connections it tries for the whole timeout of the store: `reach` knows sooner.
    """
    if hasattr(store, "clone"):  # from torch 2.7 on
        store = store.clone()
        store.set_timeout(timedelta(seconds=SILENCE))
    return store


def agent_hosts_store() -> bool:
    """Return whether the store is in torchrun's agent; else it is in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def reach(store: Any) -> None:
    """Raise OSError, within SILENCE, if nobody takes connections where the store is."""
    tcp = tcp_store(store)
    if tcp is not None:
        socket.create_connection((tcp.host, tcp.port), SILENCE).close()


def tcp_store(store: Any) -> Any:
    """Return the TCPStore below all prefixes; None if the store is of another kind."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, dist.TCPStore) else None


def machine_id() -> str:
    """Return an id of this machine and of its process namespace; "" if there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
