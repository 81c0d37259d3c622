"""gallery.json: what a gallery is, and which files of its folder count. It is replaced in one move.

write new segments, removed-*.npy, codes-*.npz   ── all on the disk ──>   replace gallery.json   ──>   delete old files

A process that is killed before the replacement leaves files that nobody names; the next change deletes them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from partial_fc.training.errors import UserError
from partial_fc.training.files import sync_folder, told, write_atomically

MANIFEST = "gallery.json"
FORMAT = "partial_fc gallery, 1"
OWN_FILE = re.compile(r"(segment-\d{8}\.arrow|removed-\d{8}\.npy|codes-\d{8}\.npz|\.gallery\.json\.tmp)")

PerIdentity = Literal["mean", "all"]
IndexChoice = Literal["auto", "exact", "codes"]
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class SegmentEntry:
    """A file of rows: its name, its bytes, its rows."""

    name: str
    size: int
    rows: int


@dataclass(frozen=True)
class CodesEntry:
    """The codes of the index: the file of the coder, bytes of a code, and on how many rows it was made.

    recall: the share of sampled queries that find their nearest row with so many candidates.
    """

    name: str
    size: int
    candidates: int
    rows: int
    recall: float


@dataclass(frozen=True)
class Manifest:
    """The content of gallery.json."""

    dimension: int
    per_identity: PerIdentity
    backbone: str
    preprocessing: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    index: IndexChoice = "auto"
    threshold: float | None = None
    calibration: dict[str, Any] | None = None
    next_row: int = 0
    next_file: int = 0
    segments: tuple[SegmentEntry, ...] = ()
    removed: str | None = None
    codes: CodesEntry | None = None

    def new_name(self, kind: str, ending: str) -> tuple[str, Manifest]:
        """Return the name of a new file, and the manifest after it was taken."""
        return f"{kind}-{self.next_file:08d}.{ending}", replace(self, next_file=self.next_file + 1)

    @property
    def files(self) -> set[str]:
        """The files that count."""
        others = (self.removed, None if self.codes is None else self.codes.name)
        return {entry.name for entry in self.segments} | {name for name in others if name is not None}


def stamp_of(folder: Path) -> Stamp:
    """Return what changes whenever the manifest is replaced. UserError if there is none."""
    try:
        found = (folder / MANIFEST).stat()
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a gallery (it has no {MANIFEST}); make one: partial-fc gallery build"
        ) from None
    except OSError as error:
        raise UserError(f"the gallery {folder} cannot be read: {error.strerror}") from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_manifest(folder: Path) -> tuple[Manifest, Stamp]:
    """Return the manifest, and its stamp. UserError for one that is missing, damaged, or of another version."""
    stamp = stamp_of(folder)
    path = folder / MANIFEST
    with told(path, again="restore it from a copy"):
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            content = json.load(file)
        version = content.pop("format")
        if version != FORMAT:
            raise UserError(
                f"{path} has the format {version!r}; this version reads {FORMAT!r}: build the gallery again"
            )
        content["segments"] = tuple(SegmentEntry(**entry) for entry in content["segments"])
        content["codes"] = None if content["codes"] is None else CodesEntry(**content["codes"])
        manifest = Manifest(**content)
        _check(manifest)
    return manifest, stamp


def _check(manifest: Manifest) -> None:
    """Raise ValueError for values that no gallery has."""
    numbers = [manifest.dimension, manifest.next_row, manifest.next_file]
    numbers += [number for entry in manifest.segments for number in (entry.size, entry.rows)]
    if manifest.codes is not None:
        numbers += [manifest.codes.size, manifest.codes.candidates, manifest.codes.rows]
    counted = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not counted or not 1 <= manifest.dimension < 1 << 31:
        raise ValueError("a count is not one")
    if manifest.per_identity not in ("mean", "all") or manifest.index not in ("auto", "exact", "codes"):
        raise ValueError("it has rows or an index of no known kind")
    if not isinstance(manifest.backbone, str) or not isinstance(manifest.preprocessing, dict):
        raise ValueError("it does not name a backbone")
    threshold = manifest.threshold
    if threshold is not None and not (isinstance(threshold, int | float) and math.isfinite(threshold)):
        raise ValueError("its threshold is no number")
    if not all(isinstance(name, str) and OWN_FILE.fullmatch(name) for name in manifest.files):
        raise ValueError("it names files that are not its own")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace gallery.json, when all files that it names are on the disk; then delete the files that do not count."""
    content = {"format": FORMAT, **asdict(manifest)}
    sync_folder(folder)
    write_atomically(folder / MANIFEST, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    sync_folder(folder)
    delete_others(folder, manifest.files)


def delete_others(folder: Path, files: set[str]) -> None:
    """Delete the gallery's own files that are not among `files`, as far as possible."""
    for path in folder.iterdir():
        if OWN_FILE.fullmatch(path.name) and path.name not in files:
            with contextlib.suppress(OSError):
                path.unlink()
