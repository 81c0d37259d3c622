"""Optimizers by their formulas, dense, float64, on the rows that are given. Shares no code with partial_fc."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DenseSGD:
    """Momentum and weight decay by the formulas of torch.optim.SGD."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    buffer: Tensor | None = None

    def step(self, w: Tensor, grad: Tensor, rows: Tensor) -> None:
        if self.buffer is None:
            self.buffer = torch.zeros_like(w)
        self.buffer[rows] = self.momentum * self.buffer[rows] + grad[rows] + self.weight_decay * w[rows]
        w[rows] -= self.lr * self.buffer[rows]

    def change(self, mixed: Callable[[Tensor], Tensor]) -> None:
        """The state of rows that are made of these."""
        self.buffer = None if self.buffer is None else mixed(self.buffer)


@dataclass
class DenseAdamW:
    """AdamW (arXiv 1711.05101); `count` is the number of optimizer steps."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    count: int = 0
    moments: list[Tensor] = field(default_factory=list)

    def step(self, w: Tensor, grad: Tensor, rows: Tensor) -> None:
        if not self.moments:
            self.moments = [torch.zeros_like(w), torch.zeros_like(w)]
        self.count += 1
        first, second = self.moments
        first[rows] = self.beta1 * first[rows] + (1 - self.beta1) * grad[rows]
        second[rows] = self.beta2 * second[rows] + (1 - self.beta2) * grad[rows] ** 2
        w[rows] *= 1 - self.lr * self.weight_decay
        unbiased = second[rows] / (1 - self.beta2**self.count)
        w[rows] -= self.lr * (first[rows] / (1 - self.beta1**self.count)) / (unbiased.sqrt() + self.eps)

    def change(self, mixed: Callable[[Tensor], Tensor]) -> None:
        """The state of rows that are made of these."""
        self.moments = [mixed(moment) for moment in self.moments]
