"""What the soak (soak.py) starts, watches and breaks: a launcher with its ranks, the history of a run, a small disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MARK = "PARTIAL_FC_SOAK"  # in the environment of everything that a launch starts
ROOM = 256 << 10  # bytes that a full disk has left: enough for a line of the history, not for a checkpoint


class Launch:
    """A launcher as its user starts it, what it prints, and the processes that it has started."""

    def __init__(self, script: str, settings: list[str], environment: dict[str, str], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        own = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            [script, *settings],
            cwd=ROOT,
            env={**os.environ, **own, **environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.full = self.asked = False  # whether it has said that there is no room; that it was asked to stop
        self.lost = 0  # steps that it said are computed again
        self.lines: list[str] = []
        self._seen: set[int] = set()
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path) -> None:
        assert self.process.stdout is not None
        with log.open("a") as file:
            for line in self.process.stdout:
                if "it/s" in line or "step/s" in line or "batch/s" in line or not line.strip():
                    continue  # progress
                file.write(line)
                file.flush()
                self.lines.append(line)
                self.full |= "No space left" in line
                self.asked |= "partial-fc: stopped" in line
                again = re.search(r"(\d+) steps that were logged after it are computed again", line)
                self.lost += int(again[1]) if again else 0

    def code(self) -> int | None:
        """The launcher's exit code, when it has ended and all that it printed has been read."""
        code = self.process.poll()
        if code is not None:
            self._reader.join(10)
        return code

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that live, the launcher's children."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    rank = child.environ().get("RANK")
                    if rank is not None:
                        found[int(rank)] = child
        self._seen.update(child.pid for child in found.values())
        return found

    @property
    def restarts(self) -> int:
        """How often the launcher has started both ranks again."""
        return max(0, -(-len(self._seen) // 2) - 1)

    def left(self) -> list[psutil.Process]:
        """Processes that this launch has started, however indirectly, and that live."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def tail(self) -> str:
        return "".join(self.lines[-25:])


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it lived to get the signal."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


class Watch:
    """The history of a run as it grows and, when the run goes on from a checkpoint, shrinks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "history.jsonl"
        self.step, self.moved = 0, time.monotonic()
        self.seen: list[
            tuple[float, int, float]
        ] = []  # when, step, loss of every row, also of those that were computed again
        self._size = 0

    def look(self) -> None:
        """Read what is new."""
        try:
            size = self.path.stat().st_size
            if size == self._size:
                return
            self._size = size
            rows = self.rows()
        except (FileNotFoundError, json.JSONDecodeError):
            return
        step = rows[-1]["step"] if rows else 0
        new = [row for row in rows if row["step"] > self.step] if step > self.step else rows[-1:]
        now = time.monotonic()
        self.seen += [(now, int(row["step"]), row["loss"]) for row in new]
        self.step, self.moved = int(step), now

    def rows(self) -> list[dict[str, Any]]:
        """Without what is of the clock."""
        rows = [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key not in ("data_wait", "row_wait")} for row in rows]


class Disk:
    """A small file system of its own to be filled up, where this process may mount one; else an ordinary folder that
    never is full."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder, self.megabytes, self.real = folder, megabytes, False
        self._ballast = folder / "ballast"

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.path.ismount(self.folder):  # of a soak that was killed
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.folder)]
        with contextlib.suppress(FileNotFoundError):
            self.real = subprocess.run(mount, capture_output=True).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.real:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        self.folder.rmdir() if not any(self.folder.iterdir()) else None

    @property
    def filled(self) -> bool:
        return self._ballast.exists()

    def fill(self) -> None:
        """Leave ROOM, whatever the run writes meanwhile."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while (free := os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize) > ROOM:
                file.write(bytes(min(free - ROOM, 1 << 20)))

    def room(self) -> None:
        self._ballast.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
