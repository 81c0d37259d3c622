"""Rows that a step does not select move as the dense optimizer moves them: a sampled run is the run of torch's own
optimizer over all rows, in one float64 process, whose gradient is zero where a row was not selected."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dense_losses import Loss
from near import near
from shards import part_of, positions, selected_by_all, whole
from torch import Tensor, nn

from partial_fc import ArcFace, PartialFC, RowOptimizer, load_checkpoint, save_checkpoint

D, C, N, STEPS = 5, 203, 12, 50
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def batch(step: int, samples: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (samples,), generator=generator)


def rate_of(step: int) -> float:
    """Warm-up, then half a cosine."""
    return min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / STEPS)) / 2


@dataclass
class Dense:
    """All rows under a torch optimizer."""

    weight: Tensor
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameter = nn.Parameter(self.weight.double().clone())
        self.optimizer = self.cls([self.parameter], **self.options)

    def step(self, step: int, classes: Tensor) -> None:
        x, labels = batch(step)
        loss = Loss()(x, self.parameter[classes], positions(labels, classes, C), classes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = self.options["lr"] * rate_of(step)
        self.optimizer.step()
        self.losses.append(loss.item())


def head_of(rate: float, seed: int = 3, **options: Any) -> PartialFC:
    return PartialFC(D, C, ArcFace(), rate, dtype=torch.float64, init_std=0.3, seed=seed, **options)


def take(head: PartialFC, optimizer: RowOptimizer, lr: float, step: int, rank: int, world: int) -> float:
    """A step of the head; its loss."""
    x, labels = batch(step)
    part = part_of(N, rank, world)
    loss = head(x[part], labels[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.param_groups[0]["lr"] = lr * rate_of(step)
    optimizer.step()
    return loss.item()


def check_run(
    rank: int, world: int, rate: float, cls: Any, options: dict[str, Any], bounds: tuple[float, float]
) -> None:
    head = head_of(rate)
    dense = Dense(whole(head.weight), cls, options)
    optimizer = RowOptimizer(cls, head, skipped_rows="dense", **options)
    for step in range(STEPS):
        loss = take(head, optimizer, options["lr"], step, rank, world)
        dense.step(step, selected_by_all(head))
        near(loss, dense.losses[-1], bounds[0])
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), bounds[1])


KINDS = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "decay": {"lr": 0.3, "weight_decay": 0.01},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 5e-4, "maximize": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_sgd_is_that_of_all_rows(kind, rate):
    check_run(0, 1, rate, SGD, KINDS[kind], (1e-9, 1e-9))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sgd_is_that_of_all_rows_on_ranks(ranks, world):
    for kind, rate in (("nesterov", 0.1), ("dampening", 0.02)):
        ranks(world).run(check_run, rate, SGD, KINDS[kind], (1e-9, 1e-9))


ADAMS = [
    (ADAMW, {"lr": 0.01, "weight_decay": 0.05}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.9, 0.95)}),
    (ADAMW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.NAdam, {"lr": 0.01}),
]


@pytest.mark.parametrize(("cls", "options"), ADAMS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_adam_is_nearly_that_of_all_rows(cls, options, rate):
    check_run(0, 1, rate, cls, options, (1e-5, 1e-4))
