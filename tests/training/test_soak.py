"""The two-minute soak, and what its report says of a run that went wrong. `pytest tests/training/test_soak.py -m "slow
or not slow"`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from common import args

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least one fault of each sort; all survived, every step equal to that of the undisturbed run (the command's own
    judgement)."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/soak.py"),
        *args("--minutes 2 --seed 1 --out"),
        str(tmp_path / "soak"),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=1400, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stdout + run.stderr[-6000:]
    report = json.loads((tmp_path / "soak/report.json").read_text())
    faults = report["faults"]
    kinds = {fault["kind"].split()[0].rstrip(",") for fault in faults}
    assert kinds >= {"killed", "slow", "hung", "asked"} and len(faults) >= 5
    assert all(fault["seconds"] is not None for fault in faults)
    assert report["restarts"] >= 3 and report["problems"] == [] and report["evaluations"]
    assert (tmp_path / "soak/report.png").read_bytes()[:4] == b"\x89PNG"
    with capsys.disabled():
        print("\n" + (tmp_path / "soak/report.md").read_text())


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A soak that starts nothing: its judgement alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak
    from soak_run import Disk

    return soak.Soak(
        argparse.Namespace(minutes=1, seed=0, epochs=2, rows="memory", part=120, timeout=20, out=""),
        tmp_path,
        Disk(tmp_path / "disk", 1),
    )


class Ended:
    """A launch that has ended."""

    full = asked = False

    def left(self) -> list[int]:
        return []

    def tail(self) -> str:
        return ""


def watch(folder: Path, losses: list[float], tar: float = 0.5, left_out: int = 1) -> Any:
    from soak_run import Watch

    folder.mkdir()
    (folder / "history.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses))
    )
    evaluations = [{"name": "seen", "tar": {"1e-3": tar}}]
    (folder / "metrics.json").write_text(
        json.dumps({"evaluations": evaluations, "training": {"left_out_batches": left_out}})
    )
    made = Watch(folder)
    made.look()
    return made


def test_an_end_that_no_fault_explains_is_a_problem(soak: Any, tmp_path: Path) -> None:
    from soak_report import Fault

    run = watch(tmp_path / "run", [3.0, 2.0])
    for kind in (None, "slow", "full disk"):
        soak.open, soak.results.problems = None, []
        if kind:
            soak.happen(Fault(kind, 1, 0), run)
        assert not soak.ended(1, Ended(), run)
        assert len(soak.results.problems) == 1, kind
    soak.results.problems.clear()
    soak.open = None
    soak.happen(Fault("killed", 1, 0), run)
    assert not soak.ended(1, Ended(), run) and not soak.results.problems and soak.open.restarts == 1
    soak.judge(run, Ended(), time.monotonic())
    assert soak.open is not None, "no new step yet"
    soak.open.clock -= 1000
    soak.judge(run, Ended(), time.monotonic())
    assert "no new step after" in soak.results.problems[0]


def test_a_difference_in_any_step_is_a_problem(soak: Any, tmp_path: Path) -> None:
    reference = watch(tmp_path / "reference", [3.0, 2.0, 1.0])
    soak.compare(watch(tmp_path / "same", [3.0, 2.0, 1.0]), reference)
    assert soak.results.problems == []
    for name, losses, tar, left_out, expected in (
        ("other", [3.0, 2.0, 1.0000001], 0.5, 1, "from step 3 on"),
        ("shorter", [3.0, 2.0], 0.5, 1, "from step 3 on"),
        ("metric", [3.0, 2.0, 1.0], 0.4999, 1, "final metrics differ"),
        ("batches", [3.0, 2.0, 1.0], 0.5, 2, "batches were left out, 1 were spoilt"),
    ):
        soak.compare(watch(tmp_path / name, losses, tar, left_out), reference)
        assert len(soak.results.problems) == 1 and expected in soak.results.problems.pop()


def test_the_report(soak: Any, tmp_path: Path) -> None:
    from soak_report import Fault, Round, write_report

    reference, run = watch(tmp_path / "reference", [3.0, 2.0]), watch(tmp_path / "run", [3.0, 2.0])
    soak.results.rounds.append(Round.of(run, soak.began))
    soak.memory.samples = samples(rank0=[400.0] * 9, rank1=[300.0] * 9)
    soak.happen(Fault("killed", 1, 0), run)
    soak.open.restarts, soak.open.lost = 1, 4
    soak.survived()
    soak.happen(Fault("hung", 1, 1), run)
    soak.compare(run, reference)
    text = write_report(soak.results, reference, soak.memory, tmp_path)
    assert "equal those of the undisturbed one" in text and "| killed | 1 | 1 | 1 | 4, 4 | 0, 0 |" in text
    assert "| hung | 1 | 0 | 0 | 0, 0 | – |" in text and "| all | 2 | 1 | 1 | 4, 4 | 0, 0 |" in text
    assert "| seen | 0.5000 | 0.5000 |" in text
    assert "| rank 1, resident | 1 | 300 | +0.0 | +0.0 in 8 s | – |" in text
    soak.problem("something")
    assert "PROBLEM: something" in write_report(soak.results, reference, soak.memory, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == ["something"]


def samples(run: str = "round 1", pid: int = 0, **ranks: list[float]) -> list[Any]:
    """Of one process of each rank, a second apart."""
    return [
        (float(i), run, int(name[-1]), pid + int(name[-1]), figure, figure - 50)
        for name, figures in ranks.items()
        for i, figure in enumerate(figures)
    ]


def test_memory_that_grows_is_a_problem(soak: Any) -> None:
    """In the life of a process, and from process to process."""
    from soak_memory import LIMIT

    flat = [400.0 + i % 3 for i in range(30)]
    memory = soak.memory
    assert memory.problems() == ["the memory of the ranks was not looked at for long enough"]
    memory.samples = samples(rank0=flat, rank1=flat)
    assert memory.problems() == []
    memory.samples = samples(rank0=flat, rank1=[400.0 + 2 * i for i in range(30)])
    found = memory.problems()
    assert len(found) == 2 and "rank 1: its memory (resident) has grown by 40 MiB in the life of a process" in found[0]
    memory.samples = [
        each
        for life in range(6)
        for each in samples(f"round {life}", 2 * life, rank0=flat, rank1=[figure + 10 * life for figure in flat])
    ]
    found = memory.problems()
    assert len(found) == 2 and f"grown by 40 MiB over the soak, more than {LIMIT:.0f}" in found[1]


def test_a_soak_goes_on_with_what_is_in_its_folder(soak: Any, tmp_path: Path) -> None:
    import soak as module
    from soak_report import Fault, Round
    from soak_run import Disk

    run = watch(tmp_path / "run", [3.0, 2.0])
    soak.happen(Fault("killed", 1, 0), run)
    soak.survived()
    soak.results.rounds.append(Round.of(run, soak.began))
    soak.starts, soak.began = 4, soak.began - 100
    soak.memory.samples = samples(rank0=[400.0] * 9, rank1=[300.0] * 9)
    soak.next_of("sent")
    soak.save()
    drawn = soak.random.random()
    same = {"minutes": 1, "seed": 0, "epochs": 2, "rows": "memory", "part": 1, "timeout": 20, "out": "elsewhere"}

    again = module.Soak(argparse.Namespace(**same), tmp_path, Disk(tmp_path / "disk", 1))
    assert json.dumps(again.results.as_json()) == json.dumps(soak.results.as_json())
    assert again.memory.samples == soak.memory.samples
    assert again.starts == 4 and again.random.random() == drawn and again._decks == soak._decks
    assert 100 <= time.monotonic() - again.began < 200
    with pytest.raises(SystemExit, match="holds a soak of other settings"):
        module.Soak(argparse.Namespace(**{**same, "seed": 1}), tmp_path, Disk(tmp_path / "disk", 1))


def test_a_part_that_is_over_begins_no_round(soak: Any, tmp_path: Path) -> None:
    soak.part, soak.part_began = 1, time.monotonic() - 61
    assert not soak.soak(watch(tmp_path / "reference", [3.0])) and soak.results.rounds == []
