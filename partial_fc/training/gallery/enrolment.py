"""From given embeddings to rows of a gallery.

Enrolments [n, D], identities [n]   ── unit length ──>  all: a row for each image
                                    ── sum by identity, unit length ──>  mean: a row for each identity, with the number
                                       of its images and the length of their sum, so that more can be added later
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.errors import UserError
from partial_fc.training.files import is_unicode
from partial_fc.training.gallery.segments import BATCH, Floats, Rows

SHORTEST = 1e-6  # length of an embedding, or of a mean of unit embeddings, that still has a direction


@dataclass
class Enrolment:
    """Embeddings `[n, D]` of images, of any length above 0, and what belongs to each of the n images."""

    embeddings: npt.NDArray[Any]
    identities: Sequence[str]
    pictures: Sequence[str | None] | None = None
    """Where each picture is, such as the path of its file."""
    thumbnails: Sequence[bytes | None] | None = None
    """Small encoded images (JPEG, PNG)."""


def unit_embeddings(embeddings: npt.NDArray[Any], dimension: int | None, what: str = "embeddings") -> Floats:
    """Return the embeddings `[n, D]` scaled to unit length, float32.

    Raises UserError for another shape or width, and for an embedding that is not finite or has no direction.
    """
    array = as_matrix(embeddings, what)
    if dimension is not None and array.shape[1] != dimension:
        raise UserError(
            f"{what} have {array.shape[1]} numbers, but the gallery's have {dimension}; use the backbone that the "
            "gallery was built with"
        )
    with np.errstate(all="ignore"):
        values: Floats = array.astype(np.float32)
        largest = np.abs(values).max(axis=1, initial=0, keepdims=True)
        usable = np.isfinite(largest[:, 0]) & (largest[:, 0] > 0)
        values /= np.where(usable[:, None], largest, 1)  # so that no square overflows or vanishes
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(SHORTEST)
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        wrong = "is all zeros" if (np.asarray(array[row]) == 0).all() else "is not finite"
        raise UserError(f"of the {what}, number {row} {wrong}, so that it has no direction; leave it out")
    return values


def as_matrix(embeddings: npt.NDArray[Any], what: str = "embeddings") -> npt.NDArray[Any]:
    """Return the embeddings as an array; UserError unless it holds numbers `[n, D]`."""
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise UserError(f"{what} are {array.dtype} of shape {list(array.shape)}; give numbers [n, D]")
    return array


def check_identities(identities: Sequence[str]) -> None:
    """Raise UserError for an identity that is not a name."""
    for place, name in enumerate(identities):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"identity number {place} is {name!r}; give a name that is not empty")
        if "\0" in name or not is_unicode(name):
            raise UserError(f"identity number {place} is {name!r}, which is not valid text; give another name")


def checked(part: Enrolment, dimension: int) -> Floats:
    """Return the unit embeddings of a part; UserError for identities that are no names, too."""
    check_identities(part.identities)
    return unit_embeddings(part.embeddings, dimension)


@dataclass
class Mean:
    """What a mean row is made of: the sum of unit embeddings `[D]`, their number, the first picture and thumbnail."""

    total: Floats
    images: int = 0
    picture: str | None = None
    thumbnail: bytes | None = None

    def add(self, total: npt.NDArray[Any], images: int, picture: str | None, thumbnail: bytes | None) -> None:
        self.total += total
        self.images += images
        self.picture = picture if self.picture is None else self.picture
        self.thumbnail = thumbnail if self.thumbnail is None else self.thumbnail


@dataclass
class MeanRows:
    """Sums of unit embeddings by identity, in the order in which the identities came first."""

    dimension: int
    of: dict[str, Mean] = field(default_factory=dict)

    def add(self, enrolment: Enrolment) -> None:
        for part in in_blocks(enrolment):
            unit = checked(part, self.dimension)
            for place, name in enumerate(part.identities):
                picture = None if part.pictures is None else part.pictures[place]
                thumbnail = None if part.thumbnails is None else part.thumbnails[place]
                self.one(name).add(unit[place], 1, picture, thumbnail)

    def one(self, name: str) -> Mean:
        """Return the sum of an identity."""
        found = self.of.get(name)
        if found is None:
            found = self.of[name] = Mean(np.zeros(self.dimension, dtype=np.float32))
        return found

    def rows(self, first: int) -> Iterator[Rows]:
        """Yield the rows in batches, numbered from `first` on. UserError for embeddings that cancel out."""
        means = list(self.of.items())
        for start in range(0, len(means), BATCH):
            part = means[start : start + BATCH]
            totals = np.stack([mean.total for _, mean in part])
            lengths = np.linalg.norm(totals, axis=1)
            for place in np.flatnonzero(lengths < SHORTEST).tolist():
                raise UserError(
                    f"the embeddings of {part[place][0]!r} cancel out, so that they have no mean; use per_identity all"
                )
            yield Rows(
                np.arange(first + start, first + start + len(part)),
                [name for name, _ in part],
                [mean.picture for _, mean in part],
                [mean.thumbnail for _, mean in part],
                np.array([mean.images for _, mean in part], dtype=np.int32),
                lengths.astype(np.float32),
                (totals / lengths[:, None]).astype(np.float32),
            )


def image_rows(enrolments: Iterable[Enrolment], dimension: int, first: int) -> Iterator[Rows]:
    """Yield a row for each image, in batches, numbered from `first` on."""
    for part in (part for enrolment in enrolments for part in in_blocks(enrolment)):
        unit = checked(part, dimension)
        count = len(unit)
        yield Rows(
            np.arange(first, first + count),
            part.identities,
            [None] * count if part.pictures is None else part.pictures,
            [None] * count if part.thumbnails is None else part.thumbnails,
            np.ones(count, dtype=np.int32),
            np.ones(count, dtype=np.float32),
            unit,
        )
        first += count


def in_blocks(enrolment: Enrolment) -> Iterator[Enrolment]:
    """Yield an enrolment in parts of up to BATCH images; UserError if its columns have different lengths."""
    embeddings = as_matrix(enrolment.embeddings)
    count = len(embeddings)
    columns = {
        "identities": enrolment.identities,
        "pictures": enrolment.pictures,
        "thumbnails": enrolment.thumbnails,
    }
    for name, given in columns.items():
        if given is not None and len(given) != count:
            raise UserError(f"{count} embeddings and {len(given)} {name} do not match; give one for each image")
    for start in range(0, count, BATCH):
        here = slice(start, start + BATCH)
        yield Enrolment(
            embeddings[here],
            enrolment.identities[here],
            None if enrolment.pictures is None else enrolment.pictures[here],
            None if enrolment.thumbnails is None else enrolment.thumbnails[here],
        )
