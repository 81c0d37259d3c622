"""One run of `gpu.py`: cases one after another, what each found, and the time that is left.

    run = Run(...); run.begin("proof", until=0.2)
    run.measure("ArcFace, kept", function)      # calls function() -> Outcome, prints it, writes results.json

A case that raises is noted with its traceback, and the next one runs. A case for which no time is left is noted by its
name. results.json is written after every case, so that a run that is killed leaves what it has.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

PASS, FAIL, ERROR, SKIPPED, NO_TIME = "PASS", "FAIL", "error", "skipped", "no time"
JUDGED = ("proof", "waits", "two")  # parts that pass or fail; the others are measured


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

    def measure(self, case: str, function: Callable[[], Outcome], seconds: float = 0.0) -> Outcome:
        """Call it, unless fewer than `seconds` are left."""
        if self.left() <= seconds:
            return self.note(case, Outcome(NO_TIME, f"{max(0.0, self.left()):.0f} s were left"))
        start = time.monotonic()
        try:
            found = function()
        except Exception as error:
            words = (str(error).strip().splitlines() or [""])[-1]
            verdict = FAIL if self.part in JUDGED else ERROR
            found = Outcome(verdict, f"{type(error).__name__}: {words}", {"traceback": traceback.format_exc()})
        found.figures["took"] = time.monotonic() - start
        if self.part not in JUDGED:  # their cases are small, and many
            self.release()
        return self.note(case, found)

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
