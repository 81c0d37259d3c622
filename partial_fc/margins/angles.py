"""cos(m1·θ + m2) for any factor and any angle, by the arccosine; `AddedAngle` (fixed.py) needs none."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def by_arccosine(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """Return cos(factor · θ + added) `[P]`, continued monotonically past π; 1 below 0. added: radians."""
    # acos has infinite slope at ±1: a step inside, the slope stays finite. The step is the dtype's resolution of an
    # angle near 0, so the value is unharmed: cos changes by at most its own rounding.
    edge = 1 - torch.finfo(cosine.dtype).eps
    theta = torch.acos(cosine.clamp(-edge, edge))
    beyond = (cosine < -edge) | (cosine > edge)
    argument = (factor * theta + added).clamp(min=0)
    turns = torch.floor(argument.detach() / math.pi)
    extended = torch.where(turns % 2 == 0, 1.0, -1.0) * torch.cos(argument) - 2 * turns
    # a clamped cosine passes no gradient; it gets that of cos θ itself, which is 1
    return extended + torch.where(beyond, 1.0, 0.0) * (cosine - cosine.detach())
