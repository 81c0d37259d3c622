"""What a data set of identities is, whatever it is read from.

n images with `labels` int64 [n] in 0..num_identities-1. They are read by index, in any order, from any number of
processes.

    IdentityDataset     labels, names, shape; load(index) -> uint8 [C, H, W], or load_into(index, out [H, W, C])
    EncodedIdentities   the same for encoded images (JPEG, PNG, ...): encoded(index) -> bytes, decoded by load; select

How problems in the files are reported:

    a data set that cannot be opened             UserError
    a sample without a usable label or place     skipped: it is not in the data set, but named in `skipped`
    an image that cannot be decoded              UnreadableImage when it is loaded
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from partial_fc.training.data.decode import Fit, Pixels, decode_into
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.errors import UserError
from partial_fc.training.files import utf8

Set = TypeVar("Set", bound="IdentityDataset")

_MAX_LISTED_FILES = 1000  # a fingerprint lists up to this many files by name
_COMPARED_IMAGES = 100  # a fingerprint has a digest of the content of this many images, evenly spaced


class UnreadableImage(Exception):
    """An image that cannot be decoded: its `path` as the data set names it, and a short `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class IdentityDataset(ABC):
    """n images, each of one of `num_identities` identities."""

    labels: torch.Tensor
    """int64 [n], 0..num_identities-1; every identity has an image."""
    identity_names: list[str]
    """[num_identities], the name of each label."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of every loaded image."""
    skipped: Sequence[str] = ()
    """Samples of the files that are not in the data set because they are damaged, each as "name (reason)"."""
    notes: Sequence[str] = ()
    """Harmless oddities of the files."""
    raw_labels: Sequence[str] = ()
    """[num_identities], the labels as the files have them, if they are integers."""
    in_memory = False
    """Whether loading an image is so cheap that worker processes would not help."""

    @property
    def num_identities(self) -> int:
        return len(self.identity_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Return the name of image `index`, for messages."""

    def path_of(self, index: int) -> Path | None:
        """Return the file of image `index`; None if it has none of its own."""
        return None

    @abstractmethod
    def load(self, index: int) -> torch.Tensor:
        """Return image `index` as uint8 [C, H, W]; raise UnreadableImage if it is damaged."""

    def load_into(self, index: int, out: Pixels) -> None:
        """Load image `index` into `out` uint8 [H, W, C], a place in a batch; raise UnreadableImage if it is damaged."""
        out[...] = self.load(index).permute(1, 2, 0).numpy()

    def content(self, index: int) -> bytes | memoryview:
        """Return image `index` as it is stored: encoded, or its pixels; raise UnreadableImage if it cannot be read."""
        return self.load(index).numpy().tobytes()

    def files(self) -> Iterable[tuple[str, int]]:
        """Yield (name, size in bytes) of the files that the data set is read from."""
        return ()

    def _subset(self: Set, identities: Sequence[int]) -> tuple[Set, torch.Tensor]:
        """Return (a copy with the labels and names of `identities` only, the indices of its images here int64 [n']).

        Identities are renumbered in the order given. A subclass then selects its own data of each image (see `select`).
        """
        chosen = torch.tensor(list(identities), dtype=torch.int64)
        new_label = torch.full((self.num_identities,), -1, dtype=torch.int64)
        new_label[chosen] = torch.arange(len(chosen))
        labels = new_label[self.labels]
        kept = (labels >= 0).nonzero()[:, 0]
        kept = kept[labels[kept].argsort(stable=True)]
        other = copy.copy(self)
        other.labels = labels[kept]
        other.identity_names = [self.identity_names[identity] for identity in chosen.tolist()]
        return other, kept

    def fingerprint(self) -> dict[str, Any]:
        """Return counts and digests of names, labels, files and some images, to detect later that the data changed."""
        names = hashlib.blake2b(digest_size=16)
        for name in self.identity_names:
            names.update(utf8(name) + b"\0")
        files = hashlib.blake2b(digest_size=16)
        listed: dict[str, int] = {}
        count = 0
        total = 0
        for name, size in self.files():
            files.update(utf8(f"{name}\0{size}\0"))
            count += 1
            total += size
            if count <= _MAX_LISTED_FILES:
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
            "pictures": self._digest_of_some_images(),
            **({"listed": listed} if 0 < count <= _MAX_LISTED_FILES else {}),
        }

    def _digest_of_some_images(self) -> str:
        """Return a digest that also changes if images are replaced by others of the same names and sizes; "" if the
        disk cannot read one of them, which may be for now."""
        digest = hashlib.blake2b(digest_size=16)
        if len(self) == 0:
            return digest.hexdigest()
        for index in np.unique(np.linspace(0, len(self) - 1, _COMPARED_IMAGES).astype(np.int64)).tolist():
            try:
                digest.update(hashlib.blake2b(self.content(index), digest_size=16).digest())
            except UnreadableImage as error:
                if isinstance(error.__cause__, OSError):
                    return ""
                digest.update(b"unreadable")
        return digest.hexdigest()


class EncodedIdentities(IdentityDataset):
    """Encoded images. They are decoded whenever they are loaded: converted to grey (`channels` 1) or colour (3), and
    resized (bilinear) to `image_size` x `image_size` pixels.

    Each format implements `encoded_at(position)` and `name_at(position)`. A position is an image's place in the files;
    an index is its place in this data set, which may be a selection of the images in the files.
    """

    positions: torch.Tensor | None = None
    """int64 [n], the position of each image in the files; None if they are equal to the indices."""

    def __init__(self, labels: torch.Tensor, identity_names: list[str], image_size: int, channels: int) -> None:
        if image_size < 1 or channels not in (1, 3):
            raise UserError(
                f"images of {image_size} pixels in {channels} channels; give at least 1 pixel, and 1 or 3 channels"
            )
        self.labels = labels
        self.identity_names = identity_names
        self.image_shape = (channels, image_size, image_size)

    @abstractmethod
    def encoded_at(self, position: int) -> bytes | memoryview:
        """Return the encoded image; raise ValueError, OSError or UnreadableImage if it cannot be read."""

    @abstractmethod
    def name_at(self, position: int) -> str:
        """Return the name of the image, for messages."""

    def position_of(self, index: int) -> int:
        """Return the position of image `index` in the files."""
        return index if self.positions is None else int(self.positions[index])

    def name_of(self, index: int) -> str:
        return self.name_at(self.position_of(index))

    def encoded(self, index: int) -> bytes | memoryview:
        """Return image `index` as the files have it; raise UnreadableImage if it cannot be read."""
        try:
            return self.encoded_at(self.position_of(index))
        except (ValueError, OSError) as error:
            raise self.unreadable(index, error) from error

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
        except Exception as error:  # decoders raise almost anything for a damaged file, not only OSError
            raise self.unreadable(index, error) from error

    def unreadable(self, index: int, error: Exception) -> UnreadableImage:
        """Return the exception to raise for image `index`, which could not be read or decoded because of `error`."""
        return UnreadableImage(self.name_of(index), reason_of(error))

    def select(self, identities: Sequence[int]) -> EncodedIdentities:
        """Return the data set of these identities only, renumbered in the order given.

        The images of each identity stay in the order of the files.
        """
        other, kept = self._subset(identities)
        other.positions = kept if self.positions is None else self.positions[kept]
        return other


def decode_picture(
    source: str | Path | bytes, image_shape: tuple[int, int, int], name: str, fit: Fit | None = None
) -> torch.Tensor:
    """Decode an image (its bytes, or the path of its file) to a uint8 tensor of shape `image_shape` (C, H, W).

    `fit` resizes it (default: bilinear). Raises UnreadableImage, with the image's `name`, if it is damaged.
    """
    channels, height, width = image_shape
    out = np.empty((height, width, channels), dtype=np.uint8)
    try:
        decode_into(source if isinstance(source, bytes) else read_whole(source), out, fit)
    except Exception as error:  # decoders raise almost anything for a damaged file, not only OSError
        raise UnreadableImage(name, reason_of(error)) from error
    return torch.from_numpy(out).permute(2, 0, 1).contiguous()


def reason_of(error: Exception) -> str:
    """Return, in one line, why a file could not be read or decoded."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def identity_count(requested: int | None, available: int, where: str) -> int:
    """Return how many identities to use: `requested`, or all if None; raise UserError if there are fewer."""
    if requested is None:
        return available
    if requested < 1:
        raise UserError(f"{requested} identities were asked for; give at least 1")
    if requested > available:
        raise UserError(
            f"{requested} identities were asked for, but there are {available} in {where}; lower --data.identities"
        )
    return requested


def raise_if_skipped(skipped: Sequence[str], on_error: str) -> None:
    """Raise UserError for the first of the skipped samples if `on_error` is "raise"."""
    if skipped and on_error == "raise":
        more = f", and {len(skipped) - 1:,} more like it" if len(skipped) > 1 else ""
        raise UserError(f"cannot read {skipped[0]}{more}; fix or remove it, or pass --data.on_error skip")
