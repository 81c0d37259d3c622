"""Tiles of exponentials that were not kept, computed again in backward by the forward's own steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.softmax import float16
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.ruled import ruled_gradient
from partial_fc.softmax.tiles import tile_logits


def recomputed(
    state: ForwardState, saved: SavedTensors, d: Any, scaled: Tensor, scratch: Tensor, a: int, b: int, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (e `[N, T]`, factor `[N, 1]`) of rows a to b: ∂L/∂logit = e · factor where the logit is no target.

    d: `Derivatives`. scaled: `[N, D]`, what the rows' directions w `[T, D]` are multiplied by. scratch: `[N, T]`.
    """
    lse = saved.lse[:, None]
    logits = tile_logits(scaled, w, state.rows.tile_bias(a, b), scratch)
    if state.options.ruled:
        return ruled_gradient(
            logits, a, state.options, state.rule, state.targets, lse, d.d_lse, d.d_every, state.smoothing,
            state.product,
        )  # fmt: skip
    state.targets.mask(logits, a)
    if state.bounded:
        return logits.exp_().to(state.product), d.from_zero
    if state.product is not torch.float16:
        return logits.sub_(lse).exp_().to(state.product), d.d_lse
    e, factor = float16.scaled_exponentials(logits, lse)
    return e, d.d_lse * factor
