"""Faults on purpose, in a named phase of a named step: what the tests of crashes and the soak (benchmarks/soak.py) inject.

    PARTIAL_FC_FAULTS="kill:backward@step=7,rank=1; unreadable:data@batch=3,rank=0,images=5"

    action        what this rank does to itself                             phase
    kill          SIGKILL                                                   any
    stop          SIGSTOP: it is there and does not answer                  any
    term, usr1    SIGTERM, SIGUSR1: asked to stop                           any
    full          what it writes meets a full disk (ENOSPC)                 checkpoint
    unreadable    images of a batch cannot be read, all or so many          data

    data          before a batch is read         forward      between the backbone's and the head's
    backward      when the gradient has passed the head, and not yet the backbone
    optimizer     after weights have moved, before the schedules
    checkpoint    in the middle of a save: this rank's file is written, the checkpoint not complete
    evaluation    before it

`step` counts from 1 and is the one that is being computed; that of a checkpoint or of the evaluation is the last one computed. `batch`
counts the batches read since the run began, from 0. `once=FILE`: only if FILE is not there; it is made first, so that a run started again
goes on. Each fault happens once in a process. Where the variable is not set nothing happens, and nothing is hooked.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
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
ONLY = {"full": "checkpoint", "unreadable": "data"}  # the phase of actions that have but one


@dataclass
class Fault:
    """One of the variable."""

    action: str
    phase: str
    step: int | None = None
    batch: int | None = None
    rank: int = 0
    images: int | None = None
    once: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Of `ACTION:PHASE@key=value,...`; UserError if it is none."""
        what, _, where = text.strip().partition("@")
        action, _, phase = what.partition(":")
        try:
            given = dict(each.split("=", 1) for each in where.split(",")) if where else {}
            values: dict[str, Any] = {name: value if name == "once" else int(value) for name, value in given.items()}
            if action not in (*SIGNALS, *ONLY) or phase not in PHASES or ONLY.get(action, phase) != phase:
                raise ValueError
            return cls(action, phase, **values)
        except (ValueError, TypeError):
            raise UserError(
                f"{VARIABLE} has {text.strip()!r}; a fault is ACTION:PHASE@key=value,... as partial_fc/training/faults.py says"
            ) from None

    def happen(self) -> bool:
        """Whether it does, now; a signal is sent."""
        if self.once is not None:
            try:
                Path(self.once).touch(exist_ok=False)
            except FileExistsError:
                return False
        if self.action in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[self.action]))
        return True


class Faults:
    """Those of this rank that are still to come."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults

    @classmethod
    def of_environment(cls, rank: int) -> Faults:
        """What the variable names for this rank; UserError if it cannot be understood."""
        texts = [text for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]
        return cls([fault for fault in map(Fault.parse, texts) if fault.rank == rank])

    def _due(self, phase: str, step: int | None = None, batch: int | None = None) -> Iterator[Fault]:
        for fault in list(self._faults):
            if fault.phase == phase and (fault.step, fault.batch) == (step, batch):
                self._faults.remove(fault)
                if fault.happen():
                    yield fault

    def at(self, phase: str, step: int) -> None:
        """The run is at this point."""
        if self._faults:
            for _ in self._due(phase, step):
                pass

    def when_backward_reaches(self, embeddings: Tensor, step: int) -> None:
        """Those of backward, when the gradient of the embeddings is there."""
        if any(fault.phase == "backward" for fault in self._faults):
            embeddings.register_hook(lambda _: self.at("backward", step))

    def spoil(self, batch: Batch | None, number: int) -> Batch | None:
        """The batch as it is when images of it cannot be read."""
        if self._faults and batch is not None:
            for fault in self._due("data", batch=number):
                bad = len(batch.labels) if fault.images is None else fault.images
                names = [f"image {index} (spoilt on purpose)" for index in batch.indices[:bad].tolist()]
                batch = Batch(batch.images[bad:], batch.labels[bad:], batch.indices[bad:], batch.unreadable + names)
        return batch

    def when_written(self, step: int) -> None:
        """Those of checkpoint, in the save that comes next: when this rank's file has been written and no other rank knows."""
        if not any(fault.phase == "checkpoint" and fault.step == step for fault in self._faults):
            return
        write: Callable[..., Any] = FileSystemWriter.write_data

        def interrupted(*arguments: Any, **options: Any) -> Any:
            FileSystemWriter.write_data = write  # type: ignore[method-assign]
            written = write(*arguments, **options)
            if "full" in [fault.action for fault in self._due("checkpoint", step)]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written

        FileSystemWriter.write_data = interrupted  # type: ignore[method-assign]
