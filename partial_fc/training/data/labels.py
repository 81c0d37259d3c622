"""Which identities of a data set are trained on, and under which label: decided before a run, saved beside it.

identities, by name, with their numbers of images
  held out for evaluation          no label
  fewer images than data.min_images  no label
  beyond data.identities           no label
  the others                       0 .. C - 1, in the order of the data set

labels.csv in a run folder has a line for every identity of the data set:

    label,identity,source_label,images
    ,person_0001,0,2              left out
    0,person_0002,1,17            row 0 of the head is person_0002
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.errors import UserError

LABELS = "labels.csv"


@dataclass
class LabelMap:
    """What became of each identity of a data set."""

    names: Sequence[str]
    """[identities], in the order of the data set."""
    images: Tensor
    """int64 [identities]."""
    labels: Tensor
    """int64 [identities]: the label in the run, -1 for those left out."""

    @classmethod
    def of(cls, names: Sequence[str], image_labels: Tensor, kept: Sequence[int] | None = None) -> LabelMap:
        """Of a data set with those names and `image_labels` `[n]`; `kept`: the identities trained on, in the order of their labels."""
        labels = torch.full((len(names),), -1, dtype=torch.int64)
        chosen = torch.arange(len(names)) if kept is None else torch.tensor(kept, dtype=torch.int64)
        labels[chosen] = torch.arange(len(chosen))
        return cls(names, torch.bincount(image_labels, minlength=len(names)), labels)

    def write(self, path: Path) -> None:
        """labels.csv; the names may hold anything."""
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.writer(file)
            lines.writerow(("label", "identity", "source_label", "images"))
            rows = zip(self.labels.tolist(), self.names, self.images.tolist(), strict=True)
            lines.writerows(
                ("" if label < 0 else label, name, source, images) for source, (label, name, images) in enumerate(rows)
            )


def with_enough_images(identities: Sequence[int], image_labels: Tensor, least: int) -> list[int]:
    """Those of `identities` that have at least `least` of the images with `image_labels` `[n]`; UserError if none is left of some."""
    if least <= 1 or not len(identities):
        return list(identities)
    asked = torch.tensor(identities)
    counts = torch.bincount(image_labels, minlength=int(asked.max()) + 1)[asked]
    if int(counts.max()) < least:
        raise UserError(
            f"no identity has {least} images (the largest has {int(counts.max())}); lower --data.min_images"
        )
    kept: list[int] = asked[counts >= least].tolist()
    return kept
