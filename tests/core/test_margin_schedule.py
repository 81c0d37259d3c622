"""Margins that change while they are trained with: attributes, schedules, checkpoints, another margin in a head."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import any_message_of, message_of
from dense_losses import Loss
from near import assert_near
from shards import local, row_gradient, samples_of, whole
from side_by_side import small_tiles

from partial_fc import (
    AdaFace,
    AdaptiveMargin,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    MagFace,
    Margin,
    MarginSchedule,
    NormFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace,
    SphereFace2,
    SubCenterArcFace,
    check_margin,
    load_checkpoint,
    margins,
    save_checkpoint,
)

D, C = 5, 11
COUNTS = [1, 5, 90, 40, 3, 7, 2, 9, 4, 6, 8]
LENGTHS = {"l_a": 1.0, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8}

# (class, arguments at the start, the arguments that move, each with its values in three steps)
MOVING: list[tuple[str, dict[str, Any], dict[str, list[Any]]]] = [
    ("ArcFace", {"scale": 16.0}, {"margin": [0.0, 0.2, 0.5]}),
    ("ArcFace", {"scale": 16.0}, {"scale": [8.0, 800.0, 16.0], "gradient": ["exact", "straight_through", "exact"]}),
    ("CosFace", {"scale": 16.0}, {"margin": [0.0, 0.1, 0.35], "scale": [4.0, 16.0, 32.0]}),
    ("SphereFace", {"scale": 16.0}, {"margin": [1.0, 1.2, 1.35]}),
    ("CombinedMargin", {"scale": 16.0}, {"m1": [1.0, 1.1, 1.3], "m2": [0.0, 0.2, 0.4], "m3": [0.0, 0.05, 0.1]}),
    ("NormFace", {}, {"scale": [4.0, 8.0, 16.0]}),
    ("SubCenterArcFace", {"scale": 16.0, "centers": 2}, {"margin": [0.1, 0.2, 0.3]}),
    ("CurricularFace", {"scale": 16.0, "momentum": 0.3}, {"margin": [0.1, 0.3, 0.5], "momentum": [0.3, 0.5, 0.2]}),
    ("AdaFace", {"scale": 16.0, "momentum": 0.4}, {"margin": [0.1, 0.2, 0.4], "h": [0.3, 0.5, 0.333]}),
    ("MagFace", {"scale": 16.0, **LENGTHS, "penalty_weight": 2.0}, {"l_m": [0.1, 0.2, 0.45]}),
    ("MagFace", {"scale": 16.0, **LENGTHS}, {"penalty_weight": [0.0, 1.0, 3.0]}),
    ("ElasticFace", {"scale": 16.0, "deviation": 0.0}, {"margin": [0.1, 0.2, 0.5]}),
    ("AdaptiveMargin", {"scale": 16.0, "class_counts": COUNTS}, {"largest": [0.1, 0.3, 0.5], "exponent": [1.0, 0.5, 0.25]}),
    ("SphereFace2", {"scale": 10.0}, {"margin": [0.1, 0.2, 0.4], "scale": [10.0, 20.0, 5.0], "balance": [0.7, 0.6, 0.5]}),
]  # fmt: skip


def batch(step: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, C, (n,), generator=generator)
    labels[0] = -100
    return x, labels


def expected_of(
    name: str, settings: dict[str, Any], state: dict[str, float], head: PartialFC, step: int, n: int
) -> Any:
    """(loss, gradient of all embeddings, of all rows) of the dense reference."""
    x, labels = batch(step, n)
    x.requires_grad_()
    w = whole(head.weight).clone().requires_grad_()
    drawn = torch.full((n,), settings["margin"], dtype=torch.float32).double() if name == "ElasticFace" else None
    offset = whole(head.margin.offset) if head.margin.binary else None
    loss = Loss(name, settings, state=state)(x, w, labels, drawn=drawn, offset=offset)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def moving(rank: int, world: int) -> None:
    counts = (3, 0, 4) if world == 3 else (4, 3)[:world] if world == 2 else (7,)
    here, n = samples_of(counts, rank), sum(counts)
    for number, (name, settings, moves) in enumerate(MOVING):
        head = PartialFC(D, C, getattr(margins, name)(**settings), dtype=torch.float64, init_std=1.0,
                         logits_budget=0 if number % 2 else None)  # fmt: skip
        settings, state = dict(settings), {"t": 0.0, "mean": 20.0, "std": 100.0}
        for step in range(3):
            for argument, values in moves.items():
                setattr(head.margin, argument, values[step])
                settings[argument] = values[step]
                assert getattr(head.margin, argument) == values[step]
            loss_, on_x, on_w = expected_of(name, settings, state, head, step, n)
            x, labels = batch(step, n)
            x = x[here].clone().requires_grad_()
            with small_tiles():
                loss = head(x, labels[here])
                loss.backward()
            case = f"{name} {moves}, step {step}, world {world}"
            assert_near(f"{case}: loss", loss, loss_)
            assert_near(f"{case}: embeddings", x.grad, on_x[here] * world)
            assert_near(f"{case}: rows", row_gradient(head), on_w[head.selected])
            head.zero_grad()
        fresh = getattr(margins, name)(**settings)
        fresh.prepare(C, C)
        assert fresh.describe() == head.margin.describe()
        for margin in (fresh, head.margin):
            margin.reset()  # the start, too, is that of a margin that was built so
        for a, b in zip((*fresh.buffers(), *fresh.parameters()), (*head.margin.buffers(), *head.margin.parameters()), strict=True):  # fmt: skip
            assert_near(f"{name}: the start", local(b), a.to(torch.float64), 1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_changed_argument_has_the_effect_of_a_margin_built_so(ranks, world):
    ranks(world).run(moving)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize(
    ("build", "moves"),
    [
        (lambda: ArcFace(scale=8.0), {"scale": 700.0, "margin": 0.1}),
        (lambda: ArcFace(scale=700.0), {"scale": 8.0}),
        (lambda: SubCenterArcFace(scale=8.0, centers=2), {"scale": 20.0}),
        (lambda: CurricularFace(scale=8.0), {"scale": 20.0, "margin": 0.1}),
        (lambda: SphereFace2(scale=8.0), {"scale": 20.0, "balance": 0.2, "margin": 0.1, "t": 2.0}),
        (lambda: MagFace(8.0, 1.0, 5.0), {"scale": 20.0, "l_m": 0.1, "penalty_weight": 1.0}),
    ],
)
def test_a_backward_uses_the_margin_of_its_forward(build, moves, budget, smoothing):
    """Two micro-batches in flight: the margin changes, or is replaced, between a forward and its backward."""
    if smoothing and build().binary:
        pytest.skip("binary decisions have no label smoothing")
    grads = []
    for change in ("not", "in place", "another"):
        head = PartialFC(D, C, build(), dtype=torch.float64, init_std=1.0, logits_budget=budget,
                         label_smoothing=smoothing, metrics=True)  # fmt: skip
        x, labels = batch(1, 6)
        x.requires_grad_()
        loss = head(x, labels)
        before = head.metrics
        if change == "in place":
            for name, value in moves.items():
                setattr(head.margin, name, value)
        elif change == "another":
            head.margin = type(head.margin)(**({"centers": 2} if head.margin.centers == 2 else {}), **moves)
        after = head.metrics
        loss.backward()
        offset = head.margin.offset.grad if head.margin.binary else torch.zeros(1)
        grads.append((loss.detach(), x.grad, local(head.weight.grad), local(offset), torch.stack(list(after.values()))))
        assert torch.equal(torch.stack(list(before.values())), torch.stack(list(after.values())))
    for each in grads[1:]:
        for mine, expected in zip(each, grads[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)


ALL: dict[str, Callable[[], Margin]] = {
    name: functools.partial(getattr(margins, name), **({"class_counts": COUNTS} if name == "AdaptiveMargin" else {}))
    for name in margins.__all__
    if name not in ("Margin", "Positives")
}  # fmt: skip
OTHER = {"gradient": "straight_through", "kind": "cos", "past_pi": "plain", "easy_margin": True, "class_counts": COUNTS[::-1], "plus": True, "m1": 1.25,
         "t": 2.0, "u_a": 90.0, "l_a": 12.0, "u_m": 0.75, "penalty_weight": 3.0, "h": 0.25, "exponent": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_argument_of_every_margin_is_an_attribute(name):
    """It can be read, set, copied, sent and described; setting it is building with it. What cannot change says so."""
    cls = getattr(margins, name)
    for argument, parameter in inspect.signature(cls).parameters.items():
        head = PartialFC(D, C, ALL[name]())
        margin = head.margin
        built = margin.describe()
        if parameter.default is not inspect.Parameter.empty and parameter.default is not None:
            assert getattr(margin, argument) == parameter.default, argument
        value = OTHER.get(argument, 1.05 if name == "SphereFace" else 0.25 if argument != "scale" else 20.0)
        value = "arc" if (name, argument) == ("SphereFace2", "kind") else value
        if argument in ("centers", "bias", "normalize_embeddings"):
            value = 5 if argument == "centers" else False
            message = message_of(setattr, margin, argument, value)
            assert f"{name} cannot be changed to {argument}={value} once it is built" in message
            assert "another head" in message and margin.describe() == built
            setattr(margin, argument, getattr(margin, argument))
            continue
        copies = [copy.deepcopy(margin), pickle.loads(pickle.dumps(margin)), copy.copy(margin), margin.frozen()]
        setattr(margin, argument, value)
        assert getattr(margin, argument) == value or argument == "class_counts"
        extra = {"class_counts": COUNTS} if name == "AdaptiveMargin" else {}
        assert margin.describe() == cls(**{**extra, argument: value}).describe(), argument
        assert margin.describe() != built or argument == "class_counts"
        for each in copies:  # they are margins of their own
            assert each.describe() == built
            setattr(each, argument, value)
            assert each.describe() == margin.describe()
        changed = (copy.deepcopy(margin), pickle.loads(pickle.dumps(margin)))
        for each in changed:
            assert each.describe() == margin.describe()
            assert not isinstance(getattr(each, argument), float) or getattr(each, argument) == value


@pytest.mark.parametrize(
    ("build", "name", "value", "message"),
    [
        (ArcFace, "margin", 3.2, r"ValueError: margin is an angle in radians in \[0, pi\), not 3.2"),
        (ArcFace, "margin", math.nan, "ValueError: margin is an angle"),
        (ArcFace, "margin", True, "ValueError: margin must be a number, not True"),
        (ArcFace, "margin", "0.5", "ValueError: margin must be a number, not '0.5'"),
        (ArcFace, "margin", None, "ValueError: margin must be a number, not None"),
        (ArcFace, "scale", 0, "ValueError: scale must be a positive number, not 0.0"),
        (ArcFace, "gradient", "rough", "ValueError: gradient must be"),
        (CosFace, "margin", -0.1, "ValueError: margin is taken"),
        (MagFace, "l_m", 0.9, "ValueError: l_m and u_m"),
        (lambda: AdaptiveMargin(COUNTS), "smallest", 0.6, "ValueError: 0 <= smallest"),
        (lambda: AdaptiveMargin(COUNTS), "class_counts", [1, 2], "ValueError: class_counts must hold 11 numbers"),
        (AdaFace, "momentum", 1.5, "ValueError: momentum"),
        (SphereFace2, "balance", 1.0, "ValueError: balance"),
        # what would have no effect
        (ArcFace, "m", 0.3, "AttributeError: m of ArcFace cannot be set to 0.3: .* arguments are scale, margin, gradient"),
        (ArcFace, "s", 32, "AttributeError: s of ArcFace"),
        (ArcFace, "m1", 1.2, "AttributeError: m1 of ArcFace"),
        (NormFace, "margin", 0.2, "AttributeError: margin of NormFace .* arguments are scale"),
        (SphereFace, "gradient", "straight_through", "AttributeError: gradient of SphereFace"),
        (Softmax, "scale", 2.0, "AttributeError: scale of Softmax"),
        (SphereFace2, "binary", (0.5, 0.5), "AttributeError: binary of SphereFace2"),
        (ArcFace, "centers", 3, "AttributeError: centers of ArcFace"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_is_refused_and_nothing_changes(build, name, value, message):
    head = PartialFC(D, C, build())
    before, state = head.margin.describe(), head.get_extra_state()
    with pytest.raises((ValueError, AttributeError)) as error:
        setattr(head.margin, name, value)
    assert re.match(message, f"{type(error.value).__name__}: {error.value}")
    assert head.margin.describe() == before and head.get_extra_state() == state


def test_other_names_of_the_margin_and_a_statistic_that_is_held():
    arc, cos, sphere = ArcFace(), CosFace(), SphereFace()
    arc.m2, cos.m3, sphere.m1 = 0.1, 0.2, 1.1
    assert (arc.margin, cos.margin, sphere.margin) == (0.1, 0.2, 1.1)
    head = PartialFC(D, C, CurricularFace(momentum=0.5), init_std=1.0)
    head.margin.momentum = 0  # the constructor does not take it
    head(torch.randn(4, D), torch.arange(4))
    assert head.margin.t.item() == 0.0
    head.margin.momentum = 0.5
    head(torch.randn(4, D), torch.arange(4))
    assert head.margin.t.item() != 0.0
    kept = head.margin.t.item()
    head.margin.margin = 0.1
    assert head.margin.t.item() == kept  # a running statistic stays


class Own(Margin):
    """A margin as a user writes it: a value in another form, a counter, a table that is not saved."""

    def __init__(self, degrees: float = 20.0, shift=0.1, *, scale: float = 16.0, **more: Any) -> None:  # type: ignore[no-untyped-def]
        super().__init__(scale, **more)
        if not 0 <= degrees <= 90:
            raise ValueError(f"degrees must be in [0, 90], not {degrees}")
        self.radians = math.radians(degrees)
        self.shift = shift
        self.calls = 0
        self.register_buffer("table", torch.tensor([float(degrees)]), persistent=False)

    def target(self, cosine, positives):  # type: ignore[no-untyped-def]
        self.calls += 1
        return cosine - self.radians - self.shift


class Passing(Own):
    """Passes everything on, as mixins do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Fixing(ArcFace):
    """Fixes what the class above takes."""

    def __init__(self, extra: float = 1.0, **options: Any) -> None:
        super().__init__(margin=0.3, **options)
        self.extra = extra


