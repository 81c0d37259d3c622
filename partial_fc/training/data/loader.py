"""Batches of a data set: one global order per epoch, divided among the ranks, and the same for every number of ranks.

For n images and global batches of N:

    order    int64 [n] from a sampler (samplers.py), keyed by (seed, epoch); it does not use the global random state
    batch b  order[b*N : (b+1)*N]; with drop_last, a last batch shorter than N is dropped
    rank r   a contiguous part of the batch; parts differ by at most one sample
    Batch    images float32 [n_local, C, H, W] in [-1, 1], labels and indices int64 [n_local]

All ranks have the same number of batches. Images are loaded by worker processes, if there are any; each epoch starts
its own. A worker decodes each image into its place in one uint8 [n_local, H, W, C] array, then scales and augments all
of them into memory that it shares with the trainer. An image that cannot be read is skipped and reported by name.
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

from partial_fc.training.data.augment import AugmentConfig, augment, to_float
from partial_fc.training.data.config import DataConfig
from partial_fc.training.data.dataset import IdentityDataset, UnreadableImage
from partial_fc.training.data.samplers import InOrder, Sampler, Shuffled
from partial_fc.training.errors import UserError


@dataclass
class Batch:
    """The local batch: this rank's part of a global batch. n may be 0."""

    images: torch.Tensor
    """float32 [n, C, H, W] in [-1, 1]."""
    labels: torch.Tensor
    """int64 [n], identities of the data set."""
    indices: torch.Tensor
    """int64 [n], indices of the images in the data set."""
    unreadable: list[str]
    """Images that were skipped, each as "name (reason)"."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`; copies from pinned memory are asynchronous."""
        images, labels, indices = (
            each.to(device, non_blocking=each.is_pinned()) for each in (self.images, self.labels, self.indices)
        )
        return Batch(images, labels, indices, self.unreadable)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; the DataLoader calls this."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.unreadable)


class _Samples(Dataset[Batch]):
    """The data set as the worker processes of one epoch have it: from a list of slots (samplers.py) to a Batch."""

    def __init__(self, dataset: IdentityDataset, seed: int, epoch: int, config: AugmentConfig | None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.config = config

    def __getitems__(self, slots: list[int]) -> Batch:
        channels, height, width = self.dataset.image_shape
        pixels = np.empty((len(slots), height, width, channels), dtype=np.uint8)
        readable: list[int] = []
        unreadable: list[str] = []
        for slot in slots:
            try:
                self.dataset.load_into(slot % len(self.dataset), pixels[len(readable)])
                readable.append(slot)
            except UnreadableImage as error:
                unreadable.append(str(error))
        loaded = torch.tensor(readable, dtype=torch.int64)
        indices = loaded % len(self.dataset)
        images = torch.from_numpy(pixels[: len(readable)]).permute(0, 3, 1, 2).contiguous()
        in_worker = get_worker_info() is not None
        out = _shared_memory(images.shape) if in_worker else torch.empty(images.shape)
        if self.config is None:
            floats = to_float(images, out=out)
        else:
            floats = augment(images, loaded, seed=self.seed, epoch=self.epoch, config=self.config, out=out)
        return Batch(floats, self.dataset.labels[indices], indices, unreadable)


def _shared_memory(shape: Sequence[int]) -> torch.Tensor:
    """Return a float32 tensor in shared memory, where a tensor that a worker returns would be copied otherwise."""
    storage = torch.UntypedStorage._new_shared(4 * int(np.prod(shape)))
    return torch.empty(0, dtype=torch.float32).set_(storage).view(tuple(shape))


def choose_workers(dataset: IdentityDataset, ranks: int, cuda: bool) -> int:
    """Return how many processes should load images for each of the `ranks` of this machine.

    That is a rank's share of the cores, less one: at most 8 for a GPU, at most 4 if the CPU itself trains. 0 if the CPU
    trains on images that are in memory.
    """
    if dataset.in_memory and not cuda:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8 if cuda else 4, cores // max(1, ranks) - 1))


def ranks_of_machine(world: int) -> int:
    """Return how many of the `world` ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def _no_collate(batch: object) -> object:
    """Return the batch unchanged: `_Samples` returns whole batches already."""
    return batch


def _outlive_signals(worker: int) -> None:
    """Let a worker survive the signals that launchers send to the whole process group.

    A rank that receives such a signal finishes its step and saves a checkpoint. It needs its workers for that, and they
    end with it. SIGTERM ends a worker half a minute later, which is as long as launchers wait before SIGKILL.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 30))


