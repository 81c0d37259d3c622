"""The files in docker/ are linted and resolved, not built: hadolint judges the images, Docker Compose the services."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its argument), lines joined, comments left out."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(word.upper(), rest) for word, rest in (line.split(None, 1) for line in text.splitlines() if line.strip())]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    done = run(BIN / "hadolint", "--no-color", path)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN pip install torch\n")
    found = run(BIN / "hadolint", "--no-color", bad)
    assert found.returncode != 0 and "DL3006" in found.stdout and "DL3013" in found.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_an_exact_base_and_an_ordinary_user(path):
    lines = instructions(path)
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", dict(lines)["FROM"]), "the base's tag must be exact"
    assert [word for word, _ in lines if word in ("USER", "CMD")] == ["USER", "CMD"] and dict(lines)["USER"] not in (
        "root",
        "0",
    )
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]:
        assert (ROOT / source).exists() and f"!{source}" in ignored, source
    installed = " ".join(rest for word, rest in lines if word == "RUN")
    extras = set(re.search(r'"\.\[([\w,]+)\]"', installed)[1].split(","))  # type: ignore[index]
    declared = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.MULTILINE
    )
    assert "train" in extras and extras <= set(declared)


def resolved(*files: str) -> dict[str, Any]:
    done = run(
        BIN / "docker-compose",
        *(word for name in files for word in ("--file", f"docker/{name}")),
        "config",
        "--format",
        "json",
    )
    assert done.returncode == 0, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def test_compose_brings_up_two_nodes_that_find_each_other():
    services = resolved("compose.yaml")["services"]
    assert set(services) == {"node0", "node1"}
    for rank, (name, node) in enumerate(sorted(services.items())):
        assert node["environment"]["NODE_RANK"] == str(rank) and name == f"node{rank}"
        assert node["environment"]["MASTER_ADDR"] == "node0" and node["environment"]["NNODES"] == str(len(services))
        assert (ROOT / node["command"][0]).is_file() and (ROOT / node["command"][1]).is_file()
        assert node["command"][3].startswith("runs/") and node["volumes"][0]["target"] == "/workspace/runs"
        build = node["build"]
        assert Path(build["context"]) == ROOT and build["dockerfile"] == "docker/Dockerfile.cpu"
        assert list(node["networks"]) == ["training"]


def test_compose_gives_each_node_a_gpu():
    services = resolved("compose.yaml", "compose.gpu.yaml")["services"]
    devices = [services[name]["deploy"]["resources"]["reservations"]["devices"][0] for name in ("node0", "node1")]
    assert [device["device_ids"] for device in devices] == [["0"], ["1"]]
    for node in services.values():
        assert node["image"] == "partial_fc:gpu" and node["build"]["dockerfile"] == "docker/Dockerfile.gpu"
        assert node["command"][-2:] == ["--train.cpu", "false"]
        assert node["environment"]["MASTER_ADDR"] == "node0" and node["environment"]["NCCL_SOCKET_IFNAME"] == "eth0"
