"""Adagrad with one number a row, alone and in a RowOptimizer, beside plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from near import near
from shards import everyones, whole
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    CenterLoss,
    PartialFC,
    RowOptimizer,
    RowWiseAdagrad,
    Softmax,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)

C, D, N = 41, 5, 8
OPTIONS = {"lr": 0.2, "eps": 1e-3, "initial_accumulator_value": 0.05, "weight_decay": 0.02}


def dense_step(w: Tensor, total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """One step of every row by the formula: sum += mean g², w = (1 - lr λ) w - lr g / (√sum + ε)."""
    total = total + (grad * grad).sum(1) / grad.shape[1]
    moved = w * (1 - 0.2 * 0.02) - 0.2 * grad / (total.sqrt() + 1e-3)[:, None]
    return moved, total


def test_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    parameter, bias = nn.Parameter(w.clone()), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RowWiseAdagrad([parameter, bias], **OPTIONS)
    total = torch.full((C,), 0.05, dtype=torch.float64)
    for _ in range(4):
        grad = torch.randn(C, D, generator=generator, dtype=torch.float64)
        parameter.grad, bias.grad = grad, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        optimizer.step()
        w, total = dense_step(w, total, grad)
    near(parameter, w)
    near(optimizer.state[parameter]["sum"], total[:, None])
    near(optimizer.state[bias]["sum"], 0.05 + 4 * torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))


def run(rank: int, world: int, rate: float, folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head beside dense rows that get its gradient; through a checkpoint and a change of classes."""
    head = PartialFC(D, C, ArcFace(scale=8.0), rate, seed=2, init_std=0.3, dtype=torch.float64)
    optimizer = RowOptimizer(RowWiseAdagrad, head, **OPTIONS)
    w, total = whole(head.weight).clone(), torch.full((C,), 0.05, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        x = torch.randn(N, D, generator=generator, dtype=torch.float64)
        y = torch.randint(0, C, (N,), generator=generator)
        head(x[rank::world], y[rank::world]).backward()
        dense = torch.zeros(C, D, dtype=torch.float64)
        grads = head.row_grad
        for part, ids in zip(*(everyones(each) for each in (grads[1], grads[0])), strict=True):
            dense[ids] = part
        w, total = dense_step(w, total, dense)
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            save_checkpoint(folder, head=head, optimizer=optimizer)
            head = PartialFC(D, C, ArcFace(scale=8.0), rate, seed=2, init_std=0.3, dtype=torch.float64)
            optimizer = RowOptimizer(RowWiseAdagrad, head, **OPTIONS)
            load_checkpoint(folder, head=head, optimizer=optimizer)
    optimizer.catch_up()
    head.remap([-1, *range(C - 1)])
    return whole(head.weight), whole(optimizer.state[head.weight]["sum"]), w[1:], total[1:, None]


@pytest.mark.parametrize("world", [1, 2])
def test_in_a_row_optimizer(ranks, tmp_path, world):
    """Rows that were not selected decay, and their sums stay."""
    results = ranks(world).run(run, 0.3, str(tmp_path / "saved"), timeout=300)
    for rows, sums, expected, expected_sums in results:
        near(rows, expected, 1e-9)
        near(sums, expected_sums, 1e-9)


def test_biases_sub_centers_and_copies():
    for margin in (Softmax(), ArcFace(scale=8.0)):
        head = PartialFC(D, C, margin, 0.4)
        optimizer = RowOptimizer(RowWiseAdagrad, head, lr=0.1)
        x, y = torch.randn(N, D), torch.arange(N)
        head(x, y).backward()
        clip_grad_norm_([], head, max_norm=1.0)
        optimizer.step()
        assert optimizer.state[head.weight]["sum"].shape == (C, 1)
        if head.bias is not None:
            assert optimizer.state[head.bias]["sum"].shape == (C,)
        other, same = copy.deepcopy((head, optimizer))
        same.load_state_dict(optimizer.state_dict())
        assert torch.equal(same.state[other.weight]["sum"], optimizer.state[head.weight]["sum"])
        wrong = optimizer.state_dict()
        wrong["state"][0]["sum"] = torch.zeros(C, D)
        with pytest.raises(ValueError, match=r"sum is \[41, 5\] in it, and \[41, 1\] here"):
            same.load_state_dict(wrong)
    centers = CenterLoss(D, C, update="gradient")
    RowOptimizer(RowWiseAdagrad, centers, lr=0.1)


@pytest.mark.parametrize("name", ["lr", "eps", "initial_accumulator_value", "weight_decay"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"{name} of RowWiseAdagrad must be at least 0, not -1"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(2))], **{name: -1})
