"""Settings of the training data (`data.*`), and of the data sets that are mixed into them (`data.mix`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from partial_fc.training.data.samplers import SamplerName, check_settings
from partial_fc.training.errors import UserError

Format = Literal["auto", "folder", "list", "recordio", "webdataset", "parquet"]


@dataclass
class MixedSet:
    """A data set beside the run's own, with a head of its own (`training/mixing.py`)."""

    name: str
    """Name of its head: letters, digits and underscores."""
    folder: str | None = None
    """Its images, in any of the formats of docs/data.md; if not given, the embedded glyphs."""
    format: Format = "auto"
    """Format of its folder; auto detects it."""
    image_column: str | None = None
    """Column of its Parquet files that holds the images; found by type if there is only one."""
    label_column: str | None = None
    """Column of its Parquet files that holds the identities; found by common names, such as label."""
    split: str | None = None
    """Which split to read, if the names of its files show several."""
    weight: float = 1.0
    """Its share of a batch, relative to the run's own data set, whose weight is 1."""
    identities: int | None = None
    """How many identities to use; all if not given."""
    m: float | None = None
    """Argument `margin` of its head's margin; that of --head.margin if not given."""
    scale: float | None = None
    """Argument `scale` of its head's margin; that of --head.margin if not given."""


def check_mix(sets: list[MixedSet]) -> None:
    """Raise UserError for names that are not identifiers or not unique, and for weights that are not positive."""
    names = ["main"]
    for each in sets:
        if not each.name.isidentifier() or each.name in names:
            raise UserError(
                f"--data.mix has a set named {each.name!r}; give every set a unique name of letters, digits and "
                "underscores (main is the run's own data set)"
            )
        if not (math.isfinite(each.weight) and each.weight > 0):
            raise UserError(f"--data.mix: the weight of {each.name} is {each.weight}; give a number above 0")
        names.append(each.name)


@dataclass
class DataConfig:
    """Which images to train on."""

    folder: str | None = None
    """Your own images, in any of the formats of docs/data.md; if not given, the embedded glyphs are used."""
    format: Format = "auto"
    """Format of the folder; auto detects it."""
    image_column: str | None = None
    """Column of Parquet files that holds the images; found by type if there is only one."""
    label_column: str | None = None
    """Column of Parquet files that holds the identities; found by common names, such as label."""
    split: str | None = None
    """Which split of Parquet or tar files to read, if their names show several, such as train-00000 and test-00000."""
    identities: int | None = None
    """How many identities to train on; all if not given."""
    holdout_identities: int = 0
    """How many identities of a folder to hold out for evaluation, drawn by the seed; the glyphs have their own."""
    image_size: int | None = None
    """Side of the square images, in pixels: images of a folder are resized to it (112 if not given); glyphs have 32."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour: images of a folder are converted (to 3 if not given); the glyphs have 1."""
    min_images: int = 1
    """Fewest images of an identity to train on; others are skipped, and labels renumbered (labels.csv of the run)."""
    sampler: SamplerName = "shuffled"
    """Order of an epoch: shuffled; pk, identities x images; class_aware, rare classes more often (docs/samplers.md)."""
    images_per_identity: int | None = None
    """Images of each identity in a batch; for pk only, 4 if not given."""
    class_exponent: float | None = None
    """Exponent e of class_aware: a class with n images is drawn in proportion to n^e; 0 to 1, 0.5 if not given."""
    mix: list[MixedSet] = field(default_factory=list)
    """More data sets, each with a share of every batch and its own head: [{name, folder, weight}]; docs/samplers.md."""
    workers: int | None = None
    """Processes that load images on each rank; 0 loads in the training process, null chooses by the rank's cores."""
    prefetch: int = 2
    """Batches that each of those processes loads ahead."""
    on_error: Literal["skip", "raise"] = "skip"
    """What to do with an image that cannot be read: skip and report it, or stop."""

    def __post_init__(self) -> None:
        minimum = {
            "identities": 1,
            "holdout_identities": 0,
            "image_size": 1,
            "min_images": 1,
            "workers": 0,
            "prefetch": 1,
        }
        for name, least in minimum.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--data.{name} is {value}; give at least {least}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--data.channels is {self.channels}; give 1 (grey) or 3 (colour)")
        check_mix(self.mix)
        check_settings(self.sampler, self.images_per_identity, self.class_exponent)
