"""Locks that end with the process that holds them, however it ends: one writer a folder (FolderLock), one process after another (waiting).

They are locks of POSIX (`lockf`); a folder's is on the file `.lock` in it. Unlike those of `flock` they are not inherited by forked
children, so that data loading processes which outlive a killed run for a few seconds do not keep its folder from the run that goes on. The
file says who holds it; it stays behind, and says nothing by being there. Where a file system has no locks, nothing is locked, and a warning
is logged for a folder.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
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
    """Wait until no other process is here with this file, which is made if need be; hold nothing where that cannot be had: no lock is
    better than an error, since nothing but time is lost. Of one process, all threads may be here."""
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
            file.close()


class FolderLock:
    """The right to write into one folder. Objects of one process share it; it is free again when the last of them has released it."""

    # closing any descriptor of a file ends all POSIX locks that the process has on it, so there must be one for each folder
    _open: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: _Held | None = None

    def acquire(self) -> None:
        """Take the folder, which is made if need be. BlockingIOError if another process has it, OSError if it cannot be written."""
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
    def __init__(self, folder: Path) -> None:
        self.file: IO[str] = (folder / LOCK).open("a+")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                log.warning(
                    "%s is on a file system without locks (%s): nothing keeps two runs from writing into it",
                    folder,
                    error,
                )
                return
            holder = self._holder()
            self.file.close()
            raise BlockingIOError(
                f"{folder} is being written by another run{holder}; wait until it has ended, stop it, or choose another folder"
            ) from None
        self.file.truncate(0)
        here = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        json.dump(here, self.file)
        self.file.flush()

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self.file.seek(0)
            holder = json.loads(self.file.read())
            return f" (process {int(holder['process'])} on {holder['host']}, since {holder['since']})"
        return ""

    def __del__(self) -> None:
        self.file.close()
