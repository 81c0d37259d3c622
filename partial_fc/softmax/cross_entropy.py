"""Cross-entropy over class rows that are split over ranks, with a margin on the target logits: forward and backward, tile by tile.

Every rank holds all embeddings `X [N, D]` and its own rows `W [S, D]` (its shard, or the rows selected from it). With unit vectors
`x = X/‖X‖`, `w = W/‖W‖` (or X and W as they are) and `P = N · L` targets, one a sample and label:

    forward    cosines of the targets  t_p = x_i · w_y     [P], each on the rank that owns y; target logits z_p = s · margin(t_p)
               for tiles of T rows     e = exp(s · x wᵀ − m), targets left out   [N, T]; m [N] the running maximum, their sum [N]
               one all-gather          (m, sum, z, t) of every rank   O(N · world) numbers;  lse_i = log Σ_j exp(logit_ij)
               loss_i                  Σ_l weight_il (lse_i − z_il)
    backward   for tiles of T rows     g = c_i exp(logit − lse)   [N, T], in kept mode e times a factor a row, folded into x
               dx += g w,  dw = gᵀ x   then the targets' own share, [P] rank-one terms

so that no mask, one-hot or second copy of the logits exists. *Kept* mode writes `e` of all tiles into one buffer `[N, S]` and uses it
again in backward: three matrix products a step. *Tiled* mode keeps one tile and computes it again: four products, O(N · T) memory.

Label smoothing ε adds `ε (lse_i − mean over selected logits)`; its gradient is the same for all rows of a sample, so it is a vector too.

Where a margin has a rule for other classes, several centers a class, or a filter is set, a tile goes through `tiles.ruled_logits` before
the exponential, and what is kept are exponentials times the rule's derivative, so that backward does not know the difference. Only label
smoothing then needs the logits themselves again: with both, logits are always tiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.batch import on_each_loss
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import all_gather, start_reduce_scatter
from partial_fc.margins.base import Positives
from partial_fc.softmax.tiles import (
    Measured,
    Rows,
    Step,
    Targets,
    compute_dtypes,
    leave_out,
    low_precision_product,
    ruled_logits,
    tangent,
    tile_logits,
    tile_rows,
    unit,
)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), to the last digit of float64; torch's own is x from 20 on."""
    return torch.nn.functional.softplus(x, threshold=40.0)


