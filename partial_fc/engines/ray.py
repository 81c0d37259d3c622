"""Ranks started by Ray Train: every Ray worker runs one rank as a process of its own, as torchrun's agent does.

    python -m partial_fc.engines.ray --workers 8 --gpus 1 --restarts 3 -m partial_fc train CONFIG --start_or_resume

driver       this command: asks Ray for workers, passes a request to stop on, ends with the ranks' exit code
board        a Ray actor: what driver and workers tell each other; what the ranks print reaches the driver by it
worker       a Ray actor with the CPUs and GPUs of a rank: starts the rank and watches it
rank         the command after the options, in the folder where this one was given; its rank variables are those of
             torchrun: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE of Ray Train, MASTER_ADDR and MASTER_PORT of the
             first worker

A rank is a process because signals, exit codes and process groups then are those of any launcher. If a rank is lost,
Ray starts all of them again (`--restarts`), and the command resumes its run. A rank dies with its worker.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from partial_fc.engines.needs import need
from partial_fc.loop.preemption import PreemptionGuard

OLDEST = "2.60"
INSTALL = "pip install 'partial_fc[ray]'"
FINAL = (0, 2, PreemptionGuard.EXIT_CODE)  # complete, a mistake, saved on request: starting again would not help
# variables of the driver that ranks get, on any node; Ray's workers have those of `ray start`
PASSED = ("PARTIAL_FC_", "NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS", "PYTHONPATH")
# by these `partial-fc` would take Slurm or MPI, which may have started Ray, for its launcher
OF_OTHERS = ("SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TORCHELASTIC_RUN_ID", "CROSS_SIZE")
ASK_EVERY = 0.5  # seconds between two questions of a worker whether to stop
SILENCE = 10.0  # seconds after which a worker that does not ask is not there
REMIND_EVERY = 30.0  # seconds between two lines about workers that are waited for
# The kernel kills the rank with its worker, whatever kills that. A function for `preexec_fn` would not be safe in a
# worker, which has threads.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class RayOptions:
    """What Ray is asked for. workers: (at least, at most); cpus and gpus are those of a worker; wait in seconds."""

    workers: tuple[int, int]
    cpus: float = 1.0
    gpus: float = 0.0
    restarts: int = 3
    wait: float = 300.0
    address: str | None = None
    storage: str | None = None

    @property
    def wanted(self) -> str:
        least, most = self.workers
        number = f"{most} workers" if least == most else f"at least {least} workers"
        return f"{number} with {self.cpus:g} CPUs{f' and {self.gpus:g} GPUs' if self.gpus else ''} each"


class Board:
    """What driver and workers tell each other; a Ray actor on the driver's node."""

    def __init__(self) -> None:
        self._stop = False
        self._heard = 0.0
        self._said: list[str] = []
        self._mistake: str | None = None

    def stop(self) -> None:
        """Ask all ranks to stop."""
        self._stop = True

    def asked(self) -> bool:
        """Return whether ranks are to stop; workers ask as long as their ranks live."""
        self._heard = time.monotonic()
        return self._stop

    def say(self, text: str) -> None:
        """Show a text to the user."""
        self._said.append(text)

    def refuse(self, mistake: str) -> None:
        """End the run, on a mistake that no new start mends."""
        self._mistake = mistake

    def news(self) -> tuple[str, bool, str | None]:
        """Return (what was said since the last call, whether a worker has lately asked, a mistake)."""
        said, self._said = "".join(self._said), []
        return said, self._heard > 0 and time.monotonic() - self._heard < SILENCE, self._mistake


def main(arguments: list[str] | None = None) -> int:
    """Run a command on Ray workers and return its exit code.

    The code is 2 for options or a cluster that cannot be used, and where no worker could be had; 1 if ranks failed more
    often than they may be restarted; 130 if interrupted.
    """
    try:
        options, command = parse(sys.argv[1:] if arguments is None else arguments)
        need("ray", OLDEST)
    except ModuleNotFoundError:
        return _error(f"Ray is not installed; {INSTALL}")
    except (RuntimeError, ValueError) as error:
        return _error(str(error))
    import ray

    try:
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        return _error(f"Ray cannot be reached: {' '.join(str(error).split())}")
    try:
        with PreemptionGuard() as guard:
            return _run(options, command, guard)
    except ray.exceptions.RayError as error:  # of the board: the cluster is going down
        return _give_up(f"Ray is lost: {' '.join(str(error).split())}", 1)
    except KeyboardInterrupt:
        return 130
    finally:
        ray.shutdown()


