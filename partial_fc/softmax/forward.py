"""The forward of the sharded cross-entropy: target logits, sums over tiles, one combination over ranks, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.distributed.ranks import MOST_GATHERED, all_gather
from partial_fc.distributed.sums import sum_over_ranks
from partial_fc.margins.positives import Positives
from partial_fc.softmax.biases import biases_of
from partial_fc.softmax.combination import COMBINATION, combine_by_sums, combine_maxima
from partial_fc.softmax.further_sums import FurtherSums
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.nearest_others import with_penalty
from partial_fc.softmax.other_losses import other_losses
from partial_fc.softmax.other_rows import other_rows
from partial_fc.softmax.row_tiles import RowTiles, TargetRows, inverse_of
from partial_fc.softmax.ruled import Rule, nearest_centers
from partial_fc.softmax.smoothing import Smoothing
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
    kept: Tensor  # flat, tile after tile of [N, size]; or empty
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
    row_tiles: RowTiles
    target_rows: TargetRows
    rule: Rule | None
    tile_size: int  # rows of every tile but the last
    places: Tensor  # [tiles, P] where targets stand in the memory of the tiles
    product_dtype: torch.dtype  # of matrix products
    bounded: bool  # exponentials are of the logits themselves, no maximum subtracted
    smoothing: Smoothing | None


Forwarded = tuple[Tensor, Tensor, Measured, SavedTensors, ForwardState]


def forward(
    selection: Selection, options: LossOptions, sink: RowGradientSink, weight: Tensor, bias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype], needs_grad: bool, unusual_sums: Callable[..., TileSums],
) -> Forwarded:  # fmt: skip
    """Return (the reduced loss, the losses `[N]` that it is the sum of, figures for metrics, two parts for backward).

    weight, bias: as in `sharded_cross_entropy`. dtypes: of the statistics, of the matrix products.
    unusual_sums: makes the sums over tiles where `TileSums` will not do.
    """
    margin, X, (stats, product) = options.margin, selection.batch.embeddings, dtypes
    norms = torch.linalg.vector_norm(X, dim=1, dtype=stats)
    x_inverse = inverse_of(norms)[:, None]
    x = X * x_inverse if margin.normalize and margin.normalize_embeddings else X.to(stats)
    on_cpu = X.device.type == weight.device.type == "cpu" and selection.kernels is None
    if on_cpu and (selection.rows is None or selection.copied):
        prefix = "" if selection.rows is None else "selected "
        row_tiles = RowTiles(weight, bias, margin.normalize, stats, sink.workspace, prefix)
    else:
        row_tiles = other_rows(weight, bias, selection, options, sink, dtypes, needs_grad)
    most = tile_rows(selection.batch.most_samples, x.shape[1], X.device.type)
    size = tile_size(row_tiles.count, most, margin.centers, X.device.type)
    with record_function("partial_fc::targets"):
        cosines, targets = target_cosines(x, row_tiles, TargetRows.locate(selection, margin.centers), margin.centers)
        z, slope_cosine, slope_norm, rule = apply_margin(cosines, norms, targets, selection, options, needs_grad)
    options = replace(options, scale=margin.scale, binary=margin.binary)  # backward uses these, whatever changes
    if options.inter_topk:
        rule = with_penalty(rule, x, row_tiles, targets, selection, options, product, size)
    # float16 has too little range for decisions, which have no maximum per sample that brings them near 1
    keep = selection.keep_logits and needs_grad and not (margin.binary and product is torch.float16)
    with record_function("partial_fc::forward_tiles"):
        bounded = is_bounded(options, stats, product)
        smoothing = Smoothing.of(options, selection, stats) if options.label_smoothing else None
        plain = bounded and smoothing is None and not (options.ruled or options.binary)
        in_place = keep and (product == stats or (bounded and not options.ruled))
        no_places = options.ruled or selection.by_kernels
        places = x.new_empty(0) if no_places else targets.places(row_tiles.count, size, apart=in_place)
        here = row_tiles, targets, rule, size, places, product, bounded, smoothing
        state = ForwardState(selection, options, sink, *here)
        if plain and bias is None and not (options.metrics or selection.alters_logits):
            sums = TileSums(x, state, keep)
        else:
            sums = unusual_sums(x, state, keep, in_place)  # its state may have tiles of another size
        for t, (a, b) in enumerate(row_tiles.tiles(sums.state.tile_size)):
            sums.add(t, a, b)
        row_tiles.lengths_known = True
    with record_function("partial_fc::combine"):
        found = combine(sums, z, cosines, selection)
    target_logits = found["z"].view_as(selection.targets.ids)
    target_cosine = found["cosines"].view_as(selection.targets.ids)
    measured = Measured(target_cosine, target_logits, targets.exists, norms, found.get("hardest"), margin.scale)
    measured = measured if margin.normalize_embeddings else measured.by_lengths(x_inverse)
    none = smoothed = slope_penalty = x.new_empty(0)
    if plain and selection.counts_once and not margin.has_penalty:
        # in logarithms: where there is no class but the target, the exponential of its logit may be too small for
        # float32; an ignored sample's 0 harms nothing: its loss is multiplied by 0
        lse = torch.logaddexp(found["total"].log(), target_logits[:, 0])
        losses = lse - target_logits[:, 0]
    else:
        given = target_logits, selection, margin, smoothing, norms, needs_grad
        losses, lse, smoothed, slope_penalty = other_losses(found, *given)
    shares = selection.targets.loss_shares
    losses = torch.where(shares != 0, losses * shares, shares)
    maxima, row_sum = (none, none) if sums.further is None else sums.further.for_backward()
    of_sums = sums.kept, maxima, row_sum, smoothed, sums.streamed
    saved = SavedTensors(x, x_inverse, lse, target_logits, slope_cosine, slope_norm, slope_penalty, *of_sums)
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
    if centers > 1:
        targets = replace(targets, row=nearest_centers(x, rows, targets, centers))
    targets = replace(targets, directions=rows.at(targets.row))
    cosines = row_dots(targets.of_samples(x), targets.directions[0])[:, 0]
    cosines = cosines if rows.bias is None else cosines + biases_of(rows, targets.row)
    return cosines * targets.own, targets


def apply_margin(
    cosines: Tensor, norms: Tensor, targets: TargetRows, selection: Selection, options: LossOptions, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Rule | None]:
    """Return target logits z = s · margin(cosine), ∂z/∂cosine, ∂z/∂‖X‖, each `[P]`, 0 on ranks that do not own the
    class; and the margin's rule for other classes. The derivatives come from autograd, on vectors.
    """
    margin, by_cosine, by_norm = options.margin, None, None
    if margin.sees_all or margin.has_rule:
        cosines = sum_over_ranks(cosines, selection.ranks.group)
    with torch.set_grad_enabled(needs_grad):
        cosine = cosines.detach().requires_grad_(needs_grad)
        norm = targets.of_samples(norms).detach().requires_grad_(needs_grad)
        first, ids, exists = selection.batch.first_sample, selection.targets.ids, selection.targets.exists
        sample = targets.sample + first if first else targets.sample
        about = ids.reshape(-1), sample, norm, exists.reshape(-1), selection.draw_key
        moved = margin.target(cosine, Positives(*about, replicas=selection.ranks.replica_group))
        if needs_grad and moved.requires_grad:
            scale = torch.full_like(moved, margin.scale)
            by_cosine, by_norm = torch.autograd.grad(moved, (cosine, norm), scale, allow_unused=True)
    by_cosine = torch.zeros_like(cosines) if by_cosine is None else by_cosine * targets.own
    by_norm = cosines.new_empty(0) if by_norm is None else by_norm * targets.own
    z = moved.detach() * margin.scale
    rule = Rule.of(margin, z, selection.targets.weights) if margin.has_rule else None
    return z * targets.own, by_cosine, by_norm, rule


class TileSums:
    """Sums over the logits of this rank where they are bounded and nothing but scaled cosines (else other_sums.py):
    call `add` for each tile of rows.

    total `[N, 1]`: Σ exp(logit), targets left out. kept: exponentials for backward, tile after tile, or empty.
    """

    further: FurtherSums | None = None

    def __init__(self, x: Tensor, state: ForwardState, keep: bool) -> None:
        rows, size = state.row_tiles, len(x) * state.tile_size
        self.state, self.stats, self.keep = state, x.dtype, keep
        self.total = x.new_empty(len(x), 1) if rows.count else x.new_zeros(len(x), 1)
        self.kept = self.streamed = x.new_empty(0)
        # bounded exponentials are computed in the products' dtype at once; their sum is in that of the statistics
        count = size * -(-rows.count // state.tile_size) + 1 if keep else size + 1  # a number more, behind the tiles
        if keep:
            self.memory = rows.workspace.get(f"{rows.prefix}logits", (count,), state.product_dtype, x.device)
            self.kept = self.memory[:-1]
        else:
            self.memory = x.new_empty(count, dtype=state.product_dtype)
        self.scaled = (x * state.options.scale).to(state.product_dtype)

    def add(self, t: int, a: int, b: int) -> None:
        """Add tile t: rows a to b."""
        state, samples = self.state, len(self.scaled)
        w = state.row_tiles.directions(a, b, state.product_dtype)
        logits = new_tile(self.memory, t if self.keep else 0, samples, state.tile_size, b - a)
        tile_logits(self.scaled, w, None, logits)
        self.memory.index_fill_(0, state.places[t], -torch.inf)  # targets count with their margin elsewhere
        total = logits.exp_().sum(1, keepdim=True, dtype=self.stats)
        self.total = total if t == 0 else self.total.add_(total)


def combine(sums: TileSums, z: Tensor, cosines: Tensor, selection: Selection) -> dict[str, Tensor]:
    """Return by name what the ranks found together. total: Σ exp, relative to the largest maximum of all ranks."""
    parts, group = {"total": sums.total[:, 0], "z": z, "cosines": cosines}, selection.ranks.group
    if sums.further is not None:
        parts |= sums.further.parts(z, cosines, sums.state.row_tiles.count)
    if group is None:
        return parts
    own = torch.cat(list(parts.values()))
    if own.nbytes * selection.ranks.world > MOST_GATHERED:
        return combine_by_sums(parts, group)
    everyone = all_gather(own, group, COMBINATION).split([*map(len, parts.values())], dim=1)
    if sums.further is not None:
        return combine_maxima(dict(zip(parts, everyone, strict=True)))
    return {name: each.sum(0) for name, each in zip(parts, everyone, strict=True)}


def _reduce(losses: Tensor, selection: Selection, reduction: str) -> Tensor:
    if reduction == "none":
        return losses[selection.batch.local].clone()
    loss = losses.sum()
    if selection.ranks.replica_group is None:
        return loss
    # the replicas of a 2-D mesh hold other samples, whose share of the loss is theirs to add
    return all_gather(loss, selection.ranks.replica_group).sum(0)
