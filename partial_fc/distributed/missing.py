"""Which rank did not come: a collective that fails because of a peer says so by name, instead of "Connection closed by peer".

    with naming_the_missing("the exchange", group):     a collective; costs nothing while it goes well
        dist.all_gather_single(...)

A collective ends with an error on the ranks that are left when a peer was killed or has ended (at once: its connection is closed), or is
stopped or busy elsewhere (at the process group's timeout). torch's error tells of an address, not of a rank. What happens then:

    note      each rank that came to a collective and saw it fail notes so in the store of the process group
    wait      a little (GRACE), until all ranks but one have, or longer for several
    judge     members of the group without a note are the missing ones; where none is, what others judged of theirs is the reason
    raise     RankMissing on every rank that is left, from torch's error

Nothing of this needs a collective, which would fail as well. A store that does not answer points to the rank that hosts it. What process
each rank is was noted when its first head was built (one message to the store): on the same machine it can be told whether it has ended,
is stopped or runs.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

GRACE = 10.0  # seconds for the notes of ranks that were still computing when another's collective failed
SETTLE = 1.0  # seconds for the last note, once all ranks but one have left theirs
SILENCE = 5.0  # seconds after which a store does not answer
POLL = 0.05

CAME, JUDGED, PROCESS = "partial_fc/came", "partial_fc/judged", "partial_fc/process"
# what gloo, NCCL and the store say of a peer; a DataLoader also has timeouts and connections, and is not meant
_OF_A_PEER = re.compile(r"gloo/transport|gloo/rendezvous|caused pair closure|NCCL|ncclSystemError|ncclRemoteError")
_WAITED = re.compile(r"[Tt]imed out (?:after )?waiting (?:for )?(\d+) ?ms")


class RankMissing(RuntimeError):
    """A rank did not come to a collective: it has ended, failed, been killed or been stopped, or it is slower than the timeout.

    ranks: global ranks that did not come; empty where that could not be learned. Raised on every rank that is left, from torch's error.
    The process group cannot be used afterwards: the process should end.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class naming_the_missing:  # noqa: N801, used as a function
    """Around collectives: an error of theirs that a peer is the cause of becomes a `RankMissing` that names the peer.

    what: they are for, in the message. group: they are over; None for all ranks. Other errors pass. Without a process group, and while
    all goes well, it does nothing. It may be as wide as a whole step, backward and DistributedDataParallel's reductions included.
    """

    __slots__ = ("_group", "_start", "_what")

    def __init__(self, what: str = "a collective", group: dist.ProcessGroup | None = None) -> None:
        self._what, self._group, self._start = what, group, 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RankMissing) or not is_of_a_peer(error) or not dist.is_initialized():
            return
        raise _judged(str(error), self._what, self._group, time.monotonic() - self._start) from error


def is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the way to it."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and bool(_OF_A_PEER.search(str(error)))


# ---------------------------------------------------------------------------------------------------- who is who

_known: weakref.ref[dist.ProcessGroup] | None = None  # the default group whose store knows this process


def introduce() -> None:
    """Note in the store, once a process group, what process this rank is."""
    global _known
    world = dist.group.WORLD
    if world is None or (_known is not None and _known() is world):
        return
    _known = weakref.ref(world)
    try:
        _default_store().set(
            f"{PROCESS}/{dist.get_rank()}", json.dumps([_machine(), os.getpid(), _stat(os.getpid())[1]])
        )
    except (RuntimeError, OSError, NotImplementedError):
        return  # a store that cannot be written to; the message has one fact less


def _machine() -> str:
    """This machine and its name space of processes, among all."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """(state, start time) of a process, ("", "") if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _state_of(rank: int, store: Any) -> str:
    """What can be seen of a rank's process from here; "" if nothing."""
    key = f"{PROCESS}/{rank}"
    if not store.check([key]):
        return ""
    machine, pid, started = json.loads(store.get(key))
    if not machine or machine != _machine():
        return ""
    state, since = _stat(pid)
    if not state or since != started or state in "ZX":
        return f"its process (pid {pid}) has ended"
    return f"its process (pid {pid}) {'is stopped' if state in 'Tt' else 'is there, but elsewhere in its program'}"


# ---------------------------------------------------------------------------------------------------- who did not come


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]


