"""What a case of the property tests is compared with: one process, dense, float64, from the papers' formulas. Shares no code with the core.

Every stage starts from what the ranks had before it, so that its error is its own: losses and gradients from the weights before the step,
weights after the step from the gradients of the step. How far a stage may be off follows from the dtypes (`Bounds`); with u the unit
roundoff of the statistics (2⁻²⁴ for float32, 2⁻⁵³ for float64), u_p of the matrix products, u_w and u_e of weights and embeddings:

    a cosine             a sum of D products: k·u, k = D + N + S + 16 operations; 3 u_p where products are rounded
    a target's angle     θ = arccos(c): k·u / sin θ, never more than √(2 k u)
    a logit              δ = s (slope · cosine + factor · angle)
    a loss               2 δ, and its own rounding
    a probability        a share of 4 δ; so a gradient |c| s ‖∂cos‖ (4 δ + k·u + 8 u_p), and what is lost when it is stored in u_w or u_e
    a weight             some u_w of itself and of what is added to it

Where a result jumps (a filter's threshold, the nearest center, a rule for harder classes) and an input is within its own error of the
jump, both sides are right: `NearJump`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from fuzz_cases import (
    CENTER_ALPHA,
    CENTER_FACTOR,
    CENTER_LR,
    Batch,
    Case,
    Numbers,
    class_counts_of,
    class_weights_of,
    global_batch,
    margin_of,
    ordered,
)
from oracle import psi
from torch import Tensor

SAFETY = 4.0
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


class NearJump(Exception):
    """A result of this case depends on how its inputs are rounded."""


@dataclass
class Bounds:
    """Unit roundoffs of a case and the largest error found, as a share of what is allowed."""

    case: Case
    worst: float = 0.0

    def __post_init__(self) -> None:
        wide = "float64" in (self.case.weight_dtype, self.case.embedding_dtype)
        self.u = UNIT["float64" if wide else "float32"]
        self.u_p = 0.0 if wide or self.case.weight_dtype != "bfloat16" else UNIT["bfloat16"]
        self.u_w, self.u_e = UNIT[self.case.weight_dtype], UNIT[self.case.embedding_dtype]

    def near(self, what: str, mine: Any, expected: Tensor, allowed: Tensor | float) -> None:
        mine = torch.as_tensor(numpy.asarray(mine), dtype=torch.float64)
        assert mine.shape == expected.shape, f"{what}: {tuple(mine.shape)} is not {tuple(expected.shape)}"
        if not mine.numel():
            return
        assert bool(mine.isfinite().all()), f"{what} is not finite: {mine}"
        # what underflows in float32 has no relative error
        ratio = (mine - expected.detach()).abs() / (
            torch.as_tensor(allowed) + (0.0 if self.u < 1e-10 else 1e-30) + 1e-300
        )
        worst, at = ratio.reshape(-1).max(0)
        self.worst = max(self.worst, float(worst))
        if worst > 1:
            off = float((mine - expected.detach()).reshape(-1)[at].abs())
            raise AssertionError(
                f"{what}[{int(at)}] is {mine.reshape(-1)[at]:.12g}, not {expected.reshape(-1)[at]:.12g}: off by {off:.3g}, "
                f"{float(worst):.3g} times what is allowed"
            )


def share_of(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """(weight of each class in each sample `[N, C]`, 0 where it is none of its labels; whether a sample takes part `[N]`)."""
    labels = batch.labels if batch.labels.ndim == 2 else batch.labels[:, None]
    weights = torch.ones_like(labels, dtype=torch.float64) if batch.label_weights is None else batch.label_weights
    share = torch.zeros(len(labels), case.classes, dtype=torch.float64)
    for i, row in enumerate(labels.tolist()):
        for place, label in enumerate(row):
            if label != case.ignore:
                share[i, label] += weights[i, place]
    return share, (labels != case.ignore).any(1)


def unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """(directions, lengths) of vectors `[..., D]`; no direction, and no gradient, where the length is 0."""
    length = v.norm(dim=-1, keepdim=True)
    some = length > 1e-12
    return torch.where(some, v / torch.where(some, length, 1.0), 0.0), length[..., 0]


class Losses:
    """Losses `[N]` of a batch over the chosen classes `[S]`, before they are weighted, and bounds of their errors."""

    def __init__(
        self, case: Case, bounds: Bounds, x: Tensor, w: Tensor, bias: Tensor | None, offset: Tensor | None
    ) -> None:
        self.case, self.bounds, self.bias, self.offset = case, bounds, bias, offset
        self.margin = margin_of(case)  # for its settings
        self.x, self.w = x, w
        self.k = (x.shape[1] + len(x) + len(w) + 16) * bounds.u * SAFETY
        self.slope, self.factor, self.extra = 1.0, 1.0, torch.zeros(len(x), dtype=torch.float64)

    def of(self, share: Tensor, classes: Tensor, drawn: Tensor | None, state: dict[str, float]) -> Tensor:
        case, scale, target = self.case, self.margin.scale, share > 0
        self.state = dict(state)
        if case.margin == "Softmax":
            logits = self.x @ self.w.T + (0.0 if self.bias is None else self.bias)
            size = self.x.detach().norm(dim=1).amax() * self.w.detach().norm(dim=1).amax() if logits.numel() else 0.0
            self.delta = float(size * (self.k + 3 * self.bounds.u_p))
            return self._softmax(logits, target, share, torch.zeros_like(target))
        x, self.norm = unit(self.x)
        w, self.row_norm = unit(self.w)
        cosines = x @ w.T if w.ndim == 2 else self._nearest(torch.einsum("nd,skd->nsk", x, w))
        self.error = self.k + 3 * self.bounds.u_p
        edge = 1 - 1e-15
        own = torch.where(target, cosines, 0.0)
        own = torch.where(own.abs() > edge, own.detach().clamp(-1, 1), own)  # at an angle of 0 or π nothing turns it
        margined = self._target(own, target, classes, drawn)
        sine = (1 - own.detach() ** 2).clamp(min=0).sqrt()
        angle = (
            torch.where(target, self.k / sine.clamp(min=math.sqrt(2 * self.k)), 0.0).amax() if target.numel() else 0.0
        )
        out = torch.zeros_like(target)
        if case.beyond is not None:
            self._far(cosines - case.beyond, ~target)
            out = (cosines > case.beyond) & ~target
        others = self._rule(cosines, margined, share, target)
        self.delta = float(scale * (self.slope * self.error + self.factor * (angle + self.k)) + self.turn)
        if case.margin == "SphereFace2":
            return self._binary(margined * scale + self.offset, others * scale + self.offset, target, share, out)
        losses = self._softmax(scale * torch.where(target, margined, others), target, share, out)
        if case.margin == "MagFace":
            s = self.case.settings
            length = self.norm.clamp(s["l_a"], s["u_a"])
            penalty = s["penalty_weight"] * (length / s["u_a"] ** 2 + 1 / length)
            for end in (s["l_a"], s["u_a"]):
                self._far(self.norm / end - 1, torch.ones_like(self.norm, dtype=torch.bool))
            self.extra = penalty.detach()
            losses = losses + penalty
        return losses

    def _far(self, distance: Tensor, where: Tensor) -> None:
        if bool((distance.detach().abs()[where] <= 4 * max(self.error, 1e-14)).any()):
            raise NearJump

    def _nearest(self, cosines: Tensor) -> Tensor:
        if cosines.shape[2] > 1 and cosines.numel():
            best = cosines.detach().topk(2, dim=2).values
            self.error = self.k + 3 * self.bounds.u_p
            self._far(best[..., 0] - best[..., 1], (self.norm > 0)[:, None].expand(best.shape[:2]))
        return cosines.amax(2)

    def _softmax(self, logits: Tensor, target: Tensor, share: Tensor, out: Tensor) -> Tensor:
        self.total_slope = torch.ones(len(logits), dtype=torch.float64)
        if bool((out.all(1) & (self.case.smoothing > 0)).any()):
            raise NearJump  # a sample without any class
        log_p = torch.where(out, 0.0, logits) - logits.masked_fill(out, -math.inf).logsumexp(1, keepdim=True)
        log_p = torch.where(out.all(1, keepdim=True), 0.0, log_p)
        even = torch.where(out, 0.0, log_p).sum(1) / (~out).sum(1).clamp(min=1)
        smoothing = self.case.smoothing
        return -(1 - smoothing) * torch.where(target, share * log_p, 0.0).sum(1) - smoothing * even

    def _binary(self, own: Tensor, others: Tensor, target: Tensor, share: Tensor, out: Tensor) -> Tensor:
        balance, r = self.margin.balance, self.margin.scale  # type: ignore[attr-defined]
        left = ~target & ~out
        self.total_slope = (balance * share.sum(1) + (1 - balance) * left.sum(1)) / r
        of_own = torch.where(target, share * softplus(-own), 0.0).sum(1)
        return balance / r * of_own + (1 - balance) / r * torch.where(left, softplus(others), 0.0).sum(1)

    def _rule(self, cosines: Tensor, margined: Tensor, share: Tensor, target: Tensor) -> Tensor:
        """What other classes' cosines become."""
        if self.case.margin == "SphereFace2":
            s = self.case.settings
            self.slope = s["t"]
            return 2 * ((cosines.clamp(-1, 1) + 1) / 2) ** s["t"] - 1 + s["margin"]
        if self.case.margin != "CurricularFace":
            return cosines
        total = share.sum(1, keepdim=True)
        aim = (torch.where(target, margined.detach(), 0.0) * share).sum(1, keepdim=True) / torch.where(
            total > 0, total, 1.0
        )
        self._far(cosines - aim, ~target)
        self.slope = abs(self.state["t"]) + 2
        return torch.where(cosines > aim, cosines * (self.state["t"] + cosines), cosines)

    def _target(self, own: Tensor, target: Tensor, classes: Tensor, drawn: Tensor | None) -> Tensor:
        """Target logits before scaling; moves the margin's state."""
        name, s, k = self.case.margin, self.case.settings, self.k
        self.turn = 0.0
        norms = self.norm[:, None].expand(own.shape)
        if name in (
            "ArcFace",
            "SubCenterArcFace",
            "CosFace",
            "NormFace",
            "SphereFace",
            "CombinedMargin",
            "CurricularFace",
        ):
            m1 = {"SphereFace": s.get("margin", 1.0), "CombinedMargin": s.get("m1", 1.0)}.get(name, 1.0)
            m2 = {"CombinedMargin": s.get("m2"), "CosFace": 0.0, "NormFace": 0.0, "SphereFace": 0.0}.get(
                name, s.get("margin")
            )
            m3 = {"CombinedMargin": s.get("m3"), "CosFace": s.get("margin")}.get(name, 0.0)
            self.factor = m1
            if name == "CurricularFace" and bool(target.any()):
                self.state["t"] = (
                    s["momentum"] * float(own.detach()[target].mean()) + (1 - s["momentum"]) * self.state["t"]
                )
            value = self._turned(own, m1, m2) - m3
            return own + (value - own).detach() if s.get("gradient") == "straight_through" else value
        if name == "AdaFace":
            clipped = norms.detach().clamp(0.001, 100)[target]
            rate = s["momentum"]
            if len(clipped) > 1:
                self.state["std"] = rate * float(clipped.std()) + (1 - rate) * self.state["std"]
            if len(clipped):
                self.state["mean"] = rate * float(clipped.mean()) + (1 - rate) * self.state["mean"]
            z = (s["h"] * (norms.detach().clamp(0.001, 100) - self.state["mean"]) / (self.state["std"] + 1e-3)).clamp(
                -1, 1
            )
            self.turn = 4 * self.margin.scale * s["margin"] * min(1.0, s["h"] * k * 200 / (self.state["std"] + 1e-3))
            return self._turned(own, 1.0, -s["margin"] * z) - s["margin"] * (1 + z)
        if name == "MagFace":
            length = norms.clamp(s["l_a"], s["u_a"])
            rise = (s["u_m"] - s["l_m"]) / (s["u_a"] - s["l_a"])
            self.turn = self.margin.scale * rise * k * s["u_a"]
            return self._turned(own, 1.0, s["l_m"] + rise * (length - s["l_a"]))
        if name == "ElasticFace":
            assert drawn is not None
            return self._turned(own, 1.0, drawn) if s["kind"] == "arc" else own - drawn
        if name == "AdaptiveMargin":
            rare = torch.tensor(class_counts_of(self.case), dtype=torch.float64).clamp(min=1) ** -s["exponent"]
            spread = rare.max() - rare.min()
            place = (rare - rare.min()) / spread if spread > 0 else torch.ones_like(rare)
            table = s["smallest"] + (s["largest"] - s["smallest"]) * place
            return self._turned(
                own, 1.0, table.float().double()[classes][None].expand(own.shape)
            )  # the table is held in float32
        assert name == "SphereFace2"
        return 2 * ((own + 1) / 2) ** s["t"] - 1 - s["margin"]

    def _turned(self, cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
        """cos(factor · θ + added), continued past π as `oracle.psi` is; 1 where the argument is below 0."""
        if isinstance(added, float):
            inside = torch.where(cosine.abs() < 1, cosine, 0.0)
            value = psi(inside, factor, added, 0.0)
            return torch.where(cosine.abs() < 1, value, psi(cosine.detach(), factor, added, 0.0))
        angle = (
            torch.where(
                cosine.abs() < 1, torch.acos(torch.where(cosine.abs() < 1, cosine, 0.0)), torch.acos(cosine.detach())
            )
            + added
        )
        return torch.where(angle > math.pi, -torch.cos(angle) - 2, torch.cos(angle.clamp(min=0)))

    # ------------------------------------------------------------------------------------------------ bounds

    def loss_errors(self, losses: Tensor) -> Tensor:
        """`[N]`: how far each loss may be off."""
        return (
            2 * self.delta * self.total_slope.clamp(min=0.1)
            + self.k * (losses.detach().abs() + self.extra)
            + 4 * self.bounds.u_p
        )

    def gradient_sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(by embeddings `[N]`, by rows `[N, S]`, by biases `[N]`): what the gradient of each loss is at most."""
        total = self.total_slope * 2
        if self.case.margin == "Softmax":
            size = self.w.detach().norm(dim=1).amax() if len(self.w) else 0.0
            return total * size, (total * self.x.detach().norm(dim=1))[:, None].expand(-1, len(self.w)), total
        slope = max(self.slope, self.factor) * self.margin.scale
        norm, rows = self.norm.detach(), self.row_norm.detach()
        by_x = total * slope * torch.where(norm > 1e-12, 1 / norm, 0.0)
        if self.case.margin == "MagFace":
            s = self.case.settings
            by_x = (
                by_x
                + 2 * self.margin.scale * (s["u_m"] - s["l_m"]) / (s["u_a"] - s["l_a"])
                + s["penalty_weight"] / s["l_a"] ** 2
            )
        inverse = torch.where(rows > 1e-12, 1 / rows, 0.0)
        inverse = inverse if inverse.ndim == 1 else inverse.amax(1)
        return by_x, (total * slope)[:, None] * inverse[None], total

    @property
    def relative(self) -> float:
        """The error of a gradient as a share of its largest size."""
        return min(
            4 * self.delta
            + self.factor * math.sqrt(self.k) * (self.x.shape[1] == 1)
            + self.k
            + self._by_angle
            + 8 * self.bounds.u_p,
            4.0,
        )

    @property
    def _by_angle(self) -> float:
        return 0.0 if self.case.margin == "Softmax" else self.delta / self.margin.scale


@dataclass
class Sums:
    """Gradients of a step over its micro-batches, dense, and how far each may be off."""

    weight: Tensor
    bias: Tensor
    offset: Tensor
    weight_off: Tensor
    bias_off: Tensor
    offset_off: float = 0.0


class Check:
    """Walks through the steps of a case with what the ranks found."""

    def __init__(self, case: Case, results: list[Numbers]) -> None:
        self.case, self.results, self.bounds = case, results, Bounds(case)
        self.weight, self.bias, self.offset, self.centers, self.state = self.parameters([r["before"] for r in results])
        self.moments: dict[str, list[Tensor]] = {}
        self.master = self.weight.clone()
        if self.offset is not None:
            self.check_start()

    def parameters(self, found: list[Numbers]) -> Any:
        whole = [
            None if found[0][name] is None else torch.as_tensor(ordered(found, self.case, lambda f, name=name: f[name]))
            for name in ("weight", "bias")
        ]
        offset = found[0]["offset"]
        centers = (
            None if self.case.center is None else torch.as_tensor(ordered(found, self.case, lambda f: f["centers"]))
        )
        for other in found[1:]:
            assert other["state"] == found[0]["state"], "the margin's state differs between ranks"
            assert offset is None or numpy.array_equal(other["offset"], offset), "the offset differs between ranks"
        assert len(whole[0]) == self.case.classes
        return (*whole, None if offset is None else torch.as_tensor(offset), centers, found[0]["state"])

    def check_start(self) -> None:
        """SphereFace2's offset balances one own and all other classes at right angles."""
        s, b = self.case.settings, float(self.offset)
        others = max(1, (self.case.classes if self.case.sample_rate == 1 else self.window) - 1)
        own, other = (s["scale"] * (2 * 0.5 ** s["t"] - 1 + sign * s["margin"]) + b for sign in (-1, 1))
        pull, push = s["balance"] / (1 + math.exp(own)), (1 - s["balance"]) * others / (1 + math.exp(-other))
        assert math.isclose(pull, push, rel_tol=1e-4), f"the offset {b} does not balance"

    @property
    def window(self) -> int:
        return max(1, round(self.case.sample_rate * self.case.classes))

    def run(self) -> float:
        for step in range(self.case.steps):
            self.step(step, [r["steps"][step] for r in self.results])
        return self.bounds.worst

    def step(self, step: int, found: list[Numbers]) -> None:
        case = self.case
        sums = Sums(
            torch.zeros_like(self.weight), torch.zeros(case.classes, dtype=torch.float64), torch.zeros(1, dtype=torch.float64),
            torch.zeros(case.classes, dtype=torch.float64), torch.zeros(case.classes, dtype=torch.float64),
        )  # fmt: skip
        touched = torch.zeros(case.classes, dtype=torch.bool)
        noted = []
        for micro in range(case.micro):
            chosen, note = self.micro_batch(step, micro, [f["micro"][micro] for f in found], sums)
            touched[chosen] = True
            noted.append(note)
        rows = touched.nonzero()[:, 0]
        self.check_gradients(f"step {step}", found, sums, rows)
        before, bias_before, center_before = self.weight, self.bias, self.centers
        self.check_update(f"step {step}", found, sums, rows)
        if case.sample_rate < 1:
            assert torch.equal(self.weight[~touched], before[~touched]), "a row that was not selected moved"
            assert self.bias is None or torch.equal(self.bias[~touched], bias_before[~touched]), (
                "a bias that was not selected moved"
            )
        if case.center is not None:
            self.check_centers(f"step {step}", noted, center_before)

    # ------------------------------------------------------------------------------------------------ one micro-batch

    def micro_batch(self, step: int, micro: int, found: list[Numbers], sums: Sums) -> tuple[Tensor, Any]:
        case, bounds, what = self.case, self.bounds, f"step {step}, batch {micro}"
        batch = global_batch(case, step, micro)
        share, part = share_of(case, batch)
        chosen = self.check_selected(what, found, share, batch)
        x = batch.x.double().requires_grad_()
        w, bias, offset = (
            None if t is None else t.clone().requires_grad_()
            for t in (self.weight[chosen], self._chosen(chosen), self.offset)
        )
        dense = Losses(case, bounds, x, w, bias, offset)  # type: ignore[arg-type]
        drawn = self.drawn(found, batch, chosen, x, w)  # type: ignore[arg-type]
        losses = dense.of(share[:, chosen], chosen, drawn, self.state)
        worth = part.double() if batch.sample_weights is None else part * batch.sample_weights
        of_center = worth
        table = class_weights_of(case)
        if table is not None:
            total = share.sum(1)
            worth = worth * (share @ table) / torch.where(total > 0, total, 1.0)
        loss, coefficient = self.reduce(losses, worth, batch)
        allowed = dense.loss_errors(losses)
        by_rank = torch.split(torch.arange(len(x)), list(case.counts))
        objective = (loss * batch.factors).sum() if case.reduction == "none" else loss * batch.factors[0]
        objective = objective / (case.ranks if case.reduction == "none" else 1)
        note = self.center_loss(what, x, share, of_center, batch, found, by_rank) if case.center else None
        (objective + (0 if note is None else note[0])).backward()
        for rank, here in enumerate(by_rank):
            error = allowed * coefficient.abs()
            mine = loss[here] if case.reduction == "none" else loss
            bounds.near(
                f"{what}: loss of rank {rank}",
                found[rank]["loss"],
                mine,
                error[here] if case.reduction == "none" else error.sum(),
            )
        self.check_state(what, found, dense)
        self.check_embeddings(what, found, x, batch, dense, coefficient, by_rank, note)
        self.add(sums, chosen, w, bias, offset, dense, coefficient * self.outer(batch))  # type: ignore[arg-type]
        return chosen, note

    def _chosen(self, chosen: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[chosen]

    def outer(self, batch: Batch) -> Tensor:
        """`[N]`: what the caller's objective takes each sample's reduced loss for."""
        if self.case.reduction == "none":
            return batch.factors[: len(batch.x)] / self.case.ranks
        return batch.factors[0].expand(len(batch.x))

    def reduce(self, losses: Tensor, worth: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the reduced loss, what each sample counts for in it)."""
        total = worth.sum()
        coefficient = worth / total if self.case.reduction == "mean" and total > 0 else worth
        weighted = torch.where(coefficient != 0, losses, 0.0) * coefficient
        return (weighted if self.case.reduction == "none" else weighted.sum()), coefficient

    def check_selected(self, what: str, found: list[Numbers], share: Tensor, batch: Batch) -> Tensor:
        """The classes of the step on all ranks together."""
        case = self.case
        chosen = torch.as_tensor(ordered(found, case, lambda f: f["selected"]))
        assert torch.equal(chosen, chosen.unique()), (
            f"{what}: selected classes are not distinct and ascending over the ranks"
        )
        shards = case.ranks // (2 if case.mesh else 1)
        chunk = -(-case.classes // shards)
        for rank, f in enumerate(found):
            shard = rank % shards
            assert all(min(shard * chunk, case.classes) <= c < (shard + 1) * chunk for c in f["selected"]), (
                f"{what}: not rank {rank}'s rows"
            )
        if case.sample_rate == 1:
            assert len(chosen) == case.classes
            return chosen
        positives = batch.labels[batch.labels != case.ignore].unique()
        assert bool(torch.isin(positives, chosen).all()), f"{what}: a positive was not selected"
        low, high = max(self.window, len(positives)), min(self.window + len(positives), case.classes)
        assert low <= len(chosen) <= high, f"{what}: {len(chosen)} classes are selected, the window has {self.window}"
        return chosen

    def drawn(self, found: list[Numbers], batch: Batch, chosen: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        """`[N, S]`: margins that ElasticFace drew for each sample's targets; draws are its own, what is made of them is compared."""
        case = self.case
        if case.margin != "ElasticFace":
            return None
        flat = numpy.concatenate([f["drawn"] for f in (found[::2] if case.mesh else found[:1])])
        if not case.settings["plus"]:
            for f in found:
                assert case.mesh or numpy.array_equal(f["drawn"], flat)
        labels = batch.labels if batch.labels.ndim == 2 else batch.labels[:, None]
        given = torch.as_tensor(flat).view(labels.shape)
        table = torch.zeros(len(labels), case.classes, dtype=torch.float64)
        for place in reversed(range(labels.shape[1])):  # of a class named twice in a sample, the first takes it
            some = labels[:, place] != case.ignore
            if batch.label_weights is not None:
                some = some & (batch.label_weights[:, place] >= 0)
            table[some, labels[some, place]] = given[some, place]
        if case.settings["plus"] and case.each == 0:
            some = labels[:, 0] != case.ignore
            cosines = (unit(x.detach())[0] @ unit(w.detach())[0].T)[some].gather(
                1, torch.searchsorted(chosen, labels[some])
            )[:, 0]
            margins = given[some, 0][cosines.argsort()]
            close = (cosines.sort().values.diff() < 1e-5) if len(cosines) > 1 else torch.zeros(0, dtype=torch.bool)
            assert bool(((margins.diff() <= 0) | close).all()), "the largest margin is not the farthest sample's"
        return table[:, chosen]

    def check_state(self, what: str, found: list[Numbers], dense: Losses) -> None:
        for name, value in found[0]["state"].items():
            allowed = dense.k * max(1.0, 100.0 if name != "t" else 1.0)
            self.bounds.near(f"{what}: {name}", value, torch.tensor(dense.state[name], dtype=torch.float64), allowed)
            assert all(f["state"][name] == value for f in found), f"{what}: {name} differs between ranks"
        self.state = found[0]["state"]

    def check_embeddings(
        self,
        what: str,
        found: list[Numbers],
        x: Tensor,
        batch: Batch,
        dense: Losses,
        coefficient: Tensor,
        by_rank: Any,
        note: Any,
    ) -> None:
        case, bounds = self.case, self.bounds
        if case.frozen:
            assert all(f["x"] is None for f in found), f"{what}: frozen embeddings have a gradient"
            return
        factor = case.ranks if case.scale_embedding_grad else 1
        assert x.grad is not None
        size = dense.gradient_sizes()[0] * (coefficient * self.outer(batch)).abs()
        allowed = size * (dense.relative + 4 * bounds.u_e) + x.grad.norm(dim=1) * 4 * bounds.u_e
        if note is not None:
            allowed = allowed + note[1] * (dense.k + 4 * bounds.u_e)
        for rank, here in enumerate(by_rank):
            assert found[rank]["x"] is not None, f"{what}: rank {rank} has no embedding gradient"
            bounds.near(
                f"{what}: embedding gradient of rank {rank}",
                found[rank]["x"],
                x.grad[here] * factor,
                allowed[here, None] * factor,
            )

    def add(
        self,
        sums: Sums,
        chosen: Tensor,
        w: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
        dense: Losses,
        coefficient: Tensor,
    ) -> None:
        """Add this micro-batch to the step's gradients."""
        _, by_row, by_bias = dense.gradient_sizes()
        error = dense.relative + 8 * self.bounds.u_w
        sums.weight[chosen] += 0.0 if w.grad is None else w.grad
        sums.weight_off[chosen] += (coefficient.abs()[:, None] * by_row).sum(0) * error
        per_bias = (coefficient.abs() * by_bias).sum() * error
        if bias is not None:
            sums.bias[chosen] += 0.0 if bias.grad is None else bias.grad
            sums.bias_off[chosen] += per_bias
        if offset is not None:
            sums.offset += 0.0 if offset.grad is None else offset.grad
            sums.offset_off += float(per_bias)

    # ------------------------------------------------------------------------------------------------ center loss

    def center_loss(
        self, what: str, x: Tensor, share: Tensor, worth: Tensor, batch: Batch, found: list[Numbers], by_rank: Any
    ) -> Any:
        """(its share of the objective, the size of its gradient by embeddings `[N]`, centers as leaf, worth, share)."""
        case = self.case
        leaf = self.centers.clone().requires_grad_()
        losses = (share * 0.5 * ((x[:, None] - leaf[None]) ** 2).sum(2)).sum(1)
        loss, coefficient = self.reduce(losses, worth, batch)
        k = (case.width + len(x) + 16) * self.bounds.u * SAFETY
        sizes = (share * ((x[:, None].abs() + leaf[None].abs()) ** 2).sum(2)).sum(1).detach() * coefficient.abs()
        for rank, here in enumerate(by_rank):
            mine, size = (loss[here], sizes[here]) if case.reduction == "none" else (loss, sizes.sum())
            self.bounds.near(f"{what}: center loss of rank {rank}", found[rank]["center"], mine, size * k)
        outer = self.outer(batch)
        objective = CENTER_FACTOR * (
            (loss * batch.factors).sum() / case.ranks if case.reduction == "none" else loss * batch.factors[0]
        )
        lengths = ((x.detach().norm(dim=1)[:, None] + leaf.detach().norm(dim=1)[None]) * share).sum(1)
        return objective, CENTER_FACTOR * lengths * (coefficient * outer).abs(), leaf, worth, share, x.detach(), batch

    def check_centers(self, what: str, noted: list[Any], before: Tensor) -> None:
        k = (self.case.width + 64) * self.bounds.u * SAFETY + 8 * self.bounds.u_w * self.case.micro
        if self.case.center == "paper":
            counts, moves, sizes = (
                torch.zeros(len(before), 1, dtype=torch.float64),
                torch.zeros_like(before),
                torch.zeros_like(before),
            )
            for *_, share, x, batch in noted:
                each = share * (share > 0) * (1.0 if batch.sample_weights is None else batch.sample_weights[:, None])
                counts += each.sum(0)[:, None]
                moves += each.sum(0)[:, None] * before - each.T @ x
                sizes += each.sum(0)[:, None] * before.abs() + each.T @ x.abs()
            expected = before - CENTER_ALPHA * moves / (1 + counts)
            self.bounds.near(
                f"{what}: centers", self.centers, expected, k * (before.abs() + sizes / (1 + counts)) + 1e-300
            )
            untouched = counts[:, 0] == 0
        else:
            grad = sum(leaf.grad for _, _, leaf, *_ in noted)
            sizes, untouched = torch.zeros_like(before), torch.ones(len(before), dtype=torch.bool)
            for _, _, _, worth, share, x, batch in noted:
                total = worth.sum()
                c = (
                    (worth / total if self.case.reduction == "mean" and total > 0 else worth)
                    * self.outer(batch)
                    * CENTER_FACTOR
                )
                sizes += (share * c[:, None]).T @ x.abs() + (share * c[:, None]).sum(0)[:, None] * before.abs()
                untouched &= ~((share > 0) & (worth > 0)[:, None]).any(0)
            self.bounds.near(
                f"{what}: centers", self.centers, before - CENTER_LR * grad, k * (before.abs() + sizes) + 1e-300
            )
        assert torch.equal(self.centers[untouched], before[untouched]), f"{what}: a center of no sample moved"

    # ------------------------------------------------------------------------------------------------ the optimizer

    def check_gradients(self, what: str, found: list[Numbers], sums: Sums, rows: Tensor) -> None:
        """Of classes; then the ranks' own gradients stand in `sums`, as the optimizer gets them."""
        case, bounds = self.case, self.bounds
        if case.early:
            return
        ids = torch.as_tensor(ordered([f["grads"] for f in found], case, lambda g: g["ids"]))
        assert torch.equal(ids, rows), f"{what}: gradients are of {ids.tolist()}, selected were {rows.tolist()}"
        wide = (-1, *[1] * (self.weight.ndim - 1))
        mine = torch.as_tensor(ordered([f["grads"] for f in found], case, lambda g: g["weight"]))
        bounds.near(f"{what}: class gradient", mine, sums.weight[rows], sums.weight_off[rows].view(wide))
        sums.weight = torch.zeros_like(self.weight).index_copy_(0, rows, mine)
        squares = float((mine**2).sum())
        if self.bias is not None:
            mine = torch.as_tensor(ordered([f["grads"] for f in found], case, lambda g: g["bias"]))
            bounds.near(f"{what}: bias gradient", mine, sums.bias[rows], sums.bias_off[rows])
            sums.bias = torch.zeros_like(self.bias).index_copy_(0, rows, mine)
            squares += float((mine**2).sum())
        if self.offset is not None:
            for f in found:
                bounds.near(f"{what}: offset's gradient", f["grads"]["offset"], sums.offset, sums.offset_off)
            sums.offset = torch.as_tensor(found[0]["grads"]["offset"])
            squares += float((sums.offset**2).sum())
        if case.clip is not None:
            norm, k = (
                math.sqrt(squares),
                (mine.numel() + 64) * max(UNIT["float32"] if bounds.u_w > 1e-10 else bounds.u_w, bounds.u),
            )
            floor = 1e-18 if bounds.u_w > 1e-10 else 0.0  # squares of less underflow in float32
            for f in found:
                bounds.near(
                    f"{what}: norm", f["norm"], torch.tensor(norm, dtype=torch.float64), norm * k * SAFETY + floor
                )
            for grad in (sums.weight, sums.bias, sums.offset):
                grad *= min(1.0, case.clip / (norm + 1e-6))

    def check_update(self, what: str, found: list[Numbers], sums: Sums, rows: Tensor) -> None:
        case, bounds, old = self.case, self.bounds, (self.weight, self.bias, self.offset)
        self.weight, self.bias, self.offset, self.centers, self.state = self.parameters([f["after"] for f in found])
        for name, before, now, grad, off in (
            ("weight", old[0], self.weight, sums.weight, sums.weight_off.view(-1, *[1] * (old[0].ndim - 1))),
            ("bias", old[1], self.bias, sums.bias, sums.bias_off),
            ("offset", old[2], self.offset, sums.offset, torch.tensor([sums.offset_off])),
        ):
            if before is None:
                continue
            at = torch.tensor([0]) if name == "offset" else rows
            start = self.master if name == "weight" and case.low == "master" else before
            expected, size = self.moved(name, start, grad, at)
            u = max(bounds.u_w, UNIT["float32"]) if case.low is None and name != "offset" else UNIT["float32"]
            u = bounds.u_w if case.weight_dtype == "float64" else u
            clipped = (
                0.0 if case.clip is None else (grad.numel() + 64) * UNIT["float32"] * (case.weight_dtype != "float64")
            )
            allowed = 16 * case.steps * (u * (start.abs() + size) + (clipped + (u if case.clip else 0.0)) * size)
            if case.low is not None and name != "offset":
                allowed = allowed + 2 * bounds.u_w * (start.abs() + size)
            if case.early:
                self.moments.setdefault(f"{name} off", [torch.zeros_like(off)])[0].mul_(case.momentum).add_(off)
                allowed = allowed + case.lr * self.moments[f"{name} off"][0]
            if name == "weight" and case.low == "master":
                self.master = expected
            bounds.near(f"{what}: {name} after it", now[at], expected[at], (allowed + torch.zeros_like(before))[at])

    def moved(self, name: str, w: Tensor, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(what the optimizer makes of rows, the size of what it adds), by its formulas."""
        case, out = self.case, w.clone()
        if case.optimizer == "adamw":
            first, second, count = self.moments.setdefault(
                name, [torch.zeros_like(w), torch.zeros_like(w), torch.zeros(1)]
            )
            count += 1
            t, b1, b2 = float(count), 0.9, 0.999
            first[rows] = b1 * first[rows] + (1 - b1) * grad[rows]
            second[rows] = b2 * second[rows] + (1 - b2) * grad[rows] ** 2
            out[rows] *= 1 - case.lr * case.decay
            out[rows] -= case.lr * (first[rows] / (1 - b1**t)) / ((second[rows] / (1 - b2**t)).sqrt() + 1e-8)
            return out, torch.full_like(w, 4 * case.lr)
        buffer, size = self.moments.setdefault(name, [torch.zeros_like(w), torch.zeros_like(w)])
        buffer[rows] = case.momentum * buffer[rows] + grad[rows] + case.decay * w[rows]
        size[rows] = case.momentum * size[rows] + grad[rows].abs() + case.decay * w[rows].abs()
        out[rows] -= case.lr * buffer[rows]
        return out, case.lr * size


def check(case: Case, results: list[Numbers]) -> float:
    """The largest error as a share of what is allowed; AssertionError if one is larger, NearJump if there is no telling."""
    return Check(case, results).run()
