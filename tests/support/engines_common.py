"""What every engine is compared with: one process, dense, float64, from formulas; the same data, cut over the ranks.

    micro-batch m     images [N, 3], labels [N], the same on every rank; rank r takes its part of the rows
    step              ACCUMULATION micro-batches, their mean gradient, clipped by one norm of backbone and head, SGD
                      with momentum
    compared          all weights of backbone and head after STEPS steps, and the norms before clipping

An engine's test trains `backbone()` and `new_head()` its own way and returns `finish(...)`; `compare` does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from dense_losses import Loss
from dense_training import Trained, dense_training
from shards import local, whole
from torch import Tensor, nn

from partial_fc import ArcFace, PartialFC, RowOptimizer

STEPS, ACCUMULATION, N = 5, 2, 10
IMAGE, WIDTH, D, C = 3, 8, 6, 11
SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2}
MAX_NORM = 1.0  # below every norm of the run
SCALE, MARGIN = 8.0, 0.3
SEED = 7
IMPORTING = 170.0  # seconds until ranks that have to import an engine first must have answered


@dataclass
class Result:
    """What one rank ended with: the whole backbone, its rows of the head, the norms, and the classes it used in each
    micro-batch."""

    backbone: dict[str, Tensor]
    rows: Tensor
    norms: list[float]
    selected: list[Tensor]


def backbone() -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    module = nn.Sequential(nn.Linear(IMAGE, WIDTH), nn.Tanh(), nn.Linear(WIDTH, D))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return module


def class_weights() -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(SEED + 1))


def new_head(rate: float = 1.0) -> PartialFC:
    """A head whose rows are those of `class_weights()`."""
    head = PartialFC(D, C, ArcFace(SCALE, MARGIN), rate, seed=SEED)
    ids = torch.arange(C)[head.shards.lo : head.shards.hi]
    with torch.no_grad():
        local(head.weight).copy_(class_weights()[ids])
    return head


def micro_batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(N, IMAGE, generator=generator), torch.randint(0, C, (N,), generator=generator)


def my_part(index: int, rank: int, world: int, *, uneven: bool = False) -> tuple[Tensor, Tensor]:
    """This rank's rows of a micro-batch; `uneven`: rank 0 takes all but one of the first two shares."""
    images, labels = micro_batch(index)
    bounds = [r * N // world for r in range(world + 1)]
    if uneven and world > 1:
        bounds[1] = bounds[2] - 1
    mine = slice(bounds[rank], bounds[rank + 1])
    return images[mine], labels[mine]


class Joint(nn.Module):
    """One module that returns its loss, with the head inside; what frameworks like to be given."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.backbone, self.head = backbone(), new_head(rate)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(images), labels)


def optimizers(parameters: Any, head: PartialFC) -> tuple[torch.optim.Optimizer, RowOptimizer]:
    return torch.optim.SGD(parameters, **SGD), RowOptimizer(torch.optim.SGD, head, **SGD)


def finish(module: nn.Module, head: PartialFC, norms: list[Any], selected: list[Tensor]) -> Result:
    state = {name: whole(value.detach()).clone() for name, value in module.state_dict().items()}
    head.class_rows.catch_up()
    return Result(state, local(head.weight).detach().clone(), [float(n) for n in norms], [s.clone() for s in selected])


def dense(selected: list[Tensor] | None = None, *, max_norm: float | None = MAX_NORM, **options: Any) -> Trained:
    """The same run in one process; options: of `dense_training`."""
    loss = Loss("ArcFace", {"scale": SCALE, "margin": MARGIN})
    options = {"steps": STEPS, "accumulation": ACCUMULATION, "max_norm": max_norm, "selected": selected, **options}
    found = dense_training(backbone(), class_weights(), loss, micro_batch, sgd=SGD, **options)
    assert max_norm is None or min(found.norms) > max_norm, "every step must be clipped"
    return found


def error(found: Trained | Result, expected: Trained) -> tuple[float, float]:
    """The largest difference of any weight of the backbone, and of the head."""
    assert found.backbone.keys() == expected.backbone.keys() and found.rows.shape == expected.rows.shape
    of_backbone = max(
        float((found.backbone[name].double() - value).abs().max()) for name, value in expected.backbone.items()
    )
    return of_backbone, float((found.rows.double() - expected.rows).abs().max())


def compare(
    results: list[Result], tolerance: float = 1e-5, *, rates: list[float] | None = None, norms: bool = True
) -> float:
    """Assert that every rank ended with the dense run's weights, and return the largest error."""
    expected = dense([torch.cat([r.selected[i] for r in results]) for i in range(STEPS * ACCUMULATION)], rates=rates)
    rows, worst = torch.cat([r.rows for r in results]), 0.0
    for result in results:
        worst = max(worst, *error(Trained(result.backbone, rows), expected))
        if norms:
            assert len(result.norms) == STEPS
            worst = max(worst, *(abs(mine - theirs) for mine, theirs in zip(result.norms, expected.norms, strict=True)))
    print(f"largest error {worst:.2e}")
    assert worst <= tolerance, f"largest error {worst:.2e}"
    return worst


def compare_resumed(straight: list[Result], again: list[Result]) -> None:
    """A resumed run ends as the straight one: with its bits on as many ranks, else within the rounding of sums in
    another order."""
    exact = {"rtol": 0.0, "atol": 0.0 if len(again) == len(straight) else 2e-6}
    torch.testing.assert_close(torch.cat([r.rows for r in again]), torch.cat([r.rows for r in straight]), **exact)
    for result in again:
        torch.testing.assert_close(result.backbone, straight[0].backbone, **exact)
