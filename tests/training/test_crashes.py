"""Runs that end early: a rank killed in a named phase, a rank that hangs, a launcher that is gone, a request to stop.

Whatever it was, nothing of the run lives on, and started again (by hand or by its launcher, also on fewer ranks) it
makes the losses of a run that nothing happened to.

    pytest tests/training/test_crashes.py -m "slow or not slow"      all phases and launchers, about ten minutes on two
    cores
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import forked
import psutil
import pytest
import torch
from launched import MPIRUN_OPTIONS, finish, losses, start, succeed, tell_tale, tiny_run, wait_for_step
from runner import free_port

from partial_fc import Checkpointer
from partial_fc.training.cli.main import main
from partial_fc.training.data.loader import Batch, BatchLoader
from partial_fc.training.errors import UserError
from partial_fc.training.faults import VARIABLE, Fault, Faults
from partial_fc.training.run import RunFolder

pytestmark = pytest.mark.timeout(400)  # several starts of two ranks each, on machines with other work

MARK = "PARTIAL_FC_TEST_MARK"
STEPS = 9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of three steps of two micro-batches each, saved every second step."""
    return tiny_run(tmp_path_factory.mktemp("tiny"), train={"epochs": 3, "checkpoint_steps": 2, "accumulation": 2})


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[tuple[float, ...]]:
    """The history of one process that nothing happens to."""
    assert main(["train", str(tiny), "--output.folder", str(tiny.parent / "alone")]) == 0
    return tell_tale(tiny.parent / "alone")


@pytest.fixture(scope="module")
def undisturbed(tiny: Path) -> list[tuple[float, ...]]:
    """The history of two ranks that nothing happens to."""
    out = tiny.parent / "undisturbed"
    forked.succeed("train", str(tiny), "--output.folder", str(out))
    history = tell_tale(out)
    assert [row[0] for row in history] == list(range(1, STEPS + 1))
    return history


def by_hand(tiny: Path, out: Path) -> str:
    return f"launch/torchrun.sh {tiny} --output.folder {out} --start_or_resume"


def ports(ranks: int = 2) -> dict[str, str]:
    return {"NPROC": str(ranks), "MASTER_PORT": str(free_port())}


