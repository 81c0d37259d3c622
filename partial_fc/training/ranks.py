"""Which rank this process is: read from the launcher's variables, and checked, before anything else is done.

started by                        sets                                           done here
torchrun, accelerate, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR ...  checks only
mpirun                            OMPI_COMM_WORLD_SIZE or PMI_SIZE               `partial_fc.engines.mpi` asks MPI
srun                              SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID      the step's first host becomes master
by hand                           nothing                                        a single process

Afterwards torch's rank variables are set; Accelerate and the other engines read them. Some mistakes can only be seen
on one rank, such as a variable set by another launcher, or missing GPUs on a node. Ranks exchange them over the
master's store, before any engine starts, and every rank raises the same error.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from partial_fc.distributed.machines import ENDED, stat_of
from partial_fc.distributed.own_gpu import take_own_gpu
from partial_fc.distributed.store import machine_id
from partial_fc.engines import mpi
from partial_fc.training.errors import Preempted, UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHER = "PARTIAL_FC_LAUNCHER"  # set by launch/ and engines/torchrun.py: the process id of the launcher
VARIABLES = (
    "PARTIAL_FC_CACHE",
    "PARTIAL_FC_FAULTS",
    "PARTIAL_FC_KERNELS",
    LAUNCHER,
    "PARTIAL_FC_TOKEN",
    "PARTIAL_FC_TRUST",
)
MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
WAIT = timedelta(seconds=300)  # until the slowest rank has started

# Rank 0 runs the server. It must stay alive: the process group that is built next joins it at the same port.
_stores: list[dist.Store] = []
_parent = os.getppid()


def find_ranks() -> None:
    """Set torch's rank variables from those of the launcher.

    Raises UserError, the same on every rank, if the variables are missing or contradict each other, and Preempted if
    the launcher has exited meanwhile: nothing would stop this rank, and the next run would meet it at its port.
    """
    if dist.is_initialized():
        return
    if launcher_has_exited():
        raise Preempted("stopped before the start: its launcher has exited")
    launcher = _launcher()
    problem = None
    if launcher == "mpirun":
        _set_from_mpi()
    elif launcher == "srun":
        problem = _set_from_slurm()
    given = _read_variables()
    if "WORLD_SIZE" in given and given["WORLD_SIZE"] > 1 and problem is None:
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {given['WORLD_SIZE']}, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; start with a launcher (docs/launching.md), or unset "
                "WORLD_SIZE"
            )
    _check_range(given)
    problem = problem or _misspelled()
    if given.get("WORLD_SIZE", 1) > 1:
        ranks = _exchange("ranks", {"problem": problem, "world": given["WORLD_SIZE"]})
        worlds = [each["world"] for each in ranks]
        problem = next((str(each["problem"]) for each in ranks if each["problem"] is not None), None)
        if problem is None and len(set(worlds)) > 1:
            other = next(rank for rank, world in enumerate(worlds) if world != worlds[0])
            problem = f"WORLD_SIZE is {worlds[0]} on rank 0, but {worlds[other]} on rank {other}"
    if problem is not None:
        raise UserError(problem)


def check_devices(cpu: bool) -> None:
    """Make each rank's own GPU its current device. UserError on every rank unless each has one, or no rank has a GPU.

    cpu: the run uses the CPU, so that nothing is done.
    """
    if cpu or dist.is_initialized() or "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = _exchange("devices", {"gpus": gpus, "local_rank": int(os.environ["LOCAL_RANK"])})
    if not any(each["gpus"] for each in ranks):
        return
    for rank, each in enumerate(ranks):
        if not each["gpus"]:
            other = next(r for r, rest in enumerate(ranks) if rest["gpus"])
            raise UserError(
                f"mixed devices: rank {rank} sees no GPU, but rank {other} does; check its driver and "
                "CUDA_VISIBLE_DEVICES, or train with --train.cpu true"
            )
        if each["local_rank"] >= each["gpus"]:
            raise UserError(
                f"LOCAL_RANK is {each['local_rank']} on rank {rank}, which sees {each['gpus']} "
                f"GPU{'s' * (each['gpus'] > 1)}; start as many processes per node as it has GPUs, and let each see "
                "all of them (Slurm: --gpus-per-node, not --gpus-per-task)"
            )
    take_own_gpu()


def device_line(cpu: bool) -> str:
    """Return a line that says what this rank trains on. After `check_devices`.

    cpu: the settings ask for the CPU.
    """
    if cpu:
        return "training on the CPU, as --train.cpu says"
    if not torch.cuda.is_available():
        return f"no GPU found (torch {torch.__version__}): training on the CPU"
    number = torch.cuda.current_device()
    others = int(os.environ.get("WORLD_SIZE", "1")) - 1
    more = f", and {others} more rank{'s' * (others > 1)}" if others > 0 else ""
    return f"training on cuda:{number} ({torch.cuda.get_device_name(number)}){more}"


def launcher_has_exited() -> bool:
    """Return whether the launcher of this rank has exited: torchrun, accelerate or deepspeed, which would stop it.

    A rank that is started while its launcher is killed has never seen it as its parent: for this there is LAUNCHER.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "CROSS_SIZE" not in os.environ:
        return False
    number = os.environ.get(LAUNCHER, "")
    if os.getppid() != _parent:
        return True
    # without an id of the machine there is no /proc, which would tell
    return number.isdecimal() and machine_id() != "" and stat_of(int(number))[0] in ENDED


