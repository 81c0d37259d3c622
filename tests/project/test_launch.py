"""The launch files, each run on two CPU processes: all give the history that `accelerate launch` gives. Slurm is played
by a script."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import MPIRUN_OPTIONS, ROOT, finish, start, succeed, succeed_together, tell_tale, tiny_run
from runner import free_port

pytestmark = pytest.mark.timeout(400)  # two or three starts of two ranks each, on machines with other work

# ---------------------------------------------------------------------------------------------------- one node


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def accelerated(tiny) -> list[tuple[float, ...]]:
    """What the others must equal."""
    out = tiny.parent / "accelerate"
    succeed(f"launch/accelerate.sh configs/accelerate/cpu2.yaml {tiny} --output.folder {out}")
    history = tell_tale(out)
    assert [row[0] for row in history] == [1, 2, 3] and len({row[1] for row in history}) == 3
    return history


def test_torchrun(tiny, accelerated):
    out = tiny.parent / "torchrun"
    succeed(f"launch/torchrun.sh {tiny} --output.folder {out}", NPROC="2", MASTER_PORT=str(free_port()))
    assert tell_tale(out) == accelerated


@pytest.mark.slow
def test_torchrun_on_two_nodes_of_one_rank(tiny, accelerated):
    out, where = tiny.parent / "torchrun_nodes", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = f"launch/torchrun.sh {tiny} --output.folder {out}"
    nodes = [start(command, NPROC="1", NNODES="2", NODE_RANK=str(node), **where) for node in range(2)]
    succeed_together(nodes)
    assert tell_tale(out) == accelerated


@pytest.mark.slow
def test_accelerate_on_two_nodes_of_one_rank(tiny, accelerated):
    out, port = tiny.parent / "accelerate_nodes", str(free_port())
    yaml = (ROOT / "configs/accelerate/two_nodes.yaml").read_text().replace("num_processes: 16", "num_processes: 2")
    (tiny.parent / "two_nodes.yaml").write_text(yaml)
    command = f"launch/accelerate_nodes.sh {tiny.parent / 'two_nodes.yaml'} {tiny} --output.folder {out}"
    nodes = [start(command, MACHINE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for node in range(2)]
    succeed_together(nodes)
    assert tell_tale(out) == accelerated


def test_mpirun(tiny, accelerated):
    out = tiny.parent / "mpirun"
    succeed(f"launch/mpirun.sh {tiny} --output.folder {out}", RANKS="2", MPIRUN_OPTIONS=MPIRUN_OPTIONS)
    assert tell_tale(out) == accelerated


@pytest.mark.slow
def test_elastic_torchrun_goes_on_after_a_rank_is_killed(tiny, accelerated):
    """A rank kills itself once, when the second step has been saved; the restarted run ends with the history of one
    that never stopped."""
    out = tiny.parent / "elastic"
    (tiny.parent / "sitecustomize.py").write_text(KILLER)
    where = f"{tiny.parent}{os.pathsep}{ROOT}"
    command = f"launch/torchrun_elastic.sh {tiny} --output.folder {out} --train.checkpoint_steps 1"
    told = succeed(command, NPROC="2", PYTHONPATH=where, KILLED=str(tiny.parent / "killed"))
    assert (tiny.parent / "killed").exists()
    assert "resuming after epoch 0, step 2" in told or "resuming after epoch 0, step 1" in told
    assert tell_tale(out) == accelerated


KILLER = """
import os, pathlib, signal, sys
if os.environ.get("RANK") == "1":
    from importlib.abc import MetaPathFinder
    class Watch(MetaPathFinder):  # until the trainer is imported
        def find_spec(self, name, path, target=None):
            if name != "partial_fc.training.trainer":
                return None
            sys.meta_path.remove(self)
            from partial_fc import Checkpointer
            save, killed = Checkpointer.save, pathlib.Path(os.environ["KILLED"])
            def wrapped(self, step, **named):
                save(self, step, **named)
                if step == 2 and not killed.exists():
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            Checkpointer.save = wrapped
    sys.meta_path.insert(0, Watch())
