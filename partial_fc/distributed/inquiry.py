"""After a failed collective: which ranks did not reach it?

    note       each rank that reached the collective and saw it fail writes a note to the process group's store
    wait       for the notes of the other ranks: up to GRACE, but only SETTLE once a single note is absent, or once a
               rank is known to have exited: in a ring its neighbours alone hear of it at once, and the ranks behind
               them when those have ended, so that many notes may be absent though one rank is missing
    conclude   members of the group without a note are missing, and the conclusion is written to the store. If no note
               is absent, the other ranks' conclusions are used: some of them may have failed because of a rank in
               another group
    probe      if nobody is missing at all, the machines try to reach each other (machines.py)
    report     the message and the ranks of a `RankMissing`, which ranks.py raises

None of this uses collectives, which would fail as well. If the store does not respond, what is missing is the rank that
hosts it, or its machine, or the network to that: ranks know beforehand which machine it is (machines.py).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from partial_fc.distributed.failures import failure_of, tell_own
from partial_fc.distributed.machines import (
    PROBE,
    Process,
    has_exited,
    is_stopped,
    machines_of,
    probe,
    process_of,
    state_of,
    store_host,
)
from partial_fc.distributed.store import (
    BUSY,
    SILENCE,
    agent_hosts_store,
    default_store,
    own_connection,
    reach,
    tcp_store,
)

GRACE = 10.0  # seconds to wait for the notes of ranks that were still computing when the collective failed
SETTLE = 1.0  # seconds to wait for the last note, once all ranks but one have written theirs
MACHINES = 8  # at most, that a message names
POLL = 0.05  # seconds between two looks at the store

# keys in the store, each followed by "/" and a global rank
REACHED = "partial_fc/reached"  # the collective that this rank reached, and that failed
CONCLUDED = "partial_fc/concluded"  # JSON list of the ranks that this rank found missing
EXITED = "partial_fc/exited"  # the process of this rank has exited, as another rank knows

CAUSES = (
    "Usual causes there: it ran other code (under `if rank == 0`, or a batch was left out), its data ended before the "
    "others' (use JoinedBatches), it raised an exception (see its own output), it was killed (out of memory?) or "
    "stopped, or it is slower than the timeout."
)
MACHINE = "Its machine may have failed, or the network to it."
TOGETHER = (
    "Every rank of the group must call each of them, in the same order, and none of them under `if rank == 0`. (The "
    "exchange of a batch is that of a forward, head(embeddings, labels), or of gather.)"
)
END = "The process group can no longer be used: let this process end, and restart all ranks from the last checkpoint."

# What gloo and NCCL write. Specific, because a DataLoader's errors also mention timeouts and connections.
_BACKENDS = re.compile(r"gloo|caused pair closure|NCCL|nccl")
_PEER_ERRORS = re.compile(
    r"gloo/transport|gloo/rendezvous|caused pair closure|connectFullMesh|ncclSystemError|ncclRemoteError"
    r"|[Tt]imed? ?out|[Cc]onnection (?:was )?(?:closed|reset|refused)|remote process"
)
_OWN_ERRORS = re.compile(
    r"enforce fail|op\.preamble|ncclInvalidUsage|ncclInvalidArgument|ncclUnhandledCudaError|ncclInternalError"
    r"|invalid usage|invalid argument|[Uu]nhandled cuda|Duplicate GPU|CUDA error"
)
_CLOSED_BY = re.compile(r"[Cc]onnection (?:was )?(?:closed|reset) by (?:remote )?peer \[([^\]]+)\]")
_TIMEOUT = re.compile(r"[Tt]imed out (?:after )?waiting (?:for )?(\d+) ?ms")


# ---------------------------------------------------------------------------------------------- which ranks are missing


class RankMissing(RuntimeError):
    """A rank did not reach a collective: it has exited, was killed or stopped, is slower than the timeout, or has come
    to another collective.

    Raised on every remaining rank. The process group cannot be used afterwards: the process should end.

    Args:
        ranks: global ranks that are missing; empty if they could not be determined, and where all ranks came, but to
            different collectives.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


