"""InsightFace's RecordIO: train.rec, train.idx, property; read and written without mxnet.

    train.rec   records, each  magic u32 | flag 3 bits, length 29 bits | data | zeros up to a multiple of 4   (little endian)
                flag 0: a whole record. 1, 2, 3: first, middle, last part of one whose data had the magic in it, which joins the parts
    data        flag u32 | label f32 | id u64 | id2 u64 | `flag` labels f32, if flag > 0 | the encoded picture
    record 0    no picture: labels (n + 1, n + 1 + C). Records 1..n are pictures; n + 1 .. n + C are identities, without a picture, with
                labels (first, last + 1): whose pictures. Without a record 0 of this kind, all records are pictures. From 2**24 records
                on a float32 has rounded these numbers: then what has no picture and two labels is an identity
    train.idx   a line `key <tab> byte` a record
    property    classes,height,width

Sources: dmlc-core `recordio.h` and `src/recordio.cc`, mxnet `recordio.py`. With identity records, labels are known from their ranges, and
a picture's own label is compared when it is loaded; without them, the label of every picture is read once and kept in the cache.
Nothing is believed: every length and offset is compared with the size of the file.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from partial_fc.training.data.dataset import EncodedIdentities, number_labels, refuse
from partial_fc.training.data.formats.file_labels import NAMES, read_names
from partial_fc.training.data.safe_files import LARGEST_PICTURE, Arrays, Files, Strings, cached
from partial_fc.training.errors import UserError

MAGIC = 0xCED7230A
_FIRST_READ = 16384  # enough for most pictures of faces, so that a record is read at once
_HEADER = struct.Struct("<II")
_IMAGE = struct.Struct("<IfQQ")
_MOST_RECORDS = 2**31
_LARGEST_LABEL = 2**24  # of a float32; beyond it whole numbers have gaps

IntArray = npt.NDArray[np.int64]


class RecordIdentities(EncodedIdentities):
    """The pictures of `rec` (a .rec file, its .idx beside it). Raises UserError for an index that is none, or a record 0 that cannot be
    read; records without a readable label are left out, or raise UserError, as `on_error` says."""

    def __init__(self, rec: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        rec = Path(rec)
        idx = rec.with_suffix(".idx")
        if not idx.is_file():
            raise UserError(f"{rec} has no index: there is no {idx.name} beside it")
        try:
            self._files = Files([rec])
            self.keys, self.offsets = read_index(idx, self._files.sizes[0])
        except OSError as error:
            raise UserError(f"{error.filename or rec} cannot be read: {error.strerror}") from error
        self._rec, self._idx = rec, idx
        where = self._by_ranges()
        if where is None:
            made = cached("recordio", [rec, idx], self._scan)
            keys, labels = made["keys"], made["labels"]
            problems = list(Strings(made["problems"], made["problem_ends"]))
            refuse(problems, on_error)
            if not len(keys):
                raise UserError(
                    f"{rec} has no picture with a label" + (f"; the first problem: {problems[0]}" if problems else "")
                )
            self.left_out = problems
        else:
            keys, labels = where
        numbered, names = number_labels(labels)
        super().__init__(numbered, names, image_size, channels)
        self._pictures, self._expected, self.raw_labels = keys, labels, names
        self.identity_names, self.notes = read_names(rec.parent / NAMES, names), list(self._remarks())

    def _name(self, row: int) -> str:
        return f"{self._rec.name}#{int(self._pictures[row])}"

    def _encoded(self, row: int) -> memoryview:
        flag_labels, picture = unpack(self._record(int(self._pictures[row])))
        label = _whole(flag_labels[0])
        if label != int(self._expected[row]):
            raise ValueError(f"its label is {label}, but the identity's range says {int(self._expected[row])}")
        return picture

    def files(self) -> Iterable[tuple[str, int]]:
        for path in (self._rec, self._idx):
            yield path.name, path.stat().st_size

    def _record(self, key: int) -> bytes:
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise ValueError(f"the index has no record {key}")
        return read_record(self._files, int(self.offsets[place]))

    def _first_record(self) -> tuple[int, int] | None:
        """(n + 1, n + 1 + C) of record 0; None if it is a picture as the others are."""
        try:
            labels, picture = unpack(self._record(0)) if self.keys[0] == 0 else ((0.0,), memoryview(b"x"))
            if len(picture) or len(labels) < 2:
                return None
            return _whole(labels[0], _MOST_RECORDS), _whole(labels[1], _MOST_RECORDS)
        except ValueError as error:
            raise UserError(
                f"{self._rec}: record 0, which says what the others are, cannot be read ({error})"
            ) from error

    def _by_ranges(self) -> tuple[IntArray, IntArray] | None:
        """(keys, labels) of all pictures by the identities' ranges; None where there are no ranges that fit together."""
        first = self._first_record()
        if first is None or first[1] <= first[0] or not 2 <= first[0] < _LARGEST_LABEL or first[1] > len(self.keys):
            return None
        end, last = first
        keys, labels, seen, total = [], [], set(), 0
        for identity in tqdm(range(end, last), desc="identities", unit="", leave=False, mininterval=1, delay=2):
            try:
                (low, high, *_), _ = unpack(self._record(identity))
                start, stop = _whole(low, _MOST_RECORDS), _whole(high, _MOST_RECORDS)
                if not 1 <= start <= stop <= end:
                    return None
                if start == stop:
                    continue
                label = _whole(unpack(self._record(start))[0][0])
            except ValueError:
                return None
            total += stop - start
            if label in seen or total >= end:
                return None
            seen.add(label)
            keys.append(np.arange(start, stop, dtype=np.int64))
            labels.append(np.full(stop - start, label, dtype=np.int64))
        if total != end - 1:
            return None
        together = np.concatenate(keys)
        order = together.argsort(kind="stable")
        if not np.array_equal(together[order], np.arange(1, end)):
            return None
        return together[order], np.concatenate(labels)[order]

    def _scan(self) -> Arrays:
        """Keys and labels of all pictures, of their own headers."""
        first = self._first_record()
        rounded = first is not None and first[0] >= _LARGEST_LABEL
        keys = self.keys if first is None else self.keys[(self.keys >= 1) & (rounded | (self.keys < first[0]))]
        good, labels, problems = [], [], []
        for key in tqdm(
            keys.tolist(), desc=f"labels of {self._rec.name}", unit="", leave=False, mininterval=1, delay=2
        ):
            try:
                found, picture = unpack(self._record(key))
                if rounded and not len(picture) and len(found) == 2:
                    continue  # an identity
                if not len(picture):
                    raise ValueError("there is no picture in it")
                labels.append(_whole(found[0]))
                good.append(key)
            except ValueError as error:
                problems.append(f"{self._rec.name}#{key} ({error})")
        said = Strings.of(problems)
        return {
            "keys": np.array(good, dtype=np.int64),
            "labels": np.array(labels, dtype=np.int64),
            "problems": said.data,
            "problem_ends": said.ends,
        }

    def _remarks(self) -> Iterable[str]:
        """Where the file `property` says something else."""
        path = self._rec.with_name("property")
        if not path.is_file():
            yield "there is no file `property`"
            return
        text = path.read_text(errors="replace")[:200].strip()
        with contextlib.suppress(ValueError):
            classes, *_ = (int(part) for part in text.split(","))
            if classes != self.num_identities:
                yield f"`property` says {classes:,} classes; the records have {self.num_identities:,}"
            return
        yield f"`property` is not `classes,height,width` but {text!r}"


