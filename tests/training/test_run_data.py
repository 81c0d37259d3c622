"""The data of a run, afterwards. Data that changed: a command that would measure on other identities than those it held out refuses, and
so does a run that would start from the weights of other ones. Names of folders and files that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from launched import tiny_run

from partial_fc.training.cli.main import main
from partial_fc.training.data.labels import class_names
from partial_fc.training.run import RunFolder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a trained run that holds two of six identities out."""
    root = tmp_path_factory.mktemp("run_data")
    settings = tiny_run(root, data={"holdout_identities": 2, "workers": 0}, output={"trackers": []})
    assert main(["train", str(settings), "--output.folder", str(root / "run")]) == 0
    return root


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Path:
    """The same, moved to a folder of its own."""
    shutil.copytree(original, tmp_path / "moved")
    settings = tmp_path / "moved/run/config.yaml"
    settings.write_text(settings.read_text().replace(str(original), str(tmp_path / "moved")))
    return tmp_path / "moved"


def add_identity(root: Path) -> None:
    shutil.copytree(root / "images/id0", root / "images/aaa")


USES = {
    "evaluate": "evaluate {run} --output {out}",
    "embed": "embed {run} --split holdout --output {out}",
    "embed the training set": "embed {run} --output {out}",
    "calibrate": "gallery calibrate {gallery} --run {run} --split holdout --far 0.7",
    "export": "export-backbone {run} --output {out} --formats safetensors",
    "audit": "audit {run} --output {out}",
}


@pytest.mark.parametrize("kind", USES)
def test_a_command_refuses_data_that_have_changed(trained, tmp_path, mistake, kind):
    run, gallery = trained / "run", trained / "gallery"
    if kind == "calibrate":
        assert main(["gallery", "build", str(gallery), "--run", str(run)]) == 0
    command = USES[kind].format(run=run, out=tmp_path / "out", gallery=gallery).split()
    add_identity(trained)
    line = mistake(*command)
    assert f"the data of {run} have changed since the run began" in line and "--data FOLDER" in line
    assert "the training set had 32 images and has 40" in line
    assert not (tmp_path / "out").exists()
    (run / "data.json").unlink()
    if kind != "audit":  # whose head has rows for other classes
        assert main(command) == 0, "as the line says"


def test_only_the_sets_that_a_command_uses_are_compared(trained, tmp_path, mistake):
    run = trained / "run"
    held_out = set(json.loads((run / "data.json").read_text())["holdout"]["listed"])
    gone = next(path for path in sorted(trained.glob("images/*/*.png")) if "/".join(path.parts[-2:]) not in held_out)
    gone.unlink()
    assert main(["evaluate", str(run), "--output", str(tmp_path / "figures")]) == 0
    name = f"{gone.parent.name}/{gone.name}"
    assert f"{name} of the training set was" in mistake("audit", run) or "32 images and has 31" in mistake("audit", run)


