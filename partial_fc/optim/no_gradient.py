"""What a step does to a row without a gradient, found by trying the optimizer class on a few numbers.

    linear     (weight, row state) becomes M (weight, row state), one matrix for all rows: SGD with all its options,
               RMSprop, Adagrad and Adadelta without decay
    as Adam    the moments become β1 m and β2 v, and the weight D w − a m / (q √v + ε): Adam without L2 decay, AdamW,
               NAdam

So what many steps do to a row depends on the row only through its own numbers, and a table with one entry for each
step at which a row may have stopped serves all rows (skipped_rows.py). The table is on the host, in float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partial_fc.optim.optimizer_class import KERNELS, is_row_state, on_cpu, trial
from partial_fc.optim.protocol import step_quietly

FIRST, SECOND, LARGEST = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"  # what torch calls the moments of Adam
TINY = 1e-30  # stands for an ε of 0


class Probe:
    """An optimizer of the class on rows of one number each, without gradients, stepped along with the real one.

    scalars: scalar state, such as Adam's step, before the first step that it is to follow.
    """

    def __init__(
        self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any], scalars: Mapping[str, Any]
    ) -> None:
        self.accepted = inspect.signature(cls).parameters.keys() - {*KERNELS, "foreach", "params"}
        given = {k: on_cpu(v) for k, v in options.items() if k in self.accepted}
        self.optimizer = step_quietly(cls([_column([0.0])], **given))
        built = self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]  # by the constructor
        self.scalars = {k: on_cpu(v) for k, v in (scalars or built).items() if not isinstance(v, Tensor) or not v.ndim}
        self.known = bool(scalars or built)

    def step(self, options: Mapping[str, Any], weights: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, under "", and row state after a step of rows with these `weights [n]` and row state `[n]`."""
        parameter = _column(weights)
        parameter.grad = torch.zeros_like(parameter)
        group = self.optimizer.param_groups[0]
        group.update({k: on_cpu(v) for k, v in options.items() if k in self.accepted})
        group["params"] = [parameter]
        self.optimizer.state.clear()
        if self.known or state:
            scalars = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.scalars.items()}
            self.optimizer.state[parameter] = {**scalars, **{k: _column(v).detach() for k, v in state.items()}}
        self.optimizer.step()
        after = self.optimizer.state[parameter]
        self.scalars = {k: v for k, v in after.items() if not is_row_state(v, parameter)}
        self.known = True
        rows = {k: v.detach().view(-1) for k, v in after.items() if is_row_state(v, parameter)}
        return {"": parameter.detach().view(-1), **rows}


def _column(numbers: Any) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(numbers, dtype=torch.float64, device="cpu").reshape(-1, 1).clone())


class Moves(Protocol):
    """What the steps since a start do, for every start that a row may have.

    keys: row state that takes part. Entry i is for rows that stopped i steps after the first start. MOST: so many
    steps are kept; the table is worked on at every step.
    """

    MOST: int
    keys: tuple[str, ...]

    def __init__(self, keys: tuple[str, ...]) -> None: ...

    def __len__(self) -> int:
        """Return how many steps the table has."""

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        """Return what one more step does: numbers for `extend`."""

    def extend(self, step: Tensor | None) -> None:
        """Add a step to the table; None for one that leaves the parameter alone."""

    def moves(self, step: Tensor) -> bool:
        """Return whether a step does anything."""

    def coefficients(self) -> Tensor:
        """Return the table for `move`, `[len + 1, n]` in float64; the last entry changes nothing."""

    def move(self, values: list[Tensor], coefficients: Tensor) -> list[Tensor]:
        """Return weights and state `[S, D]` after the steps; coefficients: `[S, n]`, the row of each."""


