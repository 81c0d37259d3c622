"""Cross-entropy over class rows that are split over ranks, with a margin on the target logits.

Every rank holds all embeddings `X [N, D]` and its own rows `W [S, D]` (its shard, or the rows selected from it). With
unit vectors `x = X/‖X‖`, `w = W/‖W‖` (or X and W as they are) and `P = N · L` targets, one a sample and label:

    forward    cosines of the targets  t_p = x_i · w_y     [P], on the rank that owns y; logits z_p = s · margin(t_p)
               for tiles of T rows     e = exp(s · x wᵀ − m), targets left out   [N, T]; m [N, 1] the running maximum,
                                       0 where logits are bounded, as with ArcFace: then it does not travel
               one all-gather          (m, Σ e, z, t) of every rank;  lse_i = log Σ_j exp(logit_ij)
               loss_i                  Σ_l weight_il (lse_i − z_il)
    backward   for tiles of T rows     d_z = ∂L/∂logit = ∂L/∂lse_i · exp(logit_ij − lse_i)   [N, T]
               dx += s d_z w,  dw = s d_zᵀ x   then the targets' own share, [P] rank-one terms, and the normalisation

so that no mask, one-hot or second copy of the logits exists. *Kept* mode writes all `e` into one buffer `[N, S]` for
backward: three matrix products a step. *Tiled* mode computes a tile again: four products, O(N · T) memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc import errors
from partial_fc.distributed.derivatives import executes, first_derivative
from partial_fc.distributed.ranks import naming_the_missing, start_reduce_scatter
from partial_fc.softmax.backward import BackwardTiles, derivatives, is_usual
from partial_fc.softmax.decisions import offset_gradient
from partial_fc.softmax.forward import Forwarded, ForwardState, SavedTensors, forward
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.kernel_tiles import KernelSums, KernelTiles
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.other_sums import OtherSums
from partial_fc.softmax.other_tiles import OtherTiles
from partial_fc.softmax.tiles import compute_dtypes


def sharded_cross_entropy(
    embeddings: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor | None, anchor: Tensor | None,
    selection: Selection, options: LossOptions, sink: RowGradientSink,
) -> tuple[Tensor, Tensor, Measured]:  # fmt: skip
    """Return (the loss, the losses `[N]` that it is the sum of, figures for metrics).

    Its backward gives the gradients of the first four arguments.

    embeddings: `[N_local, D]` of this rank if `selection.scatter`, else the gathered `[N, D]`. weight: `[n, D]` or `[n,
    K, D]`, n = S rows if `selection.copied`, else C_local. bias: `[n]`. offset: `[1]`, added to all logits by a margin
    of binary decisions. anchor: the parameter of weight and bias where these are detached, because their rows'
    gradients go to the sink. The loss is a scalar that is the same on every rank, or `[N_local]` for reduction "none".
    """
    inputs = embeddings, weight, bias, offset, anchor
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    dtypes = compute_dtypes(selection.batch.embeddings, weight)
    # the caller's hooks (activation checkpointing, offloading) are not for the small graphs of margins
    hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False), hooks:
        # detached: the state outlives backward and must not hold the parameters themselves
        own = weight.detach(), None if bias is None else bias.detach()
        unusual = partial(KernelSums, streams=needs_grad) if selection.by_kernels else OtherSums
        forwarded = forward(selection, options, sink, *own, dtypes, needs_grad, unusual)
    return ShardedCrossEntropy.apply(*inputs, forwarded) if needs_grad else forwarded[0], *forwarded[1:3]


class ShardedCrossEntropy(torch.autograd.Function):
    """Gives a computed loss its place in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, offset: Any, anchor: Any, found: Forwarded) -> Tensor:
        loss, _, _, saved, ctx.state = found
        ctx.save_for_backward(weight, bias, *saved)
        ctx.embeddings, ctx.offset_dtype = x, None if offset is None else offset.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            own = ShardedCrossEntropy.backward
            return first_derivative("PartialFC", own, ctx, grad, ctx.embeddings, *ctx.saved_tensors[:2])
        weight, bias, *saved = ctx.saved_tensors
        group = ctx.state.selection.ranks.group
        with torch.autocast(grad.device.type, enabled=False), naming_the_missing("the backward of a head", group):
            return gradients(ctx, grad, weight, bias, SavedTensors(*saved))


def gradients(ctx: Any, grad: Tensor, weight: Tensor, bias: Tensor | None, saved: SavedTensors) -> tuple[Any, ...]:
    """Return the gradients of (embeddings, weight, bias, offset); under an anchor, rows' go to the sink."""
    state: ForwardState = ctx.state
    selection, sink, ranks = state.selection, state.sink, state.selection.ranks
    want_x, want_w, want_b, want_offset, anchored, _ = ctx.needs_input_grad
    try:
        anchored = anchored and executes()(ctx.next_functions[-1][0])  # not for autograd.grad(loss, embeddings)
    except RuntimeError as error:
        raise errors.grad_of_rows("PartialFC") from error
    want_rows = want_w or want_b or anchored
    d, usual = derivatives(grad, saved, state), is_usual(bias, saved, state)
    unusual = KernelTiles if selection.by_kernels else OtherTiles
    tiles = BackwardTiles(d, weight, saved, state) if usual else unusual(d, weight, bias, saved, state)
    state.row_tiles.weight = weight.detach().reshape(-1, weight.shape[-1])  # see the end
    # unless logits are tiled, the embedding gradients' sum over ranks travels while class gradients are computed; not
    # beside replicas: two communicators at work at once must be so in the same order on all ranks
    overlap = want_x and want_rows and selection.scatter and saved.kept.numel() + saved.streamed.numel() > 0
    overlap = overlap and ranks.group is not None and ranks.replica_group is None and sink.begin_update is None
    with record_function("partial_fc::backward_tiles"):
        dx, grads = tiles.run(want_x, want_rows and not overlap)
    finish = _send(dx, state, ctx.embeddings.dtype) if want_x else None
    if overlap:
        with record_function("partial_fc::backward_tiles"):
            _, grads = tiles.run(False, True)
    d_weight = d_bias = d_offset = None
    if grads and anchored:
        sink.accumulate(selection.rows, grads, None if selection.slots is None else selection.slots.as_pads())
    elif grads:
        d_weight, d_bias = grads[0] if want_w else None, grads[1] if want_b else None
    state.row_tiles.weight = weight.new_empty(0)  # or it would live as long as the graph
    if want_offset and d.d_offset is not None:
        d_offset = offset_gradient(d.d_offset, ranks).to(ctx.offset_dtype)
    return None if finish is None else finish(), d_weight, d_bias, d_offset, None, None


def _send(dx: Tensor, state: ForwardState, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Begin to sum the embeddings' gradient over ranks if `scatter`; call the result to get what autograd takes."""
    if state.options.scale_embedding_grad:
        dx.mul_(state.selection.ranks.total)
    if not state.selection.scatter:
        return lambda: dx.to(dtype)
    with record_function("partial_fc::scatter"):
        wait = start_reduce_scatter(dx, state.selection.ranks, state.selection.batch.counts)
    return lambda: wait().to(dtype)