class ShardedCrossEntropy(torch.autograd.Function):
    """(embeddings, weight, bias, offset, anchor, step) -> loss.

    embeddings: [N_local, D] of this rank if step.scatter, else the global [N, D]. weight: [C_local, D] or [C_local, K, D]; bias: [C_local]
    or None; offset: [1], added to all logits of a binary margin (which adds it), or None.
    anchor: a scalar that requires grad under sampling, where weight and bias are detached and their rows' gradients go to
    step.on_row_grad instead. The loss is a scalar that is the same on every rank, or [N_local] for reduction "none".
    """

    @staticmethod
    def forward(ctx, embeddings, weight, bias, offset, anchor, step):  # type: ignore[no-untyped-def]
        stats, product = compute_dtypes(embeddings, weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            # detached: what ctx keeps besides saved tensors outlives backward, and must not hold the parameters themselves
            forward = _Forward(step, weight.detach(), None if bias is None else bias.detach(), stats, product)
            loss, saved = forward.run(step.needs_grad and any(ctx.needs_input_grad))
        ctx.save_for_backward(weight, bias, *saved)
        ctx.step, ctx.rows, ctx.targets, ctx.tile, ctx.dtypes = (
            step,
            forward.rows,
            forward.targets,
            forward.tile,
            (stats, product),
        )
        ctx.embedding_dtype, ctx.anchored = embeddings.dtype, anchor is not None and anchor.requires_grad
        ctx.offset_dtype = None if offset is None else offset.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, bias, *saved = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            return _Backward(ctx, grad, weight, bias, saved).run()


class _Forward:
    def __init__(
        self, step: Step, weight: Tensor, bias: Tensor | None, stats: torch.dtype, product: torch.dtype
    ) -> None:
        self.step, self.stats, self.product = step, stats, product
        self.rows = Rows(weight, bias, step, stats)
        X = step.batch.embeddings
        self.N, self.D = X.shape
        self.norms = torch.linalg.vector_norm(X, dim=1, dtype=stats)
        self.x, self.x_inverse = unit(X, stats) if step.margin.normalize else (X.to(stats), X.new_empty(0))
        # a tile holds whole classes
        self.tile = max(1, tile_rows(self.N, self.D, X.device.type) // step.margin.centers) * step.margin.centers
        step.bounded = self._is_bounded()
        with record_function("partial_fc::targets"):
            self.targets = Targets.locate(step, len(weight), self.rows.count)

    def _is_bounded(self) -> bool:
        """Whether no sum of exponentials can leave the range of its dtype, so that no maximum need be found and taken off.

        A cosine times the scale is at most the scale; 64 and a thousand million classes fit into float32.
        """
        step = self.step
        if step.margin.binary:
            return True
        if not step.margin.normalize or step.margin.has_rule or self.product is torch.float16:
            return False
        return step.margin.scale + math.log(step.num_classes) < math.log(torch.finfo(self.stats).max) - 2

    def run(self, needs_grad: bool) -> tuple[Tensor, list[Tensor]]:
        step = self.step
        raw = self._target_cosines()
        z, on_cosine, on_norm = self._with_margin(raw, needs_grad)
        if step.margin.has_rule:
            step.rule, step.aim = step.margin.frozen(), self._aim(z)
            z = torch.where(self.targets.own, z, 0.0)
        # float16 has too little range for decisions that no maximum of their sample brings near 1
        kept = step.kept and needs_grad and not (step.margin.binary and self.product is torch.float16)
        with record_function("partial_fc::forward_tiles"):
            tiles = _Sums(self, kept)
            for t, (a, b) in enumerate(self.rows.tiles(self.tile)):
                tiles.add(t, a, b)
            self.rows.measured = True
        with record_function("partial_fc::combine"):
            found = self._combine(tiles, z, raw)
        assert step.measured is not None
        losses, lse = self._binary(found) if step.margin.binary else self._cross_entropy(found)
        penalty, on_penalty = self._penalty(needs_grad)
        if penalty is not None:
            losses = losses + penalty
        losses = step.losses = torch.where(step.sample_weights != 0, losses, 0.0) * step.sample_weights
        saved = [
            self.x,
            self.x_inverse,
            lse,
            step.measured.targets,
            on_cosine,
            on_norm,
            on_penalty,
            tiles.kept,
            tiles.maxima,
            tiles.row_sum,
        ]
        return self._reduce(losses), saved

    # ------------------------------------------------------------------------------------------------ targets

    def _target_cosines(self) -> Tensor:
        """Cosines (plain logits) `[P]` of the targets, to the nearest of their class's centers; 0 on ranks that do not own the class."""
        targets, centers = self.targets, self.step.margin.centers
        raw = self.x.new_zeros(len(targets.sample))
        if self.rows.count and centers == 1:
            raw = torch.linalg.vecdot(self.x[targets.sample], self.rows.at(targets.row)[0]) + self.rows.bias_at(
                targets.row
            )
        elif self.rows.count:
            positions = targets.first[:, None] + torch.arange(centers, device=raw.device)
            directions = self.rows.at(positions.reshape(-1))[0].view(len(raw), centers, self.D)
            raw, nearest = torch.linalg.vecdot(self.x[targets.sample][:, None], directions).max(1)
            targets.row = targets.first + nearest
        return torch.where(targets.own, raw, 0.0)

    def _with_margin(self, raw: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(target logits, their derivatives by the cosine and by the embedding's length), each `[P]`, 0 on ranks that do not own the class.

        A margin that looks at all cosines gets them on every rank, and its target logits are everywhere.
        """
        step, targets = self.step, self.targets
        margin, everywhere = step.margin, step.margin.sees_all or step.margin.has_rule
        if everywhere:
            raw = all_gather(raw, step.ranks.group).sum(0)
        with torch.set_grad_enabled(needs_grad):
            cosine = raw.detach().requires_grad_(needs_grad)
            norm = self.norms[targets.sample].requires_grad_(needs_grad)
            positives = Positives(
                label=step.targets.reshape(-1),
                sample=targets.sample + step.first_sample,
                norm=norm,
                exists=targets.exists.reshape(-1),
                draw=step.draw,
                replicas=step.ranks.replica_group,
            )
            z = margin.target(cosine, positives) * margin.scale
            nothing = torch.zeros_like(raw)
            grads = (
                torch.autograd.grad(z.sum(), (cosine, norm), allow_unused=True)
                if needs_grad and z.requires_grad
                else (None, None)
            )
        on_cosine, on_norm = (nothing if g is None else torch.where(targets.own, g, 0.0) for g in grads)
        z = z.detach()
        return z if margin.has_rule else torch.where(targets.own, z, 0.0), on_cosine, on_norm

    def _aim(self, z: Tensor) -> Tensor:
        """`[N, 1]`: the mean of a sample's target logits, weighted as the targets are, before scaling."""
        weights = self.step.target_weights
        total = weights.sum(1, keepdim=True)
        mean = (z.view_as(weights) * weights).sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return mean / self.step.margin.scale

    def _penalty(self, needs_grad: bool) -> tuple[Tensor | None, Tensor]:
        """(what the margin adds to the losses `[N]`, its derivative by the embeddings' lengths)."""
        with torch.set_grad_enabled(needs_grad):
            norms = self.norms.detach().requires_grad_(needs_grad)
            penalty = self.step.margin.penalty(norms)
            if penalty is None or not needs_grad:
                return penalty, torch.zeros_like(norms)
            return penalty.detach(), torch.autograd.grad(penalty.sum(), norms)[0]

    # ------------------------------------------------------------------------------------------------ over ranks

    def _combine(self, tiles: _Sums, z: Tensor, raw: Tensor) -> dict[str, Tensor]:
        """By name, what each rank found `[world, ...]`: one all-gather."""
        step, targets = self.step, self.targets
        parts = {"maximum": tiles.maximum[:, 0], "total": tiles.total[:, 0], "z": z, "raw": raw}
        if step.label_smoothing:
            parts["logits"], parts["count"] = tiles.smoothing_sums(z, raw)
        if step.margin.binary:
            parts["active"] = tiles.active
        if tiles.hardest is not None:
            parts["hardest"] = tiles.hardest
        everyone = all_gather(torch.cat(list(parts.values())), step.ranks.group, "the combination of the softmax")
        found = dict(zip(parts, everyone.split([len(p) for p in parts.values()], dim=1), strict=True))
        targets_z = found["z"].sum(0).view_as(step.targets)
        hardest = found["hardest"].amax(0) if "hardest" in found else None
        step.measured = Measured(
            found["raw"].sum(0).view_as(step.targets), targets_z, targets.exists, self.norms, hardest
        )
        return found

    def _binary(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(losses `[N]` of a margin that takes every class for a decision; how many others are taken for the own one, `[N]`)."""
        step = self.step
        assert step.measured is not None and step.margin.binary is not None
        of_own, of_others = step.margin.binary
        own = (step.target_weights * softplus(-step.measured.targets)).sum(1)
        return of_own * own + of_others * found["total"].sum(0), found["active"].sum(0)

    def _cross_entropy(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(losses `[N]`, log Σ exp over all selected classes `[N]`)."""
        step, smoothing = self.step, self.step.label_smoothing
        assert step.measured is not None
        targets_z, exists = step.measured.targets, step.measured.exists
        m, s = found["maximum"], found["total"]
        # in logarithms: where there is no class but the target, the exponential of its logit may be too small for float32
        lse = torch.cat((s.log() + m, torch.where(exists, targets_z, -torch.inf).t())).logsumexp(0)
        lse = torch.where(
            lse == -torch.inf, 0.0, lse
        )  # an ignored sample may have no class at all, behind a filter; NaN stays
        losses = (1 - smoothing) * (step.target_weights * (lse[:, None] - targets_z)).sum(1)
        if smoothing:
            step.selected = found["count"].sum(0).clamp_(min=1)
            losses = losses + smoothing * (lse - found["logits"].sum(0) / step.selected)
        return losses, lse

    def _reduce(self, losses: Tensor) -> Tensor:
        step = self.step
        if step.reduction == "none":
            return losses[step.batch.local].clone()
        loss = losses.sum()
        # the replicas of a 2-D mesh hold other samples, whose share of the mean is theirs to add
        return all_gather(loss, step.ranks.replica_group).sum(0) if step.ranks.replica_group else loss


class _Sums:
    """What is summed over the tiles of this rank: maximum `[N, 1]`, total `[N, 1]` of exponentials less the maximum, and what is kept.

    kept `[N · S]`: exponentials for backward, tile after tile; maxima `[tiles, N, 1]`: what was taken off them.
    row_sum `[D + 1]`: sum of the rows' directions and biases, for label smoothing. For a margin with binary decisions total is the sum of
    their losses, kept are their derivatives, and active `[N]` is the sum of these.
    """

    def __init__(self, forward: _Forward, keep: bool) -> None:
        self.forward, self.step, self.rows, self.keep = forward, forward.step, forward.rows, keep
        self.N, self.D, self.targets, self.stats = forward.N, forward.D, forward.targets, forward.stats
        step, rows, x = self.step, self.rows, forward.x
        self.maximum = x.new_full((self.N, 1), 0.0 if step.bounded else torch.finfo(self.stats).min)
        self.total = x.new_zeros(self.N, 1)
        name = "logits" if step.rows is None else "selected logits"
        self.kept = (
            step.workspace.take(name, (self.N * rows.count,), forward.product, x.device) if keep else x.new_empty(0)
        )
        self.maxima = x.new_empty(-(-rows.count // forward.tile) if keep else 0, self.N, 1)
        # exponentials that no maximum is taken off may be made in the products' dtype at once; their sum is in that of the statistics
        work = forward.product if step.bounded and not step.ruled else self.stats
        in_place = keep and forward.product == work
        self.scratch = None if in_place else x.new_empty(self.N * min(forward.tile, max(rows.count, 1)), dtype=work)
        self.scaled = (x if step.ruled else x * step.margin.scale).to(forward.product)
        self.row_sum = x.new_zeros(self.D + 1 if step.label_smoothing and not step.ruled else 0)
        self.logit_sum, self.count = (
            x.new_zeros(self.N if step.label_smoothing and step.ruled else 0) for _ in range(2)
        )
        self.active = x.new_zeros(self.N if step.margin.binary else 0)
        self.hardest = x.new_full((self.N,), torch.finfo(self.stats).min) if step.metrics else None

    def add(self, t: int, a: int, b: int) -> None:
        """Tile t: rows a to b."""
        N, step = self.N, self.step
        w = self.rows.tile(a, b)
        where = self.kept[N * a : N * b] if self.scratch is None else self.scratch[: N * (b - a)]
        logits = tile_logits(self.scaled, w, self.rows.tile_bias(a, b), where.view(N, b - a))
        slope = None
        if step.ruled:
            cosines = logits
            logits, slope = ruled_logits(step, cosines, self.targets, a)
            self._count(logits)
            if self.hardest is not None:
                self._look_for_hardest(torch.where(logits > -torch.inf, cosines, -torch.inf), 1.0)
        else:
            leave_out(logits, self.targets, N, a)
            self._look_for_hardest(logits, step.margin.scale)
            if step.label_smoothing:
                self.row_sum[: self.D] += w.sum(0)
                self.row_sum[self.D] += 0.0 if self.rows.bias is None else self.rows.tile_bias(a, b).sum()  # type: ignore[union-attr]
        if step.margin.binary:
            self.total.add_(softplus(logits).sum(1, keepdim=True))
            self.active.add_(logits.sigmoid_().sum(1))
        else:
            self._exponentials(logits)
        if self.keep:
            self.maxima[t] = self.maximum
            if slope is not None:
                logits.mul_(slope)
            if self.scratch is not None or step.ruled:
                self.kept[N * a : N * b].view(N, b - a).copy_(logits)

    def _exponentials(self, logits: Tensor) -> None:
        """In place, with their sum."""
        if not self.step.bounded and self.N:
            before, self.maximum = self.maximum, torch.maximum(self.maximum, logits.amax(1, keepdim=True))
            logits.sub_(self.maximum)
            self.total.mul_((before - self.maximum).exp_())
        self.total.add_(logits.exp_().sum(1, keepdim=True, dtype=self.stats))

    def _count(self, logits: Tensor) -> None:
        if self.step.label_smoothing:
            present = logits > -torch.inf
            self.logit_sum += torch.where(present, logits, 0.0).sum(1)
            self.count += present.sum(1)

    def _look_for_hardest(self, logits: Tensor, scale: float) -> None:
        if self.hardest is not None and logits.numel():
            self.hardest = torch.maximum(self.hardest, logits.amax(1).to(self.stats) / scale)

    def smoothing_sums(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of this rank's logits, targets with their margin, `[N]`; how many there are, `[1]` or `[N]`)."""
        targets, scale = self.targets, self.step.margin.scale
        if self.step.ruled:
            sums = self.logit_sum.index_add(0, targets.sample, z)
            return sums, self.count.index_add(0, targets.sample, targets.own.to(sums.dtype))
        sums = (self.forward.x @ self.row_sum[: self.D] + self.row_sum[self.D]) * scale
        sums.index_add_(0, targets.sample, torch.where(targets.own, z - scale * raw, 0.0))
        return sums, sums.new_full((1,), float(self.rows.count))


class _Backward:
    def __init__(self, ctx, grad: Tensor, weight: Tensor, bias: Tensor | None, saved: list[Tensor]) -> None:  # type: ignore[no-untyped-def]
        self.step, self.rows, self.targets, self.tile = ctx.step, ctx.rows, ctx.targets, ctx.tile
        self.stats, self.product = ctx.dtypes
        self.embedding_dtype, self.anchored, self.needs = ctx.embedding_dtype, ctx.anchored, ctx.needs_input_grad
        self.offset_dtype = ctx.offset_dtype
        self.weight, self.bias = weight, bias
        (
            self.x,
            self.x_inverse,
            self.lse,
            z,
            on_cosine,
            on_norm,
            on_penalty,
            self.kept,
            self.tile_maxima,
            self.row_sum,
        ) = saved
        self.N, self.D = self.x.shape
        step, smoothing = self.step, self.step.label_smoothing
        if self.rows.count:  # before any row is updated
            self.target_w, self.target_inverse = self.rows.at(self.targets.row)
        self.c = on_each_loss(grad.to(self.stats), self.step.batch, self.step.sample_weights, self.step.reduction)
        if step.margin.binary:
            of_own, of_others = step.margin.binary
            # the factor of what the other decisions' derivatives are; per target d loss / d target logit
            self.on_lse = self.c * of_others
            self.from_zero = self.from_lse = self.on_lse[:, None]
            on_z = -self.c[:, None] * of_own * step.target_weights * torch.sigmoid(-z)
            self.on_offset = (torch.where(self.targets.exists, on_z, 0.0).sum() + (self.on_lse * self.lse).sum())[None]
        else:
            # d loss / d lse, and per target d loss / d target logit
            self.on_lse = self.c * ((1 - smoothing) * step.target_weights.sum(1) + smoothing)
            # the factors of exponentials: of logits as they are, and of logits less lse
            # (bounded logits of others are at least -scale; where lse is less there are none, and nothing may become infinite)
            self.from_zero = self.on_lse[:, None] * (-self.lse[:, None]).clamp(max=step.margin.scale + 1).exp()
            self.from_lse = self.on_lse[:, None]
            probability = (z - self.lse[:, None]).exp()
            on_z = self.on_lse[:, None] * probability - self.c[:, None] * (1 - smoothing) * step.target_weights
        self.uniform = torch.zeros_like(self.c)  # d loss / d every selected logit, of label smoothing
        if smoothing:
            assert step.selected is not None
            self.uniform = -self.c * smoothing / step.selected
            on_z = on_z + self.uniform[:, None]
        # where logits are scaled cosines, the share of label smoothing is the same for all rows of a sample
        self.same_for_all = bool(smoothing) and not step.ruled
        on_z = torch.where(self.targets.exists, on_z, 0.0).reshape(-1)
        self.on_raw = on_z * on_cosine
        if self.same_for_all:
            self.uniform_rows = (self.uniform @ self.x) * step.margin.scale
            # every row gets that share below; it is taken back where a margin replaces it
            taken_back = torch.where(self.targets.own, step.margin.scale * self.uniform[self.targets.sample], 0.0)
            self.on_raw = self.on_raw - taken_back
        self.on_norm = torch.zeros_like(self.c).index_add_(0, self.targets.sample, on_z * on_norm)
        if step.ranks.rank == 0:  # the penalty is every sample's own; gradients are summed over the ranks
            self.on_norm = self.on_norm + self.c * on_penalty

    def run(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        want_x, want_w = self.needs[0], self.anchored or self.needs[1] or self.needs[2]
        # the sum of embedding gradients over ranks travels while the class gradients are computed
        overlap = (
            want_x and want_w and self.step.scatter and self.kept.numel() > 0 and self.step.ranks.group is not None
        )
        overlap = overlap and self.step.start_update is None
        with record_function("partial_fc::backward_tiles"):
            dx, dw = self._tiles(want_x, want_w and not overlap)
        finish = self._send(dx) if want_x else None
        if overlap:
            with record_function("partial_fc::backward_tiles"):
                _, dw = self._tiles(False, True)
        weight_grad, bias_grad = self._finish_rows(dw)
        return None if finish is None else finish(), weight_grad, bias_grad, self._offset_grad(), None, None

    def _offset_grad(self) -> Tensor | None:
        """`[1]`, the same on every rank: each knows all it is made of, but for the samples of other replicas."""
        if not self.needs[3]:
            return None
        replicas = self.step.ranks.replica_group
        return all_gather(self.on_offset, replicas).sum(0).to(self.offset_dtype)

    def _send(self, dx: Tensor) -> Callable[[], Tensor]:
        step = self.step
        if step.scale_embedding_grad:
            dx.mul_(step.ranks.total)
        if not step.scatter:
            return lambda: dx.to(self.embedding_dtype)
        with record_function("partial_fc::scatter"):
            wait = start_reduce_scatter(dx, step.ranks, step.batch.counts)
        return lambda: wait().to(self.embedding_dtype)

    def _tiles(self, want_x: bool, want_w: bool) -> tuple[Tensor, list[Tensor]]:
        """(gradient of all embeddings from this rank's rows `[N, D]`, gradients of the rows `[S, D]` and biases `[S]`)."""
        N, rows = self.N, self.rows
        dx = self.x.new_zeros(N, self.D if want_x else 0)
        update = self.step.start_update() if want_w and self.step.start_update is not None else None
        length = rows.count if update is None else min(self.tile, rows.count)
        dw = rows.gradient_memory(length) if want_w else None
        db = self.x.new_empty(length, dtype=self.stats) if want_w and self.bias is not None else None
        size = 0 if self.kept.numel() else N * min(self.tile, max(rows.count, 1))
        self.scratch = self.x.new_empty(
            size, dtype=self.product if self.step.bounded and not self.step.ruled else self.stats
        )
        self.scaled = (self.x if self.step.ruled else self.x * self.step.margin.scale).to(self.product)
        previous, weighted = None, self.x
        for t, (a, b) in enumerate(rows.tiles(self.tile)):
            w = rows.tile(a, b)
            e, factor = self._exponentials(t, a, b, w)
            if want_x:
                product = torch.mm(e, w.to(self.product)).to(self.stats)
                dx.addcmul_(product, factor)
            if dw is None:
                continue
            if factor is not previous:
                previous, weighted = factor, self.x * (factor * self.step.margin.scale)
            at = slice(a, b) if update is None else slice(0, b - a)
            self._row_grad(dw[at], e, weighted, w, a, b)
            if db is not None:
                db[at] = torch.mv(e.t().to(self.stats), factor[:, 0]) + (
                    self.uniform.sum() if self.same_for_all else 0.0
                )
            if update is not None:
                centers = self.step.margin.centers
                update(a // centers, b // centers, self._complete(dw[at], None if db is None else db[at], a))
        if want_x:
            self._targets_to_embeddings(dx.mul_(self.step.margin.scale))
        if dw is None:
            return dx, []
        rows.held = None  # written over; a second backward gathers the rows again
        if update is None:
            return dx, self._complete(dw, db, 0)
        if not rows.count:  # scalar state moves on as on other ranks
            update(0, 0, self._complete(dw, db, 0))
        return dx, []

    def _exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """(e `[N, T]`, factor `[N, 1]`) of tile t: d loss / d logit = e · factor, where the logit is no target."""
        if self.kept.numel():
            e = self.kept[self.N * a : self.N * b].view(self.N, b - a)
            return e, self.from_zero if self.step.bounded else self.on_lse[:, None] * (
                self.tile_maxima[t] - self.lse[:, None]
            ).exp_()
        logits = self.scratch[: self.N * (b - a)].view(self.N, b - a)
        logits = tile_logits(self.scaled, w, self.rows.tile_bias(a, b), logits)
        if self.step.ruled:
            return self._ruled_gradient(logits, a)
        leave_out(logits, self.targets, self.N, a)
        if self.step.bounded:
            return logits.exp_().to(self.product), self.from_zero
        if self.product is not torch.float16:
            return logits.sub_(self.lse[:, None]).exp_().to(self.product), self.from_lse
        # float16 has too little range for small probabilities: scale each row by its largest
        peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(self.stats).min)
        return logits.sub_(peak).exp_().to(self.product), self.on_lse[:, None] * (peak - self.lse[:, None]).exp_()

    def _ruled_gradient(self, cosines: Tensor, a: int) -> tuple[Tensor, Tensor]:
        """As `_exponentials`, for logits that a rule makes of cosines."""
        logits, slope = ruled_logits(self.step, cosines, self.targets, a)
        e = logits.sigmoid() if self.step.margin.binary else (logits - self.lse[:, None]).exp_()
        if self.step.label_smoothing:
            share = torch.where(self.from_lse != 0, self.uniform[:, None] / self.from_lse, 0.0)
            e += share * (logits > -torch.inf)
        if slope is not None:
            e *= slope
        if self.product is not torch.float16:
            return e.to(self.product), self.from_lse
        peak = e.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(self.stats).tiny)
        return (e / peak).to(self.product), self.from_lse * peak

    def _row_grad(self, out: Tensor, e: Tensor, weighted: Tensor, w: Tensor, a: int, b: int) -> None:
        """`out [T, D]` = gradient of rows a to b from all logits but the targets'; out may be the memory of w."""
        if self.product == self.stats == out.dtype and self.rows.held is None:
            grad = torch.mm(e.t(), weighted, out=out)
        else:
            grad = low_precision_product(e, weighted, self.product).to(self.stats)
        if self.same_for_all:
            grad += self.uniform_rows
        if self.rows.inverse is not None:
            tangent(grad, w, self.rows.inverse[a:b], out=out if out.dtype == grad.dtype else grad)
        if out.dtype != grad.dtype or self.rows.inverse is None:
            out.copy_(grad)

    def _targets_to_embeddings(self, dx: Tensor) -> None:
        if self.rows.count:
            dx.index_add_(0, self.targets.sample, self.target_w * self.on_raw[:, None])
        if self.same_for_all:
            dx += self.uniform[:, None] * (self.row_sum[: self.D] * self.step.margin.scale)
        if self.rows.inverse is not None:
            tangent(dx, self.x, self.x_inverse, out=dx)
            dx.addcmul_(self.x, self.on_norm[:, None])

    def _complete(self, dw: Tensor, db: Tensor | None, a: int) -> list[Tensor]:
        """The gradients of rows a, a + 1, ... with the targets' share in them, summed over replicas."""
        if len(dw):
            position = self.targets.row - a
            here = self.targets.own & (position >= 0) & (position < len(dw))
            position, on_raw = torch.where(here, position, 0), torch.where(here, self.on_raw, 0.0)
            grad = self.x[self.targets.sample] * on_raw[:, None]
            if self.rows.inverse is not None:
                tangent(grad, self.target_w, self.target_inverse, out=grad)
            dw.index_add_(0, position, grad.to(dw.dtype))
            if db is not None:
                db.index_add_(0, position, on_raw)
        dw = dw.view(len(dw) // self.step.margin.centers, *self.weight.shape[1:])
        grads = [dw] if db is None else [dw, db.to(self.bias.dtype)]  # type: ignore[union-attr]
        if self.step.ranks.replica_group is not None:
            with record_function("partial_fc::replicas"):
                for each in grads:
                    with naming_the_missing("the sum of class gradients", self.step.ranks.replica_group):
                        torch.distributed.all_reduce(each, group=self.step.ranks.replica_group)
        return grads

    def _finish_rows(self, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Hand the rows' gradients over under sampling, else return them to autograd."""
        if not grads:
            return None, None
        if self.anchored:
            assert self.step.rows is not None
            self.step.on_row_grad(self.step.rows, grads)
            return None, None
        return grads[0] if self.needs[1] else None, grads[1] if self.bias is not None and self.needs[2] else None
