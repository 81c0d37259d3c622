"""What steps without a gradient do to a row under Adam without L2 decay, AdamW and NAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from partial_fc.optim.moves import Probe

FIRST, SECOND, LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"  # what torch calls the moments
GONE = 1e-20  # a first moment that has decayed so far moves nothing
WIDEST = 2.0  # how many times another an e_j of one span may be
PLACE, LOW, HIGH = range(3)  # of a row: its span now, and the least and the largest e_j in that


class AdamMoves:
    """Moments decay, and a weight moves by −m Σ_j b_j / (√v + e_j), a term for each step.

    The sum over the steps is a function of √v. The steps of a row are in spans, and no e_j of a span is more than
    `WIDEST` times another. For the sum over a span stand three terms B / (√v + E) that have its first three derivatives
    at √v = 0 and at infinity: Gauss's quadrature for weights b_j / e_j³ at the places e_j, which takes their moments,
    Σ_j b_j e_j^k for k = -3 to 2. Where √v is near ε they differ from the sum by a relative 4e-7 at most.
    """

    MOST = 1 << 12
    OF_OPTION: ClassVar[Mapping[str, str]] = {LARGEST: "amsgrad"}

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.scale = keys.index(LARGEST if LARGEST in keys else SECOND)  # which state is under the root
        self.spans = 1 + len(keys)  # where they begin among the columns
        # columns: factor of the weight, of each key; place, low, high; the six moments of each span
        factors, none = [1.0] * self.spans, [0.0, torch.inf, 0.0]
        self.start = torch.tensor([factors + none + [0.0] * 6], dtype=torch.float64, device="cpu")
        self.table = self.start

    def has_form(self, shape: list[int], entries: int) -> bool:
        moments = shape[-1] - self.spans
        return shape[:-1] == [entries] and (moments == 6 or (moments > 3 and moments % 6 == 3))

    def load(self, table: Tensor) -> None:
        if table.shape[1] == self.spans + 6:  # of a version with one span: a step begins another
            some = table[:, self.spans : self.spans + 1] > 0
            spans = torch.cat([torch.where(some, 0.0, each) for each in (0.0, torch.inf)] + [some.double()], 1)
            table = torch.cat((table[:, : self.spans], spans, table[:, self.spans :]), 1)
        place = table[:, self.spans + PLACE]
        if not bool(((place >= 0) & (place < (table.shape[1] - self.spans - 3) / 6) & (place == place.floor())).all()):
            raise ValueError("the table of steps that rows have missed is damaged")
        self.table = table

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        """Return [D, factor of each key, a, q, ε]."""
        eps, known = float(options.get("eps", 0.0)), probe.known
        state = {key: torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device="cpu") for key in self.keys}
        # of the last row ε alone divides
        for key in {SECOND, self.keys[self.scale]}:
            state[key] = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device="cpu")
        weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device="cpu")
        after = probe.step(options, weights, state if known else {})
        if not known:  # no row has moments yet
            alone = after[""].new_ones(len(self.keys)), after[""].new_tensor([0.0, 1.0, eps])
            return torch.cat((after[""][:1], *alone))
        factors = torch.stack([after[""][0], *(after[key][1] for key in self.keys)])
        by_one, by_eps = -after[""][1], -after[""][2]
        a = by_eps * eps
        q = torch.where(by_one == 0, 1.0, a / by_one - eps)  # nothing moves at a rate of 0
        return torch.cat((factors, torch.stack((a, q, torch.full_like(a, eps)))))

    def extend(self, step: Tensor | None) -> None:
        if step is not None:
            n = self.spans
            factors, (a, q, eps) = step[:n], step[n:]
            # what the moments are in this step, in those of the start
            first = self.table[:, 1 + self.keys.index(FIRST)]
            q = q * self.table[:, 1 + self.scale].clamp(min=1e-120).sqrt()
            b = torch.where(first > GONE, a * first / q, 0.0)
            e = eps / q
            span, place = self._span(e, moves=b > 0)
            moments = self.table[:, n + 3 :] * factors[0]
            missing = 6 * (int(place.max()) + 1) - moments.shape[1]
            moments = torch.nn.functional.pad(moments, (0, max(missing, 0)))
            powers = torch.stack([b * e**k for k in range(-3, 3)], 1)
            moments.scatter_add_(1, 6 * place[:, None] + torch.arange(6, device="cpu"), powers)
            self.table = torch.cat((self.table[:, :n] * factors, span, moments), 1)
        more = self.table.shape[1] - self.start.shape[1]
        self.table = torch.cat((self.table, torch.nn.functional.pad(self.start, (0, more))))

    def _span(self, e: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Return place, low and high `[n, 3]` with a step at `e [n]`, which moves some rows; the places as integers."""
        place, low, high = (self.table[:, self.spans + k] for k in (PLACE, LOW, HIGH))
        least, largest = torch.minimum(low, e), torch.maximum(high, e)
        begins = moves & (largest > WIDEST * least)
        low = torch.where(begins, e, torch.where(moves, least, low))
        high = torch.where(begins, e, torch.where(moves, largest, high))
        place = place + begins
        return torch.stack((place, low, high), 1), place.long()

    def changes_rows(self, step: Tensor) -> bool:
        n = self.spans
        return not bool((step[:n] == 1).all() and step[n] == 0)

    def coefficients(self) -> Tensor:
        """Columns: factor of the weight and of each key, then three B and three E for each span."""
        moments = self.table[:, self.spans + 3 :].unflatten(1, (-1, 6))
        used = moments[:, :, 0] > 0
        count = max(1, int(used.any(0).sum()))  # rows fill them from the first on
        terms = torch.zeros_like(moments[:, :count])
        terms[:, :, 3:] = 1.0  # 0 / (√v + 1)
        terms[used[:, :count]] = _terms(moments[used])
        return torch.cat((self.table[:, : self.spans], terms.flatten(1)), 1)

    def move(self, values: list[Tensor], coefficients: Tensor, outs: list[Tensor]) -> None:
        c = [column[:, None] for column in coefficients.unbind(1)]
        first = values[1 + self.keys.index(FIRST)]
        root = values[1 + self.scale].sqrt()
        terms = c[self.spans :]
        places = [i + k for i in range(0, len(terms), 6) for k in range(3)]
        slope = terms[0] / (root + terms[3])
        for i in places[1:]:
            slope.add_(terms[i] / (root + terms[i + 3]))
        torch.addcmul(values[0] * c[0], first, slope, value=-1, out=outs[0])
        for value, factor, out in zip(values[1:], c[1:], outs[1:], strict=False):
            torch.mul(value, factor, out=out)


