"""Ranks that come to different operations hear of it at once, alike, by name; errors of the backend stay what they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from missing_ranks import answers, set_timeout, told
from torch import Tensor

from partial_fc import (
    ArcFace,
    CenterLoss,
    Checkpointer,
    DivergenceWatch,
    JoinedBatches,
    PartialFC,
    RowOptimizer,
    clip_grad_norm_,
    export_weights,
    gather,
    import_weights,
    load_checkpoint,
    outliers,
    save_checkpoint,
)
from partial_fc.batch.status import Status
from partial_fc.distributed.inquiry import is_peer_error
from partial_fc.distributed.meeting import OPERATIONS, WIDTH

D, C = 6, 10
BATCH = "the exchange of a batch"


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(3, D), torch.tensor([0, 1, 9])


# Each goes on one rank, while the others are in the forward of a batch.
ELSEWHERE: dict[str, Callable[[PartialFC, RowOptimizer], Any]] = {
    "save_checkpoint": lambda head, optimizer: save_checkpoint("new", head=head),
    "load_checkpoint": lambda head, optimizer: load_checkpoint("old", head=head),
    "Checkpointer.save": lambda head, optimizer: Checkpointer("steps").save(1, head=head),
    "Checkpointer.load": lambda head, optimizer: Checkpointer("steps").load(head=head),
    "export_weights": lambda head, optimizer: export_weights("new.safetensors", head),
    "import_weights": lambda head, optimizer: import_weights("old", head),
    "load_state_dict": lambda head, optimizer: head.load_state_dict(head.state_dict()),
    "load_state_dict ": lambda head, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "topk": lambda head, optimizer: head.topk(data()[0], 2),
    "nearest_classes": lambda head, optimizer: head.nearest_classes(2),
    "predict": lambda head, optimizer: head.predict(data()[0], 2),
    "outliers": lambda head, optimizer: outliers(head, *data()),
    "expand": lambda head, optimizer: head.expand(2),
    "remap": lambda head, optimizer: head.remap(list(range(C))),
    "init_from_embeddings": lambda head, optimizer: head.init_from_embeddings([data()]),
    "the building of a head": lambda head, optimizer: CenterLoss(D, C),
    "the check which ranks have a batch (JoinedBatches)": lambda head, optimizer: next(iter(JoinedBatches([data()]))),
    "the comparison of checksums": lambda head, optimizer: _watched(head),
    "a forward with a gathered batch": lambda head, optimizer: head(optimizer.batch),
}


def _watched(head: PartialFC) -> None:
    head.watch.step()  # type: ignore[operator,union-attr]


def apart(rank: int, world: int, folder: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
    os.chdir(folder)
    head = PartialFC(D, C, ArcFace(scale=16.0))
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    save_checkpoint("old", head=head)
    object.__setattr__(head, "watch", DivergenceWatch(head, every=1))
    optimizer.batch = gather(*data())  # type: ignore[attr-defined]
    found = {}
    for what, action in ELSEWHERE.items():
        found[what] = told(lambda action=action: action(head, optimizer) if rank == 0 else head(*data()))
    head(*data())  # the group goes on
    return {**found, "made": (",".join(sorted(os.listdir("."))), (), "")}


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_hears_who_is_where(ranks, world, tmp_path):
    results = ranks(world).run(apart, str(tmp_path))
    assert len({str(each) for each in results}) == 1, "the same on every rank"
    others = "rank 1 is" if world == 2 else "ranks 1 and 2 are"
    for what in ELSEWHERE:
        message = results[0][what][0]
        assert message.startswith(
            f"ranks have come to different collectives: rank 0 is in {what.strip()}, {others} in {BATCH}. "
        ), (what, message)
        assert "if rank == 0" in message
    assert "new" not in results[0]["made"][0].split(","), "nothing is written before all ranks have come"


def test_a_meeting_has_the_size_of_a_status():
    assert len(Status._fields) == WIDTH
    assert len(set(OPERATIONS)) == len(OPERATIONS)


def in_groups_apart(head: PartialFC, rank: int) -> Any:
    """The batch travels in a group of the head's own: both ranks wait for the other."""
    return save_checkpoint("new", head=head) if rank == 0 else head(*data())


def in_the_middle_of_a_step(head: PartialFC, rank: int) -> Any:
    """An all-gather on one rank, an all-reduce on the other."""
    return head.topk(data()[0], 1) if rank == 0 else clip_grad_norm_([], head, max_norm=1.0)


def until_the_timeout(
    rank: int, world: int, folder: str, action: Callable[[PartialFC, int], Any]
) -> tuple[str, tuple[int, ...], str]:
    os.chdir(folder)
    group = dist.new_group(timeout=timedelta(seconds=60))
    head = PartialFC(D, C, group=group)
    head(*data()).backward()
    dist.barrier()
    for each in (None, group):
        set_timeout(1.0, each)
    return told(lambda: action(head, rank))


APART = {
    in_groups_apart: "rank 0 is in save_checkpoint, rank 1 is in the exchange of a batch",
    in_the_middle_of_a_step: "rank 0 is in topk, rank 1 is in the norm of gradients over ranks",
}


@pytest.mark.parametrize("action", list(APART), ids=lambda action: action.__name__)
def test_apart_until_the_timeout(tmp_path, action):
    results = answers(2, until_the_timeout, str(tmp_path), action)
    for message, missing, cause in results.values():
        assert APART[action] in message, message
        assert missing == () and "network" not in message
        assert cause.startswith("RuntimeError") and "gloo" in cause


def watched_unequally(rank: int, world: int) -> str:
    watch = DivergenceWatch(torch.nn.Linear(2, 2), every=100)
    for _ in range(1 + rank):
        watch.step()
    try:
        watch.compare()
    except ValueError as error:
        return str(error)
    return ""


DIFFERENT = (
    "ranks have called step() of a DivergenceWatch different numbers of times since the last comparison: 1, 2; every "
    "rank must call it once a training step"
)


def test_watches_of_different_lengths(ranks):
    assert ranks(2).run(watched_unequally) == [DIFFERENT] * 2


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1691, {}, NCCL version 2.27.7\n{}"
PEERS = (
    dist.DistBackendError(NCCL.format("remote process exited or there was a network error", "ncclRemoteError: A call")),
    dist.DistBackendError(NCCL.format("unhandled system error", "ncclSystemError: System call (e.g. socket) failed")),
    dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST)"),
    RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5"),
    RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation"),
    dist.DistNetworkError("The client socket has failed to connect"),
)
OWN = (
    dist.DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage: Last error:\nDuplicate GPU detected")),
    dist.DistBackendError(NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA failed.")),
    dist.DistBackendError(NCCL.format("invalid argument", "ncclInvalidArgument: Invalid value")),
    dist.DistBackendError(NCCL.format("internal error", "ncclInternalError: Internal check failed.")),
    RuntimeError("[enforce fail at .../gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 192 vs 8"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("No backend type associated with device type cpu"),
)


@pytest.mark.parametrize("error", PEERS, ids=lambda error: str(error)[:50])
def test_what_a_peer_did(error):
    assert is_peer_error(error)


@pytest.mark.parametrize("error", OWN, ids=lambda error: str(error)[-40:])
def test_what_no_peer_did(error):
    assert not is_peer_error(error)