def shows_errors() -> bool:
    """Return whether this process prints errors: rank 0 does, and so does one whose rank variables are invalid."""
    launcher = _launcher()
    names = MPI_RANKS if launcher == "mpirun" else ("SLURM_PROCID",) if launcher == "srun" else ("RANK",)
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    world = os.environ.get("WORLD_SIZE", "1") if launcher is None else None
    if not text.isdecimal() or (world is not None and not world.isdecimal()):
        return True
    return int(text) == 0 or (world is not None and int(text) >= int(world))


# ---------------------------------------------------------------------------------------------------- launchers


def _launcher() -> str | None:
    """Return "mpirun" or "srun" if it has started this process as one of several, else None.

    None also if it has started a launcher (such as torchrun) that has started this process: that one sets all
    variables.
    """
    e = os.environ
    if "TORCHELASTIC_RUN_ID" in e or "CROSS_SIZE" in e:  # torchrun and accelerate; deepspeed
        return None
    # a batch script outside a job step has SLURM_PROCID too, but is a single process
    in_step = "SLURM_STEP_ID" in e and "SLURM_PROCID" in e
    size = e.get("OMPI_COMM_WORLD_SIZE", e.get("PMI_SIZE"))
    # srun --mpi=pmi2 sets PMI_SIZE, too
    pmi_of_srun = in_step and "OMPI_COMM_WORLD_SIZE" not in e and size == _slurm("NTASKS")
    if size is not None and not pmi_of_srun:
        return "mpirun" if size != "1" else None
    return "srun" if in_step and _slurm("NTASKS") != "1" else None


def _set_from_mpi() -> None:
    if "RANK" in os.environ and find_spec("mpi4py") is None:  # the user's script has set it from MPI's own variables
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


def _set_from_slurm() -> str | None:
    """Set the rank variables to Slurm's; return a message if they were set to something else before."""
    numbers = {"RANK": _slurm("PROCID"), "WORLD_SIZE": _slurm("NTASKS"), "LOCAL_RANK": _slurm("LOCALID")}
    for name, text in numbers.items():
        if text is None or not text.isdecimal():
            raise UserError(
                f"srun started this process, but its variable for {name} is {text!r}; SLURM_PROCID, SLURM_NTASKS and "
                "SLURM_LOCALID must be set"
            )
    found = {name: int(text) for name, text in numbers.items() if text is not None}
    tasks = _tasks_of_node()
    if tasks is not None:
        found["LOCAL_WORLD_SIZE"] = tasks
    problem = mpi.contradiction(found, os.environ, "Slurm")
    os.environ.update({name: str(value) for name, value in found.items()})
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host()
    if "MASTER_PORT" not in os.environ:  # the same for all tasks of a step, but different for steps that share a node
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ["MASTER_PORT"] = str(10_000 + (31 * job + step) % 20_000)
    return problem


