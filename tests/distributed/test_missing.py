"""RankMissing names a rank that was stopped, killed, failed or ended, in every collective of the head.

Here every case has processes and a store of its own: what is left of a process group afterwards is of no use to other
tests.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from missing_ranks import answers, set_timeout, told
from runner import forking
from torch import Tensor, nn

from partial_fc import (
    JoinedBatches,
    PartialFC,
    RankMissing,
    clip_grad_norm_,
    gather,
    naming_the_missing,
    save_checkpoint,
)
from partial_fc.distributed import inquiry, machines
from partial_fc.distributed.inquiry import is_peer_error

D, C, VICTIM = 6, 10, 1
SECONDS = 3.0  # the timeout of the groups, once all ranks are there


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(3, D, requires_grad=True), torch.tensor([0, 1, 9])


# ---------------------------------------------------------------------------------------------------- every collective


def _forward(head: PartialFC, group: Any) -> Callable[[], Any]:
    return lambda: head(*data())


def _gather(head: PartialFC, group: Any) -> Callable[[], Any]:
    return lambda: gather(*data(), group=group)


def _backward(head: PartialFC, group: Any) -> Callable[[], Any]:
    return head(*data()).backward


def _clipping(head: PartialFC, group: Any) -> Callable[[], Any]:
    head(*data()).backward()
    return lambda: clip_grad_norm_([], head, max_norm=1.0)


def _questions(head: PartialFC, group: Any) -> Callable[[], Any]:
    return lambda: head.nearest_classes(1)


def _ddp(head: PartialFC, group: Any) -> Callable[[], Any]:
    model = nn.parallel.DistributedDataParallel(nn.Linear(D, D), process_group=group)
    loss = model(data()[0]).sum()

    def backward() -> None:
        with naming_the_missing("the step", group):
            loss.backward()
        assert model  # without it there is no reduction

    return backward


def _joined(head: PartialFC, group: Any) -> Callable[[], Any]:
    batches = iter(JoinedBatches([data(), data()], group=group))
    next(batches)
    return lambda: next(batches)


def _saving(head: PartialFC, group: Any) -> Callable[[], Any]:
    return lambda: save_checkpoint("checkpoint", head=head)


COLLECTIVES: dict[str, Callable[[PartialFC, Any], Callable[[], Any]]] = {
    "the exchange of a batch": _forward,
    "the exchange of a batch (": _gather,
    "the sum of the embeddings' gradients in backward": _backward,
    "the norm of gradients over ranks": _clipping,
    "nearest_classes": _questions,
    "the step": _ddp,
    "the check which ranks have a batch (JoinedBatches)": _joined,
    "save_checkpoint": _saving,  # over all ranks: the last, as nothing goes on in a group afterwards
}


def every_collective(rank: int, world: int, folder: str) -> list[Any]:
    """One rank fails with an exception of its own before each, and goes on elsewhere; the last one it comes to too
    late."""
    os.chdir(folder)
    inquiry.SETTLE = 0.3
    store, prepared = dist.distributed_c10d._get_default_store(), []  # type: ignore[attr-defined]
    groups = [
        None if make is _saving else dist.new_group(timeout=timedelta(seconds=60)) for make in COLLECTIVES.values()
    ]
    for make, group in zip(COLLECTIVES.values(), groups, strict=True):
        prepared.append(make(PartialFC(D, C, group=group), group))
    dist.barrier()
    for group in groups:
        set_timeout(1.0, group)
    if rank == VICTIM:
        store.wait(["done"], timedelta(seconds=100))
        return [told(prepared[0])]
    found = [told(action) for action in prepared]
    store.set("done", "")
    return found


def test_a_rank_that_fails_before_a_collective_is_named_whichever_it_is(tmp_path):
    results = answers(3, every_collective, str(tmp_path))
    for rank in (0, 2):
        for what, (message, missing, cause) in zip(COLLECTIVES, results[rank], strict=True):
            assert missing == (VICTIM,), (rank, what, results[rank])
            assert message.startswith(f"rank {VICTIM} did not reach {what}"), message
            assert "the process group can no longer be used" in message.lower()
            assert cause.startswith("RuntimeError") and "gloo" in cause
        assert "waited 1 s, the timeout" in results[rank][0][0]
        assert "is running, but elsewhere in its program" in results[rank][0][0]
    ((message, missing, _),) = results[VICTIM]
    assert missing == (VICTIM,)
    assert message.startswith(
        f"rank {VICTIM} (this rank) reached the exchange of a batch after the other ranks had given up"
    )


# ----------------------------------------------------------------------------------------------- stopped, killed, ended


def victim_of(rank: int, world: int, victim: int, number: int) -> tuple[str, tuple[int, ...], str, float]:
    head = PartialFC(D, C)
    head(*data()).backward()
    dist.barrier()
    set_timeout(SECONDS)
    if rank == victim:
        os.kill(os.getpid(), number) if number else os._exit(0)
    start = time.monotonic()
    return *told(lambda: head(*data())), time.monotonic() - start


@pytest.mark.parametrize(("world", "victim"), [(3, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_at_the_timeout(world, victim):
    """Rank 0 hosts the store, which does not answer then."""
    results = answers(world, victim_of, victim, int(signal.SIGSTOP), silent=(victim,))
    assert len(results) == world - 1
    for message, missing, cause, seconds in results.values():
        assert missing == (victim,) and f"rank {victim} did not reach the exchange of a batch" in message
        assert "waited 3 s, the timeout" in message and "imed out" in cause and seconds > SECONDS - 0.5
        assert (
            ("the store that it hosts at" in message and "does not respond" in message)
            if victim == 0
            else "is stopped" in message
        )


def asked_of_a_busy_store(rank: int, world: int) -> tuple[str, tuple[int, ...], str]:
    """The store takes connections, and is busy for longer than SILENCE with something else."""
    head = PartialFC(D, C)
    dist.barrier()
    set_timeout(SECONDS)
    if rank == 1:
        time.sleep(600)  # until the test ends this process
    connect, inquiry.SETTLE, inquiry.SILENCE = inquiry.own_connection, 0.2, 0.3

    def late(store: Any) -> Any:
        time.sleep(1.5)
        return connect(store)

    inquiry.own_connection = late
    return told(lambda: head(*data()))


def test_a_store_that_is_busy_is_waited_for():
    """torch's server stands still while it asks a name server for the name of a new peer."""
    results = answers(3, asked_of_a_busy_store, silent=(1,))
    assert [results[rank][1] for rank in (0, 2)] == [(1,)] * 2, results


