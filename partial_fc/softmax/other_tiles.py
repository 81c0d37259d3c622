"""Gradients tile by tile where a step is not the usual one.

biases               their gradient beside that of the rows
label smoothing      what every row and every embedding gets (smoothing.py)
float16              products of numbers that are scaled (float16.py)
tiled mode           exponentials are computed again (recompute.py)
update_in_backward   the rows of a tile move as soon as their gradient is known: it has the memory of one tile
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.distributed.ranks import sum_over_replicas
from partial_fc.kernels.update import Through
from partial_fc.softmax import float16
from partial_fc.softmax.backward import BackwardTiles, Derivatives
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.recompute import recomputed


class OtherTiles(BackwardTiles):
    """As `BackwardTiles`. bias `[C_local]`, or None."""

    def __init__(
        self, d: Derivatives, weight: Tensor, bias: Tensor | None, saved: SavedTensors, state: ForwardState
    ) -> None:
        super().__init__(d, weight, saved, state)
        self.bias = bias
        if state.product_dtype is torch.float16:
            self.weighted_dtype = self.stats
        self.shares = None
        if state.smoothing is not None and d.d_every is not None:
            self.shares = state.smoothing.shares(d.d_every, saved.x, saved.row_sum, state.options.scale)
        self.scratch: Tensor | None = None

    def exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.saved.kept.numel():
            return super().exponentials(t, a, b, w)
        if self.scratch is None:
            x, state, ruled = self.saved.x, self.state, self.state.options.ruled
            work = state.product_dtype if state.bounded and not ruled else self.stats
            self.scratch = x.new_empty(len(x) * state.tile_size + 1, dtype=work)
            self.scaled = (x if ruled else x * state.options.scale).to(state.product_dtype)
        return recomputed(self.state, self.saved, self.d, self.scaled, self.scratch, t, a, b, w)

    def add_targets(self, dx: Tensor) -> None:
        super().add_targets(dx)
        if self.shares is not None:
            dx += self.shares.of_x

    def begin_rows(self) -> None:
        begin_update, count = self.state.sink.begin_update, self.state.row_tiles.count
        self.update = None if begin_update is None else begin_update()
        length = count if self.update is None else min(self.state.tile_size, count)
        self.dw = self.state.row_tiles.gradient_memory(length)
        self.db = None if self.bias is None else self.saved.x.new_empty(length)

    def write_rows(self, e: Tensor, factor: Tensor, weighted: Tensor, w: Tensor, a: int, b: int) -> None:
        dw, db = self.places_of(a, b)
        grad = self.product(e, weighted, a, b, dw)
        if db is None and self.moved_at_once(grad, a, b):
            return
        self.state.row_tiles.through_lengths(grad, w, a, b, dw)
        if db is not None:
            smoothed = 0.0 if self.shares is None else self.shares.of_biases(a, b)
            db.copy_(torch.mv(e.t().to(self.stats), factor[:, 0]) + smoothed)
        self.update_rows(dw, db, a, b)

    def places_of(self, a: int, b: int) -> tuple[Tensor, Tensor | None]:
        """Return the memory of the gradients of rows a to b, and of their biases."""
        at = slice(a, b) if self.update is None else slice(0, b - a)
        return self.dw[at], None if self.db is None else self.db[at]

    def update_rows(self, dw: Tensor, db: Tensor | None, a: int, b: int) -> None:
        """Move rows a to b, if they are moved in backward."""
        if self.update is not None:
            centers = self.state.options.margin.centers
            self.update(a // centers, b // centers, self._with_targets(dw, db, a))

    def product(self, e: Tensor, weighted: Tensor, a: int, b: int, out: Tensor) -> Tensor:
        if self.state.product_dtype is torch.float16:
            grad = float16.scaled_product(e, weighted)
        else:
            grad = super().product(e, weighted, a, b, out)
        if self.shares is not None:
            grad = grad.to(self.stats)
            self.shares.add_to_rows(grad, a, b)
        return grad

    def finish_rows(self) -> list[Tensor]:
        self.state.row_tiles.release(self.dw)
        if self.update is None:
            return self._with_targets(self.dw, self.db, 0)
        if not self.state.row_tiles.count:  # the optimizer's scalar state counts this step as on other ranks
            self.update(0, 0, self._with_targets(self.dw, self.db, 0))
        return []

    def _targets_in(self, a: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the places `[P]` of the targets among rows a, a + 1, ..., and ∂L/∂(target cosine), 0 where they are
        not among them."""
        targets, d_cosine = self.state.target_rows, self.d.d_cosine
        if length == self.state.row_tiles.count:
            return targets.row, d_cosine
        position = targets.row - a
        here = targets.own & (position >= 0) & (position < length)
        return position.remainder(length), d_cosine * here

    def moved_at_once(self, grad: Tensor, a: int, b: int) -> bool:
        """Return whether one kernel took the gradient by the directions of rows a to b through their lengths, with the
        targets' share, and moved the rows."""
        state, inverse = self.state, self.state.row_tiles.inverse
        kernels, centers = state.selection.kernels, state.options.margin.centers
        alone = state.selection.ranks.replica_group is None and centers == 1
        if self.update is None or inverse is None or kernels is None or not kernels.rows or not alone:
            return False

        def through() -> Through:
            position, d_cosine = self._targets_in(a, len(grad))
            return Through.of(inverse[a:b], position, state.target_rows.of_samples(self.saved.x) * d_cosine[:, None])

        return self.update(a, b, [grad], through)

    def _with_targets(self, dw: Tensor, db: Tensor | None, a: int) -> list[Tensor]:
        """Return the gradients of rows a, a + 1, ... with the targets' share in them, summed over replicas."""
        ranks = self.state.selection.ranks
        if len(dw):
            position, d_cosine = self._targets_in(a, len(dw))
            self.add_targets_to_rows(dw, position, d_cosine)
            if db is not None:
                self.state.row_tiles.add_at(db, position, d_cosine)
        grads = [self.over_replicas(dw)]
        if db is not None and self.bias is not None:
            grads.append(sum_over_replicas(db.to(self.bias.dtype), ranks, "the sum of class gradients"))
        return grads
