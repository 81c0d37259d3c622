"""The bytes of RecordIO files: train.idx, and the records of train.rec, read and written without mxnet.

    train.rec   records (little endian): magic u32 | flag 3 bits, length 29 bits | data | zeros up to a multiple of 4
                flag 0: a whole record. Flags 1, 2, 3: first, middle, last part of a record whose data contained the
                magic number; the magic number is not stored, and belongs between the parts
    data        flag u32 | label f32 | id u64 | id2 u64 | `flag` labels f32, if flag > 0 | the encoded image
    train.idx   one line `key <tab> byte offset` per record

Sources: dmlc-core `recordio.h` and `src/recordio.cc`, mxnet `recordio.py`. The files are untrusted: every length and
offset is checked against the size of the file.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.safe_files import MAX_IMAGE_BYTES, LargeFiles
from partial_fc.training.errors import UserError
from partial_fc.training.files import naming

MAGIC = 0xCED7230A
MAX_EXACT = 2**24
"""Integers below it are exact in the float32 labels of a record."""
_HEADER = struct.Struct("<II")
_IMAGE_HEADER = struct.Struct("<IfQQ")
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_FIRST_READ = 16384  # enough for most face images, so that a record usually takes one read

IntArray = npt.NDArray[np.int64]


def read_index(path: Path, size: int) -> tuple[IntArray, IntArray]:
    """Return (keys, offsets) int64 of an .idx file, sorted by key.

    Raises UserError for invalid lines, duplicate keys, and offsets outside a .rec file of `size` bytes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # for a file without lines, numpy only warns
            table = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None, encoding="latin1")
    except (ValueError, OverflowError, Warning):
        raise UserError(f"{path} is not a valid index: {_bad_line(path)}") from None
    if table.shape[1] != 2:
        raise UserError(f"{path} is not a valid index: {_bad_line(path)}")
    keys, offsets = table.T
    outside = np.flatnonzero((offsets < 0) | (offsets + _HEADER.size > size))
    if len(outside):
        at = int(outside[0])
        more = f", and so are {len(outside) - 1:,} more" if len(outside) > 1 else ""
        raise UserError(
            f"{path}: record {keys[at]} is at byte {offsets[at]:,}, outside {path.stem}.rec ({size:,} bytes){more}; "
            "one of the two files is damaged, or they belong to different data sets"
        )
    order = keys.argsort(kind="stable")
    keys = keys[order]
    offsets = offsets[order]
    duplicates = np.flatnonzero(keys[1:] == keys[:-1])
    if len(duplicates):
        raise UserError(f"{path} has record {keys[int(duplicates[0])]} twice")
    return keys, offsets


def _bad_line(path: Path) -> str:
    with naming(path), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            parts = line.split()
            if parts and (len(parts) != 2 or not all(part.isdigit() and len(part) <= 18 for part in parts)):
                return f"line {number} is {line[:60].strip()!r}, and must be a key and an offset"
    return "it is empty"


def read_record(files: LargeFiles, offset: int, file: int = 0) -> bytes:
    """Return the data of the record at `offset`, its parts joined; raise ValueError if it is damaged or cut short."""
    size = files.sizes[file]
    parts: list[bytes] = []
    total = 0
    while True:
        if offset + _HEADER.size > size:
            raise ValueError(f"the record is cut short: it continues past the end of the file ({size:,} bytes)")
        block = files.read(file, offset, min(_FIRST_READ, size - offset))
        magic, packed = _HEADER.unpack_from(block)
        if magic != MAGIC:
            raise ValueError(
                f"there is no record at byte {offset:,}: its magic number is {magic:#010x}, not {MAGIC:#010x}"
            )
        flag = packed >> 29
        length = packed & ((1 << 29) - 1)
        begin = offset + _HEADER.size
        if length > MAX_IMAGE_BYTES:
            raise ValueError(
                f"the record claims to have {length:,} bytes, too many for an image (the limit is {MAX_IMAGE_BYTES:,})"
            )
        if begin + length > size:
            raise ValueError(
                f"the record is cut short: {length:,} bytes from byte {begin:,} on continue past the end of the file "
                f"({size:,} bytes)"
            )
        if flag not in ((2, 3) if parts else (0, 1)):
            raise ValueError(
                f"the part at byte {offset:,} has flag {flag}, which cannot {'continue' if parts else 'begin'} a record"
            )
        end = _HEADER.size + length
        parts.append(block[_HEADER.size : end] if end <= len(block) else files.read(file, begin, length))
        if flag in (0, 3):
            return parts[0] if len(parts) == 1 else _MAGIC_BYTES.join(parts)
        total += length
        if total > MAX_IMAGE_BYTES:
            raise ValueError(f"the record has more than {MAX_IMAGE_BYTES:,} bytes")
        offset = begin + (length + 3) // 4 * 4


def unpack(record: bytes) -> tuple[tuple[float, ...], memoryview]:
    """Return (labels, encoded image) from a record's data; raise ValueError if it is too short for its own header."""
    if len(record) < _IMAGE_HEADER.size:
        raise ValueError(f"the record has {len(record)} bytes, too few for the header of an image")
    flag, label, _, _ = _IMAGE_HEADER.unpack_from(record)
    end = _IMAGE_HEADER.size + 4 * flag
    if end > len(record):
        raise ValueError(f"the record has {len(record):,} bytes, too few for {flag:,} labels")
    labels = struct.unpack_from(f"<{flag}f", record, _IMAGE_HEADER.size) if flag else (label,)
    return labels, memoryview(record)[end:]


def pack(labels: tuple[float, ...], image: bytes | memoryview, key: int) -> bytes:
    """Return the data of a record with one label or several, and an encoded image."""
    flag = len(labels) if len(labels) > 1 else 0
    header = _IMAGE_HEADER.pack(flag, 0.0 if flag else labels[0], key, 0)
    return header + (struct.pack(f"<{flag}f", *labels) if flag else b"") + bytes(image)


def frame(data: bytes) -> bytes:
    """Return a record as it is written to the file: in parts if `data` has the magic number at a multiple of 4."""
    if len(data) >= 1 << 29:
        raise ValueError(f"{len(data):,} bytes are too many for a record")
    cuts = []
    at = data.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0 and at + 4 <= len(data) // 4 * 4:
            cuts.append(at)
            at = data.find(_MAGIC_BYTES, at + 4)
        else:
            at = data.find(_MAGIC_BYTES, at + 1)
    out = bytearray()
    start = 0
    for number, cut in enumerate(cuts):
        flag = 1 if number == 0 else 2
        out += _HEADER.pack(MAGIC, flag << 29 | cut - start) + data[start:cut]
        start = cut + 4
    flag = 3 if cuts else 0
    out += _HEADER.pack(MAGIC, flag << 29 | len(data) - start) + data[start:]
    return bytes(out) + bytes(-len(out) % 4)
