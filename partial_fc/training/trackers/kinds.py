"""What each tracker needs beside Accelerate's class for it.

    kind.prepare()          before its package is imported; raises UserError where nobody is logged in
    kind.make(...)          Accelerate's GeneralTracker, not started: of a new tracked run, or of one that goes on
    kind.link(tracker)      what continues the tracked run after a restart, as texts
    kind.pictures, report   plots, and the page of the run
    kind.finish             closes the tracked run with the outcome that it had

A resumed run repeats steps. TensorBoard is told where the run goes on and drops what it has of later steps
(`repeats`). The others keep the rows that they have of repeated steps, which are not sent again.
"""

from __future__ import annotations

import importlib
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from partial_fc.training.errors import UserError
from partial_fc.training.trackers.secrets import without_secrets
from partial_fc.training.trackers.settings import OwnTracker

Outcome = Literal["FINISHED", "FAILED", "KILLED"]
Link = dict[str, str]
EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 75}  # the application's own


@dataclass
class Place:
    """Where a tracked run belongs."""

    folder: Path
    """Of the run."""
    project: str
    name: str
    """Of the run."""
    link: Link
    """Of the tracked run that goes on; empty for a new one."""
    step: int
    """After which the run goes on; 0 for a new one."""


class Kind:
    """A tracker that Accelerate knows by `name`."""

    name: str
    repeats = False
    """Whether it takes steps again that it has already."""

    def prepare(self) -> None:
        """Import the package, without what it would tell its makers; raise UserError where nobody is logged in."""

    def make(self, place: Place) -> GeneralTracker:
        """Return the tracker, not started."""
        return LOGGER_TYPE_TO_CLASS[self.name](place.project, **self.options(place))

    def options(self, place: Place) -> dict[str, Any]:
        """Return the arguments of Accelerate's class beside the project."""
        return {}

    def link(self, tracker: Any) -> Link:
        """Return the link of a tracker that has started."""
        return {}

    def row(self, row: Mapping[str, float]) -> dict[str, float]:
        """Return a row with the names that the tracker accepts."""
        return dict(row)

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run's settings, by dotted names, with values that the tracker accepts."""
        return {k: v if isinstance(v, int | float | str | bool | None) else str(v) for k, v in settings.items()}

    def configure(self, tracker: Any, settings: Mapping[str, Any]) -> None:
        """Send the run's settings, by dotted names, to a tracked run that is new."""
        tracker.store_init_configuration(self.settings(settings))

    def picture(self, tracker: Any, path: Path, step: int) -> None:
        """Send a PNG file."""
        tracker.log_images({f"{path.parent.name}/{path.stem}": [_image(path)]}, step=step)

    def report(self, tracker: Any, path: Path) -> None:
        """Send the page of the run, as an artifact."""

    def finish(self, tracker: Any, outcome: Outcome) -> None:
        """Close the tracked run."""
        tracker.finish()


class TensorBoard(Kind):
    """Event files in RUN/tensorboard, with the report beside them."""

    name = "tensorboard"
    repeats = True

    def make(self, place: Place) -> GeneralTracker:
        known = place.folder / self.name  # also of a run that has no trackers.json, or of a start that failed
        purge = {"purge_step": place.step + 1} if known.exists() else {}
        return LOGGER_TYPE_TO_CLASS[self.name](self.name, place.folder, **purge)

    def link(self, tracker: Any) -> Link:
        return {"folder": self.name}

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: "none" if v is None else v for k, v in super().settings(settings).items()}

    def configure(self, tracker: Any, settings: Mapping[str, Any]) -> None:
        # of the writer's own package, torch.utils.tensorboard or tensorboardX
        summary = importlib.import_module(f"{type(tracker.writer).__module__.rpartition('.')[0]}.summary")
        # Accelerate's way, add_hparams, makes a folder of its own, which TensorBoard shows as a second run
        for part in summary.hparams(self.settings(settings), {}):
            tracker.writer.file_writer.add_summary(part)
        tracker.writer.flush()

    def picture(self, tracker: Any, path: Path, step: int) -> None:
        import numpy as np

        name = f"{path.parent.name}/{path.stem}"
        tracker.log_images({name: np.asarray(_image(path))[None]}, step=step, dataformats="NHWC")

    def report(self, tracker: Any, path: Path) -> None:
        tracker.tracker.add_text("report", f"{path.name} is in the run folder {path.parent.name}")


