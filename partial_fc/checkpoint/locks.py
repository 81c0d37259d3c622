"""File locks that end with the process that holds them: one writer per folder (FolderLock; `exclusive`, which waits for
its turn and keeps out threads, too), mutual exclusion that is wanted, not needed (waiting).

They are POSIX locks (`lockf`). The lock of a folder is on the file `.lock` in it. Unlike `flock` locks they are not
inherited by forked children, so data loading processes that outlive a killed run for a few seconds do not block its
successor. The file names the holder. It is never removed: its existence alone does not mean that the folder is locked.
On a file system without locks nothing is locked, and a warning is logged for a folder.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("partial_fc")

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock on a file, created if necessary; wait until no other process holds it.

    If the file cannot be locked, continue without a lock: that costs duplicate work, not correctness. Threads of one
    process do not exclude each other.
    """
    file: IO[str] | None = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


_of_threads: dict[str, threading.Lock] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def exclusive(folder: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of an existing folder, alone among all processes and the threads of this one.

    Waits up to `timeout` seconds. Raises BlockingIOError, which names the holder, if that was not enough, and OSError
    if the folder cannot be written. Must not be nested.
    """
    deadline = time.monotonic() + timeout
    with _guard:
        of_threads = _of_threads.setdefault(os.path.realpath(folder), threading.Lock())
    if not of_threads.acquire(timeout=timeout):
        raise BlockingIOError(f"{folder} is being written by another thread of this process; try again later")
    try:
        held = _wait_for(folder, deadline)
        try:
            yield
        finally:
            held.close()
    finally:
        of_threads.release()


def _wait_for(folder: Path, deadline: float) -> _Held:
    while True:
        try:
            return _Held(folder)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


class FolderLock:
    """The exclusive right to write to a folder. Objects of one process share it; it ends with the last release()."""

    # closing any descriptor of a file ends all POSIX locks of the process on it, so there must be one per folder
    _open: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: _Held | None = None

    def acquire(self) -> None:
        """Lock the folder, created if necessary.

        Raises BlockingIOError if another process holds it, OSError if it cannot be written.
        """
        if self._held is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        key = os.path.realpath(self.folder)
        held = FolderLock._open.get(key)
        if held is None:
            held = _Held(self.folder)
            FolderLock._open[key] = held
        self._held = held

    def release(self) -> None:
        self._held = None

    @property
    def held(self) -> bool:
        return self._held is not None


class _Held:
    """The open and locked file of one folder."""

    def __init__(self, folder: Path) -> None:
        self.file: IO[str] = (folder / LOCK).open("a+")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                log.warning(
                    "%s is on a file system without locks (%s): make sure that only one run writes to it", folder, error
                )
                return
            holder = self._holder()
            self.close()
            raise BlockingIOError(
                f"{folder} is being written by another run{holder}; wait for it to end, stop it, "
                "or choose another folder"
            ) from None
        here = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk: the folder is locked all the same
            self.file.truncate(0)
            os.write(self.file.fileno(), json.dumps(here).encode())  # nothing is left that a close would write again

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.file.seek(0)
            holder = json.loads(self.file.read())
            return f" (process {int(holder['process'])} on {holder['host']}, since {holder['since']})"
        return ""

    def __del__(self) -> None:
        if hasattr(self, "file"):  # not if it could not be opened
            self.close()

    def close(self) -> None:
        """Unlock the folder, whatever the disk says of the file."""
        with contextlib.suppress(OSError):
            self.file.close()
