"""--head.margin_schedule: the margin over a run, which resumes within an epoch, and its mistakes."""

from __future__ import annotations

import pytest
import torch
import yaml
from launched import logged, tiny_run

from partial_fc.checkpoint.save_load import stored_values
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.errors import UserError
from partial_fc.training.trainer import Trainer

SCHEDULE = ["--head.margin", "CosFace", "--head.margin.scale", "16", "--head.margin.margin", "0.3"]
SCHEDULE += ["--head.margin_schedule.start", "0", "--head.margin_schedule.end_epochs", "1.5"]


def test_a_run_moves_its_margin_and_resumes_within_an_epoch(tmp_path, capsys, monkeypatch):
    config = str(tiny_run(tmp_path, train={"epochs": 2, "checkpoint_steps": 1, "keep_last": 9}))
    assert main(["train", config, *SCHEDULE, "--output.folder", str(tmp_path / "whole")]) == 0
    rows = logged(tmp_path / "whole")
    steps = len(rows) // 2
    expected = [min(0.3, 0.3 * row["step"] / round(1.5 * steps)) for row in rows]  # of the next step
    assert [row["head_margin"] for row in rows] == pytest.approx(expected)
    checkpoint = sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))[0]
    stored = stored_values(checkpoint, "head")["_extra_state"]
    assert "m3=0.3" in stored["margin"] and stored["margin_now"]["arguments"] == {"margin": pytest.approx(expected[0])}
    assert yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["head"]["margin_schedule"]["start"] == 0

    step = Trainer._step
    stopped = []

    def until_the_first(trainer: Trainer) -> object:
        if trainer.progress.step == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "_step", until_the_first)
    assert main(["train", config, *SCHEDULE, "--output.folder", str(tmp_path / "stopped")]) != 0
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert "step 1" in capsys.readouterr().out
    assert logged(tmp_path / "stopped") == rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("start=4 end_epochs=1", "--head.margin_schedule: margin is an angle in radians in [0, pi), not 4.0"),
        ("start=0", "--head.margin_schedule.end_epochs None; give at least 0, and a larger number of epochs"),
        ("start=0 begin_epochs=2 end_epochs=2", "and a larger number of epochs"),
        ("end_epochs=1", "--head.margin_schedule.end_epochs is 1.0, which has no effect without"),
        ("shape=step", "--head.margin_schedule.shape is step, which has no effect without"),
        ("start=0 end_epochs=1 milestones=[1]", "milestones have no effect with --head.margin_schedule.shape linear"),
        ("start=0 shape=step", "milestones are None"),
        ("start=0 shape=step milestones=[2,1]", "each later than the one before"),
        ("start=0 shape=step milestones=[1] end_epochs=1", "have no effect with --head.margin_schedule.shape step"),
        ("start=0 end_epochs=99", "reaches its end after 99 epochs, and the run has 12; give fewer"),
        ("start=0 end_epochs=1 argument=m", "ArcFace has no argument m; its arguments are scale, margin, gradient"),
        ("start=0 end_epochs=1 argument=gradient", "end must be a number"),
    ],
)
def test_mistakes_are_one_clear_error(given, words):
    options = [f"--head.margin_schedule.{each}" for each in given.split()]
    with pytest.raises(UserError) as error:
        to_config(train_parser(), options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("start=0.1 shape=step milestones=[1,2]", [0.1, 0.3, 0.5]),
        ("start=8 argument=scale end_epochs=2", [8.0, 36.0, 64.0]),
        ("start=0 shape=exponential begin_epochs=1 end_epochs=2", [0.0, 0.0, 0.5]),
    ],
)
def test_what_the_settings_mean(given, values):
    config = to_config(train_parser(), [f"--head.margin_schedule.{each}" for each in given.split()])
    head = config.head.build(4, torch.ones(5), 0, torch.device("cpu"))
    schedule = config.head.margin_schedule.build(head, steps_per_epoch=10)
    assert schedule is not None
    assert [schedule.value_after(epoch * 10) for epoch in range(3)] == pytest.approx(values)
    assert to_config(train_parser(), []).head.margin_schedule.build(head, 10) is None


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    for name in ("start", "argument", "shape", "begin_epochs", "end_epochs", "milestones"):
        assert f"--head.margin_schedule.{name}" in told
