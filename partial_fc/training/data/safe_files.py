"""Reading from files that nobody vouches for: regular ones only, within their bounds, and found changed if they have changed.

read_whole(path)        one small file, such as a picture of a folder
Files                   parts of a few large ones, by (file, offset, length); open descriptors are few, and good after a fork
Strings                 millions of strings as one array of bytes, which forked processes share
cached(...)             arrays that took a pass over the files to make, kept in a cache folder until a file changes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from partial_fc.checkpoint.locks import waiting

Arrays = dict[str, npt.NDArray[Any]]

LARGEST_PICTURE = 256 * 2**20
"""Bytes that one encoded picture may have."""
_OPEN_FILES = 128
_CACHE_VERSION = 2


def _open(path: str | Path) -> tuple[int, os.stat_result]:
    """(descriptor, facts) of a regular file; OSError or ValueError for anything else. A pipe does not keep us waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return descriptor, facts


def read_whole(path: str | Path) -> bytes:
    """All of a regular file of at most LARGEST_PICTURE bytes."""
    descriptor, facts = _open(path)
    try:
        if facts.st_size > LARGEST_PICTURE:
            raise ValueError(f"{facts.st_size:,} bytes are too many for a picture")
        parts, left = [], facts.st_size
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


class Files:
    """Large files to read parts of. Raises OSError if one cannot be opened when it is looked at first, here."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        facts = [path.stat() for path in self.paths]
        self.sizes = [each.st_size for each in facts]
        self.times = [each.st_mtime_ns for each in facts]
        self._open: dict[int, int] = {}

    def read(self, file: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; ValueError if the file ends before, or is not what it was."""
        if offset < 0 or length < 0 or offset + length > self.sizes[file]:
            raise ValueError(
                f"bytes {offset} to {offset + length} lie past the end of {self.paths[file].name} ({self.sizes[file]} bytes)"
            )
        descriptor = self._descriptor(file)
        data = os.pread(descriptor, length, offset)
        while len(data) < length:  # a file system may give less than was asked for
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                raise ValueError(f"{self.paths[file].name} has become shorter since it was opened")
            data += more
        self._check(file, os.fstat(descriptor))  # after reading, so that nothing that was written before passes
        return data

    def _check(self, file: int, facts: os.stat_result) -> None:
        if (facts.st_size, facts.st_mtime_ns) != (self.sizes[file], self.times[file]):
            raise ValueError(f"{self.paths[file].name} has changed since it was opened")

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            descriptor, facts = _open(self.paths[file])
            try:
                self._check(file, facts)
            except ValueError:
                os.close(descriptor)
                raise
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors mean nothing in a process that was not forked

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Strings(Sequence[str]):
    """Strings as bytes uint8 [total] and ends int64 [n]: without an object each, whose reference counts forked processes would copy."""

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        buffer, ends = bytearray(), []
        for each in strings:
            buffer += each.encode("utf-8", "surrogateescape")
            ends.append(len(buffer))
        return cls(np.frombuffer(bytes(buffer), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")


def cache_folder() -> Path:
    """Where indices are kept: $PARTIAL_FC_CACHE, or partial_fc in the user's cache folder."""
    if folder := os.environ.get("PARTIAL_FC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partial_fc"


def cached(kind: str, paths: Sequence[Path], build: Callable[[], Arrays]) -> Arrays:
    """What `build()` makes of the files, or made of them before: taken from the cache if all have their sizes and times still. Of several
    processes one builds, and the others wait for it. Where the cache folder cannot be written, each builds it every time."""
    facts = [[str(path.absolute()), (found := path.stat()).st_size, found.st_mtime_ns] for path in paths]
    stamp = json.dumps([_CACHE_VERSION, kind, facts]).encode()
    key = hashlib.blake2b(json.dumps([kind, [name for name, *_ in facts]]).encode(), digest_size=16).hexdigest()
    file = cache_folder() / f"{kind}-{key}.npz"
    if (made := _kept(file, stamp)) is not None:
        return made
    with waiting(file.with_suffix(".lock")):
        if (made := _kept(file, stamp)) is None:
            made = build()
            with contextlib.suppress(OSError):
                _keep(file, stamp, made)
    return made


def _kept(file: Path, stamp: bytes) -> Arrays | None:
    """What is kept in a file of the cache under that stamp; None if there is none, or not a whole one."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if arrays["stamp"].tobytes() == stamp:
                return {name: arrays[name] for name in arrays.files if name != "stamp"}
    except Exception:  # whatever a damaged file makes numpy raise: it is made anew
        pass
    return None


def _keep(file: Path, stamp: bytes, made: Arrays) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.savez(out, allow_pickle=False, stamp=np.frombuffer(stamp, dtype=np.uint8), **made)
        os.replace(temporary, file)  # a reader sees all of it or none
    except OSError:
        os.unlink(temporary)
        raise
