"""What belongs to a step, in one process: skips of several heads, gradients that are cleared, written or held."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partial_fc import (
    CenterLoss,
    CurricularFace,
    NonFiniteError,
    NormFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    check_gradients,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)

D, C = 8, 40
SGD = torch.optim.SGD


def batch(step: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (samples,), generator=generator)


def head_of(rate: float = 1.0, margin: Any = None, dtype: torch.dtype = torch.float64, **more: Any) -> PartialFC:
    return PartialFC(D, C, margin or NormFace(16.0), rate, dtype=dtype, init_std=0.3, seed=2, **more)


@pytest.mark.parametrize("how", ["clip", "check"])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_head_that_was_skipped_and_takes_part_no_more_stops_no_other(policy, how):
    backbone = nn.Linear(D, D, dtype=torch.float64)
    first, second = (head_of(on_nonfinite=policy) for _ in range(2))
    optimizers = [RowOptimizer(SGD, head, lr=0.1) for head in (first, second)]
    used = [torch.optim.SGD(backbone.parameters(), lr=0.1), *optimizers]
    moved = []
    for step in range(5):
        x, labels = batch(step)
        loss = first(backbone(x), labels)
        if step < 2:
            loss = loss + second(backbone(x), labels)
        (loss * (float("inf") if step == 1 else 1.0)).backward()
        before = [p.detach().clone() for p in (first.weight, backbone.weight)]
        try:
            if how == "clip":
                clip_grad_norm_(backbone.parameters(), first, second, max_norm=5.0)
            else:
                check_gradients(backbone.parameters(), first, second)
            for optimizer in used:
                optimizer.step()
        except NonFiniteError:
            assert policy == "raise"
        for optimizer in used if step < 2 else used[:2]:
            optimizer.zero_grad()
        moved.append([not torch.equal(a, b) for a, b in zip(before, (first.weight, backbone.weight), strict=True)])
    assert moved == [[True, True], [False, False], *[[True, True]] * 3]
    assert first.skips == (1 if policy == "skip" else 0)


@pytest.mark.parametrize("checked", [False, True])
def test_statistics_of_a_skipped_step_are_put_back(checked):
    """Whether the step was checked, or step() of the optimizer alone has left it out."""
    heads = [head_of(margin=CurricularFace(16.0, momentum=0.5), on_nonfinite="skip") for _ in range(2)]
    optimizers = [RowOptimizer(SGD, head, lr=0.1) for head in heads]
    for step in range(3):
        for head, optimizer, skips in zip(heads, optimizers, (True, False), strict=True):
            x, labels = batch(step)
            if step == 1 and not skips:
                continue
            head(x, labels).backward()
            if step == 1:
                head(x * torch.nan, labels).backward()
            if checked:
                check_gradients([], head)
            optimizer.step()
            optimizer.zero_grad()
    assert heads[0].skips == 1
    assert torch.equal(heads[0].margin.t, heads[1].margin.t)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zeros_of_a_torch_optimizer_end_a_skipped_step(micro_batches):
    """`set_to_none=False` leaves gradients of 0, which an optimizer of torch tells nobody."""
    head = head_of(on_nonfinite="skip")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    skipped = []
    for step in range(5):
        for part in range(micro_batches):
            x, labels = batch(step * micro_batches + part)
            bad = step in (1, 3) and part == 0
            head(x * (torch.nan if bad else 1.0), labels).backward()
        skipped.append(head.skipped)
        if not head.skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert skipped == [False, True, False, True, False]
    assert head.skips == 2


def test_an_exact_head_is_trained_in_eval_after_a_skipped_step():
    head = head_of(on_nonfinite="skip")
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    x, labels = batch(0)
    head(x * torch.nan, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    head.eval()
    before = head.weight.detach().clone()
    head(x.requires_grad_(), labels).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_zero_grad_of_a_model_forgets_the_gradients_of_rows(rate):
    model = nn.Module()
    model.backbone, model.head = nn.Linear(D, D, dtype=torch.float64), head_of(rate, on_nonfinite="skip", max_skips=3)
    optimizer = RowOptimizer(SGD, model.head, lr=0.1)
    x, labels = batch(0)
    model.head(model.backbone(x), labels).backward()
    model.zero_grad()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.head.weight, before)
    skipped = []
    for step in range(5):
        x, labels = batch(step)
        model.head(model.backbone(x * (torch.nan if step == 1 else 1.0)), labels).backward()
        skipped.append(model.head.skipped)
        if not model.head.skipped:
            optimizer.step()
        model.zero_grad()
    assert skipped == [False, True, False, False, False]


def test_gradients_of_rows_are_clipped_once():
    head = head_of(0.3)
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    norms = []
    for others, heads in (([], [head]), (optimizer.param_groups[0]["params"], [head]), ([], [head, head])):
        head.zero_grad()
        head.forward_count = 0
        head(batch(0)[0].requires_grad_(), batch(0)[1]).backward()
        norms.append(float(clip_grad_norm_(others, *heads, max_norm=100.0)))
    assert norms[0] > 0
    assert norms == [norms[0]] * 3


@pytest.mark.parametrize("kind", ["sampled", "in backward", "center"])
def test_a_gradient_of_the_weights_themselves_is_refused_where_no_step_takes_it(kind):
    loss = CenterLoss(D, C, update="gradient") if kind == "center" else head_of(0.3 if kind == "sampled" else 1.0)
    optimizer = RowOptimizer(SGD, loss, lr=0.1, update_in_backward=kind == "in backward")
    x, labels = batch(0)
    weight = loss.centers if kind == "center" else loss.weight
    (loss(x.to(weight.dtype).requires_grad_(), labels) + weight.pow(2).sum()).backward()
    with pytest.raises(RuntimeError, match="has a gradient that did not come from its loss"):
        optimizer.step()
    head = head_of()
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    before = head.weight.detach().clone()
    (head(x.requires_grad_(), labels) * 0 + head.weight.pow(2).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(head.weight, before * 0.8)


@pytest.mark.parametrize("change", ["remap", "expand"])
def test_classes_that_change_between_forward_and_backward_are_refused(change):
    head = head_of(0.3)
    RowOptimizer(SGD, head, lr=0.1)
    x, labels = batch(0)
    loss = head(x.requires_grad_(), labels)
    if change == "remap":
        head.remap(list(range(C - 1, -1, -1)))
    else:
        head.expand(C + 3)
    with pytest.raises(RuntimeError, match=r"were changed \(expand, remap\) between a forward and its backward"):
        loss.backward()
    head(x, labels).backward()


def test_a_parameter_that_is_frozen_between_micro_batches_keeps_its_gradient():
    head = head_of(0.3, Softmax())
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    x, labels = batch(0)
    head(x, labels).backward()
    assert head.row_grad is not None
    norm = head.row_grad[1].norm()
    for name in ("bias", "weight"):
        frozen = getattr(head, name).requires_grad_(False)
        head(x * 0, labels).backward()
        frozen.requires_grad_(True)
    assert head.row_grad is not None
    torch.testing.assert_close(head.row_grad[1].norm(), norm)
    optimizer.step()


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("how", ["copy_", "load_state_dict", "reset_parameters", "checkpoint"])
def test_weights_that_are_written_reach_their_float32_twins(rate, how, tmp_path):
    head = head_of(rate, dtype=torch.bfloat16)
    optimizer = RowOptimizer(SGD, head, lr=1e-3, low_precision="master")

    def train() -> None:
        x, labels = batch(0)
        head(x.bfloat16().requires_grad_(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        train()
    other = head_of(rate, dtype=torch.bfloat16)
    other.seed = 9
    other.reset_parameters()
    optimizer.catch_up()
    if how == "copy_":
        with torch.no_grad():
            head.weight.copy_(other.weight)
    elif how == "load_state_dict":
        head.load_state_dict(other.state_dict())
    elif how == "checkpoint":
        save_checkpoint(tmp_path / "other", head=other)
        load_checkpoint(tmp_path / "other", head=head)
    else:
        head.seed = 9
        head.reset_parameters()
    written = head.weight.detach().clone()
    train()
    optimizer.catch_up()
    torch.testing.assert_close(head.weight.float(), written.float(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("low", ["float32", "stochastic", None])
def test_float32_twins_stay_behind_where_no_step_moves_them(rate, low, tmp_path):
    """A run goes on without them, and later with them again: the steps in between are not lost."""

    def build(dtype: torch.dtype, low_precision: Any) -> tuple[PartialFC, RowOptimizer]:
        head = head_of(rate, dtype=dtype)
        return head, RowOptimizer(torch.optim.AdamW, head, lr=0.05, low_precision=low_precision)

    def train(head: PartialFC, optimizer: RowOptimizer, steps: range) -> None:
        for seed in steps:
            x, labels = batch(seed)
            head(x.to(head.weight.dtype).requires_grad_(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    first = build(torch.bfloat16, "master")
    train(*first, range(3))
    states = [copy.deepcopy(each.state_dict()) for each in first]
    without = copy.deepcopy(states)
    del without[1]["state"][0]["master_weight"]
    trained = []
    for head_state, state in (states, without):
        head, optimizer = build(torch.float32, None) if low == "float32" else build(torch.bfloat16, low)
        head.load_state_dict(head_state)
        optimizer.load_state_dict(state)
        train(head, optimizer, range(3, 12))
        save_checkpoint(tmp_path / f"{len(trained)}", head=head, optimizer=optimizer)
        optimizer.catch_up()
        trained.append(head.weight.detach().clone())
    assert torch.equal(*trained)
    head, optimizer = build(torch.bfloat16, "master")
    load_checkpoint(tmp_path / "0", head=head, optimizer=optimizer)
    optimizer.param_groups[0].update(lr=0.0)
    train(head, optimizer, range(12, 14))
    optimizer.catch_up()
    torch.testing.assert_close(head.weight.detach(), trained[0].bfloat16())


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_run_in_which_momentum_was_switched_off_goes_on(rate):
    def made() -> tuple[PartialFC, RowOptimizer]:
        head = head_of(rate)
        return head, RowOptimizer(SGD, head, lr=0.1, momentum=0.9)

    def train(head: PartialFC, optimizer: RowOptimizer, step: int) -> float:
        x, labels = batch(step)
        loss = head(x.requires_grad_(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    head, optimizer = made()
    for step in range(4):
        optimizer.param_groups[0]["momentum"] = 0.0 if step > 1 else 0.9
        train(head, optimizer, step)
    loaded, its = made()
    loaded.load_state_dict(head.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert its.param_groups[0]["momentum"] == 0.0
    assert [train(head, optimizer, step) for step in (4, 5)] == [train(loaded, its, step) for step in (4, 5)]


def test_a_margin_with_parameters_is_of_one_head():
    margin = SphereFace2()
    first = PartialFC(D, C, margin)
    RowOptimizer(SGD, first, lr=0.1)
    PartialFC(D, C, margin)
    x, labels = batch(0)
    with pytest.raises(RuntimeError, match="A margin with parameters is of one head"):
        first(x.float(), labels)


def test_class_weights_keep_their_digits_when_a_head_is_cast():
    weights = torch.linspace(1.0, 1e5, C)
    head = head_of(dtype=torch.float32, class_weights=weights).half()
    assert head.class_weights is not None
    assert head.weight.dtype == torch.float16
    assert torch.equal(head.class_weights, weights)
