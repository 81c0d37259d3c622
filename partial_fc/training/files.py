"""Files of the application: written so that others see all of one or none of it, read with words for what is wrong.

Python names the file in the error of an open, not in that of a write, a flush or a close: `naming` adds it.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from partial_fc.tiers import pages
from partial_fc.training.errors import UserError


class Hash(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None: ...


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in an OSError that names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        if error.errno is None:  # numpy tells how much was written, not why no more
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def utf8(text: str) -> bytes:
    """Return text as UTF-8. Names of files that are not UTF-8 have their own bytes again; other halves of characters,
    which JSON can have, are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def is_unicode(text: str) -> bool:
    """Return whether text can be written as it is: it has no halves of characters, and is of no name that is not
    UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_of(path: Path, errors: str = "strict") -> str:
    """Return what is in a text file; OSError that names it. errors: "surrogateescape" for a file of names."""
    with naming(path):
        return path.read_text(encoding="utf-8", errors=errors)


def bytes_of(path: Path) -> bytes:
    """Return what is in a file; OSError that names it."""
    with naming(path):
        return path.read_bytes()


@contextmanager
def on_disk(path: Path) -> Iterator[IO[bytes]]:
    """Write a file; it is on the disk afterwards. OSError that names it."""
    with naming(path), _flushed(path) as file:
        yield file


@contextmanager
def _flushed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that others see all of it or none: it takes the place of `path` when it is on the disk.

    After an error `path` is as it was, and nothing else is left. OSError that names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            with _flushed(temporary) as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file as `replacing` does; text as `utf8` encodes it."""
    with replacing(path) as file:
        file.write(utf8(data) if isinstance(data, str) else data)


class _Writing:
    """Only the method that numpy writes with: given a file, it writes past Python, and cannot say what went wrong."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


def write_array(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    """Write an array to a file as .npy."""
    np.lib.format.write_array(_Writing(file), array, allow_pickle=False)  # type: ignore[arg-type]


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as .npy; it is on the disk afterwards. OSError that names the file."""
    with on_disk(path) as file:
        write_array(file, array)


def reserve(path: Path, size: int) -> None:
    """Take room on the disk for a file that is then written as mapped memory: a full disk would end the process
    there. OSError that names the file."""
    with naming(path), path.open("r+b") as file:
        pages.reserve(file.fileno(), 0, size)


def read_through(path: Path) -> None:
    """Read a file that is then mapped: a page that the disk cannot read would end the process there. OSError that
    names the file."""
    with naming(path), path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def append(path: Path, text: str) -> None:
    """Append whole lines to a file. OSError that names it; what of them was written is then cut off, if it can be."""
    data = utf8(text)
    with naming(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class FileSystem:
    """The file system of a folder, as it was when this was made: `sync` writes all that was written to it since then to
    the disk. OSError, which names the folder, if some of it cannot be written.

    This is one call for many small files. An fsync for each of 5,000 images took 9 seconds at the end of a part, and 23
    if done as each was written; one call took 0.1.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = os.open(folder, os.O_RDONLY) if sys.platform == "linux" else None

    def sync(self) -> None:
        if self._file is None:
            if hasattr(os, "sync"):  # not on Windows
                os.sync()
            return
        with naming(self._folder):  # unlike sync, it tells of what could not be written since the folder was opened
            if _library().syncfs(self._file) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            with contextlib.suppress(OSError):
                os.close(file)


@lru_cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def add_to_digest(digest: Hash, path: Path) -> None:
    """Add the content of a file to a digest, a MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


@contextmanager
def told(path: Path, *, again: str, missing: str = "") -> Iterator[None]:
    """Read and check a file of ours: what goes wrong becomes a UserError that names it.

    again: what to do about a damaged file. missing: the whole text for a file that is not there.
    """
    try:
        yield
    except OSError as error:
        absent = missing and isinstance(error, FileNotFoundError)
        raise UserError(missing if absent else f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {again}") from error
