"""The error of one rank, told to the ranks that wait for it.

What every rank can find is found in the exchange of a batch, and raised alike. What goes wrong on one rank elsewhere,
such as an allocation that fails between two collectives, leaves the others in the next one: until the process of the
rank has ended, or to the timeout where it goes on.

    the rank that fails    its error, and where it was ── note ──> the process group's store
    the ranks that wait    their collective fails; they read the note and name the error (inquiry.py)

A step that does not fail does none of this. The collectives of the ranks that wait are not ended from here: gloo ends
them with the process, whatever is done to its group before, and NCCL leaves that to the launcher.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from partial_fc.distributed.store import SILENCE, default_store, own_connection

FAILED = "partial_fc/failed"  # key in the store, followed by "/" and a global rank: JSON [words, time]
LONGEST = 200  # characters of an error in a note
TOLD = "told_by_partial_fc"  # attribute of an error that was noted
PACKAGE = __name__.partition(".")[0]


def tell_own(error: BaseException, what: str) -> None:
    """Note an error of this rank in the store, where the others find it. Nothing waits longer than SILENCE for that.

    what: the purpose of the collectives around it, or what the rank was doing.
    """
    if not isinstance(error, Exception) or isinstance(error, StopIteration) or hasattr(error, TOLD):
        return
    setattr(error, TOLD, True)  # the innermost block knows best what it was
    note, key = json.dumps([_words_of(error, what), time.time()]), f"{FAILED}/{dist.get_rank()}"

    def tell() -> None:
        with contextlib.suppress(Exception):  # the store has gone, or is of another kind: the others will not know
            own_connection(default_store()).set(key, note)

    thread = threading.Thread(target=tell, daemon=True, name="partial_fc failure")  # a stopped store never responds
    thread.start()
    thread.join(SILENCE)


def failure_of(rank: int, store: Any) -> str:
    """Return the words of the last error that a rank has noted, and how long ago; "" if it has noted none."""
    key = f"{FAILED}/{rank}"
    if not store.check([key]):
        return ""
    words, then = json.loads(store.get(key))
    return f"{words} ({max(0.0, time.time() - then):.0f} s ago)"


def _words_of(error: Exception, what: str) -> str:
    kind = "ran out of memory" if isinstance(error, torch.OutOfMemoryError) else f"raised {type(error).__name__}"
    frames = ((str(frame.f_globals.get("__name__")), line) for frame, line in traceback.walk_tb(error.__traceback__))
    place = next(((name, line) for name, line in reversed([*frames]) if name.partition(".")[0] == PACKAGE), None)
    where = "" if place is None else f", in {place[0]}, line {place[1]}"
    text = " ".join(str(error).split())
    text = f": {text[:LONGEST]}{'...' * (len(text) > LONGEST)}" if text else ""
    return f"it {kind} in {what}{where}{text}"
