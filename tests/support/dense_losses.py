"""Dense losses in one process, float64, written from the papers' formulas. Shares no code with partial_fc.

    x       [N, D]      embeddings of the global batch
    w       [S, D]      rows of the selected classes; [S, K, D] with K sub-centers a class
    share   [N, S]      weight of each class in each sample, 0 where the sample has no such label; a plain label has
            weight 1
    cosines [N, S]      of x and w, the largest over sub-centers
    own     [N, S]      cosines of the samples' own classes, 0 elsewhere
    losses  [N]         before they are weighted by sample and reduced; class weights are in them
    taken   [S]         the probability with which each class takes part, where sums over other classes are corrected by it

`Loss(...)` is called once per training step, as a head is, and updates the margin's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# the papers' values, as far as tests leave them to the margin's own defaults
DEFAULTS: dict[str, dict[str, Any]] = {
    "Softmax": {},
    "NormFace": {"scale": 64.0},
    "ArcFace": {"scale": 64.0, "margin": 0.5},
    "CosFace": {"scale": 64.0, "margin": 0.35},
    "SphereFace": {"scale": 64.0, "margin": 1.35},
    "CombinedMargin": {"scale": 64.0},
    "SubCenterArcFace": {"scale": 64.0, "margin": 0.5},
    "CurricularFace": {"scale": 64.0, "margin": 0.5, "momentum": 0.01},
    "AdaFace": {"scale": 64.0, "margin": 0.4, "h": 0.333, "momentum": 0.01},
    "MagFace": {"scale": 64.0},
    "ElasticFace": {"scale": 64.0, "kind": "arc"},
    "AdaptiveMargin": {"scale": 64.0, "smallest": 0.05, "largest": 0.5, "exponent": 0.25},
    "SphereFace2": {"scale": 40.0, "margin": 0.4, "t": 3.0, "balance": 0.7},
}


def unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """(directions, lengths) of vectors `[..., D]`; no direction, and no gradient, where the length is 0."""
    length = v.norm(dim=-1, keepdim=True)
    some = length > 1e-12
    return torch.where(some, v / torch.where(some, length, 1.0), 0.0), length[..., 0]


def turned(cosine: Tensor, factor: float, added: float | Tensor) -> Tensor:
    """cos(factor · θ + added), continued monotonically: each further half turn is mirrored and lowered by 2; 1 below an
    angle of 0.

    At cosines of ±1 the angle's slope is infinite; the value is right there and has no gradient.
    """
    inside = cosine.abs() < 1
    angle = torch.where(inside, torch.acos(torch.where(inside, cosine, 0.0)), torch.acos(cosine.detach()))
    angle = factor * angle + added
    value = torch.cos(angle.clamp(min=0))
    for k in range(1, 6):
        value = torch.where(angle > k * math.pi, (-1) ** k * torch.cos(angle) - 2 * k, value)
    return value


def in_form(cosine: Tensor, factor: float, added: float, past_pi: str) -> Tensor:
    """cos(factor · θ + added), past π by the formula of that name: "plain" none, "sine" the ArcFace authors' code,
    "joined" WeSpeaker's."""
    if past_pi == "monotonic":
        return turned(cosine, factor, added)
    plain = torch.cos(factor * torch.acos(cosine) + added)
    if past_pi == "plain":
        return plain
    below = added * math.sin(math.pi - added) if past_pi == "sine" else 1 + math.cos(math.pi - added)
    return torch.where(cosine > math.cos(math.pi - added), plain, cosine - below)


def closer(cosine: Tensor, angle: float) -> Tensor:
    """cos(θ − angle); 2 − cos(θ − angle) below 0."""
    moved = torch.acos(cosine.clamp(-1 + 1e-15, 1 - 1e-15)) - angle
    return torch.where(moved < 0, 2 - torch.cos(moved), torch.cos(moved))


def similarity(z: Tensor, t: float) -> Tensor:
    """SphereFace2's g(z) = 2 ((z + 1)/2)^t − 1, odd around z = −1."""
    half = (z + 1) / 2
    return torch.where(half < 0, -2 * (-half).clamp(min=0) ** t, 2 * half.clamp(min=0) ** t) - 1


