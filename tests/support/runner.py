"""Runs test functions on several ranks: gloo processes on the loopback, started once a world size and used by all
tests.

    ranks = Ranks(3); results = ranks.run(function, *arguments)     # function(rank, world, *arguments), importable at
    top level

Every case has a time limit. When a rank fails, its traceback is raised here and the ranks are started anew for the next
case. So they are when cases have left many process groups behind, whose threads wake a hundred times a second.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def seed(number: int) -> None:
    """Of every generator that tests may draw from without a word."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


Join = Callable[[int, int, str], None]  # (rank, world, path of a store): makes the process group


def join_gloo(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def _serve(rank: int, world: int, store: str, pipe: Connection, join: Join) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="29599"
    )
    torch.set_num_threads(1)
    join(rank, world, store)
    gc.freeze()  # what is imported stays: each collection would walk over all of it
    pipe.send((True, "ready"))
    environment = dict(os.environ)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        function, arguments = task
        os.environ.clear()  # engines set variables, which the next test is not to find
        os.environ.update(environment)
        seed(1000 + rank)  # ranks have different global random states, as in life
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def forking() -> ForkServerContext:
    """Processes that begin with all imported that takes seconds: forks of one server, which has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    application = ["partial_fc.training.cli.main", "partial_fc.training.trainer", "partial_fc.training.report.plots"]
    # beside torch alone the core's tests run as well (.ci/versions.py), where the application would end the server
    context.set_forkserver_preload(application if importlib.util.find_spec("jsonargparse") else ["partial_fc"])
    return context


START_SECONDS = 150.0
MOST_THREADS = 64  # of a rank: a group of gloo has three


def _threads(process: int) -> int:
    """How many it has; none where the system does not tell."""
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:
        return 0


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


class Ranks:
    def __init__(self, world: int, join: Join = join_gloo) -> None:
        self.world = world
        self.join = join
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """What `function(rank, world, *arguments)` returned on each rank."""
        if self.processes and _threads(self.processes[0].pid) > MOST_THREADS:
            self.stop(kill=True)
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return self._wait(time.monotonic() + timeout, function.__name__)

    def _wait(self, deadline: float, what: str) -> list[Any]:
        """What each rank answers until then."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world:
            self._collect(answers)
            failed = {rank: text for rank, (fine, text) in answers.items() if not fine}
            if failed and time.monotonic() < deadline - 2:
                # let the others say what they saw, but do not wait for those in a collective
                deadline = time.monotonic() + 2
            if time.monotonic() > deadline:
                break
        failed = {rank: text for rank, (fine, text) in answers.items() if not fine}
        if failed or len(answers) < self.world:
            silent = sorted(set(range(self.world)) - set(answers))
            self.stop(kill=True)
            report = "".join(f"\n--- rank {rank} of {self.world} ---\n{text}" for rank, text in sorted(failed.items()))
            raise RankFailure(f"{what}: {report}" + (f"\nno answer from ranks {silent}" if silent else ""))
        return [answers[rank][1] for rank in range(self.world)]

    def _collect(self, answers: dict[int, tuple[bool, Any]]) -> None:
        for rank, pipe in enumerate(self.pipes):
            if rank in answers:
                continue
            try:
                if pipe.poll(0.01):
                    answers[rank] = pipe.recv()
            except (EOFError, OSError):
                answers[rank] = (False, f"the process died with exit code {self.processes[rank].exitcode}")

    def _start(self) -> None:
        context = forking()
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, there, self.join), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        # starting Python takes its time on a busy machine, which is no part of a case's
        self._wait(time.monotonic() + START_SECONDS, "the start of the ranks")

    def stop(self, kill: bool = False) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None) if not kill else process.kill()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        for pipe in self.pipes:
            pipe.close()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.pipes = [], []
