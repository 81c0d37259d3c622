"""Matrices in safetensors files, read and written in blocks of rows, by any number of processes.

    bytes 0..8        length n of the header, little-endian
    bytes 8..8 + n    JSON: {name: {"dtype": "F32", "shape": [C, D], "data_offsets": [start, stop]}, "__metadata__": {name: text}}
    then              the tensors, row-major and little-endian, one after the other; offsets count from here

    read     SafetensorsRows(path, name).rows(a, b)      the bytes of these rows, into memory of a block
    write    create, then write_rows in each process     a temporary file of full size; every process writes its rows where they belong
             publish                                     one move to its name, when all of it is on the disk

The `safetensors` library is not used: it cannot write a tensor in parts, so that one process would have to hold the matrix `[C, D]`, and
it reads by mapping the whole file, so that resident memory grows to the size of what was read. The files are the library's own format,
and each reads what the other wrote (tests/weights/test_exchange.py).

Nothing in a file is believed: lengths, shapes and offsets are checked against each other and against the size of the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

LARGEST_HEADER = 100_000_000  # the format's own limit
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
    """Where a tensor lies: `start` is counted from the beginning of the file. dtype: None for one that is not known here."""

    dtype: torch.dtype | None
    shape: torch.Size
    start: int


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file holds. FileNotFoundError if there is none, ValueError if it is truncated, damaged or of another format."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(_exactly(file, 8), "little") if size >= 8 else 0
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ValueError(
                    f"{path} is no safetensors file, or truncated: its first 8 bytes must be the length of a header within it"
                )
            header = json.loads(_exactly(file, length).decode(), object_pairs_hook=_no_name_twice)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is no JSON") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path} is damaged: {error}") from error
    metadata = header.pop(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path} is damaged: its header is no table of tensors and texts")
    tensors = {name: _entry(path, name, given, 8 + length, size) for name, given in header.items()}
    _check_apart(path, {name: given["data_offsets"] for name, given in header.items()})
    return Header(tensors, metadata)


def _check_apart(path: Path, places: dict[str, list[int]]) -> None:
    """ValueError if two tensors share bytes."""
    end, before = 0, ""
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start < end and start < stop:
            raise ValueError(f"{path} is damaged: {before} and {name} share bytes")
        end, before = max(end, stop), name


def _entry(path: Path, name: str, given: Any, data: int, size: int) -> Entry:
    try:
        code, shape, (start, stop) = given["dtype"], given["shape"], given["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: its header does not say where {name} is") from None
    numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or start > stop:
        raise ValueError(f"{path} is damaged: its header gives {name} the shape {shape} and the place {[start, stop]}")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is damaged: {name} is {shape} of {code}, but has {stop - start} bytes")
    if data + stop > size:
        raise ValueError(f"{path} is truncated: {name} ends at byte {data + stop}, the file at {size}; copy it again")
    return Entry(dtype, torch.Size(shape), data + start)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is twice in its header")
    return table


def _exactly(file: BinaryIO, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(file, memoryview(buffer))
    return bytes(buffer)


def _fill(file: BinaryIO, view: memoryview) -> None:
    """Read until `view` is full; one call may read less."""
    while len(view):
        read = file.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise ValueError("it ends before its data; it was changed while it was read")
        view = view[read:]


class SafetensorsRows:
    """The tensor `name` of a safetensors file as a `RowSource`: `rows(a, b)` reads these rows and holds nothing else.

    Raises FileNotFoundError or ValueError, naming the file, if there is no such tensor or the file is not whole.
    """

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.path, self.name = Path(path), name
        tensors = read_header(path).tensors
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}; it has {', '.join(sorted(tensors)) or 'none'}")
        entry = tensors[name]
        if entry.dtype is None or not entry.shape:
            what = "a single number" if entry.dtype is not None else "of a dtype that is not known here"
            raise ValueError(f"{path}: {name} is {what}, not a tensor with rows")
        self.shape, self.dtype, self._start = entry.shape, entry.dtype, entry.start

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a to b, `[b - a, ...]`, on the CPU."""
        row_shape = self.shape[1:]
        row_bytes = row_shape.numel() * self.dtype.itemsize
        if not 0 <= a <= b <= self.shape[0]:
            raise IndexError(f"rows {a}..{b} of {self.shape[0]}")
        if not (b - a) * row_bytes:
            return torch.empty(b - a, *row_shape, dtype=self.dtype, device="cpu")
        buffer = bytearray((b - a) * row_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + a * row_bytes)
                _fill(file, memoryview(buffer))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return torch.frombuffer(buffer, dtype=self.dtype).view(b - a, *row_shape)


# ---------------------------------------------------------------------------------------------------- writing


def temporary_name(path: Path, token: int | None = None) -> Path:
    """A name beside `path` that no other process uses, of a token that processes can agree on."""
    return path.with_name(f".{path.name}.{secrets.randbits(48) if token is None else token:012x}.tmp")


def create(path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], metadata: Mapping[str, str]) -> None:
    """Make a file with the header of these tensors (name -> shape, dtype) and room for their data; one process does it.

    OSError if there is no room for all of it, or the folder cannot be written.
    """
    # the widest first: each tensor then starts at a multiple of its element's size, as readers that map the file want it
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in ordered:
        if dtype not in NAMES:
            raise ValueError(
                f"{name} is {dtype}, which these files are not written in; cast it to one of {', '.join(NAMES.values())}"
            )
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        size = 8 + len(text) + end
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            file.truncate(size)  # a system that cannot reserve: a full disk is met when rows are written


class RowWriter:
    """One process's way into a file that `create` made: `with RowWriter(path) as writer: writer.write_rows("weight", first, rows)`.

    Leaving it, the rows are on the disk. Processes write different rows, each through a writer of its own.
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
        """Write rows first, first + 1, ...: `[n, ...]` of any device, in the dtype of the file. A copy of them is made: give a block."""
        entry = self._tensors[name]
        assert (
            entry.dtype == rows.dtype and entry.shape[1:] == rows.shape[1:] and 0 <= first <= entry.shape[0] - len(rows)
        )
        if not rows.numel():
            return
        buffer = bytearray(rows.nbytes)
        torch.frombuffer(buffer, dtype=rows.dtype).view(rows.shape).copy_(rows.detach())
        self._file.seek(entry.start + first * entry.shape[1:].numel() * rows.dtype.itemsize)
        view = memoryview(buffer)
        while len(view):
            view = view[self._file.write(view) :]


def check_free(path: Path, overwrite: bool) -> None:
    """FileExistsError if a file is there that is not to be replaced."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; choose another name, or say that it is to be overwritten")


def publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a file that is complete its name."""
    check_free(path, overwrite)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, is on the disk then
    finally:
        os.close(folder)
