"""`Gallery`: a folder of enrolled identities that are searched, added and removed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.checkpoint.locks import LOCK, exclusive
from partial_fc.training.errors import UserError, words
from partial_fc.training.gallery.calibration import (
    Calibration,
    accepted_share,
    template_histograms,
    threshold_for_far,
    threshold_for_fpir,
)
from partial_fc.training.gallery.changes import Change
from partial_fc.training.gallery.enrolment import Enrolment, as_matrix, unit_embeddings
from partial_fc.training.gallery.loaded import Loaded
from partial_fc.training.gallery.manifest import MANIFEST, OWN_FILE, IndexChoice, Manifest, PerIdentity, stamp_of
from partial_fc.training.gallery.sharing import SharedLock

Existing = Literal["refuse", "extend", "replace"]
WAIT = 60.0  # seconds for the change of another process
SEARCHED_AT_ONCE = 4096
MOST_STRANGERS = 10_000  # searches by which FPIR is measured


class Match(NamedTuple):
    """An identity found: its name, its cosine to the query, its picture as it was given, and the row that matched."""

    identity: str
    cosine: float
    picture: str | None
    row: int


@dataclass(frozen=True)
class Answer:
    """What a search has found for one query: up to k identities, best first, each once."""

    matches: list[Match]
    threshold: float | None
    """The gallery's when it was searched; None if it has none."""

    @property
    def nobody(self) -> bool:
        """Whether no identity reaches the threshold. Without a threshold only an empty gallery answers so."""
        best = self.matches[0].cosine if self.matches else -math.inf
        return not self.matches or (self.threshold is not None and best < self.threshold)

    @property
    def identity(self) -> str | None:
        """The best identity; None if `nobody`."""
        return None if self.nobody else self.matches[0].identity