def parse(arguments: list[str]) -> tuple[RayOptions, list[str]]:
    """Return (options, command for Python). Raises ValueError for a value that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m partial_fc.engines.ray",
        description="Run a Python program on Ray workers, one rank each, as torchrun does on nodes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workers", required=True, metavar="N or MIN:MAX", help="ranks; with MIN:MAX, as many as the cluster has room")
    add("--cpus", type=float, default=1.0, help="CPUs of a worker (default %(default)s)")
    add("--gpus", type=float, default=0.0, help="GPUs of a worker, 0 or 1 (default %(default)s)")
    add("--restarts", type=int, default=3, help="times to start all ranks again after a failure (default %(default)s)")
    add("--wait", type=float, default=300.0, help="seconds to wait for workers (default %(default)s)")
    add("--address", help="the cluster (default: RAY_ADDRESS, one on this machine, or a new one on this machine)")
    add("--storage", help="folder for Ray's own records of the run (default ~/ray_results)")
    add("-m", dest="module", action="store_true", help="the program is a module")
    add("program", help="script, or module after -m; all that follows belongs to it")
    add("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    parts = given.workers.split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[-1]):
        raise ValueError(f"--workers {given.workers}: give a number of at least 1, or MIN:MAX such as 4:8")
    for name, least in (("cpus", 0), ("restarts", 0), ("wait", 1)):
        if not getattr(given, name) >= least:
            raise ValueError(f"--{name} {getattr(given, name)}: give at least {least}")
    if given.gpus not in (0, 1):
        raise ValueError(f"--gpus {given.gpus:g}: a rank uses one GPU or none; give 1 or 0")
    options = RayOptions(
        workers=(int(parts[0]), int(parts[-1])),
        **{name: getattr(given, name) for name in ("cpus", "gpus", "restarts", "wait", "address", "storage")},
    )
    return options, [*(["-m"] if given.module else []), given.program, *given.arguments]


# ---------------------------------------------------------------------------------------------------- driver


def _run(options: RayOptions, command: list[str], guard: PreemptionGuard) -> int:
    """Run the command on workers of the cluster; return its exit code."""
    import ray

    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    remote: Any = ray.remote  # its annotations do not know actors of this kind
    board = remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    ended: list[tuple[int, str]] = []
    fit = threading.Thread(target=lambda: ended.append(_fit(options, command, board)), daemon=True)
    fit.start()
    since, reminded, asked = time.monotonic(), 0.0, False  # the time when there were workers, or it began
    while True:
        fit.join(1.0)  # signals arrive in this thread
        running = fit.is_alive()
        said, there, mistake = ray.get(board.news.remote())
        print(said, end="", file=sys.stderr, flush=True)
        if mistake is not None:
            return _give_up(mistake, 2)
        if not running:
            break
        if guard.noted is not None and not asked:
            asked = True
            board.stop.remote()
        if there:
            since, reminded = time.monotonic(), 0.0
            continue
        seconds = time.monotonic() - since
        if seconds >= (min(REMIND_EVERY, options.wait) if asked else options.wait):
            reason = "stopped before there were workers" if asked else f"no workers within {options.wait:g} s"
            return _give_up(f"{reason}: {_shortage(options)}", PreemptionGuard.EXIT_CODE if asked else 2)
        if seconds - reminded >= REMIND_EVERY:
            reminded = seconds
            _print(f"waiting for workers: {_shortage(options)}")
    code, message = ended[0] if ended else (1, "error: Ray Train ended without a result")
    if message:
        _print(message)
    return code


def _fit(options: RayOptions, command: list[str], board: Any) -> tuple[int, str]:
    """Let Ray Train run the ranks; return (exit code, message)."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    least, most = options.workers
    # Ray asks for as many workers as it sees room for, also on a node that it has not yet noticed to be lost, and
    # counts again when they do not start within this time. A fixed number is not counted again.
    start = options.wait if least == most else min(60.0, options.wait / 4)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start))
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    # the annotations do not say that the function may return something, and workers may be a range
    rank: Any = _rank
    workers: Any = most if least == most else (least, most)
    try:
        result: Any = TorchTrainer(
            rank,
            train_loop_config={"command": command, "folder": os.getcwd(), "environment": passed, "board": board},
            torch_config=_rank_variables(),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=options.gpus > 0,
                resources_per_worker={"CPU": options.cpus, **({"GPU": options.gpus} if options.gpus else {})},
            ),
            run_config=RunConfig(
                storage_path=options.storage, failure_config=FailureConfig(max_failures=options.restarts)
            ),
        ).fit()
        return int(result.return_value), ""
    except Exception as error:  # TrainingFailedError, and whatever a cluster that is going down causes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        cause = next((line for line in reversed(lines) if line.startswith("RuntimeError")), lines[-1])
        return 1, f"error: the ranks failed, and {options.restarts} restarts are used up: {cause}"