@contextlib.contextmanager
def disturbed(command: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A launcher that is to end; afterwards no process that it has started lives."""
    mark = uuid.uuid4().hex
    process = start(command, **{MARK: mark}, **environment)
    try:
        yield process, mark
        deadline = time.monotonic() + 60
        while left := of_mark(mark):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.2)
    finally:
        for each in of_mark(mark):
            each.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def of_mark(mark: str) -> list[psutil.Process]:
    """What a launcher has started, however indirectly, and what lives of it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def can_be_used(port: str) -> bool:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return taken.connect_ex(("127.0.0.1", int(port))) != 0


# ---------------------------------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        ("usr1:data@step=1", 0),  # before the first step
        ("term:forward@step=5", 5),  # in the first micro-batch of two: the step is finished
        ("usr1:checkpoint@step=6", 6),  # while it saves, at the end of an epoch
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_exactly(tiny, alone, tmp_path, monkeypatch, capfd, fault, saved):
    out = tmp_path / "run"
    command = ["train", str(tiny), "--output.folder", str(out), "--start_or_resume"]
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setenv(VARIABLE, fault)
    assert main(command) == 75
    for number, handler in before.items():  # as in a process of its own
        signal.signal(number, handler)
    name = "SIGTERM" if fault.startswith("term") else "SIGUSR1"
    err = capfd.readouterr().err
    told = err.index("partial-fc: stop requested; finishing the step and saving\n")
    assert told < err.index(
        f"partial-fc: stopped after step {saved} ({name}), which is saved; continue with --resume {out}"
    )
    assert RunFolder(out).checkpointer().steps()[-1] == saved and len(losses(out)) == saved
    monkeypatch.delenv(VARIABLE)
    assert main(command) == 0
    assert "resuming after epoch" in capfd.readouterr().out
    assert tell_tale(out) == alone


@pytest.mark.slow
def test_asked_on_one_rank_all_save(tiny, undisturbed, tmp_path):
    out = tmp_path / "run"
    environment = ports()
    with disturbed(by_hand(tiny, out), PARTIAL_FC_FAULTS="usr1:backward@step=5,rank=1", **environment) as (process, _):
        code, _, err = finish(process)
    assert code == 1 and "exitcode: 75" in err
    assert err.count("partial-fc: stopped after step 5 (requested on another rank), which is saved") == 1, (
        "rank 0 speaks"
    )
    assert can_be_used(environment["MASTER_PORT"])
    assert RunFolder(out).checkpointer().steps()[-1] == 5
    assert "resuming after epoch 1, step 5" in forked.succeed("train", "--resume", str(out))
    assert tell_tale(out) == undisturbed


EVALUATED = ["--data.identities", "20", "--train.batch_size", "16", "--train.epochs", "1", "--output.log_every", "1"]


@pytest.mark.slow
def test_asked_during_the_evaluation(tmp_path):
    """What is lost is the evaluation, which the next start makes."""
    out = tmp_path / "run"
    command = " ".join(
        ["launch/torchrun.sh configs/quickstart.yaml --start_or_resume --output.folder", str(out), *EVALUATED]
    )
    with disturbed(command, PARTIAL_FC_FAULTS="term:evaluation@step=12,rank=1", **ports()) as (process, _):
        code, _, err = finish(process)
    assert code == 1 and "exitcode: 75" in err and "stopped as requested; all training steps are done and saved" in err
    assert not (out / "metrics.json").exists()
    history = tell_tale(out)
    assert "resuming after epoch 1, step 12" in succeed(command, **ports())
    assert tell_tale(out) == history and (out / "metrics.json").exists()


LAUNCHERS = {
    "torchrun": ("launch/torchrun.sh", signal.SIGTERM, 1),
    "elastic": ("launch/torchrun_elastic.sh", signal.SIGTERM, 1),
    "accelerate": ("launch/accelerate.sh configs/accelerate/cpu2.yaml", signal.SIGTERM, 1),
    "mpirun": ("launch/mpirun.sh", signal.SIGUSR1, 75),
    "deepspeed": ("launch/deepspeed.sh configs/deepspeed/zero2.json", signal.SIGTERM, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_asked_to_stop(tiny, tmp_path, launcher):
    """It passes the signal on and waits; its exit code is what docs/crashes.md says."""
    script, number, expected = LAUNCHERS[launcher]
    out, more = tmp_path / "run", ports()
    more.update(RANKS="2", MPIRUN_OPTIONS=MPIRUN_OPTIONS, DS_ACCELERATOR="cpu")
    more.update(DEEPSPEED_OPTIONS=f"--num_gpus 2 --master_port {free_port()}")
    # long enough to be met by the signal in the middle
    command = f"{script} {tiny} --train.epochs 200 --train.checkpoint_every 200 --output.folder {out} --start_or_resume"
    with disturbed(command, **more) as (process, _):
        wait_for_step(out, 4)
        asked = psutil.Process(process.pid)
        if launcher == "deepspeed":  # the command on one node passes nothing on; the process that it has started does
            (asked,) = (each for each in asked.children() if "deepspeed.launcher.launch" in each.cmdline())
        asked.send_signal(number)
        code, _, err = finish(process)
    assert code == expected, err[-2000:]
    saved = RunFolder(out).checkpointer().steps()[-1]
    assert f"partial-fc: stopped after step {saved} ({number.name}), which is saved" in err
    assert len(losses(out)) == saved, "all that was trained was saved"


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(tiny, undisturbed, tmp_path):
    out, environment = tmp_path / "run", ports()
    command = by_hand(tiny, out) + " --train.epochs 200 --train.checkpoint_every 200"
    with disturbed(command, **environment) as (process, mark):
        wait_for_step(out, 4)
        process.kill()
        process.communicate(timeout=150)  # ranks have its pipes: they have ended, too
        assert not of_mark(mark)
    assert can_be_used(environment["MASTER_PORT"])
    assert RunFolder(out).checkpointer().steps()[-1] == len(losses(out))


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_before_they_have_started(tiny, undisturbed, tmp_path):
    """No rank lives on with the port and the store that the next run uses."""
    out, environment = tmp_path / "run", ports()
    with disturbed(by_hand(tiny, out), **environment) as (process, mark):
        while len(of_mark(mark)) < 3:  # the launcher and its ranks, which import torch for seconds
            time.sleep(0.01)
        process.kill()
        _, err = process.communicate(timeout=150)
        assert not of_mark(mark)
    assert "partial-fc: stopped before the start: its launcher has exited" in err
    assert not out.exists()
    succeed(by_hand(tiny, out), **environment)
    assert tell_tale(out) == undisturbed


# ---------------------------------------------------------------------------------------------------- killed


def killed(tiny: Path, out: Path, fault: str, ranks: int = 2, **settings: str) -> tuple[int, int]:
    """A run with that fault until its launcher ends: (step that was logged last, step that was saved last)."""
    environment = ports(ranks)
    command = by_hand(tiny, out) + "".join(f" --{name} {value}" for name, value in settings.items())
    with disturbed(command, PARTIAL_FC_FAULTS=fault, **environment) as (process, _):
        code, _, err = finish(process)
    assert code == 1 and "exitcode: -9" in err, err[-3000:]
    assert can_be_used(environment["MASTER_PORT"])
    return len(losses(out)), RunFolder(out).checkpointer().steps()[-1]


@pytest.mark.slow
def test_killed_in_backward_and_started_again(tiny, undisturbed, tmp_path):
    out = tmp_path / "run"
    logged, saved = killed(tiny, out, "kill:backward@step=6,rank=1")
    assert (logged, saved) == (5, 4)
    told = forked.succeed("train", "--resume", str(out))
    assert "resuming after epoch 1, step 4" in told and "1 steps that were logged after it are computed again" in told
    assert tell_tale(out) == undisturbed


GRID = [
    ("data", 4, 3), ("forward", 4, 3), ("backward", 5, 4), ("optimizer", 6, 4), ("checkpoint", 4, 3), ("checkpoint", 6, 4),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("phase", "step", "saved"), GRID)
def test_killed_in_each_phase(tiny, undisturbed, tmp_path, phase, step, saved, rank):
    """By hand; also with asynchronous checkpoints and processes that load images, which must not stay."""
    out = tmp_path / "run"
    settings = {"train.asynchronous_checkpoints": "true", "data.workers": "1"} if rank else {}
    found = killed(tiny, out, f"kill:{phase}@step={step},rank={rank}", **settings)
    # an asynchronous save may be under way when the rank dies; that of the step itself is never complete
    assert found[1] == saved or (rank and found[1] < saved)
    assert f"resuming after epoch {saved // 3 if not rank else ''}" in succeed(by_hand(tiny, out), **ports())
    assert tell_tale(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "step", "saved"), GRID)
def test_killed_in_each_phase_under_an_elastic_launcher(tiny, undisturbed, tmp_path, phase, step, saved):
    """The launcher starts the ranks again itself, and ends well."""
    out = tmp_path / "run"
    fault = f"kill:{phase}@step={step},rank=1,once={tmp_path / 'happened'}"
    with disturbed(f"launch/torchrun_elastic.sh {tiny} --output.folder {out}", NPROC="2", PARTIAL_FC_FAULTS=fault) as (
        process,
        _,
    ):
        code, told, err = finish(process, 200)
    assert code == 0, err[-3000:]
    assert (tmp_path / "happened").exists() and f", step {saved}" in told
    assert tell_tale(out) == undisturbed


@pytest.mark.slow
def test_fewer_ranks(tiny, tmp_path):
    """Three ranks crash; two go on with the losses of two that start from the same checkpoint and that nothing happens
    to."""
    out, twin = tmp_path / "run", tmp_path / "twin"
    assert killed(tiny, out, "kill:optimizer@step=6,rank=2", ranks=3)[1] == 4
    shutil.copytree(out, twin)
    # the crashed one crashes again, on two ranks
    assert killed(tiny, out, "kill:forward@step=8,rank=0") == (7, 6)
    for folder in (out, twin):
        assert "resuming after epoch" in succeed(by_hand(tiny, folder), **ports())
    assert tell_tale(out) == tell_tale(twin) and len(losses(out)) == STEPS


@pytest.mark.slow
def test_three_ranks_go_on_with_the_same_last_digits(tiny, tmp_path):
    """Three ranks add up in an order that DDP chooses after its first backward, which a resumed run has not made."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    forked.succeed("train", str(tiny), "--output.folder", str(whole), ranks=3)
    assert killed(tiny, out, "kill:forward@step=7,rank=2", ranks=3) == (6, 6)
    succeed(by_hand(tiny, out), **ports(3))
    assert tell_tale(out) == tell_tale(whole) and len(losses(out)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("what", ["agent", "agent and rank"])
def test_elastic_nodes_go_on_with_fewer(tiny, tmp_path, what):
    """Two agents of a rank each on one machine; that which does not hold the meeting point is killed, alone or with its
    rank."""
    out, endpoint = tmp_path / "run", f"localhost:{free_port()}"
    command = f"launch/torchrun_elastic.sh {tiny} --train.epochs 60 --train.checkpoint_every 200 --output.folder {out}"
    environment = {"NNODES": "1:2", "NPROC": "1", "RDZV_ENDPOINT": endpoint}
    with disturbed(command, **environment) as (first, _):
        deadline = time.monotonic() + 60
        while can_be_used(endpoint.split(":")[1]):  # it listens: the meeting point is its
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with disturbed(command, **environment) as (second, mark):
            wait_for_step(out, 4)
            doomed = [each for each in of_mark(mark) if what != "agent" or each.pid == second.pid]
            for process in doomed:
                process.kill()
            second.communicate(timeout=150)
        code, told, err = finish(first, 250)
    assert code == 0, err[-3000:]
    assert "1 on cpu" in (out / "report.html").read_text(), "one rank has finished it"
    assert "resuming after epoch" in told
    assert [row[0] for row in tell_tale(out)] == list(range(1, 181))


# ---------------------------------------------------------------------------------------------------- stopped


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_at_the_timeout(tiny, undisturbed, tmp_path):
    """The other rank ends at the process group's timeout; the launcher kills the one that hangs, half a minute
    later."""
    out, environment = tmp_path / "run", ports()
    command = by_hand(tiny, out) + " --train.timeout 5 --train.asynchronous_checkpoints true"
    with disturbed(command, PARTIAL_FC_FAULTS="stop:forward@step=6,rank=1", **environment) as (process, _):
        code, _, err = finish(process)
    assert code == 1 and "exitcode: 1)" in err.replace("exitcode: 1 ", "exitcode: 1)"), err[-3000:]
    assert can_be_used(environment["MASTER_PORT"])
    succeed(by_hand(tiny, out), **ports())
    assert tell_tale(out) == undisturbed


def timeout_of_the_writers(rank: int, world: int, folder: str) -> float:
    group = Checkpointer(folder, asynchronous=True, timeout=7.0)._group
    assert group is not None
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def test_an_asynchronous_save_has_the_timeout_of_the_run(ranks, tmp_path):
    assert ranks(2).run(timeout_of_the_writers, str(tmp_path)) == [7.0, 7.0]


# ---------------------------------------------------------------------------------------------------- faults themselves


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "kill:lunch@step=1",
        "burn:data@step=1",
        "full:forward@step=1",
        "kill:data@stride=1",
        "kill:data@step=x",
        "kill:data@step",
    ],
)
def test_what_is_no_fault_is_refused(text, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"usr1:data@step=99; {text}")
    with pytest.raises(UserError, match=f"{VARIABLE} has an invalid fault: '{text}'; write ACTION:PHASE@key=value"):
        Faults.of_environment(0)


def test_faults_happen_once_on_their_rank_and_at_their_step(monkeypatch, tmp_path):
    once = tmp_path / "once"
    monkeypatch.setenv(VARIABLE, f"usr1:data@step=3,rank=1; usr1:forward@step=3,rank=1,once={once}; usr1:data@step=3")
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        faults = Faults.of_environment(1)
        for _ in range(2):
            for phase, step in (("data", 2), ("data", 3), ("forward", 2), ("forward", 3), ("data", 4)):
                faults.at(phase, step)
        assert len(seen) == 2 and once.exists()
        faults = Faults.of_environment(1)  # of a run started again
        faults.at("forward", 3)
        assert len(seen) == 2
        faults.at("data", 3)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert Fault.parse("stop:backward@step=2") == Fault("stop", "backward", 2)


def test_batches_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv(VARIABLE, "unreadable:data@batch=1;unreadable:data@batch=2,images=2")
    faults = Faults.of_environment(0)
    left = []
    for number in range(4):
        batch = Batch(torch.ones(5, 1, 2, 2), torch.arange(5), torch.arange(10, 15), [])
        spoilt = faults.make_unreadable(batch, number)
        assert spoilt is not None and len(spoilt.images) == len(spoilt.labels) == len(spoilt.indices) == 5 - len(
            spoilt.unreadable
        )
        left.append(spoilt.labels.tolist())
    assert left == [[0, 1, 2, 3, 4], [], [2, 3, 4], [0, 1, 2, 3, 4]]
    assert faults.make_unreadable(None, 1) is None


def test_a_full_disk_ends_a_run_and_it_goes_on(tiny, alone, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    command = ["train", str(tiny), "--output.folder", str(out), "--start_or_resume"]
    monkeypatch.setenv(VARIABLE, "full:checkpoint@step=4")
    assert main(command) == 2
    assert "cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)
    assert RunFolder(out).checkpointer().steps() == [2, 3]
    assert main(command) == 0
    assert tell_tale(out) == alone


# -------------------------------------------------------------------------------------------------- what a crash leaves


def test_a_folder_whose_claim_was_killed_is_free(tmp_path):
    run = RunFolder(tmp_path / "run")

    def die(path: Path) -> None:
        path.write_text("half a sett")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.claim(die)
    with pytest.raises(UserError, match="is not a run folder"):
        run.check_run()
    run.claim(lambda path: path.write_text("seed: 1\n"))
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"
    for again in (run.check_free, lambda: run.claim(lambda path: None)):
        with pytest.raises(UserError, match="is in use"):
            again()


def test_of_two_that_claim_a_folder_one_gets_it(tmp_path):
    run = RunFolder(tmp_path / "run")

    def another_is_first(path: Path) -> None:
        path.write_text("seed: 2\n")
        (run.path / "config.yaml").write_text("seed: 1\n")

    with pytest.raises(UserError, match="is in use by another run that has just started"):
        run.claim(another_is_first)
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"


def test_a_line_of_the_history_that_was_cut_short(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_history({"step": step, "loss": 0.5})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in run.history()] == [1, 2, 3]
    assert run.rewind_history(1) == 2
    run.append_history({"step": 2, "loss": 0.25})
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


# ------------------------------------------------------------------------------------------- processes that load images


def test_loading_processes_outlive_signals_to_the_whole_group(tmp_path):
    from partial_fc.training.data import FolderIdentities

    tiny_run(tmp_path)
    loader = BatchLoader(FolderIdentities(tmp_path / "images", 16, 3), batch_size=4, workers=2)
    before = set(psutil.Process().children())
    batches = loader.iterate()
    seen = [next(batches).indices for _ in range(2)]  # both have begun
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    for _ in range(2):
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, number)
    seen += [batch.indices for batch in batches]
    assert sorted(torch.cat(seen).tolist()) == list(range(48))
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
