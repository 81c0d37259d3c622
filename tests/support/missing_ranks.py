"""Ranks that stay away from a collective, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from runner import forking, free_port, seed

from partial_fc import RankMissing


def _serve(
    rank: int,
    world: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    seconds: float,
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    seed(1000 + rank)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=0.6 * seconds))
    try:
        pipe.send(function(rank, world, *arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
    with contextlib.suppress(EOFError):
        pipe.recv()  # until the test ends this process


def answers(
    world: int, function: Callable[..., Any], *arguments: Any, silent: tuple[int, ...] = (), seconds: float = 200.0
) -> dict[int, Any]:
    """What `function(rank, world, *arguments)` returned on each rank but the silent ones, in processes of their own.

    seconds: how long an answer may take, with the start of the ranks.
    """
    context, port = forking(), free_port()
    pipes, processes = [], []
    try:
        for rank in range(world):
            here, there = context.Pipe()
            processes.append(
                context.Process(
                    target=_serve, args=(rank, world, port, there, function, arguments, seconds), daemon=True
                )
            )
            processes[-1].start()
            there.close()
            pipes.append(here)
        found = {}
        for rank, pipe in enumerate(pipes):
            if rank not in silent:
                assert pipe.poll(seconds), f"no answer from rank {rank}"
                found[rank] = pipe.recv()
                assert not isinstance(found[rank], str), found[rank]  # a traceback
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def set_timeout(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """From now on: building and first steps take their time on a busy machine, which is no part of a case's."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # type: ignore[attr-defined]


def told(action: Callable[[], Any]) -> tuple[str, tuple[int, ...], str]:
    """(message, ranks, the class and text of the cause) of the RankMissing that it raises."""
    try:
        action()
    except RankMissing as error:
        return str(error), error.ranks, f"{type(error.__cause__).__name__}: {error.__cause__}"
    return "nothing was raised", (), ""