def test_another_data_set_is_taken_as_it_is(trained, tmp_path, mistake):
    run = trained / "run"
    shutil.copytree(trained / "images", tmp_path / "more")
    add_identity(trained)
    assert main(["evaluate", str(run), "--data", str(tmp_path / "more"), "--output", str(tmp_path / "figures")]) == 0
    (tmp_path / "more/id0/0.png").unlink()
    assert main(["audit", str(run), "--data", str(tmp_path / "more"), "--output", str(tmp_path / "fewer")]) == 0
    for path in sorted((tmp_path / "more").iterdir()):
        path.rename(path.with_name(f"new_{path.name}"))
    line = mistake("audit", run, "--data", tmp_path / "more", "--output", tmp_path / "others")
    assert f"class 0 of {run} is id" in line and f"but that of {tmp_path / 'more'} is new_id" in line


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_a_resume_tells_what_has_changed_before_it_reads_a_checkpoint(trained, mistake, check):
    run = trained / "run"
    add_identity(trained)
    line = mistake("train", "--resume", run, *check)
    assert "the data have changed since the run began: the training set had 32 images and has 40" in line
    shutil.rmtree(trained / "images/aaa")
    shutil.rmtree(trained / "images/id0")
    assert "the training set had 32 images and has 24" in mistake("train", "--resume", run, *check)


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_class_weights_of_other_identities_are_refused(trained, tmp_path, mistake, check):
    run = trained / "run"
    start = ["train", trained / "run.yaml", "--data.folder", trained / "images", "--output.folder", tmp_path / "new"]
    start += ["--head.weights", run, "--data.holdout_identities", "2", *check]
    line = mistake(*start, "--seed", "1")
    assert f"--head.weights: class 1 of {run} is id" in line and "but that of this run is id" in line
    assert "partial-fc export" in line and not (tmp_path / "new").exists()
    assert main(["export", str(run), str(tmp_path / "rows.safetensors")]) == 0
    again = ["--seed", "1", "--head.weights", str(tmp_path / "rows.safetensors")]
    assert main([*map(str, start), *again]) == 0, "the way out"


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_held_out_identities_that_the_weights_know_are_told(trained, tmp_path, capsys, check):
    run = trained / "run"
    start = ["train", trained / "run.yaml", "--data.folder", trained / "images", "--backbone.weights", run]
    start += ["--data.holdout_identities", "2", *check]
    assert main([*map(str, start), "--output.folder", str(tmp_path / "same")]) == 0
    assert "was trained on" not in capsys.readouterr().out
    assert main([*map(str, start), "--output.folder", str(tmp_path / "other"), "--seed", "1"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "was trained on" in line]
    assert len(told) == 1 and told[0].startswith(f"warning: --backbone.weights {run} was trained on ")
    assert "identities of the holdout set" in told[0] and "--seed 0" in told[0]


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders whose names are not UTF-8, one of them damaged; and a run of them."""
    root = tmp_path_factory.mktemp("latin")
    settings = tiny_run(root, data={"workers": 0, "holdout_identities": 2})
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"{NOT_UTF8}{path.name}"))
    (root / "images" / f"{NOT_UTF8}id2" / f"{NOT_UTF8}.png").write_bytes(b"no picture")
    assert main(["train", str(settings), "--output.folder", str(root / "run")]) == 0
    return root


def test_names_that_are_not_utf8_are_those_of_a_run(latin):
    run = latin / "run"
    assert (run / "report.html").read_text(encoding="utf-8")
    assert set(class_names(run / "labels.csv")) < {path.name for path in (latin / "images").iterdir()}
    (damaged,) = RunFolder(run).unreadable()
    assert damaged.startswith(f"{NOT_UTF8}id2/{NOT_UTF8}.png (")


@pytest.mark.parametrize(
    "command",
    [
        "train --resume {run}",
        "evaluate {run} --output {out}",
        "evaluate {run} --data {data} --output {out}",
        "audit {run} --output {out}",
        "embed {run} --output {out}",
        "embed {run} --output {out} --files npz",
        "gallery build {out} --run {run}",
        "data inspect {data}",
        "data convert {data} {out} --format folder",
        "data convert {data} {out} --format webdataset",
        "data convert {data} {out} --format list",
        "data convert {data} {out} --format recordio",
    ],
)
def test_names_that_are_not_utf8_work_in_every_command(latin, tmp_path, command):
    places = {"run": latin / "run", "data": latin / "images", "out": tmp_path / "out"}
    assert main([each.format(**places) for each in command.split()]) == 0
    if "folder" in command:
        assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
            path.name for path in (latin / "images").iterdir()
        }


@pytest.mark.parametrize("setting", ["data.folder", "output.folder", "backbone.weights", "head.weights"])
def test_a_setting_that_is_not_utf8_is_refused_at_the_start(original, tmp_path, mistake, setting):
    line = mistake("train", original / "run.yaml", "--output.folder", tmp_path / "run", f"--{setting}", NOT_UTF8)
    assert f"--{setting} is 'caf\\udce9', a name that is not UTF-8" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate {run} --data {data}", "embed {run} --data {data}", "evaluate {run}"])
def test_a_damaged_image_names_the_option_of_the_command(trained, tmp_path, mistake, command):
    for path in trained.glob("images/*/0.png"):
        path.write_bytes(path.read_bytes()[:-20] + bytes(20))  # of the same size
    (trained / "run/data.json").unlink()
    arguments = command.format(run=trained / "run", data=trained / "images").split()
    line = mistake(*arguments, "--output", tmp_path / "out", "--on_error", "raise")
    assert "0.png" in line and "or pass --on_error skip" in line
