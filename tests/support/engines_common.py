"""What every engine is compared with: one process, dense, float64, from formulas; the same data, cut over the ranks.

    micro-batch m     images [N, 3], labels [N], the same on every rank; rank r takes its part of the rows
    step              ACCUMULATION micro-batches, their mean gradient, clipped by one norm of backbone and head, SGD with momentum
    compared          all weights of backbone and head after STEPS steps, and the norms before clipping

An engine's test trains `backbone()` and `new_head()` its own way and returns `finish(...)`; `compare` does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from common import local
from oracle import DenseSGD, Loss
from torch import Tensor, nn

from partial_fc import ArcFace, PartialFC, RowOptimizer

STEPS, ACCUMULATION, N = 5, 2, 10
IMAGE, WIDTH, D, C = 3, 8, 6, 11
SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2}
MAX_NORM = 1.0  # below every norm of the run
LOSS = Loss(scale=8.0, m2=0.3)
SEED = 7
IMPORTING = 170.0  # seconds until ranks that have to import an engine first must have answered


@dataclass
class Result:
    """What one rank ended with: the whole backbone, its rows of the head, the norms, and the classes it used in each micro-batch."""

    backbone: dict[str, Tensor]
    rows: Tensor
    norms: list[float]
    selected: list[Tensor]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
    head = PartialFC(D, C, ArcFace(scale=LOSS.scale, margin=LOSS.m2), rate, seed=SEED)
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
    return Result(state, local(head.weight).detach().clone(), [float(n) for n in norms], [s.clone() for s in selected])


def dense(
    selected: list[Tensor] | None = None, rates: list[float] | None = None
) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """(backbone, class weights, norms) of the same run in one process.

    selected: the classes of each micro-batch; None: all. rates: what the learning rate is multiplied with in each step; None: nothing.
    """
    module, w = backbone().double(), class_weights().double()
    updates = {name: DenseSGD(**SGD) for name, _ in module.named_parameters()}
    rule, norms = DenseSGD(**SGD), []
    for step in range(STEPS):
        for update in [*updates.values(), rule]:
            update.lr = SGD["lr"] * (1.0 if rates is None else rates[step])
        grad, touched = torch.zeros_like(w), torch.zeros(C, dtype=torch.bool)
        module.zero_grad()
        for index in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            images, labels = micro_batch(index)
            classes = torch.arange(C) if selected is None else selected[index]
            rows = w[classes].requires_grad_()
            place = torch.full((C,), -1).index_put_((classes,), torch.arange(len(classes)))
            (LOSS(module(images.double()), rows, None, place[labels]) / ACCUMULATION).backward()
            grad[classes] += rows.grad
            touched[classes] = True
        grads = [p.grad for p in module.parameters()] + [grad]
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in grads]))
        assert norm > MAX_NORM, "the clip must bite"
        norms.append(float(norm))
        for g in grads:
            g.mul_(MAX_NORM / (norm + 1e-6))
        with torch.no_grad():
            for name, p in module.named_parameters():
                updates[name].step(p, p.grad, torch.arange(len(p)))
        rule.step(w, grad, touched.nonzero()[:, 0])
    return {name: p.detach() for name, p in module.state_dict().items()}, w, norms


def compare(
    results: list[Result], tolerance: float = 1e-5, *, rates: list[float] | None = None, norms: bool = True
) -> float:
    """Assert that every rank ended with the dense run's weights, and return the largest error."""
    every_step = [torch.cat([r.selected[i] for r in results]) for i in range(STEPS * ACCUMULATION)]
    module, w, expected_norms = dense(every_step, rates)
    rows = torch.cat([r.rows for r in results])
    assert rows.shape == w.shape
    errors = [(rows.double() - w).abs().max()]
    for result in results:
        assert result.backbone.keys() == module.keys()
        errors += [(result.backbone[name].double() - value).abs().max() for name, value in module.items()]
        if norms:
            assert len(result.norms) == STEPS
            errors += [(torch.tensor(result.norms).double() - torch.tensor(expected_norms).double()).abs().max()]
    worst = float(torch.stack(errors).max())
    print(f"largest error {worst:.2e}")
    assert worst <= tolerance, f"largest error {worst:.2e}"
    return worst