def share_of(
    labels: Tensor, classes: int, label_weights: Tensor | None = None, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """(share `[N, classes]` of labels `[N]` or `[N, L]`, whether a sample has a label that is not ignored `[N]`)."""
    labels = labels if labels.ndim == 2 else labels[:, None]
    weights = torch.ones_like(labels, dtype=torch.float64) if label_weights is None else label_weights
    share = torch.zeros(len(labels), classes, dtype=torch.float64)
    for i, row in enumerate(labels.tolist()):
        for place, label in enumerate(row):
            if label != ignore:
                share[i, label] += weights[i, place]
    return share, (labels != ignore).any(1)


def taken_of(chosen: Tensor, labels: Tensor, classes: int, rate: float) -> Tensor:
    """The probability with which each of the chosen classes takes part: 1 for those of the batch, else w/C."""
    return taken_with(chosen, labels, max(1, round(rate * classes)) / classes)


def taken_with(chosen: Tensor, labels: Tensor, share: float) -> Tensor:
    """The same with the share of the classes that are drawn."""
    return torch.full((len(chosen),), share, dtype=torch.float64).masked_fill_(torch.isin(chosen, labels), 1.0)


def reduced(
    losses: Tensor, worth: Tensor, reduction: str = "mean", of_class: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(the reduced loss, what each sample counts for in it `[N]`).

    worth `[N]`: weights of samples, 0 where ignored. of_class `[N]`: weights of their classes, which the losses have in
    them, and by whose sum a mean is divided.
    """
    total = (worth * of_class).sum()
    coefficient = worth
    if reduction == "mean":
        coefficient = worth / total if total > 0 else torch.zeros_like(worth)
    weighted = torch.where(coefficient != 0, losses, 0.0) * coefficient
    return (weighted if reduction == "none" else weighted.sum()), coefficient


@dataclass
class Loss:
    """name: of the margin, with its arguments in `settings`. state: of the margin, moved by each call."""

    name: str = "ArcFace"
    settings: dict[str, Any] = field(default_factory=dict)
    smoothing: float = 0.0
    reduction: str = "mean"
    beyond: float | None = None  # cosine beyond which another class is skipped
    class_weights: Tensor | None = None  # of all classes
    state: dict[str, float] = field(default_factory=lambda: {"t": 0.0, "mean": 20.0, "std": 100.0})
    taken: Tensor | None = None  # of the last call
    nearest: int = 0  # how many of the nearest other classes count as nearer
    nearer_by: float = 0.0  # radians

    def __post_init__(self) -> None:
        self.settings = {**DEFAULTS[self.name], **self.settings}
        self.scale = self.settings.get("scale", 1.0)

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        offset: Tensor | None = None,
        drawn: Tensor | None = None,
        sample_weights: Tensor | None = None,
        taken: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss.

        labels: positions in w, `[N]` int64, negative where ignored; or the share of each row of w, `[N, S]` float64.
        classes `[S]`: global ids of w, None for all in order. offset: SphereFace2's. drawn `[N]`: ElasticFace's
        margins.
        """
        share = labels
        if not labels.is_floating_point():
            share, _ = share_of(labels.clamp(min=-1), len(w), ignore=-1)
        classes = torch.arange(len(w)) if classes is None else classes
        self.taken = taken
        losses = self.losses(x, w, share, classes, bias, offset, None if drawn is None else drawn[:, None])
        worth = (share > 0).any(1).double()
        if sample_weights is not None:
            worth = worth * sample_weights
        return reduced(losses, worth, self.reduction, self.class_weight(share, classes))[0]

    def class_weight(self, share: Tensor, classes: Tensor) -> Tensor:
        """`[N]`: the mean weight of each sample's classes."""
        if self.class_weights is None:
            return torch.ones(len(share), dtype=torch.float64)
        total = share.sum(1)
        return (share @ self.class_weights[classes]) / torch.where(total > 0, total, 1.0)

    def losses(
        self,
        x: Tensor,
        w: Tensor,
        share: Tensor,
        classes: Tensor,
        bias: Tensor | None = None,
        offset: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """`[N]`. drawn: broadcast to `[N, S]`. What it goes through stays in the attributes."""
        hit = share > 0
        of_class = self.class_weight(share, classes)
        if self.name == "Softmax":
            self.logits = x @ w.T + (0.0 if bias is None else bias)
            return self.softmax(self.logits, share, torch.zeros_like(hit), classes)
        directions, self.norm = unit(x)
        rows, self.row_norm = unit(w)
        self.by_center = torch.einsum("nd,skd->nsk", directions, rows.reshape(len(w), -1, x.shape[1]))
        self.cosines = self.by_center.amax(2)
        own = torch.where(hit, self.cosines, 0.0)
        self.own = torch.where(own.abs() > 1 - 1e-15, own.detach().clamp(-1, 1), own)  # no gradient at 0 and π
        self.margined = self.target(self.own, hit, classes, drawn)
        skipped = torch.zeros_like(hit) if self.beyond is None else (self.cosines > self.beyond) & ~hit
        others = self.rule(self.penalised(hit | skipped), self.margined, share)
        if self.name == "SphereFace2":
            return of_class * self.binary(
                self.scale * self.margined + offset, self.scale * others + offset, share, skipped
            )
        factor: Any = self.scale
        if not self.settings.get("normalize_embeddings", True):
            factor = self.scale * self.norm[:, None]
        losses = self.softmax(factor * torch.where(hit, self.margined, others), share, skipped, classes)
        return losses + of_class * self.penalty() if self.name == "MagFace" else losses

    def softmax(self, logits: Tensor, share: Tensor, skipped: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy over the classes that are not skipped, with label smoothing over the same:
        (1 − ε) w_y nll + ε/C Σ_c w_c (−log p_c), as torch.nn.functional.cross_entropy(weight=, label_smoothing=)."""
        each = logits if self.taken is None else torch.where(share > 0, logits, logits - self.taken.log())
        log_p = torch.where(skipped, 0.0, logits) - each.masked_fill(skipped, -math.inf).logsumexp(1, keepdim=True)
        log_p = torch.where(skipped.all(1, keepdim=True), 0.0, log_p)
        of_classes = torch.ones(len(classes)) if self.class_weights is None else self.class_weights[classes]
        even = torch.where(skipped, 0.0, of_classes * log_p).sum(1) / (~skipped).sum(1).clamp(min=1)
        own = torch.where(share > 0, share * log_p, 0.0).sum(1) * self.class_weight(share, classes)
        return -(1 - self.smoothing) * own - self.smoothing * even

    def binary(self, own: Tensor, others: Tensor, share: Tensor, skipped: Tensor) -> Tensor:
        """SphereFace2: a decision for each class (arXiv 2108.01513, equations 5 to 8)."""
        balance, r = self.settings["balance"], self.scale
        zero = torch.zeros((), dtype=own.dtype)
        of_own = torch.where(share > 0, share * torch.logaddexp(-own, zero), 0.0).sum(1)
        each = torch.logaddexp(others, zero) / (1.0 if self.taken is None else self.taken)
        of_others = torch.where((share > 0) | skipped, 0.0, each).sum(1)
        return balance / r * of_own + (1 - balance) / r * of_others

    def penalised(self, left_out: Tensor) -> Tensor:
        """Cosines `[N, S]`; of the nearest classes that are not left out, cos(θ − penalty) (arXiv 2110.05042)."""
        if not self.nearest:
            return self.cosines
        candidates = self.cosines.detach().masked_fill(left_out, -math.inf)
        found = candidates.topk(min(self.nearest, candidates.shape[1]), dim=1)
        chosen = torch.zeros_like(left_out).scatter_(1, found.indices, found.values > -math.inf)
        return torch.where(chosen, closer(self.cosines, self.nearer_by), self.cosines)

    def rule(self, cosines: Tensor, margined: Tensor, share: Tensor) -> Tensor:
        """What other classes' cosines become."""
        if self.name == "SphereFace2":
            if self.settings.get("kind") == "arc":
                return similarity(closer(cosines, self.settings["margin"]), self.settings["t"])
            return similarity(cosines.clamp(-1, 1), self.settings["t"]) + self.settings["margin"]
        if self.name != "CurricularFace":
            return cosines
        total = share.sum(1, keepdim=True)
        of_own = (torch.where(share > 0, margined.detach(), 0.0) * share).sum(1, keepdim=True)
        self.aim = of_own / torch.where(total > 0, total, 1.0)
        return torch.where(cosines > self.aim, cosines * (self.state["t"] + cosines), cosines)

    def penalty(self) -> Tensor:
        """MagFace's, `[N]`: short embeddings cost."""
        s = self.settings
        length = self.norm.clamp(s["l_a"], s["u_a"])
        return s["penalty_weight"] * (length / s["u_a"] ** 2 + 1 / length)

    def target(self, own: Tensor, hit: Tensor, classes: Tensor, drawn: Tensor | None) -> Tensor:
        """`[N, S]`: cosines of own classes after the margin; moves the margin's state."""
        name, s = self.name, self.settings
        norms = self.norm[:, None].expand(own.shape)
        if name == "AdaFace":
            margin = s["margin"] * self.adaface_z(norms.detach().clamp(0.001, 100), hit)
            return turned(own, 1.0, -margin) - s["margin"] - margin
        if name == "MagFace":
            rise = (s["u_m"] - s["l_m"]) / (s["u_a"] - s["l_a"])
            return turned(own, 1.0, s["l_m"] + rise * (norms.clamp(s["l_a"], s["u_a"]) - s["l_a"]))
        if name == "ElasticFace":
            assert drawn is not None
            return turned(own, 1.0, drawn) if s["kind"] == "arc" else own - drawn
        if name == "AdaptiveMargin":
            rare = torch.as_tensor(s["class_counts"], dtype=torch.float64).clamp(min=1) ** -s["exponent"]
            spread = rare.max() - rare.min()
            place = (rare - rare.min()) / spread if spread > 0 else torch.ones_like(rare)
            table = s["smallest"] + (s["largest"] - s["smallest"]) * place
            return turned(own, 1.0, table.float().double()[classes])  # the table is held in float32
        if name == "SphereFace2":
            if s.get("kind") == "arc":
                return similarity(turned(own, 1.0, s["margin"]), s["t"])
            return similarity(own, s["t"]) - s["margin"]
        if name == "CurricularFace" and bool(hit.any()):
            mean = float(own.detach()[hit].mean())
            self.state["t"] = s["momentum"] * mean + (1 - s["momentum"]) * self.state["t"]
        m1, m2, m3 = {
            "SphereFace": (s.get("margin"), 0.0, 0.0),
            "CosFace": (1.0, 0.0, s.get("margin")),
            "NormFace": (1.0, 0.0, 0.0),
            "CombinedMargin": (s.get("m1"), s.get("m2"), s.get("m3")),
        }.get(name, (1.0, s.get("margin"), 0.0))
        value = in_form(own, m1, m2, s.get("past_pi", "monotonic")) - m3
        if s.get("easy_margin"):
            value = torch.where(own > 0, value, own)
        if s.get("annealing"):
            value = (s["annealing"] * own + value) / (1 + s["annealing"])
        return own + (value - own).detach() if s.get("gradient") == "straight_through" else value

    def adaface_z(self, norms: Tensor, hit: Tensor) -> Tensor:
        """The normalised lengths after the running mean and deviation have taken in those of this batch."""
        rate, of_batch = self.settings["momentum"], norms[hit]
        if len(of_batch) > 1:
            self.state["std"] = rate * float(of_batch.std()) + (1 - rate) * self.state["std"]
        if len(of_batch):
            self.state["mean"] = rate * float(of_batch.mean()) + (1 - rate) * self.state["mean"]
        return (self.settings["h"] * (norms - self.state["mean"]) / (self.state["std"] + 1e-3)).clamp(-1, 1)
