"""What can be wrong with a batch: types and shapes on this rank, and what ranks must agree on. All in words.

Problems are strings that follow the rank's name in an error: ": labels are for 3 samples, embeddings for 4".
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.status import DTYPES, LABEL_SUM, LABEL_WEIGHT, NO_WEIGHT, LabelSet, Status
from partial_fc.distributed.ranks import Ranks

EMBEDDINGS_AGREED = {"width": "embedding width", "dtype": "embedding dtype"}
LABELS_AGREED = {
    "labels_each": "labels a sample (0: a plain [N])",
    "weights": "weights (1: label weights, 2: sample weights)",
}


def of_set(name: str | None) -> str:
    """Return how a message names a label set."""
    return "" if name is None else f", {name!r}"


def problem_of(embeddings: Tensor, given: LabelSet, device: torch.device | None) -> str:
    """Return what is wrong with the types and shapes of a label set or of its embeddings; "" if nothing is."""
    problem = embeddings_problem(embeddings)
    if problem:
        return f": {problem}"
    problem = _labels_problem(embeddings, given.labels) or _weights_problem(embeddings, given)
    if problem:
        return f"{of_set(given.name)}: {problem}"
    if device is not None and embeddings.device != device:
        return f": the head is on {device}, embeddings on {embeddings.device}"
    return ""


def embeddings_problem(embeddings: Tensor) -> str:
    if embeddings.ndim != 2:
        return f"embeddings must be [N, D], but have {embeddings.ndim} dimensions"
    if embeddings.dtype not in DTYPES:
        return f"embeddings must be float32, float64, bfloat16 or float16, not {embeddings.dtype}"
    return ""


def _labels_problem(embeddings: Tensor, labels: Any) -> str:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        return f"labels must be an int64 tensor, not {found}"
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and not labels.shape[1]):
        return f"labels must be [N] or [N, L] with L at least 1, but are {list(labels.shape)}"
    if len(labels) != len(embeddings):
        return f"labels are for {len(labels)} samples, embeddings for {len(embeddings)}"
    return (
        ""
        if labels.device == embeddings.device
        else f"labels are on {labels.device}, embeddings on {embeddings.device}"
    )


def _weights_problem(embeddings: Tensor, given: LabelSet) -> str:
    labels, label_weights, sample_weights = given.labels, given.label_weights, given.sample_weights
    for what, weights in (("label_weights", label_weights), ("sample_weights", sample_weights)):
        if weights is not None and not isinstance(weights, Tensor):
            return f"{what} must be a tensor, not {type(weights).__name__}"
        if weights is not None and weights.device != embeddings.device:
            return f"{what} are on {weights.device}, embeddings on {embeddings.device}"
    if labels.ndim == 1 and label_weights is not None:
        return "labels are [N], one a sample, which takes no label_weights; those go with labels [N, L] and have their shape"
    if labels.ndim == 2 and label_weights is None:
        each = labels.shape[1]
        if each == 1:
            return "labels are [N, 1]; squeeze them, or give gather label_weights [N, L] for several labels a sample"
        return f"labels are [N, {each}], {each} a sample; give gather label_weights [N, {each}], or bring one label a sample, [N]"
    if label_weights is not None and label_weights.shape != labels.shape:
        return f"label_weights must have the shape of labels, {list(labels.shape)}, but are {list(label_weights.shape)}"
    if sample_weights is not None and sample_weights.shape != (len(embeddings),):
        return f"sample_weights must be [N], here [{len(embeddings)}], but are {list(sample_weights.shape)}"
    return ""


def check_agreement(status: tuple[Status, ...], agreed: dict[str, str], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank if ranks differ in what must be the same."""
    first = status[0]
    for flat, row in enumerate(status):
        for what, description in agreed.items():
            mine, theirs = getattr(first, what), getattr(row, what)
            if mine != theirs:
                if what == "dtype":
                    mine, theirs = DTYPES[mine], DTYPES[theirs]
                raise ValueError(
                    f"ranks disagree{of_set(name)}: {description} {mine} on {ranks.name(0)} and {theirs} on "
                    f"{ranks.name(flat)}; every rank must bring the same"
                )


def check_weights(status: tuple[Status, ...], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank for the first invalid weight that any rank reports."""
    for flat, row in enumerate(status):
        if row.bad_weight == NO_WEIGHT:
            continue
        at = row.bad_weight_at
        (value,) = struct.unpack("d", struct.pack("q", row.bad_weight_bits))
        rule = "the weights of a sample's labels are a distribution: each at least 0, together 1"
        if row.bad_weight == LABEL_WEIGHT:
            found = f"label_weights[{at // row.labels_each}, {at % row.labels_each}] is {value:.6g}"
        elif row.bad_weight == LABEL_SUM:
            found = f"label_weights[{at}] sums to {value:.6g}"
        else:
            found = f"sample_weights[{at}] is {value:.6g}"
            rule = "the weight of a sample is finite and at least 0"
        raise ValueError(f"{ranks.name(flat)}{of_set(name)}: {found}; {rule}")
