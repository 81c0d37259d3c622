"""A change of a gallery: new files, and then the manifest that names them. Until it is published nothing has changed.

    enrol     enrolments ── rows ──>  a new segment; in galleries of means together with the images that are enrolled
    remove    identities ── numbers of their rows ──>  removed-*.npy
    publish   small segments at the end are merged (each keeps at least twice the rows of the next, so that there are
              at most about log2 n), segments that are mostly removed are written anew, codes are made if there are
              many rows; then the manifest is replaced

An error before that deletes the new files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from partial_fc.training.errors import UserError
from partial_fc.training.files import on_disk, save_array
from partial_fc.training.gallery.enrolment import Enrolment, MeanRows, image_rows
from partial_fc.training.gallery.index import (
    FLAT_BELOW,
    GROWTH,
    SAMPLE,
    TRAINED_BY,
    Coder,
    Index,
    choose_candidates,
    exact_nearest,
    similar_queries,
)
from partial_fc.training.gallery.loaded import Loaded, read_coder, removed_numbers
from partial_fc.training.gallery.manifest import CodesEntry, Manifest, SegmentEntry, delete_others, write_manifest
from partial_fc.training.gallery.segments import Floats, Integers, Rows, Segment, write_segment


class Change:
    """A change of the gallery in `folder`, whose lock is held. loaded: the gallery as it is now; None for a new one.

    manifest: what will be published.
    """

    def __init__(self, folder: Path, manifest: Manifest, loaded: Loaded | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.rows = 0  # that were enrolled
        self._before = manifest
        self._loaded = loaded
        self._removed = removed_numbers(folder, manifest)
        self._removes = False

    def __enter__(self) -> Change:
        delete_others(self.folder, self._before.files)  # what a process left that was killed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                delete_others(self.folder, self._before.files)

    # ------------------------------------------------------------------------------------------------ enrolling

    def enrol(self, enrolments: Iterable[Enrolment], existing: str) -> None:
        """Add rows for the enrolments; existing: as in `Gallery.add`."""
        checked = self._resolved(enrolments, existing)
        if self.manifest.per_identity == "all":
            batches = image_rows(checked, self.manifest.dimension, self.manifest.next_row)
        else:
            batches = self._mean_rows(checked, existing)
        self.rows += self._append(self._with_codes(batches))

    def _resolved(self, enrolments: Iterable[Enrolment], existing: str) -> Iterator[Enrolment]:
        """Yield the enrolments; refuse, or remove the old rows of, identities that are enrolled, as `existing` says."""
        for enrolment in enrolments:
            if self._loaded is not None and existing == "refuse":
                self._loaded.check_new(enrolment.identities)
            if self._loaded is not None and existing == "replace":
                self._remove_numbers(self._loaded.numbers_of(set(enrolment.identities)))
            yield enrolment

    def _mean_rows(self, enrolments: Iterable[Enrolment], existing: str) -> Iterator[Rows]:
        means = MeanRows(self.manifest.dimension)
        for enrolment in enrolments:
            if self._loaded is not None and existing == "extend":
                self._take_up(means, self._loaded.numbers_of(set(enrolment.identities) - means.of.keys()))
            means.add(enrolment)
        yield from means.rows(self.manifest.next_row)

    def _take_up(self, means: MeanRows, numbers: Integers) -> None:
        """Continue the sums of rows that are enrolled, which the new rows replace."""
        assert self._loaded is not None
        for rows in self._loaded.rows_at(numbers) if len(numbers) else ():
            totals = rows.embeddings * rows.lengths[:, None]
            for place, name in enumerate(rows.identities):
                means.one(name).add(
                    totals[place], int(rows.images[place]), rows.pictures[place], rows.thumbnails[place]
                )
        self._remove_numbers(numbers)

    def _with_codes(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        coder = None if self.manifest.codes is None else read_coder(self.folder, self.manifest)
        for rows in batches:
            if coder is not None:
                rows.codes = coder.codes(rows.embeddings)
            yield rows

    def _append(self, batches: Iterable[Rows]) -> int:
        """Write the rows as the last segment; return how many they are."""
        entry = self._write(batches)
        if entry is not None:
            segment = self._open(entry)
            segments = (*self.manifest.segments, entry)
            self.manifest = replace(self.manifest, segments=segments, next_row=int(segment.numbers[-1]) + 1)
        return 0 if entry is None else entry.rows

    def _write(self, batches: Iterable[Rows]) -> SegmentEntry | None:
        """Write a segment; None if there are no rows."""
        name, self.manifest = self.manifest.new_name("segment", "arrow")
        count = write_segment(self.folder / name, batches, self.manifest.dimension)
        return SegmentEntry(name, (self.folder / name).stat().st_size, count) if count else None

    def _open(self, entry: SegmentEntry) -> Segment:
        return Segment(self.folder / entry.name, entry.size, entry.rows, self.manifest.dimension)

    # ------------------------------------------------------------------------------------------------ removing

    def remove(self, identities: Iterable[str]) -> None:
        """Remove identities; UserError for one that is not enrolled."""
        assert self._loaded is not None
        names = set(identities)
        unknown = sorted(name for name in names if name not in self._loaded.places)
        if unknown:
            more = f" and {len(unknown) - 1:,} more are" if len(unknown) > 1 else " is"
            raise UserError(f"{unknown[0]!r}{more} not enrolled in {self.folder}; nothing was removed")
        self._remove_numbers(self._loaded.numbers_of(names))

    def _remove_numbers(self, numbers: Integers) -> None:
        if len(numbers):
            self._removed = np.union1d(self._removed, numbers)
            self._removes = True

    # ------------------------------------------------------------------------------------------------ publishing

    def publish(self) -> None:
        """Make the change count; afterwards it is on the disk."""
        if self.manifest == self._before and not self._removes:
            return
        self._merge()
        if self._codes_are_due():
            self._make_codes()
        if self._removes:
            self._write_removed()
        write_manifest(self.folder, self.manifest)

    def _live_rows(self) -> int:
        return sum(entry.rows for entry in self.manifest.segments) - len(self._removed)

    def _merge(self) -> None:
        """Merge segments at the end that are too small, and write those anew that are mostly removed."""
        entries = list(self.manifest.segments)
        first, total = len(entries) - 1, entries[-1].rows if entries else 0
        while first > 0 and entries[first - 1].rows < 2 * total:
            first -= 1
            total += entries[first].rows
        groups = [[entry] for entry in entries[:first]] + ([entries[first:]] if entries else [])
        kept: list[SegmentEntry] = []
        for group in groups:
            segments = [self._open(entry) for entry in group]
            dead = sum(int(np.isin(segment.numbers, self._removed).sum()) for segment in segments)
            if len(group) == 1 and 2 * dead <= group[0].rows:
                kept += group
            else:
                kept += self._rewritten(segments)
        self.manifest = replace(self.manifest, segments=tuple(kept))

    def _rewritten(self, segments: Sequence[Segment], coder: Coder | None = None) -> list[SegmentEntry]:
        """Write the rows of some segments that were not removed as one; coder: that makes new codes."""
        entry = self._write(_without(segments, self._removed, coder))
        dropped = np.concatenate([np.empty(0, np.int64), *(segment.numbers for segment in segments)])
        before = len(self._removed)
        self._removed = np.setdiff1d(self._removed, dropped)
        self._removes |= len(self._removed) < before
        return [] if entry is None else [entry]

    def _write_removed(self) -> None:
        name = None
        if len(self._removed):
            name, self.manifest = self.manifest.new_name("removed", "npy")
            save_array(self.folder / name, self._removed)
        self.manifest = replace(self.manifest, removed=name)

    # ------------------------------------------------------------------------------------------------ codes

    def _codes_are_due(self) -> bool:
        rows, choice, codes = self._live_rows(), self.manifest.index, self.manifest.codes
        if choice == "exact" or rows == 0 or (choice == "auto" and rows < FLAT_BELOW):
            return False
        return codes is None or rows >= GROWTH * codes.rows

    def _make_codes(self) -> None:
        """Give all rows codes, in one segment, and choose how many candidates a search compares exactly."""
        rows = self._live_rows()
        segments = [self._open(entry) for entry in self.manifest.segments]
        coder = Coder.of(_some_rows(segments, self._removed, TRAINED_BY, rows))
        name, self.manifest = self.manifest.new_name("codes", "npz")
        with on_disk(self.folder / name) as file:
            np.savez(file, allow_pickle=False, rotation=coder.rotation, centres=coder.centres)
        (entry,) = self._rewritten(segments, coder)
        segment = self._open(entry)
        index = Index(self.manifest.dimension, segment.embeddings_at, coder)
        index.fill(segment.numbers, segment.codes(coder.size))
        sample = _some_rows([segment], np.empty(0, np.int64), SAMPLE, rows)
        queries = similar_queries(sample, sample)
        candidates, recall = choose_candidates(index, queries, exact_nearest(queries, segment.batches()))
        codes = CodesEntry(name, coder.size, candidates, rows, recall)
        self.manifest = replace(self.manifest, segments=(entry,), codes=codes)


def _without(segments: Iterable[Segment], removed: Integers, coder: Coder | None) -> Iterator[Rows]:
    """Yield the rows of the segments but those of the numbers `removed`; with codes of `coder`, if given."""
    for segment in segments:
        for rows in segment.batches():
            kept = ~np.isin(rows.numbers, removed)
            if not kept.any():
                continue
            chosen = rows if kept.all() else rows.chosen(kept)
            if coder is not None:
                chosen.codes = coder.codes(chosen.embeddings)
            yield chosen


def _some_rows(segments: Iterable[Segment], removed: Integers, wanted: int, rows: int) -> Floats:
    """Return the embeddings of about `wanted` of the `rows` rows that were not removed, evenly chosen."""
    every = max(1, rows // wanted)
    embeddings = []
    place = 0
    for part in _without(segments, removed, None):
        embeddings.append(part.embeddings[-place % every :: every])
        place += len(part)
    return np.concatenate(embeddings)
