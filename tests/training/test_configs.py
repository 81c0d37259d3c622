"""Every file in configs/ is loaded by what reads it, and tried at its real world size: on the meta device, under a
pretended process group.

A training configuration says in a comment what it is for: `# plan: classes=C images=N nodes=n gpus=w head_memory=4GB`
(of each GPU). So the head is built on every kind of rank without the data or the GPUs, and its memory looked up in the
cost model.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from partial_fc import plan
from partial_fc.distributed.shards import local_part
from partial_fc.training.backbones import build_backbone
from partial_fc.training.cli.main import train_parser
from partial_fc.training.cli.plan import byte_count
from partial_fc.training.config import RunConfig, to_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
ACCELERATE = sorted(CONFIGS.glob("accelerate/*.yaml"))
DEEPSPEED = sorted(CONFIGS.glob("deepspeed/*.json"))


def name(path: Path) -> str:
    return path.stem


def load(path: Path) -> RunConfig:
    return to_config(train_parser(), ["--config", str(path)])


def stated(path: Path) -> dict[str, Any]:
    """What the file says that it is for; the quick start needs no such line: it is run."""
    found = re.findall(r"^# plan: (.*)$", path.read_text(), re.MULTILINE)
    if path.stem == "quickstart":
        return {"classes": 1000, "images": 10_000, "nodes": 1, "gpus": 2, "head_memory": 1 << 30}
    assert len(found) == 1, f"{path.name} has no line `# plan: ...`"
    said = dict(pair.split("=") for pair in found[0].split())
    assert set(said) == {"classes", "images", "nodes", "gpus", "head_memory"}
    return {key: byte_count(value) if key == "head_memory" else int(value) for key, value in said.items()}


def test_nothing_in_the_folder_is_left_out():
    files = {path for path in CONFIGS.rglob("*") if path.is_file()}
    assert files == {*RUNS, *ACCELERATE, *DEEPSPEED}
    assert {path.stem for path in RUNS} >= {"quickstart", "folder", "faces_2m", "faces_10m", "classes_100m"}


# ---------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_fits_its_world(path):
    config, said = load(path), stated(path)
    written = yaml.safe_load(path.read_text())
    assert written["output"]["folder"] == f"runs/{path.stem}"
    micro_batch = config.train.batch_size // config.train.accumulation
    assert micro_batch % said["gpus"] == 0 and micro_batch >= 2 * said["gpus"]
    assert said["gpus"] % said["nodes"] == 0 and said["gpus"] % config.head.replicas == 0
    assert (
        said["images"] // config.train.batch_size * config.train.epochs > 100
    )  # a schedule of so few steps would be a mistake
    assert said["classes"] <= said["images"]
    if path.stem != "quickstart":
        assert config.data.folder is not None, "without a folder it would train the embedded characters"
        assert config.train.cpu or config.train.mixed_precision == "bf16"


@pytest.mark.parametrize("stem", ["faces_2m", "faces_10m", "insightface"])
def test_faces_are_mirrored_and_nothing_else(stem):
    assert str(load(CONFIGS / f"{stem}.yaml").augment) == "mirrored 0.5"


def test_the_configuration_of_insightface_has_its_numbers():
    """Those of configs/ms1mv3_r50.py of arcface_torch; its batch is that of a rank."""
    config = load(CONFIGS / "insightface.yaml")
    margin = config.head.margin.build_margin(torch.ones(2))
    assert (margin.scale, margin.margin, margin.gradient, margin.past_pi) == (64.0, 0.5, "straight_through", "plain")
    assert (config.backbone.name, config.backbone.embedding_size) == ("iresnet50", 512)
    assert (config.head.sample_rate, config.train.batch_size, config.train.epochs) == (1.0, 8 * 128, 20)
    assert config.optimizer.init_args == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    assert (config.schedule.shape, config.schedule.power, config.schedule.warmup_epochs) == ("polynomial", 1.0, 0)
    bins = (CONFIGS / "insightface.yaml").read_text().partition("# evaluation:\n")[2].partition("output:")[0]
    found = yaml.safe_load(re.sub("^#", "", bins, flags=re.MULTILINE))
    assert found["every_steps"] == 2000 and len(found["verification"]) == 3


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_its_backbone_takes_its_images(path):
    config = load(path)
    shape = (3, 112, 112) if config.data.folder else (1, 32, 32)
    assert (config.data.channels or shape[0], config.data.image_size or shape[1]) == shape[:2]
    with FakeTensorMode():  # shapes alone
        backbone = build_backbone(
            config.backbone.name, image_shape=shape, embedding_size=config.backbone.embedding_size
        )
        assert backbone(torch.empty(2, *shape)).shape == (2, config.backbone.embedding_size)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_the_head_is_built_at_its_real_world_size(path):
    config, said = load(path), stated(path)
    world, copies = said["gpus"], config.head.replicas
    counts = torch.empty(said["classes"], dtype=torch.long, device="meta")
    chunk = -(-said["classes"] // (world // copies))
    owned = []
    for rank in {0, 1, world // copies - 1, world - 1} & set(range(world)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            head = config.head.build(config.backbone.embedding_size, counts, config.seed, torch.device("meta"))
            place = rank % (world // copies)
            rows = min(chunk, said["classes"] - place * chunk)
            assert local_part(head.weight).shape == (rows, config.backbone.embedding_size)
            assert head.weight.shape == (said["classes"], config.backbone.embedding_size)
            assert head.weight.device_mesh.shape == ((copies, world // copies) if copies > 1 else (world,))
            assert (head.sample_rate, head.sample_block) == (config.head.sample_rate, config.head.sample_block)
            owned.append(rows)
        finally:
            dist.destroy_process_group()
    assert max(owned) == chunk


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_the_head_fits_the_stated_memory(path):
    config, said = load(path), stated(path)
    made = plan(
        said["classes"],
        config.backbone.embedding_size,
        said["gpus"] // config.head.replicas,
        config.train.batch_size
        // config.train.accumulation,  # with replicas a rank sees fewer embeddings, but the rows of all labels
        config.head.sample_rate,
        {"SGD": "sgd-momentum", "AdamW": "adamw"}[config.optimizer.name],
        memory=said["head_memory"],
        logits_budget=config.head.logits_budget,
        autocast=torch.bfloat16 if config.train.mixed_precision == "bf16" else None,
        device="cpu" if config.train.cpu else "cuda",
        storage=None
        if config.head.storage is None
        else {"HostRows": "host", "FileRows": "files"}[config.head.storage.name],
        sample_block=config.head.sample_block,
    )
    assert made.fit is not None and made.fit.fits, str(made)
    if path.stem != "quickstart":
        assert made.peak > said["head_memory"] / 4, (
            f"it takes {made.peak:,} bytes: what the file says is far from what it takes"
        )


def test_a_run_that_would_not_fit_is_noticed():
    said = stated(CONFIGS / "classes_100m.yaml")
    assert not plan(said["classes"], 512, 8, 8192, 0.01, memory=said["head_memory"]).fit.fits  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_takes_its_file(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    assert config.num_processes % config.num_machines == 0
    assert config.machine_rank == 0
    assert (config.num_machines > 1) == (config.main_process_port is None)  # one node: any free port
    assert config.distributed_type == {
        "zero2": DistributedType.DEEPSPEED,
        "zero3": DistributedType.DEEPSPEED,
        "fsdp2": DistributedType.FSDP,
    }.get(path.stem, DistributedType.MULTI_GPU)


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_its_command_is_one_that_the_launcher_takes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = re.findall(r"^#\s+(.*(?:launch/\S+\.sh|accelerate launch).*)$", path.read_text(), re.MULTILINE)
    assert told, "no command in its header"
    for named in re.findall(r"\b(?:configs|launch)/[\w/]+\.\w+", " ".join(told)):
        assert (ROOT / named).is_file(), named
    asked = launch_command_parser().parse_args(
        ["--config_file", str(path), "-m", "partial_fc", "train", "configs/quickstart.yaml"]
    )
    config = load_config_from_file(str(path))
    if config.distributed_type == DistributedType.DEEPSPEED:
        file = config.deepspeed_config["deepspeed_config_file"]
        assert (
            ROOT / file
        ).is_file() and f"zero{json.loads((ROOT / file).read_text())['zero_optimization']['stage']}" == path.stem
        return  # the rest of the launcher's check wants DeepSpeed and GPUs
    checked, _, _ = _validate_launch_command(asked)
    assert checked.num_processes == config.num_processes and checked.module and checked.training_script == "partial_fc"
    assert checked.use_fsdp == (path.stem == "fsdp2") and (not checked.use_fsdp or int(checked.fsdp_version) == 2)


def test_the_launch_files_world_is_the_runs():
    for run, launched in (
        ("quickstart", "cpu2"),
        ("faces_2m", "gpu8"),
        ("faces_2m", "zero2"),
        ("faces_2m", "fsdp2"),
        ("faces_10m", "two_nodes"),
    ):
        said, config = (
            stated(CONFIGS / f"{run}.yaml"),
            load_config_from_file(str(CONFIGS / f"accelerate/{launched}.yaml")),
        )
        assert (said["gpus"], said["nodes"]) == (config.num_processes, config.num_machines)
    script = (ROOT / "launch/slurm.sbatch").read_text()
    said = stated(CONFIGS / "classes_100m.yaml")
    tasks = int(re.search(r"--ntasks-per-node=(\d+)", script)[1])  # type: ignore[index]
    assert (
        f"sbatch --nodes={said['nodes']} " in (CONFIGS / "classes_100m.yaml").read_text()
        and tasks * said["nodes"] == said["gpus"]
    )


# ---------------------------------------------------------------------------------------------------- DeepSpeed


def resolved(path: Path) -> dict[str, Any]:
    """The file as Accelerate gives it to DeepSpeed, in a world of one: what is "auto" filled in."""
    config = json.loads(path.read_text())
    auto = {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 128, "gradient_accumulation_steps": 2}
    assert {key for key, value in config.items() if value == "auto"} == set(auto)
    return {**config, **auto}


def test_there_is_a_file_for_each_stage_and_precision_that_works():
    """Without a precision of the engine's own (the run's settings say it), and with; fp16 with ZeRO-0 is broken in
    DeepSpeed."""
    assert {path.stem for path in DEEPSPEED} == {
        f"zero{stage}{kind}" for stage in range(4) for kind in ("", "_bf16", "_fp16")
    } - {"zero0_fp16"}


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_a_deepspeed_file_says_what_its_name_says(path):
    config = json.loads(path.read_text())
    precision = [kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")]
    assert path.stem == "_".join([f"zero{config['zero_optimization']['stage']}", *precision])
    assert config["gradient_clipping"] == 0.0, (
        "backbone and head are clipped by one norm; the engine would clip the backbone by its own"
    )
    assert not {"optimizer", "scheduler"} & set(config), "the run's settings say those"


@pytest.mark.parametrize("path", DEEPSPEED, ids=name)
def test_deepspeed_takes_its_file(path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'partial_fc[deepspeed]'")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(resolved(path))
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        256,
        128,
        2,
    )
    written = json.loads(path.read_text())["zero_optimization"]
    assert config.zero_config.stage == written["stage"]
    known = {name for key, field in type(config.zero_config).model_fields.items() for name in (key, field.alias)}
    assert set(written) <= known, "DeepSpeed has no such key"


# ---------------------------------------------------------------------------------------------------- launch files


def test_the_commands_in_the_launch_files_name_files_that_exist():
    for path in sorted(each for each in (ROOT / "launch").iterdir() if each.is_file()):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, path
        for named in re.findall(r"\b(?:configs|launch)/[\w/]+\.\w+", path.read_text()):
            assert (ROOT / named).exists(), f"{path.name} names {named}"
