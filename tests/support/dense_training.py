"""A backbone and class rows trained together in one process: dense, float64, SGD by its formulas. Shares no code with
partial_fc."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from dense_losses import Loss
from dense_optimizers import DenseSGD
from shards import positions
from torch import Tensor, nn


@dataclass
class Trained:
    """What a run ends with, and the loss of each micro-batch and the norm of all gradients in each step before
    clipping."""

    backbone: dict[str, Tensor]
    rows: Tensor
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def dense_training(
    backbone: nn.Module,
    rows: Tensor,
    loss: Loss,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    sgd: dict[str, Any],
    *,
    accumulation: int = 1,
    max_norm: float | None = None,
    selected: Sequence[Tensor] | None = None,
    rates: Sequence[float] | None = None,
    skip: int | None = None,
) -> Trained:
    """Train copies of backbone and rows `[C, D]`; `batch(index)` gives the inputs and labels of each micro-batch over
    all ranks.

    max_norm: of all gradients together. selected: the classes of each micro-batch, None for all. rates: factors of the
    learning rate by step. skip: a step whose gradients are not used.
    """
    module, w = copy.deepcopy(backbone).double(), rows.detach().clone().double()
    parameters = list(module.parameters())
    rules = [DenseSGD(**{"momentum": 0.0, "weight_decay": 0.0, **sgd}) for _ in (*parameters, w)]
    found = Trained({}, w)
    for step in range(steps):
        grad = torch.zeros_like(w)
        module.zero_grad()
        for index in range(step * accumulation, (step + 1) * accumulation):
            inputs, labels = batch(index)
            classes = torch.arange(len(w)) if selected is None else selected[index]
            leaf = w[classes].requires_grad_()
            value = loss(module(inputs.double()), leaf, positions(labels, classes, len(w)), classes)
            (value / accumulation).backward()
            assert leaf.grad is not None
            grad[classes] += leaf.grad
            found.losses.append(value.item())
        grads = [p.grad for p in parameters if p.grad is not None] + [grad]
        assert len(grads) == len(rules), "a parameter has no gradient"
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in grads]))
        found.norms.append(float(norm))
        if step == skip:
            continue
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (float(norm) + 1e-6))
        everything = [torch.arange(len(p)) for p in (*parameters, w)]
        with torch.no_grad():
            for rule, value, g, at in zip(rules, [*parameters, w], grads, everything, strict=True):
                rule.lr = sgd["lr"] * (1.0 if rates is None else rates[step])
                rule.step(value, g * factor, at)
    found.backbone = {name: p.detach() for name, p in module.state_dict().items()}
    return found
