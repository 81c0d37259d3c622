"""A run, or a checkpoint of it, as the source of weights for another run: `--head.weights RUN`, `--backbone.weights RUN`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partial_fc import Checkpointer, PartialFC, Progress, export_weights, import_weights, save_checkpoint
from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.shards import ClassShards
from partial_fc.training.backbones import build_backbone
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.data import open_data
from partial_fc.training.engine import make_accelerator
from partial_fc.training.run_parts import build_parts
from partial_fc.training.saved import backbone_in, checkpoint_in, heads_in
from partial_fc.training.trainer import Trainer

RUN = ["--config", "configs/quickstart.yaml", "--data.identities", "60", "--train.batch_size", "64"]


def small_run(folder: Path, *, backbone: str = "small", classes: int = 60, width: int = 128) -> tuple[Any, PartialFC]:
    """A run folder as far as weights are concerned: settings and two checkpoints. Returns what the newest holds."""
    head = PartialFC(width, classes, seed=77)
    torch.manual_seed(9)
    module = build_backbone(backbone, image_shape=(1, 32, 32), embedding_size=width)
    checkpointer = Checkpointer(folder / "checkpoints")
    for step in (1, 2):
        with torch.no_grad():
            head.weight.add_(1)
            next(module.parameters()).add_(1)
        checkpointer.save(step, backbone=module, head=head, progress=Progress(step=step))
    checkpointer.release()
    (folder / "config.yaml").write_text(f"backbone: {{name: {backbone}, embedding_size: {width}}}\n")
    return module, head


def test_a_run_or_a_checkpoint_of_it_is_a_source_of_both(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(Path(__file__).parents[2])
    run = tmp_path / "run"
    module, head = small_run(run)
    config = to_config(train_parser(), RUN)
    data = open_data(config.data, config.seed)
    accelerator = make_accelerator(config)
    for named in (run, run / "checkpoints", run / "checkpoints" / "step-000000002"):
        config.backbone.weights = str(named)
        built = build_parts(config, data.train, data.train, accelerator, 1, resume=False)
        own = built.engine.named()["backbone"].state_dict()
        assert all(torch.equal(own[name], value) for name, value in module.state_dict().items())
        import_weights(config.head.weights_source(str(named)), built.head)
        assert torch.equal(built.head.weight, head.weight)
    start = ["train", *RUN, "--output.folder", str(tmp_path / "new"), "--check"]
    assert main([*start, "--head.weights", str(run), "--backbone.weights", str(run)]) == 0
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty" / "config.yaml").write_text("{}\n")
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "mine", model=nn.Linear(2, 2), first=PartialFC(4, 5))
    save_checkpoint(tmp_path / "heads", first=PartialFC(4, 5))
    for option in ("head", "backbone"):
        flag = f"--{option}.weights"
        assert "there is no" in mistake(*start, flag, tmp_path / "nothing")
        assert "the run" in (text := mistake(*start, flag, tmp_path / "empty")) and "no complete checkpoint yet" in text
        assert "neither a run nor a checkpoint of this project" in mistake(*start, flag, tmp_path / "other")
    assert "has no class weights named head; it has first" in mistake(*start, "--head.weights", tmp_path / "mine")
    assert "has no backbone; it has first" in mistake(*start, "--backbone.weights", tmp_path / "heads")
    assert "do not fit the backbone" in mistake(*start, "--backbone.weights", tmp_path / "mine")
    small_run(tmp_path / "wide", width=64)
    text = mistake(*start, "--backbone.weights", tmp_path / "wide")
    assert "different shapes" in text and "the run's backbone is small with embeddings of 64" in text
    damaged = run / "checkpoints" / "step-000000002" / "manifest.json"
    damaged.write_text("{")
    assert "checkpoint" in mistake(*start, "--backbone.weights", damaged.parent)
    assert main([*start, "--head.weights", str(run), "--backbone.weights", str(run)]) == 0  # the one before it


def test_checking_compares_the_classes_of_weights_with_those_of_the_run(tmp_path, monkeypatch, mistake, capsys):
    """Rows are not read, and the way out is one of the settings."""
    monkeypatch.chdir(Path(__file__).parents[2])
    _, head = small_run(tmp_path / "run")
    start = ["train", *RUN, "--output.folder", str(tmp_path / "new"), "--head.weights"]
    export_weights(tmp_path / "w.safetensors", head)
    (tmp_path / "files").mkdir()
    torch.save({"weight": head.weight.detach()}, tmp_path / "files" / "softmax_fc_gpu_0.pt")
    for named in ("run", "w.safetensors", "files"):
        assert main([*start, str(tmp_path / named), "--check"]) == 0
        assert "augmentation: rotation 8, " in capsys.readouterr().out
        for check in ([], ["--check"]):
            text = mistake(*start, tmp_path / named, "--data.identities", "50", *check)
            assert "60 classes of width 128, but 50 classes of width 128 are expected" in text
            assert "--data.holdout_identities (0 here), --data.min_images (1) and --data.identities (50)" in text
            assert "expand" not in text
        text = mistake(*start, tmp_path / named, "--backbone.embedding_size", "64", "--check")
        assert "but 60 classes of width 64 are expected; give the --backbone.embedding_size" in text
    assert not (tmp_path / "new").exists()


def test_large_margin_fine_tuning_goes_on_from_a_run(tmp_path, monkeypatch):
    """The command of docs/from-wespeaker.md: a run's settings, weights of both, another margin and other crops; for larger
    images the backbone takes the same weights."""
    monkeypatch.chdir(Path(__file__).parents[2])
    first = ["--output.folder", str(tmp_path / "run"), "--train.epochs", "1", "--train.cpu", "true"]
    penalised = "--head.margin.margin 0.2 --head.inter_topk 3 --head.margin_schedule.start 0"
    config = to_config(train_parser(), [*RUN, *first, *penalised.split(), "--head.margin_schedule.end_epochs", "1"])
    trainer = Trainer(config)
    trainer.train()
    before = trainer.head.weight.detach().clone()
    trainer.close()
    page = Path("docs/from-wespeaker.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    command = block.replace("\\\n", " ").replace("runs/NAME", str(tmp_path / "run")).split()
    assert command[:2] == ["partial-fc", "train"]
    still = "--head.margin_schedule.start 0.5 --head.margin_schedule.begin_epochs 0 --head.margin_schedule.end_epochs 1"
    assert all(each in page for each in still.split())
    tuned = to_config(train_parser(), ["--config", *command[2:], *still.split(), "--augment.scale_max", "1.3"])
    assert (tuned.train.epochs, tuned.head.inter_topk, tuned.head.sample_rate) == (5, 0, config.head.sample_rate)
    trainer = Trainer(tuned)
    assert trainer.head.margin.margin == 0.5 and torch.equal(trainer.head.weight.detach(), before)
    trainer.close()
    larger = tuned.backbone.build((1, 64, 64), str(tmp_path / "run")).state_dict()
    run = checkpoint_in(tmp_path / "run")
    assert run is not None and all(torch.equal(larger[name], value) for name, value in backbone_in(run).items())


def written_in_rows(rank: int, world: int, folder: str) -> None:
    """As of FSDP2 and DeepSpeed: each rank has its rows of the backbone."""
    shards = ClassShards.split(5, ranks_of(None), torch.device("cpu"))
    whole = torch.arange(10.0).view(5, 2)

    class Rows:
        def state_dict(self) -> dict[str, Any]:
            return {"fc.weight": shards.wrap(whole[shards.lo : shards.hi].clone()), "fc.bias": torch.ones(5)}

    save_checkpoint(folder, backbone=Rows(), head=PartialFC(4, 7))  # type: ignore[arg-type]


def read_on_ranks(rank: int, world: int, folder: str) -> bool:
    found = checkpoint_in(folder)
    assert found is not None and heads_in(found) == ["head"]
    tensors = backbone_in(found)
    return torch.equal(tensors["fc.weight"], torch.arange(10.0).view(5, 2)) and tensors["fc.bias"].sum() == 5


def test_a_backbone_in_rows_is_read_at_any_world_size(ranks, tmp_path):
    ranks(2).run(written_in_rows, str(tmp_path))
    assert read_on_ranks(0, 1, str(tmp_path))
    assert all(ranks(3).run(read_on_ranks, str(tmp_path)))


def test_a_run_needs_no_import(tmp_path, mistake):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    line = mistake("import", tmp_path, "--output", tmp_path / "new")
    assert f"{tmp_path} is a run, which needs no import: give it to --head.weights" in line
    assert not (tmp_path / "new").exists()
