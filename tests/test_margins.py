"""Margins against their formulas, their derivative and the straight-through one, and the monotonic continuation."""

from __future__ import annotations

import math

import pytest
import torch

from partial_fc import ArcFace, CombinedMargin, CosFace, NormFace, PartialFC, Softmax

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


@pytest.mark.parametrize("margin", [ArcFace(), CosFace(), NormFace(), CombinedMargin(m1=1.4, m2=0.5, m3=0.1), Softmax()])
def test_gradcheck(margin):
    cosines = torch.cos(ANGLES[::4]).requires_grad_()
    assert torch.autograd.gradcheck(margin.target, (cosines,))


def test_the_gradient_of_arcface_is_sin_over_sin():
    cosine = torch.tensor([math.cos(math.radians(60)), math.cos(math.radians(30))], dtype=torch.float64, requires_grad=True)
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
    ],
)
def test_bad_arguments_are_named_with_their_value(build, name):
    with pytest.raises(ValueError, match=rf"{name}.*not "):
        build()


def test_gradcheck_of_a_whole_head():
    head = PartialFC(4, 6, ArcFace(scale=4.0), dtype=torch.float64, init_std=1.0)
    labels = torch.tensor([0, 3, -100])

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, {"weight": w}, (x, labels))

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, head.weight.detach().clone().requires_grad_()))
