"""The run folder: who may use it, what lies in it.

config.yaml          the resolved settings
data.json            what the data were when the run began: counts, digests, files
checkpoints/         step-000000120/ ..., the newest few
history.jsonl        a line every few steps: step, epoch, loss, target_angle (radians), learning_rate, ...
unreadable.txt       images that could not be read, if any
tensorboard/         or what other trackers write
metrics.json         verification and identification
plots/  report.html  to look at
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from partial_fc import Checkpointer
from partial_fc.training.data import what_changed
from partial_fc.training.errors import UserError

CONFIG, HISTORY, UNREADABLE, METRICS, DATA = "config.yaml", "history.jsonl", "unreadable.txt", "metrics.json", "data.json"


class RunFolder:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._noted: set[str] = set()

    def check_free(self) -> None:
        """UserError unless a new run may be started here; changes nothing."""
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path} is in use; choose another --output.folder, or go on with the run in it: --resume {self.path}")
            above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be used: {error.strerror}") from error
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"the run folder {self.path} cannot be made: {above} is not a folder that can be written to")

    def claim(self) -> None:
        """Make the folder for a new run; UserError if another run has it."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / CONFIG).open("x"):  # of two runs that start together, one gets here first
                pass
            (self.path / "plots").mkdir()
        except FileExistsError:
            raise UserError(f"{self.path} is in use by another run that started now; choose another --output.folder") from None
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

    def checkpointer(self, *, keep_last: int = 1, asynchronous: bool = False) -> Checkpointer:
        """The checkpoints of the run, to save and load by."""
        return Checkpointer(self.path / "checkpoints", keep_last=keep_last, asynchronous=asynchronous)

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is any."""
        return self.checkpointer().latest()

    def append_history(self, row: dict[str, float]) -> None:
        with (self.path / HISTORY).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def history(self, up_to_step: int | None = None) -> list[dict[str, float]]:
        path = self.path / HISTORY
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if up_to_step is None or row["step"] <= up_to_step]

    def rewind_history(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run logs it again."""
        rows = self.history(step)
        (self.path / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def note_unreadable(self, names: list[str]) -> None:
        """Add images that could not be read; ranks append to one file, and an epoch meets an image again."""
        new = [name for name in names if name not in self._noted]
        if new:
            self._noted.update(new)
            with (self.path / UNREADABLE).open("a") as file:
                file.writelines(f"{name}\n" for name in new)

    def unreadable(self) -> set[str]:
        """All images that could not be read so far."""
        path = self.path / UNREADABLE
        return set(path.read_text().splitlines()) if path.exists() else set()

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        (self.path / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
