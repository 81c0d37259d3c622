"""Tiles of exponentials that were not kept, computed again in backward by the forward's own steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.softmax import float16
from partial_fc.softmax.biases import biases_of
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.ruled import ruled_gradient
from partial_fc.softmax.tiles import new_tile, tile_logits


def recomputed(
    state: ForwardState, saved: SavedTensors, d: Any, scaled: Tensor, scratch: Tensor, t: int, a: int, b: int, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (e `[N, T]`, factor `[N, 1]`) of tile t, rows a to b: ∂L/∂logit = e · factor where the logit is no target.

    d: `Derivatives`. scaled: `[N, D]`, what the rows' directions w `[T, D]` are multiplied by. scratch: of a tile.
    """
    lse = saved.lse[:, None]
    ruled, correction = state.options.ruled, state.selection.correction
    bias = None if state.row_tiles.bias is None else biases_of(state.row_tiles, slice(a, b))
    if correction is not None and not ruled:
        bias = correction.with_bias(bias, a, b)
    logits = tile_logits(scaled, w, bias, new_tile(scratch, 0, len(saved.x), state.tile_size, b - a))
    if ruled:
        return ruled_gradient(
            logits, a, state.options, state.rule, state.target_rows, lse, d.d_lse, d.d_every, state.smoothing,
            correction, state.product_dtype,
        )  # fmt: skip
    scratch.index_fill_(0, state.places[t], -torch.inf)
    if state.selection.slots is not None:
        state.selection.slots.mask(logits, a, b)
    if state.bounded:
        return logits.exp_().to(state.product_dtype), d.d_total
    if state.product_dtype is not torch.float16:
        return logits.sub_(lse).exp_().to(state.product_dtype), d.d_lse
    e, factor = float16.scaled_exponentials(logits, lse)
    return e, d.d_lse * factor
