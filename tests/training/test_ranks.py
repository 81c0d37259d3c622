"""Rank and world size are found from each launcher's variables; contradictions print one line on every rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from common import args
from launched import MPIRUN_OPTIONS, OTHERS, RANK_VARIABLES, ROOT, environment, finish, start
from runner import free_port

from partial_fc.training import ranks as found
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import HeadConfig, to_config
from partial_fc.training.engine import group_options
from partial_fc.training.errors import UserError

TORCH = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
STEP |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu3", "SLURM_TASKS_PER_NODE": "4,2"}
MISSPELLED = "the environment variable PARTIAL_FC_KERNEL is not known; spell it PARTIAL_FC_KERNELS, or unset it"


@pytest.fixture
def variables(monkeypatch):
    """Sets these variables, and of all launchers' only these; undone afterwards, with what the code sets."""
    before = dict(os.environ)
    for name in before:
        if name in RANK_VARIABLES or name.startswith(OTHERS):
            del os.environ[name]
    yield lambda given: os.environ.update(given)
    os.environ.clear()
    os.environ.update(before)


def without_exchange(monkeypatch):
    monkeypatch.setattr(found, "_exchange", lambda what, value: [value])


# ---------------------------------------------------------------------------------------------------- found


def test_no_launcher_is_one_process(variables):
    variables({})
    found.find_ranks()
    assert not set(RANK_VARIABLES) & set(os.environ)
    assert found.shows_errors()


def test_the_device_of_a_run_is_named(variables, monkeypatch):
    variables({})
    assert found.device_line(True) == "training on the CPU, as --train.cpu says"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found.device_line(False) == f"no GPU found (torch {torch.__version__}): training on the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    assert found.device_line(False) == "training on cuda:1 (card 1)"
    variables({"WORLD_SIZE": "3"})
    assert found.device_line(False) == "training on cuda:1 (card 1), and 2 more ranks"


def test_slurms_variables_become_torchs(variables, monkeypatch):
    variables(STEP)
    without_exchange(monkeypatch)
    found.find_ranks()
    want = {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu3",
        "MASTER_PORT": "12390",
    }
    assert {name: os.environ[name] for name in RANK_VARIABLES} == want
    assert not found.shows_errors()


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("4(x2),1", [4, 4, 1]), ("2,3(x2)", [2, 3, 3]), ("8", [8]), ("nonsense", [None]), ("", [None])],
    ids=str,
)
def test_tasks_of_each_node(variables, text, tasks):
    for node, count in enumerate(tasks):
        variables({"SLURM_NODEID": str(node), "SLURM_TASKS_PER_NODE": text})
        assert found._tasks_of_node() == count
    variables({"SLURM_NODEID": str(len(tasks))})
    assert found._tasks_of_node() is None


