"""`sampling_correction="importance"`: sums over the classes of a step have the mean of those over all classes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from common import message_of
from dense_losses import Loss
from near import assert_near
from shards import everyones, local, row_gradient, samples_of, two_by_two, whole
from side_by_side import Case, D, check_cases, check_soft_labels, small_tiles
from torch import Tensor

from partial_fc import ArcFace, PartialFC, RowOptimizer, Softmax, SphereFace2, margins
from partial_fc.distributed.shards import shard_bounds
from partial_fc.sampling import draw_window, window_size
from partial_fc.softmax.corrections import log_weights
from partial_fc.softmax.draws import Draws

C = 23
COUNTS = [1, 5, 900, 40, 3] + [7 * i for i in range(C - 5)]
MAGFACE = {"l_a": 1.5, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("Softmax", {}),
    "normface": ("NormFace", {"scale": 16.0}),
    "sphereface": ("SphereFace", {"scale": 16.0}),
    "cosface": ("CosFace", {"scale": 16.0}),
    "arcface": ("ArcFace", {"scale": 16.0}),
    "arcface, not bounded": ("ArcFace", {"scale": 800.0}),
    "arcface, straight through": ("ArcFace", {"scale": 16.0, "gradient": "straight_through"}),
    "combined": ("CombinedMargin", {"scale": 16.0, "m1": 1.1, "m2": 0.2, "m3": 0.1}),
    "subcenter": ("SubCenterArcFace", {"scale": 16.0, "centers": 3}),
    "curricular": ("CurricularFace", {"scale": 16.0, "momentum": 0.3}),
    "adaface": ("AdaFace", {"scale": 16.0, "momentum": 0.4}),
    "magface": ("MagFace", {"scale": 16.0, **MAGFACE}),
    "elastic-arc": ("ElasticFace", {"scale": 16.0, "deviation": 0.2}),
    "elastic-arc+": ("ElasticFace", {"scale": 16.0, "deviation": 0.2, "plus": True}),
    "elastic-cos": ("ElasticFace", {"scale": 16.0, "kind": "cos"}),
    "adaptive": ("AdaptiveMargin", {"class_counts": COUNTS, "scale": 16.0}),
    "sphereface2": ("SphereFace2", {"scale": 10.0}),
}


def corrected(name: str, rate: float, classes: int = C, **options: Any) -> PartialFC:
    cls, arguments = LOSSES[name]
    if name == "adaptive":
        arguments = {**arguments, "class_counts": (COUNTS * 2)[:classes]}
    correction = "none" if rate == 1 else "importance"
    return PartialFC(
        D, classes, getattr(margins, cls)(**arguments), rate, sampling_correction=correction, dtype=torch.float64,
        init_std=1.0, **options,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- what it is for: the mean

CYCLE = 4  # windows of 6 among 24 classes
WORLDS = pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])


def fixed_batch(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's samples of one batch of 7, of fewer classes than a window has, some of them twice."""
    x = 2 * torch.randn(7, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 23, 11, -100, 12])
    return x[rank::world], labels[rank::world]


def means_over_a_cycle(rank: int, world: int, names: list[str]) -> None:
    """exp(loss) is the denominator over the target's exponential: its mean over a cycle is that of all classes."""
    x, labels = fixed_batch(rank, world)
    valid = labels >= 0
    for name, (budget, metrics) in itertools.product(names, ((None, False), (0, False), (None, True))):
        options = {"reduction": "none", "logits_budget": budget, "metrics": metrics}
        head, full = (corrected(name, rate, 24, **options) for rate in (0.25, 1.0))
        for each in (head, full):
            if name.startswith("elastic"):  # another forward draws other margins
                each.margin.deviation = 0.0
        buffers = {key: value.clone() for key, value in head.margin.named_buffers()}
        losses = []
        with torch.no_grad(), small_tiles():
            expected = full(x, labels)
            for _ in range(CYCLE):
                for key, value in head.margin.named_buffers():
                    value.copy_(buffers[key])
                losses.append(head(x, labels))
        mean = torch.stack(losses).logsumexp(0) - math.log(CYCLE)
        case = f"{name}, budget {budget}, metrics {metrics}, world {world}"
        assert_near(case, mean[valid], expected[valid])
        spread = torch.stack(losses).std(0)[valid]
        assert not len(spread) or spread.max() > 1e-3, f"{case}: windows that do not differ show nothing"


@WORLDS
def test_over_a_cycle_the_mean_denominator_is_that_of_all_classes(ranks, world):
    ranks(world).run(means_over_a_cycle, [name for name in LOSSES if name != "sphereface2"])


