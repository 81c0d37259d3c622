"""PreemptionGuard: signals are noted by one rank, agreed on by all, and otherwise have no effect."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from partial_fc import PreemptionGuard


def leave_together(rank: int, world: int, number: signal.Signals) -> tuple[int, str | None]:
    """The step after which this rank left a loop with a collective in each step; the last rank is asked to in the
    fourth, repeatedly."""
    with PreemptionGuard() as guard:
        for step in range(10):
            if step == 4 and rank == world - 1:
                for _ in range(3):
                    os.kill(os.getpid(), number)
            dist.all_reduce(torch.ones(3))
            if guard.requested():
                return step, guard.noted.name if guard.noted else None
    return -1, None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_leave_after_the_same_step(ranks, world, number):
    results = ranks(world).run(leave_together, number)
    assert results == [(4, None)] * (world - 1) + [(4, number.name)]


def ask_a_part(rank: int, world: int) -> bool:
    """Ranks 0 and 1 agree among themselves."""
    group = dist.new_group([0, 1])
    with PreemptionGuard(group=group) as guard:
        if rank != 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return rank < 2 and guard.requested()


def test_a_group_agrees_by_itself(ranks):
    assert ranks(3).run(ask_a_part) == [True, True, False]


def test_the_first_signal_is_told_at_once(capfd):
    with PreemptionGuard(notice="stopping soon"):
        assert capfd.readouterr().err == ""
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == "\nstopping soon\n"
    with PreemptionGuard():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr() == ("", "")


def test_signals_are_what_they_were_afterwards():
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with PreemptionGuard([signal.SIGUSR1]) as guard:
            assert guard.noted is None and not guard.requested()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "only those that were named"
            os.kill(os.getpid(), signal.SIGUSR1)
            assert guard.noted == signal.SIGUSR1 and guard.requested() and not seen
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert guard.requested(), "what was noted stays noted"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_one_that_was_not_entered_notes_nothing():
    assert not PreemptionGuard().requested() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_outside_the_main_thread():
    errors: list[str] = []

    def enter() -> None:
        try:
            PreemptionGuard().__enter__()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == ["PreemptionGuard must be entered in the main thread: Python handles signals only there"]


def test_the_exit_code_is_that_of_a_failure_that_passes():
    assert PreemptionGuard.EXIT_CODE == os.EX_TEMPFAIL == 75
