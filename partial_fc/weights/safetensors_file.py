"""Read and write matrices in safetensors files in blocks of rows, from any number of processes.

    bytes 0..8        length n of the header, little-endian
    bytes 8..8 + n    JSON: {name: {"dtype": "F32", "shape": [C, D], "data_offsets": [start, stop]},
                      "__metadata__": {name: text}}
    then              the tensors, row-major and little-endian, one after the other; offsets count from here

    read     SafetensorsRows(path, name).rows(a, b)      reads only these rows
    write    create, then write_rows in each process     a temporary file of full size; each process writes its own rows
             hold, delete_left                           what a killed process has left is deleted by the next
             publish                                     rename it atomically once everything is on the disk

The `safetensors` library is not used. It cannot write a tensor in parts, so one process would have to hold the matrix
`[C, D]`; and it maps the whole file to read it, so resident memory grows to the size of what was read. The files have
the library's format, and each reads what the other wrote (tests/weights/test_exchange.py).

A file is not trusted: lengths, shapes and offsets are checked against each other and against the size of the file.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LARGEST_HEADER = 100_000_000  # the limit of the format
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Shape = torch.Size | tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored. start: byte position in the file. dtype: None if it is not in `DTYPES`."""

    dtype: torch.dtype | None
    shape: torch.Size
    start: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of a file.

    Raises FileNotFoundError if there is no file, ValueError if it is truncated, damaged or in another format.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(_exactly(file, 8), "little") if size >= 8 else 0
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ValueError(
                    f"{path} is truncated or not a safetensors file: its first 8 bytes must be the length of a header "
                    "within it"
                )
            header = json.loads(_exactly(file, length).decode(), object_pairs_hook=_unique_names)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is damaged: {error}") from error
    metadata = header.pop(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path} is damaged: its header is not a table of tensors and texts")
    tensors = {name: _entry(path, name, given, 8 + length, size) for name, given in header.items()}
    _check_overlap(path, {name: given["data_offsets"] for name, given in header.items()})
    return Header(tensors, metadata)


def _check_overlap(path: Path, places: dict[str, list[int]]) -> None:
    """ValueError if two tensors overlap."""
    end, previous = 0, ""
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start < end and start < stop:
            raise ValueError(f"{path} is damaged: {previous} and {name} overlap")
        end, previous = max(end, stop), name


def _entry(path: Path, name: str, given: Any, data: int, size: int) -> Entry:
    try:
        code, shape, (start, stop) = given["dtype"], given["shape"], given["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: the entry of {name} in its header is incomplete") from None
    numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or start > stop:
        raise ValueError(f"{path} is damaged: its header gives {name} the shape {shape} and the bytes {[start, stop]}")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is damaged: {name} has shape {shape} of {code}, but {stop - start} bytes")
    if data + stop > size:
        raise ValueError(f"{path} is truncated: {name} ends at byte {data + stop}, the file at {size}; copy it again")
    return Entry(dtype, torch.Size(shape), data + start)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header has a name twice")
    return table


def _exactly(file: BinaryIO, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(file, memoryview(buffer))
    return bytes(buffer)


def _fill(file: BinaryIO, view: memoryview) -> None:
    """Read until `view` is full. One call of readinto may read less."""
    while len(view):
        read = file.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise ValueError("it ended too early: it was changed while it was being read")
        view = view[read:]


class SafetensorsRows:
    """The tensor `name` of a safetensors file as a `RowSource`: `rows(a, b)` reads only these rows.

    Raises FileNotFoundError or ValueError, naming the file, if there is no such tensor or the file is incomplete.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.path = Path(path)
        self.name = name
        tensors = read_header(path).tensors
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}; it has {', '.join(sorted(tensors)) or 'none'}")
        entry = tensors[name]
        if entry.dtype is None or not entry.shape:
            problem = (
                "is a single number, not a tensor with rows" if entry.dtype is not None else "has an unknown dtype"
            )
            raise ValueError(f"{path}: {name} {problem}")
        self.shape = entry.shape
        self.dtype = entry.dtype
        self._start = entry.start

    def rows(self, a: int, b: int) -> Tensor:
        """Return rows a to b, `[b - a, ...]`, on the CPU."""
        row_shape = self.shape[1:]
        row_bytes = row_shape.numel() * self.dtype.itemsize
        if not 0 <= a <= b <= self.shape[0]:
            raise IndexError(f"rows {a} to {b} are out of range; there are {self.shape[0]}")
        if not (b - a) * row_bytes:
            return torch.empty(b - a, *row_shape, dtype=self.dtype, device="cpu")
        buffer = bytearray((b - a) * row_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + a * row_bytes)
                _fill(file, memoryview(buffer))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        except OSError as error:
            raise type(error)(f"{self.path} cannot be read: {error.strerror or error}") from error
        return torch.frombuffer(buffer, dtype=self.dtype).view(b - a, *row_shape)


# ---------------------------------------------------------------------------------------------------- writing


def temporary_name(path: Path, token: int | None = None) -> Path:
    """Return an unused name in the folder of `path`. token: a random number, if several processes must agree on it."""
    return path.with_name(f".{path.name}.{secrets.randbits(48) if token is None else token:012x}.tmp")


def delete_left(path: Path) -> None:
    """Delete the temporary files for `path` of processes that were killed: those that nobody holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if _locked(file):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(temporary: Path) -> Iterator[None]:
    """Hold a temporary file, so that no other process deletes it, where the file system has locks."""
    file = temporary.open("rb")
    try:
        _locked(file)
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written by this descriptor
            file.close()


def _locked(file: BinaryIO) -> bool:
    """Return whether a lock of this open file could be taken. Unlike a POSIX lock, it does not end when another
    descriptor of this process is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or there are no such locks
        return False
    return True


def create(path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], metadata: Mapping[str, str]) -> None:
    """Create a file with the header of these tensors (name -> shape, dtype) and space for their data, in one process.

    OSError if there is not enough disk space, or the folder cannot be written.
    """
    # widest dtype first: each tensor then starts at a multiple of its element size, which readers that map need
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in ordered:
        if dtype not in NAMES:
            raise ValueError(
                f"{name} is {dtype}, which cannot be written; cast it to one of {', '.join(NAMES.values())}"
            )
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        size = 8 + len(text) + end
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            file.truncate(size)  # space cannot be reserved: a full disk fails when rows are written


def _write(file: FileIO, data: bytes | bytearray) -> None:
    """Write all of it. One call of write may write less."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


class RowWriter:
    """Writes rows to a file of `create`: `with RowWriter(path) as writer: writer.write_rows("weight", first, rows)`.

    On exit the rows are on the disk. Several processes may write different rows, each with its own writer.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = read_header(path).tensors
        self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Write `rows [n, ...]`, in the dtype of the file, as rows first, first + 1, ...; copies them to the CPU."""
        entry = self._tensors[name]
        assert (
            entry.dtype == rows.dtype and entry.shape[1:] == rows.shape[1:] and 0 <= first <= entry.shape[0] - len(rows)
        )
        if not rows.numel():
            return
        buffer = bytearray(rows.nbytes)
        torch.frombuffer(buffer, dtype=rows.dtype).view(rows.shape).copy_(rows.detach())
        self._file.seek(entry.start + first * entry.shape[1:].numel() * rows.dtype.itemsize)
        _write(self._file, buffer)


def check_free(path: Path, overwrite: bool) -> None:
    """FileExistsError if `path` exists and must not be overwritten."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists; choose another name or overwrite it")


def publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a complete file to its final name."""
    check_free(path, overwrite)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name is on the disk, too
    finally:
        os.close(folder)
