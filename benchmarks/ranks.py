"""Ranks for a measurement: gloo processes on the loopback with one thread each, new ones for every call.

    run_ranks(2, function, *arguments)      # [function(*arguments) on rank 0, on rank 1]; function importable at top
                                            level

Within a rank, `interleaved` times several things in turn, A B, B A, A B, ..., so that drift of the machine meets all of
them alike, and `profile` says which torch operations a thing consists of. Ranks are forked off a server that has
imported torch and done nothing else, so starting them is quick and each begins with nothing allocated.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.tensor.parallel", "torch.nn.parallel", "partial_fc"]


def _serve(
    rank: int,
    world: int,
    store: str,
    pipe: Connection,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    try:
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
        )
        result = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _leave_with_parent() -> None:
    """A rank does not outlive a command that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 1200.0,
    start: Literal["forkserver", "spawn"] = "forkserver",
    backend: str = "gloo",
) -> list[Any]:
    """What `function(*arguments)` returned on each of `world` ranks; RuntimeError with the traceback of the first rank
    that failed. start: "spawn" where ranks use CUDA, which the server may have touched by what it has imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world, os.path.join(folder, "store"), there, backend, function, arguments),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [p for rank, p in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"no answer in time from ranks {sorted(set(range(len(pipes))) - set(results))}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            fine, result = False, f"rank {rank} died"
            with contextlib.suppress(EOFError, OSError):
                fine, result = pipes[rank].recv()
            if not fine:
                raise RuntimeError(result)
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


@dataclass
class Times:
    """Seconds of each repetition: `wall` of the slowest rank, `cpu` of the processors over all ranks."""

    wall: list[float]
    cpu: list[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)


def interleaved(
    things: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 2
) -> dict[str, list[tuple[float, float]]]:
    """(wall, cpu) seconds of every repetition of every thing on this rank; the ranks meet at a barrier before each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in things}
    for i in range(-warm_up, repetitions):
        for name in list(things) if i % 2 == 0 else reversed(things):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            things[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i >= 0:
                taken[name].append((wall, cpu))
            elif i == -1 and dist.get_rank() == 0:
                print(f"  {name}: {wall:.3f} s, {repetitions} times", file=sys.stderr, flush=True)
    return taken


def over_ranks(taken: list[dict[str, list[tuple[float, float]]]]) -> dict[str, Times]:
    """What `interleaved` returned on each rank, as one figure a repetition."""
    times = {}
    for name in taken[0]:
        each = list(zip(*(rank[name] for rank in taken), strict=True))
        times[name] = Times(
            [max(wall for wall, _ in ranks) for ranks in each], [sum(cpu for _, cpu in ranks) for ranks in each]
        )
    return times


def ratio(a: list[float], b: list[float]) -> float:
    """Median over repetitions of `a / b`, neighbours in time."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def profile(thing: Callable[[], Any], steps: int = 3, memory: bool = False) -> list[dict[str, Any]]:
    """The operations of a thing, largest first: own milliseconds a step, calls a step, bytes allocated and not freed by
    itself."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=memory, acc_events=True) as profiler:
        for _ in range(steps):
            thing()
    rows = [
        {
            "op": e.key,
            "ms": e.self_cpu_time_total / 1e3 / steps,
            "calls": e.count / steps,
            "bytes": e.self_cpu_memory_usage / steps,
        }
        for e in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["bytes" if memory else "ms"])[:12]
