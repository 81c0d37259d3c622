"""Margins: their formulas, exact and straight-through gradients, the continuation past π, their state."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from near import near
from torch import Tensor, nn

from partial_fc import (
    AdaFace,
    AdaptiveMargin,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace,
    SubCenterArcFace,
)
from partial_fc.margins.base import Positives

D = 5
ANGLES = torch.linspace(0.05, 3.09, 60, dtype=torch.float64)


@pytest.mark.parametrize(
    ("margin", "formula"),
    [
        (ArcFace(margin=0.5), lambda a: torch.cos(a + 0.5)),
        (CosFace(margin=0.35), lambda a: torch.cos(a) - 0.35),
        (NormFace(), torch.cos),
        (CombinedMargin(m1=1.0, m2=0.3, m3=0.2), lambda a: torch.cos(a + 0.3) - 0.2),
        (CombinedMargin(m1=1.5, m2=0.1, m3=0.2), lambda a: torch.cos(1.5 * a + 0.1) - 0.2),
    ],
)
def test_targets_follow_their_formula_up_to_pi(margin, formula):
    argument = getattr(margin, "m1", 1.0) * ANGLES + getattr(margin, "m2", 0.0)
    angles = ANGLES[argument < math.pi]
    torch.testing.assert_close(margin.target(torch.cos(angles)), formula(angles), rtol=0, atol=1e-9)


@pytest.mark.parametrize("margin", [ArcFace(), ArcFace(margin=1.5), CombinedMargin(m1=3.0, m2=0.4, m3=0.1), CosFace()])
def test_targets_fall_monotonically_with_the_angle(margin):
    angles = torch.linspace(0, math.pi, 20_000, dtype=torch.float64)
    steps = margin.target(torch.cos(angles)).diff()
    assert bool((steps <= 1e-9).all())
    assert float(steps.min()) > -5e-3  # and without a jump


@pytest.mark.parametrize(
    "margin", [ArcFace(), CosFace(), NormFace(), CombinedMargin(m1=1.4, m2=0.5, m3=0.1), Softmax()]
)
def test_gradcheck(margin):
    cosines = torch.cos(ANGLES[::4]).requires_grad_()
    assert torch.autograd.gradcheck(margin.target, (cosines,))


def test_the_gradient_of_arcface_is_sin_over_sin():
    cosine = torch.tensor(
        [math.cos(math.radians(60)), math.cos(math.radians(30))], dtype=torch.float64, requires_grad=True
    )
    (exact,) = torch.autograd.grad(ArcFace().target(cosine).sum(), cosine)
    assert exact.tolist() == pytest.approx([1.15, 1.70], abs=0.01)
    (through,) = torch.autograd.grad(ArcFace(gradient="straight_through").target(cosine).sum(), cosine)
    assert through.tolist() == [1.0, 1.0]
    assert torch.equal(ArcFace(gradient="straight_through").target(cosine), ArcFace().target(cosine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0000001, -1.0000001])
def test_the_ends_have_bounded_gradients(dtype, value):
    cosine = torch.tensor([value], dtype=dtype, requires_grad=True)
    target = ArcFace().target(cosine)
    (gradient,) = torch.autograd.grad(target.sum(), cosine)
    assert math.isfinite(target.item()) and math.isfinite(gradient.item())
    assert target.item() == pytest.approx(math.cos(0.5) if value > 0 else -2 - math.cos(math.pi + 0.5), abs=1e-3)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ArcFace(scale=0), "scale"),
        (lambda: ArcFace(scale=-4.0), "scale"),
        (lambda: ArcFace(margin=3.2), "margin"),
        (lambda: ArcFace(margin=-0.1), "margin"),
        (lambda: ArcFace(gradient="rough"), "gradient"),  # type: ignore[arg-type]
        (lambda: CosFace(margin=-0.1), "margin"),
        (lambda: CombinedMargin(m1=0.5), "m1"),
        (lambda: CombinedMargin(m2=math.nan), "m2"),
        (lambda: CombinedMargin(m3=-1.0), "m3"),
        (lambda: SphereFace(margin=0.9), "margin"),
        (lambda: SubCenterArcFace(centers=0), "centers"),
        (lambda: SubCenterArcFace(centers=1.5), "centers"),  # type: ignore[arg-type]
        (lambda: CurricularFace(momentum=0.0), "momentum"),
        (lambda: AdaFace(margin=1.6), "margin"),
        (lambda: AdaFace(h=0.0), "h, "),
        (lambda: AdaFace(momentum=1.5), "momentum"),
        (lambda: MagFace(l_a=20.0, u_a=10.0), "l_a and u_a"),
        (lambda: MagFace(l_m=0.9), "l_m and u_m"),
        (lambda: MagFace(penalty_weight=-1.0), "penalty_weight"),
        (lambda: ElasticFace(kind="sphere"), "kind"),  # type: ignore[arg-type]
        (lambda: ElasticFace(margin=3.2), "margin"),
        (lambda: ElasticFace(deviation=-1.0), "deviation"),
        (lambda: AdaptiveMargin([]), "class_counts"),
        (lambda: AdaptiveMargin([3, 4], largest=0.1, smallest=0.2), "smallest <= largest"),
        (lambda: AdaptiveMargin([3, 4], exponent=0.0), "exponent"),
        (lambda: PartialFC(4, 3, AdaptiveMargin([3, 4])), "class_counts must hold 3 numbers"),
        (lambda: PartialFC(4, 3, interclass_filter=1.5), "interclass_filter"),
        (lambda: PartialFC(4, 3, Softmax(), interclass_filter=0.5), "interclass_filter"),
        (lambda: PartialFC(4, 3, class_weights=torch.ones(4)), "class_weights"),
    ],
)
def test_bad_arguments_are_named_with_their_value(build, name):
    with pytest.raises(ValueError, match=rf"{name}.*not "):
        build()


@pytest.mark.parametrize(
    ("counts", "message"), [([3, -1], r"class_counts\[1\] is -1"), ([3.0, math.nan], r"class_counts\[1\] is nan")]
)
def test_bad_counts_are_named(counts, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveMargin(torch.tensor(counts))
    with pytest.raises(ValueError, match=message.replace("class_counts", "class_weights")):
        PartialFC(4, 2, class_weights=torch.tensor(counts))


WITH_STATE = {
    "arcface": lambda: ArcFace(scale=4.0),
    "sphereface": lambda: SphereFace(scale=4.0),
    "combined": lambda: CombinedMargin(4.0, 1.2, 0.3, 0.1),
    "subcenter": lambda: SubCenterArcFace(scale=4.0, centers=2),
    "curricular": lambda: CurricularFace(scale=4.0),
    "magface": lambda: MagFace(4.0, 1.0, 5.0, 0.45, 0.8, 2.0),
    "elastic": lambda: ElasticFace(scale=4.0),
    "adaptive": lambda: AdaptiveMargin([1, 2, 3, 4, 5, 60], scale=4.0),
}


@pytest.mark.parametrize("name", [*WITH_STATE, "filter", "smoothing"])
@pytest.mark.parametrize("budget", [0, None])
def test_gradcheck_of_a_whole_head(name, budget):
    """In eval(), where state and draws stand still. AdaFace's gradient leaves out the length, as its paper does: see
    test_losses.py."""
    options = {
        "filter": {"interclass_filter": 0.1},
        "smoothing": {"interclass_filter": 0.2, "label_smoothing": 0.2},
    }.get(name, {})
    margin = WITH_STATE.get(name, WITH_STATE["arcface"])()
    torch.manual_seed(0)
    head = PartialFC(4, 6, margin, dtype=torch.float64, init_std=1.0, logits_budget=budget, **options).eval()
    if name == "curricular":
        margin.t.fill_(0.4)
    labels = torch.tensor([0, 3, -100])

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, {"weight": w}, (x, labels))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, head.weight.detach().clone().requires_grad_()))


def test_margins_of_the_papers_are_the_defaults():
    margin = ElasticFace()
    assert (SphereFace().m1, ArcFace().m2, CosFace().m3, SubCenterArcFace().centers) == (1.35, 0.5, 0.35, 3)
    assert (margin.margin, margin.deviation, ElasticFace(kind="cos").margin) == (0.5, 0.0125, 0.35)
    assert (ElasticFace(plus=True).deviation, ElasticFace(kind="cos", plus=True).deviation) == (0.0175, 0.025)
    assert (AdaFace().margin, AdaFace().h, CurricularFace().m2) == (0.4, 0.333, 0.5)
    assert (MagFace().l_a, MagFace().u_a, MagFace().l_m, MagFace().u_m, MagFace().penalty_weight) == (
        10,
        110,
        0.45,
        0.8,
        35,
    )
    rare_to_frequent = AdaptiveMargin([16, 1, 0, 256]).margins.tolist()
    assert rare_to_frequent == pytest.approx([0.05 + 0.45 * (0.5 - 0.25) / 0.75, 0.5, 0.5, 0.05])
    assert AdaptiveMargin([7, 7]).margins.tolist() == [0.5, 0.5]


def drawn(margin: ElasticFace, step: int, n: int = 4000) -> torch.Tensor:
    cosine = torch.linspace(-0.9, 0.9, n, dtype=torch.float64)
    exists = torch.arange(n) % 5 > 0
    return margin._margins(cosine, Positives(torch.zeros(n), torch.arange(n), torch.ones(n), exists, step))


def test_elastic_margins_are_normal_and_new_in_every_step():
    margin = ElasticFace(deviation=0.1)
    first, second = drawn(margin, 1), drawn(margin, 2)
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)
    assert first.std().item() == pytest.approx(0.1, rel=0.05)
    assert ((first - 0.5).abs() < 0.1).double().mean().item() == pytest.approx(0.683, abs=0.03)
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 0.05
    assert torch.equal(first, drawn(margin, 1))
    assert bool((drawn(margin.eval(), 1) == 0.5).all())


def test_elastic_plus_gives_the_largest_margins_to_the_farthest():
    exists = torch.arange(4000) % 5 > 0
    plus, plain = drawn(ElasticFace(plus=True, deviation=0.1), 1), drawn(ElasticFace(deviation=0.1), 1)
    assert torch.equal(plus[exists].sort().values, plain[exists].sort().values)  # the same margins, given out otherwise
    assert bool((plus[exists].diff() <= 0).all())  # the cosines rise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", [*WITH_STATE, "adaface"])
def test_embeddings_on_and_opposite_their_class_have_finite_gradients(name, cosine, dtype):
    margin = AdaFace() if name == "adaface" else WITH_STATE[name]()
    head = PartialFC(4, 6, margin, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    center = head.weight.detach().view(6, -1, 4)[2, 0]
    across = torch.tensor([center[1], -center[0], 0.0, 0.0])
    x = (torch.stack((center * 7, across)) * (cosine if cosine else 1.0)).roll(0 if cosine else 1, 0).requires_grad_()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = head(x.to(dtype), torch.tensor([2, 2]))
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert x.grad is not None and bool(x.grad.isfinite().all())
        assert head.weight.grad is not None and bool(head.weight.grad.isfinite().all())
        optimizer.zero_grad()


def test_state_moves_in_training_only_and_not_by_what_is_not_finite():
    for margin, key in ((CurricularFace(momentum=0.5), "t"), (AdaFace(momentum=0.5), "mean")):
        head = PartialFC(4, 6, margin, init_std=1.0, on_nonfinite="log")
        x, labels = torch.randn(5, 4), torch.arange(5)
        start = getattr(margin, key).item()
        head.eval()(x, labels)
        assert getattr(margin, key).item() == start
        head.train()(x, labels)
        moved = getattr(margin, key).item()
        assert moved != start
        head(torch.full_like(x, torch.nan), labels)
        head(x[:0], labels[:0])
        assert getattr(margin, key).item() == moved
        saved = copy.deepcopy(head.state_dict())
        head.reset_parameters()
        assert getattr(margin, key).item() == start
        head.load_state_dict(saved)
        assert getattr(margin, key).item() == moved
        assert (
            getattr(head.to(torch.bfloat16).margin, key).dtype == torch.float64
        )  # half precision would swallow what a step adds


def test_a_rule_is_that_of_its_forward_when_logits_are_computed_again():
    """Two forwards, then their backwards: the first one's t has moved on by then."""
    grads = []
    for budget in (0, None):
        torch.manual_seed(0)
        head = PartialFC(
            4, 50, CurricularFace(scale=8.0, momentum=0.5), init_std=1.0, dtype=torch.float64, logits_budget=budget
        )
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        losses = [head(x * sign, torch.arange(6)) for sign in (1.0, -0.5)]
        sum(losses).backward()  # type: ignore[union-attr]
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("budget", [0, None])
def test_an_ignored_sample_to_which_every_class_is_too_near(budget, smoothing):
    head = PartialFC(
        4, 3, ArcFace(), init_std=1.0, interclass_filter=-0.99, label_smoothing=smoothing, logits_budget=budget
    )
    x = torch.ones(2, 4, requires_grad=True)
    loss = head(x, torch.tensor([1, -100]))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)  # no other class is left to the valid one either
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert head.weight.grad is not None and bool(head.weight.grad.isfinite().all())


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))