class BatchLoader:
    """Iterates over `dataset` in global batches of `batch_size` samples, and yields the part of rank `rank` of `world`.

    Args:
        sampler: the order of the images, made for this batch size. Without it they are shuffled, or with `shuffle`
            False in the order of the data set.
        augment: None leaves images unchanged.
        on_error: "skip" skips unreadable images and names them in `Batch.unreadable`; "raise" raises UserError.
        workers: processes that load images, each `prefetch` batches ahead; None chooses for one rank on a CPU
            (`choose_workers`).
        pin: put batches into pinned memory, for a GPU.

    With `drop_last`, raises UserError for a batch with fewer samples than ranks, or a data set smaller than one batch.
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
            raise ValueError(f"rank is {rank} of world size {world}; it must be from 0 to {world - 1}")
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; give at least 1")
        count = len(dataset)
        if count == 0:
            raise UserError("the data set has no images")
        if drop_last and batch_size < world:
            raise UserError(f"a batch of {batch_size} cannot be divided among {world} ranks; give at least {world}")
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
        images = self.sampler.length
        self._batches = images // batch_size if drop_last else -(-images // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order and the augmentation of the iterations that start after this call."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches per epoch, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def iterate(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield the epoch's batches from `start_batch` on, to resume a run that stopped after `start_batch` batches."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}; the epoch has {len(self)} batches")
        return self._load(self.epoch, start_batch)

    def _local_slots(self, epoch: int, start_batch: int) -> Iterator[list[int]]:
        """Yield this rank's slots of each global batch of the epoch, from `start_batch` on."""
        order = self.sampler.order(epoch)
        for batch in range(start_batch, self._batches):
            slots = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            begin = len(slots) * self.rank // self.world
            end = len(slots) * (self.rank + 1) // self.world
            yield slots[begin:end].tolist()

    def _load(self, epoch: int, start_batch: int) -> Generator[Batch, None, None]:
        # No persistent workers: if an exception's traceback holds such a loader in a reference cycle, its collection
        # waits 5 seconds for each worker. These workers end with the iteration, even if it is not finished.
        loader: DataLoader[Batch] = DataLoader(
            _Samples(self.dataset, self.seed, epoch, self.augment),
            batch_sampler=self._local_slots(epoch, start_batch),
            collate_fn=_no_collate,
            num_workers=self.workers,
            worker_init_fn=_outlive_signals,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.pin,
            # A DataLoader without its own generator draws from the global random state.
            generator=torch.Generator(),
        )
        try:
            for batch in loader:
                if batch.unreadable and self.on_error == "raise":
                    raise UserError(
                        f"cannot read the image {batch.unreadable[0]}; fix or remove it, or pass --data.on_error skip"
                    )
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that loads images died ({error}); lower --data.workers or free some memory"
            ) from error


def rank_loader(
    dataset: IdentityDataset, config: DataConfig, accelerator: Accelerator, *, batch_size: int, **order: Any
) -> BatchLoader:
    """Return this rank's loader, with workers and pinned memory as the settings and the machine suggest.

    order: more arguments of BatchLoader.
    """
    cuda = accelerator.device.type == "cuda"
    ranks = ranks_of_machine(accelerator.num_processes)
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
