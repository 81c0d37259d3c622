"""What a case of the property tests is compared with: one process, dense, float64, from the papers' formulas. Shares no
code with the core.

Every stage starts from what the ranks had before it, so that its error is its own: losses and gradients from the
weights before the step, weights after the step from the gradients of the step. How far a stage may be off follows from
the dtypes (`Bounds`); with u the unit roundoff of the statistics (2⁻²⁴ for float32, 2⁻⁵³ for float64), u_p of the
matrix products, u_w and u_e of weights and embeddings:

    a cosine             a sum of D products: k·u, k = D + N + S + 16 operations; 3 u_p where products are rounded
    a target's angle     θ = arccos(c): k·u / sin θ, never more than √(2 k u)
    a logit              δ = s (slope · cosine + factor · angle)
    a loss               2 δ, and its own rounding
    a probability        a share of 4 δ; so a gradient |c| s ‖∂cos‖ (4 δ + k·u + 8 u_p), and what is lost when it is
                         stored in u_w or u_e
    a weight             some u_w of itself and of what is added to it

Where a result jumps (a filter's threshold, the nearest center, a rule for harder classes) and an input is within its
own error of the jump, both sides are right: `NearJump`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from dense_centers import DenseCenters, center_losses
from dense_losses import Loss, reduced, share_of, taken_of, unit
from dense_optimizers import DenseAdamW, DenseSGD
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
    ordered,
)
from torch import Tensor

SAFETY = 4.0
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


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


class Losses:
    """Losses `[N]` of a batch over the chosen classes `[S]`, before they are weighted, and bounds of their errors."""

    def __init__(self, case: Case, bounds: Bounds, x: Tensor, w: Tensor, state: dict[str, float]) -> None:
        settings = dict(case.settings)
        if case.margin == "AdaptiveMargin":
            settings["class_counts"] = class_counts_of(case)
        self.case, self.bounds, self.x, self.w = case, bounds, x, w
        self.dense = Loss(
            case.margin, settings, case.smoothing, beyond=case.beyond, class_weights=class_weights_of(case), state=dict(state)
        )  # fmt: skip
        self.heaviest = 1.0 if self.dense.class_weights is None else max(1.0, float(self.dense.class_weights.max()))
        self.k = (x.shape[1] + len(x) + len(w) + 16) * bounds.u * SAFETY
        self.slope = self.factor = 1.0

    def of(
        self, share: Tensor, classes: Tensor, drawn: Tensor | None, bias: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        losses = self.dense.losses(self.x, self.w, share, classes, bias, offset, drawn)
        self.total_slope = torch.full(
            (len(losses),), self.heaviest, dtype=torch.float64
        )  # of a loss by its logits, half of it
        self.extra = torch.zeros(len(losses), dtype=torch.float64)  # the part of a loss that is of no logit
        if self.case.margin == "Softmax":
            some = self.dense.logits.numel() > 0
            size = self.x.detach().norm(dim=1).amax() * self.w.detach().norm(dim=1).amax() if some else 0.0
            self.delta = float(size * (self.k + 3 * self.bounds.u_p)) + self._of_correction()
            return losses
        self.error = self.k + 3 * self.bounds.u_p  # of a cosine
        self._jumps(share)
        self.slope, self.factor, turn = self._slopes()
        sine = (1 - self.dense.own.detach() ** 2).clamp(min=0).sqrt()
        angles = torch.where(share > 0, self.k / sine.clamp(min=math.sqrt(2 * self.k)), 0.0)
        angle = angles.amax() if angles.numel() else 0.0
        scale = self.dense.scale
        self.delta = float(scale * (self.slope * self.error + self.factor * (angle + self.k)) + turn)
        self.delta += self._of_correction()
        if self.case.margin == "SphereFace2":
            balance = self.dense.settings["balance"]
            left = ((share == 0) & ~self._skipped(share)) / (1.0 if self.dense.taken is None else self.dense.taken)
            self.total_slope = self.heaviest * (balance * share.sum(1) + (1 - balance) * left.sum(1)) / scale
        if self.case.margin == "MagFace":
            self.extra = self.heaviest * self.dense.penalty().detach()
        return losses

    def _of_correction(self) -> float:
        """What rounding does to −ln π, which is added to the logits."""
        if self.dense.taken is None or not len(self.dense.taken):
            return 0.0
        return float(-self.dense.taken.log().amin()) * 3 * (self.bounds.u + self.bounds.u_p)

    def _skipped(self, share: Tensor) -> Tensor:
        beyond = math.inf if self.case.beyond is None else self.case.beyond
        return (self.dense.cosines.detach() > beyond) & (share == 0)

    def _slopes(self) -> tuple[float, float, float]:
        """(the largest slope of other classes' logits by their cosines, of the target's by its angle, error of the
        margin itself)."""
        s, state = self.dense.settings, self.dense.state
        match self.case.margin:
            case "SphereFace2":
                return s["t"], 1.0, 0.0
            case "CurricularFace":
                return abs(state["t"]) + 2, 1.0, 0.0
            case "SphereFace":
                return 1.0, s["margin"], 0.0
            case "CombinedMargin":
                return 1.0, s["m1"], 0.0
            case "AdaFace":
                moved = s["h"] * self.k * 200 / (state["std"] + 1e-3)
                return 1.0, 1.0, 4 * self.dense.scale * s["margin"] * min(1.0, moved)
            case "MagFace":
                return 1.0, 1.0, self.dense.scale * self._rise * self.k * s["u_a"]
        return 1.0, 1.0, 0.0

    @property
    def _rise(self) -> float:
        """MagFace's margin by the length."""
        s = self.dense.settings
        return (s["u_m"] - s["l_m"]) / (s["u_a"] - s["l_a"])

    def _jumps(self, share: Tensor) -> None:
        """NearJump where a cosine or a length is within its error of a place where the result jumps."""
        dense, others = self.dense, share == 0
        if dense.by_center.shape[2] > 1 and dense.by_center.numel():
            best = dense.by_center.detach().topk(2, dim=2).values
            self._far(best[..., 0] - best[..., 1], (dense.norm > 0)[:, None].expand(best.shape[:2]))
        if self.case.beyond is not None:
            self._far(dense.cosines - self.case.beyond, others)
            if self.case.smoothing > 0 and bool(self._skipped(share).all(1).any()):
                raise NearJump  # a sample without any class
        if self.case.margin == "CurricularFace":
            self._far(dense.cosines - dense.aim, others)
        if self.case.margin == "MagFace":
            for end in (self.case.settings["l_a"], self.case.settings["u_a"]):
                self._far(dense.norm / end - 1, torch.ones_like(dense.norm, dtype=torch.bool))

    def _far(self, distance: Tensor, where: Tensor) -> None:
        if bool((distance.detach().abs()[where] <= 4 * max(self.error, 1e-14)).any()):
            raise NearJump

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
        slope = max(self.slope, self.factor) * self.dense.scale
        norm, rows = self.dense.norm.detach(), self.dense.row_norm.detach()
        by_x = total * slope * torch.where(norm > 1e-12, 1 / norm, 0.0)
        if self.case.margin == "MagFace":
            s = self.case.settings
            by_x = by_x + self.heaviest * (2 * self.dense.scale * self._rise + s["penalty_weight"] / s["l_a"] ** 2)
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
        return 0.0 if self.case.margin == "Softmax" else self.delta / self.dense.scale


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
        self.rules: dict[str, tuple[Any, Any]] = {}
        self.early_off: dict[str, Tensor] = {}
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
        others = max(1, (self.case.classes if self.case.sample_rate == 1 or self.case.corrected else self.window) - 1)
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
        share, part = share_of(batch.labels, case.classes, batch.label_weights, case.ignore)
        chosen = self.check_selected(what, found, share, batch)
        x = batch.x.double().requires_grad_()
        w, bias, offset = (
            None if t is None else t.clone().requires_grad_()
            for t in (self.weight[chosen], self._chosen(chosen), self.offset)
        )
        dense = Losses(case, bounds, x, w, self.state)  # type: ignore[arg-type]
        if case.corrected:
            of_batch = batch.labels[batch.labels != case.ignore]
            dense.dense.taken = taken_of(chosen, of_batch, case.classes, case.sample_rate)
        drawn = self.drawn(found, batch, chosen, x, w)  # type: ignore[arg-type]
        losses = dense.of(share[:, chosen], chosen, drawn, bias, offset)
        of_center = part.double() if batch.sample_weights is None else part * batch.sample_weights
        of_class = dense.dense.class_weight(share[:, chosen], chosen)
        loss, coefficient = reduced(losses, of_center, case.reduction, of_class)
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
        """`[N, S]`: margins that ElasticFace drew for each sample's targets; draws are its own, what is made of them is
        compared."""
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
            self.bounds.near(
                f"{what}: {name}", value, torch.tensor(dense.dense.state[name], dtype=torch.float64), allowed
            )
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
        loss, coefficient = reduced(center_losses(x, leaf, share), worth, case.reduction)
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
            paper, counts, sizes = (
                DenseCenters(CENTER_ALPHA),
                torch.zeros(len(before)).double(),
                torch.zeros_like(before),
            )
            for *_, share, x, batch in noted:
                each = share * (1.0 if batch.sample_weights is None else batch.sample_weights[:, None])
                paper.note(x, before, each)
                counts += each.sum(0)
                sizes += each.sum(0)[:, None] * before.abs() + each.T @ x.abs()
            expected = before.clone()
            untouched = paper.step(expected)
            allowed = k * (before.abs() + sizes / (1 + counts)[:, None]) + 1e-300
            self.bounds.near(f"{what}: centers", self.centers, expected, allowed)
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
                self.early_off[name] = case.momentum * self.early_off.get(name, torch.zeros_like(off)) + off
                allowed = allowed + case.lr * self.early_off[name]
            if name == "weight" and case.low == "master":
                self.master = expected
            bounds.near(f"{what}: {name} after it", now[at], expected[at], (allowed + torch.zeros_like(before))[at])

    def moved(self, name: str, w: Tensor, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(what the optimizer makes of rows, the size of what it adds), by its formulas."""
        case, out = self.case, w.clone()
        if case.optimizer == "adamw":
            rule, _ = self.rules.setdefault(name, (DenseAdamW(case.lr, weight_decay=case.decay), None))
            rule.step(out, grad, rows)
            return out, torch.full_like(w, 4 * case.lr)
        rule, sizes = self.rules.setdefault(name, tuple(DenseSGD(case.lr, case.momentum, case.decay) for _ in range(2)))
        rule.step(out, grad, rows)
        sizes.step(w.abs(), grad.abs(), rows)  # the same sums of absolute values
        return out, case.lr * sizes.buffer


def check(case: Case, results: list[Numbers]) -> float:
    """The largest error as a share of what is allowed; AssertionError if one is larger, NearJump if there is no
    telling."""
    return Check(case, results).run()
