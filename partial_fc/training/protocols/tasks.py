"""A protocol on one data set, ready to be measured repeatedly: at the end of a run, during it, and by the commands.

    files          ── task_files.py ──>  Task: its images and labels, the names of its figures
    backbone       ── embed ──>          embeddings of the images, on every rank
    embeddings     ── measure ──>        Result

The files are read once, when the task is opened; everything that can be wrong with them is reported then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import identification, retrieval, templates, verification_bin
from partial_fc.training.protocols.images import Labelled, ListedImages, numbers_of
from partial_fc.training.protocols.result import Result

Embed = Callable[[IdentityDataset, str, bool], tuple[Tensor, Tensor]]
"""(data set, its name, add mirrored images or not) -> (embeddings [m, D], indices [m] of their images in the data set).

m is less than the size of the data set if some images cannot be read."""


class Task(ABC):
    """One protocol on one data set, called `name`."""

    name: str
    flip: bool = False

    @abstractmethod
    def figures(self) -> list[str]:
        """Return the names of all figures that a measurement can give."""

    @abstractmethod
    def measure(self, embed: Embed, **how: Any) -> Result:
        """Embed the images and measure; every rank must call it.

        how: `rank`, `world`, `reduce`, `tile`, `progress` and `device` of the protocol's function.
        """


@dataclass
class Verification(Task):
    """`verify_embeddings` on a `.bin` file."""

    name: str
    images: verification_bin.PairImages
    flip: bool = True

    def figures(self) -> list[str]:
        return ["accuracy", *(f"tar@{far}" for far in verification_bin.FARS), "eer"]

    def measure(self, embed: Embed, **how: Any) -> Result:
        found, indices = embed(self.images, self.name, self.flip)
        readable = torch.zeros(len(self.images), dtype=torch.bool)
        readable[indices] = True
        embeddings = found.new_zeros(len(self.images), found.shape[1])
        embeddings[indices] = found
        return verification_bin.verify_embeddings(
            embeddings, self.images.same, name=self.name, readable=readable, **_without_tiles(how)
        )


@dataclass
class TemplatePairs(Task):
    """`score_templates` on a folder of images and two lists; `scores` `[P]` are those of the last measurement."""

    name: str
    images: ListedImages
    image_of: Tensor
    """Index of the image of each entry of `listed`, `[n]`."""
    listed: templates.Templates
    pairs: Tensor
    same: Tensor
    weights: Tensor | None = None
    normalize_images: bool = False
    flip: bool = True
    scores: Tensor | None = None

    def figures(self) -> list[str]:
        return [*(f"tar@{far}" for far in templates.FARS), "eer"]

    def measure(self, embed: Embed, **how: Any) -> Result:
        embeddings, indices = embed(self.images, self.name, self.flip)
        if not len(embeddings):
            raise UserError(f"{self.name}: no image of the templates can be read; check the folder of images")
        row_of = torch.full((len(self.images),), -1)  # image -> row of embeddings, -1 if it cannot be read
        row_of[indices] = torch.arange(len(indices))
        rows = row_of[self.image_of]
        kept = (rows >= 0).nonzero().flatten()
        ids, pooled = templates.pool_templates(
            embeddings[rows[kept]],
            self.listed.templates[kept],
            self.listed.media[kept],
            weights=None if self.weights is None else self.weights[kept],
            normalize_images=self.normalize_images,
        )
        result, self.scores = templates.score_templates(
            ids, pooled, self.pairs, self.same, name=self.name, **_without_tiles(how)
        )
        return result


@dataclass
class Identification(Task):
    """`identify_embeddings` on a gallery, probes and, optionally, distractors."""

    name: str
    gallery: Labelled
    probes: Labelled
    distractors: Labelled | None = None
    flip: bool = False

    def figures(self) -> list[str]:
        return [*(f"rank-{k}" for k in identification.RANKS), *(f"dir@{fpir}" for fpir in identification.FPIRS)]

    def measure(self, embed: Embed, **how: Any) -> Result:
        sets = {"gallery": self.gallery, "probes": self.probes}
        if self.distractors is not None:
            sets["distractors"] = self.distractors
        labels = numbers_of(*(each.names for each in sets.values()))
        embedded: dict[str, tuple[Tensor, Tensor]] = {}
        for (what, each), numbers in zip(sets.items(), labels, strict=True):
            embeddings, indices = embed(each.images, f"{self.name} {what}", self.flip)
            embedded[what] = (embeddings, numbers[indices])
        distractors, distractor_labels = embedded.get("distractors", (None, None))
        return identification.identify_embeddings(
            *embedded["gallery"],
            *embedded["probes"],
            name=self.name,
            distractors=distractors,
            distractor_labels=distractor_labels,
            **how,
        )


@dataclass
class Retrieval(Task):
    """`retrieve_embeddings` on queries and a gallery, or on one set whose images are searched in the others."""

    name: str
    queries: Labelled
    gallery: Labelled | None = None
    flip: bool = False

    def figures(self) -> list[str]:
        ks = retrieval.KS
        return ["mAP", *(f"cmc@{k}" for k in ks), *(f"recall@{k}" for k in ks), "R-precision", "mAP@R"]

    def measure(self, embed: Embed, **how: Any) -> Result:
        sets = [self.queries] if self.gallery is None else [self.queries, self.gallery]
        names = ("queries", "gallery")[: len(sets)]
        labels = [
            _negative_if_junk(numbers, each.names)
            for numbers, each in zip(numbers_of(*(each.names for each in sets)), sets, strict=True)
        ]
        cameras = None if self.queries.cameras is None else numbers_of(*(each.cameras or [] for each in sets))

        def embedded(i: int) -> tuple[Tensor, Tensor, Tensor | None]:
            """Return embeddings, labels and cameras of the readable images of a set."""
            embeddings, indices = embed(sets[i].images, f"{self.name} {names[i]}", self.flip)
            return embeddings, labels[i][indices], None if cameras is None else cameras[i][indices]

        queries, query_labels, query_cameras = embedded(0)
        gallery, gallery_labels, gallery_cameras = (None, None, None) if self.gallery is None else embedded(1)
        return retrieval.retrieve_embeddings(
            queries,
            query_labels,
            gallery,
            gallery_labels,
            name=self.name,
            query_cameras=query_cameras,
            gallery_cameras=gallery_cameras,
            **how,
        )


def first_twice(names: Sequence[str]) -> str | None:
    """Return the first name that occurs twice, or None. Figures are stored by name, so names must be unique."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _without_tiles(how: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that functions on listed pairs take: these have no tiles."""
    return {key: value for key, value in how.items() if key in ("rank", "world", "reduce", "device")}


def _negative_if_junk(numbers: Tensor, names: list[str]) -> Tensor:
    """Return `numbers` with -1 for the identity "-1", which is junk in Market-1501."""
    return torch.where(torch.tensor([name == "-1" for name in names]), -1, numbers)
