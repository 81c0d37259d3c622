"""`gpu.py` runs its cases in a process of its own, which this one watches: the run comes to its end, and in time,
whatever a case does to the process or to the device.

    a case ends the process: a signal, or a fault of the device, after which nothing in the process works any more
    a case does not end: a kernel that waits for ever
                        ── noted as FAIL; a new process goes on behind it, in the time that is left
    the minutes are over, and GRACE seconds more: the process is killed

results.json says what is done. now.json has the part, the case and the time at which it is to be given up; in the end
that all is done.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_report
from gpu_report import ERROR, FAIL, JUDGED, NO_TIME

LOST = 70  # the exit status of a process whose device does not answer any more
GRACE = 20.0  # seconds after the minutes: a case may begin in their last second
ENDED = (0, 1, 2)  # nothing failed, something did, the arguments were wrong


def watch(command: Sequence[str], out: Path, ends: float) -> int:
    """Run a command until all its cases are done or `ends`, on the monotonic clock. Return the exit status."""
    for name in ("results.json", "now.json"):
        (out / name).unlink(missing_ok=True)
    while True:
        process = subprocess.Popen(command)
        try:
            why = _wait(process, out, ends + GRACE)
        finally:
            process.kill()
            process.wait()
        if not why:
            return process.returncode
        found = _read(out / "results.json")
        rows = found.setdefault("rows", [])
        now = _read(out / "now.json")
        (out / "now.json").unlink(missing_ok=True)
        over = time.monotonic() > ends
        named = {(row["part"], row["case"]) for row in rows}
        if now and (now["part"], now["case"]) not in named:  # else the case had been noted before its process ended
            verdict = NO_TIME if over and process.returncode == -signal.SIGKILL else FAIL
            verdict = ERROR if verdict == FAIL and now["part"] not in JUDGED else verdict
            rows.append({"part": now["part"], "case": now["case"], "verdict": verdict, "text": why})
            print(f"  {verdict}  {now['case']}  {why}", flush=True)
        if over or not now:
            return _finish(found, out, why)
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{why}: a new process goes on", flush=True)


def _wait(process: subprocess.Popen[bytes], out: Path, ends: float) -> str:
    """Wait for its end, or for the time at which it is to be killed. Return why it must not be believed, or ""."""
    while True:
        try:
            status = process.wait(0.2)
        except subprocess.TimeoutExpired:
            until = _read(out / "now.json").get("until", ends)
            if time.monotonic() > min(until, ends):
                return "no end in time: its process was killed"
            continue
        if status in ENDED and (_read(out / "now.json").get("ended") or not (out / "results.json").exists()):
            return ""
        if status == LOST:
            return "the device does not answer any more in this process"
        return f"its process ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"


def _finish(found: dict[str, Any], out: Path, why: str) -> int:
    """Write and print what there is."""
    rows, quick = found["rows"], bool(found.get("quick"))
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = gpu_report.table(rows, found.get("machine", {}), quick) + f"\nThe run was cut short: {why}.\n"
    (out / "table.md").write_text(text)
    (out / "plot.svg").write_text(gpu_report.plot(rows))
    print(f"\n{text}\n{', '.join(f'{part}: {verdict}' for part, verdict in gpu_report.verdicts(rows).items())}")
    return 1


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of this run has; nothing if it is not there, or just being written."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found