class Described(Margin):
    """Has a property for an argument, which decides itself what setting it means."""

    def __init__(self, m: float = 0.1) -> None:
        super().__init__(16.0)
        self.doubled = 2 * m

    @property
    def m(self) -> float:
        return self.doubled / 2

    @m.setter
    def m(self, value: float) -> None:
        self.doubled = 2 * value

    def target(self, cosine, positives):  # type: ignore[no-untyped-def]
        return cosine - self.doubled


class Warming(Margin):
    """Moves an argument of its own in its target."""

    def __init__(self, m: float = 0.0) -> None:
        super().__init__(16.0)
        self.m = m

    def target(self, cosine, positives):  # type: ignore[no-untyped-def]
        if self.training:
            self.m = min(self.m + 0.1, 0.25)
        return cosine - self.m


def test_a_margin_of_ones_own_changes_as_the_others_do():
    for margin in (Own(), Passing(20.0, 0.1), Passing(degrees=20.0)):
        head = PartialFC(D, C, margin, dtype=torch.float64, init_std=1.0)
        x, labels = batch(1, 5)
        head(x, labels)
        margin.degrees = 30.0
        assert (margin.degrees, margin.radians, margin.table.item()) == (30.0, math.radians(30.0), 30.0)
        margin.scale = 8
        assert (margin.scale, margin.calls, margin.degrees) == (8.0, 1, 30.0)  # what it has counted stays
        assert torch.equal(head(x, labels), _loss_of(Own(30.0, scale=8.0), head, x, labels))
        with pytest.raises(ValueError, match=r"degrees must be in \[0, 90\], not 100"):
            margin.degrees = 100.0
        assert margin.degrees == 30.0
    fixing = Fixing(scale=8.0)
    fixing.scale = 4.0
    assert (fixing.scale, fixing.margin, fixing.extra) == (4.0, 0.3, 1.0)
    with pytest.raises(ValueError, match="Fixing cannot be built with extra=1.0, scale=4.0, margin=0.4"):  # noqa: RUF043
        fixing.margin = 0.4
    described = PartialFC(D, C, Described())
    described.margin.m = 0.2
    other = PartialFC(D, C, Described())
    other.load_state_dict(described.state_dict())
    assert other.margin.doubled == described.margin.doubled == 0.4
    warming = Warming()
    head = PartialFC(D, C, warming)
    for expected in (0.1, 0.2, 0.25, 0.25):
        head(torch.randn(3, D), torch.arange(3))
        assert warming.m == pytest.approx(expected)
    other = PartialFC(D, C, Warming())
    other.load_state_dict(head.state_dict())
    assert other.margin.m == warming.m


