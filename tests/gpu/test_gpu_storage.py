"""A head that computes on the pretend GPU and keeps its rows on the host trains as one with all of it on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import ALONE_ON_HOST, CLASSES, NAME, RANKS_ON_HOST, WIDTH, Place, Pools, on_both, run

from partial_fc import (
    ArcFace,
    CenterLoss,
    FileRows,
    HostRows,
    PartialFC,
    RowOptimizer,
    RowWiseAdagrad,
    Softmax,
    SphereFace2,
    SubCenterArcFace,
    clip_grad_norm_,
)

SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3})
ADAMW = (torch.optim.AdamW, {"lr": 0.01})
CASES: dict[str, tuple[dict[str, Any], tuple[Any, dict[str, Any]]]] = {
    "SGD": ({}, SGD),
    "AdamW": ({}, ADAMW),
    "still": ({}, (SGD[0], {**SGD[1], "skipped_rows": "still"})),
    "RowWiseAdagrad": ({}, (RowWiseAdagrad, {"lr": 0.05})),
    "blocks": ({"sample_block": 7}, SGD),
    "Softmax": ({"margin": Softmax}, SGD),
    "sub-centers": ({"margin": lambda: SubCenterArcFace(centers=2)}, SGD),
    "decisions": ({"margin": SphereFace2}, SGD),
    "bf16, master": ({"dtype": torch.bfloat16}, (SGD[0], {**SGD[1], "low_precision": "master"})),
    "importance": ({"sampling_correction": "importance"}, SGD),
    "hard negatives": ({"hard_negatives": 2, "hard_negatives_every": 2}, SGD),
    "smoothing": ({"label_smoothing": 0.1}, SGD),
    "metrics": ({"metrics": True}, SGD),
    "all rows, in backward": ({"sample_rate": 1.0}, (SGD[0], {**SGD[1], "update_in_backward": True})),
    "Softmax, all rows, in backward": (
        {"sample_rate": 1.0, "margin": Softmax},
        (SGD[0], {**SGD[1], "update_in_backward": True}),
    ),
}


def built(place: Place, folder: str | None, given: dict[str, Any]) -> PartialFC:
    storage = FileRows(folder) if place.storage is not None and folder is not None else place.storage
    margin: Callable[[], Any] = given.get("margin", lambda: ArcFace(scale=16.0))
    more = {"sample_rate": 0.2, **{name: value for name, value in given.items() if name != "margin"}}
    return PartialFC(WIDTH, CLASSES, margin(), seed=3, group=place.group, device=place.device, storage=storage, **more)


def trained(place: Place, name: str, folder: str | None, accumulation: int, clip: bool) -> Any:
    given, (cls, options) = CASES[name]
    head = built(place, folder, given)
    rows = RowOptimizer(cls, head, **options)
    assert head.weight.device.type == "cpu" and head.class_rows.device.type == place.device.type
    losses, gradients = [], []
    for step in range(6):
        for part in range(accumulation):
            x, labels = place.batch(10 * step + part)
            loss = head(x, labels)
            loss.backward()
            assert loss.device.type == x.grad.device.type == place.device.type
            losses.append(float(loss.detach()))
            gradients.append(x.grad.double().sum().item())
        if clip:
            losses.append(float(clip_grad_norm_([], head, max_norm=0.1)))
        rows.step()
        rows.zero_grad()
    rows.catch_up()
    head.eval()
    x, labels = place.batch(99)
    with torch.no_grad():
        losses.append(float(head(x, labels)))
    found = head.topk(x.detach(), 3)
    near = head.nearest_classes(2)
    return losses, gradients, head.weight.float(), found.cosines, near.cosines


ON_RANKS = ("SGD", "AdamW", "Softmax", "hard negatives", "all rows, in backward")


@pytest.mark.parametrize("name", ON_RANKS)
@pytest.mark.slow
def test_rows_of_two_ranks(gpu_ranks: Pools, ranks: Pools, tmp_path: Any, name: str) -> None:
    on_both(
        gpu_ranks, ranks, RANKS_ON_HOST, trained, name, str(tmp_path), 2 - ("backward" in name), "backward" not in name
    )


@pytest.mark.parametrize("name", CASES)
def test_rows_on_the_host_train_as_on_cpus(gpu_ranks: Pools, ranks: Pools, name: str) -> None:
    half = {"rtol": 0.02, "atol": 0.02} if name.startswith("bf16") else {}
    on_both(gpu_ranks, ranks, ALONE_ON_HOST, trained, name, None, 1, "backward" not in name, **half)


def centered(place: Place, update: str) -> Any:
    center = CenterLoss(
        WIDTH, CLASSES, update=update, seed=3, group=place.group, device=place.device, storage=place.storage
    )
    rows = RowOptimizer(torch.optim.SGD, center, lr=0.1) if update == "gradient" else center
    found = []
    for step in range(4):
        x, labels = place.batch(step)
        loss = center(x, labels)
        loss.backward()
        rows.step()
        if update == "gradient":
            rows.zero_grad()
        found += [loss.detach(), x.grad]
    center.class_rows.catch_up()
    return found, center.centers


@pytest.mark.parametrize("update", ["paper", "gradient"])
@pytest.mark.parametrize("layout", [ALONE_ON_HOST, pytest.param(RANKS_ON_HOST, marks=pytest.mark.slow)])
def test_centers_on_the_host_move_as_on_cpus(gpu_ranks: Pools, ranks: Pools, layout: str, update: str) -> None:
    on_both(gpu_ranks, ranks, layout, centered, update)


def clipped(place: Place) -> Any:
    """Clipping beside a backbone on the device."""
    backbone = torch.nn.Linear(WIDTH, WIDTH, device=place.device)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(place.filled(*parameter.shape))
    head = built(place, None, {})
    both = torch.optim.SGD(backbone.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.1)
    found = []
    for step in range(3):
        x, labels = place.batch(step)
        head(backbone(x), labels).backward()
        found.append(clip_grad_norm_(backbone.parameters(), head, max_norm=0.5))
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    both[1].catch_up()
    return found, [*backbone.parameters()], head.weight


@pytest.mark.parametrize("layout", [ALONE_ON_HOST, pytest.param(RANKS_ON_HOST, marks=pytest.mark.slow)])
def test_one_norm_of_a_backbone_there_and_of_rows_on_the_host(gpu_ranks: Pools, ranks: Pools, layout: str) -> None:
    on_both(gpu_ranks, ranks, layout, clipped)


def refused(place: Place) -> list[str]:
    said = []
    for build in (
        lambda: PartialFC(WIDTH, CLASSES, sample_rate=0.2, device=place.device, storage=HostRows()),
        lambda: PartialFC(WIDTH, CLASSES, device=place.device, storage=HostRows(), group=place.group)(*place.batch(0)),
        lambda: PartialFC(
            WIDTH, CLASSES, sample_rate=0.2, device=place.device, storage=HostRows(), group=place.group
        ).cpu(),
    ):
        try:
            build()
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_rows_on_the_host_need(gpu_ranks: Pools) -> None:
    first, second = gpu_ranks(2).run(run, refused, RANKS_ON_HOST, NAME, ())
    assert first == second
    group, whole, moved = first
    assert re.search("its process group exchanges tensors of .* alone", group) and "cpu:gloo" in group
    assert "update_in_backward=True" in whole and "keep their device" in moved