def is_peer_error(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank or the connection to it.

    Sizes that differ between ranks, and what NCCL reports about this process (invalid usage, one GPU for two ranks, an
    error of CUDA), are no peer's absence.
    """
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    of_backend = isinstance(error, dist.DistBackendError) or bool(_BACKENDS.search(text))
    if not isinstance(error, RuntimeError) or not of_backend:
        return False
    return bool(_PEER_ERRORS.search(text) and not _OWN_ERRORS.search(text))


class _Inquiry(threading.Thread):
    """Writes this rank's note, waits for the others' and concludes.

    It is a thread, because a store whose host is stopped never responds.

    where: the collective that each rank of `members` came to
    missing: global ranks of `members` without a note, or those that other ranks found missing
    seen: the error that each missing rank has noted, and the state of its process, in words
    processes: of all ranks of which one is of interest for the message
    apart: pairs of ranks whose machines do not reach each other, though no rank is missing
    late: other ranks found this rank missing
    closed_by: the address from which a connection was closed, or ""
    gone: those among several absent ranks that have exited; the others may wait for them, and are not missing
    """

    def __init__(self, rank: int, what: str, members: list[int], closed_by: str = "") -> None:
        super().__init__(daemon=True, name="partial_fc missing ranks")
        self.rank = rank
        self.what = what
        self.where: dict[int, str] = {}
        self.members = members
        self.answered = threading.Event()  # the store has responded, or failed
        self.missing: set[int] = set()
        self.seen: dict[int, str] = {}
        self.processes: dict[int, Process] = {}
        self.apart: list[tuple[int, int]] = []
        self.late = False
        self.closed_by = closed_by
        self.gone: set[int] = set()
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._ask(own_connection(default_store()))
        except Exception as error:  # the host of the store has exited, or this kind of store has no such operation
            self.failure = error
        finally:
            self.answered.set()

    def _ask(self, store: Any) -> None:
        store.set(f"{REACHED}/{self.rank}", self.what)
        absent = self._wait(store, REACHED, self.members, time.monotonic() + GRACE, self._some_have_exited)
        self.missing = self.gone or absent
        present = [rank for rank in self.members if rank not in absent]
        self.where = dict(zip(present, _read(store, [f"{REACHED}/{rank}" for rank in present]), strict=True))
        store.set(f"{CONCLUDED}/{self.rank}", json.dumps(sorted(self.missing)))
        if not absent:
            self._read_conclusions(store)
        for rank in sorted(self.missing) or self.members:
            process = self._process(rank, store)
            if rank in self.missing:
                state = "" if process is None else state_of(process)
                self.seen[rank] = ", and ".join(filter(None, (failure_of(rank, store), state)))
        if not self.missing:
            with suppress(OSError):  # this machine has lost its address
                self.apart = probe(self.rank, self.processes, store)
        if self.rank == 0:  # it may host the store: keep it until the others have read from it
            self._wait(store, CONCLUDED, present, time.monotonic() + GRACE, settle=SILENCE)

    def _wait(
        self,
        store: Any,
        key: str,
        ranks: list[int],
        deadline: float,
        enough: Callable[[Any, set[int]], bool] | None = None,
        settle: float | None = None,
    ) -> set[int]:
        """Wait until all `ranks` have written `key`, or time is up, or the absent ones are known `enough`, or there is
        one absent for `settle` seconds (SETTLE, if not given); return the ranks that have not."""
        absent = set(ranks)
        one_absent_since, look = None, time.monotonic() + SETTLE
        settle = SETTLE if settle is None else settle
        while True:
            absent = _absent(store, key, sorted(absent))
            self.answered.set()
            now = time.monotonic()
            if len(absent) == 1 and one_absent_since is None:
                one_absent_since = now
            settled = one_absent_since is not None and now > one_absent_since + settle
            if not absent or now > deadline or settled:
                return absent
            if enough is not None and len(absent) > 1 and now > look:
                look = now + SETTLE
                if enough(store, absent):
                    return absent
            time.sleep(POLL)

    def _some_have_exited(self, store: Any, absent: set[int]) -> bool:
        """Return whether absent ranks have exited, as far as any rank knows; note which, and tell the others."""
        there = [rank for rank in absent if self._process(rank, store) is not None]
        gone = {rank for rank in there if has_exited(self.processes[rank])}
        by_address = [rank for rank in there if self.closed_by and self.processes[rank].address == self.closed_by]
        if len(by_address) == 1 and self.processes[by_address[0]].is_elsewhere:
            gone.update(by_address)
        for rank in gone:
            store.set(f"{EXITED}/{rank}", "")
        self.gone = gone | (absent - _absent(store, EXITED, sorted(absent)))
        return bool(self.gone)

    def _process(self, rank: int, store: Any) -> Process | None:
        """Return the process of a rank, which the store is asked for once; None if it was not registered."""
        if rank not in self.processes and (found := process_of(rank, store)) is not None:
            self.processes[rank] = found
        return self.processes.get(rank)

    def _read_conclusions(self, store: Any) -> None:
        """All ranks reached the collective: one failed because of a rank in another group, or this rank was late."""
        others = [rank for rank in self.members if rank != self.rank]
        # a rank of another group, too, concludes when it has waited for the notes of that
        self._wait(store, CONCLUDED, others, time.monotonic() + GRACE + SETTLE, settle=GRACE + SETTLE)
        for rank in others:
            key = f"{CONCLUDED}/{rank}"
            if store.check([key]):
                self.missing.update(json.loads(store.get(key)))
        self.late = self.rank in self.missing


def _absent(store: Any, key: str, ranks: list[int]) -> set[int]:
    """Return the ranks that have not written `key`. One question where all have, and few for each that has not: every
    rank asks the one store."""
    if not ranks or store.check([f"{key}/{rank}" for rank in ranks]):
        return set()
    if len(ranks) == 1:
        return set(ranks)
    half = len(ranks) // 2
    return _absent(store, key, ranks[:half]) | _absent(store, key, ranks[half:])


def _read(store: Any, keys: list[str]) -> list[str]:
    """Return what stands under keys that are there: by one question where this kind of store can answer it."""
    found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
    return [bytes(value).decode() for value in found]


# ---------------------------------------------------------------------------------------------------- the message


def explain_failure(
    error: BaseException, what: str, group: dist.ProcessGroup | None, seconds: float
) -> tuple[str, list[int]] | None:
    """Return the message of a `RankMissing` and its ranks; None for an error of this rank, which the others are told.

    error: torch's. what: what the collective was for. seconds: from its start to its failure.
    """
    if not is_peer_error(error):
        tell_own(error, what)
        return None
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    closed_by = _CLOSED_BY.search(str(error))
    inquiry = _Inquiry(dist.get_rank(), what, members, closed_by[1] if closed_by else "")
    inquiry.start()
    _await_answer(inquiry)
    if inquiry.answered.is_set():
        inquiry.join(GRACE + 2 * SETTLE + 3 * PROBE + BUSY)
    timeout = _TIMEOUT.search(str(error))
    how = (
        f"waited {int(timeout[1]) / 1000:g} s, the timeout"
        if timeout
        else f"the connection was closed after {seconds:.1f} s, before the timeout"
    )
    missing = sorted(inquiry.missing)
    if inquiry.late:
        late = "after the other ranks had given up waiting for it: it was stopped, or is slower than the timeout"
        return f"rank {inquiry.rank} (this rank) reached {what} {late}. {END}", missing
    if missing:
        seen = "".join(f"; rank {rank}: {state}" for rank, state in inquiry.seen.items() if state)
        places = _places_of({rank: inquiry.processes[rank] for rank in missing if rank in inquiry.processes})
        causes = f"{CAUSES} {MACHINE}" if places else CAUSES
        return f"{names_of(missing)} did not reach {what} ({how}{seen}{places}). {causes} {END}", missing
    if inquiry.failure is None and inquiry.answered.is_set() and not inquiry.is_alive():
        if inquiry.apart:
            return f"all ranks live, but {_apart_of(inquiry)}: {what} failed ({how}). {END}", []
        if len(set(inquiry.where.values())) > 1:
            return f"{come_apart(inquiry.where)} {END}", []
        places = _places_of(inquiry.processes)
        failed = f"all ranks reached {what}, but the connection between them failed ({how}{places})"
        return f"{failed}: check the network, which holds again where it was cut. {END}", []
    return _explain_by_store(inquiry, what, how)


def _await_answer(inquiry: _Inquiry) -> None:
    """Wait until the store has answered or failed, or is known not to answer."""
    if inquiry.answered.wait(SETTLE):
        return
    try:
        reach(default_store())
    except (OSError, NotImplementedError) as error:
        inquiry.failure = error
        return
    host = store_host()
    stopped = host is not None and not agent_hosts_store() and is_stopped(host[1])
    inquiry.answered.wait(SILENCE if stopped else BUSY)


def _explain_by_store(inquiry: _Inquiry, what: str, how: str) -> tuple[str, list[int]]:
    """Return the message and the ranks if the store has failed or does not respond."""
    try:
        store = tcp_store(default_store())
    except NotImplementedError:
        store = None
    host = store_host()
    if store is not None and host is not None and host[1].is_elsewhere:
        ranks, process = host
        there = f"the store there, at {store.host}:{store.port}, does not respond"
        unknown = "What runs there has ended or hangs, or the machine or the network to it has failed."
        return f"{names_of(ranks)} on {process.place} did not reach {what} ({how}; {there}). {unknown} {END}", ranks
    if store is None or inquiry.rank == 0 or agent_hosts_store():
        address = "" if store is None else f" at {store.host}:{store.port}"
        unknown = f"which rank is unknown, because the store{address} does not respond"
        return f"a rank did not reach {what} ({how}; {unknown}). {CAUSES} {END}", []
    state = "is gone" if inquiry.failure else "does not respond"
    hosted = f"the store that it hosts at {store.host}:{store.port} {state}"
    return f"rank 0 did not reach {what} ({how}; {hosted}). {CAUSES} {END}", [0]


def _places_of(processes: dict[int, Process]) -> str:
    """Return on which other machines the ranks are, each with "; " before it; of many machines the first."""
    of: dict[str, list[int]] = {}
    for rank, process in sorted(processes.items()):
        if process.is_elsewhere and process.host:
            of.setdefault(process.place, []).append(rank)
    said = [f"; {names_of(them)} {'is' if len(them) == 1 else 'are'} on {it}" for it, them in of.items()]
    more = [f"; others are on {len(said) - MACHINES} more machines"] if len(said) > MACHINES else []
    return "".join(said[:MACHINES] + more)


def _apart_of(inquiry: _Inquiry) -> str:
    """Return which machines do not reach each other."""
    machines, processes = machines_of(inquiry.processes), inquiry.processes
    pairs = (
        " and ".join(f"{names_of(machines[rank])} on {processes[rank].place}" for rank in pair)
        for pair in inquiry.apart
    )
    return f"there is no connection between {', nor between '.join(pairs)}"


def come_apart(where: dict[int, str]) -> str:
    """Return the message for ranks that came to different collectives. where: of each global rank, its collective."""
    who: dict[str, list[int]] = {}
    for rank, what in where.items():
        who.setdefault(what, []).append(rank)
    places = ", ".join(f"{names_of(them)} {'is' if len(them) == 1 else 'are'} in {what}" for what, them in who.items())
    return f"ranks have come to different collectives: {places}. {TOGETHER}"


def names_of(ranks: list[int]) -> str:
    """Return "rank 1", "ranks 0, 2 and 3"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
