"""What tests of launchers share: a run so small that starting it is most of it, and its figures.

The run reads 48 images of 6 identities from a folder and makes three steps; nobody is held out, so there is nothing to
evaluate.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from partial_fc.training.run import RunFolder

ROOT = Path(__file__).parents[2]
# of a launcher that started the tests themselves, and of ranks that tests played in this process
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_", "ACCELERATE_", "CROSS_")
MPIRUN_OPTIONS = "--oversubscribe" + " --allow-run-as-root" * (os.geteuid() == 0)


def tiny_run(folder: Path, **settings: Any) -> Path:
    """A training configuration in `folder`, with its images; `settings` go into its parts: head={"sample_rate":
    0.5}."""
    rng = np.random.default_rng(0)
    for identity in range(6):
        (folder / "images" / f"id{identity}").mkdir(parents=True)
        color = rng.integers(0, 255, (1, 1, 3))
        for k in range(8):
            pixels = np.clip(color + rng.integers(-60, 60, (20, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"id{identity}" / f"{k}.png")
    config: dict[str, dict[str, Any]] = {
        "data": {"folder": str(folder / "images"), "image_size": 32},
        "backbone": {"embedding_size": 32},
        "head": {"margin": {"class_path": "ArcFace", "init_args": {"scale": 16.0}}},
        "schedule": {"warmup_epochs": 0},
        "train": {"epochs": 1, "batch_size": 16, "cpu": True, "timeout": 60.0},
        "output": {"log_every": 1},
    }
    for part, values in settings.items():
        config[part].update(values)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's, without any launcher's variables; commands of this Python's environment are found."""
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and not k.startswith(OTHERS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(command: str | list[str], **more: str) -> subprocess.Popen[str]:
    words = shlex.split(command) if isinstance(command, str) else command
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(**more),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 150) -> tuple[int, str, str]:
    """(exit code, output, errors); all that it started is killed if it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end within {timeout} s:\n{out[-2000:]}\n{err[-4000:]}") from None
    return process.returncode, out, err


def succeed(command: str | list[str], timeout: float = 150, **more: str) -> str:
    code, out, err = finish(start(command, **more), timeout)
    assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-6000:]}"
    return out + err


def succeed_together(processes: list[subprocess.Popen[str]], timeout: float = 150) -> None:
    """All must end well; where one does not, the others are killed."""
    try:
        for process in processes:
            code, out, err = finish(process, timeout)
            assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-6000:]}"
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def losses(run: Path) -> list[float]:
    """The loss of every step that a run has logged."""
    return [row["loss"] for row in RunFolder(run).history()]


def wait_for_step(out: Path, step: int, timeout: float = 200) -> None:
    """Return when a run has logged that step."""
    deadline = time.monotonic() + timeout
    while len(losses(out)) < step:
        assert time.monotonic() < deadline, f"step {step} does not come"
        time.sleep(0.05)


def tell_tale(run: Path) -> list[tuple[float, ...]]:
    """Figures of every step that no two different runs share: loss, norm of the whole gradient, angle to the own
    class."""
    return [(row["step"], row["loss"], row["grad_norm"], row["target_angle"]) for row in RunFolder(run).history()]


def logged(run: Path | str) -> list[dict[str, float]]:
    """The history of a run without what is of the clock."""
    return [{key: value for key, value in row.items() if key != "data_wait"} for row in RunFolder(run).history()]