class _Inquiry(threading.Thread):
    """Leaves this rank's note, waits for the others' and judges; in a thread, because a stopped host of the store never answers.

    missing: global ranks of `members` that left no note, or what others judged of theirs; seen: what their processes are at.
    """

    def __init__(self, rank: int, members: list[int]) -> None:
        super().__init__(daemon=True, name="partial_fc missing ranks")
        self.rank, self.members = rank, members
        self.answered, self.missing, self.seen = threading.Event(), set[int](), dict[int, str]()
        self.late = False  # others gave this rank up
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._ask(_own_connection(_default_store()))
        except Exception as error:  # the host of the store has gone, or the store cannot do this
            self.failure = error
        finally:
            self.answered.set()

    def _ask(self, store: Any) -> None:
        store.set(f"{CAME}/{self.rank}", "1")
        absent = self._wait(store, CAME, self.members, time.monotonic() + GRACE)
        self.missing = absent
        store.set(f"{JUDGED}/{self.rank}", json.dumps(sorted(absent)))
        if not absent:
            self._follow(store)
        self.seen = {rank: _state_of(rank, store) for rank in sorted(self.missing)}
        if self.rank == 0:  # which may host the store: those that came are still to read there
            here = [rank for rank in self.members if rank not in absent]
            self._wait(store, JUDGED, here, time.monotonic() + SETTLE)

    def _wait(self, store: Any, what: str, ranks: list[int], deadline: float) -> set[int]:
        """The ranks that have not noted `what` when it is known or time is up."""
        absent, last = set(ranks), None
        while True:
            absent = {rank for rank in absent if not store.check([f"{what}/{rank}"])}
            self.answered.set()
            now = time.monotonic()
            if len(absent) == 1 and last is None:
                last = now
            if not absent or now > deadline or (last is not None and now > last + SETTLE):
                return absent
            time.sleep(POLL)

    def _follow(self, store: Any) -> None:
        """All came: somebody among them has failed for the sake of a rank in another group, or this rank is late."""
        others = [rank for rank in self.members if rank != self.rank]
        self._wait(store, JUDGED, others, time.monotonic() + SETTLE)
        for rank in others:
            key = f"{JUDGED}/{rank}"
            if store.check([key]):
                self.missing.update(json.loads(store.get(key)))
        self.late = self.rank in self.missing


def _own_connection(store: Any) -> Any:
    """The same store by a connection of its own, so that nobody waits for this one's lock."""
    host = _tcp(store)
    if host is not None:
        socket.create_connection(
            (host.host, host.port), SILENCE
        ).close()  # else the store would try for its whole timeout
    if hasattr(store, "clone"):  # from torch 2.7 on
        store = store.clone()
        store.set_timeout(timedelta(seconds=SILENCE))
    return store


def _tcp(store: Any) -> Any:
    """The TCPStore under all prefixes, None if it is of another kind."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, dist.TCPStore) else None


def _judged(text: str, what: str, group: dist.ProcessGroup | None, seconds: float) -> RankMissing:
    """The error to raise, from torch's `text`."""
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    inquiry = _Inquiry(dist.get_rank(), members)
    inquiry.start()
    inquiry.answered.wait(SILENCE)
    if inquiry.answered.is_set():
        inquiry.join(GRACE + 2 * SETTLE + SILENCE)
    waited = _WAITED.search(text)
    how = (
        f"waited {int(waited[1]) / 1000:g} s, the timeout"
        if waited
        else f"the connection ended after {seconds:.1f} s, before a timeout"
    )
    if inquiry.late:
        late = "after the others had given it up: it was stopped, or slower than the timeout"
        return RankMissing(f"rank {inquiry.rank}, this one, came to {what} {late}. {END}", inquiry.missing)
    if inquiry.missing:
        names = _names(sorted(inquiry.missing))
        seen = "".join(f"; rank {rank}: {state}" for rank, state in inquiry.seen.items() if state)
        return RankMissing(f"{names} did not come to {what} ({how}{seen}). {CAUSES} {END}", sorted(inquiry.missing))
    if inquiry.failure is None and inquiry.answered.is_set() and not inquiry.is_alive():
        return RankMissing(
            f"all ranks came to {what}, but the connection between them failed ({how}): look at the network. {END}"
        )
    return _of_the_store(inquiry, what, how)


def _of_the_store(inquiry: _Inquiry, what: str, how: str) -> RankMissing:
    """Nobody could be asked: the store has gone or does not answer."""
    store = _tcp(_default_store())
    if store is None or inquiry.rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        unknown = f"which one is not known, as the store{'' if store is None else f' at {store.host}:{store.port}'} does not answer"
        return RankMissing(f"a rank did not come to {what} ({how}; {unknown}). {CAUSES} {END}")
    gone = (
        f"the store that it hosts at {store.host}:{store.port} {'has gone' if inquiry.failure else 'does not answer'}"
    )
    return RankMissing(f"rank 0 did not come to {what} ({how}; {gone}). {CAUSES} {END}", (0,))


CAUSES = (
    "Usual causes: its data ended before the others' (JoinedBatches is for that), an exception there (its own output says which), "
    "it was killed (memory?), stopped, or slower than the timeout."
)
END = "The process group cannot be used any more: let this process end, and start all ranks anew from the last checkpoint."


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
