"""Asked to stop: signals that ranks agree on at a step boundary, so that all save together and leave.

    a rank          SIGTERM or SIGUSR1 ── handler ──> `noted`, nothing else; the step goes on
    all ranks       requested(): the largest of their notes, one all-reduce of one number
    the loop        at the end of a step: save, leave with EXIT_CODE

A signal may reach one rank or all, once or several times (a scheduler signals every process, and the launcher passes its own on), so that
only the first counts. Ctrl-C stays what it is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from partial_fc.distributed.missing import naming_the_missing

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class PreemptionGuard:
    """Notes a request to stop and has all ranks agree on it.

        with PreemptionGuard() as guard:
            for step, batch in enumerate(loader):
                ...  # train
                if guard.requested():
                    checkpointer.save(step, **named)
                    checkpointer.wait()
                    sys.exit(guard.EXIT_CODE)

    Inside `with`, the signals end nothing: what is to be done about them is the loop's business. Afterwards they are what they were.

    Args:
        signals: which to note.
        group: the ranks that agree; None for all, or for one process without a process group.

    RuntimeError when entered outside the main thread, where Python handles no signals.
    """

    EXIT_CODE: ClassVar[int] = 75
    """EX_TEMPFAIL of sysexits.h: nothing is wrong, run me again."""

    def __init__(self, signals: Iterable[signal.Signals] = SIGNALS, *, group: dist.ProcessGroup | None = None) -> None:
        self._signals, self._group = tuple(signals), group
        self._before: dict[signal.Signals, Any] = {}
        self.noted: signal.Signals | None = None
        """The first signal that this rank got; no communication."""

    def __enter__(self) -> PreemptionGuard:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PreemptionGuard must be entered in the main thread: Python handles signals in no other")
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
        self.noted = self.noted or signal.Signals(number)

    def requested(self) -> bool:
        """Whether any rank was asked to stop, the same on every rank. Every rank must call it.

        One all-reduce, and a wait for the device with NCCL; asking in every tenth step is as good.
        """
        if not dist.is_initialized():
            return self.noted is not None
        # a number on the CPU where the group takes it, else on this rank's GPU
        on_cpu = "cpu:" in dist.get_backend_config(self._group)
        noted = torch.tensor(
            [int(self.noted is not None)], device="cpu" if on_cpu else torch.accelerator.current_accelerator()
        )
        with naming_the_missing("the question whether to stop", self._group):
            dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        return bool(noted)
