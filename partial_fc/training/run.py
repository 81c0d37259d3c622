"""The run folder: its files, and which run may use it.

config.yaml          the resolved settings
labels.csv           the label of each identity, and identities that were left out
data.json            fingerprint of the data sets at the start of the run: counts, digests, files
checkpoints/         step-000000120/ ..., the newest few
history.jsonl        a line every few steps: step, epoch, loss, target_angle (radians), learning_rate, ...;
                     and a line per evaluation
unreadable.txt       images that could not be read, if any
trackers.json        which runs of the trackers this one is, so that a resumed run continues them
tensorboard/         or wandb/, ...: the files of trackers
metrics.json         figures of verification, identification and protocols
curves.json          the same with curves and histograms, as a list, for `partial-fc report`
pictures.json        the hardest pairs and the nearest classes, as images
plots/  report.html  plots, and the page that shows all of this
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from partial_fc import Checkpointer
from partial_fc.training.data import what_changed
from partial_fc.training.data.splits import TRAINING
from partial_fc.training.errors import UserError, check_at_least, words
from partial_fc.training.files import append, text_of, told, write_atomically
from partial_fc.training.saved import CHECKPOINTS
from partial_fc.training.saved import CONFIG as CONFIG
from partial_fc.training.trackers import NAMES, TRACKERS, OwnTracker, check_installed, check_names, check_own

HISTORY, UNREADABLE, METRICS = "history.jsonl", "unreadable.txt", "metrics.json"
CURVES, DATA, PLOTS = "curves.json", "data.json", "plots"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # errors of file systems without hard links


@dataclass
class OutputConfig:
    """Where results go."""

    folder: str = "runs/run"
    """Run folder to make; it must not be in use."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers to log to, by name: tensorboard, wandb, mlflow; [] for none."""
    own_tracker: OwnTracker | None = None
    """One more tracker, a subclass of accelerate.tracking.GeneralTracker by its import path, with its arguments."""
    project: str = "partial_fc"
    """Project of the run in the trackers; in MLflow the experiment."""
    run_name: str | None = None
    """Name of the run in the trackers; null for the name of the run folder."""
    log_every: int = 10
    """Optimizer steps between two logged points."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        check_at_least("output.log_every", self.log_every, 1)
        check_names(self.trackers)
        check_own(self.own_tracker)
        for name, value in (("project", self.project), ("run_name", self.run_name)):
            if value is not None and not value.strip():
                raise UserError(f"--output.{name} is empty; leave it out for its default")

    def check_trackers(self) -> None:
        """UserError for a tracker that is not installed: on the main process, before training."""
        check_installed(self.trackers)


class RunFolder:
    """A folder for a run, or for results of one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._recorded_unreadable: set[str] = set()

    def check_free(self) -> None:
        """Raise UserError unless a new run may be started here. Changes nothing."""
        try:
            if self.path.exists() and (
                not self.path.is_dir() or any(not _left_by_claim(each) for each in self.path.iterdir())
            ):
                raise UserError(
                    f"{self.path} is in use; choose another --output.folder, or resume the run in it: --resume "
                    f"{self.path}"
                )
            check_can_be_made(self.path, f"the run folder {self.path}")
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {error.strerror}") from error

    def claim(self, save_config: Callable[[Path], None]) -> None:
        """Make the folder for a new run; `save_config(path)` writes its settings.

        The settings file appears last, and complete. A process that is killed before leaves a folder that is still
        free; one that is killed after leaves a run that can be resumed. Raises UserError if another run uses the
        folder.
        """
        self.check_free()
        try:
            (self.path / PLOTS).mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{CONFIG}.{os.getpid()}.tmp"
            try:
                save_config(temporary)
                self._publish(temporary)
                for left in self.path.glob(f".{CONFIG}.*.tmp"):  # of a process that was killed, or that comes too late
                    left.unlink(missing_ok=True)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError | FileNotFoundError) and (self.path / CONFIG).exists():
                raise UserError(
                    f"{self.path} is in use by another run that has just started; choose another --output.folder"
                ) from None
            raise UserError(f"the run folder {self.path} cannot be made: {words(error)}") from error

    def _publish(self, temporary: Path) -> None:
        """Give the settings their name, which they have then as a whole; FileExistsError if another run has it."""
        try:
            os.link(temporary, self.path / CONFIG)  # of two runs that start at once, it succeeds for one
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            (self.path / CONFIG).touch(exist_ok=False)
            os.replace(temporary, self.path / CONFIG)

    def check_run(self) -> None:
        """Raise UserError unless a run was started here."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path} is not a run folder (it has no {CONFIG}); give the folder of a run")

    def check_data(self, now: dict[str, dict[str, Any]], *, record: bool = True) -> None:
        """Save the fingerprint of the data sets, or compare it with the saved one; only compare it unless `record`.

        Raises UserError that says what has changed if they differ.
        """
        path = self.path / DATA
        if not path.exists():
            if record:
                write_atomically(path, json.dumps(now, indent=1) + "\n")
            return
        changed = self.changed_data(now)
        if changed:
            raise UserError(
                f"the data have changed since the run began: {changed}; restore them, start a new run, or remove "
                f"{path} to continue with the data as they are"
            )

    def changed_data(self, now: dict[str, dict[str, Any]], *, training: bool = True) -> str | None:
        """Return what has changed in the data sets since the run began; None if nothing has, or if nobody knows.

        now: their fingerprint. training: compare the training set, too; else the evaluation sets alone.
        """
        path = self.path / DATA
        if not path.exists():
            return None
        with told(path, again="remove it to continue with the data as they are"):
            before = json.loads(path.read_text(encoding="utf-8"))
            before, now = ({k: v for k, v in each.items() if training or k != TRAINING} for each in (before, now))
            return what_changed(before, now)

    def update_data_folder(self, data_folder: str | None) -> None:
        """Write the current folder of the data into the settings, so that later commands find the data."""
        path = self.path / CONFIG
        settings = yaml.safe_load(text_of(path))
        if settings["data"]["folder"] != data_folder:
            settings["data"]["folder"] = data_folder
            write_atomically(path, yaml.safe_dump(settings, sort_keys=False))

    def checkpointer(
        self,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        asynchronous: bool = False,
        best: Literal["max", "min"] = "max",
        timeout: float | None = None,
    ) -> Checkpointer:
        """Return the Checkpointer of the run. timeout: of an asynchronous save, in seconds."""
        return Checkpointer(
            self.path / CHECKPOINTS,
            keep_last=keep_last,
            keep_best=keep_best,
            asynchronous=asynchronous,
            best=best,
            timeout=timeout,
        )

    def find_checkpoint(self, which: str = "newest", best: Literal["max", "min"] = "max") -> Path:
        """Return a complete checkpoint: "newest", "best" (by its figure), or that of a step.

        Raises UserError if there is none.
        """
        checkpointer = self.checkpointer(best=best)
        if which == "newest":
            found = checkpointer.latest()
            if found is None:
                raise UserError(f"{self.path} has no complete checkpoint; train it first")
            return found
        if which == "best":
            found = checkpointer.best_so_far()
            if found is None:
                raise UserError(
                    f"{self.path} has no checkpoint with a figure; train with --evaluation.every and --evaluation.best"
                )
            return found
        steps = checkpointer.steps()
        if not which.isascii() or not which.isdigit() or int(which) not in steps:
            existing = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"there is no checkpoint {which!r} in {self.path}; give newest, best, or one of the existing steps: "
                f"{existing}"
            )
        return checkpointer.path(int(which))

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return self.checkpointer().latest()

    def append_history(self, row: dict[str, float]) -> None:
        """Append a row to history.jsonl. OSError that names it."""
        append(self.path / HISTORY, json.dumps(row) + "\n")

    def history(self, up_to_step: int | None = None) -> list[dict[str, float]]:
        """Return the rows of history.jsonl; an incomplete last line, left by a crash or a full disk, is ignored."""
        path = self.path / HISTORY
        try:
            lines = text_of(path).splitlines(keepends=True) if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            return [row for row in rows if up_to_step is None or row["step"] <= up_to_step]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}; repair it, or move it away") from error

    def rewind_history(self, step: int) -> int:
        """Remove the rows after `step`, which a resumed run logs again; return how many steps were logged after it."""
        rows = self.history()
        write_atomically(self.path / HISTORY, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        return max(0, int(rows[-1]["step"]) - step) if rows else 0

    def record_unreadable(self, names: list[str]) -> None:
        """Record images that could not be read. All ranks append to one file; an image is recorded once per rank."""
        new = [name for name in dict.fromkeys(names) if name not in self._recorded_unreadable]
        if new:
            append(self.path / UNREADABLE, "".join(f"{name}\n" for name in new))
            self._recorded_unreadable.update(new)

    def print_unreadable(self) -> None:
        """Print how many images, and samples without one, could not be read, if there are any."""
        found = self.unreadable()
        if found:
            print(
                f"could not be read and skipped: {len(found):,} (images, or folders without one), listed in "
                f"{self.path / UNREADABLE}"
            )

    def unreadable(self) -> set[str]:
        """Return the names of all images that could not be read so far."""
        path = self.path / UNREADABLE
        return set(text_of(path, errors="surrogateescape").splitlines()) if path.exists() else set()

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        write_atomically(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")

    def write_curves(self, evaluations: list[dict[str, Any]]) -> None:
        write_atomically(self.path / CURVES, json.dumps(evaluations) + "\n")


def describe_checkpoint(which: str, found: Path) -> str:
    """Return a text for the checkpoint that `find_checkpoint(which)` has found, such as "best (step 8)"."""
    step = int(found.name.removeprefix("step-"))
    return f"step {step}" if which.isdigit() else f"{which} (step {step})"


def check_can_be_made(path: Path, what: str) -> None:
    """Raise UserError unless the file or folder `path`, and missing folders above it, can be made.

    `what` names it in the message. An OSError while looking is not caught.
    """
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{what} cannot be made: {above} is not a writable folder; choose another place")


def check_new_file(path: Path, setting: str, endings: Sequence[str] = ()) -> None:
    """Raise UserError unless `path`, given for `setting`, has one of the endings and can be written or overwritten.

    Folders above it may be missing.
    """
    if endings and path.suffix not in endings:
        raise UserError(f"{setting} {path}: give the name of a file that ends with {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{setting} {path} is a folder; give the name of a file")
    try:
        check_can_be_made(path.absolute().parent, f"{setting} {path}")
    except OSError as error:
        raise UserError(f"{setting} {path} cannot be made: {error.strerror}") from error


def _left_by_claim(path: Path) -> bool:
    """Return whether `path` was left by a process that was killed during `claim`, before its run existed."""
    if path.name == PLOTS:
        return path.is_dir() and not any(path.iterdir())
    hidden = path.name.startswith(".") and path.suffix == ".tmp"
    name = path.name[1 : -len(".tmp")] if hidden else path.name
    of_data = name == DATA or (name.startswith("labels") and name.endswith(".csv"))
    of_trackers = name in (TRACKERS, *NAMES)
    return of_data or of_trackers or (hidden and name.startswith(CONFIG))
