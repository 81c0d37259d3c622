"""What a data set of identities is, whatever it is read from, and the settings that name one.

Data's story: n images with `labels` int64 [n] in 0..num_identities-1, read by position, in any order, from any number of processes.

    IdentityDataset     labels, names, shape; load(index) -> uint8 [C, H, W], or load_into(index, a place in a batch [H, W, C])
    EncodedIdentities   the same of encoded pictures (JPEG, PNG, ...), which are decoded when loaded: encoded(index) -> bytes; select

What is wrong with a file is said once, where it shows: a set that cannot be opened raises UserError; a sample that has no label, and so
no place in the set, is named in `left_out`; a picture that cannot be decoded raises UnreadableImage when it is loaded.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.training.data.config import Format, MixedSet, check_mix
from partial_fc.training.data.decode import Fit, decode_into
from partial_fc.training.data.labels import LabelMap
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.data.samplers import SamplerName, check_settings
from partial_fc.training.errors import UserError

Pixels = npt.NDArray[np.uint8]
Set = TypeVar("Set", bound="IdentityDataset")

_LISTED = 1000  # a fingerprint names files up to so many, and has one digest of more
_COMPARED = 100  # of so many pictures, evenly spaced, it has a digest of what is in them


@dataclass
class DataConfig:
    """Which images to train on."""

    folder: str | None = None
    """Images of your own, in any of the formats of docs/data.md; without it, the embedded glyphs are used."""
    format: Format = "auto"
    """What lies in the folder; auto looks, and says what it looked for if it finds nothing."""
    image_column: str | None = None
    """Column of Parquet files that has the images; found by its type if there is one only."""
    label_column: str | None = None
    """Column of Parquet files that has the identities; found by usual names, such as label."""
    split: str | None = None
    """Which split to read of Parquet files or tar shards that are of several by their names, such as train-00000 and test-00000."""
    identities: int | None = None
    """How many identities to train on; without it, all of them."""
    holdout_identities: int = 0
    """How many identities of a folder to keep out of training for evaluation, drawn by seed; glyphs have their own."""
    image_size: int | None = None
    """Side of the square images, in pixels: those of a folder are resized to it (112 if not given); glyphs have 32."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour: images of a folder are converted (to 3 if not given); the glyphs have 1."""
    min_images: int = 1
    """Fewest images of an identity to train on; those with fewer are left out, and the others numbered anew (labels.csv of the run)."""
    sampler: SamplerName = "shuffled"
    """Order of an epoch: all images shuffled; pk, identities x images a batch; class_aware, rare classes more often (docs/samplers.md)."""
    images_per_identity: int | None = None
    """Images of an identity in a batch; pk only, 4 if not given."""
    class_exponent: float | None = None
    """Power of a class's number of images that it is drawn by, 0 (all alike) to 1 (as they are); class_aware only, 0.5 if not given."""
    mix: list[MixedSet] = field(default_factory=list)
    """Data sets beside this one, each with a share of every batch and a head of its own: [{name, folder, weight}], see docs/samplers.md."""
    workers: int | None = None
    """How many processes a rank starts to load images; 0 loads them in the training process, null chooses by the cores a rank has."""
    prefetch: int = 2
    """Batches that each of those processes loads ahead."""
    on_error: Literal["skip", "raise"] = "skip"
    """What to do about an image that cannot be read: leave it out and report it, or stop."""

    def __post_init__(self) -> None:
        at_least = {
            "identities": 1,
            "holdout_identities": 0,
            "image_size": 1,
            "min_images": 1,
            "workers": 0,
            "prefetch": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--data.{name} is {value}; give at least {least}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--data.channels is {self.channels}; give 1 (grey) or 3 (colour)")
        check_mix(self.mix)
        check_settings(self.sampler, self.images_per_identity, self.class_exponent)


class UnreadableImage(Exception):
    """An image that cannot be decoded: `path` as the data set names it, `reason` in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class IdentityDataset(ABC):
    """n images, each of one of `num_identities` identities."""

    labels: torch.Tensor
    """int64 [n], 0..num_identities-1, every number in use."""
    identity_names: list[str]
    """[num_identities], what a label stands for."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of every loaded image."""
    left_out: Sequence[str] = ()
    """Samples of the files that are not in the set because they are damaged, each as "name (reason)"."""
    notes: Sequence[str] = ()
    """What is odd about the files and does no harm."""
    raw_labels: Sequence[str] = ()
    """[num_identities], labels as the files have them, where they are numbers."""
    in_memory = False
    """Whether loading an image is no work, so that processes for it are of no use."""

    @property
    def num_identities(self) -> int:
        return len(self.identity_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What to call image `index` in a message."""

    @abstractmethod
    def load(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 [C, H, W]; raises UnreadableImage for a damaged file."""

    def load_into(self, index: int, out: Pixels) -> None:
        """Image `index` into `out` uint8 [H, W, C], a place in a batch; raises UnreadableImage for a damaged file."""
        out[...] = self.load(index).permute(1, 2, 0).numpy()

    def content(self, index: int) -> bytes | memoryview:
        """Image `index` as it is kept: encoded, or its pixels; raises UnreadableImage if it cannot be had."""
        return self.load(index).numpy().tobytes()

    def _of_identities(self: Set, identities: Sequence[int]) -> tuple[Set, torch.Tensor]:
        """(a copy that has these identities alone, numbered anew in the order given; where its images are in this set, int64 [n'])."""
        chosen = torch.tensor(list(identities), dtype=torch.int64)
        place = torch.full((self.num_identities,), -1, dtype=torch.int64)
        place[chosen] = torch.arange(len(chosen))
        labels = place[self.labels]
        kept = (labels >= 0).nonzero()[:, 0]
        kept = kept[labels[kept].argsort(stable=True)]
        other = copy.copy(self)
        other.labels = labels[kept]
        other.identity_names = [self.identity_names[identity] for identity in chosen.tolist()]
        return other, kept

    def files(self) -> Iterable[tuple[str, int]]:
        """(name, bytes) of the files that the set is read from."""
        return ()

    def fingerprint(self) -> dict[str, Any]:
        """What the set is, to find out later whether it is another: counts, and digests of names, labels, files and some pictures."""
        names = hashlib.blake2b(digest_size=16)
        for name in self.identity_names:
            names.update(name.encode("utf-8", "surrogateescape") + b"\0")
        listed: dict[str, int] = {}
        files, count, total = hashlib.blake2b(digest_size=16), 0, 0
        for name, size in self.files():
            files.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            count, total = count + 1, total + size
            if count <= _LISTED:
                listed[name] = size
        labels = np.ascontiguousarray(self.labels.numpy()).astype("<i8", copy=False)
        return {
            "images": len(self),
            "identities": self.num_identities,
            "image_shape": list(self.image_shape),
            "names": names.hexdigest(),
            "labels": hashlib.blake2b(labels.data, digest_size=16).hexdigest(),
            "files": count,
            "bytes": total,
            "digest": files.hexdigest(),
            "pictures": self._digest_of_some(),
            **({"listed": listed} if 0 < count <= _LISTED else {}),
        }

    def _digest_of_some(self) -> str:
        """Of what is in _COMPARED pictures: others of the same sizes under the same names are other data."""
        digest = hashlib.blake2b(digest_size=16)
        for index in np.unique(np.linspace(0, len(self) - 1, _COMPARED).astype(np.int64)).tolist() if len(self) else ():
            try:
                digest.update(hashlib.blake2b(self.content(index), digest_size=16).digest())
            except UnreadableImage:
                digest.update(b"unreadable")
        return digest.hexdigest()


class EncodedIdentities(IdentityDataset):
    """Encoded pictures, decoded whenever they are loaded: to grey (`channels` 1) or colour (3), and resized, bilinear, to `image_size` x
    `image_size` pixels.

    A format has `_encoded(row)` and `_name(row)`; a row is a picture's place in the files, an index its place in this set.
    """

    def __init__(self, labels: torch.Tensor, identity_names: list[str], image_size: int, channels: int) -> None:
        if image_size < 1 or channels not in (1, 3):
            raise UserError(
                f"images of {image_size} pixels in {channels} channels; give at least 1 pixel, and 1 or 3 channels"
            )
        self.labels = labels
        self.identity_names = identity_names
        self.image_shape = (channels, image_size, image_size)
        self._rows: torch.Tensor | None = None

    @abstractmethod
    def _encoded(self, row: int) -> bytes | memoryview:
        """The encoded picture; ValueError, OSError or UnreadableImage if it cannot be had."""

    @abstractmethod
    def _name(self, row: int) -> str: ...

    def row_of(self, index: int) -> int:
        """The place in the files of image `index`."""
        return index if self._rows is None else int(self._rows[index])

    def name_of(self, index: int) -> str:
        return self._name(self.row_of(index))

    def encoded(self, index: int) -> bytes | memoryview:
        """Image `index` as it lies in the files; raises UnreadableImage if it cannot be had."""
        try:
            return self._encoded(self.row_of(index))
        except (ValueError, OSError) as error:
            raise self._unreadable(index, error) from error

    def content(self, index: int) -> bytes | memoryview:
        return self.encoded(index)

    def load(self, index: int) -> torch.Tensor:
        channels, height, width = self.image_shape
        out = np.empty((height, width, channels), dtype=np.uint8)
        self.load_into(index, out)
        return torch.from_numpy(out).permute(2, 0, 1).contiguous()

    def load_into(self, index: int, out: Pixels) -> None:
        data = self.encoded(index)
        try:
            decode_into(data, out)
        except Exception as error:  # a damaged file makes decoders raise almost anything, not OSError alone
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> UnreadableImage:
        return UnreadableImage(self.name_of(index), reason_of(error))

    def select(self, identities: Sequence[int]) -> EncodedIdentities:
        """The data set of these identities alone, numbered anew in the order given; the images of each in the order of the files."""
        other, kept = self._of_identities(identities)
        other._rows = kept if self._rows is None else self._rows[kept]
        return other


def decode_picture(
    source: str | Path | bytes, image_shape: tuple[int, int, int], name: str, fit: Fit | None = None
) -> torch.Tensor:
    """An encoded picture, or a file of one, as uint8 [C, H, W] of that shape, resized (bilinear) or by `fit`; UnreadableImage, as `name`,
    for a bad one."""
    channels, height, width = image_shape
    out = np.empty((height, width, channels), dtype=np.uint8)
    try:
        decode_into(source if isinstance(source, bytes) else read_whole(source), out, fit)
    except Exception as error:  # a damaged file makes decoders raise almost anything, not OSError alone
        raise UnreadableImage(name, reason_of(error)) from error
    return torch.from_numpy(out).permute(2, 0, 1).contiguous()


def reason_of(error: Exception) -> str:
    """One line about a file that cannot be had or decoded."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


@dataclass
class DataSplits:
    """What a run trains on, and what it is evaluated on; no identity is in both."""

    train: IdentityDataset
    evaluation: dict[str, IdentityDataset] = field(default_factory=dict)
    """By name: "seen" and "new" for the glyphs; "holdout" for a folder, if identities are held out."""
    label_map: LabelMap | None = None
    """What became of each identity; None where every one is trained on as it is."""

    def check_evaluation(self) -> None:
        """Raise UserError, before any training, for held-out sets in which there is no pair to accept or none to reject."""
        for name, dataset in self.evaluation.items():
            if dataset.num_identities < 2:
                raise UserError(
                    f"the {name} set has one identity, so no pair to reject; give --data.holdout_identities at least 2"
                )
            if int(torch.bincount(dataset.labels).max()) < 2:
                raise UserError(
                    f"no identity of the {name} set has two images, so there is no pair to accept; hold out others, or none"
                )

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Of every set, by name."""
        return {name: dataset.fingerprint() for name, dataset in {"training": self.train, **self.evaluation}.items()}


def what_changed(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str | None:
    """In words, the first difference of two fingerprints of `DataSplits`; None if there is none."""
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            return f"there is {'a new' if name in now else 'no'} {name} set" + ("" if name in now else " any more")
    for name, then in before.items():
        for key in ("images", "identities", "image_shape"):
            if then[key] != now[name][key]:
                return f"the {name} set had {then[key]} {key} and has {now[name][key]}"
    for name, then in before.items():
        there = now[name]
        old, new = then.get("listed", {}), there.get("listed", {})
        for file in sorted(old.keys() | new.keys()):
            if old.get(file) != new.get(file):
                sizes = [
                    f"{size:,} bytes" if size is not None else "not there" for size in (old.get(file), new.get(file))
                ]
                return f"{file} of the {name} set was {sizes[0]} and is {sizes[1]}"
        for key, words in (
            ("names", "identities of the {} set have other names"),
            ("labels", "images of the {} set have other labels"),
            ("digest", "files of the {} set have other names or sizes"),
            ("pictures", "pictures of the {} set are others than they were"),
        ):
            if key in then and then[key] != there[key]:  # earlier versions noted no pictures
                return words.format(name)
    return None


def enough(asked: int | None, available: int, where: str) -> int:
    """How many identities to take: all, or those asked for; UserError if there are fewer."""
    if asked is None:
        return available
    if asked < 1:
        raise UserError(f"{asked} identities were asked for; give at least 1")
    if asked > available:
        raise UserError(
            f"{asked} identities were asked for, but there are {available} in {where}; lower --data.identities"
        )
    return asked


def number_labels(values: Sequence[str] | npt.NDArray[np.int64]) -> tuple[torch.Tensor, list[str]]:
    """(labels int64 [n] in 0..C-1, names [C]) of labels as files have them: whole numbers in their order, or strings in theirs."""
    raw = np.asarray(values) if len(values) else np.empty(0, dtype=np.int64)
    found, labels = np.unique(raw, return_inverse=True)
    return torch.from_numpy(labels.reshape(-1).astype(np.int64)), [str(each) for each in found.tolist()]


def refuse(problems: Sequence[str], on_error: str) -> None:
    """UserError for the first of the samples that are left out, if the policy is to stop."""
    if problems and on_error == "raise":
        more = f", and {len(problems) - 1:,} more like it" if len(problems) > 1 else ""
        raise UserError(f"cannot read {problems[0]}{more}; mend or remove it, or pass --data.on_error skip")
