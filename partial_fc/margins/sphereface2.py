"""SphereFace2: every class is a binary decision, and one offset is trained for all of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from partial_fc.distributed.given import real
from partial_fc.distributed.ranks import local_part
from partial_fc.margins.angles import nearer
from partial_fc.margins.base import Margin, angle, at_least, require
from partial_fc.margins.fixed import angular
from partial_fc.margins.positives import Positives


class SphereFace2(Margin):
    """A binary decision for every class (arXiv 2108.01513, equations 5 to 8):

        λ/r · log(1 + exp(−(r g_y + b))) + (1 − λ)/r · Σ_{j≠y} log(1 + exp(r g_j + b)),    g(z) = 2 ((z + 1)/2)^t − 1
        kind "cos", SphereFace2-C:    g_y = g(cos θ_y) − m        g_j = g(cos θ_j) + m
        kind "arc", SphereFace2-A:    g_y = g(cos(θ_y + m))       g_j = g(cos(θ_j − m)), both continued monotonically

    No sum over classes is compared with another, so classes need no normalisation over ranks. b is one trained number
    for all classes, the parameter `offset [1]`; a `RowOptimizer` of the head trains it. At the start it balances the
    pulls of one own and of all other classes at right angles. Under sampling the sum is over the selected classes.

    Args:
        scale: r > 0, the factor of all logits.
        margin: m, at least 0; an angle in radians below π for "arc".
        t: exponent of the similarities, at least 1: makes room at large similarities.
        balance: λ, the share of the own class in the loss, in (0, 1).
        kind: "cos", m is taken from the own similarity and added to the others, or "arc", it is added to the own angle
            and taken from the others.
    """

    offset: nn.Parameter

    def __init__(
        self,
        scale: float = 40.0,
        margin: float = 0.4,
        t: float = 3.0,
        balance: float = 0.7,
        kind: Literal["arc", "cos"] = "cos",
    ) -> None:
        super().__init__(scale)
        balance = real("balance", balance)
        require("balance, the share of the own class in the loss, must be in (0, 1)", balance, 0 < balance < 1)
        require('kind must be "arc" or "cos"', repr(kind), kind in ("arc", "cos"))
        if kind == "arc":
            margin = angle("margin", margin)
        self.margin, self.kind = at_least(0, "margin is taken from the target cosine and", margin), kind
        self.t, self.balance = at_least(1, "t, the exponent of the similarities,", t), balance
        self.binary = (balance / self.scale, (1 - balance) / self.scale)
        self._start = 0.0
        self.offset = nn.Parameter(torch.zeros(1))

    def prepare(self, num_classes: int, selected: int) -> None:
        """`offset` at which λ σ(−(y + b)) = (1 − λ)(selected − 1) σ(o + b), y and o the logits at right angles without
        b."""
        ratio = self.balance / ((1 - self.balance) * max(1, selected - 1))
        right = torch.zeros((), dtype=torch.float64, device="cpu")
        own, other = (self.scale * float(each(right)) for each in (self._own, self._other))
        # a quadratic equation in exp(other + b), its positive root by the one of two formulas that does not cancel
        square = math.exp(own - other)
        root_of = math.sqrt((1 - ratio) ** 2 + 4 * ratio * square)
        root = 2 * ratio / (1 - ratio + root_of) if ratio < 1 else (ratio - 1 + root_of) / (2 * square)
        self._start = math.log(root) - other
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            local_part(self.offset).fill_(self._start)

    def _own(self, cosine: Tensor) -> Tensor:
        """g_y, without b."""
        if self.kind == "arc":
            return self._similarity(angular(cosine, 1.0, self.margin))
        return self._similarity(cosine.clamp(-1, 1)) - self.margin

    def _other(self, cosine: Tensor) -> Tensor:
        """g_j, without b."""
        if self.kind == "arc":
            return self._similarity(nearer(cosine, self.margin))
        return self._similarity(cosine.clamp(-1, 1)) + self.margin

    def _similarity(self, z: Tensor) -> Tensor:
        """g(z); below −1 the power of a negative number is that of its size, with its sign, so that g keeps rising."""
        half = (z + 1) / 2
        return 2 * half.sign() * half.abs() ** self.t - 1

    def _with_offset(self, similarity: Tensor) -> Tensor:
        return similarity + local_part(self.offset.detach()).to(similarity.dtype) / self.scale

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        return self._with_offset(self._own(cosine))

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        return self._with_offset(self._other(cosine))

    def inference(self, cosine: Tensor) -> Tensor:
        return self._with_offset(self._similarity(cosine.clamp(-1, 1)))