def read_index(path: Path, size: int) -> tuple[IntArray, IntArray]:
    """(keys, offsets) int64 of an .idx file, by rising key; UserError for lines that are none, double keys, offsets past `size`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a file without lines, numpy only warns
            table = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None, encoding="latin1")
    except (ValueError, OverflowError, Warning):
        raise UserError(f"{path} is no index: {_bad_line(path)}") from None
    if table.shape[1] != 2:
        raise UserError(f"{path} is no index: {_bad_line(path)}")
    keys, offsets = table.T
    outside = np.flatnonzero((offsets < 0) | (offsets + _HEADER.size > size))
    if len(outside):
        at = int(outside[0])
        raise UserError(
            f"{path} says that record {keys[at]} is at byte {offsets[at]:,}, past the end of {path.stem}.rec ({size:,} bytes)"
            + (f", and so it does of {len(outside) - 1:,} more" if len(outside) > 1 else "")
            + "; one of the two files is damaged, or they belong to different sets"
        )
    order = keys.argsort(kind="stable")
    keys, offsets = keys[order], offsets[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise UserError(f"{path} has record {keys[int(twice[0])]} twice")
    return keys, offsets


def _bad_line(path: Path) -> str:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            parts = line.split()
            if parts and (len(parts) != 2 or not all(part.isdigit() and len(part) <= 18 for part in parts)):
                return f"line {number} is {line[:60].strip()!r}, and should be a key and an offset"
    return "it is empty"


def read_record(files: Files, offset: int, file: int = 0) -> bytes:
    """The data of the record at `offset`, its parts joined; ValueError for one that is damaged or cut short."""
    size = files.sizes[file]
    parts: list[bytes] = []
    total = 0
    while True:
        if offset + _HEADER.size > size:
            raise ValueError(f"the record is cut short: it goes past the end of the file ({size:,} bytes)")
        block = files.read(file, offset, min(_FIRST_READ, size - offset))
        magic, packed = _HEADER.unpack_from(block)
        if magic != MAGIC:
            raise ValueError(
                f"there is no record at byte {offset:,}: its magic number is {magic:#010x}, not {MAGIC:#010x}"
            )
        flag, length = packed >> 29, packed & (1 << 29) - 1
        begin = offset + _HEADER.size
        if length > LARGEST_PICTURE:
            raise ValueError(
                f"the record says that it has {length:,} bytes, more than a picture may have ({LARGEST_PICTURE:,})"
            )
        if begin + length > size:
            raise ValueError(
                f"the record is cut short: {length:,} bytes from byte {begin:,} on go past the end of the file ({size:,} bytes)"
            )
        if flag not in ((2, 3) if parts else (0, 1)):
            raise ValueError(
                f"the part at byte {offset:,} has flag {flag}, which cannot {'follow' if parts else 'begin a record'}"
            )
        end = _HEADER.size + length
        parts.append(block[_HEADER.size : end] if end <= len(block) else files.read(file, begin, length))
        if flag in (0, 3):
            return parts[0] if len(parts) == 1 else _HEADER.pack(MAGIC, 0)[:4].join(parts)
        total += length
        if total > LARGEST_PICTURE:
            raise ValueError(f"the record has more than {LARGEST_PICTURE:,} bytes")
        offset = begin + (length + 3) // 4 * 4


def unpack(record: bytes) -> tuple[tuple[float, ...], memoryview]:
    """(labels, encoded picture) of a record's data; ValueError if it is too short for what it says."""
    if len(record) < _IMAGE.size:
        raise ValueError(f"the record has {len(record)} bytes, too few for the header of an image")
    flag, label, _, _ = _IMAGE.unpack_from(record)
    end = _IMAGE.size + 4 * flag
    if end > len(record):
        raise ValueError(f"the record has {len(record):,} bytes, too few for {flag:,} labels")
    labels = struct.unpack_from(f"<{flag}f", record, _IMAGE.size) if flag else (label,)
    return labels, memoryview(record)[end:]


