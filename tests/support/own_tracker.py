"""A tracker of one's own: it writes all that it is told into a file, a JSON list a line, and fails where it is asked to.

--output.own_tracker own_tracker.Recorded --output.own_tracker.file FILE --output.own_tracker.fails start
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class Recorded(GeneralTracker):
    """fails: "start", "log" from step 3 on, "hang" in the log of step 3, "" for never."""

    name = "recorded"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str, file: str = "", fails: str = ""):
        super().__init__()
        self.project = run_name
        self.folder = logging_dir
        self.file = Path(file)
        self.fails = fails
        self.run = f"run-{os.getpid()}"
        self.link = {"run": self.run}

    @property
    def tracker(self) -> str:
        return self.run

    def note(self, *what: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([*what]) + "\n")

    def resume(self, link: dict[str, str]) -> None:
        self.run = link["run"]
        self.link = link

    def start(self) -> None:
        if self.fails == "start":
            raise ConnectionError(f"http://me:hush@server:5000 refuses {os.environ.get('OWN_API_KEY')}")
        self.note("start", self.run, self.project, os.environ.get("RANK", "0"))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.note("settings", values)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if self.fails == "log" and step >= 3:
            raise ConnectionError("the server is gone")
        if self.fails == "hang" and step == 3:
            threading.Event().wait()  # for ever
        self.note("row", step, values)

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.note("images", step, {name: [image.size for image in images] for name, images in values.items()})

    def log_artifact(self, path: str) -> None:
        self.note("artifact", path)

    def finish(self) -> None:
        self.note("finish")