"""


# ---------------------------------------------------------------------------------------------------- DeepSpeed, FSDP2


def close(run: Path, accelerated: list[tuple[float, ...]]) -> None:
    """Equal to the rounding of the engine's sums."""
    assert [row[1] for row in tell_tale(run)] == pytest.approx([row[1] for row in accelerated], rel=1e-5)


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.slow) for engine in ("fsdp2", "zero2", "zero3")]
)
def test_accelerate_with_another_engine(tiny, accelerated, engine):
    out, file = tiny.parent / engine, tiny.parent / f"{engine}.yaml"
    file.write_text(
        (ROOT / f"configs/accelerate/{engine}.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    )
    succeed(f"launch/accelerate.sh {file} {tiny} --output.folder {out}", DS_ACCELERATOR="cpu")
    close(out, accelerated)
    assert (
        f"<td>{'FSDP2' if engine == 'fsdp2' else f'DeepSpeed ZeRO-{engine[-1]}'}</td>"
        in (out / "report.html").read_text()
    )


@pytest.mark.parametrize("file", ["zero3", "zero2"])
@pytest.mark.slow
def test_deepspeed(tiny, accelerated, file):
    out = tiny.parent / f"deepspeed_{file}"
    options = f"--num_gpus 2 --master_port {free_port()}"
    command = f"launch/deepspeed.sh configs/deepspeed/{file}.json {tiny} --output.folder {out}"
    succeed(command, DEEPSPEED_OPTIONS=options, DS_ACCELERATOR="cpu")
    close(out, accelerated)
    assert f"<td>DeepSpeed ZeRO-{file[-1]}</td>" in (out / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------- Slurm

# srun as far as a task can see it: it starts SLURM_NTASKS tasks with the variables of a step, and fails if one does. With
# as many nodes as tasks, each task is on a node of its own.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
apart = os.environ.get("SLURM_JOB_NUM_NODES") == str(tasks)
started = []
for task in range(tasks):
    place, node = (0, task) if apart else (task, 0)
    step = {{"SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(place), "SLURM_NODEID": str(node),
            "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_STEP_NODELIST": "node[7-8]"}}
    started.append(subprocess.Popen(command, env={{**os.environ, **step}}))
sys.exit(max(task.wait() for task in started))
"""
SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && { echo "queued $2 again"; exit 0; }
[ "$1 $2" = "show job" ] && { echo "JobId=$3 JobName=x"; echo "   Requeue=${REQUEUE:-1} Restarts=0"; exit 0; }
[ "$*" = "show hostnames node[7-8]" ] || exit 1
echo localhost
echo node8
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch job of two tasks: `srun` and `scontrol` on the PATH, Slurm's variables."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    return {"PATH": path, **job}


@pytest.mark.slow
def test_slurm(tiny, accelerated, slurm):
    out = tiny.parent / "slurm"
    command = f"bash launch/slurm.sbatch {tiny} --output.folder {out}"
    told = succeed(command, **slurm)
    assert told.count("Results are in") == 1
    assert tell_tale(out) == accelerated
    again = succeed(command, **{**slurm, "SLURM_JOB_ID": str(free_port())})
    assert "resuming after epoch 1, step 3" in again, "a job that is queued again goes on with its run"
    assert tell_tale(out) == accelerated


@pytest.mark.slow
def test_slurm_queues_a_job_again_that_was_asked_to_stop(tiny, accelerated, slurm):
    out = tiny.parent / "slurm_asked"
    command = f"bash launch/slurm.sbatch {tiny} --output.folder {out}"
    code, told, _ = finish(start(command, **slurm, PARTIAL_FC_FAULTS="usr1:forward@step=2,rank=1"))
    assert code == 75 and told.count(f"queued {slurm['SLURM_JOB_ID']} again") == 1
    again = succeed(command, **{**slurm, "SLURM_JOB_ID": str(free_port())})
    assert "resuming after epoch 0, step 2" in again and "queued" not in again
    assert tell_tale(out) == accelerated


@pytest.mark.slow
def test_slurm_queues_no_job_again_whose_owner_has_said_so(tiny, slurm):
    """`scontrol update JobId=JOB Requeue=0` before the request to stop: it saves, and stays away."""
    out = tiny.parent / "slurm_for_good"
    command = f"bash launch/slurm.sbatch {tiny} --output.folder {out}"
    code, told, _ = finish(start(command, **slurm, REQUEUE="0", PARTIAL_FC_FAULTS="usr1:forward@step=2,rank=1"))
    assert code == 75 and "queued" not in told and tell_tale(out)[-1][0] == 2


OWN_LOOP = """
import signal, sys, time
import torch, torch.distributed as dist
from torch.utils.data import DataLoader
from partial_fc import Checkpointer, PartialFC, PreemptionGuard, RowOptimizer
def outlive_requests(worker):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
dist.init_process_group("gloo")
head = PartialFC(4, 6)
named = {"head": head, "head_optimizer": RowOptimizer(torch.optim.SGD, head, lr=0.1)}
checkpointer = Checkpointer(sys.argv[1])
first = checkpointer.load(**named) + 1 if checkpointer.latest() else 0
print(f"rank {dist.get_rank()} of {dist.get_world_size()} begins at {first}", flush=True)
with PreemptionGuard() as guard:
    loader = DataLoader(torch.ones(20_000, 4), batch_size=2, num_workers=1, worker_init_fn=outlive_requests)
    for step, batch in zip(range(first, first + 2 if first else 10_000), loader):
        head(batch, torch.tensor([0, 1])).backward()
        named["head_optimizer"].step()
        named["head_optimizer"].zero_grad()
        if step == 2 and dist.get_rank() == 0:
            open(sys.argv[1] + ".steps", "w").close()
        if guard.requested():
            checkpointer.save(step, **named)
            checkpointer.wait()
            sys.exit(guard.EXIT_CODE)
        time.sleep(0.01)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_own_loop_under_slurm_is_one_world_and_is_queued_again(tmp_path, slurm):
    """Slurm's signal reaches every process of the step: torchrun takes it for a request to stop, too."""
    (tmp_path / "train.py").write_text(OWN_LOOP)
    job = {**slurm, "SLURM_JOB_NUM_NODES": "2", "NPROC": "1"}
    command = f"bash launch/slurm_own_loop.sbatch {tmp_path / 'train.py'} {tmp_path / 'run'}"
    process = start(command, **job)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run.steps").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        step = {pid: args for pid, args in descendants(process.pid).items() if "srun" not in args}
        assert len(step) == 6, f"two agents, two ranks, a worker of each: {step}"
        for pid in step:
            os.kill(pid, signal.SIGUSR1)
        code, told, err = finish(process)
    finally:
        for pid in descendants(process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert code == 75 and told.count(f"queued {slurm['SLURM_JOB_ID']} again") == 1, err
    assert (tmp_path / "run").exists(), f"nothing was saved:\n{err}"
    assert sorted(re.findall(r"rank (\d of \d) begins at 0", told)) == ["0 of 2", "1 of 2"]
    again = succeed(command, **{**job, "SLURM_JOB_ID": str(free_port())})
    assert re.search(r"rank 1 of 2 begins at [1-9]", again) and "queued" not in again


def descendants(of: int) -> dict[int, str]:
    """Process -> command line of all that a process has started; torchrun's ranks have sessions of their own."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    found = {of: ""}
    for line in table.splitlines():  # parents come first
        pid, parent, *args = line.split(maxsplit=2)
        if int(parent) in found:
            found[int(pid)] = " ".join(args)
    del found[of]
    return found


def test_the_page_goes_through_the_file():
    page = (ROOT / "docs/where-jobs-run.md").read_text()
    slurm = page[page.index("## Slurm") :]
    shown = re.findall(r"```bash\n(#SBATCH.*?)```", slurm, re.DOTALL)
    assert len(shown) == 1 and (ROOT / "launch/slurm.sbatch").read_text().endswith(shown[0])
    worker = re.search(r"```python\n(.*?)\n\n", slurm, re.DOTALL)
    assert worker and re.sub(" +#.*", "", worker[1]) in OWN_LOOP


@pytest.mark.parametrize(("file", "tasks"), [("slurm.sbatch", 8), ("slurm_own_loop.sbatch", 1)])
def test_slurm_options_are_those_of_sbatch(file, tasks):
    text = (ROOT / "launch" / file).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    block = {"distribution"} if tasks > 1 else set()
    assert set(options) == {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "signal", "output",
        "open-mode", *block,
    }  # fmt: skip
    assert options["ntasks-per-node"] == str(tasks) and options["gpus-per-node"] == "8"  # a task a GPU, or a node
    assert options["open-mode"] == "append", "a job that is queued again would begin its log anew"
    if block:
        assert options["distribution"] == "block"  # neighbouring ranks on one node, as head.replicas wants them
    assert re.findall(r"^##SBATCH --(\w+)", text, re.MULTILINE) == ["partition", "account"]
    assert not re.search(r"^[^#\n].*\n(.*\n)*#SBATCH", text, re.MULTILINE), (
        "sbatch reads options before the first command"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("launch/torchrun.sh configs/quickstart.yaml", "no GPU is found here: set NPROC"),
        ("launch/torchrun_elastic.sh configs/quickstart.yaml", "no GPU is found here: set NPROC"),
        ("NNODES=2 NPROC=1 launch/torchrun.sh x", "MASTER_ADDR: set MASTER_ADDR to the address of node 0"),
        ("NNODES=2 NPROC=1 MASTER_ADDR=a launch/torchrun.sh x", "NODE_RANK: set NODE_RANK to the number of this node"),
        ("NNODES=1:2 NPROC=1 launch/torchrun_elastic.sh x", "RDZV_ENDPOINT: set RDZV_ENDPOINT to address:port of one"),
        ("launch/mpirun.sh configs/quickstart.yaml", "RANKS: set RANKS to the number of processes"),
        ("launch/ray.sh configs/quickstart.yaml", "WORKERS: set WORKERS to the number of processes"),
        ("launch/accelerate_nodes.sh configs/accelerate/two_nodes.yaml x", "MACHINE_RANK: set MACHINE_RANK to the"),
        ("launch/accelerate.sh", "1: name its file, then that of the run"),
        ("launch/deepspeed.sh", "1: name its file, then that of the run"),
    ],
)
def test_what_is_missing_is_asked_for_in_one_line(command, words):
    words_of = command.split()
    variables = dict(each.split("=") for each in words_of if "=" in each)
    command = " ".join(each for each in words_of if "=" not in each)
    code, out, err = finish(start(command, CUDA_VISIBLE_DEVICES="", **variables))
    assert code != 0 and out == ""
    (line,) = err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("launch/glyphs mine --size 48", "data glyphs --fonts /usr/share/fonts --out {here}/mine"),
        ("launch/glyphs", "data glyphs --fonts /usr/share/fonts --out data/glyphs"),
        ("launch/quickstart --data.folder faces", "in {here}: train {root}/configs/quickstart.yaml --check"),
    ],
)
def test_paths_are_those_of_the_folder_where_a_script_is_called(tmp_path, command, expected):
    """Also where the shell has a CDPATH, in which `cd launch/..` would find another folder."""
    root, here, tools = tmp_path / "a project", tmp_path / "here", tmp_path / "tools"
    for folder in (root, here, tools, tmp_path / "launch", tmp_path / "venv"):
        folder.mkdir()
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).touch()
    for name in ("python", "accelerate", "partial-fc"):
        (tools / name).write_text('#!/bin/sh\necho "in $PWD: $*"\n')
    (tools / "dpkg-query").write_text("#!/bin/sh\necho install ok installed\n")
    for each in tools.iterdir():
        each.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(tmp_path / "venv"), "CDPATH": str(tmp_path)}
    script, *rest = command.split()
    for start_in, name in ((here, str(root / script)), (root, script)):
        done = subprocess.run(
            ["bash", name, *rest], cwd=start_in, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected.format(here=start_in, root=root) in done.stdout


def test_the_launch_files_name_their_arguments():
    for path in sorted((ROOT / "launch").glob("*.s*")):
        text = path.read_text()
        if path.name == "env.sh":
            continue
        assert os.access(path, os.X_OK), path
        last = text.replace("\\\n", "").splitlines()[-1]
        entry = "partial_fc.engines.torchrun" if path.name == "slurm_own_loop.sbatch" else "partial_fc train"
        assert entry in last, f"{path.name} does not end in the entry point"
        assert sum(line.strip() != "" and not line.startswith("#") for line in text.splitlines()) <= 8, (
            f"{path.name} has grown logic"
        )
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
