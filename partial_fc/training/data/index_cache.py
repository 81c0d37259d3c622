"""Indices of data sets (labels, offsets, names), made by one pass over the files and kept in a cache folder.

cached(kind, paths, build)    arrays: from the cache while the files keep their sizes and times, else from build()
Strings                       millions of strings in two arrays, which forked processes share
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from partial_fc.checkpoint.locks import waiting
from partial_fc.training.files import utf8

Arrays = dict[str, npt.NDArray[Any]]

_VERSION = 2


class Strings(Sequence[str]):
    """n strings as their bytes uint8 [total] and the end of each int64 [n].

    A list would hold an object for each string, and forked processes would copy its pages as reference counts change.
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        buffer = bytearray()
        ends = []
        for each in strings:
            buffer += utf8(each)
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
    """Return the folder of the cache: $PARTIAL_FC_CACHE, or partial_fc in the user's cache folder."""
    if folder := os.environ.get("PARTIAL_FC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partial_fc"


def cached(kind: str, paths: Sequence[Path], build: Callable[[], Arrays]) -> Arrays:
    """Return `build()` for the files `paths`, or its earlier result if no file has changed its size or time since.

    Of several processes one builds, and the others wait for it. If the cache folder cannot be written to, each builds.
    """
    facts = []
    for path in paths:
        found = path.stat()
        facts.append([str(path.absolute()), found.st_size, found.st_mtime_ns])
    stamp = json.dumps([_VERSION, kind, facts]).encode()
    key = hashlib.blake2b(json.dumps([kind, [name for name, *_ in facts]]).encode(), digest_size=16).hexdigest()
    file = cache_folder() / f"{kind}-{key}.npz"
    if (arrays := _read(file, stamp)) is not None:
        return arrays
    with waiting(file.with_suffix(".lock")):
        arrays = _read(file, stamp)  # another process may have built it while we waited
        if arrays is None:
            arrays = build()
            with contextlib.suppress(OSError):
                _write(file, stamp, arrays)
    return arrays


def _read(file: Path, stamp: bytes) -> Arrays | None:
    """Return the arrays that a file of the cache holds for this stamp; None if it is missing, outdated or damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if arrays["stamp"].tobytes() == stamp:
                return {name: arrays[name] for name in arrays.files if name != "stamp"}
    except Exception:  # numpy raises almost anything for a damaged file; the index is then built again
        pass
    return None


def _write(file: Path, stamp: bytes, arrays: Arrays) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f"{file.stem}.*.tmp"):  # of a process that was killed: this one holds the lock
        left.unlink(missing_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.savez(out, allow_pickle=False, stamp=np.frombuffer(stamp, dtype=np.uint8), **arrays)
        os.replace(temporary, file)  # readers see the whole file or none
    except OSError:
        os.unlink(temporary)
        raise