def _rank_variables() -> Any:
    """Return a TorchConfig that starts no process group: the ranks do."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Devices(Backend):
        share_cuda_visible_devices = True  # every rank sees the GPUs of all ranks of its node, as LOCAL_RANK counts

    class RankVariables(TorchConfig):
        backend_cls = Devices
        train_func_context = nullcontext

    return RankVariables()


def _shortage(options: RayOptions) -> str:
    """Return words for what is asked for and what the cluster has."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    has = ", ".join(
        f"{total.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in ("CPU", "GPU") if name in total
    )
    return f"asked for {options.wanted}; the cluster has {has}"


def _give_up(message: str, code: int) -> int:
    """End although Ray Train still waits, which cannot be stopped.

    The cluster ends what belongs to a driver that is gone, and a cluster of this process goes with it. `ray.shutdown`
    would do so too, but it ends the process with exit code 1 where the thread in Ray Train asks for something then.
    """
    _print(f"error: {message}")
    os._exit(code)


def _error(message: str) -> int:
    _print(f"error: {message}")
    return 2


def _print(message: str) -> None:
    print(f"partial-fc on Ray: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- worker


def _rank(config: dict[str, Any]) -> int:
    """Run one rank in a Ray worker; return its exit code.

    Raises RuntimeError if it was lost or failed, so that Ray starts all ranks again.
    """
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context, board = ray.train.get_context(), config["board"]
    rank, world = context.get_world_rank(), context.get_world_size()
    if ray.get(board.asked.remote()):
        return PreemptionGuard.EXIT_CODE
    folder, host = config["folder"], socket.gethostname()
    if not Path(folder).is_dir():
        missing = f"{folder}, where the command was given, does not exist on {host}"
        ray.get(board.refuse.remote(f"{missing}; start it in a folder that all nodes share"))
        raise RuntimeError(missing)
    master, port = broadcast_from_rank_zero(_address() if rank == 0 else None)
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "MASTER_ADDR": master,
        "MASTER_PORT": port,
    }
    environment = {k: v for k, v in os.environ.items() if k not in OF_OTHERS} | config["environment"]
    process = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), *config["command"]],
        cwd=folder,
        env=environment | {name: str(value) for name, value in variables.items()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    reader = threading.Thread(target=_pass_on, args=(process.stdout, board), daemon=True)
    reader.start()
    asked = False
    while True:
        try:
            code = process.wait(ASK_EVERY)
            break
        except subprocess.TimeoutExpired:
            if ray.get(board.asked.remote()) and not asked:
                asked = True
                process.send_signal(signal.SIGTERM)
    reader.join(10)
    if code in FINAL:
        return code
    if asked and code == -signal.SIGTERM:  # in its first seconds, before it could save anything
        return PreemptionGuard.EXIT_CODE
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = f"rank {rank} of {world} (on {host}) {how}"
    ray.get(board.say.remote(f"\npartial-fc on Ray: {text}\n"))  # behind the progress bar
    raise RuntimeError(text)


def _address() -> tuple[str, int]:
    """Return the address of this node and a free port on it."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _pass_on(pipe: IO[bytes], board: Any) -> None:
    """Pass on what a rank prints, as it comes."""
    import ray

    said = None
    while data := os.read(pipe.fileno(), 65536):
        said = board.say.remote(data.decode(errors="replace"))
    if said is not None:
        ray.get(said)


if __name__ == "__main__":
    sys.exit(main())
