"""The rows of a gallery in memory, brought up to date from its files.

manifest ── new segments ──> rows that came, rows that went ──> numbers [n], owners [n], index

Only what changed is read and moved in the index. Numbers rise; `owners` are places in `names`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partial_fc.training.errors import UserError
from partial_fc.training.gallery.index import CENTRES, PART, Coder, Index
from partial_fc.training.gallery.manifest import Manifest, Stamp, read_manifest
from partial_fc.training.gallery.segments import Floats, Integers, Rows, Segment

TRIES = 20  # to read a gallery whose files another process replaces meanwhile
Hit = tuple[int, float]
"""(row number, cosine)"""


class Loaded:
    """What a gallery's folder holds, as of `manifest`."""

    manifest: Manifest

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.stamp: Stamp | None = None  # of the manifest that is held
        self._segments: dict[str, Segment] = {}
        self.numbers: Integers = np.empty(0, dtype=np.int64)
        self.owners: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.names: list[str] = []
        self.places: dict[str, int] = {}
        self._index: Index | None = None
        self._codes: str | None = None

    @property
    def index(self) -> Index:
        assert self._index is not None
        return self._index

    def refresh(self) -> None:
        """Read the folder as it is now. UserError if it is damaged."""
        for left in reversed(range(TRIES)):
            manifest, stamp = read_manifest(self.folder)
            try:
                self.apply(manifest)
            except FileNotFoundError as error:  # replaced by another process since the manifest was read
                if left:
                    continue
                raise UserError(f"the gallery {self.folder} is damaged: {error.filename} is missing") from error
            self.stamp = stamp
            return

    def apply(self, manifest: Manifest) -> None:
        """Hold what the manifest says. FileNotFoundError if a file is gone; then nothing has changed here."""
        segments = {
            entry.name: self._segments.get(entry.name)
            or Segment(self.folder / entry.name, entry.size, entry.rows, manifest.dimension)
            for entry in manifest.segments
        }
        numbers = np.concatenate([np.empty(0, np.int64), *(segment.numbers for segment in segments.values())])
        if (np.diff(numbers) <= 0).any():
            raise UserError(f"the gallery {self.folder} is damaged: row numbers do not rise; restore it from a copy")
        numbers = np.setdiff1d(numbers, removed_numbers(self.folder, manifest), assume_unique=True)
        codes = None if manifest.codes is None else manifest.codes.name
        coder = None if codes is None else read_coder(self.folder, manifest)
        try:
            if self._index is None or codes != self._codes:
                self._forget()
                self._index = Index(manifest.dimension, self.embeddings_at, coder)
                self._codes = codes
            if manifest.codes is not None:
                self._index.candidates = manifest.codes.candidates
            self._remove(np.setdiff1d(self.numbers, numbers, assume_unique=True))
            self._add(np.setdiff1d(numbers, self.numbers, assume_unique=True), segments)
        except BaseException:  # half of it may have been done: the next refresh begins anew
            self._forget()
            raise
        self._segments = segments
        self.manifest = manifest

    def _remove(self, gone: Integers) -> None:
        if not len(gone):
            return
        self.index.remove(gone)
        kept = ~np.isin(self.numbers, gone, assume_unique=True)
        used, owners = np.unique(self.owners[kept], return_inverse=True)
        self.numbers = self.numbers[kept]
        self.owners = owners
        self.names = [self.names[place] for place in used.tolist()]
        self.places = {name: place for place, name in enumerate(self.names)}

    def _add(self, came: Integers, segments: dict[str, Segment]) -> None:
        """Add the rows of the numbers `came`, which are above those that are here."""
        if not len(came):
            return
        chosen = {name: np.isin(segment.numbers, came, assume_unique=True) for name, segment in segments.items()}
        chosen = {name: which for name, which in chosen.items() if which.any()}
        self._own(chosen, segments)
        coder = self.index.coder
        if coder is not None and not len(self.index):
            codes = [segments[name].codes(coder.size)[which] for name, which in chosen.items()]
            self.index.fill(came, np.concatenate(codes))
        else:
            for name, which in chosen.items():
                for rows in _chosen_rows(segments[name], which):
                    self.index.add(rows)
        self.numbers = np.concatenate((self.numbers, came))

    def _own(self, chosen: dict[str, npt.NDArray[np.bool_]], segments: dict[str, Segment]) -> None:
        """Note the identities of rows that came."""
        owners = []
        for name, which in chosen.items():
            identities = segments[name].identities()
            for place in np.flatnonzero(which).tolist():
                owner = self.places.setdefault(identities[place], len(self.names))
                if owner == len(self.names):
                    self.names.append(identities[place])
                owners.append(owner)
        self.owners = np.concatenate((self.owners, np.array(owners, dtype=np.int64)))

    def embeddings_at(self, numbers: Integers) -> Floats:
        """Return the embeddings `[n, D]` of rows, by their rising numbers `[n]`."""
        parts = [np.empty((0, self.manifest.dimension), dtype=np.float32)]
        start = 0
        for segment in self._segments.values():
            after = int(np.searchsorted(numbers, segment.numbers[-1], side="right")) if len(segment) else start
            if after > start:
                parts.append(segment.embeddings_at(numbers[start:after]))
                start = after
        return np.concatenate(parts) if len(parts) != 2 else parts[1]

    def check_new(self, identities: Iterable[str]) -> None:
        """Raise UserError if one of the identities is enrolled already."""
        known = list(dict.fromkeys(name for name in identities if name in self.places))
        if known:
            more = f" and {len(known) - 1:,} more are" if len(known) > 1 else " is"
            raise UserError(
                f"{known[0]!r}{more} enrolled in {self.folder} already; to add images to an identity use --existing "
                "extend, to enrol it anew --existing replace"
            )

    def numbers_of(self, identities: set[str]) -> Integers:
        """Return the row numbers of some identities."""
        places = [self.places[name] for name in identities if name in self.places]
        return self.numbers[np.isin(self.owners, places)]

    def rows_at(self, numbers: Integers) -> Iterator[Rows]:
        """Yield the rows of these numbers."""
        for segment in self._segments.values():
            which = np.isin(segment.numbers, numbers)
            if which.any():
                yield from _chosen_rows(segment, which)

    def segment_of(self, number: int) -> Segment:
        """Return the segment with a row."""
        return next(each for each in self._segments.values() if len(each) and number <= each.numbers[-1])

    def holds(self, number: int) -> bool:
        place = int(np.searchsorted(self.numbers, number))
        return place < len(self.numbers) and int(self.numbers[place]) == number

    def name_of(self, number: int) -> str:
        """Return the identity of a row."""
        return self.names[int(self.owners[np.searchsorted(self.numbers, number)])]

    def search(self, queries: Floats, k: int) -> list[list[Hit]]:
        """Return for each unit query `[m, D]` the best row of each of up to k identities, best first."""
        found: list[list[Hit]] = [[] for _ in range(len(queries))]
        wanted = min(k, len(self.names))
        depth = min(len(self.numbers), k if len(self.names) == len(self.numbers) else 4 * k)
        wider = 1
        left = np.arange(len(queries) if wanted else 0)
        while len(left):
            cosines, numbers = self.index.search(queries[left], depth, wider)
            owners = self.owners[np.searchsorted(self.numbers, numbers.clip(0)).clip(max=len(self.owners) - 1)]
            short = []
            for place, query in enumerate(left.tolist()):
                found[query] = _each_once(owners[place], numbers[place], cosines[place], wanted)
                if len(found[query]) < wanted:
                    short.append(query)
            if depth == len(self.numbers):
                break
            left = np.array(short, dtype=np.int64)
            depth = min(len(self.numbers), 4 * depth)
            wider *= 4
        return found


