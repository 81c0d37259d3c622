"""Who this process is among the ranks of a run: found, and looked over, before anything else.

started by                        is said in                                     what is done here
torchrun, accelerate, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR ...  nothing but checks
mpirun                            OMPI_COMM_WORLD_SIZE or PMI_SIZE               `partial_fc.engines.mpi` asks MPI
srun                              SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID      the first host of the step becomes the master
by hand                           nothing                                        one process

Afterwards torch's rank variables are set, where Accelerate and every other engine looks for them. What can only be seen on one rank (a
variable that another launcher set, GPUs that are missing on a node) is exchanged over the master's store, before any engine starts, and
refused on all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from partial_fc.engines import mpi
from partial_fc.training.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
WAIT = timedelta(seconds=300)  # for the slowest rank to start

# rank 0's server must live on: the process group that is built next, at the same port, joins it
_stores: list[dist.Store] = []
_parent = os.getppid()


def find_ranks() -> None:
    """Set torch's rank variables from the launcher, whichever it is; UserError, the same on every rank, if what is set makes no sense."""
    if dist.is_initialized():
        return
    launcher, problem = _launcher(), None
    if launcher == "mpirun":
        _from_mpi()
    elif launcher == "srun":
        problem = _from_slurm()
    given = _given()
    if "WORLD_SIZE" in given and given["WORLD_SIZE"] > 1 and problem is None:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; start with a launcher (docs/launching.md), or unset WORLD_SIZE"
            )
    _check_range(given)
    if given.get("WORLD_SIZE", 1) > 1:
        same = _exchange("ranks", {"problem": problem, "world": given["WORLD_SIZE"]})
        worlds = [each["world"] for each in same]
        problem = next((str(each["problem"]) for each in same if each["problem"] is not None), None)
        if problem is None and len(set(worlds)) > 1:
            problem = f"WORLD_SIZE is {worlds[0]} on rank 0 and another on rank {next(r for r, w in enumerate(worlds) if w != worlds[0])}"
    if problem is not None:
        raise UserError(problem)


def check_devices(cpu: bool) -> None:
    """UserError on every rank unless each has a GPU of its own, or none has any; `cpu`: the run does not want them."""
    if cpu or dist.is_initialized() or "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    each = _exchange("devices", {"gpus": gpus, "local_rank": int(os.environ["LOCAL_RANK"])})
    if not any(rank["gpus"] for rank in each):
        return
    for rank, seen in enumerate(each):
        if not seen["gpus"]:
            other = next(r for r, rest in enumerate(each) if rest["gpus"])
            raise UserError(
                f"mixed devices: rank {rank} sees no GPU, and rank {other} does; mend its driver or CUDA_VISIBLE_DEVICES, or train with "
                "--train.cpu true"
            )
        if seen["local_rank"] >= seen["gpus"]:
            raise UserError(
                f"LOCAL_RANK is {seen['local_rank']} on rank {rank}, which sees {seen['gpus']} GPU{'s' * (seen['gpus'] > 1)}; start as "
                "many processes a node as it has GPUs, and let each see all of them (Slurm: --gpus-per-node, not --gpus-per-task)"
            )


def launcher_is_gone() -> bool:
    """Whether torchrun, accelerate or deepspeed started this rank and has ended before it: nobody is left to stop the rank if need be."""
    return ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ) and os.getppid() != _parent


def speaks() -> bool:
    """Whether this process is the one to show an error: rank 0, or one whose rank variables do not say which it is."""
    launcher = _launcher()
    names = MPI_RANKS if launcher == "mpirun" else ("SLURM_PROCID",) if launcher == "srun" else ("RANK",)
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    world = os.environ.get("WORLD_SIZE", "1") if launcher is None else None
    if not text.isdecimal() or (world is not None and not world.isdecimal()):
        return True
    return int(text) == 0 or (world is not None and int(text) >= int(world))


# ---------------------------------------------------------------------------------------------------- launchers


def _launcher() -> str | None:
    """ "mpirun" or "srun" where it started this very process as one of several; what it started in turn (torchrun) has set them all."""
    e = os.environ
    if "TORCHELASTIC_RUN_ID" in e or "CROSS_SIZE" in e:  # torchrun and accelerate; deepspeed
        return None
    # only within a step: a batch script has SLURM_PROCID too, and is one process
    step = "SLURM_STEP_ID" in e and "SLURM_PROCID" in e
    size = e.get("OMPI_COMM_WORLD_SIZE", e.get("PMI_SIZE"))
    if size is not None and not (
        step and "OMPI_COMM_WORLD_SIZE" not in e and size == _slurm("NTASKS")
    ):  # srun --mpi=pmi2 sets PMI_SIZE
        return "mpirun" if size != "1" else None
    return "srun" if step and _slurm("NTASKS") != "1" else None


