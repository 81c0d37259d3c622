"""Settings of a data set that is mixed into a run (mixing.py), and the formats that any may have."""

import math
from dataclasses import dataclass
from typing import Literal

from partial_fc.training.errors import UserError

Format = Literal["auto", "folder", "list", "recordio", "webdataset", "parquet"]


@dataclass
class MixedSet:
    """A data set beside the run's own, with a head of its own."""

    name: str
    """What its head is called; letters, digits and underscores."""
    folder: str | None = None
    """Its images, in any of the formats of docs/data.md; without it, the embedded glyphs."""
    format: Format = "auto"
    """What lies in its folder; auto looks."""
    image_column: str | None = None
    """Column of its Parquet files that has the images; found by its type if there is one only."""
    label_column: str | None = None
    """Column of its Parquet files that has the identities; found by usual names, such as label."""
    split: str | None = None
    """Which of its splits to read, where its files are of several by their names."""
    weight: float = 1.0
    """Its share of a batch, over that of the run's own data set, which is 1."""
    identities: int | None = None
    """How many identities to take; all if not given."""
    m: float | None = None
    """Argument `margin` of the margin of its head; that of --head.margin if not given."""
    scale: float | None = None
    """Argument `scale` of the margin of its head; that of --head.margin if not given."""


def check_mix(sets: list[MixedSet]) -> None:
    """UserError for names that are taken or no names, and weights that are none."""
    names = ["main"]
    for each in sets:
        if not each.name.isidentifier() or each.name in names:
            raise UserError(
                f"--data.mix has a set named {each.name!r}; give each a name of its own (main is the run's own data set)"
            )
        if not (math.isfinite(each.weight) and each.weight > 0):
            raise UserError(f"--data.mix: the weight of {each.name} is {each.weight}; give a number above 0")
        names.append(each.name)
