"""What a sample's loss counts for where more than its label tells: weights of samples, labels and classes, replicas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.status import as_matrix
from partial_fc.batch.weights import mean_class_weights


def weigh_batch(
    batch: GlobalBatch,
    named: Tensor,
    named_in_mesh: Callable[[], Tensor],
    one: Tensor | None,
    dtype: torch.dtype,
    class_weights: Tensor | None,
    within: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Return the weights of the samples' losses `[N]`, and those whose sum a mean is divided by, of all replicas.

    named: `[N, L]`, which labels are classes; named_in_mesh: returns those of all replicas. one: 1 for samples that
    are not ignored, where it is known. within: the loss itself has the class weights in it. mean: the second is needed.
    """
    counted = None if within else class_weights
    weights = _weigh(one, named, batch.labels, batch.label_weights, batch.sample_weights, dtype, counted)
    if not mean or (batch.ranks.replica_group is None and counted is class_weights):
        return weights, weights
    of_mesh = batch.mesh_labels, batch.mesh_label_weights, batch.mesh_sample_weights
    return weights, _weigh(None, named_in_mesh(), *of_mesh, dtype, class_weights)


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
