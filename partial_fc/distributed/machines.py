"""Which process each rank is, on which machine, and whether the machines reach each other.

    register    each rank writes its record to the process group's store when it builds its first head (one message)
    know        after the first collective each rank reads which machine hosts the store, which cannot be asked when it
                is out of reach (two messages)
    state       of a process on the same machine: has it ended, is it stopped or running?
    probe       after a failed collective that all ranks reached: one rank of each machine tries to connect to the
                others, on ports that they open for it

The address of a machine is that by which it reaches the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as dist

from partial_fc.distributed.store import SILENCE, agent_hosts_store, default_store, machine_id, tcp_store

PROBE = 3.0  # seconds within which a connection between two machines must be made

# keys in the store; all but STORE_HOST are followed by "/" and a global rank
PROCESS = "partial_fc/process"  # JSON of a Process
STORE_HOST = "partial_fc/store_host"  # JSON [ranks, the Process of one of them]
PORT = "partial_fc/port"  # opened to be probed
UNREACHED = "partial_fc/unreached"  # JSON list of the ranks that this rank, for its machine, did not reach


class Process(NamedTuple):
    """The process of a rank. machine: an id, or ""; address: as text, or "" where the store has none."""

    machine: str
    pid: int
    started: str
    host: str = ""
    address: str = ""

    @property
    def place(self) -> str:
        """The machine in words: its host name and address."""
        return f"{self.host} ({self.address})" if self.address else self.host

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is on another machine than this process."""
        return self.machine != machine_id()


ENDED = ("", "Z", "X")  # states of a process: there is none, or nobody has waited for it yet
STOPPED = ("T", "t")

_registered_in: weakref.ref[dist.ProcessGroup] | None = None  # the default group whose store has this process
_store_host: tuple[list[int], Process] | None = None  # of that group: ranks on the store's machine, one's process


def register_process() -> None:
    """Write to the store which process this rank is, once per default process group."""
    global _registered_in, _store_host
    world = dist.group.WORLD
    if world is None or (_registered_in is not None and _registered_in() is world):
        return
    _registered_in, _store_host = weakref.ref(world), None
    with contextlib.suppress(RuntimeError, OSError, NotImplementedError):
        store, rank = default_store(), dist.get_rank()
        address, hosts_store = _connection(store)
        process = Process(machine_id(), os.getpid(), stat_of(os.getpid())[1], socket.gethostname(), address)
        store.set(f"{PROCESS}/{rank}", json.dumps(process))
        if hosts_store and (rank == 0 or agent_hosts_store()) and (beside := _ranks_beside(rank)):
            store.set(STORE_HOST, json.dumps([beside, process]))
    # else the store cannot be written to: a later message will not contain the process


def know_store_host() -> None:
    """Read which machine hosts the store, once all ranks have registered. Does nothing if it is known, or unknown to
    the store."""
    global _store_host
    if _store_host is None and dist.is_initialized():
        with contextlib.suppress(RuntimeError, OSError, NotImplementedError):
            store = default_store()
            if store.check([STORE_HOST]):
                ranks, process = json.loads(store.get(STORE_HOST))
                _store_host = ranks, Process(*process)


def store_host() -> tuple[list[int], Process] | None:
    """Return the ranks on the machine of the store and the process of one of them; None if that is not known."""
    return _store_host


def _connection(store: Any) -> tuple[str, bool]:
    """Return by which address of its own this machine reaches the store, and whether it hosts it."""
    tcp = tcp_store(store)
    if tcp is None:
        return "", False
    with socket.create_connection((tcp.host, tcp.port), SILENCE) as connection:
        here = connection.getsockname()[0]
        return here, here == connection.getpeername()[0]


def _ranks_beside(rank: int) -> list[int]:
    """Return the ranks of this rank's machine, which launchers number in one piece; where no launcher has said how
    many they are, that of rank 0, which then hosts the store."""
    try:
        count, first = int(os.environ["LOCAL_WORLD_SIZE"]), rank - int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError):
        return [0] if rank == 0 else []
    return [*range(max(0, first), min(first + count, dist.get_world_size()))]


