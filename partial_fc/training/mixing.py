"""Several data sets in one run: a batch has samples of each in proportion to their weights, and each set has a head of its own.

the run's own data set (named main, weight 1) and those of data.mix, each with labels 0 .. C_s - 1
  MixedIdentities   one data set: images and labels one set after another; a label minus its set's first is the row in that set's head
  MixedSampler      a global batch of N has N_s = N w_s / sum w of set s (largest remainders), interleaved, so that every rank has some
                    of each. The epoch is that of main; another set goes on through its own epochs, from batch to batch, at its own pace
  ExtraHeads        labels int64 [n] -> for each set [n], ignore_index where a sample is another's; the loss is the sum over sets of
                    N_s / N times the head's mean over its own samples, which is the mean over the batch

Like every order it is a function of labels, seed and epoch alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
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
from partial_fc.training.data.decode import Pixels
from partial_fc.training.data.labels import LabelMap
from partial_fc.training.data.samplers import Integers, Sampler, make_sampler
from partial_fc.training.errors import UserError

MAIN = "main"


class MixedIdentities(IdentityDataset):
    """The images of `sets`, one set after another; all must have one shape."""

    def __init__(self, sets: dict[str, IdentityDataset], weights: Sequence[float]) -> None:
        shapes = {name: each.image_shape for name, each in sets.items()}
        if len(set(shapes.values())) != 1:
            raise UserError(
                f"the data sets have images of different shapes: {shapes}; give --data.image_size and --data.channels"
            )
        self.sets, self.weights = sets, list(weights)
        self.image_shape = next(iter(shapes.values()))
        self.first_image = np.cumsum([0, *(len(each) for each in sets.values())]).tolist()
        self.first_label = np.cumsum([0, *(each.num_identities for each in sets.values())]).tolist()
        self.labels = torch.cat(
            [each.labels + first for each, first in zip(sets.values(), self.first_label, strict=False)]
        )
        self.identity_names = [
            n if name == MAIN else f"{name}/{n}" for name, each in sets.items() for n in each.identity_names
        ]
        self._parts = list(sets.values())
        self.left_out = [name for each in sets.values() for name in each.left_out]
        self.in_memory = all(each.in_memory for each in sets.values())
        self.label_maps: dict[str, LabelMap] = {}

    def _find(self, index: int) -> tuple[IdentityDataset, int]:
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
    """How many samples of a batch each set has: in proportion to the weights, by largest remainders; UserError if one has none."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * batch_size
    counts = np.floor(exact).astype(np.int64)
    rest = batch_size - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    if counts.min() < 1:
        raise UserError(
            f"a batch of {batch_size} has no sample for a data set of weight {weights[int(counts.argmin())]}; raise either"
        )
    return [int(count) for count in counts]


class MixedSampler(Sampler):
    """Batches of `data` with `shares` of each set, whose own orders `make(labels, batch size, seed)` gives."""

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
                raise UserError(
                    f"the data set {name} has fewer images than the {count} of it in a batch; lower its weight"
                )
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        self._interleaved = np.argsort(places, kind="stable")

    @property
    def length(self) -> int:
        return self.batches[0] * self.batch_size

    def order(self, epoch: int) -> Integers:
        columns = [self._of_set(place, epoch) for place in range(len(self.samplers))]
        return np.concatenate(columns, axis=1)[:, self._interleaved].reshape(-1)

    def _of_set(self, place: int, epoch: int) -> Integers:
        """Slots `[batches of the epoch, N_s]` of one set: its own epochs, one after another, from where the last epoch of main ended."""
        count, own, size = self.counts[place], self.batches[place], len(self.samplers[place].labels)
        first, last = epoch * self.batches[0], (epoch + 1) * self.batches[0]
        rows, before = [], 0
        for own_epoch in range(first // own, -(-last // own)):
            slots = self.samplers[place].order(own_epoch)
            again, images = np.divmod(slots, size)
            moved = (before + again) * len(self.labels) + self.first_image[place] + images
            moved = moved[: own * count].reshape(own, count)
            rows.append(moved[max(first - own_epoch * own, 0) : last - own_epoch * own])
            before += int(again.max()) + 1
        return np.concatenate(rows)


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
        """For each set the labels `[n]` of its head, `ignore_index` where a sample is of another."""
        found = {}
        for name, first, last in zip(self.data.sets, self.data.first_label, self.data.first_label[1:], strict=False):
            found[name] = torch.where((labels >= first) & (labels < last), labels - first, ignore_index)
        return found

    def losses(self, main: PartialFC, everyone: dict[str, GlobalBatch]) -> dict[str, Tensor]:
        """`loss`, the mean over the batch, and `loss_NAME` of each set, the mean over its own samples."""
        each = {name: (main if name == MAIN else self.heads[name])(everyone[name]) for name in self.data.sets}
        total = torch.stack([self.share[name] * value for name, value in each.items()]).sum()
        return {"loss": total, **{f"loss_{name}": value for name, value in each.items()}}

    def train(self) -> None:
        """Before an epoch."""
        for head in self.heads.values():
            head.train()

    def schedules(self, of_main: LambdaLR) -> list[LambdaLR]:
        """A schedule for each optimizer, as main's head has it."""
        self._schedules = {name: LambdaLR(each, of_main.lr_lambdas[0]) for name, each in self.optimizers.items()}
        return list(self._schedules.values())

    def named(self) -> dict[str, Any]:
        """For the run's checkpoints."""
        kinds: dict[str, dict[str, Any]] = {"head": {**self.heads}, "head_optimizer": {**self.optimizers}}
        kinds["head_schedule"] = {**self._schedules}
        return {f"{kind}_{name}": value for kind, values in kinds.items() for name, value in values.items()}


def mixed(config: RunConfig, train: IdentityDataset) -> IdentityDataset:
    """`train` with the sets of data.mix beside it, or as it is if there are none; UserError for what cannot be had."""
    if not config.data.mix:
        return train
    sets, maps = {MAIN: train}, {}
    channels, height, _ = train.image_shape
    for asked in config.data.mix:
        glyphs = asked.folder is None
        data = replace(
            config.data,
            folder=asked.folder,
            format=asked.format,
            image_column=asked.image_column,
            label_column=asked.label_column,
            split=asked.split,
            identities=asked.identities,
            holdout_identities=0,
            image_size=None if glyphs else height,
            channels=None if glyphs else 1 if channels == 1 else 3,
            mix=[],
        )
        opened = open_data(data, config.seed)
        sets[asked.name] = opened.train
        maps[asked.name] = opened.label_map or LabelMap.of(opened.train.identity_names, opened.train.labels)
    together = MixedIdentities(sets, [1.0, *(asked.weight for asked in config.data.mix)])
    together.label_maps = maps
    return together


def sampler_of(config: RunConfig, dataset: IdentityDataset) -> Sampler:
    """The order of the training images; UserError if there is none in batches of the size that `config` says."""
    settings = {"images_per_identity": config.data.images_per_identity, "class_exponent": config.data.class_exponent}
    make: Callable[[Tensor, int, int], Sampler] = partial(make_sampler, config.data.sampler, **settings)  # type: ignore[arg-type]
    if isinstance(dataset, MixedIdentities):
        return MixedSampler(dataset, config.micro_batch, config.seed, make)
    return make(dataset.labels, config.micro_batch, config.seed)
