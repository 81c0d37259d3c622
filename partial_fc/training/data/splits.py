"""The data sets of a run: one to train on, others to evaluate on; which identities are held out, and whether the data
have changed since the run began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from partial_fc.training.data.augment import stream_key
from partial_fc.training.data.dataset import IdentityDataset
from partial_fc.training.data.labels import LabelMap
from partial_fc.training.errors import UserError

Fingerprint = dict[str, Any]
"""What `IdentityDataset.fingerprint` returns."""
TRAINING = "training"  # the name of the training set in the fingerprint of all sets


@dataclass
class DataSplits:
    """The training set and the evaluation sets of a run; no identity is in both."""

    train: IdentityDataset
    evaluation: dict[str, IdentityDataset] = field(default_factory=dict)
    """By name: "seen" and "new" for the glyphs; "holdout" for a folder with held-out identities."""
    label_map: LabelMap | None = None
    """The label of each identity in this run; None if all identities are trained on under their own labels."""

    def check_evaluation(self) -> None:
        """Raise UserError if an evaluation set has no pair to accept or no pair to reject."""
        for name, dataset in self.evaluation.items():
            if dataset.num_identities < 2:
                raise UserError(
                    f"the {name} set has only one identity, so it has no pair to reject; set --data.holdout_identities "
                    "to at least 2"
                )
            if int(torch.bincount(dataset.labels).max()) < 2:
                raise UserError(
                    f"no identity of the {name} set has two images, so it has no pair to accept; hold out other "
                    "identities, or none"
                )

    def fingerprint(self) -> dict[str, Fingerprint]:
        """Return the fingerprint of every set, by name."""
        return {name: dataset.fingerprint() for name, dataset in {TRAINING: self.train, **self.evaluation}.items()}


def split_identities(count: int, holdout: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the (training, held-out) identities of `count`, both in rising order; `seed` alone decides the draw."""
    if holdout >= count > 0:
        raise UserError(
            f"holding out {holdout} of {count} identities leaves none to train on; lower --data.holdout_identities"
        )
    rng = np.random.Generator(np.random.Philox(key=stream_key(seed)))
    held = np.zeros(count, dtype=bool)
    held[rng.permutation(count)[:holdout]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def what_changed(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> str | None:
    """Describe the first difference between two results of `DataSplits.fingerprint`; None if they are equal."""
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"there is no {name} set any more"
        if name not in before:
            return f"there is a new {name} set"
    for name, old in before.items():
        for key in ("images", "identities", "image_shape"):
            if old[key] != now[name][key]:
                return f"the {name} set had {old[key]} {key} and has {now[name][key]}"
    for name, old in before.items():
        new = now[name]
        if found := _changed_file(old.get("listed", {}), new.get("listed", {}), name):
            return found
        for key, words in (
            ("names", "identities of the {} set have other names"),
            ("labels", "images of the {} set have other labels"),
            ("digest", "files of the {} set have other names or sizes"),
            ("pictures", "images of the {} set have other content"),
        ):
            unknown = "" in (old.get(key, ""), new[key])  # earlier versions did not store "pictures"
            if not unknown and old[key] != new[key]:
                return words.format(name)
    return None


def _changed_file(old: Mapping[str, int], new: Mapping[str, int], name: str) -> str | None:
    """Describe the first file that appeared, vanished or changed its size; `old` and `new`: name -> bytes."""
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            was, now = (f"{sizes[file]:,} bytes" if file in sizes else "missing" for sizes in (old, new))
            return f"{file} of the {name} set was {was} and is {now}"
    return None
