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

Where a result jumps (a filter's threshold, the nearest center or classes, a rule for harder classes, a margin past π)
and an input is within its own error of the jump, both sides are right: `NearJump`.

Rows that make their steps late (skipped="dense") are compared with torch's own optimizer over all rows, whose gradient
is zero where a row was not selected: the selected ones after each step, all at the end. A change of classes is compared
with the rows and the optimizer's state before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from dense_centers import DenseCenters, center_losses
from dense_losses import Loss, reduced, share_of, taken_with, unit
from dense_optimizers import DenseAdamW, DenseSGD
from fuzz_cases import (
    ADDED,
    CENTER_ALPHA,
    CENTER_FACTOR,
    CENTER_LR,
    Batch,
    Case,
    Numbers,
    class_counts_of,
    class_weights_of,
    global_batch,
    mapping_of,
    ordered,
)
from torch import Tensor, nn

SAFETY = 4.0
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
LATE_ADAM = 1e-7  # the sum of the moves that a row has missed is approximated (docs/optimizers.md)
FLATTEST = 0.05  # sine of the smallest angle to a class that counts as nearer


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
        half = self.case.weight_dtype == "bfloat16" or self.case.autocast
        self.u_p = UNIT["bfloat16"] if half and not wide else 0.0
        self.u_w, self.u_e = UNIT[self.case.weight_dtype], UNIT[self.case.embedding_dtype]
        if (
            self.case.skipped == "dense"
        ):  # rows that make their steps late have their own rounding, and the reference none
            self.u = max(self.u, self.u_w, LATE_ADAM / 64 if self.case.optimizer == "adamw" else 0.0)

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

    def __init__(
        self, case: Case, bounds: Bounds, x: Tensor, w: Tensor, state: dict[str, float], class_weights: Tensor | None
    ) -> None:
        settings = dict(case.settings)
        if case.margin == "AdaptiveMargin":
            settings["class_counts"] = class_counts_of(case)
        self.case, self.bounds, self.x, self.w = case, bounds, x, w
        self.dense = Loss(
            case.margin, settings, case.smoothing, beyond=case.beyond, class_weights=class_weights, state=dict(state),
            nearest=case.nearest, nearer_by=case.nearer_by,
        )  # fmt: skip
        self.heaviest = 1.0 if self.dense.class_weights is None else max(1.0, float(self.dense.class_weights.max()))
        self.k = (x.shape[1] + len(x) + len(w) + 16) * bounds.u * SAFETY
        self.slope = self.factor = 1.0
        self.turning = 0.0  # how fast the slope of a penalised cosine changes

    @property
    def keeps_lengths(self) -> bool:
        """Whether logits are in proportion to the embeddings' lengths."""
        return not self.case.settings.get("normalize_embeddings", True)

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
        self.left_out = (share > 0) | self._skipped(share)
        self.steep = self._penalty()
        self._jumps(share)
        self.slope, self.factor, turn = self._slopes()
        self.slope = self.slope * self.steep
        sine = (1 - self.dense.own.detach() ** 2).clamp(min=0).sqrt()
        angles = torch.where(share > 0, self.k / sine.clamp(min=math.sqrt(2 * self.k)), 0.0)
        angle = angles.amax() if angles.numel() else 0.0
        scale = self.dense.scale
        if self.keeps_lengths and self.dense.norm.numel():
            scale = scale * float(self.dense.norm.detach().amax())
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

    def _penalty(self) -> float:
        """The largest slope of cosines that count as nearer, by the cosines themselves."""
        case, cosines = self.case, self.dense.cosines.detach()
        if not case.nearest or not cosines.numel():
            return 1.0
        candidates = cosines.masked_fill(self.left_out, -math.inf)
        found = candidates.topk(min(case.nearest + 1, candidates.shape[1]), dim=1).values
        if found.shape[1] > case.nearest:  # the last that counts, and the next
            last, following = found[:, case.nearest - 1], found[:, case.nearest]
            self._far(last - following, following > -math.inf)
        counted = found[:, : case.nearest]
        counted = counted[counted > -math.inf]
        if not len(counted):
            return 1.0
        angles = torch.acos(counted.clamp(-1, 1))
        flattest = float(torch.sin(angles).amin())
        if flattest < FLATTEST:
            raise NearJump
        self.turning = math.sin(case.nearer_by) / flattest**3
        return max(1.0, float((torch.sin(angles - case.nearer_by).abs() / torch.sin(angles)).amax()))

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
            self._far((dense.penalised(self.left_out) - dense.aim) / self.steep, others)
        if self.keeps_lengths and bool((dense.norm == 0).any()):
            raise NearJump  # ‖x‖ has no slope at 0
        self._past_pi(share)
        if self.case.margin == "MagFace":
            for end in (self.case.settings["l_a"], self.case.settings["u_a"]):
                self._far(dense.norm / end - 1, torch.ones_like(dense.norm, dtype=torch.bool))

    def _past_pi(self, share: Tensor) -> None:
        """Of a target at π, of an easy margin at a right angle; a cosine of nothing is 0 to the last bit."""
        dense, s = self.dense, self.dense.settings
        mine = (share > 0) & (dense.norm > 0)[:, None]
        if s.get("past_pi", "monotonic") in ("sine", "joined"):
            added = s.get("m2", s.get("margin"))
            self._far(dense.own + math.cos(added), mine)
        if s.get("easy_margin"):
            self._far(dense.own, mine)

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
        if self.keeps_lengths:
            by_x, slope = 2 * total * slope, slope * norm
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
            + self.turning * (self.k + 3 * self.bounds.u_p)
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
        self.whole, self.case, self.results, self.bounds = case, case.at(0), results, Bounds(case)
        self.weight, self.bias, self.offset, self.centers, self.state = self.parameters([r["before"] for r in results])
        self.rules: dict[str, tuple[Any, Any]] = {}
        self.theirs: dict[str, TorchRule] = {}
        self.allowed: dict[str, Tensor] = {}  # errors of rows that make their steps late, and of those in float32
        self.early_off: dict[str, Tensor] = {}
        self.master = self.weight.clone()
        self.class_weights, self.forwards, self.neighbours = class_weights_of(case), 0, None
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
        every = self.case.sample_rate == 1 or self.case.corrected
        others = max(1, (self.case.classes if every else self.window) - 1)
        own, other = (s["scale"] * (2 * 0.5 ** s["t"] - 1 + sign * s["margin"]) + b for sign in (-1, 1))
        pull, push = s["balance"] / (1 + math.exp(own)), (1 - s["balance"]) * others / (1 + math.exp(-other))
        assert math.isclose(pull, push, rel_tol=1e-4), f"the offset {b} does not balance"

    @property
    def window(self) -> int:
        """Classes that a forward draws; those of the last block may be none."""
        return max(1, round(self.case.sample_rate * -(-self.case.classes // self.case.block))) * self.case.block

    def run(self) -> float:
        for step in range(self.case.steps):
            self.step(step, [r["steps"][step] for r in self.results])
        if self.case.skipped == "dense":
            self.check_end([r["end"] for r in self.results])
        return self.bounds.worst

    def step(self, step: int, found: list[Numbers]) -> None:
        case = self.case = self.whole.at(step)
        if case.change and step == 1:
            self.check_change(f"step {step}", [f["changed"] for f in found])
        self.rate = case.lr_of(step)
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
        if case.sample_rate < 1 and case.skipped == "still":
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
        dense = Losses(case, bounds, x, w, self.state, self.class_weights)  # type: ignore[arg-type]
        if case.corrected:
            rate = self.window / (-(-case.classes // case.block) * case.block)
            dense.dense.taken = taken_with(chosen, self.always(batch), rate)
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
        shards = case.ranks // case.replicas
        chunk = -(-case.classes // shards)
        for rank, f in enumerate(found):
            shard = rank % shards
            assert all(min(shard * chunk, case.classes) <= c < (shard + 1) * chunk for c in f["selected"]), (
                f"{what}: not rank {rank}'s rows"
            )
        if case.sample_rate == 1:
            assert len(chosen) == case.classes
            return chosen
        if case.hard and self.forwards and self.forwards % case.hard_every == 0:
            self.neighbours = self.search()
        self.forwards += 1
        always = self.always(batch)
        assert bool(torch.isin(always, chosen).all()), f"{what}: a positive, or a hard negative, was not selected"
        whole = case.classes if self.window >= case.classes else self.window - (-case.classes % case.block)
        low, high = max(whole, len(always)), min(self.window + len(always), case.classes)
        assert low <= len(chosen) <= high, f"{what}: {len(chosen)} classes are selected, the window has {self.window}"
        drawn = chosen[~torch.isin(chosen, always)] // case.block  # blocks are drawn whole
        of_blocks = torch.arange(case.classes)[torch.isin(torch.arange(case.classes) // case.block, drawn)]
        assert bool(torch.isin(of_blocks, chosen).all()), f"{what}: a part of a block was drawn"
        return chosen

    def always(self, batch: Batch) -> Tensor:
        """Classes that take part whatever is drawn: those of the batch, and their hard negatives."""
        positives = batch.labels[batch.labels != self.case.ignore].unique()
        if self.neighbours is None:
            return positives
        return torch.cat((positives, self.neighbours[positives].flatten())).unique()

    def search(self) -> Tensor:
        """`[C, K]`: the nearest other classes of each class; NearJump where the K-th is as near as the next."""
        rows = unit(self.weight.detach())[0].reshape(len(self.weight), -1, self.case.width)
        cosines = torch.einsum("iad,jbd->ijab", rows, rows).amax((2, 3)).fill_diagonal_(-2.0)
        best = cosines.topk(min(self.case.hard + 1, len(cosines) - 1), dim=1)
        if best.values.shape[1] > self.case.hard:
            gap = best.values[:, self.case.hard - 1] - best.values[:, self.case.hard]
            rounded = self.bounds.u if self.case.weight_dtype == "float64" else max(self.bounds.u, UNIT["float32"])
            if bool((gap < 16 * (self.case.width + 16) * rounded).any()):
                raise NearJump
        return best.indices[:, : self.case.hard]

    def drawn(self, found: list[Numbers], batch: Batch, chosen: Tensor, x: Tensor, w: Tensor) -> Tensor | None:
        """`[N, S]`: margins that ElasticFace drew for each sample's targets; draws are its own, what is made of them is
        compared."""
        case = self.case
        if case.margin != "ElasticFace":
            return None
        flat = numpy.concatenate([f["drawn"] for f in found[:: case.ranks // case.replicas]])
        if not case.settings["plus"]:
            for f in found:
                assert case.replicas > 1 or numpy.array_equal(f["drawn"], flat)
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
        late = case.skipped == "dense"
        for name, before, now, grad, off in (
            ("weight", old[0], self.weight, sums.weight, sums.weight_off.view(-1, *[1] * (old[0].ndim - 1))),
            ("bias", old[1], self.bias, sums.bias, sums.bias_off),
            ("offset", old[2], self.offset, sums.offset, torch.tensor([sums.offset_off])),
        ):
            if before is None:
                continue
            at = torch.tensor([0]) if name == "offset" else rows
            moving = torch.arange(len(before)) if late else at
            start = self.master if name == "weight" and case.low == "master" else before
            expected, size = self.moved(name, start, grad, moving)
            u = max(bounds.u_w, UNIT["float32"]) if case.low is None and name != "offset" else UNIT["float32"]
            u = bounds.u_w if case.weight_dtype == "float64" else u
            clipped = (
                0.0 if case.clip is None else (grad.numel() + 64) * UNIT["float32"] * (case.weight_dtype != "float64")
            )
            allowed = 16 * case.steps * (u * (start.abs() + size) + (clipped + (u if case.clip else 0.0)) * size)
            if late and case.optimizer == "adamw":
                allowed = allowed + LATE_ADAM * size
            if case.low is not None and name != "offset":
                allowed = allowed + 2 * bounds.u_w * (start.abs() + size)
            if case.early:
                self.early_off[name] = case.momentum * self.early_off.get(name, torch.zeros_like(off)) + off
                allowed = allowed + self.rate * self.early_off[name]
            if name == "weight" and case.low == "master":
                self.master = expected
            before_it = self.allowed.get(name, torch.zeros_like(before))
            allowed = allowed + before_it
            bounds.near(f"{what}: {name} after it", now[at], expected[at], allowed[at])
            if late and name != "offset":  # the others lie where they were, and move when they are next used
                self.allowed[name] = allowed.index_fill(0, at, 0.0)
                now.copy_(expected.index_copy(0, at, now[at]))
            if (
                name == "weight" and case.low == "master"
            ):  # nobody sees its error; gradients are clipped in their own dtype
                clipping = bounds.u_w * size if case.clip else 0.0
                self.allowed[name] = before_it + 16 * u * (start.abs() + size) + clipping

    def moved(self, name: str, w: Tensor, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(what the optimizer makes of rows, the size of what it adds), by its formulas."""
        case, out = self.case, w.clone()
        if case.skipped == "dense":
            if name not in self.theirs:
                self.theirs[name] = TorchRule(case)
            self.theirs[name].step(out, grad, self.rate)
        if case.optimizer == "adamw":
            rule, _ = self.rules.setdefault(name, (DenseAdamW(self.rate, weight_decay=case.decay), None))
            rule.lr = self.rate
            if case.skipped != "dense":
                rule.step(out, grad, rows)
            return out, torch.full_like(w, 4 * self.rate)
        rule, sizes = self.rules.setdefault(
            name, tuple(DenseSGD(self.rate, case.momentum, case.decay) for _ in range(2))
        )
        rule.lr = sizes.lr = self.rate
        if case.skipped != "dense":
            rule.step(out, grad, rows)
        sizes.step(w.abs(), grad.abs(), rows)  # the same sums of absolute values
        return out, 2 * self.rate * sizes.buffer

    def check_end(self, found: list[Numbers]) -> None:
        """All rows where torch's optimizer over all rows has them."""
        weight, bias, *_ = self.parameters(found)
        for name, mine, expected in (("weight", weight, self.weight), ("bias", bias, self.bias)):
            if mine is not None:
                self.bounds.near(f"{name} at the end", mine, expected, self.allowed[name] + 0.0)

    def check_change(self, what: str, found: list[Numbers]) -> None:
        """Classes after a change, with their optimizer state."""
        case, bounds = self.whole, self.bounds
        before = {"weight": self.weight, "bias": self.bias}
        self.weight, self.bias, self.offset, _, _ = self.parameters(found)
        after = {"weight": self.weight, "bias": self.bias}
        if case.change == "expand":
            table = torch.cat((torch.eye(case.classes), torch.zeros(ADDED, case.classes))).double()
            self.class_weights = class_weights_of(self.case)
        else:
            mapping = torch.tensor(mapping_of(case))
            table = (mapping[None] == torch.arange(self.case.classes)[:, None]).double()
            if case.change == "remap-first":
                table *= table.cumsum(1) == 1
            table /= table.sum(1, keepdim=True)
            if self.class_weights is not None:
                self.class_weights = table @ self.class_weights

        def mixed(rows: Tensor) -> Tensor:
            return torch.einsum("ij,j...->i...", table, rows)

        old = slice(0, case.classes if case.change == "expand" else None)
        for name, rows in before.items():
            if rows is None:
                continue
            off = 4 * bounds.u_w * mixed(rows.abs())
            if name in self.allowed:
                self.allowed[name] = mixed(self.allowed[name])
                off = off + self.allowed[name]
            if case.skipped == "dense":  # all rows are up to date now
                self.allowed[name] = torch.zeros_like(after[name])
            elif case.change == "expand":
                assert torch.equal(after[name][old], rows), f"{what}: expand changed a {name}"
            bounds.near(f"{what}: {name} after the change", after[name][old], mixed(rows)[old], off[old])
            if name in self.early_off:
                self.early_off[name] = mixed(self.early_off[name])
            for rule in (*self.rules.get(name, ()), self.theirs.get(name)):
                if rule is not None:
                    rule.change(mixed)
        if case.low == "master":
            fresh = self.weight[case.classes :] if case.change == "expand" else self.weight[:0]
            self.master = torch.cat((mixed(self.master)[old], fresh))
        self.neighbours = self.search() if case.hard else None


class TorchRule:
    """torch's own optimizer over all rows, float64, one step at a time."""

    def __init__(self, case: Case) -> None:
        self.parameter: nn.Parameter | None = None
        self.case = case

    def step(self, w: Tensor, grad: Tensor, rate: float) -> None:
        """Move `w` in place."""
        case = self.case
        if self.parameter is None:
            self.parameter = nn.Parameter(w.clone())
            options: dict[str, Any] = {"lr": rate, "weight_decay": case.decay}
            if case.optimizer == "adamw":
                self.optimizer: torch.optim.Optimizer = torch.optim.AdamW([self.parameter], **options)
            else:
                options |= {"momentum": case.momentum, "nesterov": case.nesterov}
                self.optimizer = torch.optim.SGD([self.parameter], **options)
        self.optimizer.param_groups[0]["lr"] = rate
        self.parameter.data.copy_(w)
        self.parameter.grad = grad
        self.optimizer.step()
        w.copy_(self.parameter.detach())

    def change(self, mixed: Callable[[Tensor], Tensor]) -> None:
        assert self.parameter is not None
        state = self.optimizer.state.pop(self.parameter, {})
        self.parameter = nn.Parameter(mixed(self.parameter.detach()))
        self.optimizer.param_groups[0]["params"] = [self.parameter]
        self.optimizer.state[self.parameter] = {
            name: mixed(value) if isinstance(value, Tensor) and value.ndim else value for name, value in state.items()
        }


def check(case: Case, results: list[Numbers]) -> float:
    """The largest error as a share of what is allowed; AssertionError if one is larger, NearJump if there is no
    telling."""
    return Check(case, results).run()
