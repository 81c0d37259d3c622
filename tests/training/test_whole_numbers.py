"""Whole numbers in every spelling, on the command line of all commands and in files of settings; and an output that
nobody reads."""

from __future__ import annotations

import os
import sys

import pytest

from partial_fc.training.cli.main import UNREAD, main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.errors import UserError

SPELLINGS = {"1e1": 10, "10.0": 10, "1_0": 10, "1E+1": 10, "0.1e2": 10}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_setting_that_is_a_whole_number_takes_it(text, tmp_path):
    config = to_config(
        train_parser(), ["--train.epochs", text, f"--data.min_images={text}", "--head.logits_budget", text]
    )
    assert (config.train.epochs, config.data.min_images, config.head.logits_budget) == (10, 10, 10)
    assert type(config.train.epochs) is int
    file = tmp_path / "c.yaml"
    mix = f"[{{name: a, identities: {text}, weight: {text}}}]"
    file.write_text(f"train: {{epochs: {text}, checkpoint_steps: {text}}}\ndata: {{mix: {mix}}}\n")
    config = to_config(train_parser(), ["--config", str(file)])
    assert (config.train.epochs, config.train.checkpoint_steps) == (10, 10)
    assert type(config.data.mix[0].identities) is int and type(config.data.mix[0].weight) is float


def test_null_and_texts_stay_what_they_are():
    settings = ["--train.max_skips", "null", "--output.run_name", "1e1", "--optimizer.lr", "1e-1"]
    config = to_config(train_parser(), settings)
    assert (config.train.max_skips, config.output.run_name, config.optimizer.init_args["lr"]) == (None, "1e1", 0.1)


@pytest.mark.parametrize("text", ["2.5", "1e-1", "1e999999999", "inf", "nan"])
def test_a_number_that_is_not_whole_is_refused_by_name(text, tmp_path):
    words = "train.epochs is .*; give a whole number"
    with pytest.raises(UserError, match=words):
        to_config(train_parser(), ["--train.epochs", text])
    file = tmp_path / "c.yaml"
    file.write_text(f"train: {{epochs: { {'inf': '.inf', 'nan': '.nan'}.get(text, text) }}}\n")
    with pytest.raises(UserError, match=words) as error:
        to_config(train_parser(), ["--config", str(file)])
    assert str(file) in str(error.value)


def test_the_options_of_commands_take_them_too(capsys):
    assert main(["plan", "--num_classes", "1e6", "--batch_size", "5_12.0", "--world_size", "8e0"]) == 0
    assert "C = 1,000,000 classes, D = 512, N = 512 samples, 8 ranks" in capsys.readouterr().out
    for text in ("2.5", "many", "1e99"):
        assert main(["plan", "--num_classes", text, "--batch_size", "1"]) == 2
        assert f"argument --num_classes: '{text}' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["plan", "--num_classes", "10", "--batch_size", "2"], ["plan", "--help"], []])
def test_a_command_whose_output_nobody_reads_ends_silently(arguments, monkeypatch, capfd):
    """`partial-fc plan ... | head -1`: with the exit code that a shell shows for other programs."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(arguments) == UNREAD == 141
    assert capfd.readouterr().err == ""


def test_a_broken_pipe_of_anything_else_is_an_error(monkeypatch, capsys):
    def broken(arguments: list[str]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("partial_fc.training.cli.main.plan_command", broken)
    assert main(["plan"]) == 2
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err
