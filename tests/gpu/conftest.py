"""For tests on the pretend GPU: ranks whose processes have the device, started once for this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pretend_gpu
import pytest
from runner import Ranks


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[Callable[[int], Ranks]]:
    """`gpu_ranks(world)`: processes whose default group is the device's; one alone has no group."""
    if not pretend_gpu.AVAILABLE:
        pytest.skip("this torch cannot have a device that is written in Python")
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world, pretend_gpu.join))
    for pool in pools.values():
        pool.stop(kill=True)