def _loss_of(margin: Margin, like: PartialFC, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    head = PartialFC(D, C, margin, dtype=torch.float64, init_std=1.0)
    head.weight.data.copy_(like.weight.data)
    return head(x, labels)


# ---------------------------------------------------------------------------------------------------- schedules


def test_the_shapes_of_a_schedule():
    margin = ArcFace()
    linear = MarginSchedule(margin, start=0.0, end=0.2, begin_step=2, end_step=6)
    assert margin.margin == 0.0
    values = []
    for _ in range(8):
        values.append(margin.margin)
        linear.step()
    assert values == pytest.approx([0.0, 0.0, 0.0, 0.05, 0.1, 0.15, 0.2, 0.2]) and margin.margin == linear.value == 0.2
    # WeSpeaker's: ratio = 1 - exp(u · ln(1e-3 / (1 + 1e-6))), and the end itself from end_step on
    exponential = MarginSchedule(margin, start=0.1, end=0.5, begin_step=1, end_step=5, shape="exponential")
    ratios = [1 - math.exp((t - 1) / 4 * math.log(1e-3 / (1.0 + 1e-6))) for t in (1, 2, 3, 4)]
    expected = [0.1, *(0.1 + 0.4 * r for r in ratios), 0.5, 0.5]
    assert [exponential.value_after(t) for t in range(7)] == pytest.approx(expected, abs=1e-12)
    assert exponential.value_after(5) == 0.5
    steps = MarginSchedule(margin, start=0.6, end=0.0, shape="step", milestones=[2, 3, 1e1], argument="margin")
    assert [steps.value_after(t) for t in (0, 1, 2, 3, 9, 10)] == pytest.approx([0.6, 0.6, 0.4, 0.2, 0.2, 0.0])
    both = MarginSchedule(margin, start=8, end=64, end_step=1e1, argument="scale")
    assert margin.scale == 8.0 and both.end_step == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"end": 3.5, "end_step": 3}, "margin is an angle"),
        ({"start": -1, "end_step": 3}, "margin is an angle"),
        ({"end_step": 0}, "needs an end_step above begin_step"),
        ({"begin_step": 3, "end_step": 3}, "needs an end_step above begin_step"),
        ({}, "needs an end_step"),
        ({"end_step": 2.5}, "end_step must be a whole number, not 2.5"),
        ({"begin_step": -1, "end_step": 2}, "begin_step must be at least 0"),
        ({"end_step": 3, "milestones": [1]}, "milestones are for"),
        ({"shape": "step"}, "needs milestones"),
        ({"shape": "step", "milestones": [2, 2]}, "ascending"),
        ({"shape": "step", "milestones": [2], "end_step": 2}, "for the other shapes"),
        ({"shape": "cosine", "end_step": 2}, "shape must be one of"),
        ({"argument": "m", "end_step": 2}, "ArcFace has no argument m; its arguments are scale, margin, gradient"),
        ({"argument": "gradient", "end_step": 2}, "gradient must be"),
        ({"start": True, "end_step": 2}, "start must be a number, not True"),
        ({"end": None, "end_step": 2}, "end must be a number, not None"),
    ],
)
def test_what_no_schedule_can_be(options, words):
    head = PartialFC(D, C)
    with pytest.raises(ValueError, match=words):
        MarginSchedule(head, **{"start": 0.0, "end": 0.2, **options})
    assert head.margin.margin == 0.5
    assert "takes a PartialFC or a margin, not Linear" in any_message_of(
        MarginSchedule, torch.nn.Linear(1, 1), start=0, end=1
    )
    centers = message_of(MarginSchedule, SubCenterArcFace(), start=3, end=5, end_step=2, argument="centers")
    assert "cannot be changed to centers=5" in centers


