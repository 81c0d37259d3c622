"""Part `proof`: training steps of a head and of a center loss on the device, beside dense float64 ones on the CPU.

    Case ── errors_of(case, device) ──> {"loss": e, "embedding gradient": e, "class gradient": e, "weights": e, ...}

The dense side is tests/support/dense_*.py, written from the papers' formulas; it shares no code with partial_fc.
"weights" are those of all rows after every step of the optimizer. e is the largest over all steps:

    float64, float32   the largest difference, over the largest number of the dense tensor (at least 1e-3)
    bf16               ‖difference‖ / ‖dense‖, of the weights' moves since the start: under autocast inputs and results
                       of products are rounded to 8 bits, half a per cent, so single numbers say little

Under `two` the same cases run on two ranks, each with its own share of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "support")]

from dense_centers import DenseCenters, center_losses  # noqa: E402
from dense_losses import Loss, reduced, share_of, taken_of  # noqa: E402
from dense_optimizers import DenseAdamW, DenseSGD  # noqa: E402
from gpu_run import FAIL, PASS, Outcome, Run  # noqa: E402
from shards import classes_of, everyones, local, positions, samples_of  # noqa: E402

from partial_fc import CenterLoss, PartialFC, RowOptimizer, margins  # noqa: E402
from partial_fc.sampling import mix  # noqa: E402
from partial_fc.softmax import tiles  # noqa: E402

TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "bf16": 0.03}
SMALLEST = 1e-3  # a tensor of zeros is compared as if its largest number were this
MAGFACE = {"scale": 16.0, "l_a": 1.5, "u_a": 9.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}
MARGINS: dict[str, dict[str, Any]] = {
    "Softmax": {},
    "NormFace": {"scale": 20.0},
    "ArcFace": {"scale": 16.0},
    "CosFace": {"scale": 16.0},
    "SphereFace": {"scale": 16.0},
    "CombinedMargin": {"scale": 16.0, "m1": 1.3, "m2": 0.3, "m3": 0.2},
    "SubCenterArcFace": {"scale": 16.0, "centers": 3},
    "CurricularFace": {"scale": 16.0, "momentum": 0.3},
    "AdaFace": {"scale": 16.0, "momentum": 0.4},
    "MagFace": MAGFACE,
    "ElasticFace": {"scale": 16.0, "deviation": 0.2},
    "AdaptiveMargin": {"scale": 16.0},
    "SphereFace2": {"scale": 16.0},
}
# The smallest numbers of a gradient are rounding in float32, and AdamW would make them as large as all others: eps is
# far above them
ADAMW: dict[str, Any] = {"lr": 0.02, "eps": 1e-2}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Callable[[], Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-4}, lambda: DenseSGD(0.5)),
    "adamw": (torch.optim.AdamW, ADAMW, lambda: DenseAdamW(**ADAMW)),
}


@dataclass(frozen=True)
class Case:
    """counts: samples of each rank. One of all samples is ignored."""

    margin: str = "ArcFace"
    dtype: str = "float64"
    rate: float = 1.0
    tiled: bool = False
    optimizer: str = "sgd"
    in_backward: bool = False
    smoothing: float = 0.0
    beyond: float | None = None  # interclass_filter
    corrected: bool = False  # sampling_correction
    class_weights: bool = False
    center: str = ""  # the update of a CenterLoss, instead of a head
    counts: tuple[int, ...] = (48,)
    classes: int = 700
    width: int = 32
    steps: int = 3

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of embeddings and rows; autocast keeps float32."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def __str__(self) -> str:
        words = [f"CenterLoss {self.center}" if self.center else self.margin, self.dtype]
        if not self.center:
            words += [f"r={self.rate:g}", "tiled" if self.tiled else "kept"]
        words += [self.optimizer] * (self.center != "paper") + ["update in backward"] * self.in_backward
        words += [f"smoothing {self.smoothing}"] * bool(self.smoothing) + ["class weights"] * self.class_weights
        words += ["corrected"] * self.corrected
        return ", ".join(words + ["filter"] * (self.beyond is not None) + [f"{self.counts}"] * (len(self.counts) > 1))


def cases(quick: bool) -> list[Case]:
    """All margins in every dtype, the options in float64 and float32. quick: every second one in float32 and bf16."""
    found = [
        Case(margin, dtype, rate, tiled, "adamw" if i % 2 else "sgd")
        for dtype in ("float64", "float32")
        for i, margin in enumerate(MARGINS)
        for rate, tiled in ((1.0, False), (1.0, True), (0.3, i % 3 == 0))
    ]
    found += [Case("ArcFace", "float64", rate, tiled, o) for rate, tiled in MODES for o in OPTIMIZERS]
    found += [Case("Softmax", "float64", rate, tiled, o) for rate, tiled in MODES for o in OPTIMIZERS]
    for dtype in ("float64", "float32"):
        found += [
            Case("ArcFace", dtype, tiled=t, optimizer=o, in_backward=True) for t in (False, True) for o in OPTIMIZERS
        ]
        found += [
            Case(margin, dtype, rate, tiled, smoothing=smoothing, class_weights=weights, beyond=beyond)
            for margin in ("ArcFace", "CurricularFace")
            for rate, tiled in ((1.0, False), (0.3, True))
            for smoothing, weights, beyond in (
                (0.1, False, None),
                (0.0, True, None),
                (0.1, True, None),
                (0.0, False, 0.3),
            )
        ]
        found += [Case(dtype=dtype, center=update, optimizer=o) for update, o in CENTERS]
    found += [Case(margin, "bf16", rate, tiled) for margin in MARGINS for rate, tiled in ((1.0, False), (0.3, True))]
    found += [Case("ArcFace", "bf16", in_backward=True), Case("ArcFace", "bf16", smoothing=0.1, class_weights=True)]
    found += [
        Case(margin, dtype, 0.3, tiled, corrected=True)
        for dtype in ("float64", "float32", "bf16")
        for margin in ("ArcFace", "Softmax", "SubCenterArcFace", "CurricularFace", "SphereFace2")
        for tiled in (False, True)
    ]
    found = list(dict.fromkeys(found))
    if quick:
        return [small(case) for i, case in enumerate(found) if case.dtype == "float64" or i % 2]
    return found


def small(case: Case) -> Case:
    """Sizes for a CPU."""
    return replace(case, classes=150, counts=tuple(-(-n // 4) for n in case.counts), width=8, steps=2)


MODES = ((1.0, False), (1.0, True), (0.3, False), (0.3, True))
CENTERS = (("paper", "sgd"), ("gradient", "sgd"), ("gradient", "adamw"))


def proof(run: Run) -> None:
    for case in cases(run.quick):
        run.measure(str(case), partial(_proven, case, run.device))


def _proven(case: Case, device: torch.device) -> Outcome:
    return judged(case, errors_of(case, device))


def judged(case: Case, errors: dict[str, float]) -> Outcome:
    """PASS if no error is above what the dtype allows."""
    bound = TOLERANCES[case.dtype]
    what, largest = max(errors.items(), key=lambda item: item[1])
    text = f"{largest:.1e} ({what}; at most {bound:g})"
    return Outcome(
        PASS if largest <= bound else FAIL, text, {"dtype": case.dtype, "largest": largest, "errors": errors}
    )


def errors_of(case: Case, device: torch.device, rank: int = 0, world: int = 1) -> dict[str, float]:
    """The largest error of each kind. AssertionError where a row moved that was not selected."""
    with small_tiles(device):
        return (_center_errors if case.center else _head_errors)(case, device, rank, world)


@contextmanager
def small_tiles(device: torch.device) -> Iterator[None]:
    """Logits are computed in tiles of 64 rows, so that there are several."""
    sizes = tiles.TILE_BYTES
    before = dict(sizes)
    sizes[device.type] = 1
    try:
        yield
    finally:
        sizes.clear()
        sizes.update(before)


# ---------------------------------------------------------------------------------------------------- a head


def _head_errors(case: Case, device: torch.device, rank: int, world: int) -> dict[str, float]:
    errors = Errors(case.dtype)
    settings = _settings(case)
    margin = getattr(margins, case.margin)(**settings)
    weights = torch.rand(case.classes, generator=torch.Generator().manual_seed(3)) + 0.1 if case.class_weights else None
    head = PartialFC(
        case.width, case.classes, margin, case.rate, device=device, dtype=case.torch_dtype,
        logits_budget=0 if case.tiled else None, label_smoothing=case.smoothing, interclass_filter=case.beyond,
        class_weights=None if weights is None else weights.to(device),
        sampling_correction="importance" if case.corrected else "none",
    )  # fmt: skip
    oracle = Loss(
        case.margin, settings, case.smoothing, "mean", case.beyond, None if weights is None else weights.double()
    )
    cls, options, rule = OPTIMIZERS[case.optimizer]
    stay = case.optimizer == "adamw"  # over all rows it is met to 1e-6 only
    skipped: Any = "still" if stay else "dense"
    optimizer = RowOptimizer(cls, head, update_in_backward=case.in_backward, skipped_rows=skipped, **options)
    shape = (case.classes, case.width) if margin.centers == 1 else (case.classes, margin.centers, case.width)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(case.torch_dtype)
    mine, here = classes_of(case.classes, rank, world), samples_of(case.counts, rank)
    with torch.no_grad():
        local(head.weight).copy_(rows[mine])
    dense = {"weight": rows.double()}
    if head.bias is not None:
        dense["bias"] = torch.zeros(case.classes, dtype=torch.float64)
    if margin.binary:
        dense["offset"] = local(margin.offset).detach().double().cpu()
    start = {name: value.clone() for name, value in dense.items()}
    rules = {name: rule() for name in dense}
    for step in range(case.steps):
        x_all, labels = batch_of(case, step)
        drawn = _random_margins(head, x_all, labels) if case.margin == "ElasticFace" else None
        x = x_all[here].to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bf16"):
            loss = head(x, labels[here].to(device))
        loss.backward()
        assert not case.tiled or head.logits_mode != "kept" or not len(head.selected)
        chosen = torch.cat(everyones(head.selected.cpu())).unique()
        exact = x_all.double().requires_grad_()
        leaves = {n: (v if n == "offset" else v[chosen]).clone().requires_grad_() for n, v in dense.items()}
        expected = oracle(
            exact, leaves["weight"], positions(labels, chosen, case.classes), chosen, drawn=drawn,
            bias=leaves.get("bias"), offset=leaves.get("offset"),
            taken=taken_of(chosen, labels, case.classes, case.rate) if case.corrected else None,
        )  # fmt: skip
        expected.backward()
        errors.add("loss", loss, expected)
        assert exact.grad is not None
        errors.add("embedding gradient", x.grad, exact.grad[here] * world)
        grads = {name: torch.zeros_like(value) for name, value in dense.items()}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                grads[name][torch.tensor([0]) if name == "offset" else chosen] = leaf.grad
        if head.row_grad is not None:
            ids, values = head.row_grad
            errors.add("class gradient", values, grads["weight"][ids.cpu()])
        elif head.weight.grad is not None:
            errors.add("class gradient", local(head.weight.grad), grads["weight"][mine])
        before = local(head.weight).detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        for name, each in rules.items():
            moved = chosen if stay else torch.arange(len(dense[name]))
            each.step(dense[name], grads[name], torch.tensor([0]) if name == "offset" else moved)
        last = step == case.steps - 1
        if last:
            optimizer.catch_up()
        # rows that are behind are compared at the end
        seen = torch.arange(mine.start, mine.stop) if last or stay else head.selected.cpu()
        trained = {"weight": head.weight, "bias": head.bias, "offset": getattr(margin, "offset", None)}
        for name, value in dense.items():
            part = torch.tensor([0]) if name == "offset" else seen
            at = part if name == "offset" else seen - mine.start
            now = local(trained[name]).detach()[at.to(device)]
            errors.add_rows("weights" if name == "weight" else name, now, value[part], start[name][part])
        for name, buffer in margin.named_buffers():
            if not buffer.ndim:
                errors.add(f"state {name}", buffer, torch.tensor(oracle.state[name], dtype=torch.float64))
        still = torch.ones(case.classes, dtype=torch.bool).index_fill_(0, chosen, False)[mine].to(device)
        assert not stay or torch.equal(local(head.weight)[still], before[still]), "a row that was not selected moved"
    return errors.largest


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of all ranks, one of which is ignored."""
    generator = torch.Generator().manual_seed(50 + step)
    n = sum(case.counts)
    x = torch.randn(n, case.width, generator=generator).to(case.torch_dtype)
    labels = torch.randint(0, case.classes, (n,), generator=generator)
    labels[:1] = -100
    return x, labels


