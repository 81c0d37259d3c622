"""Errors of collectives that name the missing rank, where torch says "Connection closed by peer".

    with naming_the_missing("the gather of a batch", group):     around a collective; costs nothing unless it fails
        dist.all_gather_single(...)

If a peer has exited, the collective fails at once on the remaining ranks; if it is stopped or busy elsewhere, at the
process group's timeout. The remaining ranks find out which rank is missing, and each raises `RankMissing` (inquiry.py).
"""

from __future__ import annotations

import time
from types import TracebackType

import torch.distributed as dist

from partial_fc.distributed.inquiry import RankMissing, explain_failure
from partial_fc.distributed.operation import current_operation


class _NamingTheMissing:
    """The context manager of `naming_the_missing`. A plain class, because every collective of a step enters one."""

    __slots__ = ("_group", "_start", "_what")

    def __init__(self, what: str, group: dist.ProcessGroup | None) -> None:
        self._what = what
        self._group = group
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RankMissing) or not dist.is_initialized():
            return
        told = explain_failure(error, current_operation(self._what), self._group, time.monotonic() - self._start)
        if told is not None:
            raise RankMissing(*told) from error


def naming_the_missing(what: str = "a collective", group: dist.ProcessGroup | None = None) -> _NamingTheMissing:
    """Return a context manager that turns an error caused by a missing peer into a `RankMissing` that names the peer.

    The block may hold one collective or a whole training step, with its backward and DistributedDataParallel's
    reductions. Other errors pass unchanged, and the ranks that wait are told. Without a process group it does nothing.

    Args:
        what: the purpose of the collectives, for the message.
        group: the group of the collectives; None for all ranks.
    """
    return _NamingTheMissing(what, group)
