"""A rank that fails alone, in the middle of a step, is named with its error by the ranks that wait for it.

Every case has processes and a store of its own, as in test_missing.py.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from missing_ranks import answers, set_timeout, told
from torch import Tensor

from partial_fc import ArcFace, CenterLoss, PartialFC, naming_the_missing
from partial_fc.distributed import failures, inquiry

D, C, VICTIM = 6, 10, 1
WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB"


class _Fails(torch.autograd.Function):
    """An allocation that fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(WORDS)


class Hungry(ArcFace):
    """A margin for which no memory is left, where `fails` says so."""

    fails = False

    def target(self, cosine: Tensor, positives: Any = None) -> Tensor:
        if self.fails:
            raise torch.OutOfMemoryError(WORDS)
        return super().target(cosine, positives)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(3, D, requires_grad=True), torch.tensor([0, 1, 9])


def step_without_memory(rank: int, world: int, where: str) -> tuple[str, tuple[int, ...], str]:
    """What each rank raises where one has no memory in forward, after the exchange, or in backward."""
    inquiry.SETTLE = 0.3
    head = CenterLoss(D, C) if where == "center" else PartialFC(D, C, Hungry())
    head(*data()).backward()
    head.zero_grad()
    dist.barrier()
    set_timeout(2.0)
    Hungry.fails = where == "forward" and rank == VICTIM
    if where == "center" and rank == VICTIM:
        head._differences = mock.Mock(side_effect=torch.OutOfMemoryError(WORDS))

    def step() -> None:
        x, labels = data()
        with naming_the_missing("a training step"):
            loss = head(x, labels)
            (_Fails.apply(loss) if where == "backward" and rank == VICTIM else loss).backward()

    if rank != VICTIM:
        return told(step)
    try:
        step()
    except torch.OutOfMemoryError as error:
        return str(error), (), ""
    return "nothing was raised", (), ""


@pytest.mark.parametrize("where", ["forward", "backward", "center"])
def test_ranks_that_wait_for_one_without_memory_say_so(where):
    found = answers(3, step_without_memory, where)
    assert found[VICTIM][0] == WORDS, "its own error passes unchanged"
    place = {"forward": "the forward of a head, in partial_fc.softmax.", "backward": "a training step: CUDA"}
    for rank in (0, 2):
        message, missing, _ = found[rank]
        assert missing == (VICTIM,), message
        assert (
            f"rank {VICTIM}: it ran out of memory in {place.get(where, 'the forward of a center loss, in partial_fc.centers')}"
            in message
        ), message
        assert WORDS in message and " s ago), and its process (pid " in message


def alone(rank: int, world: int) -> list[str]:
    """The words of a rank's last error, as another rank reads them."""
    store: Any = inquiry.default_store()
    words = []
    for error in (ValueError("a label is no class"), RuntimeError(""), RuntimeError("x" * 400)):
        if rank == VICTIM:
            with (
                contextlib.suppress(type(error)),
                naming_the_missing("the wide one"),
                naming_the_missing("the narrow one"),
            ):
                raise error
        dist.barrier()
        words.append(failures.failure_of(VICTIM, store))
        dist.barrier()
    assert failures.failure_of(7, store) == ""
    return words


def test_the_innermost_block_names_the_last_error(ranks):
    first, second, third = ranks(2).run(alone)[0]
    assert first.startswith("it raised ValueError in the narrow one: a label is no class (")
    assert second.startswith("it raised RuntimeError in the narrow one (")
    assert third.startswith("it raised RuntimeError in the narrow one: xxx") and "x... (" in third
    assert len(third) < 300


def test_a_store_that_does_not_respond_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(failures, "SILENCE", 0.1)
    monkeypatch.setattr(failures.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(failures, "default_store", lambda: time.sleep(60))
    begin = time.monotonic()
    failures.tell_own(torch.OutOfMemoryError(WORDS), "a step")
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(failures, "default_store", lambda: json.loads("{"))  # nor does its error hide the rank's own
    failures.tell_own(torch.OutOfMemoryError(WORDS), "a step")