def decisions_over_a_cycle(rank: int, world: int) -> None:
    """A sum of decisions has no logarithm around it: loss and gradients themselves have the mean of all classes."""
    for budget, reduction in itertools.product((None, 0), ("mean", "sum")):
        found: dict[float, dict[str, Tensor]] = {}
        for rate, windows in ((1.0, 1), (0.25, CYCLE)):
            head = corrected("sphereface2", rate, 24, logits_budget=budget, reduction=reduction)
            optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.0)
            mean: dict[str, Tensor] = {}
            for _ in range(windows):
                x, labels = fixed_batch(rank, world)
                x.requires_grad_()
                with small_tiles():
                    loss = head(x, labels)
                    loss.backward()
                rows = torch.zeros(head.shards.local, D, dtype=torch.float64)
                rows[head.selected - head.shards.lo] = row_gradient(head)
                assert x.grad is not None
                of_window = {"loss": loss, "x": x.grad, "rows": rows, "offset": local(head.margin.offset.grad)}  # type: ignore[union-attr, arg-type]
                for name, value in of_window.items():
                    mean[name] = mean.get(name, torch.zeros_like(value)) + value.detach() / windows
                optimizer.zero_grad()
            found[rate] = mean
        for name, value in found[0.25].items():
            assert_near(f"{name}, budget {budget}, {reduction}, world {world}", value, found[1.0][name])


@WORLDS
def test_over_a_cycle_decisions_and_their_gradients_are_those_of_all_classes(ranks, world):
    ranks(world).run(decisions_over_a_cycle)


def test_the_offset_starts_where_all_classes_balance_it():
    offsets = [local(corrected("sphereface2", rate).margin.offset).item() for rate in (1.0, 0.25)]
    assert offsets[0] == offsets[1]


# ------------------------------------------------------------------------------------- beside a dense computation

IMPORTANCE = {"sample_rate": 0.3, "correction": "importance"}
GROUPS = {
    "all": [Case(*LOSSES[name], budget=budget, **IMPORTANCE) for name in LOSSES for budget in (None, 0)],
    "options": [
        Case(*LOSSES[name], budget=budget, smoothing=smoothing, beyond=beyond, class_weights=weights, steps=2, **IMPORTANCE)
        for name, budget, (smoothing, beyond, weights) in itertools.product(
            ("arcface", "subcenter", "curricular", "magface"),
            (None, 0),
            ((0.1, None, False), (0.0, 0.3, False), (0.2, 0.2, True), (0.2, None, True)),
        )
    ]
    + [Case("Softmax", smoothing=0.1, budget=budget, steps=2, **IMPORTANCE) for budget in (None, 0)],
    "shapes": [
        Case(*LOSSES[name], counts=counts, classes=classes, ignored=0, steps=2, **IMPORTANCE, **more)
        for name, (classes, counts), more in itertools.product(
            ("softmax", "arcface", "subcenter", "sphereface2"),
            ((23, (3, 0, 0)), (23, (1, 0, 9)), (2, (1, 1, 1)), (150, (4, 4, 4))),
            ({"reduction": "none"}, {"joint": True, "optimizer": "adamw", "budget": 0}),
        )
    ],
}  # fmt: skip


@WORLDS
@pytest.mark.parametrize("name", GROUPS)
def test_equals_dense_float64(ranks, world, name):
    ranks(world).run(check_cases, GROUPS[name])


def several_labels(rank: int, world: int) -> None:
    """Two labels a sample, some of them twice the same, ignored or without weight: all of their classes are taken."""
    for name, budget in itertools.product(("ArcFace", "SubCenterArcFace", "SphereFace2"), (None, 0)):
        margin = getattr(margins, name)(scale=10.0)
        head = PartialFC(D, C, margin, 0.3, dtype=torch.float64, init_std=1.0, logits_budget=budget,
                         sampling_correction="importance")  # fmt: skip
        counts = (3, 2, 4)[:world]
        generator = torch.Generator().manual_seed(1)
        x_all = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (sum(counts), 2), generator=generator)
        labels[0, 1] = labels[0, 0]
        labels[1, 1] = -100
        weights = torch.rand(sum(counts), 1, generator=generator, dtype=torch.float64)
        weights[2] = 1.0
        weights = torch.cat((weights, 1 - weights), 1)
        here = samples_of(counts, rank)
        case, reference = f"{name}, budget {budget}, world {world}", Loss(name, {"scale": 10.0})
        check_soft_labels(case, head, reference, x_all, labels, weights, here, corrected_at=0.3)


