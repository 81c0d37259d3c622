"""Optimizers of class rows on the pretend GPU move them as on CPUs: classes, precision, scalers, clipping."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from on_gpu import ALONE, CLASSES, HALF, RANKS, SLOW_ON_REPLICAS, WIDTH, Place, Pools, on_both, on_layouts
from torch import nn

from partial_fc import ArcFace, PartialFC, RowOptimizer, check_gradients, clip_grad_norm_
from partial_fc.optim import row_optimizer

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD, no momentum": (torch.optim.SGD, {"lr": 0.1}),
    "SGD, foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.01}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5, "centered": True}),
}


def trained(
    place: Place,
    optimizer: str,
    head_options: dict[str, Any],
    optimizer_options: dict[str, Any],
    batches: int = 2,
    clip: bool = True,
    blocks: bool = False,
    micro_batches: int = 1,
) -> list[Any]:
    """Losses, norms, weight and state after some steps. blocks: rows are stepped in more than one block."""
    head = PartialFC(WIDTH, CLASSES, ArcFace(), device=place.device, group=place.group, init_std=1.0, **head_options)
    kind, options = OPTIMIZERS[optimizer]
    found: list[Any] = []
    size = 4 * WIDTH * 40 if blocks else row_optimizer.BLOCK_BYTES
    with mock.patch.multiple(row_optimizer, BLOCK_BYTES=size, BLOCK_BYTES_ELSEWHERE=size):
        stepped = RowOptimizer(kind, head, **options, **optimizer_options)
        for step in range(batches):
            for micro in range(micro_batches):
                x, y = place.batch(step + 100 * micro)
                loss = head(x, y)
                loss.backward()
                found += [loss.detach(), x.grad, *copy.deepcopy(head.row_grad or ())]
            if clip:
                found.append(clip_grad_norm_([], head, max_norm=1.0))
            stepped.step()
            stepped.zero_grad()
    state = stepped.state[head.weight]
    return [*found, head.weight, {name: state[name] for name in sorted(state)}]


def all_and_sampled(place: Place, optimizer: str) -> list[Any]:
    of_blocks = (
        ((1.0, False), (1.0, True), (0.5, False), (0.5, True)) if place.world == 1 else ((1.0, False), (0.5, True))
    )
    return [trained(place, optimizer, {"sample_rate": rate}, {}, blocks=blocks) for rate, blocks in of_blocks]


@pytest.mark.parametrize(("layout", "optimizer"), on_layouts(OPTIMIZERS, {"AdamW"}))
def test_classes_of_optimizers(gpu_ranks: Pools, ranks: Pools, layout: str, optimizer: str):
    on_both(gpu_ranks, ranks, layout, all_and_sampled, optimizer)


def accumulated(place: Place, optimizer: str) -> list[Any]:
    """Rows of several windows, some of them in more than one, with labels that are in several batches."""
    half = {"dtype": torch.bfloat16, "sample_rate": 0.3}
    return [
        trained(place, optimizer, {"sample_rate": 0.3}, {"skipped_rows": skipped}, 3, blocks=blocks, micro_batches=3)
        for skipped, blocks in (("still", False), ("still", True), ("dense", False))
    ] + [
        trained(place, optimizer, half, {"low_precision": how}, 3, micro_batches=2) for how in ("master", "stochastic")
    ]


@pytest.mark.parametrize(("layout", "optimizer"), on_layouts(["SGD", "AdamW"], {"SGD"}))
def test_rows_of_several_windows(gpu_ranks: Pools, ranks: Pools, layout: str, optimizer: str):
    on_both(gpu_ranks, ranks, layout, accumulated, optimizer, **HALF)


def stale(place: Place) -> list[Any]:
    """Gradients that a step has used, and nobody has cleared, add up to what is next."""
    head = PartialFC(WIDTH, CLASSES, sample_rate=0.3, device=place.device, group=place.group, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    found: list[Any] = []
    for step in range(3):
        x, y = place.batch(step)
        with pytest.warns(UserWarning, match="row gradients of the last step") if step else nullcontext():
            head(x, y).backward()
        optimizer.step()
        found.append(copy.deepcopy(head.row_grad))
    return [*found, head.weight]


def test_gradients_that_were_not_cleared(gpu_ranks: Pools, ranks: Pools):
    on_both(gpu_ranks, ranks, ALONE, stale)


def low_precision(place: Place, how: str) -> list[Any]:
    half = {"dtype": torch.bfloat16}
    return [
        trained(place, optimizer, {**half, "sample_rate": rate}, {"low_precision": how})
        for optimizer in ("SGD", "AdamW")
        for rate in (1.0, 0.5)
    ]


@pytest.mark.parametrize("how", ["master", "stochastic"])
@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_low_precision(gpu_ranks: Pools, ranks: Pools, layout: str, how: str):
    on_both(gpu_ranks, ranks, layout, low_precision, how, **HALF)


def in_backward(place: Place) -> list[Any]:
    return [
        trained(place, "SGD", {"logits_budget": budget}, {"update_in_backward": True}, clip=False)
        for budget in (None, 0)
    ]


@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_update_in_backward(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, in_backward)


def clipped(place: Place, norm_type: float) -> list[Any]:
    """A backbone of several parameters, two heads, two micro-batches; then the check without clipping."""
    common = {"device": place.device, "group": place.group, "init_std": 1.0}
    heads = PartialFC(WIDTH, CLASSES, **common), PartialFC(WIDTH, CLASSES, sample_rate=0.5, **common)
    optimizers = [RowOptimizer(torch.optim.SGD, head, lr=0.1) for head in heads]
    backbone = [nn.Parameter(place.filled(8, key=key)) for key in range(70)]
    found: list[Any] = []
    for step in range(3):
        for micro in range(2):
            x, y = place.batch(2 * step + micro)
            loss = heads[0](x, y) + heads[1](x, y)
            loss.backward()
        for key, parameter in enumerate(backbone):
            parameter.grad = place.filled(8, key=100 + key)
        if step < 2:
            found.append(clip_grad_norm_(backbone, *heads, max_norm=(1.0, 1e6)[step], norm_type=norm_type))
        else:
            assert check_gradients(backbone, *heads)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.grad for parameter in backbone])
    return [*found, *(head.weight for head in heads)]


@pytest.mark.parametrize(("layout", "norm_type"), on_layouts([2.0, 3.0, float("inf")], {2.0}))
def test_clipping(gpu_ranks: Pools, ranks: Pools, layout: str, norm_type: float):
    on_both(gpu_ranks, ranks, layout, clipped, norm_type)


def scaled(place: Place, rate: float) -> list[Any]:
    """With torch's own GradScaler: a step that overflows, and two that do not."""
    head = PartialFC(WIDTH, CLASSES, sample_rate=rate, device=place.device, group=place.group, init_std=1.0)
    backbone = nn.Linear(WIDTH, WIDTH, bias=False, device=place.device)
    with torch.no_grad():
        backbone.weight.copy_(place.filled(WIDTH, WIDTH))
    optimizers = [RowOptimizer(torch.optim.SGD, head, lr=0.1), torch.optim.SGD(backbone.parameters(), lr=0.1)]
    scaler = torch.amp.GradScaler(place.device.type, init_scale=3e38, backoff_factor=2.0**-120)
    found: list[Any] = []
    for step in range(3):
        x, y = place.batch(step)
        loss = head(backbone(x), y)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = clip_grad_norm_(backbone.parameters(), head, max_norm=1.0, scaler=scaler)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        found += [loss.detach(), scaler.get_scale() * 1e-30]
        if step:
            found.append(norm)
    return [*found, head.weight, backbone.weight]


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_a_scaler(gpu_ranks: Pools, ranks: Pools, layout: str, rate: float):
    on_both(gpu_ranks, ranks, layout, scaled, rate)
