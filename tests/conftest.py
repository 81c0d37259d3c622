"""For all tests: ranks that are started once, a browser, seeded random numbers, a cache of their own."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from browser import Browser, find_browser
from runner import Ranks, seed

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # torch may import triton, which decides then whether it interprets kernels


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed(0)  # before fixtures, of any scope


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed(0)  # the same numbers, whatever fixtures and tests ran before


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: each collection would walk over all of it


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world)`: the processes of that world size, shared by the whole session."""
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world))
    for pool in pools.values():
        pool.stop(kill=True)  # a process that ends by itself takes its time, up to 10 seconds with threads of gloo


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices of data sets go to a folder of the session, not to the user's."""
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A command that was asked to stop ignores further signals, which is for a process that is about to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`mistake("train", ...)`: the one line that the command prints of what is wrong; it ends with exit code 2."""
    from partial_fc.training.cli.main import main

    def error_of(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        (line,) = (each for each in capsys.readouterr().err.splitlines() if each.startswith("partial-fc: error: "))
        return line

    return error_of


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    with Browser() as opened:
        yield opened
