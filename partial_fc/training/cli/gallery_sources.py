"""What the commands `partial-fc gallery ...` are given: images with a backbone that embeds them, or embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.cli.embed import (
    add_backbone_options,
    add_data,
    check_reading,
    make_accelerator,
    open_embedder,
    open_images,
    reading_of,
)
from partial_fc.training.cli.parser import add_traceback
from partial_fc.training.data import IdentityDataset
from partial_fc.training.embed_data import Reading
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import EmbeddingFiles
from partial_fc.training.enrol_data import enrol_data, enrol_files, names_of
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Enrolment, Gallery

SHOWN = 10  # names, or files, of a list that is printed


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that name images, or embeddings, and the backbone."""
    parser.add_argument(
        "--run",
        default=None,
        metavar="RUN",
        help="folder of a run, or one that export-backbone wrote (default: what the gallery was built with)",
    )
    add_data(parser)
    parser.add_argument(
        "--embeddings",
        default=None,
        metavar="FILES",
        help="instead: a folder that `partial-fc embed` wrote, or one .parquet or .npz file with the columns "
        "`embedding` and `identity`",
    )
    parser.add_argument(
        "--backbone", default=None, metavar="NAME", help="a name for the backbone of embeddings that do not say it"
    )
    add_backbone_options(parser)
    add_traceback(parser)


@dataclass
class Source:
    """Images with a backbone, or embeddings: what a command enrols, searches for, or calibrates by."""

    dimension: int
    backbone: str
    preprocessing: dict[str, Any]
    where: str | None
    """Where the backbone is."""
    names: Callable[[], list[str]]
    """The identity of each image."""
    enrolments: Callable[[npt.NDArray[np.bool_] | None, Callable[[str], bool]], Iterator[Enrolment]]
    """The images that are chosen `[n]`, or all; and whether an image of an identity gets a thumbnail."""
    unreadable: list[str]

    def check(self, gallery: Gallery) -> None:
        """Raise UserError unless embeddings of the source may be compared with the gallery's."""
        gallery.check_backbone(self.backbone, self.dimension, self.preprocessing)

    def report_unreadable(self) -> None:
        """Print the images that could not be read."""
        if self.unreadable:
            more = "" if len(self.unreadable) <= SHOWN else f", and {len(self.unreadable) - SHOWN:,} more"
            print(f"could not be read: {'; '.join(self.unreadable[:SHOWN])}{more}")


def open_source(options: argparse.Namespace, gallery: Gallery | None) -> Source:
    """Open what the options name; gallery: the one that it is for, whose backbone is the default."""
    check_reading(options)
    if options.embeddings is not None:
        if options.data is not None or options.run is not None:
            raise UserError("give either --embeddings, or --run and --data")
        return _embeddings_source(options, gallery)
    if options.backbone is not None:
        raise UserError("--backbone names the backbone of --embeddings; leave it out")
    embedder, reading = open_backbone(options, gallery)
    _, dataset = open_images(options, embedder)
    return _data_source(embedder, dataset, reading(dataset))


def open_backbone(
    options: argparse.Namespace, gallery: Gallery | None
) -> tuple[Embedder, Callable[[IdentityDataset], Reading]]:
    """Return the backbone that the options, or the gallery, name, and how it reads a data set."""
    source = options.run if options.run is not None or gallery is None else gallery.manifest.source
    if source is None:
        raise UserError("name the backbone with --run, or give embeddings with --embeddings")
    if options.run is None and not Path(source).exists():
        raise UserError(f"the backbone of the gallery was in {source}, where it is no longer; name it with --run")
    if gallery is not None and not options.flip:
        options.flip = bool(gallery.preprocessing.get("flip", False))
    accelerator = make_accelerator(source)
    embedder = open_embedder(source, options, accelerator.device)
    if gallery is not None:
        gallery.check_backbone(embedder.digest, embedder.dimension, embedder.preprocessing)
    return embedder, lambda dataset: reading_of(options, dataset, accelerator)


def _data_source(embedder: Embedder, dataset: IdentityDataset, reading: Reading) -> Source:
    unreadable: list[str] = [*dataset.skipped]

    def enrolments(chosen: npt.NDArray[np.bool_] | None, thumbnails: Callable[[str], bool]) -> Iterator[Enrolment]:
        places = None if chosen is None else np.flatnonzero(chosen)
        return enrol_data(embedder, dataset, reading, unreadable=unreadable, chosen=places, thumbnails=thumbnails)

    def names() -> list[str]:
        of = names_of(dataset)
        return [of[label] for label in dataset.labels.tolist()]

    return Source(
        embedder.dimension,
        embedder.digest,
        embedder.preprocessing,
        embedder.source,
        names,
        enrolments,
        unreadable,
    )


def _embeddings_source(options: argparse.Namespace, gallery: Gallery | None) -> Source:
    files = EmbeddingFiles.open(options.embeddings)
    backbone = files.backbone or options.backbone
    if backbone is None:
        raise UserError(f"{files.path} does not say of which backbone its embeddings are; name it with --backbone")
    if options.backbone is not None and files.backbone not in (None, options.backbone):
        raise UserError(f"{files.path} is of the backbone {files.backbone[:12]}; leave --backbone out")

    def enrolments(chosen: npt.NDArray[np.bool_] | None, thumbnails: Callable[[str], bool]) -> Iterator[Enrolment]:
        return enrol_files(files, chosen)

    def names() -> list[str]:
        return [name for rows in files.parts() for name in rows.identities]

    return Source(
        files.dimension,
        backbone,
        files.preprocessing,
        files.source,
        names,
        enrolments,
        [],
    )
