"""Trackers of a run: what each is told, that a resumed run goes on in the same tracked run, and that none ends a run."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from launched import tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import record_writer

from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.errors import UserError
from partial_fc.training.faults import VARIABLE
from partial_fc.training.run import RunFolder
from partial_fc.training.trackers import Last, settings, trackers
from partial_fc.training.trackers.kinds import MLflow
from partial_fc.training.trackers.secrets import without_secrets
from partial_fc.training.trackers.sender import Sender

pytestmark = pytest.mark.timeout(400)  # several starts of two ranks, on machines with other work
KEY = "0123456789abcdefghij"
STEPS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps, saved after each; two identities are held out, and evaluated after each."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_run(folder, train={"epochs": 2, "batch_size": 8, "timeout": 300.0}, data={"holdout_identities": 2})
    config.write_text(config.read_text() + "evaluation: {every: 1}\n")
    return config


def own(file: Path, fails: str = "") -> list[str]:
    return [
        *("--output.own_tracker", "own_tracker.Recorded"),
        *("--output.own_tracker.file", str(file)),
        *("--output.own_tracker.fails", fails),
    ]


def noted(file: Path, kind: str) -> list[list[Any]]:
    """What the tracker of tests/support/own_tracker.py was told of one kind."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == kind]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def config_of(*arguments: str) -> None:
    to_config(train_parser(), list(arguments))


# ---------------------------------------------------------------------------------------------------- settings


def test_names_that_are_not_known_are_refused_in_words():
    with pytest.raises(UserError, match=r"names nonsense, choose among tensorboard, wandb, mlflow, or give a class"):
        config_of("--output.trackers", "[tensorboard,nonsense]")
    with pytest.raises(UserError, match=r"names one twice: wandb, wandb"):
        config_of("--output.trackers", "[wandb,wandb]")
    with pytest.raises(UserError, match=r"--output.project is empty"):
        config_of("--output.project", " ")


@pytest.mark.parametrize("name", settings.OTHERS)
def test_other_trackers_of_accelerate_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=rf"names {name}, which Accelerate knows, but in which a resumed run would not"):
        settings.check_installed([name])
    config_of("--output.trackers", f"[{name}]")  # a run of an earlier version that named it can be evaluated


def test_an_argument_that_looks_like_a_secret_is_no_setting(tmp_path, monkeypatch):
    (tmp_path / "with_key.py").write_text(
        "from own_tracker import Recorded\n"
        "class WithKey(Recorded):\n"
        "    def __init__(self, run_name: str, logging_dir: str, api_key: str = ''):\n"
        "        super().__init__(run_name, logging_dir)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"own_tracker\.api_key looks like a secret, and settings are saved and shown"):
        config_of("--output.own_tracker", "with_key.WithKey", "--output.own_tracker.api_key", KEY)


def test_a_tracker_that_is_not_installed_is_one_line_and_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(settings.PACKAGES, "wandb", (("a_package_that_nobody_has",), "partial_fc[wandb]"))
    arguments = ["train", str(tiny), "--output.folder", str(tmp_path / "run"), "--output.trackers", "[wandb]"]
    for more in ([], ["--check"]):
        assert main([*arguments, *more]) == 2
        err = capsys.readouterr().err
        assert err.strip().splitlines() == [
            "partial-fc: error: --output.trackers names wandb, which is not installed: pip install "
            "'partial_fc[wandb]', or leave it out"
        ]
        assert not (tmp_path / "run").exists()


def test_texts_lose_keys_and_passwords(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", KEY)
    monkeypatch.setenv("MY_TOKEN", "abc")  # too short to be one
    text = f"POST https://me:pass@server:1/x failed with {KEY} (abc)"
    assert without_secrets(text) == "POST https://server:1/x failed with *** (abc)"


def test_mlflow_gets_names_that_it_accepts():
    row = {"loss": 1.0, "my set/tar@1e-3": 0.5, "größe: x/eer": 0.1}
    assert MLflow().row(row) == {"loss": 1.0, "my set/tar_at_1e-3": 0.5, "größe_ x/eer": 0.1}
    assert MLflow().settings({"data.mix": ["a"], "train.clip_norm": None}) == {
        "data.mix": "['a']",
        "train.clip_norm": None,
    }


# ---------------------------------------------------------------------------------------------------- one tracker


def test_calls_are_made_in_order_and_what_fails_is_said_once(capsys):
    done: list[int] = []
    sender = Sender("some")

    def call(number: int) -> None:
        if number in (2, 3, 5):
            raise ConnectionError(f"no {number}")
        done.append(number)

    for number in range(7):
        sender.post(lambda number=number: call(number), "row", number)
    sender.post(lambda: call(5), "report.html")
    sender.close(lambda: done.append(99), 30)
    assert done == [0, 1, 4, 6, 99]
    assert capsys.readouterr().err.splitlines() == [
        "partial-fc: warning: the tracker some has not taken the row of step 2 (no 2); the run goes on",
        "partial-fc: warning: the tracker some has not taken 3 rows of steps 2 to 5, report.html; the run folder has "
        "all of it",
    ]


def test_a_call_that_never_returns_holds_nothing_up(capsys):
    sender = Sender("stuck")
    begin = time.monotonic()
    sender.post(lambda: time.sleep(60), "row", 4)
    sender.post(lambda: None, "row", 5)
    with pytest.raises(TimeoutError):
        sender.ask(lambda: None)(0.1)
    sender.close(lambda: None, 0.2)
    assert time.monotonic() - begin < 30
    assert capsys.readouterr().err.splitlines() == [
        "partial-fc: warning: the tracker stuck has not taken 2 rows of steps 4 to 5; the run folder has all of it"
    ]


def test_last_steps_of_a_history():
    rows = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 2, "lfw/accuracy": 0.5}]
    assert Last.of(rows) == Last(3, 2)
    assert Last(5, 1).or_later(Last.of(rows)) == Last(5, 2)


