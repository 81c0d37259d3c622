"""Checkpoints of a run, step by step: which are kept, which is the newest complete one, and saving while training goes on.

    folder/
      .lock                   held by the run that writes here
      step-000000500/         one checkpoint each (checkpoint.py)
      step-000001000/

    save(step)                 snapshot (if asynchronous) ── write, all ranks ──> step-000001000/ ── retention
    latest(), load()           the newest checkpoint that is whole

Asynchronous: the state is copied to CPU memory, which is what a step waits for, and a thread writes the copy; it talks to the other ranks'
threads over a gloo group of its own, so that its messages and the step's never meet. The copy's memory is kept for the next save: the peak
is the same, and memory that has been written to before is copied to several times faster.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.checkpoint.locks import FolderLock
from partial_fc.checkpoint.manifest import MANIFEST, damage, read_manifest, writing
from partial_fc.checkpoint.save_load import Stateful, collect, load_checkpoint, write_checkpoint
from partial_fc.distributed.agreement import check_same, on_first_rank

log = logging.getLogger("partial_fc")

STEP = re.compile(r"step-(\d{9,})")


class Checkpointer:
    """The checkpoints of one run in `folder`: `checkpointer.save(step, head=head, head_optimizer=head_optimizer, backbone=backbone)`.

    Args:
        folder: where they are; made at the first save. All ranks must see the same one.
        keep_last: how many of the newest to keep, at least 1.
        keep_best: how many of those with the best `metric` to keep besides.
        asynchronous: write while training goes on: save() returns when the state is copied. Takes CPU memory of the size of this rank's
            state. Call wait() at the end of the run.
        best: whether the "max" or the "min" of metric is best.
        timeout: seconds after which an asynchronous save ends because a rank does not answer; torch's (1800) if not given. Give that of
            your process group.

    Every rank must construct it, and call save, load and wait together. Without a process group it works in one process.

    Only checkpoints that this object wrote or found by load() or latest() are ever removed. A folder that another process is writing to,
    or that holds checkpoints of this step or later which are not this run's, is refused: BlockingIOError, FileExistsError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: int = 0,
        asynchronous: bool = False,
        best: Literal["max", "min"] = "max",
        timeout: float | None = None,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best at least 0, not {keep_last} and {keep_best}")
        if best not in ("max", "min"):
            raise ValueError(f'best must be "max" or "min", not {best!r}')
        self.folder, self.keep_last, self.keep_best, self.best = Path(folder), keep_last, keep_best, best
        self.asynchronous = asynchronous
        self._lock = FolderLock(self.folder)
        self._own: set[int] = set()  # steps that this object wrote or found
        self._damaged: set[int] = set()  # newer ones than it found, which were passed over: they are in nobody's way
        self._copies: dict[str, Tensor] = {}
        self._writer: _Writer | None = None
        limit = None if timeout is None else datetime.timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=limit) if asynchronous and dist.is_initialized() else None

    # ------------------------------------------------------------------------------------------------ what there is

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. Looks at the folder; no communication."""
        found = (STEP.fullmatch(path.parent.name) for path in self.folder.glob(f"step-*/{MANIFEST}"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be, for `load_checkpoint`."""
        return self.folder / f"step-{step:09d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none; one that is not whole any more is passed over with a warning.

        Looks at the folder; no communication. A save that is under way is not there yet.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                problem = damage(self.path(step), read_manifest(self.path(step)))
            except (OSError, ValueError) as error:
                problem = error
            if problem is None:
                self._own.update(s for s in steps if s <= step)
                self._damaged = {s for s in steps if s > step}
                return self.path(step)
            log.warning("%s; passed over", problem)
        return None

    def best_so_far(self) -> Path | None:
        """The complete checkpoint with the best `metric`, of equal ones the newest; None if none has one.

        Looks at the folder; no communication.
        """
        ranked = self._ranked(self.steps())
        return self.path(ranked[-1]) if ranked else None

    # ------------------------------------------------------------------------------------------------ saving and loading

    def save(self, step: int, *, metric: float | None = None, **named: Stateful) -> None:
        """Write the state of `named` objects as the checkpoint of `step`, then remove those that are not to be kept.

        An earlier asynchronous save is waited for first, and its error raised here. metric: for keep_best, the first rank's counts; one
        without is not among the best. Raises as `save_checkpoint` does, and ValueError if ranks disagree about step or names; in any case
        the checkpoints there were are still there.
        """
        self.wait()
        check_same("what is to be saved", (step, sorted(named)))
        on_first_rank(lambda: self._admit(step))
        state = collect(named, self._copy if self.asynchronous else None)
        if self.asynchronous:
            self._wait_for_copies()
        note = {"step": step, "metric": None if metric is None or math.isnan(metric) else float(metric)}

        def write() -> None:
            write_checkpoint(self.path(step), state, sorted(named), note=note, group=self._group)
            on_first_rank(lambda: self._retain(step), self._group)

        if self.asynchronous:
            self._writer = _Writer(write)
        else:
            write()
        self._own.add(step)

    def load(self, *, step: int | None = None, **named: Stateful) -> int:
        """Read the newest complete checkpoint, or that of `step`, into the `named` objects; its step. Every rank must call it.

        Raises FileNotFoundError if there is none, ValueError as `load_checkpoint` does.
        """
        self.wait()
        path = Path(on_first_rank(lambda: str(self._find(step))))
        load_checkpoint(path, **named)
        found = int(path.name.removeprefix("step-"))
        self._own.update(s for s in self.steps() if s <= found)
        return found

    def wait(self) -> None:
        """Return when an asynchronous save is complete; raise its error, the same on every rank. To be called at the end of a run."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()

    def claim(self) -> None:
        """Take the folder now and not at the first save, so that a second run is refused before it has trained. Every rank must call it."""
        on_first_rank(self._claim)

    def release(self) -> None:
        """Let another process write here. Happens by itself when this object is collected or its process ends."""
        self.wait()
        self._lock.release()

    # ------------------------------------------------------------------------------------------------ on the first rank

    def _claim(self) -> None:
        if self._lock.held:
            return
        with writing(self.folder):
            self._lock.acquire()
            for path in self.folder.glob("step-*"):  # what a killed process left half written
                if STEP.fullmatch(path.name) and path.is_dir() and not (path / MANIFEST).exists() and _only_ours(path):
                    shutil.rmtree(path, ignore_errors=True)

    def _admit(self, step: int) -> None:
        """Take the folder, and see that nothing of another run is in the way of `step`."""
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        self._claim()
        others = [s for s in self.steps() if s >= step and s not in self._own | self._damaged]
        if others:
            raise FileExistsError(
                f"{self.folder} holds a checkpoint of step {others[-1]}, which this run did not write, and step {step} is to be saved; "
                "go on from it with load(), or choose another folder"
            )

    def _find(self, step: int | None) -> Path:
        path = self.latest() if step is None else self.path(step)
        if path is None or not (path / MANIFEST).is_file():
            have = ", ".join(map(str, self.steps())) or "none"
            which = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise FileNotFoundError(f"no {which} in {self.folder} (steps there: {have})")
        return path

    def _retain(self, step: int) -> None:
        """Remove this run's checkpoints that are neither among the newest nor among the best. A busy one is no failure."""
        own = [s for s in self.steps() if s in self._own or s == step]
        keep = set(own[-self.keep_last :])
        if self.keep_best:
            keep.update(self._ranked(own)[-self.keep_best :])
        for old in own:
            if old not in keep:
                # without its manifest it is no checkpoint any more, whatever happens before the rest is gone
                (self.path(old) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.path(old), ignore_errors=True)

    def _ranked(self, steps: list[int]) -> list[int]:
        """Those of the steps that have a metric, the best one last."""
        sign = 1 if self.best == "max" else -1
        metrics = [(self._metric(s), s) for s in steps]
        return [s for _, s in sorted((sign * metric, s) for metric, s in metrics if metric is not None)]

    def _metric(self, step: int) -> float | None:
        try:
            metric: float | None = read_manifest(self.path(step)).get("metric")
        except (OSError, ValueError):  # a damaged one is no reason to lose the save that asks
            return None
        return metric

    # ------------------------------------------------------------------------------------------------ the copy

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor in CPU memory, which is that of the save before if it fits."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            self._copies.pop(name, None)
            pinned = tensor.device.type == "cuda"  # so that the copy does not wait for each tensor
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._copies[name] = copy
        return copy.copy_(tensor, non_blocking=True)

    def _wait_for_copies(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


def _only_ours(path: Path) -> bool:
    """Whether a folder holds nothing but what a half-written checkpoint consists of."""
    return all(
        re.fullmatch(rf"data-\d{{4,}}|{re.escape(MANIFEST)}\.tmp|\.lock", entry.name) for entry in path.iterdir()
    )


class _Writer:
    """One save in a thread; its exception comes out of join()."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        # not a daemon: a process that ends without wait() still finishes what it has begun to write
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