SCHEDULES: dict[str, tuple[Callable[[], Margin], dict[str, Any]]] = {
    "arc": (lambda: ArcFace(scale=16.0, margin=0.5), {"start": 0.0, "end": 0.5, "end_step": 5}),
    "curricular": (
        lambda: CurricularFace(16.0, 0.4, 0.3),
        {"start": 0.0, "end": 0.4, "end_step": 6, "shape": "exponential"},
    ),
    "cos scale": (lambda: CosFace(32.0), {"start": 4.0, "end": 32.0, "end_step": 5, "argument": "scale"}),
    "adaptive": (
        lambda: AdaptiveMargin(COUNTS, 16.0),
        {"start": 0.1, "end": 0.5, "shape": "step", "milestones": [2, 3, 5], "argument": "largest"},
    ),
    "sphereface2": (lambda: SphereFace2(10.0), {"start": 0.0, "end": 0.4, "end_step": 4}),
    "own": (Own, {"start": 0.0, "end": 20.0, "end_step": 4, "argument": "degrees"}),
}


def train(head: PartialFC, optimizer: RowOptimizer, schedule: Any, steps: range, rank: int, world: int) -> list[float]:
    found = []
    for step in steps:
        x, labels = batch(step, 6)
        here = slice(6 * rank // world, 6 * (rank + 1) // world)
        loss = head(x[here].clone().requires_grad_(), labels[here])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.item())
    return found