# ---------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_in_the_same_tracked_run_on_fewer_ranks(tiny, tmp_path):
    run, file = tmp_path / "run", tmp_path / "told"
    arguments = ["train", str(tiny), "--output.folder", str(run), "--start_or_resume", *own(file)]
    arguments += ["--output.project", "tests"]
    killed = forked.fork(*arguments, **{VARIABLE: "kill:forward@step=8,rank=0"})
    code, _, _ = forked.finish(killed, 300)
    assert code != 0 and [row["step"] for row in RunFolder(run).history()][-1] == 7
    before = json.loads((run / "trackers.json").read_text())
    forked.succeed(*arguments, ranks=1, timeout=300)

    first, second = noted(file, "start")
    assert first == second and first[1:] == ["tests", "0"], "one tracked run, known to the first rank alone"
    after = json.loads((run / "trackers.json").read_text())
    assert after["Recorded"]["link"] == before["Recorded"]["link"] == {"run": first[0]}
    (settings_,) = noted(file, "settings")
    assert settings_[0]["train.batch_size"] == 8 and settings_[0]["head.margin.scale"] == 16.0

    rows = noted(file, "row")
    history = RunFolder(run).history()
    assert [row[0] for row in rows if "loss" in row[1]] == list(range(1, STEPS + 1)), "steps 5 to 7 came once"
    assert [row[0] for row in rows if "loss" not in row[1]] == [4, 8]
    assert [row[1] for row in rows if row[0] <= 4] == [
        {k: v for k, v in row.items() if k != "step"} for row in history if row["step"] <= 4
    ]
    assert rows[-1][1]["holdout/eer"] == history[-1]["holdout/eer"]
    assert sorted(name for row in noted(file, "images") for name in row[1]) == sorted(
        f"plots/{path.stem}" for path in (run / "plots").glob("*.png")
    )
    assert noted(file, "images")[0][0] == STEPS
    assert noted(file, "artifact") == [[str(run / "report.html")]]
    assert len(noted(file, "finish")) == 1

    # TensorBoard is told to forget steps 5 to 7 of the killed run
    board = events(run)
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in history if "loss" in row]
    )
    assert [event.step for event in board.Scalars("holdout/eer")] == [4, 8]
    assert "plots/training" in board.Tags()["images"] and board.Images("plots/training")[0].step == STEPS
    assert not [path for path in (run / "tensorboard").iterdir() if path.is_dir()], "they would be runs of their own"
    begun = HParamsPluginData.FromString(board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert begun.session_start_info.hparams["optimizer.lr"].number_value > 0


@pytest.mark.slow
def test_a_tracker_that_does_not_start_is_one_line_on_all_ranks_without_secrets(tiny, tmp_path):
    run, file = tmp_path / "run", tmp_path / "told"
    arguments = ["train", str(tiny), "--output.folder", str(run)]
    code, _, err = forked.finish(forked.fork(*arguments, *own(file, "start"), OWN_API_KEY=KEY), 300)
    assert code == 2
    assert [line for line in err.splitlines() if "error" in line] == [
        "partial-fc: error: the tracker Recorded does not start: http://server:5000 refuses ***; to do without, leave "
        "it out of --output.trackers"
    ]
    assert not (run / "config.yaml").exists()
    forked.succeed(*arguments, *own(file), ranks=1, timeout=300)  # the folder is still free
    assert [event.step for event in events(run).Scalars("loss")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("fails", ["log", "hang"])
def test_a_tracker_that_fails_in_mid_run_is_warned_of_once(tiny, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(trackers.END, "FINISHED", 30.0 if fails == "log" else 0.5)
    run, file = tmp_path / "run", tmp_path / "told"
    arguments = ["train", str(tiny), "--output.folder", str(run), "--output.trackers", "[]", *own(file, fails)]
    assert main(arguments) == 0
    assert [row["step"] for row in RunFolder(run).history() if "loss" in row] == list(range(1, STEPS + 1))
    assert [row[0] for row in noted(file, "row")] == [1, 2]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    missed = "has not taken 8 rows of steps 3 to 8"
    if fails == "log":
        first, last = warnings
        assert first.endswith("has not taken the row of step 3 (the server is gone); the run goes on")
        assert last.endswith(f"{missed}; the run folder has all of it")
        assert noted(file, "artifact") and noted(file, "finish")
    else:
        (last,) = warnings
        assert missed in last and "report.html" in last
    assert not (run / "tensorboard").exists()


def test_a_full_disk_of_tensorboard_ends_no_run(tiny, tmp_path, monkeypatch, capsys):
    write, written = record_writer.RecordWriter.write, []

    def full(self: Any, data: bytes) -> None:
        written.append(data)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    # the writer's own thread dies of it, too
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    assert main(["train", str(tiny), "--output.folder", str(tmp_path / "run")]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "the tracker tensorboard has not taken the row of step" in warnings[0]
    assert "No space left on device" in warnings[0] and len(warnings) == 2


def test_secrets_of_the_environment_are_nowhere_in_a_run(tiny, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "OWN_API_KEY"):
        monkeypatch.setenv(name, KEY)
    run, file = tmp_path / "run", tmp_path / "told"
    assert main(["train", str(tiny), "--output.folder", str(run), *own(file)]) == 0
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    for path in [file, *run.rglob("*")]:
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_damaged_file_of_trackers_is_named(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(tiny), "--output.folder", str(run), "--train.epochs", "1"]) == 0
    (run / "trackers.json").write_text("{")
    assert main(["train", "--resume", str(run)]) == 2
    assert "trackers.json is damaged" in capsys.readouterr().err
