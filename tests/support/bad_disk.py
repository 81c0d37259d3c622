"""Calls in processes whose disk fails where and when it is told to (bad_disk.c says how).

    with BadDisk(folder) as disk:                                         compiles the library, starts a server with it
        outcome = disk.run("partial_fc.training.cli.main:main", ["embed", ...], rules=[Rule("write", "*/part-*", ENOSPC)])
        outcome = disk.run("module:function", "text", ranks=2, group=True, rules=[...])

The server has imported everything, and forks a process for each rank: a call costs what it does, not the start of
Python. A function is called with its arguments, in ranks with group=True inside a gloo group; what it returns is the
exit code (None is 0).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("bad_disk.c")
ROOT = Path(__file__).parents[2]
PRELOADED = (
    "torch._dynamo",  # seconds, which the first optimizer of a process would take
    "partial_fc.training.cli.main",
    "partial_fc.training.trainer",
    "partial_fc.training.report.plots",
    "partial_fc.training.report.training_plots",
    "accelerate",
    "torch.utils.tensorboard",
    "bad_disk_work",
)
PDEATHSIG = 1


@dataclass(frozen=True)
class Rule:
    """What happens to some calls. short: read or write at most so many bytes. delay: seconds. count: 0 for all."""

    calls: str
    path: str = "*"
    error: int = 0
    nth: int = 1
    count: int = 0
    short: int = -1
    delay: float = 0.0

    def text(self) -> str:
        numbers = (self.nth, self.count, self.error, self.short, int(1000 * self.delay))
        return "\t".join([self.calls, self.path, *map(str, numbers)])


@dataclass
class Outcome:
    """codes: of the ranks; None for one that had to be ended. texts: what they have written."""

    codes: list[int | None]
    texts: list[str]
    seconds: float
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def compiler() -> str | None:
    """The C compiler; None if there is none, or the machine has no LD_PRELOAD."""
    return shutil.which("cc") or shutil.which("gcc") if sys.platform == "linux" else None


def build(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "bad_disk.so"
    command = [
        compiler() or "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


class BadDisk:
    """A server with the library, and calls in forks of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        variables = {"LD_PRELOAD": str(build(folder)), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self._calls = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **variables, "PYTHONPATH": path},
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> BadDisk:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.kill()  # it holds nothing that must be written
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()

    def run(
        self,
        target: str,
        *arguments: Any,
        rules: Sequence[Rule] = (),
        ranks: int = 1,
        group: bool = False,
        seconds: float = 60.0,
        log: bool = False,
        variables: dict[str, str] | None = None,
    ) -> Outcome:
        """Call `target` ("module:function") on so many ranks; those that have not ended in time are killed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._calls += 1
        folder = Path(tempfile.mkdtemp(prefix=f"call-{self._calls}-", dir=self.folder))
        job = {
            "target": target,
            "arguments": arguments,
            "rules": "\n".join(rule.text() for rule in rules),
            "ranks": ranks,
            "group": group,
            "seconds": seconds,
            "folder": str(folder),
            "log": log,
            "variables": variables or {},
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise AssertionError(f"the server of bad disks has ended with code {self._server.wait(10)}")
        found = json.loads(answer)
        texts = [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(ranks)]
        calls = []
        if log:
            lines = [line for rank in range(ranks) for line in (folder / f"calls-{rank}").read_text().splitlines()]
            calls = [(line.split("\t")[0], line.split("\t")[1]) for line in lines]
        shutil.rmtree(folder)
        return Outcome(found["codes"], texts, found["seconds"], calls)


# ---------------------------------------------------------------------------------------------------- the server


def main() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        port = _free_port()
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                _rank(job, rank, port)
            pids.append(pid)
        codes = _wait(pids, began + job["seconds"])
        answers.write(json.dumps({"codes": codes, "seconds": time.monotonic() - began}) + "\n")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(pids: list[int], deadline: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)  # it does not outlive a server that was ended
        here = Path(job["folder"])
        file = os.open(here / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(job["variables"])
        code = _call(job, rank, port, here)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # an asynchronous save ends first
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _call(job: dict[str, Any], rank: int, port: int, here: Path) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if job["ranks"] > 1:
        world = job["ranks"]
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    if job["group"]:
        store = f"file://{here}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job["ranks"])
    module, name = job["target"].split(":")
    function = getattr(importlib.import_module(module), name)
    log = os.open(here / f"calls-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) if job["log"] else -1
    ctypes.CDLL(None).bad_disk(job["rules"].encode(), log)
    try:
        return int(function(*job["arguments"]) or 0)
    finally:
        ctypes.CDLL(None).bad_disk(b"", -1)


if __name__ == "__main__":
    main()
