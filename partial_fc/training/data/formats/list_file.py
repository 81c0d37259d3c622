"""A list file: an image a line, in one of these forms.

    path label                 the label is what follows the last white space           .txt .lst .list
    number <tab> label <tab> path      mxnet's im2rec: a label may be 3.000000          .txt .lst .list .tsv
    aligned <tab> path <tab> label     InsightFace's: a number, mostly 1, and no place  .txt .lst .list .tsv
    path <tab> label           .tsv
    path,label                 .csv, with quotes as CSV has them

Paths are taken from the list's folder on, or are absolute; lines that are empty or begin with # are passed over. If the label of the
first line is a whole number, so must be all; otherwise labels are names. The first line says which form it is.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from partial_fc.training.data.dataset import EncodedIdentities, number_labels, refuse
from partial_fc.training.data.formats.file_labels import NAMES, read_names
from partial_fc.training.data.safe_files import Strings, read_whole
from partial_fc.training.errors import UserError

_LOOKED_FOR = 100  # of so many paths, one at least must be there
_TABLES = (".csv", ".tsv")
_LABEL_WORDS = frozenset(
    ("label", "labels", "identity", "identity_id", "id", "class", "class_id", "person", "person_id", "target")
)

Parse = Callable[[list[str]], tuple[str, str]]
"""The (path, label) of a line's columns; ValueError, saying what is wrong, if there are none."""


class ListIdentities(EncodedIdentities):
    """The images that the file `path` lists. Lines that say nothing useful are left out, or raise UserError, as `on_error` says; so does
    a list of which no path is there, whatever it says."""

    def __init__(self, path: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        self.path = Path(path)
        names: list[str] = []
        labels: list[str] = []
        problems: list[str] = []
        notes: list[str] = []
        parse: Parse | None = None
        suffix = self.path.suffix.lower()
        try:
            with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                for number, columns in _lines(file, suffix):
                    where = f"{self.path.name} line {number}"
                    try:
                        parse = parse or _form(columns, suffix)
                        name, label = _checked(*parse(columns), bool(labels) and is_whole(labels[0]))
                        if not labels and label.lower() in _LABEL_WORDS and not os.path.exists(self._place(name)):
                            if suffix not in _TABLES:
                                raise ValueError("it looks like a header, which only .csv and .tsv may have")
                            notes.append(f"{where} is a header: {name!r} is not there, and {label!r} names a column")
                            parse = None
                            continue
                    except ValueError as error:
                        problems.append(f"{where} ({error})")
                        continue
                    names.append(name)
                    labels.append(label)
        except OSError as error:
            raise UserError(f"the list {path} cannot be read: {error.strerror}") from error
        except csv.Error as error:
            raise UserError(
                f"the list {path} is no CSV file ({error}); mend it, or give it the suffix .txt if it has no commas"
            ) from error
        refuse(problems, on_error)
        if not names:
            said = f"; the first problem: {problems[0]}" if problems else ""
            raise UserError(f"the list {path} names no images; its lines are {_form_of(self.path)}{said}")
        if not any(os.path.lexists(self._place(name)) for name in names[:_LOOKED_FOR]):
            raise UserError(
                f"the list {path} names images that are not there: the first is looked for at {self._place(names[0])}, and none of the "
                f"first {len(names[:_LOOKED_FOR])} is there; paths begin at the list's folder, and lines are {_form_of(self.path)}"
            )
        numbered, identities = number_labels(np.array(labels, dtype=np.int64) if is_whole(labels[0]) else labels)
        super().__init__(numbered, identities, image_size, channels)
        if is_whole(labels[0]):
            self.raw_labels = identities
            if int(identities[0]) >= 0:
                self.identity_names = read_names(self.path.parent / NAMES, identities)
        self._names = Strings.of(names)
        self.left_out, self.notes = problems, notes

    def _place(self, name: str) -> str:
        return os.path.join(self.path.parent, name)

    def _name(self, row: int) -> str:
        return self._names[row]

    def _encoded(self, row: int) -> bytes:
        return read_whole(self._place(self._names[row]))

    def files(self) -> Iterable[tuple[str, int]]:
        yield self.path.name, self.path.stat().st_size
        for index in range(len(self)):
            name = self.name_of(index)
            try:
                yield name, os.stat(self._place(name)).st_size
            except OSError:
                yield name, -1


def is_whole(text: str) -> bool:
    """Whether it is a whole number that fits 64 bits, and nothing else: no 1_000, no ٣."""
    digits = text[1:] if text[:1] in "+-" else text
    return digits.isascii() and digits.isdigit() and len(digits) <= 18


def _lines(file: IO[str], suffix: str) -> Iterator[tuple[int, list[str]]]:
    """(number, columns) of every line that says something; one column alone where neither a tab nor the suffix parts them."""
    if suffix == ".csv":
        reader = csv.reader(file, strict=True)
        for columns in reader:
            if any(columns) and not columns[0].startswith("#"):
                yield reader.line_num, columns
        return
    for number, line in enumerate(file, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            columns = text.split("\t")
            yield number, columns if suffix == ".tsv" or (len(columns) == 3 and is_whole(columns[0])) else [text]


def _form(columns: list[str], suffix: str) -> Parse:
    """How to read the lines of a file that has this one."""
    if suffix != ".csv" and len(columns) == 3 and is_whole(columns[0]):
        return _mxnet if _number(columns[1]) is not None else _insightface
    return _two if suffix in _TABLES else _at_last_space


def _form_of(path: Path) -> str:
    return {".csv": "`path,label`", ".tsv": "`path<tab>label`"}.get(path.suffix.lower(), "`path label`")


def _two(columns: list[str]) -> tuple[str, str]:
    if len(columns) != 2:
        raise ValueError(
            f"it has {len(columns)} column{'s' if len(columns) > 1 else ''}, and should have a path and a label"
        )
    return columns[0], columns[1]


def _three(columns: list[str], like: str) -> list[str]:
    if len(columns) != 3:
        raise ValueError(f"it is not {like}, as the first line is")
    return columns


def _mxnet(columns: list[str]) -> tuple[str, str]:
    _, label, path = _three(columns, "`number<tab>label<tab>path`")
    return path, _number(label) or label


def _insightface(columns: list[str]) -> tuple[str, str]:
    _, path, label = _three(columns, "`aligned<tab>path<tab>label`")
    return path, label


def _at_last_space(columns: list[str]) -> tuple[str, str]:
    parts = "\t".join(columns).rsplit(None, 1)
    if len(parts) < 2:
        raise ValueError("there is a path or a label, not both")
    return parts[0], parts[1]


def _number(label: str) -> str | None:
    """A whole number, also one that is written as a float; None for anything else."""
    whole = re.sub(r"\.0*$", "", label.strip())
    return whole if is_whole(whole) else None


def _checked(path: str, label: str, whole: bool) -> tuple[str, str]:
    path, label = path.strip(), label.strip()
    if not path or not label:
        raise ValueError("there is a path or a label, not both")
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        raise ValueError(f"the path {path!r} leads upwards")
    if "\0" in path:
        raise ValueError("the path has a zero byte")
    if whole and not is_whole(label):
        raise ValueError(f"the label {label!r} is no whole number")
    return path, label
