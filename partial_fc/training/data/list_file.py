"""A list file: a line `path label` an image; the label is what follows the last white space.

Paths are taken from the list's folder on, or are absolute; lines that are empty or begin with # are passed over. If the label of the
first line is a whole number, so must be all; otherwise labels are names.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from partial_fc.training.data.dataset import EncodedIdentities, number_labels, refuse
from partial_fc.training.data.files import Strings, read_whole
from partial_fc.training.data.names import NAMES, read_names
from partial_fc.training.errors import UserError


class ListIdentities(EncodedIdentities):
    """The images that the file `path` lists. Lines that say nothing useful are left out, or raise UserError, as `on_error` says."""

    def __init__(self, path: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        self.path = Path(path)
        names: list[str] = []
        labels: list[str] = []
        problems: list[str] = []
        try:
            with self.path.open(encoding="utf-8", errors="surrogateescape") as lines:
                for number, line in enumerate(lines, start=1):
                    if not (text := line.strip()) or text.startswith("#"):
                        continue
                    problem = _problem(text, bool(labels) and is_whole(labels[0]))
                    if problem:
                        problems.append(f"{self.path.name} line {number} ({problem})")
                        continue
                    name, label = text.rsplit(None, 1)
                    names.append(name)
                    labels.append(label)
        except OSError as error:
            raise UserError(f"the list {path} cannot be read: {error.strerror}") from error
        refuse(problems, on_error)
        if not names:
            said = f"; the first problem: {problems[0]}" if problems else ""
            raise UserError(f"the list {path} names no images; its lines are `path label`{said}")
        numbered, identities = number_labels(np.array(labels, dtype=np.int64) if is_whole(labels[0]) else labels)
        super().__init__(numbered, identities, image_size, channels)
        if is_whole(labels[0]):
            self.raw_labels = identities
            if int(identities[0]) >= 0:
                self.identity_names = read_names(self.path.parent / NAMES, identities)
        self._names = Strings.of(names)
        self.left_out = problems

    def _name(self, row: int) -> str:
        return self._names[row]

    def _encoded(self, row: int) -> bytes:
        return read_whole(os.path.join(self.path.parent, self._names[row]))

    def files(self) -> Iterable[tuple[str, int]]:
        yield self.path.name, self.path.stat().st_size
        for index in range(len(self)):
            name = self.name_of(index)
            try:
                yield name, os.stat(os.path.join(self.path.parent, name)).st_size
            except OSError:
                yield name, -1


def is_whole(text: str) -> bool:
    """Whether it is a whole number that fits 64 bits, and nothing else: no 1_000, no ٣."""
    digits = text[1:] if text[:1] in "+-" else text
    return digits.isascii() and digits.isdigit() and len(digits) <= 18


def _problem(text: str, whole: bool) -> str | None:
    parts = text.rsplit(None, 1)
    if len(parts) < 2:
        return "there is a path or a label, not both"
    path, label = parts
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        return f"the path {path!r} leads upwards"
    if "\0" in path:
        return "the path has a zero byte"
    if whole and not is_whole(label):
        return f"the label {label!r} is no whole number"
    return None
