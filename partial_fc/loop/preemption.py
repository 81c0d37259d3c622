"""Stop on request: ranks agree at a step boundary that a signal has arrived, so that all save and exit together.

    a rank          SIGTERM or SIGUSR1 ── handler ──> `noted`, nothing else; the step continues
    all ranks       requested(): the maximum over all ranks, one all-reduce of one number
    the loop        at the end of a step: save, exit with EXIT_CODE

A signal may reach one rank or all, once or several times (a scheduler signals every process, and the launcher forwards
its own signal), so only the first one counts. Ctrl-C is not changed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from partial_fc.distributed.groups import device_of, ranks_of
from partial_fc.distributed.ranks import naming_the_missing

# Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class PreemptionGuard:
    """Record a request to stop, and let all ranks agree on it.

        with PreemptionGuard() as guard:
            for step, batch in enumerate(loader):
                ...  # train
                if guard.requested():
                    checkpointer.save(step, **named)
                    checkpointer.wait()
                    sys.exit(guard.EXIT_CODE)

    Inside `with`, the signals do not end the process; the loop reacts to them. On exit the previous handlers return.

    Args:
        signals: the signals to record.
        group: the ranks that agree; None for all, or for one process without a process group.
        notice: a line that the first signal writes to standard error at once, since a step may take long; None for
            none.

    Raises RuntimeError when entered outside the main thread, because Python handles signals only there.
    """

    EXIT_CODE: ClassVar[int] = 75
    """EX_TEMPFAIL of sysexits.h: not an error, run it again."""

    def __init__(
        self,
        signals: Iterable[signal.Signals] = SIGNALS,
        *,
        group: dist.ProcessGroup | None = None,
        notice: str | None = None,
    ) -> None:
        self._signals = tuple(signals)
        self._group = group
        self._notice = notice
        self._before: dict[signal.Signals, Any] = {}
        self.noted: signal.Signals | None = None
        """The first signal that this rank has received. Not a collective."""

    def __enter__(self) -> PreemptionGuard:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PreemptionGuard must be entered in the main thread: Python handles signals only there")
        for each in self._signals:
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._before:
            each, handler = self._before.popitem()
            signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted is not None:
            return
        self.noted = signal.Signals(number)
        if self._notice is not None:
            with contextlib.suppress(OSError):  # standard error may be closed
                # print() could be what the signal has interrupted, and is not reentrant; a bar may be on the line
                os.write(2, f"\n{self._notice}\n".encode())

    def requested(self) -> bool:
        """Return whether any rank has received a signal, the same on every rank. Every rank must call it.

        One all-reduce, and with NCCL a wait for the device; calling it every tenth step is enough.
        """
        if not dist.is_initialized():
            return self.noted is not None
        noted = torch.tensor([int(self.noted is not None)], device=device_of(ranks_of(self._group)))
        with naming_the_missing("the agreement whether to stop", self._group):
            dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        return bool(noted)