def _from_mpi() -> None:
    if "RANK" in os.environ and find_spec("mpi4py") is None:  # set from MPI's own variables, as some scripts do
        found = {"RANK": next(int(os.environ[n]) for n in MPI_RANKS if n in os.environ)}
        found["WORLD_SIZE"] = next(int(os.environ[n]) for n in mpi.SIZES if n in os.environ)
        problem = mpi.contradiction(found, os.environ, "mpirun")
        if problem is not None:
            raise UserError(problem)
        return
    try:
        mpi.set_rank_variables()
    except RuntimeError as error:
        raise UserError(str(error)) from error


def _from_slurm() -> str | None:
    """Set the rank variables to Slurm's; what is wrong where they were set already, to something else."""
    numbers = {"RANK": _slurm("PROCID"), "WORLD_SIZE": _slurm("NTASKS"), "LOCAL_RANK": _slurm("LOCALID")}
    for name, text in numbers.items():
        if text is None or not text.isdecimal():
            raise UserError(
                f"srun started this process, but its variable for {name} is {text!r}; SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID must be set"
            )
    found = {name: int(text) for name, text in numbers.items() if text is not None}
    tasks = _tasks_of_node()
    if tasks is not None:
        found["LOCAL_WORLD_SIZE"] = tasks
    problem = mpi.contradiction(found, os.environ, "Slurm")
    os.environ.update({name: str(value) for name, value in found.items()})
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host()
    if "MASTER_PORT" not in os.environ:  # all tasks must know it, and steps that share a node must differ
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ["MASTER_PORT"] = str(10_000 + (31 * job + step) % 20_000)
    return problem


def _slurm(name: str) -> str | None:
    """A variable of the step, or else of the job."""
    step = {
        "NTASKS": "SLURM_STEP_NUM_TASKS",
        "NODELIST": "SLURM_STEP_NODELIST",
        "TASKS_PER_NODE": "SLURM_STEP_TASKS_PER_NODE",
    }.get(name, "")
    job = {"NODELIST": "SLURM_JOB_NODELIST"}.get(name, f"SLURM_{name}")
    return os.environ.get(step, os.environ.get(job))


def _tasks_of_node() -> int | None:
    """Tasks of this step on this node, of "8(x2),4": eight on each of two nodes, four on a third."""
    node, text = os.environ.get("SLURM_NODEID", ""), _slurm("TASKS_PER_NODE") or ""
    counts = [
        int(found[1])
        for part in text.split(",")
        if (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part))
        for _ in range(int(found[2] or 1))
    ]
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _first_host() -> str:
    hosts = _slurm("NODELIST")
    if hosts and not re.search(r"[\[,]", hosts):
        return hosts
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", *([hosts] if hosts else [])], capture_output=True, text=True, check=True
        )
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"the first host of Slurm's node list {hosts!r} is not known (`scontrol show hostnames` failed); set MASTER_ADDR"
        ) from error


# ---------------------------------------------------------------------------------------------------- checks


def _given() -> dict[str, int]:
    given = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    for name, text in given.items():
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}; it must be a number of at least 0, as launchers set it")
    return {name: int(text) for name, text in given.items()}


def _check_range(given: Mapping[str, int]) -> None:
    if "RANK" in given and "WORLD_SIZE" not in given:
        raise UserError(
            f"RANK is {given['RANK']}, but WORLD_SIZE is not set; start with a launcher (docs/launching.md), or unset RANK"
        )
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")):
        if part in given and whole in given and given[part] >= given[whole]:
            raise UserError(
                f"{part} is {given[part]}, but {whole} is {given[whole]}; ranks count from 0, so {part} must be below {whole}"
            )
    if given.get("LOCAL_WORLD_SIZE", 1) > given.get("WORLD_SIZE", 1 << 62):
        raise UserError(
            f"LOCAL_WORLD_SIZE is {given['LOCAL_WORLD_SIZE']}, but WORLD_SIZE is {given['WORLD_SIZE']}; a node has no more than all ranks"
        )


def _exchange(what: str, value: dict[str, object]) -> list[dict[str, int]]:
    """What every rank said, in the order of ranks, over the store that the process group will be built with."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        if not _stores:
            _stores.append(next(iter(dist.rendezvous("env://", rank, world, timeout=WAIT)))[0])
        return _through(
            _stores[0],
            f"partial_fc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{what}",
            json.dumps(value),
            rank,
            world,
        )
    except (
        RuntimeError,
        ValueError,
    ) as error:  # what stores raise; also for a port that is taken and a host that is not known
        raise UserError(
            f"rank {rank} of {world} cannot reach the others through {where} (MASTER_ADDR, MASTER_PORT): {error}"
        ) from error


def _through(store: dist.Store, key: str, value: str, rank: int, world: int) -> list[dict[str, int]]:
    store.set(f"{key}/{rank}", value)
    if rank == 0:
        store.set(key, json.dumps([json.loads(store.get(f"{key}/{other}")) for other in range(world)]))
        store.wait([f"{key}/{other}/read" for other in range(1, world)])  # the server ends with rank 0
    everyone: list[dict[str, int]] = json.loads(store.get(key))
    store.set(f"{key}/{rank}/read", "")
    return everyone
