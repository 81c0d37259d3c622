"""Which identities of a data set are trained on, and under which label: decided before a run, and saved with it.

    held out for evaluation               no label
    fewer images than data.min_images     no label
    beyond data.identities                no label
    the others                            0 .. C - 1, in the order of the data set

labels.csv in a run folder has a line for every identity of the data set:

    label,identity,source_label,images
    ,person_0001,0,2              not trained on
    0,person_0002,1,17            class 0 of the head is person_0002
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.errors import UserError
from partial_fc.training.files import told, write_atomically

LABELS = "labels.csv"


@dataclass
class LabelMap:
    """The label of every identity of a data set in this run."""

    names: Sequence[str]
    """[identities], in the order of the data set."""
    images: Tensor
    """int64 [identities], the number of images of each."""
    labels: Tensor
    """int64 [identities], the label in this run; -1 for identities that are not trained on."""

    @classmethod
    def of(cls, names: Sequence[str], image_labels: Tensor, kept: Sequence[int] | None = None) -> LabelMap:
        """Return the map for a data set with these identity names and the labels `image_labels` [n] of its images.

        kept: the identities that are trained on, in the order of their new labels; all if None.
        """
        labels = torch.full((len(names),), -1, dtype=torch.int64)
        chosen = torch.arange(len(names)) if kept is None else torch.tensor(kept, dtype=torch.int64)
        labels[chosen] = torch.arange(len(chosen))
        return cls(names, torch.bincount(image_labels, minlength=len(names)), labels)

    def write(self, path: Path) -> None:
        """Write labels.csv. Names may contain any character."""
        with io.StringIO(newline="") as text:
            lines = csv.writer(text)
            lines.writerow(("label", "identity", "source_label", "images"))
            identities = zip(self.labels.tolist(), self.names, self.images.tolist(), strict=True)
            for source_label, (label, name, images) in enumerate(identities):
                lines.writerow(("" if label < 0 else label, name, source_label, images))
            write_atomically(path, text.getvalue())


def class_names(path: Path) -> list[str]:
    """Return the identity of each class, from a labels.csv. Raises UserError if it is damaged."""
    with told(path, again="restore it"), path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        classes = {int(row["label"]): row["identity"] for row in csv.DictReader(file, strict=True) if row["label"]}
        if sorted(classes) != list(range(len(classes))) or None in classes.values():
            raise ValueError("labels are missing")
        return [classes[label] for label in range(len(classes))]


def with_enough_images(identities: Sequence[int], image_labels: Tensor, least: int) -> list[int]:
    """Return those of `identities` that have at least `least` images; `image_labels` [n] are the labels of all images.

    Raises UserError if no identity is left.
    """
    if least <= 1 or not len(identities):
        return list(identities)
    requested = torch.tensor(identities)
    counts = torch.bincount(image_labels, minlength=int(requested.max()) + 1)[requested]
    if int(counts.max()) < least:
        raise UserError(
            f"no identity has {least} images (the largest has {int(counts.max())}); lower --data.min_images"
        )
    kept: list[int] = requested[counts >= least].tolist()
    return kept
