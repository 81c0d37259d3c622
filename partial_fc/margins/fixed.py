"""The combined margin cos(m1·θ + m2) − m3, of which ArcFace, CosFace and SphereFace are cases (variants.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from partial_fc.margins.angles import Gradient, PastPi, by_arccosine, checked_form, other_form
from partial_fc.margins.base import Margin, angle, at_least
from partial_fc.margins.positives import Positives


def angular(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """Return cos(factor · θ + added) `[P]`, monotonic past π; 1 where the angle is below 0. added: radians."""
    if factor == 1 and isinstance(added, float) and 0 <= added < math.pi:
        return AddedAngle.apply(cosine, added)  # type: ignore[no-any-return]
    return by_arccosine(cosine, factor, added)


class AddedAngle(torch.autograd.Function):
    """cos(θ + m) = cos θ cos m − sin θ sin m, and beyond π its continuation −2 − cos(θ + m): a third of the operations.

    The derivative by cos θ is sin(θ + m)/sin θ = cos m + sin m cos θ/sin θ, whose sign changes at π as well.
    """

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, added: float) -> Tensor:
        edge = 1 - torch.finfo(cosine.dtype).eps  # as `angular` takes cosines (angles.py)
        inside = cosine.clamp(-edge, edge)
        sine = (1 - inside).mul_(1 + inside).sqrt_()
        ctx.added = added
        ctx.save_for_backward(cosine, inside, sine)
        moved = (inside * math.cos(added)).sub_(sine, alpha=math.sin(added))
        return torch.where(inside < -math.cos(added), -2 - moved, moved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cosine, inside, sine = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            edge = 1 - torch.finfo(cosine.dtype).eps
            inside = cosine.clamp(-edge, edge)
            sine = ((1 - inside) * (1 + inside)).sqrt()
        slope = (inside / sine * math.sin(ctx.added) + math.cos(ctx.added)).abs()
        return grad * slope.masked_fill(inside != cosine, 1.0), None


class CombinedMargin(Margin):
    """cos(m1·θ + m2) − m3 (ArcFace paper, section 2.1): m1 = 1, m3 = 0 is ArcFace; m1 = 1, m2 = 0 is CosFace.

    Args:
        scale: s > 0, the factor of all logits.
        m1: factor of the target angle, at least 1.
        m2: added to the target angle, radians in [0, π).
        m3: taken from the target cosine, at least 0.
        gradient: "exact" differentiates the formula, bounded at cos θ = ±1 where the angle's slope is not;
            "straight_through" takes 1 for ∂(target logit)/∂cosine, as many published implementations do.
        past_pi: the target where its angle is above π: "monotonic", −2 − cos(m1·θ + m2) and so on; "plain", the cosine
            itself, which rises again; and for m1 = 1 "sine", cos θ − m2 sin m2, or "joined", cos θ − (1 − cos m2).
        easy_margin: no margin beyond θ = π/2 (for m1 = 1).
    """

    def __init__(
        self, scale: float = 64.0, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0, gradient: Gradient = "exact",
        past_pi: PastPi = "monotonic", easy_margin: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(scale)
        self.m1, self.m2 = at_least(1, "m1 multiplies the target angle and", m1), angle("m2", m2)
        self.m3 = at_least(0, "m3 is taken from the target cosine and", m3)
        self.gradient, self.past_pi, self.easy_margin = checked_form(self.m1, gradient, past_pi, easy_margin)

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.gradient == "straight_through":
            with torch.no_grad():
                target = self._target(cosine)
            return target + (cosine - cosine.detach())
        return self._target(cosine)

    def _target(self, cosine: Tensor) -> Tensor:
        if self.past_pi != "monotonic" or self.easy_margin:
            return other_form(cosine, self.m1, self.m2, self.m3, self.past_pi, self.easy_margin)
        return (cosine if self.m1 == 1 and self.m2 == 0 else angular(cosine, self.m1, self.m2)) - self.m3
