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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.batch.exchange import gradient_of_losses
from partial_fc.distributed.derivatives import executes
from partial_fc.distributed.ranks import start_reduce_scatter, sum_over_replicas
from partial_fc.softmax import float16
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.other_derivatives import length_derivatives, other_derivatives
from partial_fc.softmax.recompute import recomputed
from partial_fc.softmax.row_tiles import tangent
from partial_fc.softmax.tiles import tile_of

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]


class Derivatives(NamedTuple):
    """∂L/∂… of what each sample and each target contributes."""

    d_lse: Tensor  # [N, 1]; multiplies exp(logit − lse)
    from_zero: Tensor  # [N, 1] d_lse exp(−lse); multiplies exp(logit)
    d_every: Tensor | None  # [N] ∂L/∂(every selected logit), of label smoothing, but for the weight of the class
    d_cosine: Tensor  # [P] ∂L/∂(target cosine), 0 on ranks that do not own the class
    d_norm: Tensor | None  # [N] ∂L/∂‖X‖, by the margin
    d_offset: Tensor | None  # [1] ∂L/∂offset, of margins of binary decisions


def derivatives(grad: Tensor, saved: SavedTensors, state: ForwardState) -> Derivatives:
    """Return them from ∂L/∂(reduced loss)."""
    selection, options, smoothing = state.selection, state.options, state.smoothing
    z, lse = saved.target_logits, saved.lse[:, None]
    d_loss = gradient_of_losses(grad.to(saved.x.dtype), selection.batch, selection.sample_weights, options.reduction)
    d_every = d_norm = d_offset = None
    if selection.counts_once and smoothing is None and not options.binary:
        d_lse = d_loss[:, None]
        d_z = (z - lse).expm1_().mul_(d_lse)
    else:
        d_lse, d_z, d_every, d_offset = other_derivatives(d_loss, saved, state)
    d_z = d_z.reshape(-1)
    d_cosine = d_z * saved.slope_cosine
    if smoothing is not None and d_every is not None:
        d_cosine = d_cosine - smoothing.of_cosines(d_every, state.targets, options.scale)
    if saved.slope_norm.numel() or saved.slope_penalty.numel():
        d_norm = length_derivatives(d_loss, d_z, saved, state)
    from_zero = d_lse
    if state.bounded and not options.binary:
        # logits of others are at least -scale; where lse is less there are none: nothing may become infinite
        from_zero = d_lse / lse.clamp(min=-options.scale - 1).exp_()
    return Derivatives(d_lse, from_zero, d_every, d_cosine, d_norm, d_offset)


def backward(ctx: Any, grad: Tensor, weight: Tensor, bias: Tensor | None, saved: SavedTensors) -> Gradients:
    """Return the gradients of (embeddings, weight, bias, offset); under an anchor, rows' go to the sink."""
    state: ForwardState = ctx.state
    selection, sink = state.selection, state.sink
    want_x, want_w, want_b, want_offset, anchored, _ = ctx.needs_input_grad
    anchored = anchored and executes()(ctx.next_functions[-1][0])  # not for autograd.grad(loss, embeddings)
    want_rows = want_w or want_b or anchored
    tiles = BackwardTiles(derivatives(grad, saved, state), weight, bias, saved, state)
    # with kept logits the sum of embedding gradients over ranks travels while the class gradients are computed
    overlap = want_x and want_rows and selection.scatter and saved.kept.numel() > 0
    overlap = overlap and selection.ranks.group is not None and sink.begin_update is None
    # two communicators at work at once must be so in the same order on all ranks
    overlap = overlap and selection.ranks.replica_group is None
    with record_function("partial_fc::backward_tiles"):
        dx, grads = tiles.run(want_x, want_rows and not overlap)
    finish = _send(dx, state, ctx.embeddings.dtype) if want_x else None
    if overlap:
        with record_function("partial_fc::backward_tiles"):
            _, grads = tiles.run(False, True)
    d_weight = d_bias = d_offset = None
    if grads and anchored:
        assert selection.rows is not None
        slots = selection.slots
        sink.accumulate(selection.rows, grads, None if slots is None else (slots.window, slots.pads))
    elif grads:
        d_weight, d_bias = grads[0] if want_w else None, grads[1] if want_b else None
    if want_offset and tiles.d.d_offset is not None:
        # every rank knows all it is made of, but for the samples of other replicas
        d_offset = sum_over_replicas(tiles.d.d_offset, selection.ranks, "the gradient of the offset")
        d_offset = d_offset.to(ctx.offset_dtype)
    return None if finish is None else finish(), d_weight, d_bias, d_offset, None, None


