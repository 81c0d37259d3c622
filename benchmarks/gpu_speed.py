"""Part `speed`: a step of one rank over its floor, and its memory over what `partial_fc.plan` says.

A *step* is forward, backward, step of RowOptimizer(SGD, momentum 0.9), zero_grad, on embeddings that are leaves,
ArcFace, float32 weights. The *floor* is the three matrix products of a step, `L = X Wᵀ`, `L W`, `Lᵀ X`, for X [N, D],
W [S, D] and L [N, S] in memory that is allocated beforehand and in the dtype of the step's products; S is the number of
rows that the step selected. Where L is above 1 GiB, the products run over pieces of W whose L is 1 GiB. Step and floor
are timed one after the other, by events of the device: medians, after steps that are not counted.

Memory is the peak of torch's allocator in a step less what was allocated before the head was built; the plan is of the
same sizes. Weights are drawn on the device, because the head's own draw of 10 million rows takes the host a minute.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_run import SKIPPED, Outcome, Run
from torch import Tensor

from partial_fc import PartialFC, Plan, RowOptimizer, plan

PIECE = 1 << 30  # bytes of logits of a piece of the floor
SPARE = 0.95  # share of the free memory that a case may use
SECONDS, QUICK_SECONDS = 2.0, 0.02  # that a step is repeated for


@dataclass(frozen=True)
class Size:
    """N samples, C classes, embedding size D, sample rate r, products in bf16 or fp32."""

    N: int
    C: int
    D: int
    r: float
    bf16: bool

    def __str__(self) -> str:
        return f"C={self.C:,}, D={self.D}, N={self.N:,}, r={self.r:g}, {'bf16' if self.bf16 else 'fp32'}"

    @property
    def product(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def planned(self, device: torch.device) -> Plan:
        autocast = torch.bfloat16 if self.bf16 else None
        return plan(self.C, self.D, 1, self.N, self.r, autocast=autocast, device=device.type)


def sizes(quick: bool) -> list[Size]:
    """The ones with the least work first, so that time runs out at the largest."""
    if quick:
        found = [Size(32, C, 32, r, bf16) for C, r, bf16 in itertools.product((1000, 4000), (1.0, 0.1), (True, False))]
    else:
        C, N, r = (100_000, 1_000_000, 10_000_000), (1024, 4096), (1.0, 0.1, 0.01)
        found = [Size(n, c, 512, rate, bf16) for c, n, rate, bf16 in itertools.product(C, N, r, (True, False))]
    return sorted(found, key=lambda size: size.N * size.C * size.r * (1 if size.bf16 else 8))


def speed(run: Run) -> None:
    rate: dict[bool, float] = {}  # operations a second of the last floor
    for size in sizes(run.quick):
        work = size.planned(run.device).operations["matrix products"]
        seconds = 15 * work / rate[size.bf16] if size.bf16 in rate else 1.0
        found = run.measure(str(size), partial(measured, run, size), seconds)
        if "floor_ms" in found.figures:
            rate[size.bf16] = found.figures["operations"] / (1e-3 * found.figures["floor_ms"])


def measured(run: Run, size: Size) -> Outcome:
    planned, device = size.planned(run.device), run.device
    element = size.product.itemsize
    piece = min(planned.rows, rows_of_a_piece(size.N, element))
    of_floor = element * (2 * planned.rows * size.D + size.N * piece)
    needed, free = max(planned.peak, of_floor), memory_free(device)
    if free is not None and needed > SPARE * free:
        gib = f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free"
        return Outcome(SKIPPED, gib, {"needed": needed, "free": free})
    if device.type == "cuda":  # workspaces of the matrix library are allocated once, and are no part of a step
        for dtype in (torch.float32, torch.bfloat16):
            torch.mm(torch.ones(64, 64, device=device, dtype=dtype), torch.ones(64, 64, device=device, dtype=dtype))
    x, labels = inputs(size, device)
    before = allocated(device)
    step, head = step_of(size, x, labels)
    step()  # allocates the state of the optimizer
    seconds = seconds_of(run.quick)
    taken = timed(step, device, seconds)
    peak = peak_of(step, device)
    peak = None if peak is None else peak - before
    rows, mode = len(head.selected), head.logits_mode
    del step, head, x, labels
    run.release()
    floor_ms = timed(floor(size.N, rows, size.D, size.product, device), device, seconds)
    figures: dict[str, Any] = {
        "step_ms": taken, "floor_ms": floor_ms, "ratio": taken / floor_ms, "rows": rows, "logits": mode,
        "operations": 6 * size.N * rows * size.D, "planned": planned.peak, "peak": peak,
        "N": size.N, "C": size.C, "D": size.D, "r": size.r, "bf16": size.bf16,
    }  # fmt: skip
    text = f"{taken:.2f} ms, {taken / floor_ms:.2f} × its floor of {floor_ms:.2f} ms, S={rows:,}, {mode}"
    if peak is not None:
        text += f"; {peak / 2**30:.2f} GiB, {peak / planned.peak:.2f} × planned"
    return Outcome("", text, figures)


def inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings, a leaf, and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.N, size.D, generator=generator).to(device).requires_grad_()
    return x, torch.randint(size.C, (size.N,), generator=generator).to(device)


def step_of(size: Size, x: Tensor, labels: Tensor, **options: Any) -> tuple[Callable[[], None], PartialFC]:
    """A step, and its head. options: of the head."""
    device = x.device
    head = PartialFC(size.D, size.C, sample_rate=size.r, device="meta", **options).to_empty(device=device)
    with torch.no_grad():
        head.weight.normal_(std=0.01)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=size.bf16):
            loss = head(x, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step, head


def rows_of_a_piece(samples: int, element: int) -> int:
    return max(1, PIECE // (samples * element))


def floor(N: int, S: int, D: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """The three matrix products of a step over S rows."""
    x, w = (torch.randn(n, D, device=device).div_(D**0.5).to(dtype) for n in (N, S))
    piece = min(S, rows_of_a_piece(N, dtype.itemsize))
    memory, dx, dw = x.new_empty(N * piece), torch.empty_like(x), torch.empty_like(w)

    def products() -> None:
        for a in range(0, S, piece):
            b = min(a + piece, S)
            logits = memory[: N * (b - a)].view(N, b - a)
            torch.mm(x, w[a:b].t(), out=logits)
            if a:
                dx.addmm_(logits, w[a:b])
            else:
                torch.mm(logits, w[a:b], out=dx)
            torch.mm(logits.t(), x, out=dw[a:b])

    return products


# ---------------------------------------------------------------------------------------------------- figures


def seconds_of(quick: bool) -> float:
    return QUICK_SECONDS if quick else SECONDS


def timed(thing: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median milliseconds of a call, of 3 to 30, after two that are not counted."""
    once = min(_milliseconds(thing, device, 2))
    return statistics.median(_milliseconds(thing, device, max(3, min(30, int(1e3 * seconds / max(once, 1e-3))))))


def _milliseconds(thing: Callable[[], Any], device: torch.device, times: int) -> list[float]:
    if device.type != "cuda":
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            thing()
            taken.append(1e3 * (time.perf_counter() - start))
        return taken
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in events:
        before.record()
        thing()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def peak_of(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes of the allocator's peak in a step."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def memory_free(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else None
