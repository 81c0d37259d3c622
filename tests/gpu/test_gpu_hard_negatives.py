"""Hard negatives on the pretend GPU: the same table, losses and rows as on CPUs (test_counts.py counts the waits)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import ALONE, CLASSES, SLOW_ON_REPLICAS, WIDTH, Place, Pools, on_both

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_


def several_searches(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in {"slots": {}, "no slots": {"label_smoothing": 0.1}}.items():
        head = PartialFC(
            WIDTH, CLASSES, ArcFace(scale=16.0), 0.2, hard_negatives=4, hard_negatives_every=2, init_std=1.0,
            device=place.device, group=place.group, **options,
        )  # fmt: skip
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
        for step in range(5):
            x, labels = place.batch(step, scale=10.0)
            loss = head(x, labels)
            loss.backward()
            norm = clip_grad_norm_([], head, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            found[f"{name}, {step}"] = loss.detach(), x.grad, norm, len(head.selected)
        found[name] = head.neighbours, head.weight
    return found


@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_training_with_searches(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, several_searches)


def a_wrong_label(place: Place) -> list[Any]:
    """Nobody has looked at it when the table is read: the check of the step refuses it."""
    head = PartialFC(WIDTH, CLASSES, ArcFace(scale=16.0), 0.2, hard_negatives=4, device=place.device)
    RowOptimizer(torch.optim.SGD, head, lr=0.1)
    head.refresh_hard_negatives()
    x, labels = place.batch(0)
    labels[0] = CLASSES + 3
    with pytest.raises(ValueError, match=rf"labels\[0\] is {CLASSES + 3}"):
        head(x, labels).backward()
        clip_grad_norm_([], head, max_norm=1.0)
    return [head.weight, head.neighbours]


def test_a_wrong_label_is_told_and_reads_no_list(gpu_ranks: Pools, ranks: Pools):
    on_both(gpu_ranks, ranks, ALONE, a_wrong_label)