def _send(dx: Tensor, state: ForwardState, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Begin to sum the embeddings' gradient over ranks if `scatter`; call the result to get what autograd takes."""
    selection = state.selection
    if state.options.scale_embedding_grad:
        dx.mul_(selection.ranks.total)
    if not selection.scatter:
        return lambda: dx.to(dtype)
    with record_function("partial_fc::scatter"):
        wait = start_reduce_scatter(dx, selection.ranks, selection.batch.counts)
    return lambda: wait().to(dtype)


class BackwardTiles:
    """Gradients of embeddings `[N, D]` and of this rank's rows, tile by tile."""

    def __init__(
        self, d: Derivatives, weight: Tensor, bias: Tensor | None, saved: SavedTensors, state: ForwardState
    ) -> None:
        self.d = d
        self.weight = weight
        self.bias = bias
        self.saved = saved
        self.state = state
        self.stats = saved.x.dtype
        self.scale = state.options.scale
        self.weighted_dtype = self.stats if state.product is torch.float16 else state.product
        if state.rows.count:
            self.target_rows, self.target_inverse = state.targets.directions
        self.shares = None
        if state.smoothing is not None and d.d_every is not None:
            self.shares = state.smoothing.shares(d.d_every, saved.x, saved.row_sum, self.scale)

    def run(self, want_x: bool, want_rows: bool) -> tuple[Tensor, list[Tensor]]:
        """Return (gradient of all embeddings from this rank's rows `[N, D]`, of rows `[S, ...]` and biases)."""
        state, rows, x = self.state, self.state.rows, self.saved.x
        centers, ruled = state.options.margin.centers, state.options.ruled
        dx = x.new_empty(len(x), x.shape[1] if want_x else 0) if rows.count else torch.zeros_like(x)
        update = state.sink.begin_update() if want_rows and state.sink.begin_update is not None else None
        length = rows.count if update is None else min(state.tile, rows.count)
        dw = rows.gradient_memory(length) if want_rows else None
        db = x.new_empty(length, dtype=self.stats) if want_rows and self.bias is not None else None
        if not self.saved.kept.numel():
            work = state.product if state.bounded and not ruled else self.stats
            self.scratch = x.new_empty(len(x) * state.tile + 1, dtype=work)
            self.scaled = (x if ruled else x * self.scale).to(state.product)
        previous, scaled_factor, weighted = None, x, x
        for t, (a, b) in enumerate(rows.tiles(state.tile)):
            w = rows.tile(a, b, state.product)
            e, factor = self._exponentials(t, a, b, w)
            if factor is not previous:
                previous, scaled_factor = factor, factor * self.scale
                weighted = (x * scaled_factor).to(self.weighted_dtype) if dw is not None else x
            if want_x and t == 0:
                torch.mul(torch.mm(e, w), scaled_factor, out=dx)
            elif want_x:
                dx.addcmul_(torch.mm(e, w).to(self.stats), scaled_factor)
            if dw is None:
                continue
            at = slice(a, b) if update is None else slice(0, b - a)
            self._row_gradient(dw[at], e, weighted, w, a, b)
            if db is not None:
                smoothed = 0.0 if self.shares is None else self.shares.of_biases(a, b)
                db[at] = torch.mv(e.t().to(self.stats), factor[:, 0]) + smoothed
            if update is not None:
                grads = self._with_targets(dw[at], None if db is None else db[at], a)
                update(a // centers, b // centers, grads)
        if want_x:
            self._finish_embeddings(dx)
        if dw is None:
            return dx, []
        rows.release(dw)
        if update is None:
            return dx, self._with_targets(dw, db, 0)
        if not rows.count:  # the optimizer's scalar state counts this step as on other ranks
            update(0, 0, self._with_targets(dw, db, 0))
        return dx, []

    def _exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (e `[N, T]`, factor `[N, 1]`) of tile t: ∂L/∂logit = e · factor where the logit is no target."""
        saved, state, d = self.saved, self.state, self.d
        if saved.kept.numel():
            e = tile_of(saved.kept, t, len(saved.x), state.tile)[:, : b - a]
            return e, d.from_zero if state.bounded else d.d_lse * (saved.maxima[t] - saved.lse[:, None]).exp_()
        return recomputed(state, saved, d, self.scaled, self.scratch, t, a, b, w)

    def _row_gradient(self, out: Tensor, e: Tensor, weighted: Tensor, w: Tensor, a: int, b: int) -> None:
        """Write the gradient of rows a to b, but for the targets' share, to `out [T, D]`, perhaps the memory of w."""
        product, rows = self.state.product, self.state.rows
        if product is torch.float16:
            grad = float16.scaled_product(e, weighted)
        elif product == self.stats == out.dtype and not rows.overlaps:
            grad = torch.mm(e.t(), weighted, out=out)
        else:
            grad = torch.mm(e.t(), weighted)
        if self.shares is not None:
            grad = grad.to(self.stats)
            self.shares.add_to_rows(grad, a, b)
        rows.through_lengths(grad, w, a, b, out)

    def _finish_embeddings(self, dx: Tensor) -> None:
        """Add the targets' share and go through the normalisation, in place."""
        state, d = self.state, self.d
        if state.rows.count:
            if state.targets.labels_each == 1:
                dx.addcmul_(self.target_rows, d.d_cosine[:, None])
            else:
                dx += state.targets.sum_of_samples(self.target_rows * d.d_cosine[:, None])
        if self.shares is not None:
            dx += self.shares.of_x
        if state.rows.inverse is not None:
            tangent(dx, self.saved.x, self.saved.x_inverse, out=dx)
            if d.d_norm is not None:
                dx.addcmul_(self.saved.x, d.d_norm[:, None])

    def _with_targets(self, dw: Tensor, db: Tensor | None, a: int) -> list[Tensor]:
        """Return the gradients of rows a, a + 1, ... with the targets' share in them, summed over replicas."""
        rows, targets, ranks = self.state.rows, self.state.targets, self.state.selection.ranks
        if len(dw):
            position, d_cosine = targets.row, self.d.d_cosine
            if len(dw) < rows.count:
                position = position - a
                here = targets.own & (position >= 0) & (position < len(dw))
                position, d_cosine = position.remainder(len(dw)), d_cosine * here
            grad = targets.of_samples(self.saved.x) * d_cosine[:, None]
            if rows.inverse is not None:
                tangent(grad, self.target_rows, self.target_inverse, out=grad)
            rows.add_at(dw, position, grad)
            if db is not None:
                rows.add_at(db, position, d_cosine)
        grads = [dw.view(len(dw) // self.state.options.margin.centers, *self.weight.shape[1:])]
        if db is not None and self.bias is not None:
            grads.append(db.to(self.bias.dtype))
        return [sum_over_replicas(each, ranks, "the sum of class gradients") for each in grads]
