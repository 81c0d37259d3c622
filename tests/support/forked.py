"""Ranks of the application without the seconds that a start of each takes: forked off one process that has imported
everything.

    process = fork("train", "configs/quickstart.yaml", ..., ranks=2)        like a launcher started with that command
    process = fork("examples/ddp.py", "2")                                  the same of a script
    code, out, err = finish(process)

What a rank does is what `torchrun -m partial_fc` lets it do; the launchers themselves are tested in test_launch.py,
test_crashes.py and test_readme.py. When a rank ends badly the others get SIGTERM, and the exit code is the first bad
one.
"""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from launched import ROOT, environment
from runner import forking, free_port

_GRACE = 15.0  # seconds for the other ranks once one has ended badly


def _rank(arguments: list[str], variables: dict[str, str], out: str, err: str) -> None:
    os.setsid()  # as launchers do: a signal to the tests is none to the ranks
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        from partial_fc.training.cli.main import main

        sys.exit(main(arguments))


class Forked:
    """Running ranks; `finish` waits for them."""

    def __init__(self, arguments: tuple[str, ...], ranks: int, more: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="forked-")
        self.paths = [Path(self.folder, name) for name in ("out", "err")]
        context, port = forking(), free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(ranks):
            names = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_PORT": port,
            }
            torchrun = {"MASTER_ADDR": "127.0.0.1", **{name: str(each) for name, each in names.items()}}
            if arguments[0].endswith(".py"):  # the application asks by this one whether its launcher still lives
                torchrun["TORCHELASTIC_RUN_ID"] = "forked"
            variables = environment(**torchrun, **more)
            process = context.Process(target=_rank, args=(list(arguments), variables, *map(str, self.paths)))
            process.start()
            self.processes.append(process)
        atexit.register(self.close)  # no daemons: those may not start processes that load images

    def poll(self) -> int | None:
        """The exit code, None while a rank runs; what an ended rank leaves others waiting for is ended here, too."""
        codes = [process.exitcode for process in self.processes]
        bad = next((code for code in codes if code), None)
        if bad is not None and None in codes:
            self.stop()
        return None if None in codes and bad is None else bad or 0

    def stop(self) -> None:
        """What a launcher does with the ranks that are left: SIGTERM, then SIGKILL."""
        for process in self.processes:
            process.join(1)
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """SIGKILL of all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)

    def close(self) -> None:
        """Nothing of it is left."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def output(self) -> tuple[str, str]:
        """What the ranks have written, to standard output and error."""
        return tuple(path.read_text() if path.exists() else "" for path in self.paths)  # type: ignore[return-value]


def fork(*arguments: str, ranks: int = 2, **more: str) -> Forked:
    """`partial-fc`, or a script of the project, with these arguments on so many ranks; `more` variables of the
    environment."""
    return Forked(arguments, ranks, more)


def finish(forked: Forked, timeout: float = 120) -> tuple[int, str, str]:
    """(exit code, output, errors)."""
    deadline = time.monotonic() + timeout
    while (code := forked.poll()) is None:
        if time.monotonic() > deadline:
            forked.kill()
            out, err = forked.output()
            raise AssertionError(f"no end within {timeout} s:\n{out[-2000:]}\n{err[-4000:]}")
        time.sleep(0.02)
    out, err = forked.output()
    forked.close()
    return code, out, err


def succeed(*arguments: str, ranks: int = 2, timeout: float = 120, **more: str) -> str:
    """What it has written; it must end well."""
    code, out, err = finish(fork(*arguments, ranks=ranks, **more), timeout)
    assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-6000:]}"
    return out + err
