"""Forms of losses that other trainers have, at every world size against one dense float64 process: past π, easy margin,
SphereFace with lengths kept, normalised classes alone, SphereFace2 in angles, the inter-top-k penalty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_losses import Loss, in_form
from near import assert_near
from shards import samples_of
from side_by_side import Case, D, check_cases, check_soft_labels

from partial_fc import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
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
    margins,
)

C = 23
A_SOFTMAX = {"scale": 1.0, "margin": 4.0, "normalize_embeddings": False, "annealing": 5.0}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("ArcFace", {"scale": 16.0, "margin": 2.5, "past_pi": "plain"}),
    "sine": ("ArcFace", {"scale": 16.0, "margin": 2.5, "past_pi": "sine"}),
    "joined": ("ArcFace", {"scale": 16.0, "margin": 2.5, "past_pi": "joined"}),
    "easy": ("ArcFace", {"scale": 16.0, "margin": 0.9, "easy_margin": True}),
    "combined": ("CombinedMargin", {"scale": 16.0, "m1": 1.35, "m2": 0.4, "m3": 0.1, "past_pi": "plain"}),
    "easy subcenter": ("SubCenterArcFace", {"scale": 16.0, "centers": 2, "easy_margin": True, "past_pi": "joined"}),
    "a-softmax": ("SphereFace", A_SOFTMAX),
    "annealed": ("SphereFace", {"scale": 16.0, "margin": 3.0, "annealing": 2.0}),
    "normalized softmax": ("NormFace", {"scale": 5.0, "normalize_embeddings": False}),
    "sphereface2-a": ("SphereFace2", {"scale": 10.0, "margin": 0.7, "kind": "arc"}),
}
NEAREST = {"nearest": 3, "penalty": 0.2}

EVERY = [
    Case(*FORMS[name], sample_rate=rate, budget=budget)
    for name, (rate, budget) in itertools.product(FORMS, ((1.0, None), (0.4, 0)))
]
OPTIONS = [
    Case(*FORMS["a-softmax"], sample_rate=0.4, smoothing=0.1, class_weights=True),
    Case(*FORMS["a-softmax"], budget=0, early=True, optimizer="adamw"),
    Case(*FORMS["a-softmax"], sample_rate=0.4, correction="importance", reduction="none"),
    Case(*FORMS["a-softmax"], counts=(3, 0, 0, 0)),
    Case(*FORMS["normalized softmax"], budget=0, smoothing=0.2, joint=True),
    Case(*FORMS["sphereface2-a"], sample_rate=0.4, correction="importance", beyond=0.4),
]
PENALTY = [
    Case("ArcFace", {"scale": 16.0}, sample_rate=rate, budget=budget, **NEAREST)
    for rate, budget in itertools.product((1.0, 0.4), (None, 0))
] + [
    Case("ArcFace", {"scale": 16.0}, nearest=1, penalty=1.2),
    Case("ArcFace", {"scale": 16.0}, nearest=22, penalty=0.2, budget=0),
    Case("ArcFace", {"scale": 16.0}, nearest=90, penalty=0.2, sample_rate=0.3, counts=(1, 1, 1, 1)),
    Case("CosFace", {"scale": 16.0}, sample_rate=0.4, smoothing=0.1, class_weights=True, **NEAREST),
    Case("CosFace", {"scale": 16.0}, beyond=0.3, counts=(0, 2, 9, 0), **NEAREST),
    Case("SubCenterArcFace", {"scale": 16.0, "centers": 3}, sample_rate=0.5, **NEAREST),
    Case("SubCenterArcFace", {"scale": 16.0, "centers": 3}, budget=0, beyond=0.5, **NEAREST),
    Case("CurricularFace", {"scale": 16.0, "momentum": 0.3}, sample_rate=0.5, budget=0, **NEAREST),
    Case("MagFace", {"scale": 16.0, "l_a": 1.5, "u_a": 4.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}, **NEAREST),
    Case("SphereFace2", {"scale": 10.0}, sample_rate=0.4, **NEAREST),
    Case("ArcFace", {"scale": 16.0}, sample_rate=0.4, correction="importance", **NEAREST),
    Case("ArcFace", {"scale": 16.0}, optimizer="adamw", early=True, budget=0, reduction="none", **NEAREST),
]
GROUPS = {"every form": EVERY, "options": OPTIONS, "penalty": PENALTY}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3, 4))])
def test_equals_dense_float64(ranks, world, name):
    ranks(world).run(check_cases, GROUPS[name])


def soft_labels(rank: int, world: int) -> None:
    for (name, settings), nearest in ((FORMS["a-softmax"], 0), (("ArcFace", {"scale": 10.0}), 3)):
        margin = getattr(margins, name)(**settings)
        head = PartialFC(D, C, margin, 0.4, dtype=torch.float64, init_std=1.0, inter_topk=nearest)
        reference = Loss(name, settings, nearest=nearest, nearer_by=0.06)
        counts = (3, 2, 0, 4)[:world]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, C, (sum(counts), 2), generator=generator)
        labels[1, 1] = -100
        share = torch.rand(sum(counts), 1, generator=generator, dtype=torch.float64)
        weights = torch.cat((share, 1 - share), 1)
        check_soft_labels(f"{name} {nearest}", head, reference, x, labels, weights, samples_of(counts, rank))


@pytest.mark.parametrize("world", [1, 2])
def test_soft_labels(ranks, world):
    ranks(world).run(soft_labels)


# ---------------------------------------------------------------------------------------------------- formulas


def test_past_pi():
    """Where θ + m is above π, and nowhere else, a form differs; only "joined" and "monotonic" have no jump there."""
    angles = torch.linspace(0.01, 3.13, 400, dtype=torch.float64)
    below, above = angles < math.pi - 0.5, angles > math.pi - 0.5
    for past_pi in ("monotonic", "plain", "sine", "joined"):
        target = ArcFace(past_pi=past_pi).target(torch.cos(angles))
        assert_near(past_pi, target[below], torch.cos(angles + 0.5)[below])
        assert_near(past_pi, target, in_form(torch.cos(angles), 1.0, 0.5, past_pi))
        assert bool((target.diff()[above[1:]] < 0).all()) is (past_pi != "plain")
        assert (float(target.diff().abs().max()) > 0.05) is (past_pi == "sine")


def test_an_easy_margin_ends_at_a_right_angle():
    angles = torch.tensor([0.3, 1.5, 1.6, 3.0], dtype=torch.float64)
    target = ArcFace(margin=0.5, easy_margin=True).target(torch.cos(angles))
    expected = torch.tensor([0.8, 2.0, 1.6, 3.0], dtype=torch.float64).cos()
    assert_near("easy", target, expected)


@pytest.mark.parametrize(
    ("margin", "positives"),
    [
        (ArcFace(past_pi="plain"), False),
        (ArcFace(past_pi="joined"), False),
        (ArcFace(easy_margin=True), False),
        (SphereFace(annealing=3.0), False),
        (SphereFace(**A_SOFTMAX), True),
    ],
)
def test_gradcheck(margin: Margin, positives: bool):
    """By cosine and, where lengths are kept, by the length."""
    cosines = torch.cos(torch.linspace(0.1, 3.0, 11, dtype=torch.float64)).requires_grad_()
    lengths = torch.linspace(0.5, 4.0, 11, dtype=torch.float64).requires_grad_()

    def target(cosine: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        batch = margins.Positives(torch.arange(11), torch.arange(11), norm, torch.ones(11, dtype=torch.bool), 0)
        return margin.target(cosine * norm if positives else cosine, batch) + 0.0 * norm

    assert torch.autograd.gradcheck(target, (cosines, lengths))


@pytest.mark.parametrize("value", [1.0, -1.0, 1.0000001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_have_bounded_gradients(dtype, value):
    for margin in (
        ArcFace(past_pi="plain"),
        ArcFace(past_pi="sine"),
        SphereFace(annealing=1.0),
        SphereFace2(kind="arc"),
    ):
        cosine = torch.tensor([value], dtype=dtype, requires_grad=True)
        for moved in (margin.target(cosine, None), margin.negative(cosine, cosine)):
            (gradient,) = torch.autograd.grad(moved.sum(), cosine)
            assert math.isfinite(moved.item()) and math.isfinite(gradient.item())


def test_similarities_in_angles_fall_everywhere():
    angles = torch.linspace(0.001, math.pi - 0.001, 5000, dtype=torch.float64)
    margin = SphereFace2(margin=0.8, kind="arc")
    for values in (margin.target(torch.cos(angles)), margin.negative(torch.cos(angles), angles)):
        assert bool((values.diff() < 1e-12).all())


def test_the_offset_balances_in_angles_as_well():
    margin = SphereFace2(margin=0.4, kind="arc")
    PartialFC(4, 1000, margin)
    right = torch.zeros(1, dtype=torch.float64)
    own, other = 40 * margin.target(right).item(), 40 * margin.negative(right, right).item()
    assert 0.7 / (1 + math.exp(own)) == pytest.approx(0.3 * 999 / (1 + math.exp(-other)), rel=1e-4)


def test_annealing_falls_as_in_sphereface():
    """λ = max(5, 1000 / (1 + 0.12 t)): the constants of the authors' code; 5 is reached after 199/0.12 steps."""
    margin = SphereFace(**{**A_SOFTMAX, "annealing": 1000.0})
    schedule = MarginSchedule(
        PartialFC(4, 3, margin), start=1000.0, end=5.0, end_step=1658, shape="harmonic", argument="annealing"
    )
    for step in (0, 1, 10, 500, 1657):
        assert schedule.value_after(step) == pytest.approx(1000 / (1 + 0.12 * step), rel=2e-4)
    assert schedule.value_after(1658) == schedule.value_after(99_999) == 5.0
    schedule.step()
    assert margin.annealing == pytest.approx(1000 / 1.12, rel=1e-3)
    with pytest.raises(ValueError, match=r"needs a start and an end above 0, not 1000\.0 and 0\.0"):
        MarginSchedule(margin, start=1000.0, end=0.0, end_step=5, shape="harmonic", argument="annealing")


