from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from runner import Ranks


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world)`: the processes of that world size, shared by the whole session."""
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world))
    for pool in pools.values():
        pool.stop(kill=True)  # a process that ends by itself takes its time, up to 10 seconds with threads of gloo
