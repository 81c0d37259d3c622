"""Ranks on Ray: options and words here; with `-m slow` on a cluster of two nodes of one CPU each, on this machine.

What ranks on Ray train equals what two ranks of any launcher train, also after one is killed, the run is asked to stop,
or a node is lost and fewer workers are left.

    pytest tests/engines/test_ray.py -m "slow or not slow"      some 12 minutes on two cores
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
from launched import ROOT, finish, logged, losses, start, succeed, tell_tale, tiny_run, wait_for_step

from partial_fc.engines import ray as on_ray
from partial_fc.engines.ray import Board, main, parse
from partial_fc.training.run import RunFolder

LONG = ("--train.epochs", "40")  # time enough for what happens in the middle of it

pytestmark = pytest.mark.timeout(1800)  # several starts of Ray's processes, on machines with other work


# ---------------------------------------------------------------------------------------------------- options


def test_the_command_is_what_follows_the_options():
    options, command = parse(
        [
            "--workers",
            "4:8",
            "--gpus",
            "1",
            "--cpus",
            "6",
            "--wait",
            "60",
            "-m",
            "partial_fc",
            "train",
            "x.yaml",
            "--check",
        ]
    )
    assert options.workers == (4, 8) and (options.cpus, options.gpus, options.restarts, options.wait) == (6, 1, 3, 60)
    assert command == ["-m", "partial_fc", "train", "x.yaml", "--check"]
    options, command = parse(["--workers", "2", "train.py", "-m", "--workers", "3"])
    assert options.workers == (2, 2) and command == ["train.py", "-m", "--workers", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workers 0", "--workers 0: give a number of at least 1, or MIN:MAX such as 4:8"),
        ("--workers 3:2", "--workers 3:2: give a number of at least 1, or MIN:MAX such as 4:8"),
        ("--workers two", "--workers two: give a number of at least 1, or MIN:MAX such as 4:8"),
        ("--workers 1 --gpus 2", "--gpus 2: a rank uses one GPU or none; give 1 or 0"),
        ("--workers 1 --restarts -1", "--restarts -1: give at least 0"),
        ("--workers 1 --cpus nan", "--cpus nan: give at least 0"),
        ("--workers 1 --wait 0", "--wait 0.0: give at least 1"),
    ],
)
def test_options_that_are_not_possible(arguments, message, capsys):
    assert main([*arguments.split(), "train.py"]) == 2
    assert capsys.readouterr().err == f"partial-fc on Ray: error: {message}\n"


def test_a_misspelled_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--workers", "1", "--restart", "3", "train.py"])
    assert stop.value.code == 2 and "--restart" in capsys.readouterr().err


def test_ray_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(on_ray, "OLDEST", "999")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.60.0")
    assert main(["--workers", "1", "train.py"]) == 2
    assert "ray 2.60.0 is too old: 999 or newer is required" in capsys.readouterr().err

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert main(["--workers", "1", "train.py"]) == 2
    assert capsys.readouterr().err == "partial-fc on Ray: error: Ray is not installed; pip install 'partial_fc[ray]'\n"


def test_the_board_tells_each_thing_once(monkeypatch):
    board = Board()
    assert board.news() == ("", False, None), "no worker has asked"
    assert not board.asked()
    board.say("a\n")
    board.say("b\n")
    assert board.news() == ("a\nb\n", True, None) and board.news() == ("", True, None)
    board.stop()
    assert board.asked()
    now = time.monotonic()
    monkeypatch.setattr(on_ray.time, "monotonic", lambda: now + on_ray.SILENCE + 1)
    board.refuse("a mistake")
    assert board.news() == ("", False, "a mistake")


def test_a_rank_dies_with_its_worker(tmp_path):
    """A worker, played by a process that is killed, leaves no rank behind."""
    (tmp_path / "rank.py").write_text("import os, sys, time; print(os.getpid(), flush=True); time.sleep(300)")
    worker = (
        "import os, subprocess, sys; from partial_fc.engines.ray import DIE_WITH_PARENT as code; "
        "subprocess.run([sys.executable, '-c', code, str(os.getpid()), sys.argv[1]])"
    )
    process = start([sys.executable, "-c", worker, str(tmp_path / "rank.py")])
    assert process.stdout is not None
    rank = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate(timeout=60)
    rank.wait(60)


# ---------------------------------------------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each, and a head with none."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: it has sockets
    variables = {
        "RAY_TMPDIR": folder,
        "HOME": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "600",
        "RAY_agent_register_timeout_ms": "600000",
        "PYTHONPATH": str(ROOT),
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    from ray.cluster_utils import Cluster  # reads them

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes_of_ranks = [made.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    made.shutdown()
    del os.environ["RAY_ADDRESS"]
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of three steps, saved every second step."""
    return tiny_run(tmp_path_factory.mktemp("tiny"), train={"epochs": 3, "checkpoint_steps": 2})


@pytest.fixture(scope="module")
def history(tiny: Path) -> list[tuple[float, ...]]:
    """Of two ranks that nothing happens to, of another launcher."""
    out = tiny.parent / "undisturbed"
    forked.succeed("train", str(tiny), "--output.folder", str(out))
    return tell_tale(out)


@pytest.fixture(scope="module")
def long_run(tiny: Path) -> Path:
    """The folder of two ranks of another launcher that nothing happens to, for 40 epochs."""
    out = tiny.parent / "whole"
    forked.succeed("train", str(tiny), "--output.folder", str(out), *LONG)
    return out


