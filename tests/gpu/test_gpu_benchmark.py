"""What `benchmarks/gpu.py` will ask of a GPU, on the pretended one: a case that cannot pass would tell nothing there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
