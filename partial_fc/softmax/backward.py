"""The backward of the sharded cross-entropy. L is the objective; every name `d_…` is ∂L/∂… .

For a logit z_ij = s x_i·w_j of a class that is no target, with p_ij = exp(z_ij − lse_i):

    d_lse_i   = d_loss_i ((1 − ε) Σ_l weight_il + ε)       [N]      ε: label smoothing (smoothing.py)
    d_z_ij    = d_lse_i p_ij − d_loss_i ε/|S|              [N, T]   a tile at a time
    d_x_i     = s Σ_j d_z_ij w_j                           [N, D]   then through the normalisation
    d_w_j     = s Σ_i d_z_ij x_i                           [T, D]   the same

For the target l of sample i, with its margin: d_z_il = d_lse_i p_il − d_loss_i ((1 − ε) weight_il + ε/|S|)   [P], and
d_cosine = d_z ∂z/∂cosine. These P rank-one terms are added apart.

Exponentials that were kept, or are computed again, are e_ij = exp(z_ij − m_i) for some m_i: d_lse_i p_ij = e_ij
factor_i with factor_i = d_lse_i exp(m_i − lse_i), one number a sample and tile, multiplied into x instead of into e.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.batch.exchange import gradient_of_losses
from partial_fc.distributed.ranks import sum_over_replicas
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.other_derivatives import length_derivatives, other_derivatives
from partial_fc.softmax.row_tiles import tangent
from partial_fc.softmax.tiles import tile_of


class Derivatives(NamedTuple):
    """∂L/∂… of what each sample and each target contributes."""

    d_lse: Tensor  # [N, 1]; multiplies exp(logit − lse)
    d_total: Tensor  # [N, 1] ∂L/∂Σ exp(logit) = d_lse exp(−lse); multiplies exp(logit)
    d_every: Tensor | None  # [N] ∂L/∂(every selected logit), of label smoothing, to be multiplied by the class's weight
    d_cosine: Tensor  # [P] ∂L/∂(target cosine), 0 on ranks that do not own the class
    d_norm: Tensor | None  # [N] ∂L/∂‖X‖, by the margin
    d_offset: Tensor | None  # [1] ∂L/∂offset, of margins of binary decisions


def derivatives(grad: Tensor, saved: SavedTensors, state: ForwardState) -> Derivatives:
    """Return them from ∂L/∂(reduced loss)."""
    selection, options, smoothing = state.selection, state.options, state.smoothing
    z, lse, shares = saved.target_logits, saved.lse[:, None], state.selection.targets.loss_shares
    d_loss = gradient_of_losses(grad.to(saved.x.dtype), selection.batch, shares, options.reduction)
    d_every = d_norm = d_offset = None
    if selection.counts_once and smoothing is None and not options.binary:
        d_lse = d_loss[:, None]
        d_z = (z - lse).expm1_().mul_(d_lse)
    else:
        d_lse, d_z, d_every, d_offset = other_derivatives(d_loss, saved, state)
    d_z = d_z.reshape(-1)
    d_cosine = d_z * saved.slope_cosine
    if smoothing is not None and d_every is not None:
        d_cosine = d_cosine - smoothing.of_cosines(d_every, state.target_rows, options.scale)
    if saved.slope_norm.numel() or saved.slope_penalty.numel():
        d_norm = length_derivatives(d_loss, d_z, saved, state)
    d_total = d_lse
    if state.bounded and not options.binary:
        # logits of others are at least -scale; where lse is less there are none: nothing may become infinite
        d_total = d_lse / lse.clamp(min=-options.scale - 1).exp_()
    return Derivatives(d_lse, d_total, d_every, d_cosine, d_norm, d_offset)


def is_usual(bias: Tensor | None, saved: SavedTensors, state: ForwardState) -> bool:
    """Return whether `BackwardTiles` will do; else see other_tiles.py."""
    plain = bias is None and state.smoothing is None and state.product_dtype is not torch.float16
    return plain and state.sink.begin_update is None and saved.kept.numel() > 0


class BackwardTiles:
    """Gradients of embeddings `[N, D]` and of this rank's rows, tile by tile, from exponentials that were kept."""

    def __init__(self, d: Derivatives, weight: Tensor, saved: SavedTensors, state: ForwardState) -> None:
        self.d, self.weight, self.saved, self.state = d, weight, saved, state
        self.stats, self.weighted_dtype = saved.x.dtype, state.product_dtype
        if state.row_tiles.count:
            self.target_directions, self.target_inverse = state.target_rows.directions

    def run(self, want_x: bool, want_rows: bool) -> tuple[Tensor, list[Tensor]]:
        """Return (gradient of all embeddings from this rank's rows `[N, D]`, of rows `[S, ...]` and biases)."""
        state, rows, x, scale = self.state, self.state.row_tiles, self.saved.x, self.state.options.scale
        dx = x.new_empty(len(x), x.shape[1] if want_x else 0) if rows.count else torch.zeros_like(x)
        if want_rows:
            self.begin_rows()
        previous, scaled_factor, weighted = None, x, x
        for t, (a, b) in enumerate(rows.tiles(state.tile_size)):
            w = rows.directions(a, b, state.product_dtype)
            e, factor = self.exponentials(t, a, b, w)
            if factor is not previous:
                previous, scaled_factor = factor, factor * scale
                weighted = (x * scaled_factor).to(self.weighted_dtype) if want_rows else x
            if want_x and t == 0:
                torch.mul(torch.mm(e, w), scaled_factor, out=dx)
            elif want_x:
                dx.addcmul_(torch.mm(e, w).to(self.stats), scaled_factor)
            if want_rows:
                self.write_rows(e, factor, weighted, w, a, b)
        if want_x:
            self.finish_embeddings(dx)
        return dx, self.finish_rows() if want_rows else []

    def finish_embeddings(self, dx: Tensor) -> None:
        """Add the targets' share, and go through the normalisation."""
        self.add_targets(dx)
        if self.state.row_tiles.inverse is not None and self.state.options.margin.normalize_embeddings:
            tangent(dx, self.saved.x, self.saved.x_inverse, out=dx)
        if self.d.d_norm is not None:
            dx.addcmul_(self.saved.x, self.d.d_norm[:, None])

    def exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (e `[N, T]`, factor `[N, 1]`) of tile t: ∂L/∂logit = e · factor where the logit is no target."""
        saved, d = self.saved, self.d
        e = tile_of(saved.kept, t, len(saved.x), self.state.tile_size, b - a)
        return e, d.d_total if self.state.bounded else d.d_lse * (saved.maxima[t] - saved.lse[:, None]).exp_()

    def add_targets(self, dx: Tensor) -> None:
        """Add the targets' share to the gradient of the embeddings' directions."""
        targets, d_cosine = self.state.target_rows, self.d.d_cosine[:, None]
        if self.state.row_tiles.count and targets.labels_each == 1:
            dx.addcmul_(self.target_directions, d_cosine)
        elif self.state.row_tiles.count:
            dx += targets.sum_of_samples(self.target_directions * d_cosine)

    def begin_rows(self) -> None:
        self.dw = self.state.row_tiles.gradient_memory(self.state.row_tiles.count)

    def write_rows(self, e: Tensor, factor: Tensor, weighted: Tensor, w: Tensor, a: int, b: int) -> None:
        """Write the gradients of rows a to b, without the targets' share. weighted `[N, D]`: x factor scale."""
        out = self.dw[a:b]
        self.state.row_tiles.through_lengths(self.product(e, weighted, a, b, out), w, a, b, out)

    def product(self, e: Tensor, weighted: Tensor, a: int, b: int, out: Tensor) -> Tensor:
        """Return the gradient `[T, D]` of the directions of rows a to b; out: perhaps the memory of the directions."""
        if self.state.product_dtype == self.stats == out.dtype and not self.state.row_tiles.overlaps:
            return torch.mm(e.t(), weighted, out=out)
        return torch.mm(e.t(), weighted)

    def finish_rows(self) -> list[Tensor]:
        self.state.row_tiles.release(self.dw)
        if len(self.dw):
            self.add_targets_to_rows(self.dw, self.state.target_rows.row, self.d.d_cosine)
        return [self.over_replicas(self.dw)]

    def add_targets_to_rows(self, dw: Tensor, position: Tensor, d_cosine: Tensor) -> None:
        """Add the targets' share: to the row at each position, by ∂L/∂(target cosine) `[P]`."""
        grad = self.state.target_rows.of_samples(self.saved.x) * d_cosine[:, None]
        if self.state.row_tiles.inverse is not None:
            tangent(grad, self.target_directions, self.target_inverse, out=grad)
        self.state.row_tiles.add_at(dw, position, grad)

    def over_replicas(self, dw: Tensor) -> Tensor:
        """Return a gradient of rows in the shape of the weight's, summed over replicas."""
        grad = dw.view(len(dw) // self.state.options.margin.centers, *self.weight.shape[1:])
        return sum_over_replicas(grad, self.state.selection.ranks, "the sum of class gradients")