def _settings(case: Case) -> dict[str, Any]:
    settings = MARGINS[case.margin]
    if case.margin == "AdaptiveMargin":
        return {**settings, "class_counts": [1 + 7 * (i % 90) for i in range(case.classes)]}
    return settings


def _random_margins(head: PartialFC, x: Tensor, labels: Tensor) -> Tensor:
    """What ElasticFace draws in the next forward: its draws are its own; what is made of them is compared."""
    key = mix(0, head.forward_count)
    positives = margins.Positives(labels, torch.arange(len(x)), x.double().norm(dim=1), labels >= 0, key)
    assert isinstance(head.margin, margins.ElasticFace)
    return head.margin._margins(torch.zeros(len(x), dtype=torch.float64), positives)


# ---------------------------------------------------------------------------------------------------- a center loss


def _center_errors(case: Case, device: torch.device, rank: int, world: int) -> dict[str, float]:
    """Two micro-batches a step; centers move by the paper's rule, or by an optimizer."""
    errors = Errors(case.dtype)
    center = CenterLoss(case.width, case.classes, update=case.center, device=device, dtype=case.torch_dtype)  # type: ignore[arg-type]
    rows = torch.randn(case.classes, case.width, generator=torch.Generator().manual_seed(7)).to(case.torch_dtype)
    mine, here = classes_of(case.classes, rank, world), samples_of(case.counts, rank)
    with torch.no_grad():
        local(center.centers).copy_(rows[mine])
    cls, options, rule = OPTIMIZERS[case.optimizer]
    skipped: Any = "still" if case.optimizer == "adamw" else "dense"
    optimizer = RowOptimizer(cls, center, skipped_rows=skipped, **options) if case.center == "gradient" else None
    dense, start, paper, optimized = rows.double(), rows.double(), DenseCenters(0.5), rule()
    for step in range(case.steps):
        grad, touched = torch.zeros_like(dense), torch.zeros(case.classes, dtype=torch.bool)
        for micro in range(2):
            x_all, labels = batch_of(case, 10 * step + micro)
            labels = torch.where(labels >= 0, labels % 7, labels)  # most classes are on several ranks, several times
            x = x_all[here].to(device).requires_grad_()
            loss = center(x, labels[here].to(device))
            loss.backward()
            exact, leaf = x_all.double().requires_grad_(), dense.clone().requires_grad_()
            share, some = share_of(labels, case.classes)
            worth = some.double()
            expected = reduced(center_losses(exact, leaf, share), worth)[0]
            expected.backward()
            assert exact.grad is not None and leaf.grad is not None
            errors.add("loss", loss, expected)
            errors.add("embedding gradient", x.grad, exact.grad[here] * world)
            paper.note(exact, dense, share * worth[:, None])
            grad += leaf.grad
            touched |= (share > 0).any(0)
        if optimizer is None:
            center.step()
            paper.step(dense)
        else:
            optimizer.step()
            optimizer.zero_grad()
            optimizer.catch_up()
            optimized.step(dense, grad, touched.nonzero()[:, 0] if skipped == "still" else torch.arange(len(dense)))
        errors.add_rows("weights", center.centers, dense[mine], start[mine])
    return errors.largest


# ---------------------------------------------------------------------------------------------------- errors


class Errors:
    """The largest error of each kind so far."""

    def __init__(self, dtype: str) -> None:
        self.by_norm = dtype == "bf16"
        self.largest: dict[str, float] = {}

    def add(self, kind: str, mine: Tensor | None, exact: Tensor) -> None:
        assert mine is not None, f"{kind}: there is none"
        mine, exact = mine.detach().cpu().double(), exact.detach()
        assert mine.shape == exact.shape, f"{kind}: {tuple(mine.shape)} is not {tuple(exact.shape)}"
        if not mine.numel():
            return
        if self.by_norm:
            error = float((mine - exact).norm() / exact.norm().clamp(min=SMALLEST))
        else:
            error = float((mine - exact).abs().max() / exact.abs().max().clamp(min=SMALLEST))
        self.largest[kind] = max(self.largest.get(kind, 0.0), error if error == error else float("inf"))

    def add_rows(self, kind: str, mine: Any, exact: Tensor, start: Tensor) -> None:
        """Of what is trained; start: what it was. By norm the moves are compared, which are small beside the rows."""
        rows = local(mine).detach().cpu().double()
        self.add(kind, rows - start if self.by_norm else rows, exact - start if self.by_norm else exact)
