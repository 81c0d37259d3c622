"""Losses on the pretend GPU train as on CPUs: margins, modes, labels, several losses on one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from common import local
from on_gpu import ALONE, CLASSES, HALF, LAYOUTS, NAME, RANKS, WIDTH, Place, Pools, on_both, on_layouts, run
from torch import Tensor, nn

from partial_fc import (
    AdaFace,
    AdaptiveMargin,
    ArcFace,
    CenterLoss,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace,
    SphereFace2,
    SubCenterArcFace,
    check_gradients,
    clip_grad_norm_,
    gather,
)
from partial_fc.softmax import tiles

SMALL_TILES = {"TILE_BYTES": {"cpu": 1}, "TILE_BYTES_ELSEWHERE": 1}  # 64 rows

MARGINS: dict[str, Callable[[], Margin]] = {
    "Softmax": Softmax,
    "NormFace": NormFace,
    "ArcFace": ArcFace,
    "ArcFace, straight through": lambda: ArcFace(gradient="straight_through"),
    "CosFace": CosFace,
    "SphereFace": SphereFace,
    "CombinedMargin": lambda: CombinedMargin(m1=1.1, m2=0.2, m3=0.1),
    "SubCenterArcFace": lambda: SubCenterArcFace(centers=2),
    "CurricularFace": CurricularFace,
    "AdaFace": AdaFace,
    "MagFace": MagFace,
    "ElasticFace": ElasticFace,
    "ElasticFace+": lambda: ElasticFace(plus=True),
    "AdaptiveMargin": lambda: AdaptiveMargin(torch.arange(1, CLASSES + 1)),
    "SphereFace2": SphereFace2,
    "SphereFace2-A": lambda: SphereFace2(kind="arc"),
    "ArcFace, as others": lambda: ArcFace(past_pi="joined", easy_margin=True),
}

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW

MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "tiled": {"logits_budget": 0},
    "sampled": {"sample_rate": 0.5},
    "sampled and tiled": {"sample_rate": 0.5, "logits_budget": 0},
}


def modes(place: Place, *names: str, of: dict[str, dict[str, Any]] = MODES) -> dict[str, dict[str, Any]]:
    """Modes of logits; of a group the first and the last alone, whose tiles are computed as those of one process."""
    return {name: of[name] for name in names if place.world == 1 or name not in ("tiled", "sampled")}


def steps(place: Place, head: PartialFC, batches: int) -> list[Any]:
    """What training steps give: losses, gradients of embeddings, norms; the weight at the end."""
    # half precision is rounded once by a fused kernel, and here after each operator
    fused = {"fused": False} if head.weight.dtype == torch.bfloat16 else {}
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, **fused)
    found: list[Any] = []
    for step in range(batches):
        x, y = place.batch(step, scale=10.0)
        loss = head(x, y)
        loss.sum().backward()
        norm = clip_grad_norm_([], head, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.detach(), x.grad, norm]
    return [*found, head.weight]


def margin_in_all_modes(place: Place, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode, options in modes(place, *MODES).items():
        with mock.patch.multiple(tiles, **SMALL_TILES):
            head = PartialFC(
                WIDTH, CLASSES, MARGINS[name](), device=place.device, group=place.group, init_std=1.0, **options
            )
            found[mode] = steps(place, head, batches=2 if mode == "kept" else 1)
            assert head.logits_mode == ("tiled" if "logits_budget" in options else "kept")
    return found


@pytest.mark.parametrize(
    ("layout", "name"), on_layouts(MARGINS, {"ArcFace", "CurricularFace", "AdaFace", "SphereFace2"})
)
def test_margins(gpu_ranks: Pools, ranks: Pools, layout: str, name: str):
    on_both(gpu_ranks, ranks, layout, margin_in_all_modes, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "label smoothing of ruled logits": {"label_smoothing": 0.1, "margin": CurricularFace()},
    "class weights": {"class_weights": torch.arange(1.0, CLASSES + 1)},
    "class weights and label smoothing": {"class_weights": torch.arange(1.0, CLASSES + 1), "label_smoothing": 0.2},
    "a filter": {"interclass_filter": 0.5},
    "nearest others": {"inter_topk": 3, "interclass_filter": 0.9},
    "lengths kept": {"margin": SphereFace(1.0, 4.0, normalize_embeddings=False, annealing=5.0)},
    "a sum": {"reduction": "sum"},
    "losses of samples": {"reduction": "none"},
    "metrics": {"metrics": True},
    "validate first": {"validate": "first"},
    "validate never": {"validate": "never"},
    "half precision": {"dtype": torch.bfloat16},
    "double precision": {"dtype": torch.float64},
}


def options_in_modes(place: Place, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode, of_mode in modes(place, "kept", "tiled", "sampled and tiled").items():
        options = {"margin": ArcFace(), **copy.deepcopy(OPTIONS[name]), **of_mode}
        head = PartialFC(WIDTH, CLASSES, device=place.device, group=place.group, init_std=1.0, **options)
        found[mode] = steps(place, head, batches=2 if mode == "kept" else 1)
        if options.get("metrics"):
            found[f"metrics, {mode}"] = head.metrics
    return found


@pytest.mark.parametrize(
    ("layout", "name"), on_layouts(OPTIONS, {"label smoothing", "class weights", "losses of samples"})
)
def test_options(gpu_ranks: Pools, ranks: Pools, layout: str, name: str):
    on_both(gpu_ranks, ranks, layout, options_in_modes, name, **(HALF if name == "half precision" else {}))


DRAWN: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "class weights": {"label_smoothing": 0.1, "class_weights": torch.arange(1.0, 13.0)},
    "smoothed and ruled": {"label_smoothing": 0.1, "margin": CurricularFace()},
    "sub-centers": {"margin": SubCenterArcFace(centers=2)},
    "decisions": {"margin": SphereFace2()},
    "a filter": {"interclass_filter": 0.5},
    "nearest others": {"inter_topk": 2},
    "metrics": {"metrics": True},
    "a correction": {"sampling_correction": "importance"},
}


def windows_of_one_rank(place: Place, name: str) -> list[Any]:
    """Two classes a step, consecutive ones: the window of a step is one rank's, and the other has no slots."""
    options = {"margin": ArcFace(), "sample_block": 2, "init_std": 1.0, **copy.deepcopy(DRAWN[name])}
    head = PartialFC(WIDTH, 12, sample_rate=0.1, device=place.device, group=place.group, **options)
    optimizer = RowOptimizer(SGD, head, lr=0.1, momentum=0.9)
    found: list[Any] = []
    for step in range(6):
        x, y = place.batch(step, 12)
        loss = head(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.detach(), x.grad]
    optimizer.catch_up()
    return [*found, head.weight]