class Nested(Margin):
    """A rule by a running mean that a submodule holds."""

    def __init__(self, scale: float = 8.0) -> None:
        super().__init__(scale)
        self.held = Held()

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        if self.training:
            self.held.mean.add_(cosine.detach().mean().abs())
        return cosine - 0.1

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        return cosine * (1 + self.held.mean)


def test_statistics_of_a_submodule_stand_still_for_their_forward():
    """Logits that backward computes again are those of the forward, also if another forward was between."""
    gradients = []
    for between in (False, True):
        head = PartialFC(D, 9, Nested(), dtype=torch.float64, init_std=0.3, logits_budget=0)
        x, labels = torch.linspace(-1, 1, 4 * D, dtype=torch.float64).view(4, D).requires_grad_(), torch.arange(4)
        loss = head(x, labels)
        if between:
            head(x.detach() * 3 + 1, labels)
        loss.backward()
        gradients.append(x.grad)
    near(*gradients, 1e-12)
    assert PartialFC(D, 9, Nested()).half().margin.held.mean.dtype == torch.float64


class Adding(Margin):
    """Adds a penalty of this kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(8.0)
        self.kind = kind

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        return cosine

    def penalty(self, norm: Tensor) -> Tensor:
        return {"column": norm[:, None], "mean": norm.mean(), "constant": torch.full_like(norm.detach(), 2.0)}[
            self.kind
        ]


def test_a_penalty_is_a_number_for_each_sample():
    x, labels = torch.ones(4, D).requires_grad_(), torch.arange(4)
    for kind, shape in (("column", [4, 1]), ("mean", [])):
        with pytest.raises(ValueError, match=re.escape(f"must return a number for each sample, [4], not {shape}")):
            PartialFC(D, 9, Adding(kind))(x, labels)
    plain = PartialFC(D, 9, NormFace(8.0))(x, labels)
    near(PartialFC(D, 9, Adding("constant"))(x, labels), plain + 2.0, 1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*WITH_STATE, "adaface", "inter_topk"])
def test_the_default_dtype_changes_nothing(name, default):
    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        margin = WITH_STATE[name]() if name in WITH_STATE else AdaFace(4.0) if name == "adaface" else ArcFace(4.0)
        more = {"inter_topk": 2} if name == "inter_topk" else {}
        head = PartialFC(D, 6, margin, dtype=torch.float32, init_std=0.3, **more)  # type: ignore[arg-type]
        x = torch.linspace(-1, 1, 4 * D, dtype=torch.float32).view(4, D).requires_grad_()
        loss = head(x, torch.arange(4))
        loss.backward()
        return loss.detach(), x.grad  # type: ignore[return-value]

    expected = loss_and_gradient()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = loss_and_gradient()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
