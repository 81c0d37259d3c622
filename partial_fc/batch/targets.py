"""From labels to targets: which classes each sample counts for, and how much.

labels [N] or [N, L]  ── targets_of ──>   targets [N, L], -1 where there is none; their weights; what each sample's loss
                                          is multiplied by in the reduced loss [N]
statuses of all ranks ── check_batch ──>  errors that every rank raises alike
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.batch import refusals
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.loss_weights import other_weights
from partial_fc.batch.status import NO_LABEL, as_matrix


class Targets(NamedTuple):
    """The classes that the samples count for."""

    ids: Tensor  # [N, L] class ids, -1 where there is no target
    exists: Tensor  # [N, L] whether there is a target
    weights: Tensor  # [N, L] of each in its sample, 0 where there is none
    loss_shares: Tensor  # [N] what each sample's loss is multiplied by in the reduced loss


def targets_of(
    batch: GlobalBatch, classes: int, ignore_index: int, reduction: str, dtype: torch.dtype,
    class_weights: Tensor | None = None, within: bool = False,
) -> Targets:  # fmt: skip
    """Return the targets of a batch. For a mean, loss shares are divided by their sum over all ranks; all are 0 if the
    sum is.

    within: the loss itself has the class weights in it, as with label smoothing. A bad label in a batch that nobody has
    looked at makes all loss shares infinite or NaN: the check of the step finds it.
    """
    labels, fine = as_matrix(batch.labels), None
    exists = labels != ignore_index
    unweighted = batch.sample_weights is None and batch.label_weights is None and class_weights is None
    if batch.looked and unweighted and labels.shape[1] == 1 and batch.ranks.replica_group is None:
        weights = exists.to(dtype)
        shares = everywhere = weights[:, 0]
    else:
        given = batch, exists, classes, ignore_index, reduction == "mean", dtype, class_weights, within
        exists, weights, shares, everywhere, fine = other_weights(*given)
    if reduction == "mean":
        shares = shares / torch.nn.functional.threshold(everywhere.sum(), 0.0, math.inf)  # 0 / inf is 0
    return Targets(torch.where(exists, labels, -1), exists, weights, shares if fine is None else shares / fine)


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