@pytest.mark.parametrize("name", DRAWN)
def test_a_rank_that_draws_nothing(gpu_ranks: Pools, ranks: Pools, name: str):
    on_both(gpu_ranks, ranks, RANKS, windows_of_one_rank, name)


CORRECTED: dict[str, dict[str, Any]] = {
    "kept": {},
    "tiled": {"logits_budget": 0},
    "metrics": {"metrics": True},
    "smoothed": {"label_smoothing": 0.1},
}


def corrected(place: Place, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode, options in modes(place, *CORRECTED, of=CORRECTED).items():
        if name == "SphereFace2" and mode == "smoothed":
            continue
        with mock.patch.multiple(tiles, **SMALL_TILES):
            head = PartialFC(
                WIDTH, CLASSES, MARGINS[name](), 0.3, device=place.device, group=place.group, init_std=1.0,
                sampling_correction="importance", **options,
            )  # fmt: skip
            found[mode] = steps(place, head, batches=2 if mode == "kept" else 1)
    return found


@pytest.mark.parametrize(
    ("layout", "name"),
    on_layouts(("Softmax", "ArcFace", "SubCenterArcFace", "CurricularFace", "SphereFace2"), {"ArcFace"}),
)
def test_sampling_correction(gpu_ranks: Pools, ranks: Pools, layout: str, name: str):
    on_both(gpu_ranks, ranks, layout, corrected, name)


def under_autocast(place: Place, dtype: torch.dtype) -> list[Any]:
    found: list[Any] = []
    corrected = {"sample_rate": 0.3, "sampling_correction": "importance"}
    for mode in (*modes(place, *MODES).values(), corrected):
        head = PartialFC(WIDTH, CLASSES, device=place.device, group=place.group, init_std=1.0, **mode)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        x, y = place.batch(0)
        with torch.autocast(place.device.type, dtype):
            loss = head(x.to(dtype), y)
        loss.backward()
        optimizer.step()
        found += [loss.detach(), x.grad, head.weight]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_autocast(gpu_ranks: Pools, ranks: Pools, layout: str, dtype: torch.dtype):
    on_both(gpu_ranks, ranks, layout, under_autocast, dtype)


MOVED_BY: dict[str, tuple[Any, dict[str, Any]] | None] = {
    "paper": None,
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD, still": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "skipped_rows": "still"}),
    "AdamW": (ADAMW, {"lr": 0.1}),
}


def center_losses(place: Place, moved_by: str) -> list[Any]:
    """A head and a center loss on one exchange, with weights of labels and samples; classes that are there twice, and
    steps of two micro-batches."""
    moves = MOVED_BY[moved_by]
    where = {"device": place.device, "group": place.group}
    head = PartialFC(WIDTH, CLASSES, init_std=1.0, **where)  # type: ignore[arg-type]
    center = CenterLoss(WIDTH, CLASSES, update="gradient" if moves else "paper", init_std=1.0, **where)  # type: ignore[arg-type]
    optimizers: list[Any] = [RowOptimizer(SGD, head, lr=0.1)]
    optimizers.append(RowOptimizer(moves[0], center, **moves[1]) if moves else center)
    found: list[Any] = []
    for step in range(4):
        for micro_batch in range(1 + step % 2):
            x, y = place.batch(10 * micro_batch + step, 9 if step else CLASSES)
            two, half = torch.stack((y, y.flip(0)), 1), torch.full((len(y), 2), 0.5, device=place.device)
            batch = gather(x, two, label_weights=half, sample_weights=half[:, 0], group=place.group)
            loss = head(batch) + 0.1 * center(batch)
            loss.backward()
            found += [loss.detach(), x.grad]
        clip_grad_norm_([], head, center, max_norm=5.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if moves:
        optimizers[1].catch_up()  # rows of the center loss that have missed steps
    return [*found, head.weight, center.centers]


@pytest.mark.parametrize("moved_by", MOVED_BY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_center_losses(gpu_ranks: Pools, ranks: Pools, layout: str, moved_by: str):
    on_both(gpu_ranks, ranks, layout, center_losses, moved_by)


def several_heads(place: Place) -> list[Any]:
    """Heads of labels of their own, one of them sampled, behind a backbone; two micro-batches a step."""
    backbone = nn.Linear(WIDTH, WIDTH, bias=False, device=place.device)
    with torch.no_grad():
        backbone.weight.copy_(place.filled(WIDTH, WIDTH))
    common = {"device": place.device, "group": place.group, "init_std": 1.0}
    heads = {
        "faces": PartialFC(WIDTH, CLASSES, sample_rate=0.5, **common),
        "kinds": PartialFC(WIDTH, 3, Softmax(), **common),
    }
    optimizers: list[Any] = [RowOptimizer(torch.optim.AdamW, head, lr=0.1) for head in heads.values()]
    optimizers.append(torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9))
    found: list[Any] = []
    for step in range(2):
        for micro in range(2):
            x, y = place.batch(2 * step + micro)
            batches = gather(backbone(x), {"faces": y, "kinds": y % 3}, group=place.group)
            loss = sum(head(batches[name]) for name, head in heads.items())
            assert isinstance(loss, Tensor)
            loss.backward()
            found.append(loss.detach())
        found.append(clip_grad_norm_(backbone.parameters(), *heads.values(), max_norm=1.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [*found, backbone.weight, *(head.weight for head in heads.values())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_heads(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, several_heads)


def a_bad_batch(place: Place) -> list[Any]:
    """A NaN on the last rank, which all leave out; then a step as usual; and in eval()."""
    head = PartialFC(WIDTH, CLASSES, device=place.device, group=place.group, init_std=1.0, on_nonfinite="skip")
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    before, found = local(head.weight.detach()).clone(), []
    for step in range(2):
        x, y = place.batch(step)
        if step == 0 and place.rank == place.world - 1:
            x = x.detach().clone()
            x[1, 2] = float("nan")
            x.requires_grad_()
        loss = head(x, y)
        loss.backward()
        found += [loss.detach() if step else 0.0, check_gradients([], head)]  # 0 or NaN, by when it was found
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, local(head.weight)) == (step == 0)
    head.eval()
    with torch.no_grad():
        found.append(head(*place.batch(2)))
    return [*found, head.skips, head.weight]


def a_bad_label(place: Place, way: str) -> tuple[str, bool, bool]:
    """The words of the error that a label out of range makes, whether the forward returned, whether nothing moved."""
    options = {"device": place.device, "group": place.group, "init_std": 1.0}
    loss = CenterLoss(WIDTH, CLASSES, **options) if way == "center" else PartialFC(WIDTH, CLASSES, **options)
    rows = next(loss.parameters())
    optimizer = loss if isinstance(loss, CenterLoss) else RowOptimizer(torch.optim.SGD, loss, lr=0.1)
    before, returned = local(rows.detach()).clone(), False
    x, y = place.batch(0)
    if place.rank == place.world - 1:
        y[1] = CLASSES
    try:
        value = loss(gather(x, y, group=place.group)) if way == "gather" else loss(x, y)
        returned = True
        value.backward()
        if way == "clip":
            clip_grad_norm_([x], loss, max_norm=1.0)
        optimizer.step()
    except ValueError as error:
        return str(error), returned, torch.equal(before, local(rows))
    return "", returned, False


@pytest.mark.parametrize("way", ["clip", "step", "gather", "center"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_label_is_named_where_the_host_waits(gpu_ranks: Pools, layout: str, way: str):
    found = gpu_ranks(1 if layout == ALONE else 2).run(run, a_bad_label, layout, NAME, (way,))
    text = f"rank {len(found) - 1}: labels[1] is {CLASSES}; valid are 0 to {CLASSES - 1} and ignore_index -100"
    assert found == [(f"{text}; labels are counted from 0", True, True)] * len(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_batch_is_skipped(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, a_bad_batch)
