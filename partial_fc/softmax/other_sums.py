"""Sums over the logits of this rank where a step is not the usual one.

biases, corrections of sampling    added to the products of a tile
slots                              pads among the rows of a sampled forward, elsewhere than on a CPU (draws.py)
further sums                       of logits not bounded, or ruled; smoothing; decisions; metrics (further_sums.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.biases import biases_of
from partial_fc.softmax.forward import ForwardState, TileSums
from partial_fc.softmax.further_sums import FurtherSums
from partial_fc.softmax.tiles import new_tile, tile_logits


class OtherSums(TileSums):
    """As `TileSums`. further: whatever else is to be found, or None."""

    def __init__(self, x: Tensor, state: ForwardState, keep: bool, in_place: bool) -> None:
        super().__init__(x, state, keep)
        options, self.samples = state.options, len(x)
        if options.binary:
            self.total.zero_()
        self.scratch = None
        if not in_place:  # others than bounded exponentials are computed in the dtype of the statistics
            work = state.product_dtype if state.bounded and not options.ruled else x.dtype
            self.memory = self.scratch = x.new_empty(len(x) * state.tile_size + 1, dtype=work)
        if options.ruled:
            self.scaled = x.to(state.product_dtype)
        self.further: FurtherSums | None = None
        tiles = -(-state.row_tiles.count // state.tile_size)
        if options.ruled or options.binary or options.metrics or state.smoothing is not None or not state.bounded:
            of_others = state.rule, state.smoothing, state.selection.correction, state.bounded
            self.further = FurtherSums(x, options, state.target_rows, *of_others, kept=tiles if keep else 0)

    def add(self, t: int, a: int, b: int) -> None:
        """Add tile t: rows a to b."""
        state = self.state
        w = state.row_tiles.directions(a, b, state.product_dtype if state.smoothing is None else self.stats)
        bias = None if state.row_tiles.bias is None else biases_of(state.row_tiles, slice(a, b))
        kept = new_tile(self.kept, t, self.samples, state.tile_size, b - a) if self.keep else None
        where = kept if self.scratch is None else new_tile(self.scratch, 0, self.samples, state.tile_size, b - a)
        assert where is not None
        added = bias if state.selection.correction is None else state.selection.correction.in_product(bias, a, b)
        values = tile_logits(self.scaled, w.to(state.product_dtype), added, where)
        if not state.options.ruled:
            self.memory.index_fill_(0, state.places[t], -torch.inf)  # targets count with their margin elsewhere
            if state.selection.slots is not None:
                state.selection.slots.mask(values, a, b)
        if self.further is None:
            total = values.exp_().sum(1, keepdim=True, dtype=self.stats)
            self.total = total if t == 0 else self.total.add_(total)
        else:
            values, self.total = self.further.add(t, values, self.total, w, bias, a, b)
        if kept is not None and values is not kept:
            kept.copy_(values)
