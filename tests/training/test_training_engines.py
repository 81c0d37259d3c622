"""The application in every engine and under every launcher that has processes of its own: the numbers of plain DDP, and
exact resumption.

One run an engine, on the quick start's data, with accumulation and clipping; it is resumed from a checkpoint within its
epoch by another launcher, and once by another engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from common import args
from launched import logged

from partial_fc.training.config import TrainConfig
from partial_fc.training.engine import _set_deepspeed
from partial_fc.training.errors import UserError
from partial_fc.training.run import RunFolder

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
RUN = ["--data.identities", "60", "--train.batch_size", "60", "--output.log_every", "1", "--output.trackers", "[]"]
RUN += ["--train.epochs", "1", "--train.accumulation", "2", "--train.checkpoint_steps", "6"]
STEPS, MIDDLE = 10, 6


def accelerate(tmp: Path, **settings: object) -> list[str]:
    file = tmp / "accelerate.yaml"
    common = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "mixed_precision": "no",
    }
    file.write_text(yaml.safe_dump({**common, "main_process_port": 0, **settings}))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def zero(stage: int) -> dict[str, object]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": stage, "zero3_init_flag": False}}


def json_of(tmp: Path, stage: int) -> list[str]:
    """Settings that name a DeepSpeed configuration, some of which the run's settings replace."""
    (tmp / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}))
    return ["--train.deepspeed", str(tmp / "zero.json")]


FSDP2 = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "NO_WRAP"}}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DEEPSPEED = [sys.executable, *args("-m deepspeed.launcher.runner --num_gpus 2 --no_local_rank --master_port 29611")]


def train(launcher: list[str], *arguments: str) -> str:
    module = "--module" if launcher == DEEPSPEED else "-m"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [*launcher, module, "partial_fc", "train", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def assert_alike(found: list[float], expected: list[float], rel: float) -> None:
    """Engines round differently, which grows up to tenfold in a step of this young run: the first half is held to `rel`,
    the second to a hundred times that."""
    half = len(expected) // 2
    assert found[:half] == pytest.approx(expected[:half], rel=rel)
    assert found == pytest.approx(expected, rel=100 * rel)


def results(folder: Path) -> list[object]:
    return [e["tar"] for e in json.loads((folder / "metrics.json").read_text())["evaluations"]]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).history()]


def from_the_middle(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    shutil.rmtree(to / f"checkpoints/step-{STEPS:09d}")
    return to


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("plain")
    train(
        accelerate(tmp, distributed_type="MULTI_GPU"),
        "configs/quickstart.yaml",
        "--output.folder",
        str(tmp / "run"),
        *RUN,
    )
    return tmp / "run"


@pytest.mark.timeout(300)
# tests/project/test_launch.py and tests/engines/test_engine_state.py start and resume engines in the normal suite
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DeepSpeed ZeRO-3", "DeepSpeed ZeRO-2", "FSDP2"])
def test_every_engine_gives_the_losses_of_ddp_and_goes_on_exactly(plain, tmp_path, engine):
    """ZeRO-2 by accelerate launch and resumed by deepspeed, ZeRO-3 by torchrun and resumed by accelerate launch, FSDP2
    resumed as DDP."""
    first, again, more = accelerate(tmp_path, **FSDP2), accelerate(tmp_path, **FSDP2), []
    if engine == "DeepSpeed ZeRO-2":
        first, again = accelerate(tmp_path, **zero(2)), DEEPSPEED
        more = json_of(tmp_path, 2)
    if engine == "DeepSpeed ZeRO-3":
        first, again = TORCHRUN, accelerate(tmp_path, **zero(3))
    folder = tmp_path / "run"
    train(
        first,
        "configs/quickstart.yaml",
        "--output.folder",
        str(folder),
        *RUN,
        *(json_of(tmp_path, 3) if first == TORCHRUN else []),
    )
    assert_alike(losses(folder), losses(plain), rel=2e-5)
    assert len(losses(folder)) == STEPS
    assert f"<td>{engine}</td>" in (folder / "report.html").read_text()
    assert results(folder) == [pytest.approx(expected, abs=1e-3) for expected in results(plain)]

    resumed = from_the_middle(folder, tmp_path / "resumed")
    assert f"step {MIDDLE}" in train(again, "--resume", str(resumed), *more)
    assert logged(resumed) == logged(folder)
    assert results(resumed) == results(folder)

    if engine == "FSDP2":
        as_ddp = from_the_middle(folder, tmp_path / "as_ddp")
        assert f"step {MIDDLE}" in train(TORCHRUN, "--resume", str(as_ddp))
        assert losses(as_ddp) == pytest.approx(losses(folder), abs=2e-5)  # four steps after the middle
        assert "<td>DDP</td>" in (as_ddp / "report.html").read_text()


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_mixed_run_is_alike_in_ddp_and_fsdp2_and_goes_on_exactly(tmp_path):
    mix = ["--data.mix", json.dumps([{"name": "other", "weight": 0.5, "identities": 30, "m": 0.3}]), *RUN]
    runs = {"ddp": TORCHRUN, "fsdp2": accelerate(tmp_path, **FSDP2)}
    for name, launcher in runs.items():
        train(launcher, "configs/quickstart.yaml", "--output.folder", str(tmp_path / name), *mix)
    steps = len(losses(tmp_path / "ddp"))
    assert steps == 60 * 10 // 40
    for key in ("loss", "loss_main", "loss_other", "grad_norm"):
        found = {name: [row[key] for row in RunFolder(tmp_path / name).history()] for name in runs}
        assert_alike(found["fsdp2"], found["ddp"], rel=1e-4)
    for name, launcher in runs.items():
        resumed = tmp_path / f"{name}_resumed"
        shutil.copytree(tmp_path / name, resumed)
        shutil.rmtree(resumed / f"checkpoints/step-{steps:09d}")
        train(launcher, "--resume", str(resumed))
        assert logged(resumed) == logged(tmp_path / name)


def settings_for(config: dict[str, object], **train: object) -> dict[str, object]:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    _set_deepspeed(SimpleNamespace(state=state, num_processes=4), TrainConfig(**train))  # type: ignore[arg-type]
    return config


def test_the_runs_settings_go_before_deepspeeds_configuration():
    given: dict[str, object] = {"train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    found = settings_for(given, batch_size=96, accumulation=3, clip_norm=None, mixed_precision="bf16")
    assert (
        found["train_micro_batch_size_per_gpu"] == 8
        and found["gradient_accumulation_steps"] == 3
        and found["train_batch_size"] == 96
    )
    assert found["gradient_clipping"] == 0 and found["bf16"] == {"enabled": False}
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"enables fp16, but --train\.mixed_precision is no"):
        settings_for({"fp16": {"enabled": True}})
    with pytest.raises(UserError, match="has a scheduler"):
        settings_for({"scheduler": {"type": "WarmupLR"}})


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, ["--train.deepspeed", "nowhere.json"], "nowhere.json does not exist"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed needs a launcher"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}, ["--train.mixed_precision", "fp16"], "fp16"),
    ],
    ids=["no such file", "no launcher", "fp16"],
)
def test_what_an_engine_cannot_do_is_one_line(tmp_path, mistake, monkeypatch, environment, settings, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["--output.folder", tmp_path / "run", *RUN, *settings]
    assert expected in mistake("train", ROOT / "configs/quickstart.yaml", *arguments)
    assert not (tmp_path / "run").exists()
