"""Part `waits`: how often a training step waits for the device.

A step is forward, backward, clip_grad_norm_, and the steps of the backbone's and the head's optimizer. It may wait
once: to learn whether all losses and gradients are finite. torch.cuda.set_sync_debug_mode("warn") warns at every
operation that waits, and the warning knows the line that called it. It does not see waits of torch.distributed, so one
process without a group is measured. Steps run long enough for a cycle of draws to end (sampling.py).
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_run import FAIL, PASS, SKIPPED, Outcome, Run
from torch import nn

from partial_fc import CenterLoss, PartialFC, RowOptimizer, clip_grad_norm_, gather

ROOT = Path(__file__).parents[1]
ALLOWED = 1
STEPS = 12  # at r = 0.1 a cycle of draws has 10
WARNING = "called a synchronizing CUDA operation"

KINDS: dict[str, dict[str, Any]] = {
    "r=1": {},
    "r=0.1": {"rate": 0.1},
    "r=0.1, two micro-batches": {"rate": 0.1, "micro": 2},
    "r=0.1, with a center loss": {"rate": 0.1, "center": "paper"},
    "r=0.1, with a center loss by gradient": {"rate": 0.1, "center": "gradient"},
}


def waits(run: Run) -> None:
    for name, options in KINDS.items():
        run.measure(name, partial(of_kind, run, options))


def of_kind(run: Run, options: dict[str, Any]) -> Outcome:
    step = step_of(run, **options)
    if run.device.type == "cpu":
        step()
        return Outcome(SKIPPED, "not on a CPU, where a step runs and has no device to wait for")
    return count(step)


def step_of(run: Run, rate: float = 1.0, micro: int = 1, center: str = "") -> Callable[[], None]:
    """A training step, all of whose inputs are on the device."""
    classes, width, samples = (500, 16, 16) if run.quick else (100_000, 256, 256)
    device = run.device
    backbone = nn.Linear(width, width).to(device)
    head = PartialFC(width, classes, sample_rate=rate, device=device)
    losses: list[Any] = [head]
    optimizers: list[Any] = [
        torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9),
        RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9),
    ]
    if center:
        losses.append(CenterLoss(width, classes, update=center, device=device))  # type: ignore[arg-type]
        by_gradient = center == "gradient"
        optimizers.append(RowOptimizer(torch.optim.SGD, losses[1], lr=0.1, momentum=0.9) if by_gradient else losses[1])
    images = torch.randn(samples, width, device=device)
    labels = torch.randint(classes, (samples,), device=device)

    def step() -> None:
        for _ in range(micro):
            if center:
                batch = gather(backbone(images), labels)
                loss = head(batch) + 0.1 * losses[1](batch)
            else:
                loss = head(backbone(images), labels)
            (loss / micro).backward()
        clip_grad_norm_(backbone.parameters(), *losses, max_norm=5.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def count(step: Callable[[], None]) -> Outcome:
    for _ in range(3):  # state is allocated, kernels are loaded
        step()
    torch.cuda.synchronize()
    each = [waits_of(step) for _ in range(STEPS)]
    places = Counter(place for found in each for place in found)
    most = max(len(found) for found in each)
    lines = ", ".join(f"{place} ×{times / STEPS:g}" for place, times in places.most_common())
    text = f"at most {most} a step, {ALLOWED} allowed: {lines}" if places else "none that torch sees"
    return Outcome(PASS if most <= ALLOWED else FAIL, text, {"most": most, "places": dict(places), "steps": STEPS})


def waits_of(step: Callable[[], None]) -> list[str]:
    """Where one step waits: the innermost lines of this package."""
    found: list[str] = []

    def show(message: Warning | str, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if WARNING in str(message):
            found.append(_place(filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def _place(filename: str, lineno: int) -> str:
    package = ROOT / "partial_fc"
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(package):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return f"{Path(filename).name}:{lineno}"
