"""Ranks that `mpirun` started: MPI says who is who, torch's own backend (gloo, NCCL) moves the tensors.

    mpirun -n 16 python train.py          from partial_fc.engines import mpi; mpi.init_process_group()

rank, world       of MPI.COMM_WORLD
local rank        of the part of it that shares memory: Split_type(COMM_TYPE_SHARED)
master            rank 0's host (127.0.0.1 where all ranks are on one) and a free port of it, broadcast; MASTER_ADDR, MASTER_PORT go before

They become RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. MPI has nothing more to do then: unless the
caller had started it, it is finalised, so that a rank that fails later leaves without waiting for the others.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

SIZES = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)  # what Open MPI, and MPICH and those like it, tell the processes that they start
MISSING = (
    "mpi4py is needed under mpirun: pip install 'partial_fc[mpi]'; it must find the library of the MPI whose mpirun this is "
    "(to build it for that one: pip install --no-binary mpi4py mpi4py)"
)


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """`torch.distributed.init_process_group` of the ranks that mpirun started; backend: NCCL where there are GPUs, else gloo, if not given.

    Raises RuntimeError on every rank as `set_rank_variables` does.
    """
    set_rank_variables()
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"), **options)


def set_rank_variables() -> None:
    """Set torch's rank variables to what MPI says.

    RuntimeError, the same on every rank: mpi4py is missing or finds no library; it belongs to another MPI than mpirun, so that every
    process is alone; a rank variable that is set already says something else.
    """
    started = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels look for an MPI library when they are imported
        raise RuntimeError(f"{MISSING} ({error})") from error
    if started and MPI.Is_finalized():
        raise RuntimeError("MPI was finalised before the ranks were asked for; call set_rank_variables earlier")
    everyone = MPI.COMM_WORLD
    rank, world = everyone.Get_rank(), everyone.Get_size()
    asked = next((int(os.environ[name]) for name in SIZES if name in os.environ), world)
    if world != asked:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"mpirun started {asked} processes, but MPI sees a world of {world}: mpi4py uses another MPI ({library}) than this mpirun; "
            "use the mpirun of that one, or install mpi4py for this one"
        )
    neighbours = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    local = {"LOCAL_RANK": neighbours.Get_rank(), "LOCAL_WORLD_SIZE": neighbours.Get_size()}
    neighbours.Free()
    host, port = everyone.bcast(_master(local["LOCAL_WORLD_SIZE"] == world) if rank == 0 else None)
    found = {"RANK": rank, "WORLD_SIZE": world, **local}
    problems = everyone.allgather(contradiction(found, os.environ, "MPI"))
    if not started:
        MPI.Finalize()
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise RuntimeError(problem)
    os.environ.update({name: str(value) for name, value in found.items()})
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def contradiction(found: Mapping[str, int], given: Mapping[str, str], source: str) -> str | None:
    """What is wrong where a variable of `given` is not what `source` found; None if they agree."""
    for name, value in found.items():
        if name in given and given[name] != str(value):
            return f"{name} is set to {given[name]}, and {source} says {value} (rank {found['RANK']} of {found['WORLD_SIZE']}); unset {name}"
    return None


def _master(one_node: bool) -> tuple[str, int]:
    """Where rank 0 will listen: a name that the other nodes resolve, as an address that this host gives itself may be its loopback."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return "127.0.0.1" if one_node else socket.gethostname(), probe.getsockname()[1]
