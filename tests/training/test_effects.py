"""Settings without effect: refused by name in a new run, left alone in one that goes on. Every setting is one that always
has an effect, or has a rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from common import args
from data_files import WRITERS, samples
from launched import tiny_run

from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import CLASS_OPTIONS, RunConfig, flat, to_config
from partial_fc.training.effects import RULES, check_effects, without_effect
from partial_fc.training.errors import UserError

# always of effect, or refused where they are read
OTHERS = """
seed
data.folder data.split data.identities data.holdout_identities data.image_size data.channels data.min_images
data.sampler data.images_per_identity data.class_exponent data.mix data.workers data.prefetch data.on_error
augment.enabled augment.rotation augment.translation augment.scale_min augment.scale_max augment.shear
augment.flip_probability augment.blur_probability augment.contrast augment.brightness augment.erase_probability
augment.noise_std
backbone.name backbone.embedding_size backbone.weights backbone.dropout backbone.gradient_checkpointing
backbone.channels_last backbone.normalize_input
head.margin head.margin_schedule.start head.margin_schedule.argument head.margin_schedule.shape
head.margin_schedule.begin_epochs head.margin_schedule.end_epochs head.margin_schedule.milestones
head.sample_rate head.sample_block head.storage head.dtype head.interclass_filter head.inter_topk head.hard_negatives
head.sampling_correction head.weights head.label_smoothing head.logits_budget head.kernels head.replicas
center.weight optimizer head_optimizer head_lr_factor head_skipped_rows
schedule.shape schedule.warmup_epochs schedule.every schedule.milestones
head_schedule.shape head_schedule.warmup_epochs head_schedule.by head_schedule.every head_schedule.milestones
train.epochs train.batch_size train.accumulation train.clip_norm train.mixed_precision train.cpu
train.checkpoint_every train.checkpoint_steps train.asynchronous_checkpoints train.keep_last train.on_nonfinite
train.watch_every train.timeout
evaluation.batch_size evaluation.tile evaluation.verification evaluation.templates evaluation.identification
evaluation.retrieval evaluation.every evaluation.every_steps evaluation.best
output.folder output.trackers output.own_tracker output.log_every
"""


def test_every_setting_has_a_rule_or_always_an_effect():
    names = [name for name in flat(RunConfig()) if not name.startswith(tuple(f"{each}." for each in CLASS_OPTIONS))]
    assert sorted(names) == sorted([*OTHERS.split(), *RULES])


def asked(text: str) -> RunConfig:
    return to_config(train_parser(), args(text))


@pytest.mark.parametrize(
    ("settings", "with_effect", "words"),
    [
        ("--schedule.power 3", "--schedule.shape polynomial", "3.0, which has no effect with --schedule.shape cosine"),
        ("--schedule.power 3", "--head_schedule.shape polynomial", "(it is for polynomial); leave it out, or give 2.0"),
        (
            "--schedule.final 0.1 --schedule.shape constant",
            "--head_schedule.shape cosine",
            "(it is for cosine and poly",
        ),
        ("--schedule.drop 0.5", "--schedule.shape step --schedule.every 2", "(it is for step and multistep)"),
        ("--head_schedule.power 1", "--schedule.shape polynomial", "with --head_schedule.shape cosine"),
        ("--head_schedule.final 0.1 --head_schedule.shape constant", "--head_schedule.shape cosine", "give null if a"),
        (
            "--head_schedule.drop 0.1",
            "--head_schedule.shape step --head_schedule.every 2",
            "--head_schedule.drop is 0.",
        ),
        (
            "--schedule.by epoch --schedule.shape constant --schedule.warmup_epochs 0",
            "--schedule.warmup_epochs 1",
            "--schedule.by is epoch, which has no effect with --schedule.shape constant without warm-up",
        ),
        ("--data.format parquet", "--data.folder x", "--data.format is parquet, which has no effect without a folder"),
        ("--data.image_column a", "--data.folder x", "the embedded glyphs are used"),
        ("--data.label_column a", "--data.folder x --data.format parquet", "--data.label_column is a, which has no"),
        (
            "--augment.blur_sigma 1 --augment.blur_probability 0",
            "--augment.blur_probability 0.1",
            "while --augment.blur_probability is 0",
        ),
        (
            "--augment.erase_size 0.3 --augment.erase_probability 0",
            "--augment.enabled false",
            "while --augment.erase_probability is 0",
        ),
        (
            "--head.hard_negatives_every 9",
            "--head.sample_rate 0.5 --head.hard_negatives 2",
            "--head.hard_negatives is 0",
        ),
        (
            "--head.hard_negatives_search faiss",
            "--head.sample_rate 0.5 --head.hard_negatives 2",
            "is faiss, which has no effect while --head.hard_negatives is 0",
        ),
        (
            "--head.inter_topk_penalty 0.1",
            "--head.inter_topk 3",
            "while --head.inter_topk is 0; leave it out, or give 0.",
        ),
        ("--head.init_std 0.1 --head.weights x", '--data.mix [{"name":"a"}]', "with --head.weights, which replaces"),
        (
            "--center.alpha 0.1",
            "--center.weight 0.1",
            "--center.alpha is 0.1, which has no effect while --center.weight",
        ),
        (
            "--train.max_skips null",
            "--train.on_nonfinite skip",
            "is null, which has no effect unless --train.on_nonfin",
        ),
        (
            "--evaluation.flip false",
            "--evaluation.verification [a.bin]",
            "is false, which has no effect without --eval",
        ),
        ("--evaluation.align false", "--evaluation.templates x", "without --evaluation.templates"),
        ("--evaluation.label_pattern x", "--evaluation.retrieval x", "without --evaluation.retrieval"),
        ("--evaluation.camera_pattern x", "--evaluation.retrieval x", "--evaluation.camera_pattern is x, which has no"),
        ("--output.project x", "--output.trackers [wandb]", "[tensorboard] (it is for wandb, mlflow and a tracker of"),
        (
            "--output.run_name x",
            "--output.trackers []",
            "with --output.trackers [tensorboard] (it is for wandb, mlflow)",
        ),
        (
            '--data.mix [{"name":"a","label_column":"b"}]',
            '--data.mix [{"name":"a","folder":"x","label_column":"b"}]',
            "--data.mix: label_column of a is b, which has no effect without a folder",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_and_one_with_effect_is_not(settings, with_effect, words):
    with pytest.raises(UserError) as error:
        check_effects(asked(settings))
    assert words in str(error.value)
    check_effects(asked(f"{settings} {with_effect}"))


def test_a_configuration_of_deepspeed_that_the_launcher_overrules(monkeypatch, tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    config = asked(f"--train.deepspeed {tmp_path / 'zero.json'}")
    check_effects(config)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="no effect under this launcher, whose own configuration"):
        check_effects(config)


@pytest.mark.parametrize(("kind", "refused"), [("folder", "folder data"), ("list", "list data"), ("parquet", "")])
def test_columns_are_of_parquet_files_alone(tmp_path, kind, refused):
    folder = WRITERS[kind](tmp_path / "data", samples())
    found = without_effect(asked(f"--data.folder {folder} --data.image_column image"))
    assert list(found) == (["data.image_column"] if refused else [])
    assert refused in "".join(found.values())


def test_a_run_that_was_saved_with_one_goes_on_and_takes_no_other(tmp_path, capsys):
    config = tiny_run(tmp_path, data={"workers": 0}, output={"trackers": []})
    run, settings = tmp_path / "run", ["--schedule.power", "3"]
    assert main(["train", str(config), *settings, "--check", "--output.folder", str(run)]) == 2
    assert "--schedule.power is 3.0, which has no effect" in capsys.readouterr().err
    assert main(["train", str(config), "--output.folder", str(run)]) == 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved["schedule"]["power"] = 3.0  # as a version without the rule would have saved it
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    assert main(["train", "--resume", str(run), "--check"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--check", "--evaluation.align", "false"]) == 2
    assert "--evaluation.align is false, which has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.yaml")), ids=lambda p: p.name)
def test_the_configs_in_the_tree_have_none(path):
    assert without_effect(to_config(train_parser(), ["--config", str(path)])) == {}
