"""How far a run is, and the micro-batches of a step that all its ranks take together.

this rank's loader     a micro-batch, none (the epoch has ended), or a UserError
all ranks              the least of their counts of images; one of them asked to stop?      (one all-reduce)
a step                 `accumulation` micro-batches, each with at least two images on every rank
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from partial_fc import naming_the_missing
from partial_fc.training.data.loader import Batch, BatchLoader
from partial_fc.training.errors import UserError
from partial_fc.training.faults import Faults
from partial_fc.training.results import raise_together
from partial_fc.training.run import UNREADABLE, RunFolder

_ENDED, _FAILED = -1, -2  # in place of a count of images


class Progress:
    """How far a run is; part of its checkpoints.

    epoch: epochs that are complete. step: optimizer steps. batches, taken: micro-batches of the epoch that were read, and of them those
    that were trained on. left_out: micro-batches that were not, in all epochs: unreadable, or no whole step. seconds: of training. waited:
    those of them that went by waiting for the loader of the first rank. evaluated: the step of the newest evaluation, -1 before one.
    """

    def __init__(self) -> None:
        self.epoch, self.step, self.batches, self.taken, self.left_out, self.seconds, self.waited = (
            0,
            0,
            0,
            0,
            0,
            0.0,
            0.0,
        )
        self.evaluated = -1

    def end_epoch(self) -> None:
        self.epoch, self.batches, self.taken = self.epoch + 1, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class MicroBatches:
    """What `loader` gives, counted in `progress`, as far as all ranks can use it; every rank must walk through it alike.

    A rank's UserError is raised on all. A micro-batch of which some rank could read fewer than two images (batch statistics need two) is
    left out by all. If `asked_to_stop` is true on any rank there are no more from the end of a step on, and `stopping` is true.
    """

    def __init__(
        self,
        loader: BatchLoader,
        accumulation: int,
        progress: Progress,
        accelerator: Accelerator,
        folder: RunFolder,
        faults: Faults,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.loader, self.accumulation, self.progress = loader, accumulation, progress
        self.accelerator, self.folder, self.faults, self.asked_to_stop = accelerator, folder, faults, asked_to_stop
        self.stopping = False
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Count anew what can be read, and what cannot."""
        self.read, self.unreadable = 0, 0
        self.first_unreadable: str | None = None

    def check_readable(self) -> str | None:
        """What to warn of at the end of an epoch, if more than a tenth of its images could not be read; every rank must call it.

        UserError on all if there was no step. Counted is what all ranks have read since `begin_epoch`.
        """
        everyone = [(self.read, self.unreadable, self.first_unreadable)] * self.accelerator.num_processes
        if self.accelerator.num_processes > 1:
            with naming_the_missing("the count of images that could not be read"):
                dist.all_gather_object(everyone, everyone[0])
        unreadable = sum(each[1] for each in everyone)
        count = unreadable + sum(each[0] for each in everyone)
        told = f"{unreadable:,} of {count:,} images of epoch {self.progress.epoch + 1} could not be read"
        told += next((f", the first of them {first}" for _, _, first in everyone if first is not None), "")
        if not self.progress.taken:
            raise UserError(
                f"{told}: no step had two images for every rank; mend paths and files, then go on with --resume {self.folder.path}"
            )
        return f"{told}; they are named in {self.folder.path / UNREADABLE}" if unreadable > count / 10 else None

    def steps(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left of an epoch of which `batches` are left. Those that make no whole step are left out:
        their gradients would otherwise wait for the next epoch, and be missing from a checkpoint between the two."""
        agreed, left = self.agreed(batches), len(self.loader) // self.accumulation * self.accumulation
        while self.progress.taken < left:
            whole = list(islice(agreed, self.accumulation))
            if len(whole) < self.accumulation:
                self.progress.taken -= len(whole)
                self.progress.left_out += len(whole)
                return
            yield whole

    def agreed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Micro-batch by micro-batch."""
        progress = self.progress
        while True:
            self.faults.at("data", progress.step + 1)
            batch, message, began = None, None, time.monotonic()
            try:
                batch = next(batches, None)
            except UserError as error:
                message = str(error)
            progress.waited += time.monotonic() - began
            batch = self.faults.spoil(batch, progress.epoch * len(self.loader) + progress.batches)
            count = _FAILED if message else _ENDED if batch is None else len(batch.labels)
            count, go_on = self._least(count, not self.asked_to_stop())
            if count == _FAILED:
                raise_together(message, self.accelerator)
            if not go_on and progress.taken % self.accumulation == 0:
                self.stopping = True
                return
            if batch is None or count == _ENDED:
                return
            self.folder.note_unreadable(batch.unreadable)
            self.read, self.unreadable = self.read + len(batch.labels), self.unreadable + len(batch.unreadable)
            self.first_unreadable = self.first_unreadable or next(iter(batch.unreadable), None)
            progress.batches += 1
            if count >= 2:
                progress.taken += 1
                yield batch
            else:
                progress.left_out += 1

    def _least(self, count: int, go_on: bool) -> tuple[int, bool]:
        """The least of all ranks' counts, and whether all go on."""
        if self.accelerator.num_processes == 1:
            return count, go_on
        least = torch.tensor([count, int(go_on)], device=self.accelerator.device)
        with naming_the_missing("the agreement on the next micro-batch"):
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        count, all_go_on = least.tolist()
        return count, bool(all_go_on)
