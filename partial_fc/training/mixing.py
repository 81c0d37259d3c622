"""Several data sets in one run: each has a share of every batch by its weight, and a head of its own.

The run's own data set (named main, weight 1) and those of data.mix (data/config.py), each with labels 0 .. C_s - 1:

    MixedIdentities   one data set: the images and labels of one set after another. A label minus the first label of its
                      set is the class in that set's head
    MixedSampler      a global batch of N has N_s = N w_s / sum(w) samples of set s (largest remainders), interleaved so
                      that every rank has some of each. An epoch is an epoch of main; every other set continues through
                      epochs of its own, from batch to batch
    ExtraHeads        labels int64 [n] -> for each set [n], ignore_index for samples of other sets. The loss is the sum
                      over sets of N_s / N times the mean of its head over its own samples: the mean over the batch

Like every order, this one depends only on labels, seed and epoch.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from partial_fc import GlobalBatch, PartialFC, RowOptimizer
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, open_data
from partial_fc.training.data.augment import stream_key
from partial_fc.training.data.config import MixedSet
from partial_fc.training.data.decode import Pixels
from partial_fc.training.data.labels import LabelMap
from partial_fc.training.data.samplers import Integers, Sampler, make_sampler
from partial_fc.training.errors import UserError

MAIN = "main"


class MixedIdentities(IdentityDataset):
    """The images of `sets`, one set after another; all must have the same shape."""

    def __init__(self, sets: dict[str, IdentityDataset], weights: Sequence[float]) -> None:
        shapes = {name: each.image_shape for name, each in sets.items()}
        if len(set(shapes.values())) != 1:
            raise UserError(
                f"the data sets have images of different shapes: {shapes}; give --data.image_size and --data.channels"
            )
        self.sets = sets
        self.weights = list(weights)
        self.image_shape = next(iter(shapes.values()))
        self.first_image = np.cumsum([0, *(len(each) for each in sets.values())]).tolist()
        self.first_label = np.cumsum([0, *(each.num_identities for each in sets.values())]).tolist()
        self.labels = torch.cat(
            [each.labels + first for each, first in zip(sets.values(), self.first_label, strict=False)]
        )
        self.identity_names = [
            identity if name == MAIN else f"{name}/{identity}"
            for name, each in sets.items()
            for identity in each.identity_names
        ]
        self._parts = list(sets.values())
        self.skipped = [name for each in sets.values() for name in each.skipped]
        self.notes = [note if name == MAIN else f"{name}: {note}" for name, each in sets.items() for note in each.notes]
        self.in_memory = all(each.in_memory for each in sets.values())
        self.label_maps: dict[str, LabelMap] = {}

    def _find(self, index: int) -> tuple[IdentityDataset, int]:
        """Return (the set of image `index`, its index there)."""
        place = bisect.bisect_right(self.first_image, index) - 1
        return self._parts[place], index - self.first_image[place]

    def name_of(self, index: int) -> str:
        dataset, own = self._find(index)
        return dataset.name_of(own)

    def content(self, index: int) -> bytes | memoryview:
        dataset, own = self._find(index)
        return dataset.content(own)

    def load(self, index: int) -> Tensor:
        dataset, own = self._find(index)
        return dataset.load(own)

    def load_into(self, index: int, out: Pixels) -> None:
        dataset, own = self._find(index)
        dataset.load_into(own, out)

    def files(self) -> Iterable[tuple[str, int]]:
        for name, each in self.sets.items():
            yield from ((f"{name}/{file}", size) for file, size in each.files())


def shares(weights: Sequence[float], batch_size: int) -> list[int]:
    """Return how many samples of a batch each set has, in proportion to the weights (largest remainders).

    Raises UserError if a set would have none.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * batch_size
    counts = np.floor(exact).astype(np.int64)
    rest = batch_size - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    if counts.min() < 1:
        raise UserError(
            f"a batch of {batch_size} has no sample for a data set of weight {weights[int(counts.argmin())]}; raise "
            "the batch size or the weight"
        )
    return [int(count) for count in counts]


