"""The benchmark command runs from end to end at sizes that say nothing about speed, and its textbook peer computes the same as the head."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
CASES = {"exact", "sampled", "many", "bf16", "memory", "memory_in_backward", "peers", "growth"}


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
