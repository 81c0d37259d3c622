"""A protocol on files, ready to be run again and again: read once, with everything that can be wrong with the files found then.

    files          ── open ──>     Task: its images, its labels, the names of its figures
    backbone       ── embed ──>    embeddings of the images, on every rank
    embeddings     ── measure ──>  Result

`open_tasks` makes those that a run's settings name; the commands make one each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partial_fc.training.data import IdentityDataset, open_data
from partial_fc.training.data.formats.packed import is_packed
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import identification, retrieval, templates, verification_bin
from partial_fc.training.protocols.images import AlignedImages, Labelled, ListedImages, labelled_images, numbers_of
from partial_fc.training.protocols.result import Result

if TYPE_CHECKING:
    from partial_fc.training.config import EvaluationConfig, RunConfig

Embed = Callable[[IdentityDataset, str, bool], tuple[Tensor, Tensor]]
"""(data set, what to call it, whether to add mirrored images) -> (embeddings [m, D], positions in the data set [m])."""
Shape = tuple[int, int, int]


class Task(ABC):
    """One protocol on one data set, under `name`."""

    name: str
    flip: bool = False

    @abstractmethod
    def figures(self) -> list[str]:
        """The names of the figures that it can have."""

    @abstractmethod
    def measure(self, embed: Embed, **how: Any) -> Result:
        """Embed and measure; `how`: rank, world, reduce, tile, progress, device of the functions. Every rank must call it."""


@dataclass
class Verification(Task):
    """`verify_embeddings` on a `.bin` file."""

    name: str
    images: verification_bin.PairImages
    flip: bool = True

    def figures(self) -> list[str]:
        return ["accuracy", *(f"tar@{far}" for far in verification_bin.FARS), "eer"]

    def measure(self, embed: Embed, **how: Any) -> Result:
        found, positions = embed(self.images, self.name, self.flip)
        readable = torch.zeros(len(self.images), dtype=torch.bool)
        readable[positions] = True
        embeddings = found.new_zeros(len(self.images), found.shape[1])
        embeddings[positions] = found
        how = _without_tiles(how)
        return verification_bin.verify_embeddings(
            embeddings, self.images.same, name=self.name, readable=readable, **how
        )


@dataclass
class TemplatePairs(Task):
    """`score_templates` on a folder of images and two lists; `scores` `[P]` are those of the last measurement."""

    name: str
    images: ListedImages
    lines: Tensor
    """Which image each line of the templates is of."""
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
        found, positions = embed(self.images, self.name, self.flip)
        if not len(found):
            raise UserError(f"{self.name}: no image of the templates can be read; check the folder of images")
        row = torch.full((len(self.images),), -1)
        row[positions] = torch.arange(len(positions))
        kept = (row[self.lines] >= 0).nonzero().flatten()
        ids, pooled = templates.pool_templates(
            found[row[self.lines[kept]]],
            self.listed.templates[kept],
            self.listed.media[kept],
            weights=None if self.weights is None else self.weights[kept],
            normalize_images=self.normalize_images,
        )
        how = _without_tiles(how)
        result, self.scores = templates.score_templates(ids, pooled, self.pairs, self.same, name=self.name, **how)
        return result


@dataclass
class Identification(Task):
    """`identify_embeddings` on two or three folders."""

    name: str
    gallery: Labelled
    probes: Labelled
    distractors: Labelled | None = None
    flip: bool = False

    def figures(self) -> list[str]:
        return [*(f"rank-{k}" for k in identification.RANKS), *(f"dir@{fpir}" for fpir in identification.FPIRS)]

    def measure(self, embed: Embed, **how: Any) -> Result:
        sets = [self.gallery, self.probes, *([] if self.distractors is None else [self.distractors])]
        labels = numbers_of(*(each.names for each in sets))
        parts = []
        for each, numbers, what in zip(sets, labels, ("gallery", "probes", "distractors"), strict=False):
            embeddings, positions = embed(each.images, f"{self.name} {what}", self.flip)
            parts.append((embeddings, numbers[positions]))
        others = (None, None) if self.distractors is None else parts[2]
        return identification.identify_embeddings(
            *parts[0], *parts[1], name=self.name, distractors=others[0], distractor_labels=others[1], **how
        )


@dataclass
class Retrieval(Task):
    """`retrieve_embeddings` on two folders, or on one, each image being searched in the others."""

    name: str
    queries: Labelled
    gallery: Labelled | None = None
    flip: bool = False

    def figures(self) -> list[str]:
        ks = retrieval.KS
        return ["mAP", *(f"cmc@{k}" for k in ks), *(f"recall@{k}" for k in ks), "R-precision", "mAP@R"]

    def measure(self, embed: Embed, **how: Any) -> Result:
        sets = [self.queries] if self.gallery is None else [self.queries, self.gallery]
        # an identity "-1" is junk by Market-1501's convention, whatever number the others get
        labels = [
            _junk_below_zero(numbers, each.names)
            for numbers, each in zip(numbers_of(*(s.names for s in sets)), sets, strict=True)
        ]
        cameras = None if self.queries.cameras is None else numbers_of(*(each.cameras or [] for each in sets))
        found = [
            embed(each.images, f"{self.name} {what}", self.flip)
            for each, what in zip(sets, ("queries", "gallery"), strict=False)
        ]
        (queries, at), (gallery, there) = found[0], found[-1] if self.gallery else (None, None)
        return retrieval.retrieve_embeddings(
            queries,
            labels[0][at],
            gallery,
            None if there is None else labels[1][there],
            name=self.name,
            query_cameras=None if cameras is None else cameras[0][at],
            gallery_cameras=None if cameras is None or there is None else cameras[1][there],
            **how,
        )


def _without_tiles(how: dict[str, Any]) -> dict[str, Any]:
    """What listed pairs take of how the work is shared: their blocks are no tiles."""
    return {key: value for key, value in how.items() if key in ("rank", "world", "reduce")}


def _junk_below_zero(numbers: Tensor, names: list[str]) -> Tensor:
    return torch.where(torch.tensor([name == "-1" for name in names]), -1, numbers)


# ---------------------------------------------------------------------------------------------------- from files


def open_verification(path: str | Path, shape: Shape, flip: bool = True) -> Verification:
    """UserError as `read_pair_images`."""
    return Verification(Path(path).stem, verification_bin.read_pair_images(path, shape), flip)


def open_templates(
    name: str,
    shape: Shape,
    *,
    images: str | Path,
    listed: str | Path,
    pairs: str | Path,
    detector_scores: str | Path | None = None,
    points: str | Path | None = None,
    normalize_images: bool = False,
    flip: bool = True,
) -> TemplatePairs:
    """detector_scores, points: files of `read_detector_scores` and `read_points`; with points, faces are aligned by them.

    UserError for lists that cannot be read, or that name a template without images.
    """
    lines = templates.read_templates(listed)
    which, same = templates.read_pairs(pairs, lines.templates)
    if len(same.unique()) < 2:
        raise UserError(f"{pairs} has no pair of label {0 if bool(same[0]) else 1}, so there is nothing to tell apart")
    (numbers,) = numbers_of(lines.names)
    names = list(dict.fromkeys(lines.names))
    weights = None if detector_scores is None else templates.read_detector_scores(detector_scores, lines.names)
    if not Path(images).is_dir():
        raise UserError(f"the image folder {images} does not exist")
    if points is None:
        dataset = ListedImages(images, names, torch.arange(len(names)), names, shape)
    else:
        dataset = AlignedImages(images, names, templates.read_points(points, names), shape)
    return TemplatePairs(name, dataset, numbers, lines, which, same, weights, normalize_images, flip)


def open_identification(
    name: str,
    shape: Shape,
    gallery: str | Path,
    probes: str | Path,
    distractors: str | Path | None = None,
    flip: bool = False,
) -> Identification:
    """UserError for folders that have no images, or a distractor's identity that is in the others."""
    one, two = labelled_images(gallery, shape), labelled_images(probes, shape)
    three = None if distractors is None else labelled_images(distractors, shape)
    for other, what in ((two, "probes"), (one, "gallery")):
        both = sorted(set(three.names) & set(other.names)) if three else []
        if both:
            raise UserError(
                f"the distractors in {distractors} have the identity {both[0]!r}, which is among the {what}; remove it"
            )
    if not set(one.names) & set(two.names):
        raise UserError(
            f"no identity of the probes in {probes} is in the gallery {gallery}; their folders must have the same names"
        )
    return Identification(name, one, two, three, flip)


