"""What is measured of the head itself: whole steps against the floor of their matrix products, and memory.

A *step* is forward, backward, step of RowOptimizer(SGD, momentum 0.9), zero_grad, on embeddings that are leaves. At r
below 1 its selected rows first make the steps of momentum that they missed since they were last selected
(`skipped_rows="dense"`, what RowOptimizer does by itself), as SGD over a dense gradient makes them.

The *floor* is the three matrix products of a step, `L = X Wᵀ`, `L W`, `Lᵀ X`, for X [N, D], W [S, D] and L [N, S] in
memory that is allocated beforehand, and nothing else: no exponentials, no gathering of rows, no missed steps, no
optimizer. S is the number of rows that the rank selects in its first step: under sampling its share of the window, r·C
/ ranks, and the batch's classes outside the window, about (1 − r)·N / ranks more. The *bare floor* of sampled cases
leaves those out: the same products over exactly r·C / ranks rows. All are timed in the same processes, in turn; a
repetition takes as long as its slowest rank.

Memory is measured in new processes, in the unit in which it is paid: resident pages of a rank's process.

    a few steps of a small one, dropped   libraries are loaded; trim; `start`: RSS of a process that has nothing
    the thing itself is built, two steps  optimizer state exists, and whatever buffers are used again in every step
    reset of the peak (clear_refs)        two whole steps; `peak`: VmHWM; beside it `sampled`: the largest RSS that a
                                          thread saw

`held` are the bytes of weights and optimizer state, counted from the tensors, `gradient` those of one gradient of the
weights. The figure of the tiled case is `peak − start − held − gradient`: all that a step needs besides, buffers that
are kept between steps included. Where rows are updated inside backward the gradient is not subtracted. "trim" is
glibc's malloc_trim: without it `start` would hold freed memory.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from ranks import interleaved, profile
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc import PartialFC, RowOptimizer

LEARNING_RATE, MOMENTUM = 0.1, 0.9
IN_BACKWARD = "update_in_backward" in inspect.signature(RowOptimizer.__init__).parameters


@dataclass(frozen=True)
class Work:
    """One size of work: N samples over all ranks, C classes, embedding size D, sample rate r. skipped: what becomes of
    rows that a step does not select, None for the optimizer's default."""

    N: int
    C: int
    D: int
    r: float
    bf16: bool = False
    tiled: bool = False
    in_backward: bool = False
    skipped: str | None = None
    repetitions: int = 15

    def __str__(self) -> str:
        text = f"C={self.C:,}, D={self.D}, r={self.r}"
        return (
            text
            + ", bf16" * self.bf16
            + ", tiled" * self.tiled
            + ", update in backward" * self.in_backward
            + (f", skipped rows {self.skipped}" if self.skipped else "")
        )


@dataclass
class Trained:
    """Something that trains: `update()` is forward, backward and optimizer step; `clear()` forgets the gradients."""

    update: Callable[[], Any]
    clear: Callable[[], None]
    parameters: Callable[[], Iterable[Tensor]]
    state: Callable[[], Iterable[Tensor]]

    def step(self) -> None:
        self.update()
        self.clear()


def local_bytes(tensors: Iterable[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def batch(work: Work, world: int, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the samples: embeddings [N_local, D], a leaf, and labels [N_local], on torch's default device."""
    generator, there = torch.Generator("cpu").manual_seed(rank), torch.empty(0).device
    n = work.N // world
    x = torch.randn(n, work.D, generator=generator, device="cpu").to(there).requires_grad_()
    return x, torch.randint(work.C, (n,), generator=generator, device="cpu").to(there)


def trained(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: Callable[[], Iterable[Tensor]],
) -> Trained:
    """`loss_of(x, labels)` is the loss."""

    def update() -> Tensor:
        loss = loss_of(x, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def clear() -> None:
        optimizer.zero_grad()
        x.grad = None

    def state() -> Iterable[Tensor]:
        return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))

    return Trained(update, clear, parameters, state)


def ours(work: Work, group: dist.ProcessGroup | None = None) -> tuple[Trained, PartialFC]:
    head = PartialFC(work.D, work.C, sample_rate=work.r, group=group, logits_budget=0 if work.tiled else None)
    options: dict[str, Any] = {"update_in_backward": True} if work.in_backward else {}
    options |= {"skipped_rows": work.skipped} if work.skipped else {}
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=LEARNING_RATE, momentum=MOMENTUM, **options)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
            return head(x, labels)

    return trained(
        loss, *batch(work, dist.get_world_size(group), dist.get_rank(group)), optimizer, head.parameters
    ), head


def floor(N: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """The three matrix products of a step."""
    x, w = (torch.randn(n, D).div_(D**0.5).to(dtype) for n in (N, S))
    logits, dx, dw = x.new_empty(N, S), torch.empty_like(x), torch.empty_like(w)

    def products() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    return products


# ---------------------------------------------------------------------------------------------------- on a rank


def time_steps(works: dict[str, Work], with_profile: bool) -> dict[str, Any]:
    """Steps of one or several works and the floor of the first, in turn; where it samples, its bare floor, too."""
    things: dict[str, Callable[[], Any]] = {}
    selected: dict[str, int] = {}
    for name, work in works.items():
        made, head = ours(work)
        made.step()
        selected[name] = len(head.selected)
        things[name] = made.step
    first, work = next(iter(works.items()))
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    things["floor"] = floor(work.N, selected[first], work.D, dtype)
    if work.r < 1:
        things["bare floor"] = floor(work.N, round(work.r * work.C / dist.get_world_size()), work.D, dtype)
    taken = interleaved(things, work.repetitions)
    profiles = {name: profile(things[name]) for name in [*works, "floor"]} if with_profile else {}
    return {"times": taken, "selected": selected, "profiles": profiles}


def memory_of_ours(work: Work, with_profile: bool = False) -> dict[str, Any]:
    return memory(lambda work: ours(work)[0], work, with_profile)


def memory(build: Callable[[Work], Trained], work: Work, with_profile: bool = False) -> dict[str, Any]:
    """Resident memory of this rank, in bytes, as the module's docstring tells."""
    small = build(smaller(work))
    for _ in range(3):
        small.step()
    del small
    start = trimmed()
    made = build(work)
    for _ in range(2):
        made.step()
    trimmed()
    dist.barrier()
    reset = reset_peak()
    with _Sampler() as sampler:
        for _ in range(2):
            made.step()
    parameters = local_bytes(made.parameters())
    figures: dict[str, Any] = {
        "start": start,
        "held": parameters + local_bytes(made.state()),
        "gradient": parameters,
        "peak": status("VmHWM") if reset else sampler.largest,
        "sampled": sampler.largest,
        "peak_from": "VmHWM" if reset else "samples",
    }
    return figures | ({"profile": profile(made.step, steps=1, memory=True)} if with_profile else {})


class _Sampler(threading.Thread):
    """The largest resident size between `with` and its end, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.largest = max(self.largest, resident())
            time.sleep(0.001)

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done = True
        self.join()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def trimmed() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def smaller(work: Work) -> Work:
    """A size at which everything runs in a moment, and whose figures say nothing."""
    return replace(work, N=min(work.N, 64), C=work.C // 100, D=32, repetitions=3)
