"""The faults that users meet, at worlds 2 and 3: the same exception on every rank, and what is usable afterwards is
used.

The last rank of a world brings the fault; after each, all ranks take one good step, whose loss and gradients are those
of one dense process. docs/faults.md says which faults are tested elsewhere.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import any_message_of as message_of
from dense_losses import Loss, turned
from missing_ranks import answers, set_timeout, told
from near import near
from shards import everyones, local, whole
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    Checkpointer,
    CombinedMargin,
    NonFiniteError,
    NormFace,
    PartialFC,
    RowOptimizer,
)
from partial_fc.classes.head_state import DEFAULT_LOGITS_BUDGET
from partial_fc.softmax.tiles import logits_bytes, tile_rows

D, C, VALID = 6, 10, "valid are 0 to 9 and ignore_index -100"
Message = str
Fault = Callable[[int, int], Message]
WORLDS = pytest.mark.parametrize("world", [2, 3])


def good(rank: int, n: int = 4, classes: int = C) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


def build(classes: int = C, rate: float = 1.0, **options: Any) -> PartialFC:
    return PartialFC(D, classes, ArcFace(scale=8.0), rate, dtype=torch.float64, init_std=1.0, **options)


def equals_dense(head: PartialFC, rank: int, parts: list[tuple[Tensor, Tensor]]) -> float:
    """A step with each rank's part, against one dense process: loss, gradient of this rank's embeddings, gradient of
    the classes."""
    x, labels = parts[rank][0].clone().requires_grad_(), parts[rank][1]
    loss = head(x, labels)
    loss.backward()
    everything = torch.cat([part[0] for part in parts]).requires_grad_()
    w = whole(head.weight).clone().requires_grad_()
    expected = Loss("ArcFace", {"scale": 8.0})(everything, w, torch.cat([part[1] for part in parts]))
    expected.backward()
    assert everything.grad is not None and w.grad is not None
    start = sum(len(part[0]) for part in parts[:rank])
    of_x, of_w = everything.grad[start : start + len(x)] * len(parts), w.grad[head.shards.lo : head.shards.hi]
    near([loss.detach(), x.grad, local(head.weight.grad)], [expected.detach(), of_x, of_w], 1e-10)
    head.zero_grad()
    return loss.item()


def bad(head: PartialFC, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rank: int, world: int) -> Message:
    """What the head raises where the last rank brings another batch."""
    x, labels = good(rank)
    return message_of(head, *(change(x, labels) if rank == world - 1 else (x, labels)))


def told_alike(results: list[list[Message]]) -> list[Message]:
    """The messages, the same on every rank."""
    assert all(result == results[0] for result in results), results
    return results[0]


# ---------------------------------------------------------------------------------------------------- a bad batch

LABELS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], list[str]]] = {
    "out of range": (lambda x, y: (x, y.index_fill(0, torch.tensor([1]), 4711)), ["labels[1] is 4711", VALID]),
    "negative": (lambda x, y: (x, y.index_fill(0, torch.tensor([2]), -7)), ["labels[2] is -7", VALID]),
    "beside ignored": (lambda x, y: (x, torch.tensor([-100, -7, -100, 3])), ["labels[1] is -7", VALID]),
    "1-based": (lambda x, y: (x, torch.tensor([1, 2, 9, 10])), ["labels[3] is 10", VALID, "counted from 0"]),
    "int32": (lambda x, y: (x, y.int()), ["labels must be an int64 tensor, not torch.int32"]),
    "float": (lambda x, y: (x, y.double()), ["labels must be an int64 tensor, not torch.float64"]),
    "one-hot": (lambda x, y: (x, F.one_hot(y, C)), ["labels are [N, 10], 10 a sample"]),
    "a list": (lambda x, y: (x, y.tolist()), ["labels must be an int64 tensor, not list"]),  # type: ignore[dict-item, return-value]
}
EMBEDDINGS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], list[str]]] = {
    "width": (lambda x, y: (x[:, 1:], y), [f"embedding width {D} on rank 0 and {D - 1} on rank"]),
    "dtype": (lambda x, y: (x.float(), y), ["embedding dtype torch.float64 on rank 0 and torch.float32 on rank"]),
    "integers": (
        lambda x, y: (x.long(), y),
        ["embeddings must be float32, float64, bfloat16 or float16, not torch.int64"],
    ),
    "one sample without its dimension": (
        lambda x, y: (x[0], y[:1]),
        ["embeddings must be [N, D], but have 1 dimensions"],
    ),
    "too few labels": (lambda x, y: (x, y[:-1]), ["labels are for 3 samples, embeddings for 4"]),
    "another device": (lambda x, y: (x.to("meta"), y.to("meta")), ["the head is on cpu, embeddings on meta"]),
    "labels on another device": (lambda x, y: (x, y.to("meta")), ["labels are on meta, embeddings on cpu"]),
}


def bad_batches(rank: int, world: int, table: str) -> list[Message]:
    head, found = build(), []
    for change, _ in {"labels": LABELS, "embeddings": EMBEDDINGS}[table].values():
        found.append(bad(head, change, rank, world))
        equals_dense(head, rank, [good(r) for r in range(world)])
    return found


@WORLDS
def test_label_out_of_range_1_based_wrong_dtype(ranks, world):
    messages = told_alike(ranks(world).run(bad_batches, "labels", timeout=60))
    for (name, (_, parts)), message in zip(LABELS.items(), messages, strict=True):
        for part in ["ValueError", f"rank {world - 1}", *parts]:
            assert part in message, (name, message)


def wrong_for_the_head(rank: int, world: int) -> Message:
    """All ranks agree, and not with the head."""
    x, labels = good(rank)
    head = build()
    text = message_of(head, x[:, 1:], labels)
    equals_dense(head, rank, [good(r) for r in range(world)])
    alone = [(good(r)[0][: int(r == 0)], good(r)[1][: int(r == 0)]) for r in range(world)]
    assert equals_dense(head, rank, alone) > 0  # a global batch of one sample
    ones = [good(r, 1) for r in range(world)]
    equals_dense(head, rank, ones)
    return text


@WORLDS
def test_batch_of_1_embedding_width_and_embeddings_on_another_device(ranks, world):
    messages = told_alike(ranks(world).run(bad_batches, "embeddings", timeout=60))
    for (name, (_, parts)), message in zip(EMBEDDINGS.items(), messages, strict=True):
        for part in ["ValueError", f"rank {world - 1}", *parts]:
            assert part in message, (name, message)
    (text,) = set(ranks(world).run(wrong_for_the_head))
    assert text == f"ValueError: embeddings have width {D - 1}, the head has embedding_size {D}"


def nonfinite(rank: int, world: int) -> list[Message]:
    """ "raise" tells rank, sample and class; "skip" leaves the step out on all, whoever had it."""
    head, skipping, found = build(), build(on_nonfinite="skip"), []
    for value, label in ((math.nan, 7), (math.inf, 7), (-math.inf, 7), (math.nan, -100)):
        x, labels = good(rank)
        if rank == world - 1:
            x[2, 3], labels[2] = value, label
        with pytest.raises(NonFiniteError) as caught:
            head(x, labels)
        found.append(f"{type(caught.value).__name__}: {caught.value}")
        equals_dense(head, rank, [good(r) for r in range(world)])
        x.requires_grad_()
        loss = skipping(x, labels)
        loss.backward()
        assert skipping.skipped and loss.item() == 0 and x.grad is not None and not x.grad.any()
        assert not local(skipping.weight.grad).any()
        skipping.zero_grad()
        equals_dense(skipping, rank, [good(r) for r in range(world)])
        assert not skipping.skipped
    return found


@WORLDS
def test_non_finite_embeddings(ranks, world):
    *messages, of_ignored = told_alike(ranks(world).run(nonfinite))
    assert set(messages) == {f"NonFiniteError: rank {world - 1}: embeddings[2] (label 7) holds a NaN or infinity"}
    assert of_ignored == messages[0].replace("label 7", "label -100")


# -------------------------------------------------------------------------------------------------- ranks that are gone


def dies_while_saving(rank: int, world: int, folder: str) -> tuple[str, tuple[int, ...]]:
    head = build()
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, head=head)
    dist.barrier()
    set_timeout(3.0)
    if rank == world - 1:
        import partial_fc.checkpoint.layout

        write = partial_fc.checkpoint.layout._Writer.write_data

        def write_and_die(*arguments: Any) -> Any:
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        partial_fc.checkpoint.layout._Writer.write_data = write_and_die  # type: ignore[method-assign]
    return told(lambda: checkpointer.save(2, head=head))[:2]


# in processes of their own, which take long to start
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_process_killed_while_saving(world, tmp_path):
    """At the end of its writing; test_checkpointer.py kills runs at any moment."""
    results = answers(world, dies_while_saving, str(tmp_path), silent=(world - 1,))
    for message, missing in results.values():
        assert missing == (world - 1,) and f"rank {world - 1} did not reach Checkpointer.save" in message
    found = Checkpointer(tmp_path)
    assert found.latest() == tmp_path / "step-000000001"
    head = PartialFC(D, C, ArcFace(scale=8.0), dtype=torch.float64, seed=0)
    found.load(head=head)
    assert torch.equal(head.weight, build().weight)


# -------------------------------------------------------------------------------------------------- classes and numbers


def selects_nothing(rank: int, world: int) -> None:
    head = build(40, rate=0.05)  # two classes a step
    optimizer, empty = RowOptimizer(torch.optim.SGD, head, lr=0.1), 0
    for _ in range(4):
        before = local(head.weight).detach().clone()
        loss = head(good(rank)[0].requires_grad_(), torch.zeros(4, dtype=torch.int64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        empty += not len(head.selected)
        assert math.isfinite(loss.item()) and (len(head.selected) or torch.equal(local(head.weight), before))
    assert sum(everyones(empty)) > 0, "no rank was without a selected class"


@WORLDS
def test_a_rank_owns_no_selected_class(ranks, world):
    ranks(world).run(selects_nothing)


def beyond_pi(rank: int, world: int) -> list[float]:
    """Loss and gradient of targets at angles from 0 to π, on every rank its own."""
    angles = torch.cat(
        (torch.linspace(0, math.pi, 41, dtype=torch.float64), torch.tensor([math.pi - 0.4, 1e-9]).double())
    )
    mine = angles[rank::world]
    found: list[float] = []
    for margin in (ArcFace(scale=8.0), CombinedMargin(scale=8.0, m1=1.35, m2=0.3, m3=0.1)):
        head = PartialFC(2, 3, margin, dtype=torch.float64, reduction="none")
        full = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
        with torch.no_grad():
            local(head.weight).copy_(full[head.shards.lo : head.shards.hi])
        x = torch.stack((mine.cos(), mine.sin()), dim=1).requires_grad_()
        loss = head(x, torch.zeros(len(mine), dtype=torch.int64))
        loss.sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all()) and x.grad.abs().max() < 8 * 8 * world
        m1, m2, m3 = (1.0, 0.5, 0.0) if isinstance(margin, ArcFace) else (1.35, 0.3, 0.1)
        target = turned(mine.cos().clamp(-1, 1), m1, m2) - m3
        expected = torch.logsumexp(8 * torch.stack((target, mine.sin(), -mine.sin())), 0) - 8 * target
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-6)
        every = everyones(list(zip(mine.tolist(), target.tolist(), strict=True)))
        found += [value for _, value in sorted(pair for part in every for pair in part)]
    return found


@WORLDS
def test_theta_plus_m_beyond_pi_and_cosines_of_1(ranks, world):
    """The head's losses are those of a target that falls monotonically; test_margins.py has the continuation itself."""
    for result in ranks(world).run(beyond_pi):
        half = len(result) // 2
        assert all(a >= b for part in (result[:half], result[half:]) for a, b in pairwise(part))


