"""From labels to targets: which classes each sample counts for, and how much.

labels [N] or [N, L]  ── targets_of ──>         targets [N, L], -1 where there is none; their weights [N, L]
sample, class weights ── sample_weights_of ──>  what each sample's loss counts for in the reduced loss [N]
statuses of all ranks ── check_batch ──>        errors that every rank raises alike
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.batch import refusals
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.status import as_matrix
from partial_fc.batch.weights import mean_class_weights, merge_repeated


def stats_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of losses and weights: float32, or float64 if either tensor is."""
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32


def targets_of(batch: GlobalBatch, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return class ids `[N, L]`, -1 where there is no target, and their weights in the sample, 0 there."""
    labels = as_matrix(batch.labels)
    exists = labels != ignore_index
    weights = exists.to(dtype)
    if batch.label_weights is not None:
        weights = merge_repeated(labels, weights * batch.label_weights.to(dtype), exists)
        exists = exists & (weights > 0)
    return torch.where(exists, labels, -1), weights * exists


def sample_weights_of(
    batch: GlobalBatch, ignored: int, reduction: str, dtype: torch.dtype, class_weights: Tensor | None, within: bool
) -> Tensor:
    """Return `[N]`: the weight of each sample's loss; for a mean, divided by the sum of the weights over all ranks, and
    0 where that is 0. within: the loss itself has the class weights in it, as with label smoothing."""
    counted = None if within else class_weights
    weights = _weigh(batch.labels, batch.label_weights, batch.sample_weights, ignored, dtype, counted)
    if reduction != "mean":
        return weights
    everywhere = weights
    if batch.ranks.replica_group is not None or counted is not class_weights:
        everywhere = _weigh(
            batch.mesh_labels, batch.mesh_label_weights, batch.mesh_sample_weights, ignored, dtype, class_weights
        )
    total = everywhere.sum()
    return torch.where(total > 0, weights / total, 0.0)


def _weigh(
    labels: Tensor,
    label_weights: Tensor | None,
    sample_weights: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    class_weights: Tensor | None,
) -> Tensor:
    """Return `[n]`: 0 for ignored samples, else sample weight times the weighted mean of its classes' weights."""
    labels = as_matrix(labels)
    exists = labels != ignore_index
    weights = exists.any(1).to(dtype)
    if sample_weights is not None:
        weights = weights * sample_weights.to(dtype)
    if class_weights is None:
        return weights
    return weights * mean_class_weights(labels, label_weights, exists, class_weights.to(dtype))


def check_batch(batch: GlobalBatch, embedding_size: int, valid: range, ignore_index: int, on_nonfinite: str) -> str:
    """Raise, on every rank alike, what the batch's statuses report as wrong for a loss. valid: its class ids.

    Return why the batch is to be skipped (on_nonfinite="skip"), or "".
    """
    width = batch.status[0].width
    if width != embedding_size:
        raise ValueError(f"embeddings have width {width}, the head has embedding_size {embedding_size}")
    if any(label != ignore_index and label not in valid for row in batch.status for label, _ in row.extremes()):
        refusals.raise_bad_label(batch, valid, ignore_index)
    if any(row.nonfinite_at >= 0 for row in batch.status):
        return refusals.report_nonfinite(batch, on_nonfinite)
    return ""
