"""The forward of the sharded cross-entropy.

target_cosines   cosine t_p of each target [P], on the rank that owns its class
apply_margin     target logit z_p = s · margin(t_p), with ∂z/∂t and ∂z/∂‖x‖ by autograd on these vectors
TileSums         m, Σ exp over the other selected classes of this rank [N]
combine          one all-gather of (m, Σ, z, t): [world, ...]
losses           lse_i = log Σ over all ranks; loss_i = Σ_l weight_il (lse_i − z_il)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.distributed.ranks import all_gather
from partial_fc.margins.base import Margin
from partial_fc.margins.positives import Positives
from partial_fc.softmax.decisions import decision_losses
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.row_tiles import OwnTargets, RowTiles, unit
from partial_fc.softmax.ruled import Rule
from partial_fc.softmax.tile_sums import TileSums
from partial_fc.softmax.tiles import tile_rows


class SavedTensors(NamedTuple):
    """What backward needs, for `ctx.save_for_backward`."""

    x: Tensor  # [N, D] embeddings as they enter the products: unit vectors where the margin normalises
    x_inverse: Tensor  # [N, 1] 1/‖X‖
    lse: Tensor  # [N] log Σ exp over all selected classes; Σ sigmoid of the other classes for binary decisions
    target_logits: Tensor  # [N, L]
    d_cosine: Tensor  # [P] ∂(target logit)/∂(target cosine), 0 on ranks that do not own the class
    d_norm: Tensor  # [P] ∂(target logit)/∂‖X‖, the same
    d_penalty: Tensor  # [N] ∂(the margin's penalty)/∂‖X‖
    kept: Tensor  # [N · S] or empty
    maxima: Tensor  # [tiles, N, 1] or empty
    row_sum: Tensor  # [D + 1] or empty: sum of directions and biases, for label smoothing
    smoothed_over: Tensor  # [1] or [N] or empty: how many classes label smoothing spreads over, on all ranks together


@dataclass(frozen=True)
class ForwardState:
    """The rest of what backward needs."""

    selection: Selection
    options: LossOptions
    sink: RowGradientSink
    rows: RowTiles
    targets: OwnTargets
    rule: Rule | None
    tile: int  # rows of a tile
    product: torch.dtype  # of matrix products
    bounded: bool  # exponentials are of the logits themselves, no maximum subtracted


@dataclass(frozen=True)
class Forwarded:
    """A forward's result. loss: the reduced loss; losses `[N]`: what it is the sum of."""

    loss: Tensor
    losses: Tensor
    measured: Measured
    saved: SavedTensors
    state: ForwardState


