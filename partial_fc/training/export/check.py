"""The images of an export, and comparison of exported files with the backbone in torch on some of them.

the run's data, or --data   ── open_images ──>            sets to compare and measure on; images for calibration
real images [12, C, H, W]   ── batches of 1, 3 and 8 ──>  embeddings of the backbone, embeddings of the file
  -> largest difference of a coordinate over the largest coordinate, per batch size; it must be below TOLERANCE
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, UnreadableImage, open_source
from partial_fc.training.data.augment import to_float
from partial_fc.training.errors import UserError
from partial_fc.training.run import RunFolder
from partial_fc.training.run_data import data_of_run

TRAINING = "training"  # the name of the training set, where it stands in for held-out ones
BATCHES = (1, 3, 8)
TOLERANCE = 1e-4  # summation in another order differs by 1e-7 to 1e-5, a wrong export by far more


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], file: str) -> dict[int, float]:
    """Return batch size -> largest difference of a coordinate over the largest coordinate.

    found, expected: the embeddings of each batch, from `file` and from torch. Raises UserError for other shapes, or
    for a difference that is not below TOLERANCE.
    """
    differences = {}
    for exported, original in zip(found, expected, strict=True):
        if exported.shape != original.shape:
            raise UserError(
                f"{file} gives {list(exported.shape)} where the backbone gives {list(original.shape)}; "
                "nothing is exported"
            )
        largest = float(original.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        difference = float((exported.double() - original.double()).abs().max()) / largest
        if not difference < TOLERANCE:  # also for NaN
            raise UserError(
                f"{file} differs from the backbone in torch by {difference:.1e} of the largest coordinate on a batch "
                f"of {len(original)}, allowed is {TOLERANCE:.0e}; nothing is exported"
            )
        differences[len(original)] = difference
    return differences


@dataclass(frozen=True)
class ExportImages:
    """The data sets of an export, by name."""

    sets: dict[str, IdentityDataset]
    """Those of --data, or the run's held-out sets, or else its training set."""
    training: IdentityDataset | None
    """The run's training set; None if --data names other sets."""


def open_images(
    run: RunFolder, config: RunConfig, shape: tuple[int, int, int], data: Sequence[str | Path], *, training: bool
) -> ExportImages:
    """Open the data sets of an export: the folders `data`, or those of the run.

    training: the training set is used, too. Raises UserError for data that cannot be opened, or that have changed since
    the run began.
    """
    try:
        if data:
            return ExportImages({str(each): open_source(each, shape[1], shape[0]) for each in data}, None)
        splits = data_of_run(run, config, training=training)
    except UserError as error:
        raise UserError(_about_export_data(str(error), given=bool(data))) from error
    return ExportImages(dict(splits.evaluation) or {TRAINING: splits.train}, splits.train)


def real_images(sets: Mapping[str, IdentityDataset], wanted: int) -> tuple[Tensor, int]:
    """Return (images float32 `[wanted, C, H, W]` in [-1, 1], how many of them differ).

    They are readable images, evenly from each set; if there are too few, they are repeated. Raises UserError if no
    image can be read.
    """
    images: list[Tensor] = []
    readable = [itertools.chain(_readable(each, wanted), itertools.repeat(None)) for each in sets.values()]
    for one_of_each in zip(*readable, strict=False):
        if len(images) >= wanted or all(image is None for image in one_of_each):
            break
        images += [image for image in one_of_each if image is not None]
    if not images:
        raise UserError(f"no image of {', '.join(sets)} can be read; name a folder of identity/image files with --data")
    repeated = list(itertools.islice(itertools.cycle(images), wanted))
    return to_float(torch.stack(repeated)), min(len(images), wanted)


def _about_export_data(text: str, given: bool) -> str:
    """Return an error message of the training data with the options of the export command."""
    if given:
        return text.replace("--data.folder", "--data").replace("choose one with --data.split", "name one of its files")
    if "--data FOLDER" in text:
        return text
    hint = "; or name a folder of identity/image files to check the export with: --data"
    return text.replace("--data.folder", "data.folder") + hint


def _readable(dataset: IdentityDataset, wanted: int) -> Iterator[Tensor]:
    """Yield readable images, uint8 [C, H, W] each, in strides, so that the first `wanted` are of many identities."""
    stride = max(1, len(dataset) // wanted)
    for index in itertools.chain.from_iterable(range(first, len(dataset), stride) for first in range(stride)):
        try:
            yield dataset.load(index)
        except UnreadableImage:
            continue
