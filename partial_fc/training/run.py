"""The run folder: who may use it, what lies in it.

config.yaml          the resolved settings
labels.csv           which identity has which label, and which are left out
data.json            what the data were when the run began: counts, digests, files
checkpoints/         step-000000120/ ..., the newest few
history.jsonl        a line every few steps: step, epoch, loss, target_angle (radians), learning_rate, ...; and one an evaluation
unreadable.txt       images that could not be read, if any
tensorboard/         or what other trackers write
metrics.json         verification, identification, protocols
curves.json          the same with their curves and histograms, a list, for `partial-fc report`
pictures.json        the hardest pairs and the nearest classes, as pictures
plots/  report.html  to look at
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate.utils import LoggerType

from partial_fc import Checkpointer
from partial_fc.training.data import what_changed
from partial_fc.training.errors import UserError, check_at_least

CONFIG, HISTORY, UNREADABLE, METRICS = "config.yaml", "history.jsonl", "unreadable.txt", "metrics.json"
CURVES, DATA, PLOTS = "curves.json", "data.json", "plots"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # what file systems without hard links say


@dataclass
class OutputConfig:
    """Where results go."""

    folder: str = "runs/run"
    """Run folder to make; it must not be in use."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers of Accelerate to log to, by name."""
    log_every: int = 10
    """Optimizer steps between two logged points."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        check_at_least("output.log_every", self.log_every, 1)
        known = [str(each) for each in LoggerType]
        unknown = [name for name in self.trackers if name not in known]
        if unknown:
            raise UserError(f"--output.trackers names {', '.join(unknown)}; choose among {', '.join(known)}")


class RunFolder:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._noted: set[str] = set()

    def check_free(self) -> None:
        """UserError unless a new run may be started here; changes nothing."""
        try:
            if self.path.exists() and (
                not self.path.is_dir() or any(not _left_by_claim(each) for each in self.path.iterdir())
            ):
                raise UserError(
                    f"{self.path} is in use; choose another --output.folder, or go on with the run in it: --resume {self.path}"
                )
            check_can_be_made(self.path, f"the run folder {self.path}")
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {error.strerror}") from error

    def claim(self, save_config: Callable[[Path], None]) -> None:
        """Make the folder for a new run, its settings written by `save_config(path)`; UserError if another run has it.

        The settings appear whole and last: a process killed before leaves no run, one killed after leaves one that can be resumed.
        """
        self.check_free()
        try:
            (self.path / PLOTS).mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".{CONFIG}.{os.getpid()}.tmp"
            save_config(temporary)
            try:
                os.link(temporary, self.path / CONFIG)  # of two runs that start together, one gets here first
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                with (self.path / CONFIG).open("x") as file:
                    file.write(temporary.read_text())
            temporary.unlink()
        except FileExistsError:
            raise UserError(
                f"{self.path} is in use by another run that started now; choose another --output.folder"
            ) from None
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be made: {error.strerror}") from error

    def check_run(self) -> None:
        """UserError unless a run was started here."""
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path} is no run folder (it has no {CONFIG}); give the folder of a run")

    def check_data(self, now: dict[str, dict[str, Any]]) -> None:
        """Note the data sets' fingerprint, or UserError, saying what has changed, if one is noted that differs."""
        path = self.path / DATA
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            return
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); remove it to go on with the data as they are") from error
        if changed := what_changed(before, now):
            raise UserError(
                f"the data have changed since the run began: {changed}; put them back, start a new run, or remove {path} to go on with "
                "the data as they are"
            )

    def note_place(self, data_folder: str | None) -> None:
        """The data are there now: commands that look at the run later find them."""
        path = self.path / CONFIG
        settings = yaml.safe_load(path.read_text())
        if settings["data"]["folder"] != data_folder:
            settings["data"]["folder"] = data_folder
            temporary = path.with_suffix(".tmp")
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False))
            os.replace(temporary, path)

    def checkpointer(
        self,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        asynchronous: bool = False,
        best: Literal["max", "min"] = "max",
        timeout: float | None = None,
    ) -> Checkpointer:
        """The checkpoints of the run, to save and load by. timeout: seconds, of an asynchronous save."""
        return Checkpointer(
            self.path / "checkpoints",
            keep_last=keep_last,
            keep_best=keep_best,
            asynchronous=asynchronous,
            best=best,
            timeout=timeout,
        )

    def find_checkpoint(self, which: str = "newest", best: Literal["max", "min"] = "max") -> Path:
        """A complete checkpoint: the "newest", the "best" by its figure, or that of a step. UserError if there is none."""
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
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"there is no checkpoint {which!r} in {self.path}; give newest, best, or one of the steps there are: {have}"
            )
        return checkpointer.path(int(which))

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is any."""
        return self.checkpointer().latest()

    def append_history(self, row: dict[str, float]) -> None:
        with (self.path / HISTORY).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def history(self, up_to_step: int | None = None) -> list[dict[str, float]]:
        """What was logged, a row each; a last line that a crash or a full disk cut short is passed over."""
        path = self.path / HISTORY
        try:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            return [row for row in rows if up_to_step is None or row["step"] <= up_to_step]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {error}; mend it, or move it away") from error

    def rewind_history(self, step: int) -> int:
        """Forget what was logged after `step`: a resumed run logs it again. How many steps the last row was after it."""
        rows = self.history()
        temporary = self.path / f"{HISTORY}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        os.replace(temporary, self.path / HISTORY)
        return max(0, int(rows[-1]["step"]) - step) if rows else 0

    def note_unreadable(self, names: list[str]) -> None:
        """Add images that could not be read; ranks append to one file, and an epoch meets an image again."""
        new = [name for name in dict.fromkeys(names) if name not in self._noted]
        if new:
            self._noted.update(new)
            with (self.path / UNREADABLE).open("a") as file:
                file.writelines(f"{name}\n" for name in new)

    def tell_unreadable(self) -> None:
        """A line on standard output, if there were any."""
        found = self.unreadable()
        if found:
            print(
                f"{len(found)} images could not be read and were left out; they are named in {self.path / UNREADABLE}"
            )

    def unreadable(self) -> set[str]:
        """All images that could not be read so far."""
        path = self.path / UNREADABLE
        return set(path.read_text().splitlines()) if path.exists() else set()

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        (self.path / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")

    def write_curves(self, evaluations: list[dict[str, Any]]) -> None:
        (self.path / CURVES).write_text(json.dumps(evaluations) + "\n")


def describe_checkpoint(asked: str, found: Path) -> str:
    """What `find_checkpoint(asked)` has found, for the record: "best (step 8)"."""
    step = int(found.name.removeprefix("step-"))
    return f"step {step}" if asked.isdigit() else f"{asked} (step {step})"


def check_can_be_made(path: Path, what: str) -> None:
    """UserError unless the file or folder `path`, and folders above it that are missing, can be made; OSError of looking for them."""
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{what} cannot be made: {above} is not a folder that can be written to")


def check_new_file(path: Path, setting: str, endings: Sequence[str] = ()) -> None:
    """UserError unless `path`, of a setting, has one of the endings and can be written (over); folders above it may be missing."""
    if endings and path.suffix not in endings:
        raise UserError(f"{setting} {path}: give the name of a file that ends with {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{setting} {path} is a folder; give the name of a file")
    try:
        check_can_be_made(path.absolute().parent, f"{setting} {path}")
    except OSError as error:
        raise UserError(f"{setting} {path} cannot be made: {error.strerror}") from error


def _left_by_claim(path: Path) -> bool:
    """Whether this is what a process that was killed while it took the folder has left: nothing of a run."""
    if path.name == PLOTS:
        return path.is_dir() and not any(path.iterdir())
    of_data = path.name == DATA or (path.name.startswith("labels") and path.suffix == ".csv")
    return of_data or (path.name.startswith(f".{CONFIG}.") and path.name.endswith(".tmp"))