def _terms(moments: Tensor) -> Tensor:
    """Return `[n, 6]`: B_1, B_2, B_3, E_1, E_2, E_3 with Σ B E^(k-3) = m_k for the moments m_0 to m_5, `[n, 6]`.

    The E are the zeros of the polynomial of degree 3 that is orthogonal to all lower ones, in t = (e - mean) /
    deviation. Where the e_j are alike, or two of them, fewer terms are exact.
    """
    total, first, *others = moments.unbind(1)
    mean = first / total
    r2, r3, r4, r5 = (moment / total / mean ** (k + 2) for k, moment in enumerate(others))
    variance = (r2 - 1).clamp(min=0)
    deviation = variance.clamp(min=1e-16).sqrt()
    g3 = (r3 - 3 * r2 + 2) / deviation**3
    g4 = (r4 - 4 * r3 + 6 * r2 - 3) / deviation**4
    g5 = (r5 - 5 * r4 + 10 * r3 - 10 * r2 + 4) / deviation**5
    rest = g4 - g3**2 - 1  # 0 for one or two values
    three = ((variance > 1e-7) & (rest > 1e-3))[:, None]
    # t³ + a t² + b t + c, orthogonal to 1, t and t²; its zeros by the cosine of a third of an angle
    a = torch.where(three[:, 0], (g3 * g4 + g3 - g5) / rest, 0.0)
    b, c = -g4 - a * g3, -g3 - a
    p, q = b - a**2 / 3, 2 * a**3 / 27 - a * b / 3 + c
    reach = (-p / 3).clamp(min=1e-12).sqrt()
    angle = torch.acos((-q / (2 * reach**3)).clamp(-1, 1)) / 3
    turns = torch.arange(3, device="cpu") * (2 * math.pi / 3)
    t = 2 * reach[:, None] * torch.cos(angle[:, None] - turns) - a[:, None] / 3
    after, before = t.roll(1, 1), t.roll(2, 1)
    shares = (1 + after * before) / ((t - after) * (t - before))
    # two terms: t² - g3 t - 1
    root = (g3**2 / 4 + 1).sqrt()
    low, high = g3 / 2 - root, g3 / 2 + root
    two = torch.stack((low, high, high), 1)
    of_two = torch.stack((high, -low, torch.zeros_like(low)), 1) / (high - low)[:, None]
    alike = variance[:, None] <= 1e-13
    t = torch.where(alike, 0.0, torch.where(three, t, two))
    shares = torch.where(alike, t.new_tensor([1.0, 0.0, 0.0]), torch.where(three, shares, of_two))
    e = mean[:, None] * (1 + deviation[:, None] * t).clamp(min=1e-9)
    return torch.cat((shares * total[:, None] * e**3, e), 1)
