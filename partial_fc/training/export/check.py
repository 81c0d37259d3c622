"""Comparison of exported files with the backbone in torch, on real images.

real images [12, C, H, W]   ── batches of 1, 3 and 8 ──>  embeddings of the backbone, embeddings of the file
  -> largest difference of a coordinate over the largest coordinate, per batch size; it must be below TOLERANCE
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, UnreadableImage, open_data, open_source
from partial_fc.training.data.augment import to_float
from partial_fc.training.errors import UserError

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


def real_images(config: RunConfig, shape: tuple[int, int, int], data: Sequence[str | Path]) -> tuple[Tensor, str]:
    """Return images for the check, float32 `[sum(BATCHES), C, H, W]` in [-1, 1], and the data sets they are from.

    They are readable images from the folders `data`, or from the run's held-out sets, or from its training set,
    evenly from each set; if there are too few, they are repeated.
    """
    try:
        if data:
            sets: dict[str, IdentityDataset] = {str(each): open_source(each, shape[1], shape[0]) for each in data}
        else:
            splits = open_data(config.data, config.seed)
            sets = splits.evaluation or {"training": splits.train}
    except UserError as error:
        raise UserError(_about_export_data(str(error), given=bool(data))) from error
    wanted = sum(BATCHES)
    images: list[Tensor] = []
    readable = [itertools.chain(_readable(each), itertools.repeat(None)) for each in sets.values()]
    for one_of_each in zip(*readable, strict=False):
        if len(images) >= wanted or all(image is None for image in one_of_each):
            break
        images += [image for image in one_of_each if image is not None]
    if not images:
        raise UserError(f"no image of {', '.join(sets)} can be read; name a folder of identity/image files with --data")
    repeated = list(itertools.islice(itertools.cycle(images), wanted))
    return to_float(torch.stack(repeated)), f"{min(len(images), wanted)} images of {', '.join(sets)}"


def _about_export_data(text: str, given: bool) -> str:
    """Return an error message of the training data with the options of the export command."""
    if given:
        return text.replace("--data.folder", "--data").replace("choose one with --data.split", "name one of its files")
    hint = "; or name a folder of identity/image files to check the export with: --data"
    return text.replace("--data.folder", "data.folder") + hint


def _readable(dataset: IdentityDataset) -> Iterator[Tensor]:
    """Yield the readable images, uint8 [C, H, W] each, in strides, so that the first few are of many identities."""
    stride = max(1, len(dataset) // sum(BATCHES))
    for index in itertools.chain.from_iterable(range(first, len(dataset), stride) for first in range(stride)):
        try:
            yield dataset.load(index)
        except UnreadableImage:
            continue