class WeightsAndBiases(Kind):
    """A run of Weights & Biases: on its server, or with WANDB_MODE=offline in RUN/wandb."""

    name = "wandb"

    def prepare(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report errors of its own to its makers
        import wandb

        mode = wandb.setup().settings.mode
        if mode not in ("offline", "disabled", "dryrun") and not wandb.api.api_key:
            raise UserError("nobody is logged in: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")

    def options(self, place: Place) -> dict[str, Any]:
        new = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        return {
            "id": place.link.get("id", new),
            "name": place.name,
            "resume": "allow",
            "dir": str(place.folder.absolute()),
        }

    def link(self, tracker: Any) -> Link:
        run = tracker.tracker
        url = {} if run.settings.mode in ("offline", "disabled", "dryrun") else {"url": str(run.url)}
        return {"id": run.id, **url}

    def report(self, tracker: Any, path: Path) -> None:
        name = re.sub(r"[^\w.-]", "-", f"report-{tracker.tracker.id}")
        tracker.tracker.log_artifact(str(path), name=name, type="report")

    def finish(self, tracker: Any, outcome: Outcome) -> None:
        tracker.tracker.finish(exit_code=EXIT_CODES[outcome])


class MLflow(Kind):
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, or where MLflow keeps runs without one."""

    name = "mlflow"

    def prepare(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of its use
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with the password in it, if any
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its 7 take minutes, also at the start
        import mlflow  # noqa: F401

    def options(self, place: Place) -> dict[str, Any]:
        return {"run_id": place.link["run_id"]} if place.link else {"run_name": place.name}

    def link(self, tracker: Any) -> Link:
        import mlflow

        run, address = tracker.tracker.info, without_secrets(mlflow.get_tracking_uri())
        link = {"run_id": run.run_id, "tracking_uri": address}
        if address.startswith("http"):
            link["url"] = f"{address.rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
        return link

    def row(self, row: Mapping[str, float]) -> dict[str, float]:
        return {_accepted(name): value for name, value in row.items()}

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {_accepted(name): value for name, value in super().settings(settings).items()}

    def picture(self, tracker: Any, path: Path, step: int) -> None:
        tracker.log_artifact(str(path), path.parent.name)

    def report(self, tracker: Any, path: Path) -> None:
        tracker.log_artifact(str(path))

    def finish(self, tracker: Any, outcome: Outcome) -> None:
        import mlflow

        mlflow.end_run(outcome)


class Own(Kind):
    """A GeneralTracker of the user's. It may have `log_images`, `log_artifact`, `link` and `resume`."""

    def __init__(self, settings: OwnTracker) -> None:
        self.own = settings
        self.name = settings.name

    def make(self, place: Place) -> GeneralTracker:
        cls = self.own.load(self.own.class_path, "output.own_tracker")
        needs_folder = getattr(cls, "requires_logging_directory", False)
        first = (place.project, str(place.folder)) if needs_folder else (place.project,)
        tracker: Any = self.own.build("output.own_tracker", *first)
        if place.link and hasattr(tracker, "resume"):
            tracker.resume(dict(place.link))
        return tracker

    def link(self, tracker: Any) -> Link:
        return {name: without_secrets(str(value)) for name, value in (getattr(tracker, "link", None) or {}).items()}

    def picture(self, tracker: Any, path: Path, step: int) -> None:
        if hasattr(tracker, "log_images"):
            super().picture(tracker, path, step)

    def report(self, tracker: Any, path: Path) -> None:
        if hasattr(tracker, "log_artifact"):
            tracker.log_artifact(str(path))


KINDS = {kind.name: kind for kind in (TensorBoard, WeightsAndBiases, MLflow)}


def _accepted(name: str) -> str:
    """Return a name that MLflow accepts: tar_at_1e-3 for tar@1e-3."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


def _image(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
