"""No number comes from memory that nobody has written: every fresh tensor is filled with NaN here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from partial_fc import (
    ArcFace,
    CenterLoss,
    CurricularFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    SubCenterArcFace,
    clip_grad_norm_,
)
from partial_fc.softmax import tiles

C, D, N = 137, 12, 40  # three tiles, the last with an odd number of rows

HEADS: dict[str, dict[str, Any]] = {
    "ArcFace": {},
    "Softmax": {"margin": Softmax()},
    "CurricularFace": {"margin": CurricularFace()},
    "SphereFace2": {"margin": SphereFace2()},
    "sub-centers": {"margin": SubCenterArcFace(centers=3)},
    "smoothing": {"label_smoothing": 0.1},
    "filter": {"interclass_filter": 0.4},
    "nearest others": {"inter_topk": 3, "inter_topk_penalty": 0.06},
    "metrics": {"metrics": True},
    "sampled": {"sample_rate": 0.8},
    "correction": {"sample_rate": 0.8, "sampling_correction": "importance"},
}


@pytest.fixture(autouse=True)
def _filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "tile_rows", lambda *_: 64)
    monkeypatch.setattr("partial_fc.softmax.forward.tile_rows", lambda *_: 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(HEADS))
def test_a_step(name: str, dtype: torch.dtype, kept: bool) -> None:
    given = {"margin": ArcFace(), **HEADS[name]}
    head = PartialFC(D, C, given.pop("margin"), logits_budget=None if kept else 0, seed=1, **given)
    center = CenterLoss(D, C)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(N, D, generator=generator).requires_grad_()
        labels = torch.randint(0, C, (N,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = head(x, labels) + 0.1 * center(x, labels)
        loss.backward()
        clip_grad_norm_([x], head, max_norm=5.0)
        optimizer.step()
        center.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        assert x.grad is not None and x.grad.isfinite().all()
    head.class_rows.catch_up()
    assert all(parameter.isfinite().all() for parameter in (*head.parameters(), *center.parameters()))
    assert head.topk(torch.ones(3, D), 5).cosines.isfinite().all()
