"""A packed data set: many small images in one memory-mapped file, as `partial-fc data glyphs` writes them.

    folder/packed.json    names of the identities and sources, which of them are held out, how the set was made
           images.npy     uint8 [n, C, H, W], sorted by identity; memory-mapped, so all processes of a machine share it
           labels.npy     int32 [n], identities
           sources.npy    int32 [n], where each image comes from: its design, camera, shop, ...

An identity or a source that is held out is never trained on:

    train    other identities, other sources        seen    held-out identities, other sources
                                                    new     held-out identities, held-out sources
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.tiers import pages
from partial_fc.training.data.dataset import IdentityDataset, UnreadableImage
from partial_fc.training.errors import UserError
from partial_fc.training.files import write_atomically

INDEX, IMAGES, LABELS, SOURCES = "packed.json", "images.npy", "labels.npy", "sources.npy"
FORMAT = "partial_fc packed identities, 1"
PackedSplit = Literal["train", "seen", "new"]


def is_packed(folder: str | Path) -> bool:
    """Return whether the folder holds a packed data set."""
    return (Path(folder) / INDEX).is_file()


def packed_splits(folder: str | Path, split: str | None = None) -> dict[str, PackedIdentities]:
    """Return the splits of the packed data set in `folder` by name: train, and seen and new if they exist.

    Only `split` if it is given; raises UserError if the set does not have it.
    """
    held_out = read_index(folder)["held_out"]
    names: list[PackedSplit] = ["train"]
    if held_out["identities"]:
        names += ["seen", "new"] if held_out["sources"] else ["seen"]
    if split not in (None, *names):
        raise UserError(f"{folder} has no split {split!r}, only {', '.join(names)}; give another --split")
    return {name: PackedIdentities(folder, name) for name in names if split in (None, name)}


class PackedIdentities(IdentityDataset):
    """One split of the packed data set in `folder`."""

    in_memory = True

    positions: npt.NDArray[np.int64]
    """[n], the position of each image of the split in images.npy."""
    sources: npt.NDArray[np.int64]
    """[n], the source of each image of the split."""

    def __init__(self, folder: str | Path, split: PackedSplit = "train") -> None:
        self.folder = Path(folder)
        index = read_index(folder)
        labels = _numbers(self.folder, LABELS)
        sources = _numbers(self.folder, SOURCES)
        held_identity = np.zeros(len(index["identities"]), bool)
        held_source = np.zeros(len(index["sources"]), bool)
        try:
            held_identity[index["held_out"]["identities"]] = True
            held_source[index["held_out"]["sources"]] = True
            in_split = (held_identity[labels] == (split != "train")) & (held_source[sources] == (split == "new"))
        except (IndexError, ValueError) as error:
            raise UserError(f"the packed data set {folder} is damaged ({error}); make it again") from error
        shape = self._images.shape
        negative = (labels < 0).any() or (sources < 0).any()
        pictures = len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) > 0 and self._images.dtype == np.uint8
        if not pictures or not len(labels) == len(sources) == shape[0] or negative:
            raise UserError(
                f"the packed data set {folder} is damaged: {IMAGES}, {LABELS} and {SOURCES} do not match, or "
                f"{IMAGES} is not uint8 [n, 1 or 3, height, width]; make it again"
            )
        used = np.unique(labels[in_split])
        self.positions = np.flatnonzero(in_split)
        self.sources = sources[self.positions]
        self.source_names = index["sources"]
        self.labels = torch.from_numpy(np.searchsorted(used, labels[self.positions]))
        self.identity_names = [index["identities"][identity] for identity in used.tolist()]
        self.image_shape = (shape[1], shape[2], shape[3])

    @functools.cached_property
    def _images(self) -> npt.NDArray[np.uint8]:
        return _open(self.folder, IMAGES)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory map: another process maps the file itself."""
        return {name: value for name, value in vars(self).items() if name != "_images"}

    def name_of(self, index: int) -> str:
        return f"{self.identity_names[int(self.labels[index])]} in {self.source_names[self.sources[index]]}"

    def files(self) -> Iterable[tuple[str, int]]:
        return [(name, (self.folder / name).stat().st_size) for name in (INDEX, IMAGES, LABELS, SOURCES)]

    def select(self, identities: Sequence[int]) -> PackedIdentities:
        """Return the data set of these identities only, renumbered in the order given."""
        other, kept = self._subset(identities)
        other.positions = self.positions[kept.numpy()]
        other.sources = self.sources[kept.numpy()]
        return other

    def load(self, index: int) -> torch.Tensor:
        image = self._images[self.positions[index]]
        try:
            pages.check(image.ctypes.data, image.nbytes)
        except OSError as error:
            raise UnreadableImage(self.name_of(index), f"{self.folder / IMAGES}: {error.strerror}") from error
        return torch.from_numpy(np.array(image))


def read_index(folder: str | Path) -> dict[str, Any]:
    """Return the content of packed.json; raise UserError if it is damaged or of another version."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {index['format']!r}; this version reads {FORMAT!r}: make the data set again"
            )
        names = [index[name] for name in ("identities", "sources")]
        held = [index["held_out"][name] for name in ("identities", "sources")]
        valid = all(isinstance(each, list) for each in (*names, *held))
        valid = valid and all(isinstance(each, str) for each in itertools.chain(*names))
        # a place below 0 would be one from the end
        valid = valid and all(
            type(each) is int and 0 <= each < len(of) for of, places in zip(names, held, strict=True) for each in places
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); make the data set again") from error
    if not valid:
        raise UserError(
            f"{path} has no lists of identities and sources, or places outside them; make the data set again"
        )
    return dict(index)


def write_index(
    folder: Path,
    identities: Sequence[str],
    sources: Sequence[str],
    held_out: Mapping[str, Sequence[int]],
    about: Mapping[str, Any],
) -> None:
    """Write packed.json atomically. It must be written last: a folder with a packed.json is complete.

    held_out: indices into `identities` and `sources`, under these keys. about: how the set was made.
    """
    index = {
        "format": FORMAT,
        "about": dict(about),
        "sources": list(sources),
        "held_out": dict(held_out),
        "identities": list(identities),
    }
    write_atomically(folder / INDEX, json.dumps(index, ensure_ascii=False))


def _read(folder: Path, name: str) -> npt.NDArray[Any]:
    """Return an array of the folder."""
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO((folder / name).read_bytes()), allow_pickle=False)
        return array
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise UserError(f"{folder / name} cannot be read ({error}); make the data set again") from error


def _numbers(folder: Path, name: str) -> npt.NDArray[np.int64]:
    """Return a list of whole numbers of the folder."""
    array = _read(folder, name)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{folder / name} has numbers {list(array.shape)} of {array.dtype}, not a list of integers; make the data "
            "set again"
        )
    return array.astype(np.int64)


def _open(folder: Path, name: str) -> npt.NDArray[Any]:
    """Memory-map an array of the folder."""
    try:
        array: npt.NDArray[Any] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        return array
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise UserError(f"{folder / name} cannot be read ({error}); make the data set again") from error
