"""Reading untrusted files: only regular files, only within their bounds, and only while they are unchanged.

read_whole(path)    one small file, such as an image of a folder
LargeFiles          parts of a few large files, by (file, offset, length); has few open descriptors, works after a fork
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partial_fc.training.files import naming

MAX_IMAGE_BYTES = 256 * 2**20
"""Largest size of an encoded image, in bytes."""
_MAX_OPEN_FILES = 128


def _open(path: str | Path) -> tuple[int, os.stat_result]:
    """Open a regular file and return (descriptor, its stat); raise OSError or ValueError for anything else.

    O_NONBLOCK keeps a named pipe from blocking us.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return descriptor, facts


def read_whole(path: str | Path) -> bytes:
    """Return the content of a regular file; raise ValueError if it has more than MAX_IMAGE_BYTES bytes."""
    descriptor, facts = _open(path)
    try:
        if facts.st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{facts.st_size:,} bytes are too many for an image; the limit is {MAX_IMAGE_BYTES:,}")
        parts = []
        left = facts.st_size
        with naming(Path(path)):
            while left > 0 and (part := os.read(descriptor, left)):
                parts.append(part)
                left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


class LargeFiles:
    """Large files of which parts are read. The constructor raises OSError for a file that cannot be found."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        facts = [path.stat() for path in self.paths]
        self.sizes = [each.st_size for each in facts]
        self.times = [each.st_mtime_ns for each in facts]
        self._open: dict[int, int] = {}

    def read(self, file: int, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; raise ValueError if the file ends before, or has changed."""
        if offset < 0 or length < 0 or offset + length > self.sizes[file]:
            raise ValueError(
                f"bytes {offset} to {offset + length} are past the end of {self.paths[file].name} "
                f"({self.sizes[file]} bytes)"
            )
        descriptor = self._descriptor(file)
        with naming(self.paths[file]):
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # a file system may return less than was asked for
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    raise ValueError(f"{self.paths[file].name} has become shorter since it was opened")
                data += more
        # Checked after reading, so that a change before the end of the read is always noticed.
        self._check_unchanged(file, os.fstat(descriptor))
        return data

    def _check_unchanged(self, file: int, facts: os.stat_result) -> None:
        if (facts.st_size, facts.st_mtime_ns) != (self.sizes[file], self.times[file]):
            raise ValueError(f"{self.paths[file].name} has changed since it was opened")

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            descriptor, facts = _open(self.paths[file])
            try:
                self._check_unchanged(file, facts)
            except ValueError:
                os.close(descriptor)
                raise
            if len(self._open) >= _MAX_OPEN_FILES:
                oldest = next(iter(self._open))
                os.close(self._open.pop(oldest))
            self._open[file] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors are only valid in this process and its forks

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
