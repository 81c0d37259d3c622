"""Derivatives of losses that are not −log of one probability: binary decisions, label smoothing, several or weighted
labels; and those by the embeddings' lengths. Names are those of backward.py, which has the equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.decisions import decision_derivatives
from partial_fc.softmax.forward import ForwardState, SavedTensors


def other_derivatives(
    d_loss: Tensor, saved: SavedTensors, state: ForwardState
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return d_lse `[N, 1]`, d_z `[N, L]` of the targets, d_every `[N]`, d_offset `[1]` from ∂L/∂loss_i `[N]`."""
    selection, binary, smoothing = state.selection, state.options.binary, state.smoothing
    z, lse = saved.target_logits, saved.lse[:, None]
    d_offset = d_every = None
    if binary:
        d_lse, d_z, d_offset = decision_derivatives(selection, binary, d_loss, z, saved.lse)
    else:
        weights, d_lse = selection.targets.weights, d_loss
        if smoothing is not None:
            weights, of_all = smoothing.counted(weights, saved.smoothed)
            d_lse = d_loss * (weights.sum(1) + of_all)
        elif not selection.counts_once:
            d_lse = d_loss * weights.sum(1)
        d_lse = d_lse[:, None]
        d_z = d_lse * (z - lse).exp_() - d_loss[:, None] * weights
    if smoothing is not None:
        d_every = smoothing.of_every(d_loss, saved.smoothed)
        d_z = d_z + d_every[:, None] * smoothing.of_targets
    if z.shape[1] > 1 or binary:  # with one target a sample, d_loss is 0 where there is none
        d_z = torch.where(state.target_rows.exists, d_z, 0.0)
    return d_lse, d_z, d_every, d_offset


def length_derivatives(d_loss: Tensor, d_z: Tensor, saved: SavedTensors, state: ForwardState) -> Tensor | None:
    """Return ∂L/∂‖X‖ `[N]` by a margin that depends on lengths, or has a penalty of them; over ‖X‖ where x is X itself.

    d_z: `[P]`.
    """
    d_norm = None
    if saved.slope_norm.numel():
        d_norm = state.target_rows.sum_of_samples(d_z * saved.slope_norm)
    if saved.slope_penalty.numel() and state.selection.ranks.rank == 0:  # every sample's own; summed over ranks later
        of_penalty = d_loss * saved.slope_penalty
        d_norm = of_penalty if d_norm is None else d_norm + of_penalty
    if d_norm is None or state.options.margin.takes_cosines:
        return d_norm
    return d_norm * saved.x_inverse[:, 0]