def _whole(label: float, limit: int = _LARGEST_LABEL) -> int:
    if not (0 <= label < limit and label == int(label)):  # false of NaN, too
        raise ValueError(f"its label is {label}, no whole number from 0 to {limit - 1}")
    return int(label)


def pack(labels: tuple[float, ...], picture: bytes | memoryview, key: int) -> bytes:
    """The data of a record: one label or several, and an encoded picture."""
    flag = len(labels) if len(labels) > 1 else 0
    header = _IMAGE.pack(flag, 0.0 if flag else labels[0], key, 0)
    return header + (struct.pack(f"<{flag}f", *labels) if flag else b"") + bytes(picture)


def frame(data: bytes) -> bytes:
    """A record as it lies in the file, in parts where the magic number lies in the data at a multiple of 4."""
    if len(data) >= 1 << 29:
        raise ValueError(f"{len(data):,} bytes are too many for a record")
    magic = _HEADER.pack(MAGIC, 0)[:4]
    cuts, at = [], data.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 4 <= len(data) // 4 * 4:
            cuts.append(at)
            at = data.find(magic, at + 4)
        else:
            at = data.find(magic, at + 1)
    out, start = bytearray(), 0
    for number, cut in enumerate(cuts):
        out += _HEADER.pack(MAGIC, (1 if number == 0 else 2) << 29 | cut - start) + data[start:cut]
        start = cut + 4
    out += _HEADER.pack(MAGIC, (3 if cuts else 0) << 29 | len(data) - start) + data[start:]
    return bytes(out) + bytes(-len(out) % 4)
