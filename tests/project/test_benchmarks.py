"""The benchmark commands run from end to end at sizes that say nothing; the textbook peer computes the same as the
head."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from common import args

from partial_fc.kernels.choice import triton_problem
from partial_fc.training.cli.main import train_parser
from partial_fc.training.config import MarginSettings, save_config, to_config
from partial_fc.training.effects import check_effects

ROOT = Path(__file__).parents[2]
CASES = {"exact", "sampled", "many", "skipped", "bf16", "memory", "memory_in_backward", "peers", "growth"}
GPU_PARTS = ("proof", "waits", "two", "speed", "peers", "profile")


def test_what_benchmarks_take_from_the_package_is_there():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("partial_fc"):
                module = importlib.import_module(str(node.module))
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{path.name}, line {node.lineno}: {node.module} has no {missing}"


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "head.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["case"] for row in results["rows"]} == CASES
    for row in results["rows"]:
        assert row["value"] is not None or row["note"] == "not installed", row
        if row["unit"] in ("×", "× ours"):  # slopes and a few pages of memory may be 0 or below at these sizes
            assert row["value"] is None or (math.isfinite(row["value"]) and row["value"] > 0), row
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "table.md").read_text() in run.stdout
    assert run.stdout.count("| peers |") == sum(row["case"] == "peers" for row in results["rows"])
    assert (tmp_path / "head.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_rows_in_files_at_small_sizes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tiers.py"), "--quick", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--folder", str(tmp_path / "rows")], capture_output=True, text=True, timeout=170, env=environment
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["case"] for row in rows} == {"cached", "rows", "blocks", "growth", "saves", "resumed"}
    assert all(math.isfinite(row["value"]) for row in rows)
    assert (tmp_path / "out" / "table.md").read_text() in run.stdout
    assert not any((tmp_path / "rows").iterdir())


@pytest.mark.slow
def test_the_run_for_a_gpu_on_a_cpu(tmp_path: Path) -> None:
    """All parts at small sizes; on a CPU there are no waits to count, and no memory of a device."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        *args("--device cpu --minutes 10 --out"),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    of = {part: [row for row in rows if row["part"] == part] for part in GPU_PARTS}
    assert sum(map(len, of.values())) == len(rows)
    assert {row["verdict"] for part in ("proof", "two") for row in of[part]} == {"PASS"}
    proven = " ".join(row["case"] for row in of["proof"])
    assert all(
        f"{name}, {dtype}," in proven for name in MarginSettings.names for dtype in ("float64", "float32", "bf16")
    )
    assert {row["verdict"] for row in of["waits"]} == {"skipped"} and len(of["waits"]) == 5
    assert all(row["ratio"] > 0 and row["rows"] > 0 and row["planned"] > 0 for row in of["speed"])
    assert {row["bf16"] for row in of["speed"]} == {True, False} and len(of["profile"][0]["kernels"]) > 5
    assert all(row["verdict"] in ("", "skipped") for part in ("speed", "peers", "profile") for row in of[part])
    assert (tmp_path / "table.md").read_text() in run.stdout and "proof: PASS, waits: not run, two: PASS" in run.stdout
    bars = ElementTree.parse(tmp_path / "plot.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(of["speed"])


@pytest.mark.slow
def test_the_kernels_for_a_gpu_on_a_cpu(tmp_path: Path) -> None:
    """Heads in the interpreter are right, at small sizes; without triton everything is skipped."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    command += [*args("--device cpu --minutes 10 --parts kernels --out"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    if triton_problem():
        assert [row["verdict"] for row in rows] == ["skipped"]
        return
    right = [row for row in rows if row["case"].startswith("right: ")]
    assert len(right) == 9
    assert all(row["verdict"] == "PASS" for row in right)
    kinds = {row["case"].split(":")[0] for row in rows}
    assert kinds == {"right", "the rate of a product", "step", "alone", "others"}
    assert all(row["verdict"] in ("", "PASS", "skipped") for row in rows), rows
    assert "## kernels" in (tmp_path / "table.md").read_text()


def test_a_run_for_a_gpu_that_fails_or_has_no_time_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report
    from gpu_run import Outcome, Run

    def fails() -> Outcome:
        raise ValueError("of no use")

    run = Run(torch.device("cpu"), True, 1.0, tmp_path)
    run.begin("proof", 1.0)
    run.measure("one", fails)
    run.measure("two", lambda: Outcome("PASS", "fine", {"dtype": "float64", "largest": 0.0}))
    run.begin("waits", 1.0)
    run.measure("three", lambda: Outcome("PASS"), seconds=61)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["FAIL", "PASS", "no time"] and "of no use" in rows[0]["traceback"]
    assert gpu_report.verdicts(rows) == {"proof": "FAIL", "waits": "no time", "two": "not run"}
    text = gpu_report.table(rows, {}, False)
    assert "- FAIL: one: ValueError: of no use" in text and "- float64: 1 of 1 pass" in text
    assert "## Not measured\n\n- waits, three: no time" in text


CASES_OF_A_RUN = """
import os, sys, threading, time
from pathlib import Path
import torch
sys.path[:0] = [{benchmarks!r}, {root!r}]
from gpu_run import Outcome, Run
from partial_fc.kernels import launch

run = Run(torch.device("cpu"), True, 10.0, Path({out!r}), about={{"device": "cpu"}})
run.go_on()

def raises():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def loses_the_device():
    run.synchronize = raises
    return Outcome("PASS")

def replaced():
    launch.failed["project_rows"] = "CompilationError: of no use"
    return Outcome("PASS")

def speed(run):
    run.measure("dies", lambda: os.kill(os.getpid(), 9))
    run.measure("hangs", lambda: threading.Event().wait(), most=0.1)
    raise ValueError("outside of a case")

def waits(run):
    run.measure("replaced", replaced)
    run.measure("loses the device", loses_the_device)
    run.measure("fine", lambda: Outcome("PASS"))

run.run_part("speed", 1.0, speed)
run.run_part("waits", 1.0, waits)
(run.out / "now.json").write_text('{{"ended": true}}')
"""


@pytest.mark.slow
def test_a_run_for_a_gpu_goes_on_whatever_a_case_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is killed, that waits for ever, that has lost its device; an error outside of the cases."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report
    import gpu_watch

    text = CASES_OF_A_RUN.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), out=str(tmp_path))
    (tmp_path / "results.json").write_text("of an earlier run")
    assert gpu_watch.watch([sys.executable, "-c", text], tmp_path, time.monotonic() + 600) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    found = {row["case"]: (row["verdict"], row["text"]) for row in rows}
    assert len(found) == len(rows) == 6
    assert found["dies"] == ("error", "its process ended with SIGKILL")
    assert found["hangs"] == ("error", "no end in time: its process was killed")
    assert found["the rest of the part"] == ("error", "ValueError: outside of a case")
    assert found["replaced"] == ("PASS", "; the kernel project_rows failed: CompilationError: of no use")
    assert found["loses the device"][0] == "FAIL" and "illegal memory access" in found["loses the device"][1]
    assert found["fine"] == ("PASS", "")
    assert "- project_rows: CompilationError: of no use" in gpu_report.table(rows, {}, False)


def test_a_run_for_a_gpu_ends_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever it is that waits; what there is by then is in the table."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_watch

    monkeypatch.setattr(gpu_watch, "GRACE", 0.0)
    row = {"part": "proof", "case": "one", "verdict": "PASS", "text": "1e-9", "dtype": "float64", "largest": 1e-9}
    (tmp_path / "rows.json").write_text(json.dumps({"machine": {"device": "a card"}, "quick": False, "rows": [row]}))
    (tmp_path / "case.json").write_text(json.dumps({"part": "proof", "case": "two", "until": math.inf}))
    command = f"cd {tmp_path}; cp rows.json results.json; cp case.json now.json; exec sleep 600"
    assert gpu_watch.watch(["sh", "-c", command], tmp_path, time.monotonic() + 1.0) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["case"], row["verdict"]) for row in rows] == [("one", "PASS"), ("two", "no time")]
    assert "The run was cut short: no end in time" in (tmp_path / "table.md").read_text()


def test_waits_are_counted_where_this_package_causes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torch warns; here a step of a made-up file of the package does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_waits

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def wait() -> None:
        if modes[-1:] == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    names: dict[str, Any] = {"wait": wait}
    text = "def once():\n    wait()\n\ndef twice():\n    wait()\n    once()\n"
    exec(compile(text, str(ROOT / "partial_fc" / "made_up.py"), "exec"), names)
    assert gpu_waits.waits_of(names["twice"]) == ["partial_fc/made_up.py:5", "partial_fc/made_up.py:2"]
    assert modes == ["warn", "default"]
    outcome = gpu_waits.count(names["twice"])
    assert outcome.verdict == "FAIL" and outcome.figures["most"] == 2
    assert outcome.text.startswith("at most 2 a step, 1 allowed: partial_fc/made_up.py:5 ×1, ")
    assert gpu_waits.count(names["once"]).verdict == gpu_waits.count(lambda: None).verdict == "PASS"


@pytest.mark.slow
def test_quick_run_of_the_questions() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "queries.py"), "--quick"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in run.stdout.splitlines()]
    assert [(row[0].split(",")[0], row[3]) for row in rows[2:]] == [
        (q, w) for w in "12" for q in ("topk", "nearest_classes")
    ]
    assert all(len(row) == len(rows[0]) and all(float(cell) > 0 for cell in row[4:]) for row in rows[2:])


@pytest.mark.slow
def test_quick_run_of_agreement() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "agreement.py"), "--quick"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in run.stdout.splitlines()][2:]
    assert [row[4] for row in rows] == ["1"] * 6 + ["2"] * 6 and len({row[0] for row in rows}) == 6
    assert all(math.isfinite(float(cell)) for row in rows for cell in row[5:8])
    assert all(float(row[5]) > 0 for row in rows if row[0].endswith(("alone", "watch")))


@pytest.mark.slow
def test_quick_run_of_feeding() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "feeding.py"), "--quick"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in run.stdout.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in rows[2:]] == ["recordio", "webdataset", "parquet", "list", "folder", "DataLoader"]
    assert all(float(cell.replace(",", "")) > 0 for row in rows[2:] for cell in row[1:3])


def _both(rank: int, world: int) -> dict[str, Any]:
    """Loss and embedding gradient of the head and of the textbook, on the same weights."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from cases import Work, batch, ours
    from peers import TextbookPartialFC

    work = Work(N=8, C=20, D=6, r=1.0)
    head = ours(work)[1]
    textbook = TextbookPartialFC(work.D, work.C, work.r)
    textbook.weight.data.copy_(head.weight.to_local())
    found: dict[str, Any] = {}
    for name, module in (("head", head), ("textbook", textbook)):
        x, labels = batch(work, world, rank)
        loss = module(x, labels)
        loss.backward()
        weight = module.weight.grad
        found[name] = [loss.item(), x.grad, weight.to_local() if name == "head" else weight]
    return found


def test_textbook_computes_the_same(ranks: Any) -> None:
    for found in ranks(2).run(_both):
        # float32, and gradients of order 100 by weights whose length is of order 0.01
        torch.testing.assert_close(found["textbook"], found["head"], rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------------------------------------------- classes


@pytest.mark.slow
def test_new_rows_are_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "classes.py"),
        *args("--quick --seeds 0 1 --out"),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (tmp_path / "table.md").read_text() and run.stdout.count("\n") == 5
    for seed in json.loads((tmp_path / "results.json").read_text()).values():
        assert list(seed) == ["fresh", "directions", "raw means"]
        assert seed["directions"]["accuracies"][0] == seed["raw means"]["accuracies"][0], "the same directions"
        assert seed["directions"]["length_new"] == pytest.approx(seed["directions"]["length_before"], rel=1e-4)
        assert seed["raw means"]["length_new"] > 2 * seed["directions"]["length_new"]


# ---------------------------------------------------------------------------------------------------- losses


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import losses

    return losses


def finished(losses: Any, name: str, seed: int, out: Path, tar: float) -> Path:
    """A run as it would have been left, with figures of our own."""
    run = losses.Run(name, seed, 12, out)
    run.folder.claim(partial(save_config, to_config(train_parser(), ["--config", losses.QUICKSTART, *run.arguments])))
    sets = [{"name": split, "tar": {"1e-3": tar, "1e-4": tar / 2}, "rank1": 1.0} for split in ("seen", "new")]
    run.folder.write_metrics({"evaluations": sets})
    return Path(run.folder.path)


def test_the_settings_of_every_loss_are_valid(losses: Any, tmp_path: Path) -> None:
    used, parser = set(), train_parser()
    for name in losses.LOSSES:
        config = to_config(parser, ["--config", losses.QUICKSTART, *losses.Run(name, 0, 12, tmp_path).arguments])
        check_effects(config)
        used.add(config.head.margin.name)
    assert used == set(MarginSettings.names) - {"CombinedMargin", "AdaptiveMargin"}


def test_finished_runs_are_tabled_and_not_run_again(
    losses: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, tar in ((0, 0.8), (1, 0.9)):
        finished(losses, "arcface", seed, tmp_path, tar)
    finished(losses, "softmax", 0, tmp_path, 0.5)
    began = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/config.yaml"))]
    losses.main(["--out", str(tmp_path), "--only", "arcface", "--seeds", "0", "1"])
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/config.yaml"))] == began
    out = capsys.readouterr().out
    assert out == (tmp_path / "table.md").read_text()
    ours, half = "0.850 (0.800–0.900)", "0.425 (0.400–0.450)"
    ones = "1.000 (1.000–1.000)"
    assert f"| ArcFace | {ours} | {half} | {ones} | {ours} | {half} | {ones} | 2 |" in out
    assert "| softmax | 0.500 (0.500–0.500) |" in out, "what was run before stays in the table"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arcface"]["seeds"]["1"]["new"]["1e-3"] == 0.9
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_with_other_settings_is_refused(losses: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(losses, "arcface", 0, tmp_path, 0.8)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("scale: 32.0", "scale: 16.0"))
    with pytest.raises(SystemExit):
        losses.main(["--out", str(tmp_path), "--only", "arcface", "--seeds", "0"])
    assert "head.margin.scale = 16.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_loss_is_trained_and_an_interrupted_run_goes_on(losses: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "losses.py"), *args("--seeds 0 --epochs 2 --only normface")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        run = subprocess.run(
            [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=400, env=environment
        )
        assert run.returncode == 0, run.stderr
        assert "| NormFace (no margin) | 0." in run.stdout
        (folder,) = (path.parent for path in tmp_path.glob("*/metrics.json"))
        (folder / "metrics.json").unlink()
        assert "1 of 1: NormFace" in run.stderr


# ---------------------------------------------------------------------------------------------------- sampling


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sampling

    return sampling


def sampled(sampling: Any, name: str, seed: int, out: Path, tar: float) -> None:
    """A finished run with figures of our own."""
    case = next(case for case in (*sampling.CASES, *sampling.LARGE_CASES) if case.name == name)
    rank = {"rank-1": 0.5}
    of_places = {"other places": {"TAR @ FAR 1e-3": tar, "TAR @ FAR 1e-4": None, **rank}, "unseen names": rank}
    of_glyphs = {split: {"TAR @ FAR 1e-3": tar, "TAR @ FAR 1e-4": tar / 2, **rank} for split in ("seen", "new")}
    figures = {
        "identities": 20_000,
        "samples": 183_167,
        "steps": 1428,
        "batch_size": 512,
        "seconds_per_step": 0.2,
        "rows": 10_000 * case.rate + 250,
        "shares": [0.75, 0.25, 0.0],
        "sets": of_places if case.data == "places" else of_glyphs,
    }
    folder = out / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    (folder / sampling.FIGURES).write_text(json.dumps(figures))


def test_the_settings_of_every_sampled_case_are_valid(sampling: Any, losses: Any, tmp_path: Path) -> None:
    _, asked = sampling._asked(["--out", str(tmp_path)])
    cases = (*sampling.CASES, *(case for case in sampling.LARGE_CASES if case.data == "large"))
    runs = [sampling.Run(case, 2, asked) for case in cases]
    assert len({run.folder.path for run in runs}) == len(cases)
    assert [case.name for case in cases[:3]] == ["all-r1", "dense-r0.1", "dense-r0.02"], "what decides comes first"
    parser = train_parser()
    for run in runs:
        config = to_config(parser, ["--config", losses.QUICKSTART, *run.arguments])
        check_effects(config)
        assert (config.head.sample_rate, config.seed) == (run.case.rate, 2)
        assert config.data.identities == (20_000 if run.case.data == "glyphs" else 72_000)


def test_finished_runs_of_sampling_are_tabled_and_not_run_again(
    sampling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, tar in ((0, 0.8), (1, 0.9)):
        sampled(sampling, "all-r1", seed, tmp_path, tar)
        for kind in ("dense", "still"):
            for rate in (0.1, 0.02):
                sampled(sampling, f"{kind}-r{rate:g}", seed, tmp_path, tar - (0.1 if kind == "still" else 0.01))
    sampled(sampling, "places-all-r1", 0, tmp_path, 0.4)
    sampled(sampling, "places-still-r0.1", 0, tmp_path, 0.3)
    sampling.main(["--out", str(tmp_path), "--known", "none", "--only", "all-*", "--seeds", "0", "1"])
    out = capsys.readouterr().out
    assert out == (tmp_path / "table.md").read_text()
    lines = out.splitlines()
    assert lines[0] == "Characters: 20,000 classes, 183,167 samples, 1,428 steps of 512, 2 ranks."
    ours, half = "0.850 (0.800–0.900)", "0.425 (0.400–0.450)"
    rank = "0.500 (0.500–0.500)"
    figures = f"{ours} | {half} | {rank} | {ours} | {half} | {rank}"
    assert f"| 1 | all classes | {figures} | 0.200 | 10,250 | 75 % / 25 % / 0 % | 2 |" in lines
    assert [line.count("|") for line in lines if "|" in line] == [13] * 7 + [11] * 4
    assert "| 0.1 | still | 0.300 (0.300–0.300) | — |" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0]["seeds"]["1"]["sets"]["new"]["TAR @ FAR 1e-3"] == 0.9
    for name in ("sampling.png", "sampling_places.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        sampling.main(["--out", str(tmp_path), "--only", "nothing-*"])
    assert "--only nothing-*: no case has such a name" in capsys.readouterr().err


def test_runs_of_sampling_that_were_made_elsewhere_are_not_made_again(
    sampling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    settings = {"data": "glyphs", "identities": 20_000, "epochs": 4, "batch_size": 512, "lr": 0.2}
    for seed, given in ((0, settings), (1, {**settings, "lr": 0.1})):
        sampled(sampling, "all-r1", seed, there, 0.8 + seed / 10)
        path = there / f"all-r1-seed{seed}" / sampling.FIGURES
        path.write_text(json.dumps({"settings": given, **json.loads(path.read_text())}))
    sampling.main(["--out", str(there), "--known", "none", "--only", "all-*", "--seeds", "0", "1"])
    assert "0.850 (0.800–0.900)" in capsys.readouterr().out
    known = ["--known", str(there / "results.json"), "--only", "all-*"]
    sampling.main(["--out", str(here), *known, "--seeds", "0"])
    printed = capsys.readouterr()
    assert "1 of 1 runs are finished" in printed.err and "| 0.800 (0.800–0.800) |" in printed.out
    assert not (here / "all-r1-seed0").exists()
    _, asked = sampling._asked(["--out", str(here), *known])
    runs = [sampling.Run(sampling.CASES[0], seed, asked) for seed in (0, 1, 2)]
    assert [run.finished for run in runs] == [True, False, False], "with another learning rate, or not at all"


def run_sampling(arguments: str, out: Path) -> str:
    """What the benchmark prints, its table and then its progress."""
    command = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), *args(f"{arguments} --out"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sampled_case_is_trained(tmp_path: Path) -> None:
    cases = "--data quickstart --identities 100 --epochs 1 --batch_size 128 --seeds 0 --only all-r1 dense-r0.1"
    for count in (0, 2):
        printed = run_sampling(cases, tmp_path)
        assert f"{count} of 2 runs are finished" in printed
    assert "| 1 | all classes | 0." in printed and "| 50 | 100 % / 0 % / 0 % | 1 |" in printed
    sampled = json.loads((tmp_path / "dense-r0.1-seed0" / "figures.json").read_text())
    assert 5 < sampled["rows"] < 50 and sum(sampled["shares"]) == pytest.approx(1) and sampled["shares"][1] > 0.3
    assert not (tmp_path / "all-r1-seed0" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_names_of_places_are_trained_on(tmp_path: Path) -> None:
    cases = "--large --places 1500 --place_epochs 1 --seeds 0 --only places-all-r1 places-still-r0.1"
    printed = run_sampling(cases, tmp_path)
    assert "Names of places: 1,500 classes" in printed and "| 0.1 | still | 0." in printed


# ---------------------------------------------------------------------------------------------------- large glyphs


def test_the_table_of_the_large_glyph_set_says_what_was_measured(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import glyphs_large

    rows = [
        {
            "rate": rate,
            "settings": [40_000, 832, 512],
            "identities": 40_000,
            "images": 426_331,
            "steps": 832,
            "seconds_per_step": 0.1 + rate,
            "peak_private_mib": 1000 + 1234 * rate,
            "sets": {
                "seen": {"1e-3": rate / 2, "1e-4": None, "rank1": 0.9},
                "new": {"1e-3": 0.5, "1e-4": 0.25, "rank1": 0.75},
            },
        }
        for rate in (1.0, 0.1)
    ]
    lines = glyphs_large.table(rows).splitlines()
    assert lines[2] == "| 1 | 0.500 | — | 0.900 | 0.500 | 0.250 | 0.750 | 1.100 | 2,234 MiB |"
    assert lines[3].startswith("| 0.1 | 0.050 | — |") and lines[3].count("|") == lines[0].count("|") == lines[1].count(
        "|"
    )
    assert lines[-1] == "40,000 identities, 426,331 images, 832 steps of 512, 2 ranks."
    glyphs_large.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_benchmark_of_galleries(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gallery.py"), "--quick", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("| 4,000 embeddings of 32, 2 threads |") and "by codes of 4 bytes" in run.stdout
    for what in (
        "build",
        "open",
        "recall of 1 and of 10, strangers",
        "searches a second, 64 at a time",
        "add 1 identity",
    ):
        assert any(line.startswith(f"| {what}") for line in lines), what
    assert not list(tmp_path.iterdir())
