"""MLflow with a server of its own on this machine, read back over its REST interface.

pip install 'partial_fc[mlflow]'
launch/test tests/training/trackers/test_mlflow.py -m slow      the server takes half a minute to start
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import needs
from launched import environment, finish, start, tiny_run
from runner import free_port

from partial_fc.training.faults import VARIABLE
from partial_fc.training.run import RunFolder

pytestmark = [needs("mlflow"), pytest.mark.slow, pytest.mark.timeout(1500)]
PASSWORD = "a-password-of-the-server"
WAIT = 600.0


class Server:
    def __init__(self, folder: Path, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/store.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment(**quiet), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + WAIT
        while not self.answers():
            assert self.process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/api/2.0/mlflow/{path}", timeout=60) as answer:
            return json.load(answer)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    folder.mkdir()
    server = Server(folder, free_port())
    try:
        yield server
    finally:
        server.stop()


def launch(ranks: int, *arguments: str, **variables: str) -> tuple[int, str]:
    """The exit code and all that `torchrun` and its ranks have said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(free_port()), "-m", "partial_fc"]
    code, out, err = finish(start([*command, *arguments], **variables), WAIT)
    return code, out + err


def test_a_run_killed_and_resumed_and_a_server_that_is_lost(tmp_path):
    config = tiny_run(tmp_path, train={"epochs": 2, "batch_size": 8, "timeout": 300.0}, data={"holdout_identities": 2})
    run = tmp_path / "run"
    with serving(tmp_path / "server") as server:
        address = server.address.replace("//", f"//someone:{PASSWORD}@")
        variables = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        arguments = ["train", str(config), "--start_or_resume", "--output.trackers", "[mlflow]"]
        arguments += ["--output.project", "tests"]
        here = ["--output.folder", str(run), "--evaluation.every", "1"]

        code, _ = launch(2, *arguments, *here, **variables, **{VARIABLE: "kill:forward@step=6,rank=1"})
        assert code != 0
        link = json.loads((run / "trackers.json").read_text())["mlflow"]["link"]
        code, said = launch(1, *arguments, *here, **variables)
        assert code == 0, said
        assert json.loads((run / "trackers.json").read_text())["mlflow"]["link"] == link

        experiment = server.ask("experiments/get-by-name?experiment_name=tests")["experiment"]["experiment_id"]
        found = server.ask(f"runs/get?run_id={link['run_id']}")["run"]
        assert found["info"]["experiment_id"] == experiment and found["info"]["run_name"] == "run"
        assert found["info"]["status"] == "FINISHED"
        parameters = {each["key"]: each["value"] for each in found["data"]["params"]}
        assert parameters["head.margin.scale"] == "16.0" and parameters["train.batch_size"] == "8"

        def curve(name: str) -> list[tuple[int, float]]:
            path = f"metrics/get-history?run_id={link['run_id']}&metric_key={name}"
            return [(each["step"], each["value"]) for each in server.ask(path)["metrics"]]

        history = RunFolder(run).history()
        losses = [(int(row["step"]), row["loss"]) for row in history if "loss" in row]
        assert [step for step, _ in losses] == [step for step, _ in curve("loss")], "each step once"
        # those of steps 5 to 7 are of the killed run: on two ranks, with the batch statistics of smaller local batches
        once = {step: value for step, value in curve("loss") if step not in (5, 6, 7)}
        assert once == pytest.approx({step: loss for step, loss in losses if step in once}, rel=1e-6)
        evaluated = [(int(row["step"]), row["holdout/eer"]) for row in history if "loss" not in row]
        assert [step for step, _ in curve("holdout/eer")] == [step for step, _ in evaluated] == [4, 8]
        assert dict(curve("holdout/eer")) == pytest.approx(dict(evaluated))
        files = server.ask(f"artifacts/list?run_id={link['run_id']}")["files"]
        assert [each["path"] for each in files] == ["plots", "report.html"]
        assert files[1]["file_size"] == (run / "report.html").stat().st_size
        plots = server.ask(f"artifacts/list?run_id={link['run_id']}&path=plots")["files"]
        assert {each["path"] for each in plots} == {f"plots/{path.name}" for path in (run / "plots").glob("*.png")}
        for path in run.rglob("*"):
            assert path.is_dir() or PASSWORD.encode() not in path.read_bytes(), path
        assert PASSWORD not in said

        # the server is lost in mid-run: after its first row
        other = tmp_path / "other"
        command = [sys.executable, "-m", "partial_fc", *arguments, "--output.folder", str(other)]
        process = start([*command, "--train.epochs", "40", "--schedule.warmup_epochs", "0"], **variables)
        deadline = time.monotonic() + WAIT
        while not RunFolder(other).history():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        server.stop()
        code, out, err = finish(process, WAIT)
        assert code == 0, err
        assert RunFolder(other).history()[-1]["step"] == 40 * 4
        warnings = [line for line in err.replace("\r", "\n").splitlines() if "partial-fc: warning" in line]
        assert len(warnings) == 2 and "has not taken" in warnings[0] and "rows of steps" in warnings[1], err
        assert PASSWORD not in out + err

    # and at the start
    code, said = launch(2, *arguments, "--output.folder", str(tmp_path / "third"), **variables)
    assert code != 0 and said.count("partial-fc: error: the tracker mlflow does not start") == 1
    assert PASSWORD not in said and not (tmp_path / "third" / "config.yaml").exists()
