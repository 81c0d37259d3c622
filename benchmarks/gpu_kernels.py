"""Part `kernels`: the kernels of partial_fc.kernels on the device, chosen by name: `gpu.py --parts kernels`.

    right    heads in every mode and the plain ones beside dense float64, bfloat16 products: PASS where the largest error
             is at most 1.5 times that of plain PyTorch, two runs have the same bits, and no kernel has failed
    steps    whole steps with update, with kernels and without, over the three products in cuBLAS; the share of the
             rate that the device reaches in a large product; memory beyond weights, state and one gradient
    alone    single kernels, as a share of the same rate; with D = 512, blocks that the rule does not take, too
    others   fused heads without margin, where they are installed: their forward and backward, on the same N, S, D

To reach on an H100 at D = 512, N = 4,096, S = 1,000,000: 1.45 of the three products with kept exponentials, 1.8 with at
most 300 MiB; 1.5 times as fast as plain PyTorch in the same mode, 2 times at N = 1,024, S = 100,000. On a CPU heads run
in Triton's interpreter, at sizes that say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from typing import Any

import gpu_speed
import torch
from gpu_run import FAIL, PASS, SKIPPED, Outcome, Run
from gpu_speed import Size, floor, inputs, peak_of, seconds_of, step_of, timed
from torch import Tensor
from torch.nn.functional import normalize

from partial_fc import ArcFace, CosFace, PartialFC, Softmax
from partial_fc.distributed.ranks import local_part
from partial_fc.kernels import choice, launch, logits

WORSE = 1.5  # times the largest error of plain PyTorch
MODES = {"kept": 64 << 30, "tiled": 0}  # by their logits_budget; both are streamed where the rule says so


@dataclass(frozen=True)
class Step:
    N: int
    S: int
    D: int
    mode: str

    def __str__(self) -> str:
        return f"N={self.N:,}, S={self.S:,}, D={self.D}, {self.mode}"


def kernels(run: Run) -> None:
    problem = choice.machine_problem("auto", run.device)
    if run.device.type == "cpu":
        problem = choice.triton_problem()
    if problem:
        run.note("all", Outcome(SKIPPED, problem))
        return
    if run.device.type == "cuda" and (capability := torch.cuda.get_device_capability(run.device)) != choice.LOGITS_CARD:
        # the rule takes no tile and no stream there, so there is nothing of them to be right or fast
        run.note("all", Outcome(SKIPPED, f"kernels of logits are for capability 9.0, and this card has {capability}"))
        return
    given = "interpret" if run.device.type == "cpu" else "auto"
    for name in ("ArcFace", "CosFace", "Softmax"):
        for mode in ("kept", "tiled", "streamed"):
            run.measure(f"right: {name}, {mode}", partial(right, run, name, mode, given))
    found = run.measure("the rate of a product", partial(rate_of, run))
    rate = found.figures.get("rate", math.nan)
    for step in steps(run.quick):
        run.measure(f"step: {step}", partial(measured, run, step, given, rate), 5.0)
    for width, N, S in (
        ((32, 16, 64),) if run.quick else ((128, 4096, 200_000), (256, 4096, 200_000), (512, 4096, 200_000))
    ):
        run.measure(f"alone: N={N:,}, S={S:,}, D={width}", partial(alone, run, N, S, width, rate), 3.0)
    for name, step in OTHERS.items():
        for work in (
            (Step(32, 200, 32, ""),) if run.quick else (Step(4096, 100_000, 512, ""), Step(1024, 100_000, 512, ""))
        ):
            case = f"others: {name}, N={work.N:,}, S={work.S:,}, D={work.D}"
            if run.device.type == "cpu" or util.find_spec(name.split(".")[0]) is None:
                run.note(case, Outcome(SKIPPED, "not installed, or not for a CPU"))
            else:
                run.measure(case, partial(other, run, step, work, rate), 3.0)


def steps(quick: bool) -> list[Step]:
    """The ones with a target first."""
    if quick:
        return [Step(16, 100, 32, mode) for mode in MODES]
    sizes = [(4096, 1_000_000, 512), (1024, 100_000, 512), (4096, 1_000_000, 128), (4096, 1_000_000, 256)]
    sizes += [(4096, 100_000, 1024), (8192, 100_000, 512)]
    return [Step(*size, mode) for size in sizes for mode in MODES]


def rate_of(run: Run) -> Outcome:
    """Operations a second of a large product in bfloat16."""
    side = 128 if run.quick else 8192
    a, b = (torch.randn(side, side, device=run.device).bfloat16() for _ in range(2))
    taken = timed(lambda: a @ b, run.device, seconds_of(run.quick))
    rate = 2 * side**3 / (1e-3 * taken)
    return Outcome("", f"{rate / 1e12:.1f} * 10^12 a second, {side} a side", {"rate": rate})


# ---------------------------------------------------------------------------------------------------- right


def right(run: Run, name: str, mode: str, given: str) -> Outcome:
    """One forward and backward twice with kernels, once without, and dense float64."""
    launch.failed.clear()
    n, classes, width = (20, 70, 24) if run.quick else (300, 5000, 128 if mode == "streamed" else 320)
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, width, generator=generator).to(run.device) for rows in (n, classes))
    labels = torch.randint(classes, (n,), generator=generator).to(run.device)
    before = choice.STREAM_INSTEAD, choice.STREAM_WIDEST
    if mode != "streamed":
        choice.STREAM_INSTEAD = choice.STREAM_WIDEST = 0
    choice.choose.cache_clear()
    try:
        budget = 0 if mode == "tiled" else None
        runs = [of_head(name, how, budget, x, labels, w) for how in (given, given, "off")]
    finally:
        choice.STREAM_INSTEAD, choice.STREAM_WIDEST = before
        choice.choose.cache_clear()
    want = dense(name, x, labels, w)
    ours, again, plain = ([off(a, b) for a, b in zip(found, want, strict=True)] for found, _ in runs)
    worst = max(a / max(b, 1e-9) for a, b in zip(ours, plain, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    figures = {"ours": ours, "plain": plain, "kernels": runs[0][1], "failed": dict(launch.failed)}
    served = "tiles" in runs[0][1]
    good = served and same and not launch.failed and worst <= WORSE and ours == again
    text = f"{worst:.2f} × the error of plain PyTorch, {max(ours):.1e}; {runs[0][1]}"
    text += "" if same else "; two runs differ"
    return Outcome(PASS if good else FAIL, text + "".join(f"; {k}: {v}" for k, v in launch.failed.items()), figures)


def of_head(name: str, how: str, budget: int | None, x: Tensor, labels: Tensor, w: Tensor) -> tuple[list[Tensor], str]:
    """(loss, gradients of embeddings and rows; the kernels in use)."""
    margin = {"ArcFace": ArcFace(), "CosFace": CosFace(), "Softmax": Softmax()}[name]
    head = PartialFC(
        x.shape[1], len(w), margin, kernels=how, logits_budget=budget, device=x.device, dtype=torch.float32  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        local_part(head.weight).copy_(w)
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = head(leaf, labels)
    loss.backward()
    assert leaf.grad is not None and head.weight.grad is not None
    return [loss.detach(), leaf.grad, local_part(head.weight.grad)], head.kernels_in_use


def dense(name: str, x: Tensor, labels: Tensor, w: Tensor) -> list[Tensor]:
    """The same by one float64 matrix, from the papers' formulas."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    if name == "Softmax":
        z = x @ w.T
    else:
        z = normalize(x) @ normalize(w).T
        own = z.gather(1, labels[:, None])
        moved = own - 0.35 if name == "CosFace" else torch.cos(torch.acos(own) + 0.5)
        z = 64.0 * z.scatter(1, labels[:, None], moved)
    loss = torch.nn.functional.cross_entropy(z, labels)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    return [loss.detach(), x.grad, w.grad]


