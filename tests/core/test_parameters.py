"""Class weights are parameters as those of any module: graphs that hold them, hooks, weak references, other tensors."""

from __future__ import annotations

import copy
import io
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from common import message_of
from torch import Tensor, nn
from torch.func import functional_call

from partial_fc import (
    AdaptiveMargin,
    ArcFace,
    CenterLoss,
    NormFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    gather,
)

D, C = 6, 14
SGD = torch.optim.SGD


def batch(seed: int = 0, samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (samples,), generator=generator)


def head_of(rate: float = 1.0, margin: Any = None, **more: Any) -> PartialFC:
    return PartialFC(D, C, margin or NormFace(16.0), rate, dtype=torch.float64, init_std=0.3, seed=2, **more)


# ---------------------------------------------------------------------------------------- graphs of before a step


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("skipped_rows", ["dense", "still"])
@pytest.mark.parametrize("margin", [NormFace(16.0), SphereFace2(scale=16.0)], ids=["softmax", "binary"])
@pytest.mark.parametrize("budget", [None, 0])
def test_a_backward_after_the_step_is_refused_as_by_torch(rate, skipped_rows, margin, budget):
    head = head_of(rate, copy.deepcopy(margin), logits_budget=budget)
    optimizer = RowOptimizer(SGD, head, lr=0.5, momentum=0.9, skipped_rows=skipped_rows)
    for step in range(3):
        head(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, labels = batch(7)
    loss = head(x.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_after_an_update_in_backward_is_refused():
    head = head_of()
    optimizer = RowOptimizer(SGD, head, lr=0.5, update_in_backward=True)
    first, second = (head(*batch(seed)) for seed in (0, 1))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


# ---------------------------------------------------------------------------------------- two optimizers of one weight


def test_rows_are_not_moved_by_two_optimizers():
    backbone = nn.Linear(D, D, dtype=torch.float64)
    for head_first in (False, True):
        head = head_of()
        both = [SGD([*backbone.parameters(), *head.parameters()], lr=0.1), RowOptimizer(SGD, head, lr=0.1)]
        first, second = both[::-1] if head_first else both
        for set_to_none in (True, False):  # the gradients of one step, then of the next
            head(backbone(batch()[0]), batch()[1]).backward()
            first.step()
            moved = head.weight.detach().clone()
            with pytest.raises(RuntimeError, match="the weight of this PartialFC was moved by"):
                second.step()
            assert torch.equal(head.weight, moved)
            for optimizer in both:
                optimizer.zero_grad(set_to_none=set_to_none)


def test_an_optimizer_may_follow_another():
    """A RowOptimizer that is no longer stepped, or a torch optimizer."""
    head = head_of()
    rows, plain = RowOptimizer(SGD, head, lr=0.1), SGD(head.parameters(), lr=0.1)
    for step, optimizer in enumerate((rows, plain, plain, rows)):
        before = head.weight.detach().clone()
        head(*batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 > 0)
        assert not torch.equal(head.weight, before)


def test_what_has_no_gradient_is_moved_by_nobody():
    """Rows of a sampled head have none; nor has a head whose RowOptimizer has taken and cleared it."""
    backbone = nn.Linear(D, D, dtype=torch.float64)
    for rate in (1.0, 0.4):
        head = head_of(rate)
        optimizer, rows = SGD([*backbone.parameters(), *head.parameters()], lr=0.1), RowOptimizer(SGD, head, lr=0.1)
        head(backbone(batch()[0]), batch()[1]).backward()
        rows.step()
        rows.zero_grad()
        after = head.weight.detach().clone()
        optimizer.step()
        assert torch.equal(head.weight, after)


# ---------------------------------------------------------------------------------------- hooks and references


def as_float(head: PartialFC) -> None:
    head.float().double()


CHANGES = {
    "expand": lambda head: head.expand(2),
    "remap": lambda head: head.remap(torch.arange(C)),
    "cast": as_float,
}


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_and_attributes_stay_when_rows_change(change):
    head = head_of()
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    calls: list[str] = []
    head.weight.own = "kept"  # type: ignore[attr-defined]
    handles = [
        head.weight.register_hook(lambda grad: calls.append("hook")),
        head.weight.register_post_accumulate_grad_hook(lambda weight: calls.append("later")),
    ]
    CHANGES[change](head)
    head(*batch()).backward()
    assert calls == ["hook", "later"]
    assert head.weight.own == "kept"  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    head(*batch()).backward()
    assert len(calls) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_weak_references_refuse_a_change_before_it_begins(change):
    head = PartialFC(D, C, Softmax(), dtype=torch.float64)
    before = head(*batch()).item()
    reference = weakref.ref(head.bias)
    with pytest.raises(RuntimeError, match="weak references to bias"):
        CHANGES[change](head)
    assert head.num_classes == C
    assert head(*batch()).item() == before
    del reference
    CHANGES[change](head)
    head(*batch())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_changes_within_inference_mode(change, rate):
    head = head_of(rate)
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    with torch.inference_mode():
        CHANGES[change](head)
    head(*batch()).backward()
    optimizer.step()


def test_a_pickle_has_nothing_of_the_last_forward():
    head = head_of(metrics=True)
    size = len(pickle.dumps(head))
    for samples in (8, 3000):
        head(*batch(samples=samples)).backward()
        head.zero_grad()
        file = io.BytesIO()
        torch.save(head, file)
        assert len(pickle.dumps(head)) < size + 1000
        assert len(file.getvalue()) < size + 4000


# ---------------------------------------------------------------------------------------- other tensors for a call


def test_a_functional_call_takes_weights_of_this_form_alone():
    head = head_of().eval()
    x, labels = batch()
    functional_call(head, {"weight": head.weight.detach() * 2}, (x, labels))
    for rows in (C + 6, C - 1):
        said = message_of(functional_call, head, {"weight": torch.zeros(rows, D)}, (x, labels))
        assert f"functional_call gave this PartialFC a Tensor [{rows}, {D}] for its weight, which is a Tensor" in said


def rows_for_a_call(rank: int, world: int) -> tuple[str, float, float]:
    head = head_of().eval()
    x, labels = batch(samples=2 * world)
    mine = slice(2 * rank, 2 * rank + 2)
    said = message_of(functional_call, head, {"weight": torch.zeros(C, D)}, (x[mine], labels[mine]))
    same = functional_call(head, {"weight": head.weight.detach() * 1}, (x[mine], labels[mine])).item()
    return said, same, head(x[mine], labels[mine]).item()


def test_a_functional_call_in_a_group_takes_rows_that_are_split(ranks):
    for said, same, own in ranks(2).run(rows_for_a_call):
        assert f"a Tensor [{C}, {D}] for its weight, which is a DTensor [{C}, {D}]" in said
        assert same == own


def offset_for_a_call(rank: int, world: int) -> str:
    head = head_of(margin=SphereFace2(scale=16.0)).eval()
    given = {"margin.offset": head.margin.offset.detach() * 1} if rank else {}
    return message_of(functional_call, head, given, batch())


def test_an_offset_that_one_rank_gives_is_refused_on_all(ranks):
    for said in ranks(2).run(offset_for_a_call):
        assert "another tensor was put in the place of this PartialFC's margin.offset" in said


# ---------------------------------------------------------------------------------------- ranks


def in_another_order(rank: int, world: int, center: bool) -> str:
    """Two losses that are built alike, called in another order on each rank."""
    losses = {name: CenterLoss(D, C) if center else PartialFC(D, C, ArcFace()) for name in ("a", "b")}
    x, labels = batch(rank)
    batches = gather(x.float(), dict.fromkeys(losses, labels))

    def call() -> None:
        for name in sorted(losses, reverse=rank > 0):
            losses[name](batches[name])

    return message_of(call)


@pytest.mark.parametrize("center", [False, True])
def test_losses_that_ranks_call_in_another_order_are_refused(ranks, center):
    said = ranks(2).run(in_another_order, center)
    assert said[0] == said[1]
    assert re.search(r"its place among the losses of its group is (\d+) on rank 0 and (\d+) on rank 1", said[0])


def permuted(rank: int, world: int) -> list[str]:
    """Values for each class, in another order on each rank."""
    values = torch.linspace(0.5, 2.0, C).roll(rank)
    head = PartialFC(D, C, ArcFace())
    head.class_weights = values
    x, labels = batch(rank)
    said = [message_of(PartialFC, D, C, ArcFace(), class_weights=values), message_of(head, x.float(), labels)]
    head = PartialFC(D, C, AdaptiveMargin(torch.arange(C)))
    head.margin.class_counts = torch.arange(C) + 5  # alike on all ranks
    head(x.float(), labels).backward()
    head.margin.class_counts = torch.arange(C).roll(rank)
    said.append(message_of(head, x.float(), labels))
    head.margin = AdaptiveMargin(torch.arange(C) + 5)
    head(x.float(), labels).backward()
    head.margin = AdaptiveMargin(torch.arange(C).roll(rank))
    return [*said, message_of(head, x.float(), labels)]


def test_tables_in_another_order_are_refused(ranks):
    said = ranks(2).run(permuted)
    assert said[0] == said[1]
    assert "class_weights is [14], hash" in said[0][0]
    assert "class_weights, as they were set is [14], hash" in said[0][1]
    for words in said[0][2:]:
        assert re.search(r"a hash of the margin's values for each class is (\w+) on rank 0 and (\w+) on rank 1", words)