def process_of(rank: int, store: Any) -> Process | None:
    """Return the process of a rank; None if it was not registered."""
    key = f"{PROCESS}/{rank}"
    return Process(*json.loads(store.get(key))) if store.check([key]) else None


def stat_of(pid: int) -> tuple[str, str]:
    """Return (state, start time) of a process as in /proc, ("", "") if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def has_exited(process: Process) -> bool:
    """Return whether a process has ended; False if it is on another machine."""
    if not process.machine or process.is_elsewhere:
        return False
    state, since = stat_of(process.pid)
    return state in ENDED or since != process.started


def is_stopped(process: Process) -> bool:
    """Return whether a process is stopped, as by SIGSTOP or a debugger; False if it is on another machine."""
    return bool(process.machine) and not process.is_elsewhere and stat_of(process.pid)[0] in STOPPED


def state_of(process: Process) -> str:
    """Return the state of a process in words; "" if it is on another machine."""
    if not process.machine or process.is_elsewhere:
        return ""
    if has_exited(process):
        return f"its process (pid {process.pid}) has exited"
    how = "is stopped" if is_stopped(process) else "is running, but elsewhere in its program"
    return f"its process (pid {process.pid}) {how}"


def machines_of(processes: dict[int, Process]) -> dict[int, list[int]]:
    """Return the ranks of each machine with an address, by the lowest of them."""
    of: dict[str, list[int]] = {}
    for rank, process in sorted(processes.items()):
        if process.machine and process.address:
            of.setdefault(process.machine, []).append(rank)
    return {ranks[0]: ranks for ranks in of.values()}


def probe(rank: int, processes: dict[int, Process], store: Any) -> list[tuple[int, int]]:
    """Return the pairs of machines, by the lowest rank of each, that do not reach each other.

    Every rank calls it, within seconds, after a failed collective; it takes a few seconds where there are several
    machines. processes: of the ranks of the group.
    """
    lowest = list(machines_of(processes))
    if len(lowest) < 2:
        return []
    deadline = time.monotonic() + 2 * PROBE
    if rank in lowest:
        with socket.create_server((processes[rank].address, 0), backlog=len(lowest)) as server:
            store.set(f"{PORT}/{rank}", str(server.getsockname()[1]))
            others = [each for each in lowest if each != rank]
            _wait_for(PORT, others, store, time.monotonic() + PROBE)
            ports = {r: int(store.get(f"{PORT}/{r}")) for r in others if store.check([f"{PORT}/{r}"])}
            unreached = _unreached({r: (processes[r].address, port) for r, port in ports.items()})
            store.set(f"{UNREACHED}/{rank}", json.dumps(unreached))
            _wait_for(UNREACHED, lowest, store, deadline + PROBE)  # with the port open for the others
    else:
        _wait_for(UNREACHED, lowest, store, deadline + PROBE)
    told = {r: json.loads(store.get(f"{UNREACHED}/{r}")) for r in lowest if store.check([f"{UNREACHED}/{r}"])}
    return sorted({(min(a, b), max(a, b)) for a, others in told.items() for b in others})


def _unreached(addresses: dict[int, tuple[str, int]]) -> list[int]:
    """Return those of the ranks whose address takes no connection."""
    waiting = {}
    for rank, (address, port) in addresses.items():
        connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        connection.setblocking(False)
        connection.connect_ex((address, port))
        waiting[connection.fileno()] = rank, connection
    poll, failed, deadline = select.poll(), [], time.monotonic() + PROBE
    for number in waiting:
        poll.register(number, select.POLLOUT)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for number, _ in poll.poll(1000 * left):
            rank, connection = waiting.pop(number)
            poll.unregister(number)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                failed.append(rank)
            connection.close()
    for rank, connection in waiting.values():
        failed.append(rank)
        connection.close()
    return sorted(failed)


def _wait_for(key: str, ranks: Iterable[int], store: Any, deadline: float) -> None:
    """Wait until all `ranks` have written `key`, or time is up."""
    absent = set(ranks)
    while absent and time.monotonic() < deadline:
        absent = {rank for rank in absent if not store.check([f"{key}/{rank}"])}
        time.sleep(0.05 * bool(absent))
