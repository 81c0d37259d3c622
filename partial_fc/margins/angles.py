"""cos(m1·θ + m2) for any factor and angle by the arccosine, and its other forms; `AddedAngle` (fixed.py) needs none."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from partial_fc.margins.base import flag, require

Gradient = Literal["exact", "straight_through"]
PastPi = Literal["monotonic", "plain", "sine", "joined"]
PAST_PI = ("monotonic", "plain", "sine", "joined")


def by_arccosine(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """Return cos(factor · θ + added) `[P]`, continued monotonically past π; 1 below 0. added: radians."""
    theta, beyond = _angles(cosine)
    argument = (factor * theta + added).clamp(min=0)
    turns = torch.floor(argument.detach() / math.pi)
    return (1 - 2 * (turns % 2)) * torch.cos(argument) - 2 * turns + beyond


def checked_form(
    factor: float, gradient: Gradient, past_pi: PastPi, easy_margin: bool
) -> tuple[Gradient, PastPi, bool]:
    """Return the last three. ValueError for those that a `CombinedMargin` does not take, or not with this factor."""
    known = gradient in ("exact", "straight_through")
    require('gradient must be "exact" or "straight_through"', repr(gradient), known)
    require(f"past_pi must be one of {', '.join(map(repr, PAST_PI))}", repr(past_pi), past_pi in PAST_PI)
    easy = flag("easy_margin", easy_margin)
    one_angle = 'past_pi must be "monotonic" or "plain" where m1, the factor of the angle, is not 1'
    require(one_angle, repr(past_pi), factor == 1 or past_pi in ("monotonic", "plain"))
    require("easy_margin must be False where m1, the factor of the angle, is not 1", easy, factor == 1 or not easy)
    return gradient, past_pi, easy


def other_form(cosine: Tensor, factor: float, added: float, taken: float, past_pi: PastPi, easy: bool) -> Tensor:
    """Return cos(factor · θ + added) − taken `[P]` in the forms that others have (`CombinedMargin`). added: radians."""
    if past_pi == "monotonic":
        moved = by_arccosine(cosine, factor, added)
    else:
        theta, beyond = _angles(cosine)
        moved = torch.cos(factor * theta + added) + beyond
        if past_pi != "plain":
            below = added * math.sin(added) if past_pi == "sine" else 1 - math.cos(added)
            moved = torch.where(theta + added > math.pi, cosine - below, moved)
    return torch.where(cosine > 0, moved - taken, cosine) if easy else moved - taken


def nearer(cosine: Tensor, angle: float) -> Tensor:
    """Return cos(θ − angle), in any shape; below an angle of 0 continued monotonically, by 2 − cos(θ − angle).

    angle: radians in [0, π). Bounded derivatives, as by `by_arccosine`.
    """
    edge = 1 - torch.finfo(cosine.dtype).eps
    inside = cosine.clamp(-edge, edge)
    moved = inside * math.cos(angle) + ((1 - inside) * (1 + inside)).sqrt() * math.sin(angle)
    moved = torch.where(inside > math.cos(angle), 2 - moved, moved)
    return moved + _identity(cosine, edge)


def _angles(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return (θ, 0 with the gradient of the cosine where θ has none)."""
    # acos has infinite slope at ±1: a step inside, the slope stays finite. The step is the dtype's resolution of an
    # angle near 0, so the value is unharmed: cos changes by at most its own rounding.
    edge = 1 - torch.finfo(cosine.dtype).eps
    return torch.acos(cosine.clamp(-edge, edge)), _identity(cosine, edge)


def _identity(cosine: Tensor, edge: float) -> Tensor:
    """Return 0; a clamped cosine passes no gradient, and gets that of cos θ itself by it, which is 1."""
    beyond = (cosine < -edge) | (cosine > edge)
    return beyond * (cosine - cosine.detach())