def open_retrieval(
    name: str,
    shape: Shape,
    query: str | Path,
    gallery: str | Path | None = None,
    label: str | None = None,
    camera: str | None = None,
    flip: bool = False,
) -> Retrieval:
    """UserError for folders that have no images, or patterns that do not match."""
    one = labelled_images(query, shape, label=label, camera=camera)
    two = None if gallery is None else labelled_images(gallery, shape, label=label, camera=camera)
    return Retrieval(name, one, two, flip)


def image_shape(config: RunConfig) -> Shape:
    """(C, H, W) of the run's images, also where those of a folder are gone by now."""
    if config.data.folder is None or is_packed(config.data.folder):
        return open_data(config.data, config.seed).train.image_shape
    size = config.data.image_size or 112
    return (config.data.channels or 3, size, size)


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that is there a second time: figures go by names."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def open_tasks(config: EvaluationConfig, shape: Shape) -> list[Task]:
    """The protocols that a run's settings name, in the order of the fields. UserError for what cannot be had."""
    tasks: list[Task] = [open_verification(path, shape, config.flip) for path in config.verification]
    if config.templates is not None:
        root = Path(config.templates)
        files = [_only(root, pattern) for pattern in ("*face_tid_mid.txt", "*template_pair_label.txt")]
        detected = next(iter(sorted(root.rglob("*name_5pts_score.txt"))), None)
        images = root / "loose_crop" if (root / "loose_crop").is_dir() else root / "images"
        tasks.append(
            open_templates(
                root.name,
                shape,
                images=images,
                listed=files[0],
                pairs=files[1],
                detector_scores=detected,
                points=detected if config.align else None,
                flip=config.flip,
            )
        )
    if config.identification is not None:
        root = Path(config.identification)
        others = root / "distractors"
        tasks.append(
            open_identification(
                root.name, shape, root / "gallery", root / "probes", others if others.is_dir() else None
            )
        )
    if config.retrieval is not None:
        root = Path(config.retrieval)
        gallery = root / "bounding_box_test" if (root / "bounding_box_test").is_dir() else root / "gallery"
        tasks.append(
            open_retrieval(root.name, shape, root / "query", gallery, config.label_pattern, config.camera_pattern)
        )
    return tasks


def _only(root: Path, pattern: str) -> Path:
    found = sorted(root.rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{root} has {len(found)} files {pattern}; give a folder with one of them (docs/protocols.md)")
    return found[0]
