"""What a settings file must be: tables where settings are tables, values where they have a type, each name once. A mistake
is one line that names the file, in every command that reads one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.errors import UserError
from partial_fc.training.settings_parser import check_tables, plain_settings

NULL = "is null, without a value; give a value, or leave it out for the default"
# text of a file -> what the line says after its name
MISTAKES = {
    "data:\n  - folder: x\n": "data is a table of settings, not a list",
    "augment: false\n": "augment is a table of settings, not false",
    "augment: true\n": "augment is a table of settings, not true",
    "head: 3\n": "head is a table of settings, not 3",
    "head: own.Own\n": "head is a table of settings, not the text 'own.Own'",
    "head: {margin_schedule: 3}\n": "head.margin_schedule is a table of settings, not 3",
    "head: {margin_schedule: [3]}\n": "head.margin_schedule is a table of settings, not a list",
    "data: {mix: [3]}\n": "data.mix[0] is a table of settings, not 3",
    "data: {mix: [{name: a, folde: b}]}\n": "data.mix[0] has no setting folde; it has name, folder,",
    "data: {mix: [{name: a}, {name: b, weight: }]}\n": f"--data.mix[1].weight {NULL}",
    "optimizer: {class_path: SGD, init_args: {lr: }}\n": f"--optimizer.lr {NULL}",
    "head: {margin: {class_path: AdaFace, init_args: {h: }}}\n": f"--head.margin.h {NULL}",
    "head: {skale: 3}\n": "Group 'head' does not accept option 'skale'",
    "seed: one\n": 'Parser key "seed": Expected',
    "seed: 1\nhead: {sample_rate: 1}\nseed: 2\n": "has seed twice, in lines 1 and 3; join them",
    "train: {epochs: 1}\ntrain: {batch_size: 8}\n": "has train twice, in lines 1 and 2",
    "train: {epochs: 1,\n epochs: 2}\n": "has train.epochs twice, in lines 1 and 2",
    "data:\n  mix:\n  - {name: a, name: b}\n": "has data.mix.name twice, in lines 3 and 3",
    "": "is empty",
    "# nothing\n": "is empty",
    "- seed: 1\n": "is a list, not a table of settings",
    "3\n": "is a single value, not a table of settings",
    "train:\n": "has no settings, only names of empty tables: train",
    "head: [3\n": "Problems parsing config",
    'data: {folder: ""}\n': "data.folder is empty; give a value, or leave it out for the default",
}


def may_not_be_null() -> list[str]:
    """The names of all settings of a run that have a type without null, by trying each."""
    found = []

    def look(table: dict[str, object], prefix: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict) and "class_path" not in value:
                look(value, f"{prefix}{name}.")
                continue
            nested: object = None
            for part in reversed(f"{prefix}{name}".split(".")):
                nested = {part: nested}
            try:
                check_tables(RunConfig, nested)
            except UserError:
                found.append(prefix + name)

    look(plain_settings(RunConfig()), "")
    return found


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_names_the_file(tmp_path, mistake, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    line = mistake("train", file, "--output.folder", tmp_path / "run")
    assert str(file) in line and MISTAKES[text] in line
    assert not (tmp_path / "run").exists()


def test_a_file_in_another_encoding_is_named(tmp_path, mistake):
    file = tmp_path / "settings.yaml"
    file.write_bytes("seed: 1\n".encode("utf-16"))
    assert f"{file} is no file of settings" in mistake("train", file)


@pytest.mark.parametrize("command", ["doctor", "evaluate", "comms", "audit", "export-backbone"])
def test_every_command_that_reads_settings_says_it(tmp_path, mistake, command):
    (tmp_path / "config.yaml").write_text("augment: false\n")
    given = tmp_path / "config.yaml" if command in ("doctor", "comms") else tmp_path
    assert f"{tmp_path / 'config.yaml'}: augment is a table of settings, not false" in mistake(command, given)


@pytest.mark.parametrize("name", may_not_be_null())
def test_a_setting_without_a_value_is_refused(tmp_path, name):
    value: object = None
    for part in reversed(name.split(".")):
        value = {part: value}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"seed": 1, **value}))  # type: ignore[dict-item]
    with pytest.raises(UserError, match="is null") as refused:
        to_config(train_parser(), ["--config", str(file)])
    assert str(file) in str(refused.value) and name in str(refused.value)


def test_most_settings_need_a_value():
    names = may_not_be_null()
    assert len(names) > 60 and {"seed", "train.timeout", "schedule.power", "data.mix", "backbone.name"} < {*names}
    assert not {"head_optimizer", "train.clip_norm", "data.folder", "output.run_name"} & {*names}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--backbone.name null", f"--backbone.name {NULL}"),
        ("--output.folder null", f"--output.folder {NULL}"),
        ("--optimizer.lr null", f"--optimizer.lr {NULL}"),
        ("--head.margin.scale null", f"--head.margin.scale {NULL}"),
        ("--head_optimizer SGD --head_optimizer.momentum null", f"--head_optimizer.momentum {NULL}"),
        ("--data.folder=", "data.folder is empty"),
        ("--output.folder=", "output.folder is empty"),
        ("--backbone.weights=", "backbone.weights is empty"),
        ("--train.epoch 3", "unrecognized arguments: --train.epoch"),
        ("--train.timeout 0", "--train.timeout is 0.0; give seconds above 0"),
        ("--train.timeout -5", "--train.timeout is -5.0"),
        ("--train.timeout 1e15", "--train.timeout is 1000000000000000.0"),
        ("--train.timeout .inf", "--train.timeout is inf"),
        ("--train.timeout .nan", "--train.timeout is nan"),
    ],
)
def test_a_mistake_on_the_command_line(tmp_path, mistake, given, told):
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 1\n")
    line = mistake("train", file, "--output.folder", tmp_path / "run", "--check", *given.split())
    assert told in line and str(file) not in line


def test_what_a_file_may_have(tmp_path, capsys):
    """Tables without entries, null where the type has it, and no without quotes, which YAML reads as false."""
    file = tmp_path / "settings.yaml"
    file.write_text("augment:\nseed: 4\ntrain: {mixed_precision: no, clip_norm: , timeout: 30}\nhead_optimizer: null\n")
    config = to_config(train_parser(), ["--config", str(file)])
    assert (config.seed, config.train.mixed_precision, config.train.clip_norm) == (4, "no", None)
    file.write_text("train: &a {epochs: 3}\ndata: {mix: [{name: a, weight: 2}]}\n")
    assert to_config(train_parser(), ["--config", str(file)]).data.mix[0].weight == 2
    assert main(["train", str(Path("configs/quickstart.yaml")), "--check", "--output.folder", str(tmp_path / "r")]) == 0
