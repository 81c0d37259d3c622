"""`PartialFC`, the classification head: class weights `[C, D]` split over ranks, a margin, exact or sampled softmax.

    embeddings [N_local, D], labels [N_local]
       gather         counts and status, checked on every host; then the global batch           batch/
       targets        class ids [N, L] and each sample's share of the loss                          batch/targets.py
       select         this rank's rows of the forward: its positives and its share of a window   sampling.py
       cross-entropy  tiles of logits, one combination over ranks; backward by the same tiles    softmax/
       follow         the loss becomes part of the training step when its backward runs          step_record.py

`_checked_batch`, `_follow` and `_anchor` are those of sharded.py, `_zero_loss` is that of classes/changeable.py.
Gradients of all rows are `weight.grad`; those of selected rows are `row_grad`, for a `RowOptimizer` (`rows.py`).
An, X. et al.: Partial FC, arXiv 2010.05222 and 2203.15565.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.later import shares_if_alike
from partial_fc.batch.statistics import statistics_of
from partial_fc.batch.targets import targets_of
from partial_fc.classes.head_state import HeadState
from partial_fc.distributed.ranks import local_part, naming_the_missing
from partial_fc.kernels.choice import Kernels
from partial_fc.optim.kernel_moves import taken_directions
from partial_fc.sampling import mix, select_rows
from partial_fc.softmax.cross_entropy import sharded_cross_entropy
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.tiles import compute_dtypes, logits_bytes

UpToDate = dict[str, Tensor]  # rows of a forward by parameter, after the steps that they had missed


class PartialFC(HeadState):
    """A sharded classification head with its loss. Call `loss = head(embeddings, labels)` on every rank of its group.

    Shapes: embeddings `[N_local, D]` float, labels `[N_local]` int64; N_local may be 0. The loss is 0-d, or `[N_local]`
    for "none". Raises ValueError for bad arguments or inputs, the same on every rank; RuntimeError for wrong wiring.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value) if self._is_built and name in self.SETTINGS else value)

    @torch._disable_dynamo  # collectives and sizes that depend on data: under torch.compile the head runs as it is
    def forward(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings `[N_local, D]` and labels `[N_local]`, or of a `GlobalBatch` from `gather`."""
        with record_function("partial_fc::gather"):
            batch, x = self._checked_batch(embeddings, labels)
        with record_function("partial_fc::select"):
            options = LossOptions(
                self.margin, self.num_classes, self.label_smoothing, self.interclass_filter, self.reduction,
                self.scale_embedding_grad, self.collect_metrics, self.class_weights, self.inter_topk,
                self.inter_topk_penalty,
            )  # fmt: skip
            chosen, up_to_date = self._select(batch, options, scatter=x is not batch.embeddings)
            optimizer, begin_update = self.class_rows.live_optimizer, None
            if self.training and torch.is_grad_enabled() and optimizer is not None and optimizer.update_in_backward:
                begin_update = optimizer.update_for_forward()
        self.forward_count += self.training
        self.selected_rows, self._last_labels = chosen.rows, batch.mesh_labels
        all_rows = chosen.rows is None and begin_update is None  # autograd takes the gradient of all rows
        if self.training and self.class_rows.record.bad_forward:
            return self._zero_loss(x, batch, gradient_of_all_rows=all_rows)
        if self.training and next(self.margin.buffers(), None) is not None:
            self.class_rows.record.remember(statistics_of(self.margin))
        weight, bias, anchor = local_part(self.weight), None if self.bias is None else local_part(self.bias), None
        if up_to_date is not None:
            weight, bias = up_to_date["weight"], up_to_date.get("bias")
        if not all_rows:  # row gradients go to the sink, so autograd must not see the weights
            weight, bias, anchor = weight.detach(), None if bias is None else bias.detach(), self._anchor()
        offset = local_part(self.margin.offset) if self.margin.binary else None
        accumulate = partial(self.class_rows.accumulate, changes=self.class_rows.changes)
        sink = RowGradientSink(self._workspace, accumulate, begin_update)
        with naming_the_missing("the forward of a head", self.shards.ranks.group):
            loss, losses, self._measured = sharded_cross_entropy(x, weight, bias, offset, anchor, chosen, options, sink)
        return self._follow(loss, losses, batch)

    def _select(self, batch: GlobalBatch, options: LossOptions, scatter: bool) -> tuple[Selection, UpToDate | None]:
        """Return the targets and this rank's rows; copies by parameter where the shard's are out of date."""
        shards, ranks = self.shards, batch.ranks
        dtypes = compute_dtypes(batch.embeddings, self.weight)
        arguments = self.num_classes, self.ignore_index, self.reduction, dtypes[0], self.class_weights
        targets = targets_of(batch, *arguments, within=self.label_smoothing > 0)
        if self.training and targets.ids.device.type != "cpu":
            shares = shares_if_alike(targets.loss_shares, statistics_of(self.margin), ranks)
            targets = targets._replace(loss_shares=shares)
        rows = slots = correction = kernels = None
        may_serve = self.weight.device.type != "cpu" or (self._kernels == "interpret" and not self.class_rows.travels)
        if self._kernels != "off" and may_serve:
            kernels = self.kernels_for(options, batch.embeddings)
        self.class_rows.kernels = kernels
        if self.training and self._sample_rate < 1:
            positives = targets.ids
            if ranks.replica_group is not None or batch.label_weights is not None or self._hard_negatives:
                positives = self.classes_always_taken(batch, positives)
            drawn = self.num_classes, self._sample_rate, self.seed, shards.lo, shards.hi, self.weight.device
            windows = self._windows.fit(*drawn, self._sample_block)
            if self.weight.device.type == "cpu":  # elsewhere the host must not wait
                ids = positives.to(self.weight.device)  # the correction takes them where the loss computes
                rows = select_rows(windows.rows(self.forward_count), ids, shards.lo, shards.hi)
            else:
                rows, slots = self._windows.select(self.forward_count, positives)
            if self._sampling_correction != "none":
                correction = self._correct(rows.to(positives.device), slots, positives, options, dtypes)
        up_to_date = self.class_rows.up_to_date(rows)
        rows = rows if rows is None or self.class_rows.sent is None else self.class_rows.sent[0]
        keep = self._keeps_logits(batch, shards.local if rows is None else len(rows), options, kernels)
        directions = None if kernels is None or up_to_date is None else taken_directions(up_to_date)
        chosen = Selection(
            batch, rows, slots, up_to_date is not None, shards.lo, shards.hi, targets, keep, scatter,
            draw_key=mix(self.seed, self.forward_count), correction=correction, kernels=kernels, directions=directions,
        )  # fmt: skip
        return chosen, up_to_date

    def _keeps_logits(self, batch: GlobalBatch, classes: int, options: LossOptions, kernels: Kernels | None) -> bool:
        """Return whether logits are kept for backward; label smoothing of ruled logits needs them anew."""
        product = compute_dtypes(batch.embeddings, self.weight)[1]
        size = logits_bytes(batch.most_samples, classes * self.margin.centers, product)
        keep = size <= self.logits_budget and not (options.ruled and self.label_smoothing)
        keep = keep and not (kernels is not None and kernels.instead)
        mode = "kept" if keep else "streamed" if kernels is not None and kernels.stream else "tiled"
        if self.training and self.logits_mode != mode:
            self._report_mode(mode, size)
        return keep