def off(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


# ---------------------------------------------------------------------------------------------------- time


def measured(run: Run, work: Step, given: str, rate: float) -> Outcome:
    """A whole step with kernels and without, and the three products."""
    launch.failed.clear()
    size = Size(work.N, work.S, work.D, 1.0, True)
    free = gpu_speed.memory_free(run.device)
    needed = 16 * work.S * work.D + (2 * work.N * work.S if work.mode == "kept" else 0) + (1 << 30)
    if free is not None and needed > gpu_speed.SPARE * free:
        return Outcome(SKIPPED, f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free")
    seconds, taken, beyond, mode = seconds_of(run.quick), {}, None, ""
    for how in (given, "off"):
        x, labels = inputs(size, run.device)
        step, head = step_of(size, x, labels, kernels=how, logits_budget=MODES[work.mode])
        step()
        taken[how] = timed(step, run.device, seconds)
        if how == given:
            held = gpu_speed.allocated(run.device)  # weights, momentum, embeddings
            peak = peak_of(step, run.device)
            beyond = None if peak is None else peak - held - 4 * work.S * work.D
            mode = f"{head.logits_mode}, {head.kernels_in_use}"
        del step, head, x, labels
        run.release()
    products = timed(floor(work.N, work.S, work.D, torch.bfloat16, run.device), run.device, seconds)
    ours, plain = taken[given], taken["off"]
    share = 6 * work.N * work.S * work.D / (1e-3 * ours) / rate
    figures: dict[str, Any] = {
        "ms": ours, "plain_ms": plain, "products_ms": products, "over_products": ours / products,
        "faster": plain / ours, "share_of_rate": share, "beyond": beyond, "mode": mode, "failed": dict(launch.failed),
    }  # fmt: skip
    text = f"{ours:.2f} ms, {ours / products:.2f} × three products, {plain / ours:.2f} × as fast as plain PyTorch, "
    text += f"{share:.0%} of the rate; {mode}"
    text += "" if beyond is None else f"; {beyond / 2**20:.0f} MiB beyond weights, state and a gradient"
    text += "".join(f"; {name} FAILED" for name in launch.failed)
    return Outcome(FAIL if launch.failed else "", text, figures)


def alone(run: Run, N: int, S: int, width: int, rate: float) -> Outcome:
    """Kernels one by one: milliseconds, and the share of the rate."""
    launch.failed.clear()
    x, w = (normalize(torch.randn(n, width, device=run.device)).bfloat16() for n in (N, S))
    first = torch.randint(S, (N,), device=run.device)
    operands = logits.Operands(x, torch.bfloat16, first, 64.0, online=False, hardest=False)
    e, factor = x.new_empty(N, -(-S // 8) * 8)[:, :S], torch.ones(N, device=run.device)
    out = torch.empty(S, width, device=run.device)
    things: dict[str, tuple[Callable[[], Any], int]] = {
        "tile, e kept": (lambda: operands.tile(w, 0, None, e), 1),
        "tile": (lambda: operands.tile(w, 0, None, None), 1),
        "tile again": (lambda: operands.tile(w, 0, None, e, sums=False), 1),
        "cuBLAS": (lambda: torch.mm(x, w.T, out=e), 1),
        "stream": (lambda: operands.stream(w, 0, None), 2),
        "stream of rows": (lambda: operands.stream_rows(w, 0, None, None, factor, out, None), 2),
    }
    figures, words = {}, []
    for name, (thing, products) in things.items():
        taken = timed(thing, run.device, seconds_of(run.quick) / 4)
        share = products * 2 * N * S * width / (1e-3 * taken) / rate
        figures[name] = {"ms": taken, "share_of_rate": share}
        words.append(f"{name} {taken:.3f} ms ({share:.0%})")
    failed = [f"{name} FAILED: {error}" for name, error in launch.failed.items()]
    return Outcome(FAIL if failed else "", ", ".join([*words, *failed]), figures)


# ---------------------------------------------------------------------------------------------------- others


def of_cut(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(x, w, labels)
    return loss


def of_liger(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()(w, x, labels)
    return loss


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"cut_cross_entropy": of_cut, "liger_kernel": of_liger}


def other(run: Run, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], work: Step, rate: float) -> Outcome:
    """Forward and backward of a fused head on bfloat16 operands; neither lengths, margin nor update."""
    x, w = (
        (torch.randn(n, work.D, device=run.device) / math.sqrt(work.D)).bfloat16().requires_grad_()
        for n in (work.N, work.S)
    )
    labels = torch.randint(work.S, (work.N,), device=run.device)

    def step() -> None:
        loss_of(x, w, labels).backward()
        x.grad = w.grad = None

    taken = timed(step, run.device, seconds_of(run.quick))
    share = 6 * work.N * work.S * work.D / (1e-3 * taken) / rate
    return Outcome("", f"{taken:.2f} ms, {share:.0%} of the rate", {"ms": taken, "share_of_rate": share})
