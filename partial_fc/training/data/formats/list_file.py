"""A list file: one image per line. The first line decides which of these forms the file has.

    path label                 the label is what follows the last white space                 .txt .lst .list
    number <tab> label <tab> path      mxnet's im2rec; a label may be 3.000000                .txt .lst .list .tsv
    aligned <tab> path <tab> label     InsightFace's; the first column, usually 1, is unused  .txt .lst .list .tsv
    path <tab> label                                                                          .tsv
    path,label                 with quotes as in CSV                                          .csv

Paths are absolute or relative to the list's folder. Empty lines and lines that begin with # are ignored. If the label
of the first line is an integer, all must be; otherwise labels are names.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from partial_fc.training.data.dataset import EncodedIdentities, raise_if_skipped
from partial_fc.training.data.formats.file_labels import NAMES, is_integer, number_labels, read_names
from partial_fc.training.data.index_cache import Strings
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.errors import UserError

_CHECKED_PATHS = 100  # at least one of the first 100 paths must exist
_TABLES = (".csv", ".tsv")
_LABEL_WORDS = frozenset(
    ("label", "labels", "identity", "identity_id", "id", "class", "class_id", "person", "person_id", "target")
)

Parse = Callable[[list[str]], tuple[str, str]]
"""From the columns of a line to (path, label); raises ValueError, with the reason, if they have another form."""


class ListIdentities(EncodedIdentities):
    """The images that the list file `path` names.

    Lines that cannot be used are skipped and named in `skipped`, or raise UserError, as `on_error` says. A list whose
    first 100 paths are all missing always raises UserError.
    """

    def __init__(self, path: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        self.path = Path(path)
        names: list[str] = []
        labels: list[str] = []
        skipped: list[str] = []
        notes: list[str] = []
        parse: Parse | None = None
        suffix = self.path.suffix.lower()
        try:
            with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                for number, columns in _lines(file, suffix):
                    where = f"{self.path.name} line {number}"
                    try:
                        parse = parse or _form_of(columns, suffix)
                        name, label = _validated(*parse(columns), bool(labels) and is_integer(labels[0]))
                        if not labels and label.lower() in _LABEL_WORDS and not os.path.exists(self._full_path(name)):
                            if suffix not in _TABLES:
                                raise ValueError("it looks like a header, which only .csv and .tsv files may have")
                            notes.append(f"{where} is a header: {name!r} does not exist, and {label!r} names a column")
                            parse = None
                            continue
                    except ValueError as error:
                        skipped.append(f"{where} ({error})")
                        continue
                    names.append(name)
                    labels.append(label)
        except OSError as error:
            raise UserError(f"the list {path} cannot be read: {error.strerror}") from error
        except csv.Error as error:
            raise UserError(
                f"the list {path} is not a CSV file ({error}); fix it, or give it the suffix .txt if it has no commas"
            ) from error
        raise_if_skipped(skipped, on_error)
        self._check_paths(names, skipped)
        integers = is_integer(labels[0])
        numbered, identities = number_labels(np.array(labels, dtype=np.int64) if integers else labels)
        super().__init__(numbered, identities, image_size, channels)
        if integers:
            self.raw_labels = identities
            if int(identities[0]) >= 0:
                self.identity_names = read_names(self.path.parent / NAMES, identities)
        self._names = Strings.of(names)
        self.skipped = skipped
        self.notes = notes

    def _check_paths(self, names: list[str], skipped: list[str]) -> None:
        """Raise UserError if the list names no images, or only images that do not exist."""
        form = {".csv": "`path,label`", ".tsv": "`path<tab>label`"}.get(self.path.suffix.lower(), "`path label`")
        if not names:
            first = f"; the first problem: {skipped[0]}" if skipped else ""
            raise UserError(f"the list {self.path} names no images; its lines must be {form}{first}")
        if not any(os.path.lexists(self._full_path(name)) for name in names[:_CHECKED_PATHS]):
            raise UserError(
                f"the list {self.path} names images that do not exist: none of the first "
                f"{len(names[:_CHECKED_PATHS])} does, and the first should be at {self._full_path(names[0])}; paths "
                f"are relative to the list's folder, and lines must be {form}"
            )

    def _full_path(self, name: str) -> str:
        return os.path.join(self.path.parent, name)

    def name_at(self, position: int) -> str:
        return self._names[position]

    def path_of(self, index: int) -> Path:
        return Path(self._full_path(self.name_of(index)))

    def encoded_at(self, position: int) -> bytes:
        return read_whole(self._full_path(self._names[position]))

    def files(self) -> Iterable[tuple[str, int]]:
        yield self.path.name, self.path.stat().st_size
        for index in range(len(self)):
            name = self.name_of(index)
            try:
                yield name, os.stat(self._full_path(name)).st_size
            except OSError:
                yield name, -1


def _lines(file: IO[str], suffix: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of every line but empty ones and comments.

    Outside of .csv and .tsv files, only lines of mxnet's or InsightFace's form have several columns.
    """
    if suffix == ".csv":
        reader = csv.reader(file, strict=True)
        for columns in reader:
            if any(columns) and not columns[0].startswith("#"):
                yield reader.line_num, columns
        return
    for number, line in enumerate(file, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        columns = text.split("\t")
        if suffix == ".tsv" or (len(columns) == 3 and is_integer(columns[0])):
            yield number, columns
        else:
            yield number, [text]


def _form_of(columns: list[str], suffix: str) -> Parse:
    """Return the function that parses the lines of a file with this first line."""
    if suffix != ".csv" and len(columns) == 3 and is_integer(columns[0]):
        return _mxnet if _as_integer(columns[1]) is not None else _insightface
    return _two_columns if suffix in _TABLES else _at_last_space


def _two_columns(columns: list[str]) -> tuple[str, str]:
    if len(columns) != 2:
        raise ValueError(
            f"it has {len(columns)} column{'s' if len(columns) > 1 else ''}, and must have two: a path and a label"
        )
    return columns[0], columns[1]


def _three_columns(columns: list[str], form: str) -> list[str]:
    if len(columns) != 3:
        raise ValueError(f"it does not have the form {form} of the first line")
    return columns


def _mxnet(columns: list[str]) -> tuple[str, str]:
    _, label, path = _three_columns(columns, "`number<tab>label<tab>path`")
    return path, _as_integer(label) or label


def _insightface(columns: list[str]) -> tuple[str, str]:
    _, path, label = _three_columns(columns, "`aligned<tab>path<tab>label`")
    return path, label


def _at_last_space(columns: list[str]) -> tuple[str, str]:
    parts = "\t".join(columns).rsplit(None, 1)
    if len(parts) < 2:
        raise ValueError("it has a path or a label, but not both")
    return parts[0], parts[1]


def _as_integer(label: str) -> str | None:
    """Return an integer label without the zeros of a float (3.000000 -> 3); None if it is not an integer."""
    digits = re.sub(r"\.0*$", "", label.strip())
    return digits if is_integer(digits) else None


def _validated(path: str, label: str, integer: bool) -> tuple[str, str]:
    """Return (path, label) without surrounding white space; raise ValueError if either cannot be used."""
    path = path.strip()
    label = label.strip()
    if not path or not label:
        raise ValueError("it has a path or a label, but not both")
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        raise ValueError(f"the path {path!r} contains `..`")
    if "\0" in path:
        raise ValueError("the path contains a zero byte")
    if integer and not is_integer(label):
        raise ValueError(f"the label {label!r} is not an integer")
    return path, label
