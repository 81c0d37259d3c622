"""What every sharded result is compared with: one process, dense, float64, written from the formulas. Shares no code with the core."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def psi(cosine: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    """cos(m1·θ + m2) − m3, continued monotonically: each further half turn is mirrored and lowered by 2."""
    angle = m1 * torch.acos(cosine) + m2
    value = torch.cos(angle)
    for k in range(1, 6):
        value = torch.where(angle > k * math.pi, (-1) ** k * torch.cos(angle) - 2 * k, value)
    return value - m3


@dataclass
class Loss:
    """name: "combined" (normalised, with m1, m2, m3) or "linear"."""

    name: str = "combined"
    scale: float = 64.0
    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    smoothing: float = 0.0
    reduction: str = "mean"

    def logits(self, x: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        if self.name == "linear":
            return x @ w.T + (0 if bias is None else bias)
        cosines = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
        hit = F.one_hot(labels.clamp(min=0), len(w)).bool() & (labels >= 0)[:, None]
        return self.scale * torch.where(hit, psi(torch.where(hit, cosines, 0.0), self.m1, self.m2, self.m3), cosines)

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """labels: positions in `w`, -100 where ignored. A batch without valid labels has loss 0."""
        if self.reduction == "mean" and not bool((labels >= 0).any()):
            return (x.sum() + w.sum()) * 0.0
        logits = self.logits(x, w, bias, labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction=self.reduction)


@dataclass
class DenseSGD:
    """Momentum and weight decay on the rows that are given, by the formulas of torch.optim.SGD."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    buffer: Tensor | None = None

    def step(self, w: Tensor, grad: Tensor, rows: Tensor) -> None:
        if self.buffer is None:
            self.buffer = torch.zeros_like(w)
        g = grad[rows] + self.weight_decay * w[rows]
        self.buffer[rows] = self.momentum * self.buffer[rows] + g
        w[rows] -= self.lr * self.buffer[rows]


@dataclass
class DenseAdamW:
    """AdamW (arXiv 1711.05101) on the rows that are given; the step counts optimizer steps."""

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
