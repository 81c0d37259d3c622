"""InsightFace's RecordIO data sets: train.rec, train.idx and property, read without mxnet (the bytes: record_file.py).

    record 0                     no image; labels (n + 1, n + 1 + C)
    records 1 .. n               images
    records n + 1 .. n + C       identities: no image; labels (first, last + 1), the range of the identity's images
    property                     classes,height,width

Without such a record 0, all records are images. From 2**24 records on, a float32 label cannot hold these numbers
exactly; then every record with two labels and no image is an identity.

With identity records, labels follow from the ranges, and an image's own label is compared with them when it is loaded.
Without, the label of every image is read once and cached.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from partial_fc.training.data.dataset import EncodedIdentities, raise_if_skipped
from partial_fc.training.data.formats.file_labels import NAMES, number_labels, read_names
from partial_fc.training.data.formats.record_file import MAX_EXACT, IntArray, read_index, read_record, unpack
from partial_fc.training.data.index_cache import Arrays, Strings, cached
from partial_fc.training.data.safe_files import LargeFiles
from partial_fc.training.errors import UserError
from partial_fc.training.files import bytes_of

_MAX_RECORDS = 2**31


class RecordIdentities(EncodedIdentities):
    """The images of the .rec file `rec`, with its .idx beside it.

    Raises UserError for an invalid index, or a record 0 that cannot be read. Records without a readable label are
    skipped and named in `skipped`, or raise UserError, as `on_error` says.
    """

    def __init__(self, rec: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        rec = Path(rec)
        idx = rec.with_suffix(".idx")
        if not idx.is_file():
            raise UserError(f"{rec} has no index: there is no {idx.name} beside it")
        try:
            self._files = LargeFiles([rec])
            self.keys, self.offsets = read_index(idx, self._files.sizes[0])
        except OSError as error:
            raise UserError(f"{error.filename or rec} cannot be read: {error.strerror}") from error
        self._rec = rec
        self._idx = idx
        found = self._labels_from_ranges()
        if found is None:
            index = cached("recordio", [rec, idx], self._read_all_labels)
            keys, labels = index["keys"], index["labels"]
            skipped = list(Strings(index["problems"], index["problem_ends"]))
            raise_if_skipped(skipped, on_error)
            if not len(keys):
                first = f"; the first problem: {skipped[0]}" if skipped else ""
                raise UserError(f"{rec} has no image with a label{first}")
            self.skipped = skipped
        else:
            keys, labels = found
        numbered, names = number_labels(labels)
        super().__init__(numbered, names, image_size, channels)
        self._image_keys = keys
        self._expected_labels = labels
        self.raw_labels = names
        self.identity_names = read_names(rec.parent / NAMES, names)
        self.notes = list(self._check_property())

    def name_at(self, position: int) -> str:
        return f"{self._rec.name}#{int(self._image_keys[position])}"

    def encoded_at(self, position: int) -> memoryview:
        labels, image = unpack(self._record(int(self._image_keys[position])))
        label = _as_integer(labels[0])
        expected = int(self._expected_labels[position])
        if label != expected:
            raise ValueError(f"its label is {label}, but it is in the range of identity {expected}")
        return image

    def files(self) -> Iterable[tuple[str, int]]:
        for path in (self._rec, self._idx):
            yield path.name, path.stat().st_size

    def _record(self, key: int) -> bytes:
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise ValueError(f"the index has no record {key}")
        return read_record(self._files, int(self.offsets[place]))

    def _first_record(self) -> tuple[int, int] | None:
        """Return (n + 1, n + 1 + C) from record 0; None if there is no record 0, or it is an image like the others."""
        if self.keys[0] != 0:
            return None
        try:
            labels, image = unpack(self._record(0))
            if len(image) or len(labels) < 2:
                return None
            return _as_integer(labels[0], _MAX_RECORDS), _as_integer(labels[1], _MAX_RECORDS)
        except ValueError as error:
            raise UserError(
                f"{self._rec}: record 0, which describes the other records, cannot be read ({error})"
            ) from error

    def _labels_from_ranges(self) -> tuple[IntArray, IntArray] | None:
        """Return (keys, labels) of all images from the identities' ranges; None unless they cover 1..n exactly once."""
        first = self._first_record()
        if first is None or first[1] <= first[0] or not 2 <= first[0] < MAX_EXACT or first[1] > len(self.keys):
            return None
        end, last = first
        keys: list[IntArray] = []
        labels: list[IntArray] = []
        seen: set[int] = set()
        total = 0
        for identity in tqdm(range(end, last), desc="identities", unit="", leave=False, mininterval=1, delay=2):
            try:
                (low, high, *_), _ = unpack(self._record(identity))
                start = _as_integer(low, _MAX_RECORDS)
                stop = _as_integer(high, _MAX_RECORDS)
                if not 1 <= start <= stop <= end:
                    return None
                if start == stop:
                    continue
                label = _as_integer(unpack(self._record(start))[0][0])
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
        all_keys = np.concatenate(keys)
        order = all_keys.argsort(kind="stable")
        if not np.array_equal(all_keys[order], np.arange(1, end)):
            return None
        return all_keys[order], np.concatenate(labels)[order]

    def _read_all_labels(self) -> Arrays:
        """Return keys and labels of all images, read from each record; the arrays are cached."""
        first = self._first_record()
        rounded = first is not None and first[0] >= MAX_EXACT  # record 0 does not say exactly where the images end
        keys = self.keys if first is None else self.keys[(self.keys >= 1) & (rounded | (self.keys < first[0]))]
        image_keys = []
        image_labels = []
        problems = []
        for key in tqdm(
            keys.tolist(), desc=f"labels of {self._rec.name}", unit="", leave=False, mininterval=1, delay=2
        ):
            try:
                labels, image = unpack(self._record(key))
                if rounded and not len(image) and len(labels) == 2:
                    continue  # an identity
                if not len(image):
                    raise ValueError("there is no image in it")
                image_labels.append(_as_integer(labels[0]))
                image_keys.append(key)
            except ValueError as error:
                problems.append(f"{self._rec.name}#{key} ({error})")
        texts = Strings.of(problems)
        return {
            "keys": np.array(image_keys, dtype=np.int64),
            "labels": np.array(image_labels, dtype=np.int64),
            "problems": texts.data,
            "problem_ends": texts.ends,
        }

    def _check_property(self) -> Iterable[str]:
        """Yield a note if the file `property` is missing, unreadable or contradicts the records."""
        path = self._rec.with_name("property")
        if not path.is_file():
            yield "there is no file `property`"
            return
        text = bytes_of(path)[:200].decode(errors="replace").strip()
        with contextlib.suppress(ValueError):
            classes, *_ = (int(part) for part in text.split(","))
            if classes != self.num_identities:
                yield f"`property` says {classes:,} classes; the records have {self.num_identities:,}"
            return
        yield f"`property` is not `classes,height,width` but {text!r}"


def _as_integer(label: float, limit: int = MAX_EXACT) -> int:
    if not (0 <= label < limit and label == int(label)):  # NaN fails the comparison, too
        raise ValueError(f"its label is {label}, and must be an integer from 0 to {limit - 1}")
    return int(label)
