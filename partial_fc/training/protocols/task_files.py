"""Tasks from files: one function per protocol for the commands, and `open_tasks` for the settings of a run.

    .bin file                               ── open_verification ──>    Verification
    images, lists of templates and pairs    ── open_templates ──>       TemplatePairs
    gallery, probes, distractors            ── open_identification ──>  Identification
    query, gallery                          ── open_retrieval ──>       Retrieval

Each of them reads the lists and folders at once and raises UserError for everything that is wrong with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from partial_fc.training.data import open_data
from partial_fc.training.data.formats.packed import is_packed
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import templates, verification_bin
from partial_fc.training.protocols.images import AlignedImages, ListedImages, labelled_images, numbers_of
from partial_fc.training.protocols.tasks import Identification, Retrieval, Task, TemplatePairs, Verification

if TYPE_CHECKING:
    from partial_fc.training.config import EvaluationConfig, RunConfig

Shape = tuple[int, int, int]


def open_verification(path: str | Path, shape: Shape, flip: bool = True) -> Verification:
    """Open a `.bin` file, named by its stem. Raises UserError as `read_pair_images`."""
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
    """Open a folder of images with a list of templates (`listed`) and a list of their pairs.

    detector_scores, points: files of `read_detector_scores` and `read_points`; if points are given, faces are aligned
    by them. Raises UserError for lists that cannot be read, for a pair that names a template without images, and if
    pairs of one kind are missing.
    """
    lines = templates.read_templates(listed)
    template_pairs, same = templates.read_pairs(pairs, lines.templates)
    if len(same.unique()) < 2:
        raise UserError(f"{pairs} has no pair of label {0 if bool(same[0]) else 1}; pairs of both labels are needed")
    names = list(dict.fromkeys(lines.names))
    (image_of,) = numbers_of(lines.names)
    weights = None if detector_scores is None else templates.read_detector_scores(detector_scores, lines.names)
    if not Path(images).is_dir():
        raise UserError(f"the image folder {images} does not exist")
    if points is None:
        dataset = ListedImages(images, names, torch.arange(len(names)), names, shape)
    else:
        dataset = AlignedImages(images, names, templates.read_points(points, names), shape)
    return TemplatePairs(name, dataset, image_of, lines, template_pairs, same, weights, normalize_images, flip)


def open_identification(
    name: str,
    shape: Shape,
    gallery: str | Path,
    probes: str | Path,
    distractors: str | Path | None = None,
    flip: bool = False,
    on_error: str = "skip",
) -> Identification:
    """Open two or three folders of identity sub-folders; identities are matched by the name of their sub-folder.

    on_error: "raise" refuses sub-folders without an image, which are skipped otherwise.
    Raises UserError for folders without images, if gallery and probes share no identity, or if a distractor is an
    identity of the others.
    """
    gallery_images = labelled_images(gallery, shape, on_error=on_error)
    probe_images = labelled_images(probes, shape, on_error=on_error)
    distractor_images = None if distractors is None else labelled_images(distractors, shape, on_error=on_error)
    if distractor_images is not None:
        for other, what in ((probe_images, "probes"), (gallery_images, "gallery")):
            shared = sorted(set(distractor_images.names) & set(other.names))
            if shared:
                raise UserError(
                    f"the distractors in {distractors} have the identity {shared[0]!r}, which is among the {what}; "
                    "remove it"
                )
    if not set(gallery_images.names) & set(probe_images.names):
        raise UserError(
            f"no identity of the probes in {probes} is in the gallery {gallery}; "
            "an identity must have the same sub-folder name in both"
        )
    return Identification(name, gallery_images, probe_images, distractor_images, flip)


def open_retrieval(
    name: str,
    shape: Shape,
    query: str | Path,
    gallery: str | Path | None = None,
    label: str | None = None,
    camera: str | None = None,
    flip: bool = False,
    on_error: str = "skip",
) -> Retrieval:
    """Open one or two folders; `label`, `camera` and `on_error` are those of `labelled_images`.

    Raises UserError for folders without images, or patterns that do not match.
    """
    query_images = labelled_images(query, shape, label=label, camera=camera, on_error=on_error)
    gallery_images = None
    if gallery is not None:
        gallery_images = labelled_images(gallery, shape, label=label, camera=camera, on_error=on_error)
    return Retrieval(name, query_images, gallery_images, flip)


def image_shape(config: RunConfig) -> Shape:
    """Return (C, H, W) of the run's images, even if the images of its folder no longer exist."""
    if config.data.folder is None or is_packed(config.data.folder):
        return open_data(config.data, config.seed).train.image_shape
    size = config.data.image_size or 112
    return (config.data.channels or 3, size, size)


def open_tasks(config: EvaluationConfig, shape: Shape, on_error: str = "skip") -> list[Task]:
    """Open the protocols in a run's settings, in the order of the settings. Raises UserError as the functions above.

    on_error: what to do about sub-folders without an image.
    """
    tasks: list[Task] = [open_verification(path, shape, config.flip) for path in config.verification]
    if config.templates is not None:
        tasks.append(_configured_templates(config, Path(config.templates), shape))
    if config.identification is not None:
        root = Path(config.identification)
        distractors = root / "distractors"
        tasks.append(
            open_identification(
                root.name,
                shape,
                root / "gallery",
                root / "probes",
                distractors if distractors.is_dir() else None,
                on_error=on_error,
            )
        )
    if config.retrieval is not None:
        root = Path(config.retrieval)
        gallery = root / "bounding_box_test" if (root / "bounding_box_test").is_dir() else root / "gallery"
        tasks.append(
            open_retrieval(
                root.name,
                shape,
                root / "query",
                gallery,
                config.label_pattern,
                config.camera_pattern,
                on_error=on_error,
            )
        )
    return tasks


def _configured_templates(config: EvaluationConfig, root: Path, shape: Shape) -> TemplatePairs:
    """Open the folder of IJB-B or IJB-C; the file of points aligns the images (with `align`) and weighs them."""
    listed = _only_file(root, "*face_tid_mid.txt")
    pairs = _only_file(root, "*template_pair_label.txt")
    detected = next(iter(sorted(root.rglob("*name_5pts_score.txt"))), None)
    images = root / "loose_crop" if (root / "loose_crop").is_dir() else root / "images"
    return open_templates(
        root.name,
        shape,
        images=images,
        listed=listed,
        pairs=pairs,
        detector_scores=detected,
        points=detected if config.align else None,
        flip=config.flip,
    )


def _only_file(root: Path, pattern: str) -> Path:
    found = sorted(root.rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{root} has {len(found)} files {pattern}; give a folder with one of them (docs/protocols.md)")
    return found[0]
