"""Fault injection: a chosen fault at a chosen point of a run, for the tests of crashes and benchmarks/soak.py.

    PARTIAL_FC_FAULTS="kill:backward@step=7,rank=1; unreadable:data@batch=3,rank=0,images=5"

    action        effect on this rank                                              phase
    kill          it sends itself SIGKILL                                          any
    stop          it sends itself SIGSTOP: the process exists, but hangs           any
    term, usr1    it sends itself SIGTERM or SIGUSR1, which ask the run to stop    any
    full          writing fails because the disk is full (ENOSPC)                  checkpoint
    unreadable    `images` images of a batch, or all, cannot be read               data

    phase         point of the run
    data          before a batch is read
    forward       between the forward of the backbone and that of the head
    backward      between the backward of the head and that of the backbone
    optimizer     after the optimizer steps, before the schedules
    checkpoint    in the middle of a save: this rank's file is written, the checkpoint is not complete
    evaluation    before the evaluation

`step` counts from 1 and means the step being computed; for a checkpoint or the evaluation, the last step computed.
`batch` counts the batches read since the run began, from 0. `once=FILE`: the fault happens only if FILE does not
exist; FILE is created first, so that a restarted run continues. Each fault happens once per process. If the variable
is not set, nothing happens and no hook is installed.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from partial_fc.training.data.loader import Batch
from partial_fc.training.errors import UserError

VARIABLE = "PARTIAL_FC_FAULTS"
SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "usr1": "SIGUSR1"}
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")
ONLY = {"full": "checkpoint", "unreadable": "data"}  # actions that are possible in a single phase


@dataclass
class Fault:
    """One fault of the variable."""

    action: str
    phase: str
    step: int | None = None
    batch: int | None = None
    rank: int = 0
    images: int | None = None
    once: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse `ACTION:PHASE@key=value,...`. Raises UserError for anything else."""
        event, _, options = text.strip().partition("@")
        action, _, phase = event.partition(":")
        try:
            given = dict(each.split("=", 1) for each in options.split(",")) if options else {}
            values: dict[str, Any] = {name: value if name == "once" else int(value) for name, value in given.items()}
            if action not in (*SIGNALS, *ONLY) or phase not in PHASES or ONLY.get(action, phase) != phase:
                raise ValueError
            return cls(action, phase, **values)
        except (ValueError, TypeError):
            raise UserError(
                f"{VARIABLE} has an invalid fault: {text.strip()!r}; write ACTION:PHASE@key=value,... as described in "
                "partial_fc/training/faults.py"
            ) from None

    def trigger(self) -> bool:
        """Send the signal, if the action is one. Return False, and do nothing, if the file of `once` exists."""
        if self.once is not None:
            try:
                Path(self.once).touch(exist_ok=False)
            except FileExistsError:
                return False
        if self.action in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[self.action]))
        return True


class Faults:
    """The faults of this rank that have not happened yet."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults

    @classmethod
    def of_environment(cls, rank: int) -> Faults:
        """Return the faults that the variable names for this rank. Raises UserError if it cannot be parsed."""
        texts = [text for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]
        return cls([fault for fault in map(Fault.parse, texts) if fault.rank == rank])

    def _trigger(self, phase: str, step: int | None = None, batch: int | None = None) -> list[Fault]:
        """Trigger the faults of this point of the run; return those that have happened."""
        happened = []
        for fault in list(self._faults):
            if fault.phase == phase and (fault.step, fault.batch) == (step, batch):
                self._faults.remove(fault)
                if fault.trigger():
                    happened.append(fault)
        return happened

    def at(self, phase: str, step: int) -> None:
        """Trigger the faults of this point of the run."""
        if self._faults:
            self._trigger(phase, step)

    def when_backward_reaches(self, embeddings: Tensor, step: int) -> None:
        """Trigger the faults of the backward phase when the gradient of the embeddings is computed."""
        if any(fault.phase == "backward" for fault in self._faults):
            embeddings.register_hook(lambda _: self.at("backward", step))

    def make_unreadable(self, batch: Batch | None, number: int) -> Batch | None:
        """Return batch `number` without the images that a fault makes unreadable."""
        if self._faults and batch is not None:
            for fault in self._trigger("data", batch=number):
                bad = len(batch.labels) if fault.images is None else fault.images
                names = [f"image {index} (fault injected)" for index in batch.indices[:bad].tolist()]
                batch = Batch(batch.images[bad:], batch.labels[bad:], batch.indices[bad:], batch.unreadable + names)
        return batch

    def when_written(self, step: int) -> None:
        """Trigger the faults of the checkpoint phase in the next save, right after this rank's file is written."""
        if not any(fault.phase == "checkpoint" and fault.step == step for fault in self._faults):
            return
        write: Callable[..., Any] = FileSystemWriter.write_data

        def interrupted(*arguments: Any, **options: Any) -> Any:
            FileSystemWriter.write_data = write  # type: ignore[method-assign]
            written = write(*arguments, **options)
            if "full" in [fault.action for fault in self._trigger("checkpoint", step)]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written

        FileSystemWriter.write_data = interrupted  # type: ignore[method-assign]
