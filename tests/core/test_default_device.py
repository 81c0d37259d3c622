"""`torch.set_default_device`, `with torch.device(...)` around a loop: what the package keeps on the host stays there.

The default device is "meta" here, whose tensors have no values: whatever is made on it by mistake cannot be computed
with. On a GPU it would be mixed with tensors of the host, or make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import Ranks
from shards import whole

from partial_fc import (
    CenterLoss,
    Checkpointer,
    HostRows,
    PartialFC,
    RowOptimizer,
    class_mapping,
    clip_grad_norm_,
    gather,
    load_checkpoint,
    save_checkpoint,
)

CLASSES, WIDTH = 150, 6


def _scenario(rank: int, world: int, default: str, folder: str) -> list[Any]:
    with torch.device("cpu"):
        made = [
            PartialFC(WIDTH, CLASSES, sample_rate=1.0),
            PartialFC(WIDTH, CLASSES, sample_rate=0.3, metrics=True, class_weights=torch.linspace(0.5, 1, CLASSES)),
            PartialFC(WIDTH, CLASSES, sample_rate=0.3, hard_negatives=2),
            PartialFC(WIDTH, CLASSES, sample_rate=0.3, storage=HostRows()),
            CenterLoss(WIDTH, CLASSES, update="gradient"),
            CenterLoss(WIDTH, CLASSES),
        ]
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(rank))
        labels = [torch.arange(6) * 7 + step + rank for step in range(5)]
        weights = torch.full((6,), 0.5)
        wrong = torch.full((6,), CLASSES * rank)
    found: list[Any] = []
    with torch.device(default) if default else nullcontext():
        for loss in made:
            optimizer: Any = loss
            if not (isinstance(loss, CenterLoss) and loss.update == "paper"):
                optimizer = RowOptimizer(torch.optim.AdamW, loss, lr=0.1)  # type: ignore[arg-type]
            for y in labels:
                value = loss(gather(x.clone().requires_grad_(), y, sample_weights=weights))
                value.backward()
                found.append(value.detach())
                if optimizer is not loss:
                    clip_grad_norm_([], loss, max_norm=1.0)  # type: ignore[arg-type]
                    optimizer.zero_grad() if y is labels[2] else optimizer.step()
                optimizer.zero_grad() if optimizer is not loss else optimizer.step()
        head, sampled = made[0], made[1]
        optimizer = RowOptimizer(torch.optim.AdamW, sampled, lr=0.1)  # type: ignore[arg-type]
        path = Path(folder) / f"{default}{world}"
        save_checkpoint(path / "one", head=sampled, optimizer=optimizer)
        with torch.device("cpu"):  # torch itself reads a number off a tensor of the default device
            load_checkpoint(path / "one", head=sampled, optimizer=optimizer)
        checkpointer = Checkpointer(path / "many", asynchronous=True)
        checkpointer.save(1, head=sampled, optimizer=optimizer)
        checkpointer.wait()
        assert isinstance(head, PartialFC) and isinstance(sampled, PartialFC)
        found += [*head.topk(x, 3), *sampled.nearest_classes(2)]
        sampled.expand(20, class_weights=[1.0] * 20)
        sampled.remap(class_mapping(CLASSES + 20, merge=[(5, 9), (1, 7, 8)], drop=[0]), merge="mean")
        sampled.remap({i: i for i in range(sampled.num_classes)})
        with pytest.raises(ValueError, match="valid are 0 to"):
            head(x, wrong + CLASSES)
        with pytest.raises(ValueError, match="int64"):
            head(x, wrong.float())
    return [*found, whole(sampled.weight), whole(head.weight)]


@pytest.mark.parametrize("world", [1, 2])
def test_the_default_device_changes_nothing(ranks: Callable[[int], Ranks], tmp_path: Path, world: int):
    for mine, same in zip(*(ranks(world).run(_scenario, each, str(tmp_path)) for each in ("", "meta")), strict=True):
        assert len(mine) == len(same) and len(mine) > 30
        for one, other in zip(mine, same, strict=True):
            assert one.device.type == "cpu" and torch.equal(one, other)
