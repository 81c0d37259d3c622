"""What a sample counts for where more than its label tells: weights of labels, samples and classes, replicas; and
labels that nobody has looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.status import as_matrix
from partial_fc.batch.weights import are_valid, mean_class_weights, merge_repeated


def without_bad_labels(labels: Tensor, named: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return (which labels `[N, L]` are classes, whether all that are to be are, 0-d), where nobody has looked at them.

    named: which are not ignored.
    """
    inside = labels == labels.clamp(0, classes - 1)
    return named & inside, (named <= inside).all()


def weigh_labels(labels: Tensor, named: Tensor, label_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (which labels `[N, L]` are targets, the weights of these, else 0). named: which are classes."""
    weights = merge_repeated(labels, named.to(label_weights.dtype) * label_weights, named)
    exists = named & (weights > 0)
    return exists, weights * exists


def other_weights(
    batch: GlobalBatch,
    named: Tensor,
    classes: int,
    ignore_index: int,
    mean: bool,
    dtype: torch.dtype,
    class_weights: Tensor | None,
    within: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return (which labels `[N, L]` are targets, the weight of each in its sample, the weights of the samples' losses
    `[N]`, those whose sum a mean is divided by, of all replicas, whether all labels are classes or ignored and all
    weights are valid, 0-d, where nobody has looked at them).

    named: which labels are not ignored. within: the loss itself has the class weights in it. mean: the fourth is
    needed.
    """
    labels, fine = as_matrix(batch.labels), None
    if not batch.looked:
        named, fine = without_bad_labels(labels, named, classes)
        if batch.later and batch.status[0].weights:
            given = batch.mesh_labels, batch.mesh_label_weights, batch.mesh_sample_weights
            kinds = max(row.weights for row in batch.status)  # COARSE is the highest bit, the others are alike
            fine = fine & are_valid(*given, kinds)
    exists, weights, one = named, named.to(dtype), None
    if batch.label_weights is not None:
        exists, weights = weigh_labels(labels, named, batch.label_weights.to(dtype))
    elif labels.shape[1] == 1:
        one = weights[:, 0]
    counted = None if within else class_weights
    of_samples = _weigh(one, named, batch.labels, batch.label_weights, batch.sample_weights, dtype, counted)
    if not mean or (batch.ranks.replica_group is None and counted is class_weights):
        return exists, weights, of_samples, of_samples, fine
    of_mesh = batch.mesh_labels, batch.mesh_label_weights, batch.mesh_sample_weights
    labels = as_matrix(batch.mesh_labels)
    named = labels != ignore_index
    if not batch.looked:
        named, _ = without_bad_labels(labels, named, classes)
    return exists, weights, of_samples, _weigh(None, named, *of_mesh, dtype, class_weights), fine


def _weigh(
    weights: Tensor | None,
    named: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    sample_weights: Tensor | None,
    dtype: torch.dtype,
    class_weights: Tensor | None,
) -> Tensor:
    """Return `[n]`: 0 for ignored samples, else sample weight times the weighted mean of its classes' weights.

    weights: 1 for samples that are not ignored, where it is known.
    """
    weights = named.any(1).to(dtype) if weights is None else weights
    if sample_weights is not None:
        weights = weights * sample_weights.to(dtype)
    if class_weights is None:
        return weights
    return weights * mean_class_weights(as_matrix(labels), label_weights, named, class_weights.to(dtype))