def on_workers(tiny: Path, out: Path, *settings: str, options: str = "", workers: str = "2") -> dict[str, Any]:
    """The launch file with these settings and options, as arguments of `start`."""
    command = ["launch/ray.sh", str(tiny), "--output.folder", str(out), *settings]
    return {
        "command": command,
        "WORKERS": workers,
        "RAY_OPTIONS": f"--storage {tiny.parent / 'ray'} --wait 1200 {options}",
    }


@pytest.mark.slow
def test_ranks_on_ray_train_what_others_train(cluster, tiny, history):
    out = tiny.parent / "out"
    told = succeed(**on_workers(tiny, out), timeout=1500)
    assert told.count("Results are in") == 1
    assert tell_tale(out) == history


@pytest.mark.slow
def test_a_rank_is_killed_and_ray_starts_all_of_them_again(cluster, tiny, history):
    out = tiny.parent / "killed"
    fault = f"kill:backward@step=6,rank=1,once={tiny.parent / 'once'}"
    told = succeed(**on_workers(tiny, out), PARTIAL_FC_FAULTS=fault, timeout=1500)
    assert re.search(r"partial-fc on Ray: rank 1 of 2 \(on .*\) was killed by SIGKILL", told), told[-3000:]
    assert "resuming after epoch 1, step 4" in told
    assert tell_tale(out) == history


@pytest.mark.slow
def test_a_run_on_ray_is_asked_to_stop_and_goes_on(cluster, tiny, long_run):
    out = tiny.parent / "asked"
    process = start(**on_workers(tiny, out, *LONG))
    try:
        wait_for_step(out, 4, timeout=1500)
        process.send_signal(signal.SIGTERM)
        code, _, err = finish(process, 1500)
    finally:
        if process.poll() is None:
            process.kill()
    saved = RunFolder(out).checkpointer().steps()[-1]
    # one of the ranks may get the signal a step before the other
    assert code == 75 and f"partial-fc: stopped after step {saved} (" in err and "which is saved" in err, err[-3000:]
    assert saved == len(losses(out)) < len(losses(long_run))
    succeed(**on_workers(tiny, out, *LONG), timeout=1500)
    assert logged(out) == logged(long_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "options", "workers", "message"),
    [
        (["--train.batch_size", "2"], "", "2", "partial-fc: error: --train.batch_size 2 leaves fewer than 2 images"),
        ([], "--wait 5", "7", "no workers within 5 s: asked for 7 workers with 1 CPUs each; the cluster has 2 CPUs ("),
    ],
    ids=["setting", "workers"],
)
def test_a_mistake_is_one_line(cluster, tiny, settings, options, workers, message):
    out = tiny.parent / "mistake"
    code, _, err = finish(start(**on_workers(tiny, out, *settings, options=options, workers=workers)), 1500)
    assert code == 2 and err.count(message) == 1, err[-3000:]
    assert not out.exists()


@pytest.mark.slow
def test_the_example_goes_on_after_a_worker_is_killed(cluster, tmp_path):
    """Ray's actor itself is killed, when an epoch has been saved."""

    def of_output(told: str) -> dict[str, str]:
        return dict(re.findall(r"epoch (\d): (loss [\d.]+ on \d workers)", told))

    arguments = ["4", "300", "2"]
    whole = succeed([sys.executable, "examples/ray_train.py", str(tmp_path / "whole"), *arguments], timeout=1500)
    process = start([sys.executable, "examples/ray_train.py", str(tmp_path / "killed"), *arguments])
    deadline = time.monotonic() + 1500
    while not list((tmp_path / "killed").glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = [each for each in psutil.process_iter() if each.cmdline()[:1] == ["ray::RayTrainWorker"]]
    mine = [each for each in workers if each.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]]
    mine[-1].kill()
    code, out, err = finish(process, 1500)
    assert code == 0, err[-3000:]
    assert len(of_output(whole)) == 4
    arrived = r"complete, Ray has \{'epoch': 4, 'workers': 2, 'loss': ([\d.]+)\}"
    (loss,) = re.findall(arrived, whole)
    assert of_output(whole)["4"] == f"loss {float(loss):.6f} on 2 workers" and re.findall(arrived, out) == [loss]
    assert {**of_output(whole), **of_output(out + err)} == of_output(whole)
    assert "complete" in out and (tmp_path / "killed" / "checkpoints" / "step-000000004" / "manifest.json").exists()
    assert len(re.findall("Started training worker group", out + err)) == 2, "started again once, by the kill alone"


@pytest.mark.slow
def test_a_node_is_lost_and_fewer_workers_go_on(cluster, tiny, long_run):
    """The last test: the cluster has one node less afterwards."""
    out = tiny.parent / "elastic"
    process = start(**on_workers(tiny, out, *LONG, workers="1:2"))
    try:
        wait_for_step(out, 4, timeout=1500)
        cluster.remove_node(cluster.nodes_of_ranks[1], allow_graceful=False)
        code, _, err = finish(process, 1500)
    finally:
        if process.poll() is None:
            process.kill()
    assert code == 0, err[-3000:]
    (saved,) = (int(step) for step in re.findall(r"resuming after epoch .*step (\d+)", err))
    assert [row["step"] for row in RunFolder(out).history()] == list(range(1, 121))
    assert tell_tale(out)[:saved] == tell_tale(long_run)[:saved], "steps that were saved by two"
    assert tell_tale(out)[-1] != tell_tale(long_run)[-1], "the steps of one rank, with the batch of one"