@pytest.mark.parametrize(
    ("world", "victim", "number"),
    [
        (3, 1, signal.SIGKILL),
        (2, 1, 0),
        pytest.param(2, 0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(3, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_was_killed_or_has_ended_is_named_before_the_timeout(world, victim, number):
    """number: of the signal; 0 for a rank whose loop and program end earlier than the others'."""
    results = answers(world, victim_of, victim, int(number), silent=(victim,))
    assert len(results) == world - 1
    for message, missing, cause, _ in results.values():
        assert "its data ended before the others'" in message and "can no longer be used" in message
        assert missing == (victim,) and f"rank {victim} did not reach the exchange of a batch" in message
        assert "before the timeout" in message and "imed out" not in cause
        assert (
            ("the store that it hosts at" in message and "is gone" in message)
            if victim == 0
            else "has exited" in message
        )


@pytest.mark.slow
def test_one_of_many_is_named_although_its_neighbours_alone_hear_of_it():
    """The others wait for these neighbours, which do not end here, until the timeout: they are not missing."""
    results = answers(8, victim_of, 3, int(signal.SIGKILL), silent=(3,))
    assert sorted(results) == [0, 1, 2, 4, 5, 6, 7]
    for message, missing, _, _ in results.values():
        assert missing == (3,) and "has exited" in message, message
    assert any("before the timeout" in message for message, *_ in results.values())
    assert any("the timeout;" in message for message, *_ in results.values())


def on_a_mesh(rank: int, world: int) -> tuple[str, tuple[int, ...], str]:
    """Rank 3 stays away: its shard's other rank misses it, and the replicas of both hear why these do not come."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    head = PartialFC(D, C, group=mesh)
    dist.barrier()
    for dimension in (0, 1):
        set_timeout(SECONDS, mesh.get_group(dimension))
    if rank == 3:
        time.sleep(600)  # until the test ends this process
    return told(lambda: head(*data()))


@pytest.mark.slow
def test_on_a_mesh_the_rank_that_all_wait_for_is_named():
    results = answers(4, on_a_mesh, silent=(3,))
    assert [results[rank][1] for rank in range(3)] == [(3,)] * 3, results


# ---------------------------------------------------------------------------------------------- what is no peer's doing


def test_other_errors_pass_as_they_are():
    others = (
        ValueError("labels"),
        RuntimeError("DataLoader timed out after 5 seconds"),
        RuntimeError("connection of layers"),
        OSError("x"),
    )
    for error in others:
        assert not is_peer_error(error)
        with pytest.raises(type(error)) as caught, naming_the_missing("a step"):
            raise error
        assert caught.value is error
    assert is_peer_error(RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5"))
    assert is_peer_error(dist.DistBackendError("NCCL error in: ..., ncclRemoteError: A call failed"))
    gone = RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError) as without_group, naming_the_missing():
        raise gone
    assert without_group.value is gone, "without a process group nobody can be missing"


def state_in(store: Any, rank: int) -> str:
    process = machines.process_of(rank, store)
    return "" if process is None else machines.state_of(process)


def one_that_is_named_already(rank: int, world: int) -> tuple[bool, list[str]]:
    """A RankMissing passes through wider blocks; this process is known to the store once."""
    inner = RankMissing("rank 5 did not come", (5,))
    try:
        with naming_the_missing("the wide one"), naming_the_missing("the narrow one"):
            raise inner
    except RankMissing as error:
        same = error is inner and error.ranks == (5,)
    PartialFC(D, C)
    dist.barrier()
    store = inquiry.default_store()
    return same, [state_in(store, r) for r in range(world)]


def test_a_named_error_passes_and_processes_are_known(ranks):
    for same, states in ranks(2).run(one_that_is_named_already):
        assert same and all("is running, but elsewhere" in state for state in states)


def test_the_state_of_processes_is_seen(tmp_path):
    """Of one that was stopped, one that has ended, and one whose number another process has now."""
    context = forking()
    process = context.Process(target=time.sleep, args=(600,))
    process.start()
    store = dist.FileStore(str(tmp_path / "store"), 1)

    def seen(started: str) -> str:
        store.set(
            f"{machines.PROCESS}/7",
            json.dumps([machines.machine_id(), process.pid, started]),
        )
        return state_in(store, 7)

    assert process.pid is not None and Path(f"/proc/{process.pid}").exists()
    started = machines.stat_of(process.pid)[1]
    assert "is running, but elsewhere" in seen(started)
    assert "has exited" in seen("1"), "another process has its number"
    os.kill(process.pid, signal.SIGSTOP)
    while machines.stat_of(process.pid)[0] != "T":
        time.sleep(0.01)
    assert "is stopped" in seen(started)
    process.kill()
    process.join()
    assert "has exited" in seen(started)
    assert state_in(store, 8) == ""