class MixedSampler(Sampler):
    """Batches with `shares` of each set of `data`; `make(labels, batch size, seed)` is the sampler of one set."""

    def __init__(
        self, data: MixedIdentities, batch_size: int, seed: int, make: Callable[[Tensor, int, int], Sampler]
    ) -> None:
        super().__init__(data.labels, batch_size, seed)
        self.counts = shares(data.weights, batch_size)
        self.first_image = data.first_image
        self.samplers = [
            make(each.labels, count, seed if not place else stream_key(seed, place))
            for place, (each, count) in enumerate(zip(data.sets.values(), self.counts, strict=True))
        ]
        self.batches = [sampler.length // count for sampler, count in zip(self.samplers, self.counts, strict=True)]
        for name, count, batches in zip(data.sets, self.counts, self.batches, strict=True):
            if not batches:
                raise UserError(f"the data set {name} has fewer images than its {count} of a batch; lower its weight")
        # The samples of each set are spread evenly over the batch.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        self._interleaved = np.argsort(places, kind="stable")

    @property
    def length(self) -> int:
        return self.batches[0] * self.batch_size

    def order(self, epoch: int) -> Integers:
        of_sets = [self._slots_of(place, epoch) for place in range(len(self.samplers))]
        return np.concatenate(of_sets, axis=1)[:, self._interleaved].reshape(-1)

    def _slots_of(self, place: int, epoch: int) -> Integers:
        """Return the slots [batches of the epoch, N_s] of one set: parts of its own epochs, one after another.

        They start where the previous epoch of main ended.
        """
        count = self.counts[place]
        own_batches = self.batches[place]
        size = len(self.samplers[place].labels)
        first = epoch * self.batches[0]  # batches of the run, counted from its start
        last = (epoch + 1) * self.batches[0]
        parts = []
        repeats_before = 0
        for own_epoch in range(first // own_batches, -(-last // own_batches)):
            repeats, images = np.divmod(self.samplers[place].order(own_epoch), size)
            slots = (repeats_before + repeats) * len(self.labels) + self.first_image[place] + images
            slots = slots[: own_batches * count].reshape(own_batches, count)
            own_first = own_epoch * own_batches
            parts.append(slots[max(first - own_first, 0) : last - own_first])
            repeats_before += int(repeats.max()) + 1
        return np.concatenate(parts)


class ExtraHeads:
    """The heads of the sets beside main, with their optimizers."""

    def __init__(self, config: RunConfig, data: MixedIdentities, device: torch.device) -> None:
        self.data = data
        self.share = dict(
            zip(data.sets, (n / config.micro_batch for n in shares(data.weights, config.micro_batch)), strict=True)
        )
        self.heads: dict[str, PartialFC] = {}
        self.optimizers: dict[str, RowOptimizer] = {}
        self._schedules: dict[str, LambdaLR] = {}
        for place, asked in enumerate(config.data.mix, 1):
            counts = torch.bincount(data.sets[asked.name].labels, minlength=data.sets[asked.name].num_identities)
            given = {"margin": asked.m, "scale": asked.scale}
            own = {name: value for name, value in given.items() if value is not None}
            settings = replace(config.head, margin=config.head.margin.with_arguments(f"data.mix {asked.name}", **own))
            settings.check()
            head = settings.build(
                config.backbone.embedding_size,
                counts,
                stream_key(config.seed, place) >> 2,
                device,
                **config.train.policy,
            )
            self.heads[asked.name], self.optimizers[asked.name] = head, config.optimizers.build_head(head)

    def labels(self, labels: Tensor, ignore_index: int) -> dict[str, Tensor]:
        """Return, for each set, the labels [n] for its head: `ignore_index` for samples of other sets."""
        found = {}
        for name, first, last in zip(self.data.sets, self.data.first_label, self.data.first_label[1:], strict=False):
            found[name] = torch.where((labels >= first) & (labels < last), labels - first, ignore_index)
        return found

    def losses(self, main: PartialFC, everyone: dict[str, GlobalBatch]) -> dict[str, Tensor]:
        """Return `loss`, the mean over the batch, and `loss_NAME` for each set, the mean over its own samples."""
        each = {name: (main if name == MAIN else self.heads[name])(everyone[name]) for name in self.data.sets}
        total = torch.stack([self.share[name] * value for name, value in each.items()]).sum()
        return {"loss": total, **{f"loss_{name}": value for name, value in each.items()}}

    def train(self) -> None:
        """Put the heads into training mode; called before an epoch."""
        for head in self.heads.values():
            head.train()

    def schedules(self, of_main: LambdaLR) -> list[LambdaLR]:
        """Return a schedule for each optimizer, equal to that of main's head."""
        self._schedules = {name: LambdaLR(each, of_main.lr_lambdas[0]) for name, each in self.optimizers.items()}
        return list(self._schedules.values())

    def named(self) -> dict[str, Any]:
        """Return everything that the run's checkpoints hold of these heads, by name."""
        kinds: dict[str, dict[str, Any]] = {
            "head": {**self.heads},
            "head_optimizer": {**self.optimizers},
            "head_schedule": {**self._schedules},
        }
        return {f"{kind}_{name}": value for kind, values in kinds.items() for name, value in values.items()}


def mixed(config: RunConfig, train: IdentityDataset) -> IdentityDataset:
    """Return `train` mixed with the sets of data.mix, or `train` itself if there are none.

    Raises UserError for data that cannot be opened.
    """
    if not config.data.mix:
        return train
    sets, maps = {MAIN: train}, {}
    channels, height, _ = train.image_shape
    for extra in config.data.mix:
        glyphs = extra.folder is None
        data = replace(
            config.data,
            folder=extra.folder,
            format=extra.format,
            image_column=extra.image_column,
            label_column=extra.label_column,
            split=extra.split,
            identities=extra.identities,
            holdout_identities=0,
            image_size=None if glyphs else height,
            channels=None if glyphs else 1 if channels == 1 else 3,
            mix=[],
        )
        try:
            opened = open_data(data, config.seed)
        except UserError as error:  # in words for the run's own data set
            words = str(error)
            for own in fields(MixedSet):
                words = words.replace(f"--data.{own.name}", f"its {own.name}")
            raise UserError(f"the set {extra.name} of --data.mix: {words}") from error
        sets[extra.name] = opened.train
        maps[extra.name] = opened.label_map or LabelMap.of(opened.train.identity_names, opened.train.labels)
    together = MixedIdentities(sets, [1.0, *(extra.weight for extra in config.data.mix)])
    together.label_maps = maps
    return together


def sampler_of(config: RunConfig, dataset: IdentityDataset) -> Sampler:
    """Return the sampler of the training images; raise UserError if it cannot make batches of the configured size."""
    settings = {"images_per_identity": config.data.images_per_identity, "class_exponent": config.data.class_exponent}
    make: Callable[[Tensor, int, int], Sampler] = partial(make_sampler, config.data.sampler, **settings)  # type: ignore[arg-type]
    if isinstance(dataset, MixedIdentities):
        return MixedSampler(dataset, config.micro_batch, config.seed, make)
    return make(dataset.labels, config.micro_batch, config.seed)
