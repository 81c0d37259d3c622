"""Margins with state, rules for other classes, options of the loss: one process, dense, float64, written from the papers' formulas.

Shares no code with the core. `Dense(...)` is called once a step, as the head is, and moves its own state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import psi
from torch import Tensor


@dataclass
class Dense:
    """One loss over class rows `w [S, D]` or `[S, K, D]`. name: of the margin, with its arguments in `p`."""

    name: str
    p: dict[str, Any] = field(default_factory=dict)
    scale: float = 64.0
    smoothing: float = 0.0
    beyond: float | None = None  # cosine beyond which another class is left out
    class_weights: Tensor | None = None
    state: dict[str, float] = field(default_factory=lambda: {"t": 0.0, "mean": 20.0, "std": 100.0})

    def __call__(self, x: Tensor, w: Tensor, labels: Tensor, classes: Tensor, drawn: Tensor | None = None) -> Tensor:
        """The mean loss. labels `[N]`: positions in w, -100 where ignored; classes `[S]`: global ids of w; drawn `[N]`: random margins."""
        valid = labels >= 0
        if not bool(valid.any()):
            return (x.sum() + w.sum()) * 0.0
        norm = x.norm(dim=1)
        unit_x, unit_w = x / norm[:, None], w / w.norm(dim=-1, keepdim=True)
        cosines = unit_x @ unit_w.T if w.ndim == 2 else torch.einsum("nd,skd->nsk", unit_x, unit_w).amax(2)
        x, norm, cosines, labels = x[valid], norm[valid], cosines[valid], labels[valid]
        target = cosines.gather(1, labels[:, None])[:, 0]
        with_margin = self.target(target, norm, classes[labels], None if drawn is None else drawn[valid])
        others = cosines
        if self.name == "curricular":
            harder = cosines > with_margin[:, None]
            others = torch.where(harder, cosines * (self.state["t"] + cosines), cosines)
        hit = torch.nn.functional.one_hot(labels, len(w)).bool()
        logits = self.scale * torch.where(hit, with_margin[:, None], others)
        out = torch.zeros_like(hit) if self.beyond is None else (cosines > self.beyond) & ~hit
        log_p = torch.where(out, 0.0, logits) - logits.masked_fill(out, -math.inf).logsumexp(1, keepdim=True)
        even = torch.where(out, 0.0, log_p).sum(1) / (~out).sum(1)
        losses = -(1 - self.smoothing) * log_p.gather(1, labels[:, None])[:, 0] - self.smoothing * even
        if self.name == "magface":
            a = norm.clamp(self.p["l_a"], self.p["u_a"])
            losses = losses + self.p["penalty_weight"] * (a / self.p["u_a"] ** 2 + 1 / a)
        if self.class_weights is None:
            return losses.mean()
        weights = self.class_weights[classes[labels]]
        return (losses * weights).sum() / weights.sum()

    def target(self, cosine: Tensor, norm: Tensor, classes: Tensor, drawn: Tensor | None) -> Tensor:
        p = self.p
        if self.name in ("arcface", "subcenter"):
            return psi(cosine, 1.0, p["margin"], 0.0)
        if self.name == "sphereface":
            return psi(cosine, p["margin"], 0.0, 0.0)
        if self.name == "curricular":
            self.state["t"] = p["momentum"] * float(cosine.detach().mean()) + (1 - p["momentum"]) * self.state["t"]
            return psi(cosine, 1.0, p["margin"], 0.0)
        if self.name == "adaface":
            clipped = norm.detach().clamp(0.001, 100)
            rate = p["momentum"]
            if len(clipped) > 1:
                self.state["std"] = rate * float(clipped.std()) + (1 - rate) * self.state["std"]
            self.state["mean"] = rate * float(clipped.mean()) + (1 - rate) * self.state["mean"]
            z = ((clipped - self.state["mean"]) / (self.state["std"] + 1e-3) * p["h"]).clamp(-1, 1)
            angle = torch.acos(cosine) - p["margin"] * z
            value = torch.where(angle > math.pi, -torch.cos(angle) - 2, torch.cos(angle.clamp(min=0)))
            return value - p["margin"] * (1 + z)
        if self.name == "magface":
            a = norm.clamp(p["l_a"], p["u_a"])
            margins = p["l_m"] + (p["u_m"] - p["l_m"]) / (p["u_a"] - p["l_a"]) * (a - p["l_a"])
            return turned(cosine, margins)
        if self.name == "elastic-arc":
            assert drawn is not None
            return turned(cosine, drawn)
        if self.name == "elastic-cos":
            assert drawn is not None
            return cosine - drawn
        assert self.name == "adaptive"
        counts = torch.as_tensor(p["class_counts"], dtype=torch.float64).clamp(min=1)
        rare = counts.rsqrt().sqrt()
        share = (rare - rare.min()) / (rare.max() - rare.min())
        return turned(cosine, (0.05 + 0.45 * share).float().double()[classes])  # the table is held in float32


def turned(cosine: Tensor, margins: Tensor) -> Tensor:
    """cos(θ + m), one m a sample, mirrored past π."""
    angle = torch.acos(cosine) + margins
    return torch.where(angle > math.pi, -torch.cos(angle) - 2, torch.cos(angle))
