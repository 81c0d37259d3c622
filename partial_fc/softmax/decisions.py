"""Margins that take every class for a binary decision (SphereFace2) instead of one softmax over all.

loss_i = a Σ_l weight_il softplus(−z_il) + b Σ_j softplus(z_ij) over the other selected classes,   (a, b) =
margin.binary
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.distributed.ranks import Ranks, sum_over_replicas
from partial_fc.softmax.inputs import Selection


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp x), to the last digit of float64; torch's own is x from 20 on."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def decision_losses(
    selection: Selection, weights: tuple[float, float], target_logits: Tensor, of_others: Tensor
) -> Tensor:
    """Return losses `[N]`. target_logits `[N, L]`; of_others `[N]`: Σ softplus of the other classes' logits."""
    own = (selection.targets.weights * softplus(-target_logits)).sum(1)
    return weights[0] * own + weights[1] * of_others


def decision_derivatives(
    selection: Selection, weights: tuple[float, float], d_loss: Tensor, target_logits: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂L/∂(Σ softplus of others) `[N, 1]`, ∂L/∂(target logit) `[N, L]`, ∂L/∂offset `[1]`.

    d_loss `[N]`: ∂L/∂loss_i. active `[N]`: Σ sigmoid of the other classes' logits; the offset is added to every logit.
    """
    a, b = weights
    d_others = d_loss * b
    d_target = -d_loss[:, None] * a * selection.targets.weights * torch.sigmoid(-target_logits)
    d_offset = torch.where(selection.targets.ids >= 0, d_target, 0.0).sum() + (d_others * active).sum()
    return d_others[:, None], d_target, d_offset[None]


def offset_gradient(d_offset: Tensor, ranks: Ranks) -> Tensor:
    """Return it over all samples: a rank knows all it is made of, but for the samples of other replicas."""
    return sum_over_replicas(d_offset, ranks, "the gradient of the offset")
