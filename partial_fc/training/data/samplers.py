"""In which order an epoch takes its images: shuffled, identity-balanced (P x K), or class-aware for long tails.

labels int64 [n], batch size N, (seed, epoch)  ── order() ──>  slots int64 [a multiple of N, or n]; global batch b is slots[b N : (b + 1) N]

    shuffled      a permutation of all images
    pk            P = N / K identities a batch, K images of each beside one another; each identity once an epoch, so an epoch has C // P
                  batches (the few identities over are left out). An identity's images come in turn, in an order drawn once a run:
                  K in each epoch, so that n / K epochs have all of them
    class_aware   n images; a class of n_c images is drawn n times n_c^e / sum n^e, rounded up or down by chance so that the mean is
                  exact: e = 1 as the images are, e = 0 every class alike. Within a class no image comes again before all have come

A slot is (times that the image came before in the epoch) * n + image: an image that comes again is augmented anew. Orders are functions
of labels, batch size, seed and epoch alone; the number of ranks, the workers and where a run was resumed have no part in them.
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
_ORDER = 1  # keeps the stream of the order apart from those of the augmentation
_WITHIN = 2  # and this one of the images of an identity


class Sampler(ABC):
    """The order of images of one data set in batches of one size."""

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int) -> None:
        self.labels: Integers = labels.numpy()
        self.batch_size = batch_size
        self.seed = seed

    @property
    def length(self) -> int:
        """Images an epoch, the same in every epoch."""
        return len(self.labels)

    @abstractmethod
    def order(self, epoch: int) -> Integers:
        """The slots of an epoch, int64 [length]."""

    def _random(self, epoch: int, stream: int = _ORDER) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=stream_key(self.seed, epoch, stream)))


class Shuffled(Sampler):
    """Every image once an epoch."""

    def order(self, epoch: int) -> Integers:
        return self._random(epoch).permutation(len(self.labels))


class InOrder(Sampler):
    """Every image once, as the data set has them: for evaluation."""

    def order(self, epoch: int) -> Integers:
        return np.arange(len(self.labels))


class IdentityBalanced(Sampler):
    """`images` (K) of each of N / K identities a batch, every identity once an epoch.

    Those of the last identities that make no whole batch are left out; which these are is drawn anew every epoch. UserError for a batch
    that is no multiple of K, or that has more identities than there are.
    """

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int, images: int = IMAGES_PER_IDENTITY) -> None:
        super().__init__(labels, batch_size, seed)
        if images < 1 or batch_size % images:
            raise UserError(
                f"--data.images_per_identity {images} does not divide the batch of {batch_size} (of a micro-batch); give a divisor"
            )
        self.images = images
        self._counts = np.bincount(self.labels)
        identities = int((self._counts > 0).sum())
        if identities < batch_size // images:
            raise UserError(
                f"a batch of {batch_size // images} identities x {images} images needs more identities than the {identities} there are; "
                "lower --train.batch_size or raise --data.images_per_identity"
            )
        self._per_batch = batch_size // images
        self._length = identities // self._per_batch * batch_size
        self._grouped = _grouped(self.labels, self._random(0, _WITHIN))
        self._first = self._counts.cumsum() - self._counts

    @property
    def length(self) -> int:
        return self._length

    def order(self, epoch: int) -> Integers:
        taken = self._random(epoch).permutation(np.flatnonzero(self._counts))[: self._length // self.images]
        counts = self._counts[taken][:, None]
        turn = (epoch * self.images + np.arange(self.images))[None, :]
        images = self._grouped[self._first[taken][:, None] + turn % counts]
        again = np.arange(self.images)[None, :] // counts  # fewer than K images: once more around
        return (again * len(self.labels) + images).reshape(-1)


class ClassAware(Sampler):
    """As many images an epoch as there are, of each class in proportion to its number of images to the power `exponent`."""

    def __init__(self, labels: torch.Tensor, batch_size: int, seed: int, exponent: float = CLASS_EXPONENT) -> None:
        super().__init__(labels, batch_size, seed)
        if not 0 <= exponent <= 1:
            raise UserError(f"--data.class_exponent is {exponent}; give 0 (every class alike) to 1 (as the images are)")
        self.exponent = exponent
        self._counts = np.bincount(self.labels)
        share = np.where(self._counts > 0, np.power(np.maximum(self._counts, 1).astype(np.float64), exponent), 0.0)
        self._until = share.cumsum() * (
            len(self.labels) / share.sum()
        )  # images expected of this class and those before it
        self._until[-1] = len(self.labels)
        self._first = self._counts.cumsum() - self._counts

    def order(self, epoch: int) -> Integers:
        random = self._random(epoch)
        until = np.floor(self._until + random.random()).astype(np.int64)
        until = np.minimum(until, len(self.labels))
        draws = np.diff(until, prepend=0)
        classes = np.repeat(np.arange(len(draws)), draws)
        turn = np.arange(len(classes)) - np.repeat(until - draws, draws)  # the how-manieth of its class
        counts = self._counts[classes]
        images = _grouped(self.labels, random)[self._first[classes] + turn % counts]
        slots: Integers = turn // counts * len(self.labels) + images
        return slots[random.permutation(len(slots))]


def _grouped(labels: Integers, random: np.random.Generator) -> Integers:
    """The images by class, and within a class in a drawn order."""
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
    """The sampler that the settings name, with its own setting or the default; UserError for values that it cannot take."""
    if name == "pk":
        return IdentityBalanced(
            labels, batch_size, seed, IMAGES_PER_IDENTITY if images_per_identity is None else images_per_identity
        )
    if name == "class_aware":
        return ClassAware(labels, batch_size, seed, CLASS_EXPONENT if class_exponent is None else class_exponent)
    return Shuffled(labels, batch_size, seed)


def check_settings(name: str, images_per_identity: int | None, class_exponent: float | None) -> None:
    """UserError for a setting that is out of range, or that the sampler does not take."""
    for setting, value, wanted in (
        ("images_per_identity", images_per_identity, "pk"),
        ("class_exponent", class_exponent, "class_aware"),
    ):
        if value is not None and name != wanted:
            raise UserError(
                f"--data.{setting} is {value}, which has no effect with --data.sampler {name} (it is for {wanted}); leave it out"
            )
    if images_per_identity is not None and images_per_identity < 1:
        raise UserError(f"--data.images_per_identity is {images_per_identity}; give at least 1")
    if class_exponent is not None and not 0 <= class_exponent <= 1:
        raise UserError(
            f"--data.class_exponent is {class_exponent}; give 0 (every class alike) to 1 (as the images are)"
        )