@WORLDS
def test_classes_of_all_labels_are_always_taken(ranks, world):
    ranks(world).run(several_labels)


def on_mesh(rank: int, world: int, mesh: bool) -> list[float]:
    """Losses and gradients of two steps of 8 samples, with shards over 4 ranks or 2 replicas of 2 shards."""
    numbers: list[float] = []
    for name in ("arcface", "subcenter", "sphereface2"):
        head = corrected(name, 0.3, group=two_by_two() if mesh else None)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.05)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, D, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, C, (8,), generator=generator)
            own = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
            loss = head(own, labels[2 * rank : 2 * rank + 2])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert own.grad is not None
            numbers += [loss.item(), *everyones(own.grad.norm().item())]
        numbers += [float(whole(head.weight).norm())]
    return numbers


def test_classes_of_all_replicas_are_always_taken(ranks):
    plain, replicated = ranks(4).run(on_mesh, False), ranks(4).run(on_mesh, True)
    assert all(numbers == pytest.approx(plain[0], rel=1e-9) for numbers in (*plain, *replicated))


# ------------------------------------------------------------------------------------------------ low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["softmax", "arcface", "subcenter", "curricular", "sphereface2"])
def test_under_autocast(name, dtype):
    """Logits of up to 16 in a dtype of 8 or 11 bits are off by up to 2⁻⁵, and so is the logarithm of their sum."""
    classes, n = 150, 12
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(n, D, generator=generator), torch.randint(0, classes, (n,), generator=generator)
    losses, grads = [], []
    for options in ({}, {"metrics": True}, {"logits_budget": 0}, {"exact": True}):
        exact = options.pop("exact", False)
        torch.manual_seed(0)
        cls, arguments = LOSSES[name]
        head = PartialFC(D, classes, getattr(margins, cls)(**arguments), 0.3, sampling_correction="importance",
                         init_std=1.0, **options)  # type: ignore[arg-type]  # fmt: skip
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=not exact), small_tiles():
            loss = head(own, labels)
        loss.backward()
        losses.append(loss.item())
        grads.append(own.grad)
    for loss, grad in zip(losses, grads, strict=True):
        assert loss == pytest.approx(losses[-1], rel=0.02)
        assert grad is not None and grads[-1] is not None
        assert float((grad - grads[-1]).norm() / grads[-1].norm()) < 0.05


def test_what_is_added_is_not_lost_in_half_precision():
    """A window of a tenth and logits near 64, which bfloat16 holds in steps of 1/4: ln 10 is added before its logit is
    rounded. Behind, it would become a multiple of 1/4, and all denominators 5 % smaller. What bfloat16 does to a loss
    that is not corrected is left out."""
    x, labels = torch.randn(64, D, generator=torch.Generator().manual_seed(0)), torch.arange(64)
    off: dict[tuple[str, bool], float] = {}
    for correction, metrics in itertools.product(("none", "importance"), (False, True)):
        head = PartialFC(D, 10_000, margins.NormFace(60.0), 0.1, sampling_correction=correction, metrics=metrics,
                         init_std=1.0)  # type: ignore[arg-type]  # fmt: skip
        with torch.no_grad():
            exact = head(x, labels)
            head.forward_count = 0
            with torch.autocast("cpu", torch.bfloat16):
                off[correction, metrics] = float(head(x, labels) - exact)
    assert off["importance", True] == pytest.approx(off["none", True], abs=0.001)  # multiplied behind the exponential
    assert off["importance", False] == pytest.approx(off["none", False], abs=0.02)  # ln 10 itself is in bfloat16


# -------------------------------------------------------------------------------------------- which row counts for what