def _slurm(name: str) -> str | None:
    """Return a variable of the job step, or else of the job."""
    step = {
        "NTASKS": "SLURM_STEP_NUM_TASKS",
        "NODELIST": "SLURM_STEP_NODELIST",
        "TASKS_PER_NODE": "SLURM_STEP_TASKS_PER_NODE",
    }.get(name, "")
    job = {"NODELIST": "SLURM_JOB_NODELIST"}.get(name, f"SLURM_{name}")
    return os.environ.get(step, os.environ.get(job))


def _tasks_of_node() -> int | None:
    """Return the tasks on this node. Slurm writes "8(x2),4" for eight on each of two nodes and four on a third."""
    node = os.environ.get("SLURM_NODEID", "")
    text = _slurm("TASKS_PER_NODE") or ""
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
            f"cannot find the first host of Slurm's node list {hosts!r} (`scontrol show hostnames` failed); set "
            "MASTER_ADDR"
        ) from error


# ---------------------------------------------------------------------------------------------------- checks


def _misspelled() -> str | None:
    """Return a message if a variable of the environment is nearly one that this project reads."""
    for name in sorted(os.environ):
        if name.startswith("PARTIAL_FC_") and name not in VARIABLES:
            ends = {known.removeprefix("PARTIAL_FC_"): known for known in VARIABLES}
            near = difflib.get_close_matches(name.removeprefix("PARTIAL_FC_"), ends, 1, 0.7)
            if near:
                return f"the environment variable {name} is not known; spell it {ends[near[0]]}, or unset it"
    return None


def _read_variables() -> dict[str, int]:
    """Return those of torch's rank variables that are set. Raises UserError for a value that is not a number."""
    given = {name: os.environ[name] for name in NAMES if os.environ.get(name)}
    for name, text in given.items():
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}; it must be a number of at least 0, as set by a launcher")
    return {name: int(text) for name, text in given.items()}


def _check_range(given: Mapping[str, int]) -> None:
    if "RANK" in given and "WORLD_SIZE" not in given:
        raise UserError(
            f"RANK is {given['RANK']}, but WORLD_SIZE is not set; start with a launcher (docs/launching.md), or unset "
            "RANK"
        )
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")):
        if part in given and whole in given and given[part] >= given[whole]:
            raise UserError(
                f"{part} is {given[part]}, but {whole} is {given[whole]}; ranks count from 0, so {part} must be below "
                f"{whole}"
            )
    if given.get("LOCAL_WORLD_SIZE", 1) > given.get("WORLD_SIZE", 1 << 62):
        raise UserError(
            f"LOCAL_WORLD_SIZE is {given['LOCAL_WORLD_SIZE']}, but WORLD_SIZE is {given['WORLD_SIZE']}; a node cannot "
            "have more ranks than the run"
        )


def _exchange(what: str, value: dict[str, object]) -> list[dict[str, int]]:
    """Return the values of all ranks, in the order of ranks, over the store that the process group will use."""
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    key = f"partial_fc/{what}"  # each start has its store; agents that join later have counted fewer restarts
    try:
        if not _stores:
            _stores.append(next(iter(dist.rendezvous("env://", rank, world, timeout=WAIT)))[0])
        return _exchange_over(_stores[0], key, json.dumps(value), rank, world)
    except (RuntimeError, ValueError) as error:  # raised by stores, also for an unknown host or a port in use
        raise UserError(
            f"rank {rank} of {world} cannot reach the others at {address} (MASTER_ADDR, MASTER_PORT): {error}"
        ) from error


def _exchange_over(store: dist.Store, key: str, value: str, rank: int, world: int) -> list[dict[str, int]]:
    """Exchange JSON values: rank 0 collects them under `key`, and waits until every rank has read them."""
    store.set(f"{key}/{rank}", value)
    if rank == 0:
        store.set(key, json.dumps([json.loads(store.get(f"{key}/{other}")) for other in range(world)]))
        store.wait([f"{key}/{other}/read" for other in range(1, world)])  # the server exits with rank 0
    values: list[dict[str, int]] = json.loads(store.get(key))
    store.set(f"{key}/{rank}/read", "")
    return values
