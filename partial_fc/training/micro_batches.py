"""The progress of a run, and the micro-batches that all ranks use together.

this rank's loader     a micro-batch, nothing (the epoch has ended), or a UserError
all ranks              smallest number of images on a rank; was any rank asked to stop?      (one all-reduce)
a step                 `accumulation` micro-batches, each with at least two images on every rank
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator

from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.objects import gather_objects
from partial_fc.training.all_ranks import raise_on_all
from partial_fc.training.data.loader import Batch, BatchLoader
from partial_fc.training.errors import UserError, words
from partial_fc.training.faults import Faults
from partial_fc.training.run import UNREADABLE, RunFolder

MIN_IMAGES = 2  # per rank and micro-batch: batch normalisation needs two
_ENDED, _FAILED = -1, -2  # in place of a number of images


class Progress:
    """The progress of a run; part of its checkpoints, under the names of its attributes."""

    def __init__(self) -> None:
        self.epoch = 0  # complete epochs
        self.step = 0  # optimizer steps
        self.batches = 0  # micro-batches of this epoch that were read
        self.taken = 0  # micro-batches of this epoch that were trained on
        self.left_out = 0  # micro-batches of all epochs that were skipped: unreadable, or too few for a step
        self.seconds = 0.0  # time spent on training
        self.waited = 0.0  # part of it that this rank has waited for its loader
        self.evaluated = -1  # the step of the newest evaluation; -1 before the first

    def end_epoch(self) -> None:
        """Count an epoch as complete."""
        self.epoch += 1
        self.batches = 0
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class MicroBatches:
    """The micro-batches of `loader` that all ranks can use, counted in `progress`. Every rank must iterate alike.

    A rank's UserError, and what it has given to `fail`, is raised on all ranks. If some rank could read fewer than two
    images of its micro-batch, all ranks skip theirs. If `asked_to_stop` returns True on any rank, the iteration ends
    after the current step, and `stopping` is True.
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
        self.loader = loader
        self.accumulation = accumulation
        self.progress = progress
        self.accelerator = accelerator
        self.folder = folder
        self.faults = faults
        self.asked_to_stop = asked_to_stop
        self.stopping = False
        self._failed: str | None = None
        self.begin_epoch()

    def fail(self, error: OSError) -> None:
        """Note an error of this rank's disk between two collectives; all ranks raise it with the next micro-batch."""
        self._failed = self._failed or words(error)

    def raise_failure(self) -> None:
        """Raise on every rank, as UserError, what one of them has noted. Every rank must call it."""
        raise_on_all(self._failed, self.accelerator)

    def begin_epoch(self) -> None:
        """Reset the counts of readable and unreadable images."""
        self.read = 0
        self.unreadable = 0
        self.first_unreadable: str | None = None

    def check_readable(self) -> str | None:
        """Return a warning if more than a tenth of the images read by all ranks since `begin_epoch` were unreadable.

        Every rank must call it, at the end of an epoch. Raises UserError on all ranks if the epoch had no step.
        """
        mine = self.read, self.unreadable, self.first_unreadable
        ranks = gather_objects(mine, "the count of images that could not be read")
        unreadable = sum(each[1] for each in ranks)
        count = unreadable + sum(each[0] for each in ranks)
        found = f"{unreadable:,} of {count:,} images of epoch {self.progress.epoch + 1} could not be read"
        found += next((f", the first of them {first}" for _, _, first in ranks if first is not None), "")
        if not self.progress.taken:
            raise UserError(
                f"{found}: no step had two images for every rank; correct paths and files, then resume with --resume "
                f"{self.folder.path}"
            )
        return f"{found}; they are listed in {self.folder.path / UNREADABLE}" if unreadable > count / 10 else None

    def steps(self, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining step of an epoch, from its remaining `batches`.

        Micro-batches at the end of an epoch that do not fill a step are skipped. Otherwise their gradients would wait
        for the next epoch, and a checkpoint between the epochs would not contain them.
        """
        usable = self.usable(batches)
        wanted = len(self.loader) // self.accumulation * self.accumulation
        while self.progress.taken < wanted:
            step = list(islice(usable, self.accumulation))
            if len(step) < self.accumulation:
                self.progress.taken -= len(step)
                self.progress.left_out += len(step)
                return
            yield step

    def usable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches that every rank can use, until the epoch ends or a rank was asked to stop."""
        progress = self.progress
        while True:
            self.faults.at("data", progress.step + 1)
            batch = None
            message = self._failed
            began = time.monotonic()
            try:
                batch = next(batches, None)
            except UserError as error:
                message = message or str(error)
            progress.waited += time.monotonic() - began
            batch = self.faults.make_unreadable(batch, progress.epoch * len(self.loader) + progress.batches)
            count = _FAILED if message else _ENDED if batch is None else len(batch.labels)
            count, continuing = self._smallest(count, not self.asked_to_stop())
            if count == _FAILED:
                raise_on_all(message, self.accelerator)
            if not continuing and progress.taken % self.accumulation == 0:
                self.stopping = True
                return
            if batch is None or count == _ENDED:
                return
            try:
                self.folder.record_unreadable(batch.unreadable)
            except OSError as error:
                self.fail(error)
            self.read += len(batch.labels)
            self.unreadable += len(batch.unreadable)
            self.first_unreadable = self.first_unreadable or next(iter(batch.unreadable), None)
            progress.batches += 1
            if count >= MIN_IMAGES:
                progress.taken += 1
                yield batch
            else:
                progress.left_out += 1

    def _smallest(self, count: int, continuing: bool) -> tuple[int, bool]:
        """Return the smallest count of all ranks, and whether all ranks continue."""
        if self.accelerator.num_processes == 1:
            return count, continuing
        mine = (count, int(continuing))
        table = meet("the agreement on the next micro-batch", ranks_of(None), self.accelerator.device, mine)
        counts, all_continue = zip(*table, strict=True)
        return min(counts), all(all_continue)