class LinearMoves:
    """A row is multiplied by a matrix `[1 + keys, 1 + keys]` a step."""

    MOST = 1 << 14

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.identity = torch.eye(1 + len(keys), dtype=torch.float64, device="cpu")
        self.table = self.identity[:, None]  # [to, start, from]

    def __len__(self) -> int:
        return self.table.shape[1] - 1

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        state = {key: self.identity[i + 1] for i, key in enumerate(self.keys)} if probe.known else {}
        after = probe.step(options, self.identity[0], state)
        return torch.stack([after[""], *(after.get(key, torch.zeros_like(after[""])) for key in self.keys)])

    def extend(self, step: Tensor | None) -> None:
        table = self.table if step is None else (step @ self.table.flatten(1)).view_as(self.table)
        self.table = torch.cat((table, self.identity[:, None]), 1)

    def moves(self, step: Tensor) -> bool:
        return not torch.equal(step, self.identity)

    def coefficients(self) -> Tensor:
        return self.table.transpose(0, 1).flatten(1)

    def move(self, values: list[Tensor], coefficients: Tensor) -> list[Tensor]:
        moved, size = [], len(values)
        for to in range(size):
            total = values[0] * coefficients[:, to * size, None]
            for source in range(1, size):
                total.addcmul_(values[source], coefficients[:, to * size + source, None])
            moved.append(total)
        return moved


class AdamMoves:
    """Moments decay, and a weight moves by −m Σ_j b_j / (√v + e_j), a term for each step.

    The sum over the steps is a function of √v. Three terms B / (√v + E) have its first three derivatives at √v = 0 and
    at infinity: Gauss's quadrature for weights b_j / e_j³ at the places e_j, which takes their moments, Σ_j b_j e_j^k
    for k = -3 to 2. They differ from the sum where √v is near ε: there by a relative 1e-4 in the first steps of a run,
    and far less later.
    """

    MOST = 1 << 12

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.scale = keys.index(LARGEST if LARGEST in keys else SECOND)  # which state is under the root
        # columns: factor of the weight, of each key, then the six moments
        self.start = torch.tensor([[1.0] * (1 + len(keys)) + [0.0] * 6], dtype=torch.float64, device="cpu")
        self.table = self.start

    def __len__(self) -> int:
        return len(self.table) - 1

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        """Return [D, factor of each key, a, q, ε]."""
        one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        eps = max(float(options.get("eps", 0.0)), TINY)
        known = probe.known
        state = {key: torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64) for key in self.keys}
        # a second moment near enough to 0 that ε alone divides
        for key in {SECOND, self.keys[self.scale]}:
            state[key] = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        after = probe.step(options, weights, state if known else {})
        if not known:  # no row has moments yet
            decay = after[""][:1]
            return torch.cat((decay, one[: len(self.keys)], zero[:1], one[:1], one[:1] * eps))
        factors = torch.stack([after[""][0], *(after[key][1] for key in self.keys)])
        by_one, by_eps = -after[""][1], -after[""][2]
        a = by_eps * eps if float(options.get("eps", 0.0)) > 0 else by_one
        q = a / by_one - eps if float(options.get("eps", 0.0)) > 0 else torch.ones((), dtype=torch.float64)
        q = torch.where(by_one == 0, torch.ones((), dtype=torch.float64), q)
        return torch.cat((factors, torch.stack((a, q, torch.tensor(eps, dtype=torch.float64)))))

    def extend(self, step: Tensor | None) -> None:
        if step is not None:
            n = 1 + len(self.keys)
            factors, (a, q, eps) = step[:n], step[n:]
            # what the moments are in this step, in those of the start
            first = self.table[:, 1 + self.keys.index(FIRST)]
            q = q * self.table[:, 1 + self.scale].clamp(min=1e-120).sqrt()
            b = torch.where(first > TINY, a * first / q, 0.0)
            e = eps / q
            powers = torch.stack([b * e**k for k in range(-3, 3)], 1)
            self.table = torch.cat((self.table[:, :n] * factors, self.table[:, n:] * factors[0] + powers), 1)
        self.table = torch.cat((self.table, self.start))

    def moves(self, step: Tensor) -> bool:
        n = 1 + len(self.keys)
        return not bool((step[:n] == 1).all() and step[n] == 0)

    def coefficients(self) -> Tensor:
        """Columns: factor of the weight and of each key, then three B and three E."""
        n = 1 + len(self.keys)
        return torch.cat((self.table[:, :n], _terms(self.table[:, n:])), 1)

    def move(self, values: list[Tensor], coefficients: Tensor) -> list[Tensor]:
        c = [column[:, None] for column in coefficients.unbind(1)]
        first = values[1 + self.keys.index(FIRST)]
        root = values[1 + self.scale].sqrt()
        b1, b2, b3, e1, e2, e3 = c[1 + len(self.keys) :]
        slope = (b1 / (root + e1)).add_(b2 / (root + e2)).add_(b3 / root.add_(e3))
        weight = (values[0] * c[0]).addcmul_(first, slope, value=-1)
        return [weight, *(value * factor for value, factor in zip(values[1:], c[1:], strict=False))]


