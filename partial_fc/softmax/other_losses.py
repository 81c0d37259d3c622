"""Losses that are not lse − z of a sample's one target: binary decisions, label smoothing, several or weighted labels,
a margin's penalty; and logits that are not bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.margins.base import Margin
from partial_fc.softmax.decisions import decision_losses
from partial_fc.softmax.inputs import Selection
from partial_fc.softmax.penalty import penalty_of
from partial_fc.softmax.smoothing import Smoothing


def other_losses(
    found: dict[str, Tensor],
    target_logits: Tensor,
    selection: Selection,
    margin: Margin,
    smoothing: Smoothing | None,
    norms: Tensor,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (losses `[N]`, lse `[N]`, what backward needs of label smoothing and of a penalty, or empty).

    found: what the ranks combined, by name. target_logits `[N, L]`. norms `[N]`: lengths of the embeddings. For binary
    decisions Σ sigmoid of the other classes' logits stands for lse.
    """
    smoothed = slope_penalty = norms.new_empty(0)
    if margin.binary:
        losses, lse = decision_losses(selection, margin.binary, target_logits, found["total"]), found["active"]
    else:
        lse = _lse(found, target_logits, selection)
        if selection.counts_once:
            losses = lse - target_logits[:, 0]
        else:
            losses = (selection.targets.weights * (lse[:, None] - target_logits)).sum(1)
    if smoothing is not None:
        smoothed = smoothing.combined(found)
        losses = smoothing.losses(losses, lse, found["logits"], smoothed)
    if margin.has_penalty:
        penalty, slope_penalty = penalty_of(margin, norms, needs_grad, smoothing)
        losses = losses + penalty
    return losses, lse, smoothed, slope_penalty


def _lse(found: dict[str, Tensor], target_logits: Tensor, selection: Selection) -> Tensor:
    """Return log Σ exp over all selected classes `[N]`."""
    lse = found["total"].log()
    if "maximum" in found:
        lse = lse + found["maximum"]
    if target_logits.shape[1] == 1:
        return torch.logaddexp(lse, target_logits[:, 0])
    of_targets = torch.where(selection.targets.exists, target_logits, -torch.inf)
    lse = torch.cat((lse[:, None], of_targets), 1).logsumexp(1)
    return torch.where(lse == -torch.inf, 0.0, lse)  # an ignored sample behind a filter may have no class; NaN stays