def test_metrics_are_of_angles_where_lengths_are_kept():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for margin in (SphereFace(1.0, 4.0, normalize_embeddings=False), SphereFace(1.0, 4.0)):
        head = PartialFC(4, 9, margin, init_std=1.0, metrics=True)
        head(x, torch.arange(6))
        found.append({**head.metrics, "angle": head.target_angle})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, 0])
def test_half_precision_stays_near(product, budget):
    """Tiles are found again in backward on the same side of the penalty."""
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    grads = []
    for dtype in (torch.float64, torch.float32):
        head = PartialFC(16, 70, ArcFace(8.0), dtype=dtype, init_std=1.0, logits_budget=budget, inter_topk=4)
        own = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", product, enabled=dtype == torch.float32 and product != torch.float32):
            loss = head(own, torch.arange(12))
        loss.backward()
        grads.append((loss.detach().double(), own.grad, head.weight.grad))
    tolerance = 1e-5 if product == torch.float32 else 0.03
    for exact, found in zip(*grads, strict=True):
        assert float((exact - found).norm() / exact.norm()) < tolerance


def test_equally_near_classes_are_all_penalised():
    head = PartialFC(4, 5, CosFace(8.0, 0.0), dtype=torch.float64, inter_topk=1, inter_topk_penalty=0.3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4, dtype=torch.float64)[[0, 1, 1, 2, 3]])
    x = torch.tensor([[1.0, 0.5, 0.2, 0.1]], dtype=torch.float64)
    unit = x / x.norm()
    logits = torch.stack([unit[0, 0], *[torch.cos(torch.acos(unit[0, 1]) - 0.3)] * 2, unit[0, 2], unit[0, 3]]) * 8
    expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor([0]))
    assert_near("loss", head(x, torch.tensor([0])), expected)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ArcFace(past_pi="on"), "past_pi must be one of 'monotonic', 'plain', 'sine', 'joined', not 'on'"),
        (lambda: ArcFace(easy_margin=1), "easy_margin must be True or False, not 1"),
        (lambda: CombinedMargin(m1=2.0, past_pi="sine"), 'past_pi must be "monotonic" or "plain" where m1'),
        (lambda: CombinedMargin(m1=2.0, easy_margin=True), "easy_margin must be False where m1"),
        (lambda: SphereFace(annealing=-1.0), "annealing, the weight .* must be at least 0, not -1.0"),
        (lambda: SphereFace(normalize_embeddings=0), "normalize_embeddings must be True or False, not 0"),
        (lambda: SphereFace2(kind="mul"), "kind must be .*, not 'mul'"),
        (lambda: SphereFace2(kind="arc", margin=3.2), r"margin is an angle in radians in \[0, pi\), not 3.2"),
        (lambda: PartialFC(4, 3, inter_topk=-1), "inter_topk, a number of classes, must be at least 0, not -1"),
        (lambda: PartialFC(4, 3, inter_topk=True), "inter_topk, a number of classes"),
        (lambda: PartialFC(4, 3, inter_topk=2, inter_topk_penalty=3.2), r"inter_topk_penalty .* \[0, pi\), not 3.2"),
        (lambda: PartialFC(4, 3, Softmax(), inter_topk=2), "it must be 0 with Softmax, not 2"),
        (lambda: PartialFC(4, 3, SphereFace(**A_SOFTMAX), inter_topk=2), "it must be 0 with SphereFace, not 2"),
        (lambda: PartialFC(4, 3, SphereFace(**A_SOFTMAX), interclass_filter=0.5), "interclass_filter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(build: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_a_head_is_built_for_cannot_change():
    head = PartialFC(4, 3, NormFace())
    with pytest.raises(ValueError, match="normalize_embeddings is True and would be False"):
        head.margin.normalize_embeddings = False
    with pytest.raises(ValueError, match="inter_topk"):
        PartialFC(4, 3, inter_topk=2).margin = Softmax()


def test_states_of_earlier_versions_load():
    """Descriptions from before these arguments are those of their defaults; past_pi and easy_margin change no state."""
    for margin, then in (
        (ArcFace(past_pi="plain", easy_margin=True), "ArcFace(scale=64.0, m1=1.0, m2=0.5, m3=0.0, gradient='exact')"),
        (SphereFace(), "SphereFace(scale=64.0, m1=1.35, m2=0.0, m3=0.0, gradient='exact')"),
        (AdaFace(), "AdaFace(scale=64.0, margin=0.4, h=0.333, momentum=0.01)"),
    ):
        PartialFC(4, 3, margin).check_state({"_extra_state": {"step": 3, "margin": then}})
    with pytest.raises(ValueError, match="build the head with that margin"):
        PartialFC(4, 3, SphereFace(annealing=5.0)).check_state(
            {"_extra_state": {"step": 3, "margin": "SphereFace(scale=64.0, m1=1.35, m2=0.0, m3=0.0, gradient='exact')"}}
        )


def test_the_penalty_follows_an_attribute():
    """WeSpeaker's grows with the margin: what is set counts from the next forward on."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for now in (0.0, 0.1):
        head = PartialFC(4, 9, ArcFace(8.0), 0.5, init_std=1.0, inter_topk=3)
        RowOptimizer(torch.optim.SGD, head, lr=0.1)
        head.inter_topk_penalty = now
        losses.append(head(x, torch.arange(5)).item())
    plain = PartialFC(4, 9, ArcFace(8.0), 0.5, init_std=1.0)
    RowOptimizer(torch.optim.SGD, plain, lr=0.1)
    assert losses[0] == pytest.approx(plain(x, torch.arange(5)).item(), rel=1e-6)
    assert losses[1] > losses[0] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_check_margin_takes_them(name):
    cls, settings = FORMS[name]
    check_margin(getattr(margins, cls)(**settings), worlds=(1, 2))


@pytest.mark.slow
def test_check_margin_takes_the_penalty():
    check_margin(CurricularFace(16.0), worlds=(2,), inter_topk=3, inter_topk_penalty=0.2)
    check_margin(SubCenterArcFace(16.0), worlds=(1,), inter_topk=2)
