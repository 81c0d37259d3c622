"""The manifests for Kubernetes: valid by its own schemas and by Kubeflow's, and what a pod runs, run here in two
processes with the variables that Kubernetes sets. They train what any launcher trains.

    pytest tests/project/test_kubernetes.py -m "slow or not slow"      with a request to stop, about a minute
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from launched import ROOT, finish, losses, start, succeed, succeed_together, tell_tale, tiny_run, wait_for_step
from runner import free_port

pytestmark = pytest.mark.timeout(900)  # two or three starts of two ranks each, on machines with other work

FOLDER = ROOT / "launch" / "kubernetes"
VERSIONS = ("1.33", kubernetes_validate.latest_version())  # the oldest that docs name, the newest that is known
KUBEFLOW = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a manifest by their kind."""
    found = list(yaml.safe_load_all((FOLDER / name).read_text()))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


JOB = documents("job.yaml")
TRAINJOB = documents("trainjob.yaml")


def of_runtime() -> dict[str, Any]:
    """The Job that Kubeflow makes of the TrainingRuntime."""
    (replicated,) = TRAINJOB["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": {"name": "node", **template["metadata"]}}


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


# ---------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", [*JOB.values(), of_runtime()], ids=[*JOB, "runtime"])
def test_kubernetes_takes_the_manifests(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_would_refuse_a_misspelled_field():
    job = copy.deepcopy(JOB["Job"])
    job["spec"]["completionsMode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionsMode"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", KUBEFLOW)
def test_kubeflow_takes_the_manifests(kind):
    """Its models read them, and forget nothing of them: they skip fields that they do not know."""
    assert KUBEFLOW[kind].from_dict(TRAINJOB[kind]).to_dict() == TRAINJOB[kind]


def test_kubeflow_would_forget_a_misspelled_field():
    job = copy.deepcopy(TRAINJOB["TrainJob"])
    job["spec"]["trainer"]["numProcsPerNode"] = job["spec"]["trainer"].pop("numProcPerNode")
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


# ---------------------------------------------------------------------------------------------------- what they agree on


@pytest.mark.parametrize("job", [JOB["Job"], of_runtime()], ids=["job", "runtime"])
def test_pods_are_stopped_gently_and_started_again_by_their_exit_code(job):
    spec, pod, container = job["spec"], job["spec"]["template"]["spec"], container_of(job)
    actions = [
        (rule["action"], *(rule[key] for key in ("onExitCodes", "onPodConditions") if key in rule))
        for rule in spec["podFailurePolicy"]["rules"]
    ]
    codes = {"containerName": container["name"], "operator": "In"}
    assert actions == [
        ("Ignore", [{"type": "DisruptionTarget", "status": "True"}]),
        ("Ignore", {**codes, "values": [75]}),
        ("FailJob", {**codes, "values": [2]}),
    ]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other"
    grace = {each["name"]: each["value"] for each in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert 60 < int(grace) < pod["terminationGracePeriodSeconds"]
    security = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert set(mounted) == set(volumes)
    (shared,) = (volumes[name] for name, path in mounted.items() if path == "/dev/shm")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_the_first_pod_has_the_name_that_all_of_them_look_for():
    job, service = JOB["Job"], JOB["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    variables = {each["name"]: each["value"] for each in container_of(job)["env"]}
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == int(variables["MASTER_PORT"])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"])
    assert container_of(job)["resources"]["limits"]["nvidia.com/gpu"] == variables["NPROC"]


def test_the_train_job_names_its_runtime_and_the_container_of_trainer():
    runtime, job = TRAINJOB["TrainingRuntime"], TRAINJOB["TrainJob"]
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert container_of(of_runtime())["name"] == "node", "Trainer sets command and PET_ variables of this one"
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])


# ---------------------------------------------------------------------------------------------------- what a pod runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def history(tiny: Path) -> list[tuple[float, ...]]:
    """Of two ranks of one launcher: what the pods must equal."""
    out = tiny.parent / "one"
    forked.succeed("train", str(tiny), "--output.folder", str(out))
    return tell_tale(out)


def settings(arguments: list[str], tiny: Path, out: Path, *more: str) -> list[str]:
    """The settings of a manifest, those that are marked CHANGE replaced."""
    assert arguments[0].startswith("configs/") and arguments[1::2][:2] == ["--data.folder", "--output.folder"]
    return [str(tiny), "--output.folder", str(out), *arguments[5:], *more]


def pods_of_job(tiny: Path, out: Path, *more: str) -> list[subprocess.Popen[str]]:
    """The two pods of the Indexed Job with one rank each; their names lead to this machine."""
    container = container_of(JOB["Job"])
    script, name, *arguments = container["args"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    variables.update(NPROC="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    variables.update(GLOO_SOCKET_IFNAME="lo", HOME=str(tiny.parent))
    command = [*container["command"], script, name, *settings(arguments, tiny, out, *more)]
    return [start(command, **variables, JOB_COMPLETION_INDEX=str(index)) for index in range(2)]


def pods_of_train_job(tiny: Path, out: Path, *more: str) -> list[subprocess.Popen[str]]:
    """The two pods that Trainer makes, with the variables that its torch plugin sets."""
    trainer = TRAINJOB["TrainJob"]["spec"]["trainer"]
    pet = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    pet["PET_MASTER_PORT"] = str(free_port())
    command = [*trainer["command"], *settings(trainer["args"], tiny, out, *more)]
    return [start(command, **pet, PET_NODE_RANK=str(index), GLOO_SOCKET_IFNAME="lo") for index in range(2)]


PODS = {"job": pods_of_job, "trainjob": pods_of_train_job}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["job", pytest.param("trainjob", marks=pytest.mark.slow)])
def test_pods_train_what_others_train(tiny, history, kind):
    out = tiny.parent / kind
    succeed_together(PODS[kind](tiny, out), 300)
    assert tell_tale(out) == history


@pytest.mark.slow
def test_a_pod_that_is_drained_stops_all_of_them_and_they_go_on(tiny):
    """SIGTERM to one; both end with the code that podFailurePolicy ignores, and the next pods resume."""
    out, whole, epochs = tiny.parent / "drained", tiny.parent / "whole", ("--train.epochs", "20")
    forked.succeed("train", str(tiny), "--output.folder", str(whole), *epochs)
    pods = pods_of_job(tiny, out, *epochs)
    try:
        wait_for_step(out, 4)
        pods[1].send_signal(signal.SIGTERM)
        ended = [finish(pod, 300) for pod in pods]
    finally:
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
    assert [code for code, _, _ in ended] == [75, 75], ended
    saved = len(losses(out))
    assert f"stopped after step {saved} (requested on another rank), which is saved" in ended[0][2]
    assert saved < len(losses(whole))
    succeed_together(pods_of_job(tiny, out, *epochs), 300)
    assert tell_tale(out) == tell_tale(whole)


@pytest.mark.parametrize(("fault", "code"), [("", 2), ("kill:forward@step=2", 137)], ids=["mistake", "killed"])
@pytest.mark.slow
def test_the_exit_code_tells_what_happened(tiny, fault, code):
    out = tiny.parent / f"code_{code}"
    more = ("--train.batch_size", "1") if code == 2 else ()
    command = ["python", "-m", "partial_fc.engines.torchrun", "--standalone", "--nproc_per_node", "1", "-m"]
    command += ["partial_fc", "train", str(tiny), "--output.folder", str(out), *more]
    ended, _, err = finish(start(command, PARTIAL_FC_FAULTS=fault))
    assert ended == code, err[-3000:]
    if code == 2:
        assert "partial-fc: error: --train.batch_size 1 leaves fewer than 2 images" in err


def test_the_launchers_and_pods_end_in_one_entry_point():
    entry = "-m partial_fc train"
    assert entry in container_of(JOB["Job"])["args"][0] and "--start_or_resume" in container_of(JOB["Job"])["args"][0]
    trainer = TRAINJOB["TrainJob"]["spec"]["trainer"]
    assert entry in " ".join(trainer["command"]) and trainer["args"][-1] == "--start_or_resume"
    done = succeed(["bash", "-n", "-c", container_of(JOB["Job"])["args"][0]])
    assert not done
