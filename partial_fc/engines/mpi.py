"""Ranks started by `mpirun`: MPI provides the ranks, torch's own backend (gloo, NCCL) sends the tensors.

    mpirun -n 16 python train.py          from partial_fc.engines import mpi; mpi.init_process_group()

rank, world size    of MPI.COMM_WORLD
local rank          in the part of it that shares memory: Split_type(COMM_TYPE_SHARED)
master              rank 0's host (127.0.0.1 if all ranks are on it) and a free port of it, broadcast; MASTER_ADDR and
                    MASTER_PORT have priority

They are set as RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. MPI is not used after that.
It is finalised unless the caller had started it, so that a rank that fails later exits without waiting for the others.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from partial_fc.distributed.own_gpu import take_own_gpu

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by mpirun: Open MPI; MPICH and its relatives
MISSING = (
    "mpi4py is required under mpirun: pip install 'partial_fc[mpi]'; it must find the library of the MPI that mpirun "
    "belongs to (to build it for that one: pip install --no-binary mpi4py mpi4py)"
)


def init_process_group(backend: str | None = None, **options: Any) -> None:
    """Call `torch.distributed.init_process_group` for the ranks that mpirun started.

    The GPU of the local rank becomes the current one. backend: NCCL by default if there are GPUs, else gloo. Raises the
    errors of `set_rank_variables`.
    """
    set_rank_variables()
    take_own_gpu()
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"), **options)


def set_rank_variables() -> None:
    """Set torch's rank variables from MPI.

    Raises RuntimeError, the same on every rank, if mpi4py is missing or finds no library, if it belongs to another MPI
    than mpirun or srun has started several tasks without MPI (so that every process would be alone), or if a rank
    variable is set to another value.
    """
    started = "mpi4py.MPI" in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels look for an MPI library when they are imported
        raise RuntimeError(f"{MISSING} ({error})") from error
    if started and MPI.Is_finalized():
        raise RuntimeError("MPI was finalised before set_rank_variables was called; call it earlier")
    comm = MPI.COMM_WORLD
    rank, world = comm.Get_rank(), comm.Get_size()
    started_by_mpirun = next((int(os.environ[name]) for name in SIZES if name in os.environ), world)
    if world != started_by_mpirun:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"mpirun started {started_by_mpirun} processes, but MPI sees a world of {world}: "
            f"mpi4py uses another MPI ({library}) than this mpirun; "
            "use the mpirun of that one, or install mpi4py for this one"
        )
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if world == 1 and tasks != "1" and not any(name in os.environ for name in SIZES):
        raise RuntimeError(
            f"Slurm has {tasks} tasks, but MPI sees a world of 1, so that each would train alone: start torchrun by "
            "srun and call torch.distributed.init_process_group (launch/slurm_own_loop.sbatch), or start the tasks by "
            "mpirun, or by srun with your MPI's own --mpi"
        )
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local = {"LOCAL_RANK": node.Get_rank(), "LOCAL_WORLD_SIZE": node.Get_size()}
    node.Free()
    host, port = comm.bcast(_master(local["LOCAL_WORLD_SIZE"] == world) if rank == 0 else None)
    found = {"RANK": rank, "WORLD_SIZE": world, **local}
    problems = comm.allgather(contradiction(found, os.environ, "MPI"))
    if not started:
        MPI.Finalize()
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise RuntimeError(problem)
    os.environ.update({name: str(value) for name, value in found.items()})
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def contradiction(found: Mapping[str, int], given: Mapping[str, str], source: str) -> str | None:
    """Return a message if a variable of `given` has another value than `source` found; None if there is no mismatch."""
    for name, value in found.items():
        if name in given and given[name] != str(value):
            rank = f"rank {found['RANK']} of {found['WORLD_SIZE']}"
            return f"{name} is set to {given[name]}, and {source} says {value} ({rank}); unset {name}"
    return None


def _master(one_node: bool) -> tuple[str, int]:
    """Return the host name and a free port of this process, rank 0.

    A name and not an address, because a host may resolve its own name to its loopback address.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        return "127.0.0.1" if one_node else socket.gethostname(), probe.getsockname()[1]
