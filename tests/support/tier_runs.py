"""Small runs of heads whose rows are in a storage."""

from __future__ import annotations

from typing import Any

import torch
from shards import whole
from torch import Tensor

from partial_fc import ArcFace, FileRows, HostRows, PartialFC, RowOptimizer, RowWiseAdagrad

C, D, N = 300, 6, 8
SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3})
ADAMW = (torch.optim.AdamW, {"lr": 0.01})
ADAGRAD = (torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1})
ROW_WISE = (RowWiseAdagrad, {"lr": 0.05, "weight_decay": 1e-3})


def storage_of(kind: str, folder: str) -> Any:
    return {"memory": None, "host": HostRows(), "files": FileRows(folder)}[kind]


def head_of(storage: Any, **more: Any) -> PartialFC:
    given = {"sample_rate": 0.1, "seed": 3, "margin": ArcFace(scale=16.0), **more}
    return PartialFC(D, given.pop("num_classes", C), given.pop("margin"), storage=storage, **given)


def batch(step: int, classes: int = C, samples: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(samples, D, generator=generator), torch.randint(0, classes, (samples,), generator=generator)


def train(head: Any, optimizer: Any, steps: int, first: int = 0, labels: Any = None) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step, head.num_classes)
        x.requires_grad_()
        loss = head(x, y if labels is None else labels(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def state_of(optimizer: RowOptimizer) -> dict[str, Any]:
    """All rows and all state, up to date; rows of all ranks."""
    optimizer.catch_up()
    rows = optimizer.class_rows
    found: dict[str, Any] = {}
    for name, parameter in rows.parameters.items():
        found[name] = whole(parameter)
        found |= {
            f"{name}/{k}": whole(v) if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()
        }
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, name
