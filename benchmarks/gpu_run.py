"""One run of `gpu.py`: cases one after another, what each found, and the time that is left.

    run = Run(...); run.begin("proof", until=0.2)
    run.measure("ArcFace, kept", function)      # calls function() -> Outcome, prints it, writes results.json

A case that raises is noted with its traceback, and the next one runs. A case for which no time is left is noted by its
name. results.json is written after every case, so that a run that is killed leaves what it has, and one that goes on in
a new process (gpu_watch.py) begins behind what is in it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_report import ERROR, FAIL, JUDGED, NO_TIME, PASS, REST, SKIPPED
from gpu_watch import LOST

from partial_fc.kernels import launch

__all__ = ["ERROR", "FAIL", "JUDGED", "NO_TIME", "PASS", "REST", "SKIPPED", "Outcome", "Run"]
MOST = {"cuda": 90.0, "cpu": 600.0}  # seconds of a case, what it compiles among them; then its process is killed


@dataclass
class Outcome:
    """verdict: PASS or FAIL in the parts that are judged, SKIPPED with a reason as text, or ""."""

    verdict: str = ""
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """device: where everything is measured. quick: sizes that say nothing. minutes: for all parts together."""

    device: torch.device
    quick: bool
    minutes: float
    out: Path
    tf32: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    part: str = ""
    began: float = field(default_factory=time.monotonic)
    until: float = 1.0

    def begin(self, part: str, until: float) -> None:
        """Begin a part, which may use the time up to this share of the minutes."""
        self.part, self.until = part, until
        print(f"{part} ({time.monotonic() - self.began:.0f} s since the start)", flush=True)

    def left(self) -> float:
        """Seconds that this part has left."""
        return self.began + 60 * self.minutes * self.until - time.monotonic()

    def go_on(self) -> None:
        """Take what an earlier process of this run has noted: its cases are not run again."""
        with contextlib.suppress(FileNotFoundError):
            self.rows = json.loads((self.out / "results.json").read_text())["rows"]

    def done(self, case: str) -> dict[str, Any] | None:
        """Return what was noted of a case of this part, None if it is still to be run."""
        return next((row for row in self.of(self.part) if row["case"] == case), None)

    def run_part(self, name: str, until: float, part: Callable[[Run], None]) -> None:
        """Run a part. What it raises itself, not one of its cases, is noted, and is the end of this part alone."""
        self.begin(name, until)
        if self.done(REST):
            return
        self.announce(REST, 60 * self.minutes)
        try:
            part(self)
        except Exception as error:
            self.note(REST, self.failed(error))
            self.leave_if_lost()

    def measure(
        self, case: str, function: Callable[[], Outcome], seconds: float = 0.0, most: float | None = None
    ) -> Outcome:
        """Call it, unless fewer than `seconds` are left. most: seconds after which it is given up."""
        row = self.done(case)
        if row is not None:
            return Outcome(row["verdict"], row["text"], row)
        if self.left() <= seconds:
            return self.note(case, Outcome(NO_TIME, f"{max(0.0, self.left()):.0f} s were left"))
        start, before = time.monotonic(), set(launch.failed)
        self.announce(case, MOST.get(self.device.type, 90.0) if most is None else most)
        try:
            found = function()
            self.synchronize()  # else a fault of the device would be that of the next case
        except Exception as error:
            found = self.failed(error)
        found.figures["took"] = time.monotonic() - start
        given_up = {name: why for name, why in launch.failed.items() if name not in before and name not in found.text}
        if given_up:  # plain PyTorch has taken its place, so the numbers do not show it
            found.figures["failed"] = given_up
            found.text += "".join(f"; the kernel {name} failed: {why}" for name, why in given_up.items())
        self.note(case, found)
        self.leave_if_lost()
        self.announce(REST, 60 * self.minutes)
        if self.part not in JUDGED:  # their cases are small, and many
            self.release()
        return found

    def failed(self, error: Exception) -> Outcome:
        words = (str(error).strip().splitlines() or [""])[-1]
        verdict = FAIL if self.part in JUDGED else ERROR
        trace = "".join(traceback.format_exception(error))
        return Outcome(verdict, f"{type(error).__name__}: {words}", {"traceback": trace})

    def announce(self, case: str, most: float) -> None:
        """Tell who watches which case begins, and after how many seconds it is to be given up."""
        beside = self.out / "now.json.new"
        beside.write_text(json.dumps({"part": self.part, "case": case, "until": time.monotonic() + most}))
        beside.replace(self.out / "now.json")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def leave_if_lost(self) -> None:
        """End this process if its device does not work any more: after an illegal access every call fails."""
        try:
            self.synchronize()
        except Exception:
            os._exit(LOST)

    def note(self, case: str, found: Outcome) -> Outcome:
        """Print and write what a case found."""
        self.rows.append(
            {"part": self.part, "case": case, "verdict": found.verdict, "text": found.text, **found.figures}
        )
        print("  " + "  ".join(word for word in (found.verdict, case, found.text) if word), flush=True)
        self.write()
        return found

    def write(self) -> None:
        results = {"machine": self.about, "quick": self.quick, "tf32": self.tf32, "rows": self.rows}
        beside = self.out / "results.json.new"
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(self.out / "results.json")

    @property
    def start(self) -> Literal["forkserver", "spawn"]:
        """How processes are started: anew where they use CUDA, which a server may have touched by what it imports."""
        return "spawn" if self.device.type == "cuda" else "forkserver"

    def of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part]

    def release(self) -> None:
        """Give memory back that the last case has left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
