"""The checkpoints of a run: save during training, keep some of them, find the newest complete one.

    folder/
      .lock                   held by the run that writes to this folder
      step-000000500/         one checkpoint each (save_load.py)
      step-000001000/

    save(step)                 snapshot (if asynchronous) ── write, all ranks ──> step-000001000/ ── retention
    latest(), load()           the newest complete checkpoint

An asynchronous save copies the state to CPU memory (snapshot.py), and a thread writes the copy; a training step waits
only for the copy. The thread uses a gloo group of its own, so its messages never mix with those of a step. The memory
of the copy is kept for the next save: the peak is the same, and memory that has been written before is copied to
several times faster.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from partial_fc.checkpoint.increments import Increments
from partial_fc.checkpoint.locks import FolderLock
from partial_fc.checkpoint.manifest import MANIFEST, find_damage, naming_the_checkpoint, read_manifest, remove_tree
from partial_fc.checkpoint.save_load import Stateful, collect, load_checkpoint, write_checkpoint
from partial_fc.checkpoint.snapshot import Snapshots
from partial_fc.distributed.agreement import check_same, on_first_rank
from partial_fc.distributed.given import as_whole, whole, whole_if_any
from partial_fc.distributed.operation import operation

log = logging.getLogger("partial_fc")

STEP = re.compile(r"step-(\d{9,})")


class Checkpointer:
    """Save and load the checkpoints of one run in `folder`: `checkpointer.save(step, head=head, backbone=backbone)`.

    Args:
        folder: folder of the checkpoints, created at the first save. All ranks must see the same one.
        keep_last: how many of the newest checkpoints to keep, at least 1.
        keep_best: how many of the checkpoints with the best `metric` to keep in addition.
        asynchronous: write during training: save() returns once the state is copied. This takes CPU memory of the size
            of this rank's state. Call wait() at the end of the run.
        best: whether the "max" or the "min" of the metric is best.
        timeout: seconds after which an asynchronous save fails if a rank does not respond; default: torch's (1800).
            Use the timeout of your process group.
        incremental: of class rows in a `storage`, write those alone that may have changed since the checkpoint before,
            and link to the files of that (docs/tiers.md). All others are written whole.

    Every rank must construct it, and all ranks must call save, load and wait together. It also works in one process
    without a process group.

    Only checkpoints that this object wrote, or found by load() or latest(), are ever removed. It raises BlockingIOError
    for a folder that another process is writing to, and FileExistsError for a folder with checkpoints of another run at
    the same or a later step.
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
        incremental: bool = True,
    ) -> None:
        last, also = as_whole(keep_last), as_whole(keep_best)
        if last is None or also is None or last < 1 or also < 0:
            raise ValueError(
                f"keep_last must be at least 1 and keep_best at least 0, not {keep_last!r} and {keep_best!r}"
            )
        if best not in ("max", "min"):
            raise ValueError(f'best must be "max" or "min", not {best!r}')
        self.folder = Path(folder)
        self.keep_last, self.keep_best = last, also
        self.best = best
        self.asynchronous = asynchronous
        self.incremental = incremental
        self._lock = FolderLock(self.folder)
        self._own: set[int] = set()  # steps that this object wrote or found
        self._damaged: set[int] = set()  # newer checkpoints that latest() skipped; they may be replaced
        self._snapshots = Snapshots()
        self._writer: _Writer | None = None
        limit = None if timeout is None else datetime.timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=limit) if asynchronous and dist.is_initialized() else None

    # ------------------------------------------------------------------------------------------------ finding

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending. Reads the folder; not a collective.

        OSError if the disk cannot tell.
        """
        try:
            found = [match for name in os.listdir(self.folder) if (match := STEP.fullmatch(name))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in found if _exists(self.folder / match[0] / MANIFEST))

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step, which need not exist yet; for `load_checkpoint`."""
        return self.folder / f"step-{whole('step', step):09d}"

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, None if there is none. Damaged ones are skipped with a warning.

        Reads the folder; not a collective. A save that is still running does not count. OSError if the disk cannot
        read what is there: that is no reason to go on from an earlier checkpoint, or from none.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                problem = find_damage(self.path(step), read_manifest(self.path(step)))
            except (FileNotFoundError, ValueError) as error:
                problem = error
            if problem is None:
                self._own.update(s for s in steps if s <= step)
                self._damaged = {s for s in steps if s > step}
                return self.path(step)
            log.warning("%s; this checkpoint is skipped", problem)
        return None

    def best_so_far(self) -> Path | None:
        """Return the complete checkpoint with the best `metric`, the newest of equal ones; None if none has a metric.

        Reads the folder; not a collective.
        """
        ranked = self._ranked(self.steps())
        return self.path(ranked[-1]) if ranked else None

    # ------------------------------------------------------------------------------------------------ save and load

    @operation("Checkpointer.save")
    def save(self, step: int, *, metric: float | None = None, **named: Stateful) -> None:
        """Write the state of the `named` objects as the checkpoint of `step`. Then remove checkpoints not to be kept.

        First waits for an earlier asynchronous save and raises its error. metric: for keep_best; the first rank's value
        is used. A checkpoint without a metric is never among the best.

        Raises as `save_checkpoint` does, and ValueError if ranks disagree about step or names. Existing checkpoints are
        then unchanged.
        """
        self.wait()
        step = whole_if_any(step)
        check_same("(step, names to save)", (step, sorted(named)))
        on_first_rank(lambda: self._admit(step))
        increments = Increments(named, self.path(step)) if self.incremental else None
        state = collect(named, self._snapshots.copy if self.asynchronous else None, increments)
        note: dict[str, Any] = {"step": step, "metric": None if metric is None or math.isnan(metric) else float(metric)}

        if increments is not None:
            note |= increments.note

        def write() -> None:
            try:
                write_checkpoint(
                    self.path(step), state, sorted(named), note=note, group=self._group, increments=increments
                )
            except BaseException:
                if increments is not None:
                    increments.abandon()
                raise
            on_first_rank(lambda: self._retain(step), self._group)

        if self.asynchronous:
            self._writer = _Writer(write)
        else:
            write()
        self._own.add(step)

    @operation("Checkpointer.load")
    def load(self, *, step: int | None = None, **named: Stateful) -> int:
        """Load the newest complete checkpoint, or that of `step`, and return its step. Every rank must call it.

        Raises FileNotFoundError if there is none, ValueError as `load_checkpoint` does.
        """
        self.wait()
        path = Path(on_first_rank(lambda: str(self._find(step))))
        load_checkpoint(path, **named)
        found = int(path.name.removeprefix("step-"))
        self._own.update(s for s in self.steps() if s <= found)
        return found

    def wait(self) -> None:
        """Wait until an asynchronous save is complete and raise its error, if any. Call it at the end of a run."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()

    @operation("Checkpointer.claim")
    def claim(self) -> None:
        """Lock the folder now instead of at the first save, so that a second run fails before it trains.

        Every rank must call it.
        """
        on_first_rank(self._claim)

    def release(self) -> None:
        """Unlock the folder for other processes. Also happens when this object is deleted or its process ends."""
        self.wait()
        self._lock.release()

    # ------------------------------------------------------------------------------------------------ on the first rank

    def _claim(self) -> None:
        if self._lock.held:
            return
        with naming_the_checkpoint(self.folder):
            self._lock.acquire()
            for path in self.folder.glob("step-*"):  # remove what a killed process left incomplete
                if (
                    STEP.fullmatch(path.name)
                    and path.is_dir()
                    and not (path / MANIFEST).exists()
                    and _is_incomplete_save(path)
                ):
                    remove_tree(path)

    def _admit(self, step: int) -> None:
        """Lock the folder, and check that no checkpoint of another run is at `step` or later."""
        step = whole("step", step, least=0)
        self._claim()
        others = [s for s in self.steps() if s >= step and s not in self._own | self._damaged]
        if others:
            raise FileExistsError(
                f"cannot save step {step}: {self.folder} holds a checkpoint of step {others[-1]}, which this run did "
                "not write; continue from it with load(), or choose another folder"
            )

    def _find(self, step: int | None) -> Path:
        path = self.latest() if step is None else self.path(step)
        if path is None or not (path / MANIFEST).is_file():
            have = ", ".join(map(str, self.steps())) or "none"
            which = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise FileNotFoundError(f"no {which} in {self.folder} (steps there: {have})")
        return path

    def _retain(self, step: int) -> None:
        """Remove this run's checkpoints that are neither among the newest nor among the best. An error is logged."""
        own = [s for s in self.steps() if s in self._own or s == step]
        keep = set(own[-self.keep_last :])
        if self.keep_best:
            keep.update(self._ranked(own)[-self.keep_best :])
        for old in own:
            if old not in keep:
                # remove the manifest first: from then on the folder is not a checkpoint, even if the rest stays
                try:
                    (self.path(old) / MANIFEST).unlink(missing_ok=True)
                except OSError as error:  # the new checkpoint is complete all the same
                    log.warning("%s cannot be removed: %s", self.path(old), error.strerror or error)
                    continue
                remove_tree(self.path(old))

    def _ranked(self, steps: list[int]) -> list[int]:
        """Return the steps that have a metric, the best one last."""
        sign = 1 if self.best == "max" else -1
        metrics = [(self._metric(s), s) for s in steps]
        return [s for _, s in sorted((sign * metric, s) for metric, s in metrics if metric is not None)]

    def _metric(self, step: int) -> float | None:
        try:
            metric: float | None = read_manifest(self.path(step)).get("metric")
        except (OSError, ValueError):  # a damaged checkpoint must not make the current save fail
            return None
        return metric


def _exists(path: Path) -> bool:
    """Whether there is a file; OSError if the disk cannot tell, where `Path.exists` may say no."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_incomplete_save(path: Path) -> bool:
    """Whether a folder holds only files of an incomplete checkpoint."""
    return all(
        re.fullmatch(rf"data-\d{{4,}}|{re.escape(MANIFEST)}\.tmp|\.lock", entry.name) for entry in path.iterdir()
    )


class _Writer:
    """One save in a thread. join() raises its exception."""

    def __init__(self, write: Callable[[], None]) -> None:
        # a new thread begins with GPU 0, and torch's writer waits for the current one, also for tensors of the CPU
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._error: BaseException | None = None
        # not a daemon: a process that ends without wait() still finishes its save
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            write()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
