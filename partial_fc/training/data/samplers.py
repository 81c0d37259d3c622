"""The order in which an epoch takes its images: shuffled, identity-balanced (P x K), or class-aware for long tails.

labels int64 [n], batch size N, (seed, epoch)  ── order() ──>  slots int64 [a multiple of N, or n]

Global batch b is slots[b N : (b + 1) N].

    shuffled      a permutation of all images
    pk            P = N / K identities per batch, K images of each next to one another. Each identity comes once per
                  epoch, so an epoch has C // P batches; identities that do not fill a batch are skipped. The images of
                  an identity take turns, in an order drawn once per run: K in each epoch, so that an identity with m
                  images has used all after m / K epochs
    class_aware   n images. A class with m of the n images is drawn n m^e / sum(m^e) times, rounded up or down at random
                  so that the mean is exact: e = 1 as often as it has images, e = 0 all classes equally often. Within a
                  class no image is repeated before all have been used

A slot is (how often the image came before in this epoch) * n + image, so that a repeated image is augmented
differently. The order depends only on labels, batch size, seed and epoch: not on the number of ranks or workers, nor on
where a run resumed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.training.data.augment import stream_key
from partial_fc.training.errors import UserError

SamplerName = Literal["shuffled", "pk", "class_aware"]
Integers = npt.NDArray[np.int64]

IMAGES_PER_IDENTITY = 4
CLASS_EXPONENT = 0.5
_ORDER_STREAM = 1  # random stream of the order of an epoch; the augmentation has its own
_WITHIN_STREAM = 2  # random stream of the order of images within an identity


class Sampler(ABC):
    """The order of the images of one data set, for one batch size."""

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int) -> None:
        self.labels: Integers = labels.numpy()
        self.batch_size = batch_size
        self.seed = seed

    @property
    def length(self) -> int:
        """Images per epoch, the same in every epoch."""
        return len(self.labels)

    @abstractmethod
    def order(self, epoch: int) -> Integers:
        """Return the slots of an epoch, int64 [length]."""

    def _random(self, epoch: int, stream: int = _ORDER_STREAM) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=stream_key(self.seed, epoch, stream)))


class Shuffled(Sampler):
    """Every image once per epoch, shuffled."""

    def order(self, epoch: int) -> Integers:
        return self._random(epoch).permutation(len(self.labels))


class InOrder(Sampler):
    """Every image once, in the order of the data set: for evaluation."""

    def order(self, epoch: int) -> Integers:
        return np.arange(len(self.labels))


class IdentityBalanced(Sampler):
    """`images` (K) images of each of N / K identities per batch, every identity once per epoch.

    Identities that do not fill a last batch are skipped; they are drawn again in every epoch. Raises UserError if the
    batch size is not a multiple of K, or needs more identities than there are.
    """

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int, images: int = IMAGES_PER_IDENTITY) -> None:
        super().__init__(labels, batch_size, seed)
        if images < 1 or batch_size % images:
            raise UserError(
                f"--data.images_per_identity {images} does not divide the batch of {batch_size} (of a micro-batch); "
                "give a divisor"
            )
        self.images = images
        self._counts = np.bincount(self.labels)
        self._per_batch = batch_size // images
        identities = int((self._counts > 0).sum())
        if identities < self._per_batch:
            raise UserError(
                f"a batch of {self._per_batch} identities x {images} images needs more identities than the "
                f"{identities} of the data set; lower --train.batch_size or raise --data.images_per_identity"
            )
        self._length = identities // self._per_batch * batch_size
        self._by_class = _by_class(self.labels, self._random(0, _WITHIN_STREAM))
        self._first = self._counts.cumsum() - self._counts

    @property
    def length(self) -> int:
        return self._length

    def order(self, epoch: int) -> Integers:
        identities = self._random(epoch).permutation(np.flatnonzero(self._counts))[: self._length // self.images]
        counts = self._counts[identities][:, None]
        turn = (epoch * self.images + np.arange(self.images))[None, :]
        images = self._by_class[self._first[identities][:, None] + turn % counts]
        repeats = np.arange(self.images)[None, :] // counts  # above 0 for identities with fewer than K images
        return (repeats * len(self.labels) + images).reshape(-1)


class ClassAware(Sampler):
    """As many images per epoch as the data set has; each class in proportion to its number of images ** `exponent`."""

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int, exponent: float = CLASS_EXPONENT) -> None:
        super().__init__(labels, batch_size, seed)
        if not 0 <= exponent <= 1:
            raise UserError(
                f"--data.class_exponent is {exponent}; give 0 (all classes equally often) to 1 (in proportion to their "
                "images)"
            )
        self.exponent = exponent
        self._counts = np.bincount(self.labels)
        share = np.where(self._counts > 0, np.power(np.maximum(self._counts, 1).astype(np.float64), exponent), 0.0)
        # [C], the expected number of images of this class and all before it
        self._expected_until = share.cumsum() * (len(self.labels) / share.sum())
        self._expected_until[-1] = len(self.labels)
        self._first = self._counts.cumsum() - self._counts

    def order(self, epoch: int) -> Integers:
        random = self._random(epoch)
        # One random offset for all classes: each draws the floor or ceiling of its expectation, and the sum is exact.
        until = np.floor(self._expected_until + random.random()).astype(np.int64)
        until = np.minimum(until, len(self.labels))
        draws = np.diff(until, prepend=0)
        classes = np.repeat(np.arange(len(draws)), draws)
        turn = np.arange(len(classes)) - np.repeat(until - draws, draws)  # 0, 1, ... within each class
        counts = self._counts[classes]
        images = _by_class(self.labels, random)[self._first[classes] + turn % counts]
        slots: Integers = turn // counts * len(self.labels) + images
        return slots[random.permutation(len(slots))]


def _by_class(labels: Integers, random: np.random.Generator) -> Integers:
    """Return the images sorted by class, those of each class in a random order."""
    drawn = random.permutation(len(labels))
    return drawn[np.argsort(labels[drawn], kind="stable")]


def make_sampler(
    name: SamplerName,
    labels: torch.Tensor,
    batch_size: int,
    seed: int,
    *,
    images_per_identity: int | None = None,
    class_exponent: float | None = None,
) -> Sampler:
    """Return the sampler `name` with its own setting (None: the default); raise UserError for invalid values."""
    if name == "pk":
        images = IMAGES_PER_IDENTITY if images_per_identity is None else images_per_identity
        return IdentityBalanced(labels, batch_size, seed, images)
    if name == "class_aware":
        exponent = CLASS_EXPONENT if class_exponent is None else class_exponent
        return ClassAware(labels, batch_size, seed, exponent)
    return Shuffled(labels, batch_size, seed)


def check_settings(name: str, images_per_identity: int | None, class_exponent: float | None) -> None:
    """Raise UserError for a setting that is out of range, or that belongs to another sampler."""
    for setting, value, owner in (
        ("images_per_identity", images_per_identity, "pk"),
        ("class_exponent", class_exponent, "class_aware"),
    ):
        if value is not None and name != owner:
            raise UserError(
                f"--data.{setting} is {value}, which has no effect with --data.sampler {name} (it is for {owner}); "
                "leave it out"
            )
    if images_per_identity is not None and images_per_identity < 1:
        raise UserError(f"--data.images_per_identity is {images_per_identity}; give at least 1")
    if class_exponent is not None and not 0 <= class_exponent <= 1:
        raise UserError(
            f"--data.class_exponent is {class_exponent}; give 0 (all classes equally often) to 1 (in proportion to "
            "their images)"
        )
