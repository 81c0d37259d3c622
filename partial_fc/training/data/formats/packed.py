"""A data set of many small images in one memory-mapped file, such as `partial-fc data glyphs` makes: opened in a moment, shared by ranks.

    folder/packed.json    what it is: names of the identities and of the sources (designs), which of both are held out, where it came from
           images.npy     uint8 [n, C, H, W], sorted by identity; mapped, so that all processes of a machine share one copy of what is read
           labels.npy     int32 [n], identities
           sources.npy    int32 [n], where an image came from: its design, camera, shop, ...

An identity or a source that is held out is never trained on:

    train    other identities, other sources        seen    held-out identities, other sources
                                                    new     held-out identities, held-out sources
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.training.data.dataset import DataConfig, DataSplits, IdentityDataset, enough
from partial_fc.training.data.labels import LabelMap, with_enough_images
from partial_fc.training.errors import UserError

INDEX, IMAGES, LABELS, SOURCES = "packed.json", "images.npy", "labels.npy", "sources.npy"
FORMAT = "partial_fc packed identities, 1"
PackedSplit = Literal["train", "seen", "new"]
_HELD: tuple[PackedSplit, ...] = ("seen", "new")


def is_packed(folder: str | Path) -> bool:
    """Whether the folder holds a packed data set."""
    return (Path(folder) / INDEX).is_file()


def open_packed(config: DataConfig) -> DataSplits:
    """The splits of the packed folder that `config` names; UserError for settings that do not fit it."""
    assert config.folder is not None
    splits = packed_splits(config.folder)
    whole = splits.pop("train")
    channels, _, width = whole.image_shape
    if config.image_size not in (None, width) or config.channels not in (None, channels):
        raise UserError(
            f"the images of {config.folder} have {width} pixels and {channels} channel(s); drop --data.image_size and --data.channels"
        )
    if config.holdout_identities:
        raise UserError(
            f"the packed data set {config.folder} has its own held-out identities; drop --data.holdout_identities"
        )
    if config.split is not None:
        raise UserError(
            f"the packed data set {config.folder} is trained on as it was split when it was made; drop --data.split"
        )
    kept = with_enough_images(range(whole.num_identities), whole.labels, config.min_images)
    kept = kept[: enough(config.identities, len(kept), f"the packed data set {config.folder} (train)")]
    return DataSplits(whole.select(kept), {**splits}, LabelMap.of(whole.identity_names, whole.labels, kept))


def packed_splits(folder: str | Path, split: str | None = None) -> dict[str, PackedIdentities]:
    """The splits that the packed folder has, by name: train, and those held out; only `split` if it is given. UserError for one that is
    not there."""
    held = read_index(folder)["held_out"]
    there: list[PackedSplit] = ["train", *_HELD[: bool(held["identities"]) * (1 + bool(held["sources"]))]]
    if split not in (None, *there):
        raise UserError(f"{folder} has no split {split!r}, but {', '.join(there)}; give another --split")
    return {name: PackedIdentities(folder, name) for name in there if split in (None, name)}


class PackedIdentities(IdentityDataset):
    """One split of a packed folder."""

    in_memory = True

    def __init__(self, folder: str | Path, split: PackedSplit = "train") -> None:
        self.folder = Path(folder)
        index = read_index(folder)
        arrays = (_open(self.folder, LABELS), _open(self.folder, SOURCES))
        labels, sources = (np.asarray(array).astype(np.int64) for array in arrays)
        held_identity, held_source = np.zeros(len(index["identities"]), bool), np.zeros(len(index["sources"]), bool)
        try:
            held_identity[index["held_out"]["identities"]] = True
            held_source[index["held_out"]["sources"]] = True
            mine = (held_identity[labels] == (split != "train")) & (held_source[sources] == (split == "new"))
        except (IndexError, ValueError) as error:
            raise UserError(f"the packed data set {folder} is damaged ({error}); make it again") from error
        shape = self._images.shape
        if len(shape) != 4 or self._images.dtype != np.uint8 or not len(labels) == len(sources) == shape[0]:
            raise UserError(
                f"the packed data set {folder} is damaged: {IMAGES}, {LABELS} and {SOURCES} do not match; make it again"
            )
        used = np.unique(labels[mine])
        self._rows = np.flatnonzero(mine)
        self.labels = torch.from_numpy(np.searchsorted(used, labels[self._rows]))
        self.identity_names = [index["identities"][each] for each in used.tolist()]
        self.image_shape = (shape[1], shape[2], shape[3])
        self._sources, self._source_names = sources[self._rows], index["sources"]

    @functools.cached_property
    def _images(self) -> npt.NDArray[np.uint8]:
        return _open(self.folder, IMAGES)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the file itself."""
        return {name: value for name, value in vars(self).items() if name != "_images"}

    def name_of(self, index: int) -> str:
        return f"{self.identity_names[int(self.labels[index])]} in {self._source_names[self._sources[index]]}"

    def files(self) -> Iterable[tuple[str, int]]:
        return [(name, (self.folder / name).stat().st_size) for name in (INDEX, IMAGES, LABELS, SOURCES)]

    def select(self, identities: Sequence[int]) -> PackedIdentities:
        """The data set of these identities alone, numbered anew in the order given."""
        other, kept = self._of_identities(identities)
        other._rows, other._sources = self._rows[kept.numpy()], self._sources[kept.numpy()]
        return other

    def load(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._images[self._rows[index]]))


def read_index(folder: str | Path) -> dict[str, Any]:
    """What packed.json says; UserError for one that is damaged or of another version."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {index['format']!r}; this version reads {FORMAT!r}: make the data set again"
            )
        fine = all(isinstance(index[key], list) for key in ("identities", "sources")) and isinstance(
            index["held_out"], dict
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); make the data set again") from error
    if not fine:
        raise UserError(f"{path} does not have what it should; make the data set again")
    return dict(index)


def write_index(
    folder: Path,
    identities: Sequence[str],
    sources: Sequence[str],
    held_out: Mapping[str, Sequence[int]],
    about: Mapping[str, Any],
) -> None:
    """Write packed.json, last of all files and at once: a folder that has it is complete.

    held_out: numbers of `identities` and of `sources`.
    """
    index = {
        "format": FORMAT,
        "about": dict(about),
        "sources": list(sources),
        "held_out": dict(held_out),
        "identities": list(identities),
    }
    partly = folder / (INDEX + ".partly")
    partly.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    os.replace(partly, folder / INDEX)


def _open(folder: Path, name: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder / name} cannot be read ({error}); make the data set again") from error
