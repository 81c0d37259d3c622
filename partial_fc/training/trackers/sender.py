"""The calls of one tracker, in order, in a thread of their own.

A server that does not answer then holds up no step, and what it raises ends no run:

    sender.ask(start)(seconds)      at the start: waits, raises
    sender.post(log, "row", step)   in mid-run: returns at once; what fails is warned of once, and counted
    sender.close(finish, seconds)   at the end: waits for what is still to be sent, then says what was missed
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from partial_fc.training.trackers.secrets import one_line

BACKLOG = 10_000  # calls that wait at most; a server that was away for long misses later ones
ASKED, END = "asked for", "end"  # calls that somebody waits for


@dataclass
class _Call:
    action: Callable[[], Any]
    what: str
    step: int | None = None
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None


class Sender:
    """The calls of the tracker `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.Queue[_Call] = queue.Queue(BACKLOG)
        self._lock = threading.Lock()  # of what was missed
        self._missed: Counter[str] = Counter()
        self._steps: list[int] = []  # the first and the last step of which a row was missed
        self._left: dict[int, _Call] = {}  # posted, not done yet
        self._warned = False
        # a daemon: a call that never returns does not keep the process from ending
        threading.Thread(target=self._run, name=f"tracker {name}", daemon=True).start()

    def ask(self, action: Callable[[], Any]) -> Callable[[float], Any]:
        """Have `action` done, and return a function of seconds, which waits and returns what `action` returns; it
        raises what that raises, or TimeoutError."""
        call = _Call(action, ASKED)
        self._calls.put(call)

        def answer(seconds: float) -> Any:
            if not call.done.wait(seconds):
                raise TimeoutError
            if call.error is not None:
                raise call.error
            return call.result

        return answer

    def post(self, action: Callable[[], Any], what: str, step: int | None = None) -> None:
        """Have `action` done later. what: its name among what was missed, if it fails; step: of a row."""
        call = _Call(action, what, step)
        with self._lock:
            self._left[id(call)] = call
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._note(call, f"{BACKLOG:,} calls wait for it")

    def close(self, action: Callable[[], Any], seconds: float) -> None:
        """Have `action` done last, wait for it, and say what the tracker has missed."""
        deadline = time.monotonic() + seconds
        last = _Call(action, END)
        try:
            self._calls.put(last, timeout=seconds)
            last.done.wait(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        with self._lock:
            for call in self._left.values():
                self._count(call)
            self._left = {}
        if self._missed:
            self._warn(f"has not taken {self._words()}; the run folder has all of it")
        elif last.error is not None:
            self._warn(f"cannot be closed: {one_line(last.error)}")
        elif not last.done.is_set():
            self._warn(f"was not closed within {seconds:.0f} seconds")

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.result = call.action()
            except BaseException as error:  # whatever a package raises; the thread is its own
                call.error = error
            if call.error is not None and call.what not in (ASKED, END):
                self._note(call, one_line(call.error))
            else:
                with self._lock:
                    self._left.pop(id(call), None)
            call.done.set()
            if call.what == END:
                return

    def _note(self, call: _Call, why: str) -> None:
        with self._lock:
            self._left.pop(id(call), None)
            self._count(call)
            first, self._warned = not self._warned, True
        if first:
            at = "" if call.step is None else f" of step {call.step}"
            self._warn(f"has not taken the {call.what}{at} ({why}); the run goes on")

    def _count(self, call: _Call) -> None:
        self._missed[call.what] += 1
        if call.step is not None:
            self._steps = [*self._steps[:1], call.step]

    def _words(self) -> str:
        parts = []
        for what, count in self._missed.items():
            if what != "row":
                parts.append(what)
            elif count == 1:
                parts.append(f"the row of step {self._steps[0]}")
            else:
                parts.append(f"{count} rows of steps {self._steps[0]} to {self._steps[-1]}")
        return ", ".join(parts)

    def _warn(self, text: str) -> None:
        tqdm.write(f"partial-fc: warning: the tracker {self.name} {text}", file=sys.stderr)