class Gallery:
    """A gallery in a folder. Made by `Gallery.build` or `Gallery.open`; the package's docstring has an example.

    All methods raise UserError if the folder is gone, damaged, or cannot be written, and leave the gallery as it was.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._sharing = SharedLock()

    # ------------------------------------------------------------------------------------------------ making

    @classmethod
    def build(
        cls,
        folder: str | Path,
        embeddings: npt.NDArray[Any],
        identities: Sequence[str],
        *,
        pictures: Sequence[str | None] | None = None,
        thumbnails: Sequence[bytes | None] | None = None,
        backbone: str,
        per_identity: PerIdentity = "mean",
        preprocessing: Mapping[str, Any] | None = None,
        source: str | None = None,
        index: IndexChoice = "auto",
    ) -> Gallery:
        """Make a gallery in a folder that is new or empty, of embeddings `[n, D]` of images of `identities` `[n]`.

        Args:
            pictures: of each image, as in `Enrolment`.
            thumbnails: of each image, as in `Enrolment`.
            backbone: a digest that names the backbone's weights, such as `Embedder.digest`; `check_backbone` compares
                it.
            per_identity: "mean" keeps one row for an identity, the direction of the sum of its unit embeddings; "all"
                keeps a row for each image, and an identity is as near as its nearest image.
            preprocessing: what else the embeddings depend on (`Embedder.preprocessing`), compared likewise.
            source: where the backbone is, a note for commands that are not told.
            index: "exact", "codes", or "auto": exact up to `index.FLAT_BELOW` rows.

        Raises UserError for a folder in use, and for embeddings or names that cannot be enrolled.
        """
        enrolment = Enrolment(embeddings, identities, pictures, thumbnails)
        return cls.build_from(
            folder,
            [enrolment],
            dimension=as_matrix(embeddings).shape[1],
            backbone=backbone,
            per_identity=per_identity,
            preprocessing=preprocessing,
            source=source,
            index=index,
        )

    @classmethod
    def build_from(
        cls,
        folder: str | Path,
        enrolments: Iterable[Enrolment],
        *,
        dimension: int,
        backbone: str,
        per_identity: PerIdentity = "mean",
        preprocessing: Mapping[str, Any] | None = None,
        source: str | None = None,
        index: IndexChoice = "auto",
    ) -> Gallery:
        """Make a gallery as `build` does, of enrolments that are read one after the other."""
        if per_identity not in get_args(PerIdentity):
            raise UserError(f"per_identity is {per_identity!r}; give mean or all")
        if index not in get_args(IndexChoice):
            raise UserError(f"index is {index!r}; give auto, exact or codes")
        if dimension < 1:
            raise UserError(f"the embeddings have {dimension} numbers; give at least 1")
        path = Path(folder)
        manifest = Manifest(dimension, per_identity, backbone, dict(preprocessing or {}), source, index)
        with _as_user_error(path):
            check_free(path)
            path.mkdir(parents=True, exist_ok=True)
            with exclusive(path, WAIT):
                check_free(path)
                with Change(path, manifest, None) as change:
                    change.enrol(enrolments, "refuse")
                    if not change.rows:
                        raise UserError("there is no image to enrol, so no gallery was made")
                    change.publish()
        try:
            return cls.open(path)
        except UserError as error:
            raise UserError(f"the gallery was made, and cannot be opened: {error}") from error

    @classmethod
    def open(cls, folder: str | Path) -> Gallery:
        """Open the gallery in a folder; UserError that names what is missing or damaged."""
        path = Path(folder)
        with _as_user_error(path):
            return cls(Loaded(path))

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def folder(self) -> Path:
        return self._loaded.folder

    @property
    def manifest(self) -> Manifest:
        """The gallery's description, brought up to date."""
        with self._current():
            return self._loaded.manifest

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return self._loaded.manifest.dimension

    @property
    def backbone(self) -> str:
        """The digest of the backbone's weights."""
        return self._loaded.manifest.backbone

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What else the embeddings depend on."""
        return dict(self._loaded.manifest.preprocessing)

    @property
    def per_identity(self) -> PerIdentity:
        """ "mean" or "all", as of `build`."""
        return self._loaded.manifest.per_identity

    @property
    def threshold(self) -> float | None:
        """The lowest cosine of an identity that counts as found; None if it was neither calibrated nor set."""
        return self.manifest.threshold

    @property
    def identities(self) -> list[str]:
        """The names of the enrolled identities."""
        with self._current():
            return list(self._loaded.names)

    def __len__(self) -> int:
        """Return the number of enrolled identities."""
        with self._current():
            return len(self._loaded.names)

    def __contains__(self, identity: object) -> bool:
        with self._current():
            return identity in self._loaded.places

    @property
    def rows(self) -> int:
        """How many embeddings are searched."""
        with self._current():
            return len(self._loaded.numbers)

    @property
    def index(self) -> str:
        """What kind of search is used, in words."""
        with self._current():
            rows = len(self._loaded.numbers)
            codes = self._loaded.manifest.codes
        if codes is None:
            return f"exact search among {rows:,} embeddings"
        return (
            f"search among {rows:,} embeddings by codes of {codes.size} bytes (product quantisation), with the best "
            f"{codes.candidates:,} compared exactly: {codes.recall:.1%} of a sample of queries found their nearest"
        )

    def check_backbone(self, digest: str, dimension: int, preprocessing: Mapping[str, Any] | None = None) -> None:
        """Raise UserError unless embeddings of this backbone may be compared with those of the gallery."""
        if dimension != self.dimension:
            raise UserError(
                f"the gallery {self.folder} has embeddings of {self.dimension} numbers, but the backbone gives "
                f"{dimension}; use the backbone that it was built with{self._hint()}"
            )
        if digest != self.backbone:
            raise UserError(
                f"the gallery {self.folder} was built with another backbone ({self.backbone[:12]}, now {digest[:12]}); "
                f"use that one{self._hint()}, or build the gallery again: their embeddings cannot be compared"
            )
        if preprocessing is not None:
            for name in sorted(self.preprocessing.keys() | preprocessing.keys()):
                then, now = self.preprocessing.get(name), preprocessing.get(name)
                if then != now:
                    raise UserError(
                        f"the gallery {self.folder} was built with {name} {then}, but now it is {now}; use the same"
                    )

    def _hint(self) -> str:
        source = self._loaded.manifest.source
        return "" if source is None else f" ({source})"

    # ------------------------------------------------------------------------------------------------ searching

    def search(self, embeddings: npt.NDArray[Any], k: int = 5) -> list[Answer]:
        """Return an `Answer` for each of the embeddings `[m, D]`, with up to k identities (fewer if there are fewer).

        Cosines are those of the rows found, in float32. Whether all of the nearest are found, `index` says. An empty
        gallery answers nobody.
        """
        if k < 1:
            raise UserError(f"k is {k}; give at least 1")
        unit = unit_embeddings(embeddings, self.dimension, "queries")
        answers = []
        with self._current():
            threshold = self._loaded.manifest.threshold
            for start in range(0, len(unit), SEARCHED_AT_ONCE):
                for hits in self._loaded.search(unit[start : start + SEARCHED_AT_ONCE], k):
                    answers.append(Answer([self._match(number, cosine) for number, cosine in hits], threshold))
        return answers

    def _match(self, number: int, cosine: float) -> Match:
        picture = self._loaded.segment_of(number).picture(number)
        return Match(self._loaded.name_of(number), cosine, picture, number)

    def thumbnail(self, row: int) -> bytes | None:
        """Return the thumbnail that was enrolled with a row (`Match.row`); None if it has none, or is gone."""
        with self._current():
            return self._loaded.segment_of(row).thumbnail(row) if self._loaded.holds(row) else None

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Hold the gallery as its folder has it now, together with other readers."""
        if stamp_of(self.folder) != self._loaded.stamp:
            with self._sharing.write(), _as_user_error(self.folder):
                if stamp_of(self.folder) != self._loaded.stamp:
                    self._loaded.refresh()
        with self._sharing.read():
            yield

    # ------------------------------------------------------------------------------------------------ changing

    def add(
        self,
        embeddings: npt.NDArray[Any],
        identities: Sequence[str],
        pictures: Sequence[str | None] | None = None,
        *,
        thumbnails: Sequence[bytes | None] | None = None,
        existing: Existing = "refuse",
    ) -> None:
        """Enrol embeddings `[n, D]` of images of `identities` `[n]`; all of them, or none.

        Args:
            existing: what to do about identities that are enrolled already: "refuse" raises UserError that names them,
                "extend" adds the images to theirs, "replace" removes theirs first.
        """
        self.add_from([Enrolment(embeddings, identities, pictures, thumbnails)], existing=existing)

    def add_from(self, enrolments: Iterable[Enrolment], *, existing: Existing = "refuse") -> None:
        """Enrol as `add` does, of enrolments that are read one after the other."""
        if existing not in get_args(Existing):
            raise UserError(f"existing is {existing!r}; give refuse, extend or replace")
        with self._changing() as change:
            change.enrol(enrolments, existing)

    def check_new(self, identities: Iterable[str]) -> None:
        """Raise UserError if one of the identities is enrolled already."""
        with self._current():
            self._loaded.check_new(identities)

    def remove(self, identities: Iterable[str]) -> None:
        """Remove identities; all of them, or none. UserError for one that is not enrolled."""
        with self._changing() as change:
            change.remove(identities)

    def set_threshold(self, threshold: float | None) -> None:
        """Set the threshold, a cosine, by hand; None for none."""
        if threshold is not None and not -1 <= threshold <= 1:
            raise UserError(f"the threshold is {threshold}; it is a cosine, from -1 to 1")
        with self._changing() as change:
            change.manifest = replace(change.manifest, threshold=threshold, calibration=None)

    def calibrate(
        self,
        embeddings: npt.NDArray[Any],
        identities: Sequence[str],
        far: float | None = None,
        *,
        fpir: float | None = None,
    ) -> Calibration:
        """Set the threshold by a data set, embeddings `[n, D]` of images of `identities` `[n]`; return what was found.

        far: share of comparisons of an image with another identity that may be accepted. fpir: instead, share of
        searches of this gallery, by images of identities that are not enrolled, that may find somebody; it holds for
        the gallery as it is now. calibration.py has the definitions. Raises UserError for too few images.
        """
        if (far is None) == (fpir is None):
            raise UserError("give either far or fpir")
        unit = unit_embeddings(embeddings, self.dimension)
        if len(unit) != len(identities):
            raise UserError(f"{len(unit)} embeddings and {len(identities)} identities do not match")
        numbers = {name: number for number, name in enumerate(dict.fromkeys(identities))}
        labels = torch.tensor([numbers[name] for name in identities], dtype=torch.int64)
        histograms = template_histograms(torch.from_numpy(unit), labels, mean=self.per_identity == "mean")
        best = self._best_of_strangers(unit, identities)
        threshold = threshold_for_far(histograms, far) if far is not None else threshold_for_fpir(best, fpir or 0.0)
        found = Calibration(
            threshold=threshold,
            far=far,
            tar=accepted_share(histograms, threshold),
            comparisons=histograms.impostor_pairs,
            images=len(unit),
            identities=len(numbers),
            fpir=float((best >= threshold).double().mean()) if len(best) else None,
            strangers=len(best),
        )
        with self._changing() as change:
            change.manifest = replace(change.manifest, threshold=threshold, calibration=found.to_dict())
        return found

    def _best_of_strangers(self, unit: npt.NDArray[np.float32], identities: Sequence[str]) -> torch.Tensor:
        """Return the best cosine in the gallery of images of identities that are not enrolled, at most some of them."""
        enrolled = set(self.identities)
        places = [place for place, name in enumerate(identities) if name not in enrolled]
        if not enrolled or not places:
            return torch.empty(0)
        some = np.array(places)[np.unique(np.linspace(0, len(places) - 1, MOST_STRANGERS).astype(np.int64))]
        return torch.tensor([answer.matches[0].cosine for answer in self.search(unit[some], 1)])

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Change]:
        """Hold the gallery alone among writers, up to date; publish the change at the end, and hold the result."""
        stamp_of(self.folder)  # a folder that is gone has no lock
        with _as_user_error(self.folder), exclusive(self.folder, WAIT):
            with self._current():
                manifest = self._loaded.manifest
            with Change(self.folder, manifest, self._loaded) as change:
                yield change
                change.publish()
            with self._current():
                pass


def check_free(folder: Path) -> None:
    """Raise UserError unless a gallery can be made in the folder: new, empty, or left by a build that was killed."""
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} is a gallery already; add to it (partial-fc gallery add), or give another folder")
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; give a new or empty folder")
        if any(each.name != LOCK and not OWN_FILE.fullmatch(each.name) for each in folder.iterdir()):
            raise UserError(f"{folder} is not empty and no gallery; give a new or empty folder")


@contextlib.contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into UserError: a full disk, no right to write, a lock that is held."""
    try:
        yield
    except BlockingIOError as error:
        text = str(error).replace("another run", "another process").split("; ")[0]
        raise UserError(f"{text}; it did not end within {WAIT:.0f} seconds: try again") from error
    except OSError as error:
        raise UserError(
            f"the gallery {folder} could not be read or written ({words(error)}); it is as it was before"
        ) from error
