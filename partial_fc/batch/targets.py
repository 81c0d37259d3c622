"""From labels to targets: which classes each sample counts for, and how much.

labels [N] or [N, L]  ── targets_of ──>         targets [N, L], -1 where there is none; their weights [N, L]
sample, class weights ── sample_weights_of ──>  what each sample's loss counts for in the reduced loss [N]
statuses of all ranks ── check_batch ──>        errors that every rank raises alike
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.batch import refusals
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.loss_weights import weigh_batch, weigh_labels, without_bad_labels
from partial_fc.batch.status import NO_LABEL, as_matrix


class Targets(NamedTuple):
    """The classes that the samples count for."""

    ids: Tensor  # [N, L] class ids, -1 where there is no target
    exists: Tensor  # [N, L] whether there is a target
    weights: Tensor  # [N, L] of each in its sample, 0 where there is none
    named: Tensor  # [N, L] whether a label is a class; it may have no weight
    fine: Tensor | None  # 0-d: whether every label is a class or ignored, in a batch that nobody has looked at


def targets_of(batch: GlobalBatch, classes: int, ignore_index: int, dtype: torch.dtype) -> Targets:
    labels = as_matrix(batch.labels)
    named, fine = labels != ignore_index, None
    if not batch.looked:
        named, fine = without_bad_labels(labels, named, classes)
    exists, weights = named, named.to(dtype)
    if batch.label_weights is not None:
        exists, weights = weigh_labels(labels, named, batch.label_weights.to(dtype))
    return Targets(torch.where(exists, labels, -1), exists, weights, named, fine)


def sample_weights_of(
    batch: GlobalBatch,
    targets: Targets,
    classes: int,
    ignored: int,
    reduction: str,
    class_weights: Tensor | None = None,
    within: bool = False,
) -> Tensor:
    """Return `[N]`: the weight of each sample's loss; for a mean, divided by the sum of the weights over all ranks, and
    0 where that is 0. within: the loss itself has the class weights in it, as with label smoothing.

    A bad label in a batch that nobody has looked at makes all of them infinite or NaN: the check of the step finds it.
    """
    one = targets.weights[:, 0] if batch.label_weights is None and targets.ids.shape[1] == 1 else None
    plain = batch.sample_weights is None and class_weights is None and batch.ranks.replica_group is None
    if one is not None and plain:
        weights = everywhere = one
    else:
        of_labels = targets.named, one, targets.weights.dtype, classes, ignored
        weights, everywhere = weigh_batch(batch, *of_labels, class_weights, within, reduction == "mean")
    if reduction == "mean":
        weights = weights / torch.nn.functional.threshold(everywhere.sum(), 0.0, math.inf)
    return weights if targets.fine is None else weights / targets.fine


def check_batch(batch: GlobalBatch, embedding_size: int, valid: range, ignore_index: int, on_nonfinite: str) -> str:
    """Raise, on every rank alike, what the batch's statuses report as wrong for a loss. valid: its class ids.

    Return why the batch is to be skipped (on_nonfinite="skip"), or "".
    """
    width = batch.status[0].width
    if width != embedding_size:
        raise ValueError(f"embeddings have width {width}, the head has embedding_size {embedding_size}")
    if any(label not in valid for row in batch.status for label in row.labels if label not in (ignore_index, NO_LABEL)):
        raise ValueError(refusals.bad_label_in(batch, valid, ignore_index))
    if any(row.nonfinite_at >= 0 for row in batch.status):
        return refusals.report_nonfinite(batch, on_nonfinite)
    return ""
