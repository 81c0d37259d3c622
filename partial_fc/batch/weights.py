"""Weights of labels and of samples: what can be wrong with them."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM, SAMPLE_WEIGHT = range(4)  # kinds of an invalid weight
SUM_TOLERANCE = 1e-3  # how far from 1 the weights of a sample's labels may sum to
OF_LABELS, OF_SAMPLES, COARSE = 1, 2, 4  # bits: which weights there are; those of labels are rounded by more than that
KINDS = OF_LABELS | OF_SAMPLES  # what every rank must have alike


def weights_problem(embeddings: Tensor, labels: Tensor, label_weights: Any, sample_weights: Any) -> str:
    """Return what is wrong with their types and shapes; "" if nothing is."""
    for what, weights in (("label_weights", label_weights), ("sample_weights", sample_weights)):
        if weights is None:
            continue
        if not isinstance(weights, Tensor):
            return f"{what} must be a tensor, not {type(weights).__name__}"
        if weights.device != embeddings.device:
            return f"{what} are on {weights.device}, embeddings on {embeddings.device}"
        if weights.requires_grad and torch.is_grad_enabled():
            return f"{what} require grad, but the loss has no gradient by them: pass {what}.detach()"
    if labels.ndim == 1 and label_weights is not None:
        return (
            "labels are [N], one a sample, which takes no label_weights; those go with labels [N, L] and have their "
            "shape"
        )
    if labels.ndim == 2 and label_weights is None:
        each = labels.shape[1]
        if each == 1:
            return "labels are [N, 1]; squeeze them, or give gather label_weights [N, L] for several labels a sample"
        return (
            f"labels are [N, {each}], {each} a sample; give gather label_weights [N, {each}], or bring one "
            "label a sample, "
            "[N]"
        )
    if label_weights is not None and label_weights.shape != labels.shape:
        return f"label_weights must have the shape of labels, {list(labels.shape)}, but are {list(label_weights.shape)}"
    if sample_weights is not None and sample_weights.shape != (len(embeddings),):
        return f"sample_weights must be [N], here [{len(embeddings)}], but are {list(sample_weights.shape)}"
    return ""


def first_bad_weight(labels: Tensor, label_weights: Tensor | None, sample_weights: Tensor | None) -> Tensor:
    """Return (kind, flat index, bits of the value) of the first invalid weight or sum of weights: int64 `[3]`.

    Does not wait for the device. A sample whose labels are all negative (some head's ignore_index) has no class: its
    weights need not sum to 1.
    """
    found = labels.new_zeros(3)  # NO_WEIGHT
    if sample_weights is not None:
        values = sample_weights.detach().double()
        found = _first_bad(SAMPLE_WEIGHT, ~_is_weight(values), values, found)
    if label_weights is not None:
        values = label_weights.detach().double()
        sums = values.sum(1)
        found = _first_bad(LABEL_SUM, _is_off(sums, labels, _tolerance(label_weights.dtype)), sums, found)
        found = _first_bad(LABEL_WEIGHT, ~_is_weight(values).reshape(-1), values.reshape(-1), found)
    return found


def describe_bad_weight(kind: int, at: int, bits: int, labels_each: int) -> str:
    """Return what is wrong, from what `first_bad_weight` has found. labels_each: L of labels [N, L]."""
    (value,) = struct.unpack("d", struct.pack("q", bits))
    rule = "the weights of a sample's labels are a distribution: each at least 0, together 1"
    if kind == LABEL_WEIGHT:
        return f"label_weights[{at // labels_each}, {at % labels_each}] is {value:.6g}; {rule}"
    if kind == LABEL_SUM:
        return f"label_weights[{at}] sums to {value:.6g}; {rule}"
    return f"sample_weights[{at}] is {value:.6g}; the weight of a sample is finite and at least 0"


def merge_repeated(labels: Tensor, weights: Tensor, exists: Tensor) -> Tensor:
    """Return label weights `[N, L]` where a class that a sample names twice has the weight of both at the first place.

    Mixup of two images of one class does that. exists `[N, L]`: which labels count.
    """
    same = (labels[:, :, None] == labels[:, None, :]) & exists[:, :, None] & exists[:, None, :]
    return (same * weights[:, None, :]).sum(2) * ~same.tril(-1).any(2)


def mean_class_weights(labels: Tensor, label_weights: Tensor | None, exists: Tensor, class_weights: Tensor) -> Tensor:
    """Return `[N]`: the mean weight of each sample's classes, as the sample's labels `[N, L]` weigh them."""
    shares = exists.to(class_weights.dtype)
    if label_weights is not None:
        shares = shares * label_weights.to(class_weights.dtype)
    total = shares.sum(1)
    of_labels = class_weights[torch.where(shares > 0, labels, 0)]
    return (of_labels * shares).sum(1) / torch.where(total > 0, total, 1.0)


def _first_bad(kind: int, bad: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Return (kind, index, bits of the value) of the first of `values [n]` that is bad, or `otherwise`."""
    any_bad, at = bad.max(0)
    return torch.where(any_bad, torch.stack((any_bad * kind, at, values.take(at).view(torch.int64))), otherwise)


def are_valid(labels: Tensor, label_weights: Tensor | None, sample_weights: Tensor | None, kinds: int) -> Tensor:
    """Return whether `first_bad_weight` would find none, 0-d. kinds: of the weights before they were sent."""
    valid = labels.new_ones((), dtype=torch.bool)
    if sample_weights is not None:
        valid = _is_weight(sample_weights).all()
    if label_weights is not None:
        tolerance = _tolerance(torch.bfloat16 if kinds & COARSE else torch.float64)
        off = _is_off(label_weights.sum(1), labels, tolerance)
        valid = valid & _is_weight(label_weights).all() & ~off.any()
    return valid


def _is_weight(values: Tensor) -> Tensor:
    return (values >= 0) & (values < math.inf)


def _is_off(sums: Tensor, labels: Tensor, tolerance: float) -> Tensor:
    """Return whether sums of label weights `[N]` are not 1 where they are to be."""
    return ((sums - 1).abs() > tolerance) & (labels >= 0).any(1)


def kinds_of_weights(label_weights: Tensor | None, sample_weights: Tensor | None) -> int:
    """Return the bits of the weights that there are."""
    coarse = label_weights is not None and _tolerance(label_weights.dtype) > SUM_TOLERANCE
    return OF_LABELS * (label_weights is not None) | OF_SAMPLES * (sample_weights is not None) | COARSE * coarse


def as_given(label_weights: Tensor, kinds: int) -> Tensor:
    """Return label weights, which travel in float64, in a dtype with the tolerance of the one that they had."""
    return label_weights.bfloat16() if kinds & COARSE else label_weights


def _tolerance(dtype: torch.dtype) -> float:
    """Return how far from 1 a sum may be: weights in half precision are rounded by more than SUM_TOLERANCE."""
    return max(SUM_TOLERANCE, torch.finfo(dtype).eps) if dtype.is_floating_point else SUM_TOLERANCE
