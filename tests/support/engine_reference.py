"""What training beside an engine is compared with: all dense in one process, float64, plain torch. Shares no code with the core.

A run is `STEPS` optimizer steps of `ACCUMULATION` micro-batches of `N` samples over all ranks, SGD with momentum, the gradient of all
clipped by its one norm.
"""

from __future__ import annotations

import copy

import torch
from oracle import Loss
from torch import Tensor, nn

STEPS, ACCUMULATION, N, CLASSES, INPUTS, D = 5, 2, 8, 11, 6, 4  # classes do not split evenly over two ranks
CLIP, SGD, SCALE, MARGIN = (
    0.5,
    {"lr": 0.2, "momentum": 0.9},
    8.0,
    0.3,
)  # the norms of this problem are 1 to 3: all steps are clipped


def make_backbone() -> nn.Module:
    """The same on every rank; with parameters that do not split evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(INPUTS, 7), nn.Tanh(), nn.Linear(7, D))


def micro_batch(index: int) -> tuple[Tensor, Tensor]:
    """Inputs `[N, INPUTS]` and labels `[N]` of the run's `index`-th micro-batch, over all ranks."""
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(N, INPUTS, generator=generator), torch.randint(0, CLASSES, (N,), generator=generator)


def share(index: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A rank's part of it."""
    inputs, labels = micro_batch(index)
    return inputs.chunk(world)[rank], labels.chunk(world)[rank]


def dense_run(
    backbone: nn.Module, rows: Tensor, *, steps: int = STEPS, clip: float | None = CLIP, skip: int | None = None
) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """(backbone's weights, class rows `[C, D]`, norms of the steps) after the run; `skip`: a step that is left out."""
    backbone = copy.deepcopy(backbone).double()
    rows = nn.Parameter(rows.double())
    parameters = [*backbone.parameters(), rows]
    optimizer = torch.optim.SGD(parameters, **SGD)
    loss_of, norms = Loss(scale=SCALE, m2=MARGIN), []
    for step in range(steps):
        optimizer.zero_grad()
        for k in range(ACCUMULATION):
            inputs, labels = micro_batch(step * ACCUMULATION + k)
            (loss_of(backbone(inputs.double()), rows, None, labels) / ACCUMULATION).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf if clip is None else clip)
        norms.append(float(norm))
        if step != skip:
            optimizer.step()
    return {name: p.detach() for name, p in backbone.named_parameters()}, rows.detach(), norms


def error(
    found: dict[str, Tensor], found_rows: Tensor, expected: dict[str, Tensor], expected_rows: Tensor
) -> tuple[float, float]:
    """The largest difference of any weight of the backbone, and of the head."""
    backbone = max(float((found[name].double() - expected[name]).abs().max()) for name in expected)
    return backbone, float((found_rows.double() - expected_rows).abs().max())