def test_rows_of_the_batch_count_once_and_others_for_all_that_were_not_drawn():
    rows, always = torch.tensor([0, 2, 3, 9]), torch.tensor([[13, -1], [12, 99]])
    found = log_weights(rows, None, always, lo=10, share=0.25, dtype=torch.float64)
    assert found.exp().tolist() == pytest.approx([4.0, 1.0, 1.0, 4.0])
    assert found.dtype == torch.float64
    nothing = torch.empty(0, dtype=torch.int64)
    assert log_weights(nothing, None, always, 10, 0.25, torch.float32).shape == (0,)
    assert log_weights(rows, None, nothing, 10, 0.5, torch.float32).exp().tolist() == pytest.approx([2.0] * 4)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_rows_that_are_drawn_without_a_wait_count_the_same(rank, world):
    """Slots behind the window hold classes of the batch, which count once."""
    lo, hi = shard_bounds(C, rank, world)
    labels = torch.tensor([[11, 3], [9, 9], [-1, 22], [8, 14]])
    draws = Draws()
    draws.fit(C, 0.4, 0, lo, hi, torch.device("cpu"), 1)
    for step in range(5):
        rows, slots = draws.select(step, labels)
        assert (slots is not None) == draws.tabled, "a rank with all classes draws windows anew, and the host waits"
        if slots is None:
            continue
        real = slots.as_pads().real()
        found = log_weights(rows, slots, labels, lo, 9 / 23, torch.float64)[real]
        assert torch.equal(found, log_weights(rows[real].sort().values, None, labels, lo, 9 / 23, torch.float64)[
            rows[real].argsort().argsort()])  # fmt: skip
        window = draw_window(C, 0.4, seed=0, step=step, device=torch.device("cpu"))
        of_window = torch.isin(rows[real] + lo, window) & ~torch.isin(rows[real] + lo, labels)
        assert (found > 0).tolist() == of_window.tolist()
    assert window_size(C, 0.4) == 9


# ---------------------------------------------------------------------------------------------- beside other settings


@pytest.mark.parametrize("name", ["softmax", "arcface", "subcenter", "curricular", "sphereface2"])
def test_metrics_compare_what_is_not_corrected(name):
    found = []
    for correction in ("none", "importance"):
        cls, arguments = LOSSES[name]
        head = PartialFC(D, 24, getattr(margins, cls)(**arguments), 0.25, sampling_correction=correction, metrics=True,
                         init_std=1.0, dtype=torch.float64)  # type: ignore[arg-type]  # fmt: skip
        if head.margin.binary:
            torch.nn.init.zeros_(local(head.margin.offset.detach()))  # type: ignore[union-attr, operator]
        head(*fixed_batch(0, 1))
        found.append({name: value.item() for name, value in head.metrics.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_an_evaluation_takes_all_classes_and_corrects_nothing():
    x, labels = fixed_batch(0, 1)
    losses = [corrected("arcface", rate, 24).eval()(x, labels).item() for rate in (0.25, 1.0)]
    assert losses[0] == losses[1]


@torch.no_grad()
def test_it_may_change_between_steps():
    x, labels = fixed_batch(0, 1)
    head, fresh = PartialFC(D, 24, Softmax(), 0.25, dtype=torch.float64), corrected("softmax", 0.25, 24, seed=0)
    local(fresh.weight).copy_(local(head.weight))
    assert head.sampling_correction == "none"
    before = head(x, labels).item()
    head.forward_count = 0
    head.sampling_correction = "importance"
    assert head(x, labels).item() == pytest.approx(fresh(x, labels).item(), rel=1e-12)
    assert "sampling_correction=importance" in repr(head)
    head.forward_count = 0
    head.sampling_correction = "none"
    assert head(x, labels).item() == before


def differ(rank: int, world: int) -> list[str]:
    built = message_of(lambda: PartialFC(D, C, None, 0.5, sampling_correction="importance" if rank else "none"))
    head = PartialFC(D, C, None, 0.5)
    if rank:
        head.sampling_correction = "importance"
    return [built, message_of(lambda: head(torch.randn(2, D), torch.tensor([0, 1])))]


def test_ranks_that_differ_are_told(ranks):
    for texts in ranks(2).run(differ):
        assert all("sampling_correction is none on rank 0 and importance on rank 1" in text for text in texts)


@pytest.mark.parametrize("value", ["Importance", "", None, True, 1.0, ["none"]])
def test_what_is_no_correction_is_refused(value):
    words = "sampling_correction must be one of none, importance, not "
    with pytest.raises(ValueError, match=words):
        PartialFC(D, C, ArcFace(), 0.5, sampling_correction=value)
    head = PartialFC(D, C, ArcFace(), 0.5, sampling_correction="importance")
    with pytest.raises(ValueError, match=words):
        head.sampling_correction = value
    assert head.sampling_correction == "importance"


def test_without_sampling_there_is_nothing_to_correct():
    with pytest.raises(ValueError, match="nothing is to be corrected"):
        PartialFC(D, C, SphereFace2(), sampling_correction="importance")
    head = PartialFC(D, C)
    with pytest.raises(ValueError, match="nothing is to be corrected"):
        head.sampling_correction = "importance"
    assert head.sampling_correction == "none"