def _each_once(owners: Integers, numbers: Integers, cosines: Floats, wanted: int) -> list[Hit]:
    """Return the first row of each owner, up to `wanted`; numbers of −1 are none."""
    seen: set[int] = set()
    hits: list[Hit] = []
    for owner, number, cosine in zip(owners.tolist(), numbers.tolist(), cosines.tolist(), strict=True):
        if number < 0 or len(hits) == wanted:
            break
        if owner not in seen:
            seen.add(owner)
            hits.append((number, max(-1.0, min(1.0, cosine))))
    return hits


def removed_numbers(folder: Path, manifest: Manifest) -> Integers:
    """Return the numbers of the rows of the segments that were removed."""
    if manifest.removed is None:
        return np.empty(0, dtype=np.int64)
    return _array(folder / manifest.removed, np.dtype(np.int64), 1).astype(np.int64)


def read_coder(folder: Path, manifest: Manifest) -> Coder:
    """Return what makes the codes of the index."""
    assert manifest.codes is not None
    path = folder / manifest.codes.name
    try:
        with np.load(path, allow_pickle=False) as arrays:
            coder = Coder(arrays["rotation"], arrays["centres"])
        padded = 8 * manifest.codes.size
        shapes = [(manifest.dimension, padded), (padded // PART, CENTRES, PART)]
        for array, shape in zip((coder.rotation, coder.centres), shapes, strict=True):
            if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}")
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise _damaged(path, error) from error
    return coder


def _chosen_rows(segment: Segment, which: npt.NDArray[np.bool_]) -> Iterator[Rows]:
    """Yield the rows of a segment where `which` `[n]` is true, in batches."""
    start = 0
    for rows in segment.batches():
        here = which[start : start + len(rows)]
        start += len(rows)
        if here.any():
            yield rows if here.all() else rows.chosen(here)


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path} cannot be read: {error.strerror}")
    return UserError(f"{path} is damaged ({' '.join(str(error).split())}); restore it from a copy")


def _array(path: Path, dtype: np.dtype[np.generic], ndim: int) -> npt.NDArray[np.generic]:
    try:
        array: npt.NDArray[np.generic] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if array.dtype != dtype or array.ndim != ndim:
            raise ValueError(f"it holds {array.dtype} in {array.ndim} dimensions")
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise _damaged(path, error) from error
    return array
