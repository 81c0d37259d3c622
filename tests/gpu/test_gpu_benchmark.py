"""What `benchmarks/gpu.py` will ask of a GPU, on the pretended one: a case that cannot pass would tell nothing there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pretend_gpu import PretendGpu
from runner import Ranks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _waits(rank: int, world: int) -> dict[str, int]:
    """Waits of the fourth step of each case of the part `waits`."""
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_waits

    found = {}
    with PretendGpu() as gpu:
        run: Any = SimpleNamespace(device=gpu.device, quick=True)
        for name, options in gpu_waits.KINDS.items():
            step = gpu_waits.step_of(run, **options)
            for _ in range(3):
                step()
            gpu.clear()
            step()
            found[name] = gpu.counts.waits
    return found


def test_steps_wait_as_often_as_the_benchmark_allows(gpu_ranks: Callable[[int], Ranks]):
    (found,) = gpu_ranks(1).run(_waits)
    assert len(found) == 5
    assert set(found.values()) == {1}, found


def _proofs(rank: int, world: int, every: int) -> list[str]:
    """Of every so many cases of the part `proof` those that are not PASS, at the sizes of a CPU; bf16 rounds otherwise than on a GPU."""
    sys.path.insert(0, str(BENCHMARKS))
    import gpu_proof

    with PretendGpu() as gpu:
        cases = [case for case in gpu_proof.cases(quick=True) if case.dtype != "bf16"][::every]
        found = {str(case): gpu_proof.judged(case, gpu_proof.errors_of(case, gpu.device)) for case in cases}
        assert not gpu.mistakes and len(found) > 100 // every
    return [f"{name}: {outcome.text}" for name, outcome in found.items() if outcome.verdict != "PASS"]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_heads_equal_dense_float64_as_the_benchmark_compares_them(gpu_ranks: Callable[[int], Ranks], every: int):
    assert gpu_ranks(1).run(_proofs, every) == [[]]
