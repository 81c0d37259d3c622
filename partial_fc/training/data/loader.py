"""Batches of an IdentityDataset: one global order an epoch, cut alike for every number of ranks.

Data's story, for n images and global batches of N:

    order    int64 [n] of a sampler, keyed by (seed, epoch): a permutation, or what samplers.py has besides; the global random state
             has no part in it
    batch b  order[b*N : (b+1)*N]; with drop_last, a last one shorter than N is left out
    rank r   a contiguous part of it, one sample longer or shorter at most than another's; in the order of ranks they make the batch
    Batch    images float32 [n_local, C, H, W] in [-1, 1], labels and indices int64 [n_local]

All ranks have the same number of batches. In the worker processes, if there are any (each pass starts its own), images are decoded each
into its place of one uint8 [n_local, H, W, C], then scaled and augmented together, into memory that is shared with the trainer. An image
that cannot be read travels back as a name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, get_worker_info

from partial_fc.training.data import DataConfig, IdentityDataset, UnreadableImage
from partial_fc.training.data.augment import AugmentConfig, augment, to_float
from partial_fc.training.data.samplers import InOrder, Sampler, Shuffled
from partial_fc.training.errors import UserError


@dataclass
class Batch:
    """This rank's part of a global batch; n may be 0."""

    images: torch.Tensor
    """float32 [n, C, H, W] in [-1, 1]."""
    labels: torch.Tensor
    """int64 [n], identities."""
    indices: torch.Tensor
    """int64 [n], positions in the data set."""
    unreadable: list[str]
    """Images that were left out, each as "name (reason)"."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; from pinned memory, the copy is not waited for."""
        images, labels, indices = (
            each.to(device, non_blocking=each.is_pinned()) for each in (self.images, self.labels, self.indices)
        )
        return Batch(images, labels, indices, self.unreadable)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; the DataLoader calls it."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.unreadable)


