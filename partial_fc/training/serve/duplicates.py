"""The likely duplicates of an audit: pairs of identities, with pictures from the training set.

RUN/audit/duplicates.csv   ── read ──>          pairs, as the audit ordered them
the run's training set     ── when asked ──>    a few images of a class, as PNG

The data set is opened when the first picture is asked for. Where it is gone, pairs are shown without pictures.
"""

from __future__ import annotations

import csv
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from partial_fc.training.audit_page import DUPLICATES
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, UnreadableImage, open_data
from partial_fc.training.errors import UserError
from partial_fc.training.serve.uploads import as_png

PICTURES = 4  # of a class


@dataclass(frozen=True)
class AuditedClass:
    """A class of the training set: its id, the name of its identity, its number of images."""

    number: int
    name: str
    images: int


@dataclass(frozen=True)
class DuplicatePair:
    """Two classes that may be one identity, with the cosine of their rows and of their mean directions, if close."""

    a: AuditedClass
    b: AuditedClass
    row_cosine: float | None
    mean_cosine: float | None


class Duplicates:
    """The pairs of the audit in `folder`. Raises UserError if its table is damaged. Safe for several threads."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.pairs = read_pairs(folder / DUPLICATES)
        self._config = config
        self._lock = threading.Lock()
        self._dataset: IdentityDataset | None = None
        self._tried = False
        self._known = {each.number: each.name for pair in self.pairs for each in (pair.a, pair.b)}

    def picture(self, number: int, place: int) -> bytes | None:
        """Return the image at `place` of class `number` as PNG; None if there is none, or if it cannot be read."""
        dataset = self._opened()
        if dataset is None or number not in self._known or not 0 <= place < PICTURES:
            return None
        if number >= dataset.num_identities or dataset.identity_names[number] != self._known[number]:
            return None  # the data have changed since the audit
        indices = (dataset.labels == number).nonzero()[:, 0]
        if place >= len(indices):
            return None
        try:
            pixels: torch.Tensor = dataset.load(int(indices[place]))
        except UnreadableImage:
            return None
        return as_png(Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()))

    def _opened(self) -> IdentityDataset | None:
        with self._lock:
            if not self._tried:
                self._tried = True
                try:
                    self._dataset = open_data(self._config.data, self._config.seed).train
                except (UserError, OSError):
                    self._dataset = None
            return self._dataset


def read_pairs(path: Path) -> list[DuplicatePair]:
    """Return the pairs of duplicates.csv. Raises UserError if it is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_pair(row) for row in csv.DictReader(file, strict=True)]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; write it with `partial-fc audit RUN`") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); write it again with `partial-fc audit RUN`") from error


def _pair(row: dict[str, str]) -> DuplicatePair:
    return DuplicatePair(_class(row, "a"), _class(row, "b"), _cosine(row["row_cosine"]), _cosine(row["mean_cosine"]))


def _class(row: dict[str, str], side: str) -> AuditedClass:
    return AuditedClass(int(row[f"class_{side}"]), row[f"identity_{side}"], int(row[f"images_{side}"]))


def _cosine(text: str) -> float | None:
    return float(text) if text else None