def _terms(moments: Tensor) -> Tensor:
    """Return `[n, 6]`: B_1, B_2, B_3, E_1, E_2, E_3 with Σ B E^(k-3) = m_k for the moments m_0 to m_5, `[n, 6]`.

    The E are the zeros of the polynomial of degree 3 that is orthogonal to all lower ones, in t = (e - mean) /
    deviation. Where the e_j are alike, or two of them, fewer terms are exact.
    """
    some = moments[:, :1] > 0
    total, first, *others = torch.where(some, moments, 1.0).unbind(1)
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
    shares = torch.where(alike, torch.tensor([1.0, 0.0, 0.0], dtype=t.dtype), torch.where(three, shares, of_two))
    e = mean[:, None] * (1 + deviation[:, None] * t).clamp(min=1e-9)
    return torch.cat((torch.where(some, shares * total[:, None] * e**3, 0.0), torch.where(some, e, 1.0)), 1)


def form_of(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> type[Moves] | None:
    """Return the form of what steps of the class with these options do to a row without a gradient; None if it has
    neither."""
    options = {**options, "lr": 1e-3} if "lr" in options else dict(options)
    forms: list[type[Moves]] = [LinearMoves, AdamMoves]
    return next((form for form in forms if _fits(form, cls, options)), None)


def _state_keys(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the row state of the class with these options."""
    accepted = {k: v for k, v in options.items() if k in inspect.signature(cls).parameters and k != "params"}
    _, state = trial(cls, accepted, torch.zeros(1, 1, dtype=torch.float64, device="cpu"), steps=1)
    return tuple(sorted(k for k, v in state.items() if isinstance(v, Tensor) and v.shape == (1, 1)))


def _fits(form: type[Moves], cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> bool:
    """Return whether some steps do to random rows what a table of this form says."""
    generator = torch.Generator("cpu").manual_seed(3)
    keys = _state_keys(cls, options)
    if form is AdamMoves and not {FIRST, SECOND} <= set(keys):
        return False
    n = 8
    probe, alone = Probe(cls, options, {}), Probe(cls, options, {})
    for _ in range(6):
        table = form(keys)
        # rows of many sizes; what is under a root is not negative
        size = 10.0 ** -torch.arange(0, 2 * n, 2, device="cpu", dtype=torch.float64)
        values = {"": torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")}
        for key in keys:
            values[key] = (torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") + 0.5) * size
        if LARGEST in keys:
            values[LARGEST] = values[SECOND] * 2
        state = {k: v for k, v in values.items() if k} if probe.known else {}
        after = probe.step(options, values[""], state)
        step = table.find(alone, options)
        if not step.isfinite().all():
            return False
        table.extend(step)
        before = [values[""], *(values[key] if state else torch.zeros_like(values[""]) for key in keys)]
        moved = table.move([v[:, None] for v in before], table.coefficients()[:1].expand(n, -1))
        for key, found in zip(("", *keys), moved, strict=True):
            expected = after.get(key, torch.zeros_like(after[""]))
            if not torch.allclose(found[:, 0], expected, rtol=1e-9, atol=1e-12):
                return False
    return True
