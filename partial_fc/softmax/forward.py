"""The forward of the sharded cross-entropy: target logits, sums over tiles, one combination over ranks, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.distributed.ranks import MOST_GATHERED, all_gather
from partial_fc.distributed.sums import sum_over_ranks
from partial_fc.margins.positives import Positives
from partial_fc.softmax.at_once import RowsAtOnce
from partial_fc.softmax.biases import biases_of
from partial_fc.softmax.combination import COMBINATION, combine_by_sums
from partial_fc.softmax.further_sums import FurtherSums
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.kernel_rows import KernelRows
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.nearest_others import with_penalty
from partial_fc.softmax.other_losses import other_losses
from partial_fc.softmax.row_tiles import RowTiles, TargetRows, inverse_of
from partial_fc.softmax.ruled import Rule, nearest_centers, rows_of_classes
from partial_fc.softmax.smoothing import Smoothing
from partial_fc.softmax.streamed_rows import StreamedRows
from partial_fc.softmax.tiles import new_tile, row_dots, tile_logits, tile_rows, tile_size


class SavedTensors(NamedTuple):
    """What backward needs, for `ctx.save_for_backward`."""

    x: Tensor  # [N, D] embeddings as they enter the products: unit vectors where the margin normalises
    x_inverse: Tensor  # [N, 1] 1/‖X‖
    lse: Tensor  # [N] log Σ exp over all selected classes; Σ sigmoid of the other classes for binary decisions
    target_logits: Tensor  # [N, L]
    slope_cosine: Tensor  # [P] ∂(target logit)/∂(target cosine), 0 on ranks that do not own the class
    slope_norm: Tensor  # [P] ∂(target logit)/∂‖X‖, the same; empty where the margin does not depend on it
    slope_penalty: Tensor  # [N] ∂(the margin's penalty)/∂‖X‖, or empty
    kept: Tensor  # [tiles, N, size] or empty
    maxima: Tensor  # [tiles, N, 1] or empty
    row_sum: Tensor  # [D + 1] or empty: sum of directions and biases, for label smoothing
    smoothed: Tensor  # [2, 1] or [2, N] or empty: how many classes label smoothing spreads over, their mean weight
    streamed: Tensor  # [N, D] or empty: Σ exp(logit) w of this rank's rows, targets left out


@dataclass(frozen=True)
class ForwardState:
    """The rest of what backward needs."""

    selection: Selection
    options: LossOptions
    sink: RowGradientSink
    rows: RowTiles
    targets: TargetRows
    rule: Rule | None
    tile: int  # rows of every tile but the last
    places: Tensor  # [tiles, P] where targets stand in the memory of the tiles
    product: torch.dtype  # of matrix products
    bounded: bool  # exponentials are of the logits themselves, no maximum subtracted
    smoothing: Smoothing | None


Forwarded = tuple[Tensor, Tensor, Measured, SavedTensors, ForwardState]


def forward(
    selection: Selection,
    options: LossOptions,
    sink: RowGradientSink,
    weight: Tensor,
    bias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs_grad: bool,
    sums_of: Callable[..., TileSums],
) -> Forwarded:
    """Return (the reduced loss, the losses `[N]` that it is the sum of, figures for metrics, two parts for backward).

    weight: `[C_local, D]` or `[C_local, K, D]`. bias: `[C_local]`. dtypes: of the statistics, of the matrix products.
    sums_of: `TileSums`, or what makes its twin, which finds the places of targets by itself.
    """
    margin, X, (stats, product) = options.margin, selection.batch.embeddings, dtypes
    centers = margin.centers
    norms = torch.linalg.vector_norm(X, dim=1, dtype=stats)
    x_inverse = inverse_of(norms)[:, None]
    x = X * x_inverse if margin.normalize and margin.normalize_embeddings else X.to(stats)
    index = None if selection.picked else selection.rows
    index = index if centers == 1 else rows_of_classes(index, centers)
    kind = X.device.type
    kernels = selection.kernels is not None and selection.kernels.rows
    row_tiles: Callable[..., RowTiles] = KernelRows if kernels else RowTiles if kind == "cpu" else RowsAtOnce
    if weight.device != X.device:
        row_tiles, bias = partial(StreamedRows, device=X.device), None if bias is None else bias.to(X.device)
    prefix = "" if selection.rows is None else "selected "
    rows = row_tiles(weight, bias, index, margin.normalize, stats, sink.workspace, needs_grad, prefix)
    if isinstance(rows, RowsAtOnce):
        rows.measure(product, whole_gradient=needs_grad and sink.begin_update is None)
    if isinstance(rows, KernelRows) and selection.directions is not None:
        rows.know(*selection.directions)
    most = tile_rows(selection.batch.most_samples, x.shape[1], kind)
    tile = tile_size(rows.count, most, centers, kind)
    with record_function("partial_fc::targets"):
        targets = TargetRows.locate(selection, centers)
        cosines, targets = target_cosines(x, rows, targets, centers)
        z, slope_cosine, slope_norm, rule = apply_margin(cosines, norms, targets, selection, options, needs_grad)
    options = replace(options, scale=margin.scale, binary=margin.binary)  # backward uses these, whatever changes
    if options.inter_topk:
        rule = with_penalty(rule, x, rows, targets, selection, options, product, tile)
    # float16 has too little range for decisions, which have no maximum per sample that brings them near 1
    keep = selection.keep_logits and needs_grad and not (margin.binary and product is torch.float16)
    with record_function("partial_fc::forward_tiles"):
        bounded = is_bounded(options, stats, product)
        smoothing = (
            Smoothing.of(options, selection, selection.hi - selection.lo, stats) if options.label_smoothing else None
        )
        in_place = keep and (product == stats or (bounded and not options.ruled))
        no_places = options.ruled or sums_of is not TileSums
        places = x.new_empty(0) if no_places else targets.places(rows.count, tile, apart=in_place)
        state = ForwardState(selection, options, sink, rows, targets, rule, tile, places, product, bounded, smoothing)
        sums = sums_of(x, state, keep, in_place)
        for t, (a, b) in enumerate(rows.tiles(sums.state.tile)):
            sums.add(t, a, b)
        rows.measured = True
    with record_function("partial_fc::combine"):
        found = combine(sums, z, cosines, selection)
    target_logits = found["z"].view_as(selection.targets)
    of_targets = found["cosines"].view_as(selection.targets)
    measured = Measured(of_targets, target_logits, targets.exists, norms, found.get("hardest"), margin.scale)
    measured = measured if margin.normalize_embeddings else measured.by_lengths(x_inverse)
    none = smoothed = slope_penalty = x.new_empty(0)
    if bounded and selection.counts_once and smoothing is None and not (margin.binary or margin.has_penalty):
        # in logarithms: where there is no class but the target, the exponential of its logit may be too small for
        # float32; an ignored sample's 0 harms nothing: its loss is multiplied by 0
        lse = torch.logaddexp(found["total"].log(), target_logits[:, 0])
        losses = lse - target_logits[:, 0]
    else:
        given = target_logits, selection, margin, smoothing, norms, needs_grad
        losses, lse, smoothed, slope_penalty = other_losses(found, *given)
    losses = torch.where(selection.sample_weights != 0, losses * selection.sample_weights, selection.sample_weights)
    slopes = slope_cosine, slope_norm, slope_penalty
    maxima, row_sum = (none, none) if sums.further is None else sums.further.for_backward()
    saved = SavedTensors(x, x_inverse, lse, target_logits, *slopes, sums.kept, maxima, row_sum, smoothed, sums.streamed)
    return _reduce(losses, selection, options.reduction), losses, measured, saved, sums.state


def is_bounded(options: LossOptions, stats: torch.dtype, product: torch.dtype) -> bool:
    """Return whether no sum of exponentials can leave the range of its dtype, so that no maximum need be subtracted."""
    margin = options.margin
    cosines = margin.normalize and margin.normalize_embeddings
    if not cosines or margin.has_rule or options.inter_topk or product is torch.float16:
        return margin.binary is not None
    # a cosine times the scale is at most the scale; a scale of 64 with 10⁹ classes fits into float32
    return margin.scale + math.log(options.num_classes) < math.log(torch.finfo(stats).max) - 2 or bool(margin.binary)


def target_cosines(x: Tensor, rows: RowTiles, targets: TargetRows, centers: int) -> tuple[Tensor, TargetRows]:
    """Return cosines (plain logits) `[P]`, 0 on ranks that do not own the class; targets with their nearest rows."""
    if not rows.count:
        return x.new_zeros(len(targets.sample)), targets
    if centers == 1:
        targets = replace(targets, directions=rows.at(targets.row))
        cosines = row_dots(targets.of_samples(x), targets.directions[0])[:, 0]
        cosines = cosines if rows.bias is None else cosines + biases_of(rows, targets.row)
    else:
        cosines, targets = nearest_centers(x, rows, targets, centers)
        targets = replace(targets, directions=rows.at(targets.row))
    return cosines * targets.own, targets


def apply_margin(
    cosines: Tensor, norms: Tensor, targets: TargetRows, selection: Selection, options: LossOptions, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Rule | None]:
    """Return target logits z = s · margin(cosine), ∂z/∂cosine, ∂z/∂‖X‖, each `[P]`, 0 on ranks that do not own the
    class; and the margin's rule for other classes. The derivatives come from autograd, on vectors.
    """
    margin = options.margin
    if margin.sees_all or margin.has_rule:
        cosines = sum_over_ranks(cosines, selection.ranks.group)
    with torch.set_grad_enabled(needs_grad):
        cosine = cosines.detach().requires_grad_(needs_grad)
        norm = targets.of_samples(norms).detach().requires_grad_(needs_grad)
        positives = Positives(
            label=selection.targets.reshape(-1),
            sample=targets.sample + selection.first_sample if selection.first_sample else targets.sample,
            norm=norm,
            exists=targets.exists.reshape(-1),
            draw=selection.draw_key,
            replicas=selection.ranks.replica_group,
        )
        moved = margin.target(cosine, positives)
        by_cosine, by_norm = None, None
        if needs_grad and moved.requires_grad:
            scale = torch.full_like(moved, margin.scale)
            by_cosine, by_norm = torch.autograd.grad(moved, (cosine, norm), scale, allow_unused=True)
    by_cosine = torch.zeros_like(cosines) if by_cosine is None else by_cosine * targets.own
    by_norm = cosines.new_empty(0) if by_norm is None else by_norm * targets.own
    z = moved.detach() * margin.scale
    rule = Rule.of(margin, z, selection.target_weights) if margin.has_rule else None
    return z * targets.own, by_cosine, by_norm, rule


class TileSums:
    """Sums over the logits of this rank: call `add` for each tile of rows.

    total `[N, 1]`: Σ exp(logit), targets left out. kept: exponentials for backward, tile after tile, or empty.
    further: whatever else is to be found, or None.
    """

    def __init__(self, x: Tensor, state: ForwardState, keep: bool, in_place: bool) -> None:
        options, rows, product = state.options, state.rows, state.product
        self.state = state
        self.stats = x.dtype
        self.samples = len(x)
        self.total = x.new_zeros(len(x), 1) if options.binary or not rows.count else x.new_empty(len(x), 1)
        self.keep, self.kept, self.streamed = keep, x.new_empty(0), x.new_empty(0)
        tiles, size = -(-rows.count // state.tile), len(x) * state.tile
        if keep:
            self.memory = rows.workspace.take(f"{rows.prefix}logits", (size * tiles + 1,), product, x.device)
            self.kept = self.memory[:-1]
        # bounded exponentials may be computed in the products' dtype at once; their sum is in that of the statistics
        work = product if state.bounded and not options.ruled else x.dtype
        self.scratch = None if in_place else x.new_empty(size + 1, dtype=work)
        self.memory = self.memory if self.scratch is None else self.scratch  # and a number more, behind the tiles
        self.scaled = (x if options.ruled else x * options.scale).to(product)
        self.further: FurtherSums | None = None
        if options.ruled or options.binary or options.metrics or state.smoothing is not None or not state.bounded:
            of_others = state.rule, state.smoothing, state.selection.correction, state.bounded
            self.further = FurtherSums(x, options, state.targets, *of_others, kept=tiles if keep else 0)

    def add(self, t: int, a: int, b: int) -> None:
        """Add tile t: rows a to b."""
        state = self.state
        w = state.rows.tile(a, b, state.product if state.smoothing is None else self.stats)
        bias = None if state.rows.bias is None else biases_of(state.rows, slice(a, b))
        kept = new_tile(self.kept, t, self.samples, state.tile, b - a) if self.keep else None
        where = kept if self.scratch is None else new_tile(self.scratch, 0, self.samples, state.tile, b - a)
        assert where is not None
        added = bias if state.selection.correction is None else state.selection.correction.in_product(bias, a, b)
        values = tile_logits(self.scaled, w.to(state.product), added, where)
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


def combine(sums: TileSums, z: Tensor, cosines: Tensor, selection: Selection) -> dict[str, Tensor]:
    """Return by name what the ranks found together. total: of the largest maximum."""
    parts = {"total": sums.total[:, 0], "z": z, "cosines": cosines}
    if sums.further is not None:
        parts |= sums.further.parts(z, cosines, sums.state.rows.count)
    if selection.ranks.group is None:
        return parts
    own = torch.cat(list(parts.values()))
    if own.nbytes * selection.ranks.world > MOST_GATHERED:
        return combine_by_sums(parts, selection.ranks.group)
    everyone = all_gather(own, selection.ranks.group, COMBINATION)
    found = dict(zip(parts, everyone.split([len(p) for p in parts.values()], dim=1), strict=True))
    if "maximum" in found:
        largest = found["maximum"].amax(0)
        found["total"] = found["total"] * (found["maximum"] - largest).exp()
    return {name: each.amax(0) if name in ("maximum", "hardest") else each.sum(0) for name, each in found.items()}


def _reduce(losses: Tensor, selection: Selection, reduction: str) -> Tensor:
    if reduction == "none":
        return losses[selection.batch.local].clone()
    loss = losses.sum()
    if selection.ranks.replica_group is None:
        return loss
    # the replicas of a 2-D mesh hold other samples, whose share of the loss is theirs to add
    return all_gather(loss, selection.ranks.replica_group).sum(0)