def test_the_step_goes_before_the_job(variables, monkeypatch):
    variables(
        {
            **STEP,
            "SLURM_NTASKS": "64",
            "SLURM_STEP_NUM_TASKS": "6",
            "SLURM_STEP_NODELIST": "gpu4",
            "MASTER_PORT": "1234",
        }
    )
    without_exchange(monkeypatch)
    found.find_ranks()
    assert (os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("6", "gpu4", "1234")


@pytest.mark.parametrize(
    "given",
    [
        {k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"},  # a batch script without srun
        {**STEP, "SLURM_NTASKS": "1"},  # an interactive shell
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["batch script", "interactive", "mpirun of one"],
)
def test_one_process_is_left_alone(variables, given):
    variables(given)
    found.find_ranks()
    assert "RANK" not in os.environ and found.shows_errors()


def test_a_launcher_within_srun_has_the_say(variables, monkeypatch):
    """srun starts torchrun on each node, and that the ranks: Slurm's numbers are the nodes'."""
    variables(
        {
            **TORCH,
            **STEP,
            "RANK": "40",
            "WORLD_SIZE": "48",
            "LOCAL_RANK": "7",
            "LOCAL_WORLD_SIZE": "8",
            "TORCHELASTIC_RUN_ID": "x",
        }
    )
    without_exchange(monkeypatch)
    found.find_ranks()
    assert os.environ["RANK"] == "40"


def test_srun_with_pmi_is_srun(variables):
    variables({**STEP, "PMI_SIZE": "6", "PMI_RANK": "5"})
    assert found._launcher() == "srun"
    variables({"PMI_SIZE": "12"})  # MPICH's mpirun starts its proxies with srun, one a node
    assert found._launcher() == "mpirun"
    variables({"OMPI_COMM_WORLD_SIZE": "6"})
    assert found._launcher() == "mpirun"


# ---------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**TORCH, "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        ({**TORCH, "RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2; ranks count from 0"),
        ({**TORCH, "RANK": "first"}, "RANK is 'first'; it must be a number"),
        ({**TORCH, "RANK": "-1"}, "RANK is '-1'; it must be a number"),
        ({**TORCH, "WORLD_SIZE": "0"}, "RANK is 0, but WORLD_SIZE is 0"),
        (
            {**TORCH, "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2",
        ),
        ({**TORCH, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but WORLD_SIZE is 4"),
        ({**STEP, "SLURM_LOCALID": "x"}, "its variable for LOCAL_RANK is 'x'"),
        (
            {**STEP, "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[3-4]", "PATH": ""},
            "first host of Slurm's node list 'gpu[3-4]'",
        ),
        ({"PARTIAL_FC_KERNEL": "off"}, MISSPELLED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contradiction_is_one_line(variables, capsys, tmp_path, given, expected):
    variables(given)
    assert main(["train", str(ROOT / "configs/quickstart.yaml"), "--output.folder", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == (1 if found.shows_errors() else 0) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=re.escape(expected)):
        found.find_ranks()


def test_the_variables_of_the_project_are_known():
    """Each that the package reads can be misspelled."""
    text = "".join(path.read_text() for path in (ROOT / "partial_fc").rglob("*.py"))
    assert set(re.findall(r"PARTIAL_FC_[A-Z]{2,}", text)) >= set(found.VARIABLES)
    assert set(re.findall(r'"(PARTIAL_FC_[A-Z]{2,})"', text)) == set(found.VARIABLES)


def test_a_rank_finds_out_that_its_launcher_is_gone(variables, capsys):
    """Also one that was never its child, or that nobody has waited for."""
    variables({"TORCHELASTIC_RUN_ID": "none", found.LAUNCHER: str(os.getpid())})
    assert not found.launcher_has_exited()
    with subprocess.Popen([sys.executable, "-c", ""]) as launcher:
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)
        variables({found.LAUNCHER: str(launcher.pid)})
        assert found.launcher_has_exited(), "a zombie"
    assert found.launcher_has_exited()
    assert main(["train"]) == 75
    assert "stopped before the start: its launcher has exited" in capsys.readouterr().err
    del os.environ["TORCHELASTIC_RUN_ID"]
    assert not found.launcher_has_exited(), "started by hand within a run"


def test_plan_needs_no_ranks(variables, capsys):
    variables({"RANK": "1"})
    assert main(["plan", "--num_classes", "1000", "--batch_size", "8"]) == 0


def test_replicas_divide_the_ranks():
    with pytest.raises(UserError, match="center loss is split over all ranks"):
        to_config(train_parser(), ["--head.replicas", "2", "--center.weight", "0.1"])
    with pytest.raises(UserError, match="does not divide the 1 ranks"):
        HeadConfig(replicas=2).build(4, torch.ones(3), 0, torch.device("cpu"))
    with pytest.raises(UserError, match="give at least 1"):
        HeadConfig(replicas=0).check()


# ----------------------------------------------------------------------------------------------- the same on every rank


def told(rank: int, world: int, port: int, given: list[dict[str, str]], gpus: list[int] | None) -> str:
    """What a rank is told that has these variables, and sees so many GPUs."""
    before = dict(os.environ)
    os.environ.update(MASTER_PORT=str(port), **given[rank])
    gone = [name for name, value in given[rank].items() if not value]
    for name in gone:
        del os.environ[name]
    taken = mock.Mock()
    cuda = (
        mock.patch.multiple(
            torch.cuda, is_available=lambda: gpus[rank] > 0, device_count=lambda: gpus[rank], set_device=taken
        )
        if gpus
        else mock.MagicMock()
    )
    try:
        with (
            mock.patch.object(found.dist, "is_initialized", return_value=False),
            mock.patch.object(found, "_stores", []),
            cuda,
        ):
            found.find_ranks()
            found.check_devices(cpu=False)
            assert not gpus or taken.call_args == mock.call(rank)  # the current device before anything is on one
    except UserError as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return "fine"


def step(rank: int, **more: str) -> dict[str, str]:
    hand = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "")
    return {
        **STEP,
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_TASKS_PER_NODE": "2",
        **hand,
        **more,
    }


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ([{}, {}], None, "fine"),
        # the agent of the second node was started when that of the first had restarted its rank
        ([{"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "0"}], None, "fine"),
        ([{}, {"WORLD_SIZE": "3"}], None, "WORLD_SIZE is 2 on rank 0, but 3 on rank 1"),
        ([step(0), step(1)], None, "fine"),
        ([step(0, RANK="0"), step(1, RANK="1", WORLD_SIZE="2")], None, "fine"),
        ([step(0, RANK="0"), step(1, RANK="0")], None, "RANK is set to 0, and Slurm says 1 (rank 1 of 2); unset RANK"),
        (
            [step(0, LOCAL_RANK="0"), step(1, LOCAL_RANK="0")],
            None,
            "LOCAL_RANK is set to 0, and Slurm says 1 (rank 1 of 2); unset LOCAL_RANK",
        ),
        ([{}, {"PARTIAL_FC_KERNEL": "off"}], None, MISSPELLED),
        ([{}, {"PARTIAL_FC_TEST_MARK": "of a test"}], None, "fine"),
        ([{}, {}], [2, 2], "fine"),
        ([{}, {}], [1, 1], "LOCAL_RANK is 1 on rank 1, which sees 1 GPU; start as many processes"),
        ([{}, {}], [2, 0], "mixed devices: rank 1 sees no GPU, but rank 0 does"),
        ([{}, {}], [0, 2], "mixed devices: rank 0 sees no GPU, but rank 1 does"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_one_rank_sees_all_are_told(ranks, given, gpus, expected):
    here = [
        {name: "" for name in os.environ if name.startswith(OTHERS)} | {"MASTER_ADDR": "127.0.0.1"} | each
        for each in given
    ]
    answers = ranks(2).run(told, free_port(), here, gpus)
    assert len(set(answers)) == 1 and answers[0].startswith(expected), answers


def test_the_cpu_needs_no_gpus(variables):
    variables({**TORCH, "WORLD_SIZE": "2"})
    found.check_devices(cpu=True)


# ---------------------------------------------------------------------------------------------------- MPI

SHOW = """
import os, torch, torch.distributed as dist
from partial_fc.engines import mpi
mpi.init_process_group("gloo")
total = torch.ones(2)
dist.all_reduce(total)
print(*(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")), int(total[0]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def mpirun(*command: str, **more: str) -> subprocess.Popen[str]:
    return start(["mpirun", *MPIRUN_OPTIONS.split(), "-n", "2", sys.executable, *command], **more)


@pytest.mark.slow
def test_ones_own_loop_finds_its_ranks_by_mpi():
    code, out, err = finish(mpirun("-c", SHOW))
    assert code == 0, err
    assert sorted(out.splitlines()) == ["0 2 0 2 127.0.0.1 2", "1 2 1 2 127.0.0.1 2"]


def test_tasks_of_slurm_without_mpi_are_not_worlds_of_one():
    """srun of an Open MPI that knows nothing of it; a step of one task in a job of several is one process."""
    job = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    for step in ({}, {"SLURM_STEP_NUM_TASKS": "2"}):
        code, _, err = finish(start([sys.executable, "-c", SHOW], **job, **step))
        assert code == 1
        (line,) = [line for line in err.splitlines() if line.startswith("RuntimeError: ")]
        assert "Slurm has 2 tasks, but MPI sees a world of 1" in line and "launch/slurm_own_loop.sbatch" in line
    code, out, err = finish(start([sys.executable, "-c", SHOW], **job, SLURM_STEP_NUM_TASKS="1"))
    assert (code, out) == (0, "0 1 0 1 127.0.0.1 1\n"), err


@pytest.mark.slow
def test_variables_that_mpi_contradicts_are_refused_on_all_ranks():
    told = "from partial_fc.training import ranks\ntry:\n    ranks.find_ranks()\nexcept ranks.UserError as error:\n    print(error)"
    code, out, err = finish(mpirun("-c", told, RANK="0", WORLD_SIZE="2"))
    assert code == 0, err
    assert out.splitlines() == 2 * ["RANK is set to 0, and MPI says 1 (rank 1 of 2); unset RANK"]


def alone(tmp_path: Path, **more: str) -> str:
    """What `partial-fc train` says in a process that an mpirun of two is said to have started."""
    command = [
        sys.executable,
        *args("-m partial_fc train configs/quickstart.yaml --output.folder"),
        str(tmp_path / "run"),
    ]
    code, out, err = finish(start(command, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", **more))
    assert code == 2 and out == "" and not (tmp_path / "run").exists()
    lines = [line for line in err.splitlines() if line.startswith("partial-fc: error: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_a_world_of_one_under_mpirun_is_another_mpi(tmp_path):
    assert "mpirun started 2 processes, but MPI sees a world of 1: mpi4py uses another MPI (Open MPI" in alone(tmp_path)


@pytest.mark.slow
def test_mpi4py_is_missing(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'mpi4py'\", name='mpi4py')\n"
    )
    where = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    assert "pip install 'partial_fc[mpi]'" in alone(tmp_path, PYTHONPATH=where)


# ---------------------------------------------------------------------------------------------------- the timeout


@pytest.mark.parametrize("seconds", [20.0, 600.0, 1800.0])
def test_the_group_gets_the_timeout_of_the_settings(seconds):
    """Also one that equals a default of Accelerate, which passes on only what differs from that."""
    passed_on = group_options(seconds).to_kwargs()["timeout"]
    assert timedelta(0) <= passed_on - timedelta(seconds=seconds) < timedelta(milliseconds=1)