class _Samples(Dataset[Batch]):
    """What the worker processes of a pass hold: a list of slots (samplers.py) becomes a Batch."""

    def __init__(self, dataset: IdentityDataset, seed: int, epoch: int, config: AugmentConfig | None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.config = config

    def __getitems__(self, wanted: list[int]) -> Batch:
        channels, height, width = self.dataset.image_shape
        pixels = np.empty((len(wanted), height, width, channels), dtype=np.uint8)
        readable: list[int] = []
        unreadable: list[str] = []
        for slot in wanted:
            try:
                self.dataset.load_into(slot % len(self.dataset), pixels[len(readable)])
                readable.append(slot)
            except UnreadableImage as error:
                unreadable.append(str(error))
        slots = torch.tensor(readable, dtype=torch.int64)
        indices = slots % len(self.dataset)
        images = torch.from_numpy(pixels[: len(readable)]).permute(0, 3, 1, 2).contiguous()
        out = _shared(images.shape) if get_worker_info() is not None else torch.empty(images.shape)
        if self.config is None:
            floats = to_float(images, out=out)
        else:
            floats = augment(images, slots, seed=self.seed, epoch=self.epoch, config=self.config, out=out)
        return Batch(floats, self.dataset.labels[indices], indices, unreadable)


def _shared(shape: Sequence[int]) -> torch.Tensor:
    """A float32 tensor in shared memory: what a process sends is copied there otherwise."""
    storage = torch.UntypedStorage._new_shared(4 * int(np.prod(shape)))
    return torch.empty(0, dtype=torch.float32).set_(storage).view(tuple(shape))


def choose_workers(dataset: IdentityDataset, ranks: int, cuda: bool) -> int:
    """How many processes a rank should load images with, `ranks` sharing this machine: its share of the cores less one, at most 8 for a
    GPU, and at most 4 beside training on the CPU itself, where images that are in memory already need none."""
    if dataset.in_memory and not cuda:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8 if cuda else 4, cores // max(1, ranks) - 1))


def _as_it_is(batch: object) -> object:
    return batch


def _outlive_signals(worker: int) -> None:
    """Launchers signal whole process groups. A rank that is asked to stop finishes its step and saves, and needs its workers for that.

    They end with it. SIGTERM ends one that is not wanted any more, but half a minute later, which is what launchers wait before SIGKILL.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 30))


class BatchLoader:
    """Walk over `dataset` in global batches of `batch_size` samples, giving rank `rank` of `world` its part of each.

    `sampler` says in which order, for that batch size; without it images are shuffled, or with `shuffle` False in their order.
    `augment` None leaves images as they are. `on_error` "skip" leaves unreadable images out and names them in
    `Batch.unreadable`; "raise" raises UserError. A data set smaller than one batch (with `drop_last`) raises
    UserError, as does a batch that cannot give each rank a sample. `workers` None chooses for one rank on a CPU (`choose_workers`);
    each loads `prefetch` batches ahead. `pin` puts batches into pinned memory, for a GPU.
    """

    def __init__(
        self,
        dataset: IdentityDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        augment: AugmentConfig | None = None,
        shuffle: bool = True,
        sampler: Sampler | None = None,
        drop_last: bool = True,
        workers: int | None = 0,
        prefetch: int = 2,
        pin: bool = False,
        on_error: Literal["skip", "raise"] = "skip",
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of world {world}; it runs from 0 to world - 1")
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; give at least 1")
        count = len(dataset)
        if count == 0:
            raise UserError("the data set has no images")
        if drop_last and batch_size < world:
            raise UserError(f"a batch of {batch_size} cannot be shared by {world} ranks; give at least {world}")
        if drop_last and (count if sampler is None else sampler.length) < batch_size:
            raise UserError(
                f"the data set has {count} images, fewer than one batch of {batch_size}; lower the batch size"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.seed = seed
        self.augment = augment
        self.sampler = sampler or (Shuffled if shuffle else InOrder)(dataset.labels, batch_size, seed)
        self.workers = choose_workers(dataset, 1, cuda=False) if workers is None else workers
        self.prefetch = prefetch
        self.pin = pin
        self.on_error = on_error
        self.epoch = 0
        taken = self.sampler.length
        self._batches = taken // batch_size if drop_last else -(-taken // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the passes that begin from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """The epoch's batches from `start_batch` on: what a run that stopped after `start_batch` batches has left."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}; the epoch has {len(self)} batches")
        return self._walk(self.epoch, start_batch)

    def _parts(self, epoch: int, start_batch: int) -> Iterator[list[int]]:
        """This rank's sample indices of each global batch of the epoch, from `start_batch` on."""
        order = self.sampler.order(epoch)
        for batch in range(start_batch, self._batches):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield whole[len(whole) * self.rank // self.world : len(whole) * (self.rank + 1) // self.world].tolist()

    def _walk(self, epoch: int, start_batch: int) -> Generator[Batch, None, None]:
        # No persistent workers: a loader that keeps its own, and that an exception's traceback keeps in a reference cycle, waits
        # 5 seconds for each of them when it is collected. Those of a pass end with it, also when it is left early.
        loader: DataLoader[Batch] = DataLoader(
            _Samples(self.dataset, self.seed, epoch, self.augment),
            batch_sampler=self._parts(epoch, start_batch),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            worker_init_fn=_outlive_signals,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.pin,
            # Its own, because a DataLoader without one draws from the global random state.
            generator=torch.Generator(),
        )
        try:
            for batch in loader:
                if batch.unreadable and self.on_error == "raise":
                    raise UserError(
                        f"cannot read the image {batch.unreadable[0]}; mend or remove it, or pass --data.on_error skip"
                    )
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that loads images ended ({error}); lower --data.workers or free some memory"
            ) from error


def rank_loader(
    dataset: IdentityDataset, config: DataConfig, accelerator: Accelerator, *, batch_size: int, **order: Any
) -> BatchLoader:
    """The loader of this rank, fed as the settings and the machine ask for; `order`: further arguments of BatchLoader."""
    cuda = accelerator.device.type == "cuda"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))  # on this machine
    return BatchLoader(
        dataset,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=choose_workers(dataset, ranks, cuda) if config.workers is None else config.workers,
        prefetch=config.prefetch,
        pin=cuda,
        on_error=config.on_error,
        **order,
    )