def forward(
    selection: Selection,
    options: LossOptions,
    sink: RowGradientSink,
    weight: Tensor,
    bias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs_grad: bool,
) -> Forwarded:
    """Compute the loss from the selected rows of `weight [C_local, D]` (or `[C_local, K, D]`) and `bias [C_local]`.

    dtypes: of the statistics, of the matrix products. Three or fewer collectives.
    """
    stats, product = dtypes
    margin = options.margin
    X = selection.batch.embeddings
    norms = torch.linalg.vector_norm(X, dim=1, dtype=stats)
    x, x_inverse = unit(X, stats) if margin.normalize else (X.to(stats), X.new_empty(0))
    rows = RowTiles(weight, bias, selection.rows, margin.centers, margin.normalize, stats, sink.workspace, needs_grad)
    samples, width = X.shape
    tile = max(1, tile_rows(samples, width, X.device.type) // margin.centers) * margin.centers  # holds whole classes
    with record_function("partial_fc::targets"):
        targets = OwnTargets.locate(selection, len(weight), margin.centers)
        own_cosines, targets = target_cosines(x, rows, targets, margin.centers)
        cosines = own_cosines
        if margin.sees_all or margin.has_rule:
            cosines = all_gather(own_cosines, selection.ranks.group).sum(0)
        z, d_cosine, d_norm = apply_margin(margin, cosines, norms, targets, selection, needs_grad)
        rule = Rule.of(margin, z, selection.target_weights) if margin.has_rule else None
        z = torch.where(targets.own, z, 0.0)
    # float16 has too little range for decisions, which have no maximum per sample that brings them near 1
    keep = selection.keep_logits and needs_grad and not (margin.binary and product is torch.float16)
    with record_function("partial_fc::forward_tiles"):
        sums = TileSums(x, rows, targets, selection, options, rule, tile, product, keep)
        for t, (a, b) in enumerate(rows.tiles(tile)):
            sums.add(t, a, b)
        rows.measured = True
    with record_function("partial_fc::combine"):
        found = combine(sums, z, own_cosines, selection, options)
    target_logits = found["z"].sum(0).view_as(selection.targets)
    hardest = found["hardest"].amax(0) if "hardest" in found else None
    measured = Measured(
        found["cosines"].sum(0).view_as(selection.targets), target_logits, targets.exists, norms, hardest
    )
    smoothed_over = found["count"].sum(0).clamp_(min=1) if "count" in found else x.new_empty(0)
    if margin.binary:
        losses = decision_losses(selection, margin.binary, target_logits, found["total"].sum(0))
        lse = found["active"].sum(0)
    else:
        losses, lse = softmax_losses(found, target_logits, targets.exists, selection, options, smoothed_over)
    penalty, d_penalty = _penalty(margin, norms, needs_grad)
    if penalty is not None:
        losses = losses + penalty
    losses = torch.where(selection.sample_weights != 0, losses, 0.0) * selection.sample_weights
    row_sum = x.new_empty(0) if sums.smoothing is None else sums.smoothing.row_sum
    saved = SavedTensors(
        x, x_inverse, lse, target_logits, d_cosine, d_norm, d_penalty, sums.kept, sums.maxima, row_sum, smoothed_over
    )
    state = ForwardState(selection, options, sink, rows, targets, rule, tile, product, sums.bounded)
    return Forwarded(_reduce(losses, selection, options.reduction), losses, measured, saved, state)


def target_cosines(x: Tensor, rows: RowTiles, targets: OwnTargets, centers: int) -> tuple[Tensor, OwnTargets]:
    """Return cosines (plain logits) `[P]`, 0 on ranks that do not own the class; and targets with their nearest centers."""
    cosines = x.new_zeros(len(targets.sample))
    if rows.count and centers == 1:
        directions, _ = rows.at(targets.row)
        cosines = torch.linalg.vecdot(x[targets.sample], directions) + rows.bias_at(targets.row)
    elif rows.count:
        positions = targets.first[:, None] + torch.arange(centers, device=cosines.device)
        directions = rows.at(positions.reshape(-1))[0].view(len(cosines), centers, x.shape[1])
        cosines, nearest = torch.linalg.vecdot(x[targets.sample][:, None], directions).max(1)
        targets = replace(targets, row=targets.first + nearest)
    return torch.where(targets.own, cosines, 0.0), targets


def apply_margin(
    margin: Margin, cosines: Tensor, norms: Tensor, targets: OwnTargets, selection: Selection, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return target logits z `[P]` and their derivatives ∂z/∂cosine, ∂z/∂‖X‖ `[P]`, 0 on ranks that do not own the class."""
    with torch.set_grad_enabled(needs_grad):
        cosine = cosines.detach().requires_grad_(needs_grad)
        norm = norms[targets.sample].requires_grad_(needs_grad)
        positives = Positives(
            label=selection.targets.reshape(-1),
            sample=targets.sample + selection.first_sample,
            norm=norm,
            exists=targets.exists.reshape(-1),
            draw=selection.draw_key,
            replicas=selection.ranks.replica_group,
        )
        z = margin.target(cosine, positives) * margin.scale
        grads: tuple[Tensor | None, ...] = (None, None)
        if needs_grad and z.requires_grad:
            grads = torch.autograd.grad(z.sum(), (cosine, norm), allow_unused=True)
    d_cosine, d_norm = (torch.zeros_like(cosines) if g is None else torch.where(targets.own, g, 0.0) for g in grads)
    return z.detach(), d_cosine, d_norm


def combine(
    sums: TileSums, z: Tensor, cosines: Tensor, selection: Selection, options: LossOptions
) -> dict[str, Tensor]:
    """Return by name what every rank found, `[world, ...]`: one all-gather."""
    parts = {"maximum": sums.maximum[:, 0], "total": sums.total[:, 0], "z": z, "cosines": cosines}
    if sums.smoothing is not None:
        scale = options.margin.scale
        parts["logits"], parts["count"] = sums.smoothing.finish(sums.targets, z, cosines, scale, sums.rows.count)
    if sums.active is not None:
        parts["active"] = sums.active
    if sums.hardest is not None:
        parts["hardest"] = sums.hardest
    everyone = all_gather(torch.cat(list(parts.values())), selection.ranks.group, "the combination of the softmax")
    return dict(zip(parts, everyone.split([len(p) for p in parts.values()], dim=1), strict=True))


def softmax_losses(
    found: dict[str, Tensor],
    target_logits: Tensor,
    exists: Tensor,
    selection: Selection,
    options: LossOptions,
    smoothed_over: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (losses `[N]`, lse `[N]` = log Σ exp over all selected classes)."""
    smoothing = options.label_smoothing
    # in logarithms: where there is no class but the target, the exponential of its logit may be too small for float32
    of_others = found["total"].log() + found["maximum"]  # [world, N]
    of_targets = torch.where(exists, target_logits, -torch.inf).t()  # [L, N]
    lse = torch.cat((of_others, of_targets)).logsumexp(0)
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # an ignored sample behind a filter may have no class; NaN stays
    losses = (1 - smoothing) * (selection.target_weights * (lse[:, None] - target_logits)).sum(1)
    if smoothing:
        losses = losses + smoothing * (lse - found["logits"].sum(0) / smoothed_over)
    return losses, lse


def _penalty(margin: Margin, norms: Tensor, needs_grad: bool) -> tuple[Tensor | None, Tensor]:
    """Return (what the margin adds to the losses `[N]` or None, its derivative by the embeddings' lengths)."""
    with torch.set_grad_enabled(needs_grad):
        leaf = norms.detach().requires_grad_(needs_grad)
        penalty = margin.penalty(leaf)
        if penalty is None or not needs_grad:
            return penalty, torch.zeros_like(norms)
        return penalty.detach(), torch.autograd.grad(penalty.sum(), leaf)[0]


def _reduce(losses: Tensor, selection: Selection, reduction: str) -> Tensor:
    if reduction == "none":
        return losses[selection.batch.local].clone()
    loss = losses.sum()
    if selection.ranks.replica_group is None:
        return loss
    # the replicas of a 2-D mesh hold other samples, whose share of the loss is theirs to add
    return all_gather(loss, selection.ranks.replica_group).sum(0)