def test_more_than_2_to_the_31_logits():
    """Such a step is tiled, as no default budget is that large, and no tile has as many. test_proof.py compares tiled
    steps."""
    for dtype in (torch.bfloat16, torch.float32):
        assert logits_bytes(1 << 16, (1 << 15) + 1, dtype) > DEFAULT_LOGITS_BUDGET
    for device in ("cpu", "cuda"):
        assert tile_rows(1 << 20, 1 << 20, device) * (1 << 20) < 2**31


def really_many(rank: int, world: int) -> None:
    """Embeddings and classes of D = 2, so that a rank's 2.2e9 logits are the work; some samples against float64."""
    n, classes = 16_384, 66_000 * world
    head = PartialFC(2, classes, NormFace(scale=8.0), reduction="none", init_std=1.0)
    x = torch.randn(n, 2, requires_grad=True)
    labels = torch.randint(0, classes, (n,))
    loss = head(x, labels)
    loss.sum().backward()
    assert head.logits_mode == "tiled" and n * world * head.shards.local > 2**31
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    dense = x.detach()[some].double().requires_grad_()
    w = whole(head.weight).double()
    expected = F.cross_entropy(8 * F.normalize(dense) @ F.normalize(w).T, labels[some], reduction="none")
    expected.sum().backward()
    assert x.grad is not None and dense.grad is not None
    torch.testing.assert_close(loss.detach()[some].double(), expected.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.grad[some].double(), dense.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_step_of_more_than_2_to_the_31_logits_on_each_rank(ranks):
    ranks(2).run(really_many, timeout=500)


def built_differently(rank: int, world: int) -> list[Message]:
    model = nn.ModuleDict({"backbone": nn.Linear(D, D), "head": PartialFC(D, C)})
    found = [message_of(nn.parallel.DistributedDataParallel, model)]
    head = build(rate=0.5)
    torch.optim.SGD(head.parameters(), lr=0.1)  # left out of a RowOptimizer
    found.append(message_of(lambda: [head(*good(rank)).backward() for _ in range(2)]))
    head = build(rate=0.5)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    for _ in range(2):
        head(*good(rank)).backward()
    optimizer.step()
    equals_dense(build(), rank, [good(r) for r in range(world)])
    return found


@WORLDS
def test_head_wrapped_in_ddp_or_left_out_of_the_optimizer(ranks, world):
    wrapped, left_out = told_alike(ranks(world).run(built_differently))
    assert "DistributedDataParallel was given a PartialFC (head.weight)" in wrapped
    assert left_out.startswith("RuntimeError: no RowOptimizer takes the row gradients of this PartialFC")
    assert "so it would never train" in left_out


def before_the_group(rank: int, world: int) -> list[Message]:
    member = dist.distributed_c10d.GroupMember  # type: ignore[attr-defined]
    saved, member.WORLD = member.WORLD, None  # as it is before init_process_group
    try:
        head = build()
    finally:
        member.WORLD = saved
    found = [message_of(head, *good(rank))]
    equals_dense(build(), rank, [good(r) for r in range(world)])
    return found


@WORLDS
def test_head_built_before_the_process_group(ranks, world):
    (message,) = told_alike(ranks(world).run(before_the_group))
    assert message.startswith("RuntimeError: this head was built before the process group")
