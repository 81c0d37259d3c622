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
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.collectives import all_gather, start_reduce_scatter
from partial_fc.tiles import (
    Rows,
    Step,
    Targets,
    compute_dtypes,
    leave_out,
    low_precision_product,
    tangent,
    tile_logits,
    tile_rows,
    unit,
)


class ShardedCrossEntropy(torch.autograd.Function):
    """(embeddings, weight, bias, anchor, step) -> loss.

    embeddings: [N_local, D] of this rank if step.scatter, else the global [N, D]. weight: [C_local, D]; bias: [C_local] or None.
    anchor: a scalar that requires grad under sampling, where weight and bias are detached and their rows' gradients go to
    step.on_row_grad instead. The loss is a scalar that is the same on every rank, or [N_local] for reduction "none".
    """

    @staticmethod
    def forward(ctx, embeddings, weight, bias, anchor, step):  # type: ignore[no-untyped-def]
        stats, product = compute_dtypes(embeddings, weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            forward = _Forward(step, weight, bias, stats, product)
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
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, bias, *saved = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            return _Backward(ctx, grad, weight, bias, saved).run()


class _Forward:
    def __init__(self, step: Step, weight: Tensor, bias: Tensor | None, stats: torch.dtype, product: torch.dtype) -> None:
        self.step, self.stats, self.product = step, stats, product
        self.rows = Rows(weight, bias, step, stats)
        X = step.batch.embeddings
        self.N, self.D = X.shape
        self.x, self.x_inverse = unit(X, stats) if step.margin.normalize else (X.to(stats), X.new_empty(0))
        self.tile = tile_rows(self.N, self.D, X.device.type)
        step.bounded = self._is_bounded()
        with record_function("partial_fc::targets"):
            self.targets = Targets.locate(step, len(weight), self.rows.count)

    def _is_bounded(self) -> bool:
        """Whether no sum of exponentials can leave the range of its dtype, so that no maximum need be found and taken off.

        A cosine times the scale is at most the scale; 64 and a thousand million classes fit into float32.
        """
        step = self.step
        largest = math.log(torch.finfo(self.stats).max) - 2
        return step.margin.normalize and self.product is not torch.float16 and step.margin.scale + math.log(step.num_classes) < largest

    def run(self, needs_grad: bool) -> tuple[Tensor, list[Tensor]]:
        step = self.step
        raw, z, slope = self._target_logits(needs_grad)
        kept = step.kept and needs_grad
        with record_function("partial_fc::forward_tiles"):
            maximum, total, exponentials, tile_maxima, row_sum = self._tiles(kept)
        with record_function("partial_fc::combine"):
            lse, z, cosine, mean_logit = self._combine(maximum, total, z, raw, row_sum)
        step.cosines = cosine
        smoothing = step.label_smoothing
        losses = (1 - smoothing) * (step.target_weights * (lse[:, None] - z)).sum(1)
        if smoothing:
            losses = losses + smoothing * (lse - mean_logit)
        losses = torch.where(step.sample_weights != 0, losses, 0.0) * step.sample_weights
        saved = [self.x, self.x_inverse, lse, z, raw, slope, exponentials, tile_maxima, row_sum]
        return self._reduce(losses), saved

    def _target_logits(self, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(cosine or plain logit, target logit, derivative of the second by the first), each `[P]`, 0 on other ranks."""
        targets, step, x = self.targets, self.step, self.x
        raw = x.new_zeros(len(targets.sample))
        if self.rows.count:
            raw = torch.linalg.vecdot(x[targets.sample], self.rows.at(targets.row)[0]) + self.rows.bias_at(targets.row)
        raw = torch.where(targets.own, raw, 0.0)
        if not needs_grad:
            z, slope = step.margin.target(raw) * step.margin.scale, torch.zeros_like(raw)
        else:
            with torch.enable_grad():
                leaf = raw.detach().requires_grad_()
                z = step.margin.target(leaf) * step.margin.scale
                slope = torch.autograd.grad(z.sum(), leaf)[0]
        return raw, torch.where(targets.own, z.detach(), 0.0), torch.where(targets.own, slope, 0.0)

    def _tiles(self, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(running maximum `[N]`, sum of exponentials `[N]`, kept exponentials `[N · S]`, maxima a tile, sum of directions `[D + 1]`)."""
        x, rows, step, N = self.x, self.rows, self.step, self.N
        maximum = x.new_full((N, 1), 0.0 if step.bounded else torch.finfo(self.stats).min)
        total = x.new_zeros(N, 1)
        tile = min(self.tile, max(rows.count, 1))
        kept = self._buffer(N * rows.count) if keep else x.new_empty(0)
        tile_maxima = x.new_empty(-(-rows.count // self.tile) if keep else 0, N, 1)
        # exponentials that no maximum is taken off may be made in the products' dtype at once; their sum is in that of the statistics
        work = self.product if step.bounded else self.stats
        scratch = None if keep and self.product == work else x.new_empty(N * tile, dtype=work)
        row_sum = x.new_zeros(self.D + 1 if step.label_smoothing else 0)
        scaled = (x * step.margin.scale).to(self.product)
        for t, (a, b) in enumerate(rows.tiles(self.tile)):
            w = rows.tile(a, b)
            target = kept[N * a : N * b] if scratch is None else scratch[: N * (b - a)]
            logits = tile_logits(scaled, w, rows.tile_bias(a, b), target.view(N, b - a))
            leave_out(logits, self.targets, N, a)
            if not step.bounded and N:
                before, maximum = maximum, torch.maximum(maximum, logits.amax(1, keepdim=True))
                logits.sub_(maximum)
                total.mul_((before - maximum).exp_())
            total.add_(logits.exp_().sum(1, keepdim=True, dtype=self.stats))
            if keep:
                tile_maxima[t] = maximum
                if scratch is not None:
                    kept[N * a : N * b].view(N, b - a).copy_(logits)
            if step.label_smoothing:
                row_sum[: self.D] += w.sum(0)
                row_sum[self.D] += 0.0 if rows.bias is None else rows.tile_bias(a, b).sum()  # type: ignore[union-attr]
        rows.measured = True
        return maximum[:, 0], total[:, 0], kept, tile_maxima, row_sum

    def _buffer(self, size: int) -> Tensor:
        name = "logits" if self.step.rows is None else "selected logits"
        return self.step.workspace.take(name, (size,), self.product, self.x.device)

    def _combine(self, maximum: Tensor, total: Tensor, z: Tensor, raw: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log Σ exp over all selected classes `[N]`, target logits, target cosines `[N, L]`, mean logit `[N]`): one all-gather."""
        step, shape = self.step, self.step.targets.shape
        parts = [maximum, total, z, raw]
        if step.label_smoothing:
            scale = step.margin.scale
            sums = (self.x @ row_sum[: self.D] + row_sum[self.D]) * scale
            sums.index_add_(0, self.targets.sample, torch.where(self.targets.own, z - scale * raw, 0.0))
            parts += [sums, sums.new_full((1,), float(self.rows.count))]
        everyone = all_gather(torch.cat(parts), step.ranks.group)
        m, s, zs, cosines, *rest = everyone.split([len(p) for p in parts], dim=1)
        z, cosine = zs.sum(0).view(shape), cosines.sum(0).view(shape)
        absent = torch.finfo(z.dtype).min
        z_in = torch.where(self.targets.exists, z, absent)
        shift = torch.cat((m.amax(0)[:, None], z_in), 1).amax(1)
        sums = (s * (m - shift).exp()).sum(0) + ((z_in - shift[:, None]).exp() * self.targets.exists).sum(1)
        lse = sums.log() + shift
        if not rest:
            return lse, z, cosine, lse
        step.selected = rest[1].sum()
        return lse, z, cosine, rest[0].sum(0) / step.selected

    def _reduce(self, losses: Tensor) -> Tensor:
        step = self.step
        if step.reduction == "none":
            return losses[step.batch.local].clone()
        loss = losses.sum()
        # the replicas of a 2-D mesh hold other samples, whose share of the mean is theirs to add
        return all_gather(loss, step.ranks.replica_group).sum(0) if step.ranks.replica_group else loss


class _Backward:
    def __init__(self, ctx, grad: Tensor, weight: Tensor, bias: Tensor | None, saved: list[Tensor]) -> None:  # type: ignore[no-untyped-def]
        self.step, self.rows, self.targets, self.tile = ctx.step, ctx.rows, ctx.targets, ctx.tile
        self.stats, self.product = ctx.dtypes
        self.embedding_dtype, self.anchored, self.needs = ctx.embedding_dtype, ctx.anchored, ctx.needs_input_grad
        self.weight, self.bias = weight, bias
        self.x, self.x_inverse, self.lse, self.z, self.raw, self.slope, self.kept, self.tile_maxima, self.row_sum = saved
        self.N, self.D = self.x.shape
        step, smoothing = self.step, self.step.label_smoothing
        if self.rows.count:  # before any row is updated
            self.target_w, self.target_inverse = self.rows.at(self.targets.row)
        self.c = self._sample_coefficients(grad.to(self.stats))
        # d loss / d lse, and per target d loss / d target logit
        self.on_lse = self.c * ((1 - smoothing) * step.target_weights.sum(1) + smoothing)
        # the factors of exponentials: of logits as they are, and of logits less lse
        self.from_zero, self.from_lse = self.on_lse[:, None] * (-self.lse[:, None]).exp(), self.on_lse[:, None]
        probability = (self.z - self.lse[:, None]).exp()
        on_z = self.on_lse[:, None] * probability - self.c[:, None] * (1 - smoothing) * step.target_weights
        self.uniform = torch.zeros_like(self.c)  # d loss / d every selected logit, of label smoothing
        if smoothing:
            assert step.selected is not None
            self.uniform = -self.c * smoothing / step.selected
            on_z = on_z + self.uniform[:, None]
            self.uniform_rows = (self.uniform @ self.x) * step.margin.scale
        on_z = torch.where(self.targets.exists, on_z, 0.0).reshape(-1)
        # by the target's raw cosine or logit; the uniform share that every row gets below is taken back where a margin replaces it
        self.on_raw = torch.where(self.targets.own, on_z * self.slope - step.margin.scale * self.uniform[self.targets.sample], 0.0)

    def _sample_coefficients(self, grad: Tensor) -> Tensor:
        """`[N]`: d objective / d loss_i, from the gradient of the reduced loss."""
        step = self.step
        if step.reduction != "none":
            return grad * step.sample_weights
        # each rank's scalar counts as averaged over the ranks, and each rank knows the gradient of its own samples only
        counts = step.batch.counts
        padded = grad.new_zeros(max(counts))
        padded[: len(grad)] = grad
        everyone = all_gather(padded, step.ranks.group)
        return torch.cat([row[:n] for row, n in zip(everyone, counts, strict=True)]) * step.sample_weights / step.ranks.total

    def run(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        want_x, want_w = self.needs[0], self.anchored or self.needs[1] or self.needs[2]
        # the sum of embedding gradients over ranks travels while the class gradients are computed
        overlap = want_x and want_w and self.step.scatter and self.kept.numel() > 0 and self.step.ranks.group is not None
        overlap = overlap and self.step.start_update is None
        with record_function("partial_fc::backward_tiles"):
            dx, dw = self._tiles(want_x, want_w and not overlap)
        finish = self._send(dx) if want_x else None
        if overlap:
            with record_function("partial_fc::backward_tiles"):
                _, dw = self._tiles(False, True)
        weight_grad, bias_grad = self._finish_rows(dw)
        return None if finish is None else finish(), weight_grad, bias_grad, None, None

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
        self.scratch = self.x.new_empty(size, dtype=self.product if self.step.bounded else self.stats)
        self.scaled = (self.x * self.step.margin.scale).to(self.product)
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
                db[at] = torch.mv(e.t().to(self.stats), factor[:, 0]) + self.uniform.sum()
            if update is not None:
                update(a, b, self._complete(dw[at], None if db is None else db[at], a))
        if want_x:
            self._targets_to_embeddings(dx.mul_(self.step.margin.scale))
        if dw is None:
            return dx, []
        rows.held = None  # written over; a second backward gathers the rows again
        if update is None:
            return dx, self._complete(dw, db, 0)
        if not rows.count:  # scalar state moves on as on other ranks
            update(0, 0, [g for g in (dw, db) if g is not None])
        return dx, []

    def _exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """(e `[N, T]`, factor `[N, 1]`) of tile t: d loss / d logit = e · factor, where the logit is no target."""
        if self.kept.numel():
            e = self.kept[self.N * a : self.N * b].view(self.N, b - a)
            return e, self.from_zero if self.step.bounded else self.on_lse[:, None] * (self.tile_maxima[t] - self.lse[:, None]).exp_()
        logits = self.scratch[: self.N * (b - a)].view(self.N, b - a)
        logits = tile_logits(self.scaled, w, self.rows.tile_bias(a, b), logits)
        leave_out(logits, self.targets, self.N, a)
        if self.step.bounded:
            return logits.exp_().to(self.product), self.from_zero
        if self.product is not torch.float16:
            return logits.sub_(self.lse[:, None]).exp_().to(self.product), self.from_lse
        # float16 has too little range for small probabilities: scale each row by its largest
        peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(self.stats).min)
        return logits.sub_(peak).exp_().to(self.product), self.on_lse[:, None] * (peak - self.lse[:, None]).exp_()

    def _row_grad(self, out: Tensor, e: Tensor, weighted: Tensor, w: Tensor, a: int, b: int) -> None:
        """`out [T, D]` = gradient of rows a to b from all logits but the targets'; out may be the memory of w."""
        if self.product == self.stats == out.dtype and self.rows.held is None:
            grad = torch.mm(e.t(), weighted, out=out)
        else:
            grad = low_precision_product(e, weighted, self.product).to(self.stats)
        if self.step.label_smoothing:
            grad += self.uniform_rows
        if self.rows.inverse is not None:
            tangent(grad, w, self.rows.inverse[a:b], out=out if out.dtype == grad.dtype else grad)
        if out.dtype != grad.dtype or self.rows.inverse is None:
            out.copy_(grad)

    def _targets_to_embeddings(self, dx: Tensor) -> None:
        if self.rows.count:
            dx.index_add_(0, self.targets.sample, self.target_w * self.on_raw[:, None])
        if self.step.label_smoothing:
            dx += self.uniform[:, None] * (self.row_sum[: self.D] * self.step.margin.scale)
        if self.rows.inverse is not None:
            tangent(dx, self.x, self.x_inverse, out=dx)

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
        grads = [dw] if db is None else [dw, db.to(self.bias.dtype)]  # type: ignore[union-attr]
        if self.step.ranks.replica_group is not None:
            with record_function("partial_fc::replicas"):
                for each in grads:
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
