"""Bad disks and many steps, by their commands at small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_disk import compiler

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("work", ["weights", "gallery*", "embed*", "convert to*", "export", "import*"])
def test_every_file_and_call_of_some_works(tmp_path: Path, work: str) -> None:
    if compiler() is None:
        pytest.skip("no C compiler, or no LD_PRELOAD")
    ended = run("benchmarks/disks.py", "--out", str(tmp_path / "disks"), "--only", work)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WRONG" not in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_steps_hold_no_more_and_give_the_same_losses(tmp_path: Path) -> None:
    ended = run("benchmarks/many_steps.py", "--steps", "400", "--out", str(tmp_path / "steps"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "FAIL" not in ended.stdout
    assert (tmp_path / "steps" / "many_steps.png").read_bytes()[:4] == b"\x89PNG"