def parts(name: str, rate: float) -> tuple[PartialFC, RowOptimizer, MarginSchedule]:
    build, options = SCHEDULES[name]
    head = PartialFC(D, C, build(), rate, dtype=torch.float64, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    return head, optimizer, MarginSchedule(head, **options)


def until_the_middle(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    """Six steps without a stop; a checkpoint is written after the third."""
    found = {}
    for name in SCHEDULES:
        head, optimizer, schedule = parts(name, 0.5)
        losses = train(head, optimizer, schedule, range(3), rank, world)
        save_checkpoint(f"{folder}/{name}", head=head, optimizer=optimizer, schedule=schedule)
        found[name] = losses + train(head, optimizer, schedule, range(3, 7), rank, world)
    return found


def from_the_middle(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    found = {}
    for name, (build, options) in SCHEDULES.items():
        head, optimizer, schedule = parts(name, 0.5)
        load_checkpoint(f"{folder}/{name}", head=head, optimizer=optimizer, schedule=schedule)
        value = getattr(head.margin, schedule.argument)
        alone = PartialFC(D, C, build(), 0.5, dtype=torch.float64)  # without a schedule object
        load_checkpoint(f"{folder}/{name}", head=alone)
        assert getattr(alone.margin, schedule.argument) == value == schedule.value != options["start"]
        assert alone.margin.describe() == head.margin.describe()
        x, labels = batch(3, 6)
        assert torch.equal(alone.eval()(x, labels), head.eval()(x, labels))
        head.train()
        found[name] = train(head, optimizer, schedule, range(3, 7), rank, world)
    return found


@pytest.mark.parametrize(("saved", "loaded"), [(2, 3), (1, 2)])
def test_a_run_resumes_in_the_middle_of_a_schedule_at_any_world_size(ranks, tmp_path, saved, loaded):
    whole_runs = ranks(saved).run(until_the_middle, str(tmp_path))
    resumed = ranks(loaded).run(from_the_middle, str(tmp_path))
    for found in resumed:
        for name, losses in found.items():
            assert losses == pytest.approx(whole_runs[0][name][3:], rel=1e-9, abs=1e-12), name


def test_what_a_head_stores_of_its_margin():
    head, other = PartialFC(D, C, ArcFace(margin=0.0)), PartialFC(D, C, ArcFace(margin=0.0))
    start = copy.deepcopy(head.state_dict())
    old = {"step": 0, "class_changes": 0, "margin": head.margin.describe(), "skips": 0}  # of earlier versions
    head.margin.margin = 0.3
    state = copy.deepcopy(head.state_dict())
    other.load_state_dict(state)
    assert other.margin.margin == 0.3 and other.get_extra_state() == head.get_extra_state()
    other.load_state_dict(start)  # and back
    assert other.margin.margin == 0.0 and other.get_extra_state() == start["_extra_state"]
    finished = PartialFC(D, C, ArcFace(margin=0.3))  # it became this margin, which is what another head was built with
    finished.load_state_dict(state)
    assert finished.margin.margin == 0.3
    other.margin.margin = 0.2
    other.load_state_dict({**start, "_extra_state": old})
    assert other.margin.margin == 0.0 and {**other.get_extra_state(), **old} == other.get_extra_state()
    before = copy.deepcopy(head.state_dict())
    for wrong, words in (
        (PartialFC(D, C, ArcFace(margin=0.1)).state_dict(), "it is of a head with ArcFace(scale=64.0, m1=1.0, m2=0.1"),
        (PartialFC(D, C, CosFace()).state_dict(), "it is of a head with CosFace("),
        ({**start, "_extra_state": {**old, "margin": 3}}, "is not a description"),
        ({**start, "_extra_state": {**old, "margin_now": 3}}, "is not a description"),
        ({**start, "_extra_state": {**old, "margin_now": {"arguments": {"margin": 9.0}}}}, "cannot be built"),
        ({**start, "_extra_state": {**old, "margin_now": {"arguments": {"eval": 9.0}}}}, "has no argument eval"),
    ):
        assert words in message_of(head.load_state_dict, wrong)
        assert str(before["_extra_state"]) == str(head.get_extra_state())


# ---------------------------------------------------------------------------------------------------- another margin


def replaced(rank: int, world: int) -> list[str]:
    """`head.margin = another` after construction: prepared, with the trained offset; or refused with nothing changed."""
    x, labels = batch(1, 6)
    here = slice(6 * rank // world, 6 * (rank + 1) // world)
    for before, after, name, settings in (
        (ArcFace(), CosFace(16.0), "CosFace", {"scale": 16.0}),
        (CosFace(), CurricularFace(16.0), "CurricularFace", {"scale": 16.0}),
        (ArcFace(), AdaptiveMargin(COUNTS, 16.0), "AdaptiveMargin", {"scale": 16.0, "class_counts": COUNTS}),
        (SphereFace2(), SphereFace2(10.0, 0.1), "SphereFace2", {"scale": 10.0, "margin": 0.1}),
    ):
        head = PartialFC(D, C, before, dtype=torch.float64, init_std=1.0)
        offset = dict(head.named_parameters()).get("margin.offset")
        head.eval()
        head.margin = after
        assert (
            head.margin is after and not after.training and dict(head.named_parameters()).get("margin.offset") is offset
        )
        head.train()
        expected, _, on_w = expected_of(name, settings, {"t": 0.0, "mean": 20.0, "std": 100.0}, head, 1, 6)
        loss = head(x[here].clone().requires_grad_(), labels[here])
        loss.backward()
        assert_near(f"{name}: loss", loss, expected)
        assert_near(f"{name}: rows", row_gradient(head), on_w[head.selected])
    texts = []
    head = PartialFC(D, C, ArcFace(), label_smoothing=0.1)
    for margin in (SubCenterArcFace(), Softmax(), SphereFace2(), AdaptiveMargin([1, 2]), "ArcFace"):
        mine = head.margin
        texts.append(any_message_of(setattr, head, "margin", margin))
        assert head.margin is mine
    texts.append(message_of(setattr, PartialFC(D, C, Softmax()), "margin", Softmax(bias=False)))
    return texts


@pytest.mark.parametrize("world", [1, 2])
def test_another_margin_in_a_head_that_is_built(ranks, world):
    found = ranks(world).run(replaced)
    assert all(texts == found[0] for texts in found)
    words = ("built for centers=1, and SubCenterArcFace has centers=3: build another head", "built for normalize=True",
             "label_smoothing must be 0 with SphereFace2", "class_counts must hold 11 numbers",
             "margin must be an instance such as ArcFace(scale=64.0)", "built for bias=True")  # fmt: skip
    for text, word in zip(found[0], words, strict=True):
        assert word in text


def test_a_schedule_follows_the_margin_that_its_head_has():
    head = PartialFC(D, C, ArcFace())
    schedule = MarginSchedule(head, start=0.0, end=0.4, end_step=4)
    head.margin = CosFace()
    schedule.step()
    assert head.margin.margin == pytest.approx(0.1)
    loaded = MarginSchedule(head, start=0.0, end=0.4, end_step=4)
    loaded.load_state_dict({"steps": 3})
    assert head.margin.margin == pytest.approx(0.3)
    assert "number of steps" in message_of(loaded.load_state_dict, {"steps": 2.5})


def test_check_margin_takes_one_that_has_changed():
    margin = CombinedMargin(scale=16.0)
    margin.m1 = 1.3
    check_margin(margin, worlds=(1,))


def test_expand_keeps_a_margin_as_it_is_now():
    head = PartialFC(D, C, CurricularFace(16.0, 0.5))
    schedule = MarginSchedule(head, start=0.1, end=0.5, end_step=4)
    schedule.step()
    head.expand(2)
    assert head.margin.margin == pytest.approx(0.2)
    other = PartialFC(D, C + 2, CurricularFace(16.0, 0.5))
    other.load_state_dict(head.state_dict())
    assert other.margin.margin == pytest.approx(0.2)
    adaptive = PartialFC(D, C, AdaptiveMargin(COUNTS))
    with torch.inference_mode():  # as in an evaluation between steps
        adaptive.margin.largest = 0.45
    adaptive(torch.randn(2, D, requires_grad=True), torch.tensor([1, 2])).backward()
    adaptive.zero_grad()
    moved = MarginSchedule(adaptive, start=0.1, end=0.5, end_step=4, argument="largest")
    adaptive.expand(1, margin=AdaptiveMargin([*COUNTS, 2]))
    moved.step()
    assert adaptive.margin.margins.max().item() == pytest.approx(0.2) and len(adaptive.margin.margins) == C + 1
