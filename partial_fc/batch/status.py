"""The status of a batch: 21 integers with which each rank describes its part before anything large is sent.

    embeddings [N_r, D], labels [N_r] or [N_r, L]  ── inspect ──>  int64 [label sets, 21]: a `Status` for each label set

Every rank receives all statuses and checks them on the host, which must read the sample counts anyway. So a bad input on one rank raises
the same error on every rank, at no further wait for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_LABEL = 2**62  # stands for a smallest or largest label where there is none
SUM_TOLERANCE = 1e-3  # how far from 1 the weights of a sample's labels may sum to


@dataclass(frozen=True)
class Status:
    """One rank's local batch and one of its label sets."""

    samples: int
    width: int
    dtype: int  # index into DTYPES
    labels_each: int  # L of labels [N_r, L]; 0 for labels [N_r]
    weights: int  # bit 0: label weights, bit 1: sample weights
    wants_grad: int  # whether its embeddings take part in backward; if those of any rank do, all must
    names: int  # digest of the names of all label sets; 0 for labels without a name
    problem: int  # 1: this batch cannot be gathered; the fields above and below mean nothing then
    # the two smallest and two largest distinct labels, so that a head can ignore its own ignore_index; else NO_LABEL
    smallest: int
    smallest_at: int
    second_smallest: int
    second_smallest_at: int
    largest: int
    largest_at: int
    second_largest: int
    second_largest_at: int
    nonfinite_at: int  # first sample with a NaN or infinity, or -1
    nonfinite_label: int
    bad_weight: int  # NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM or SAMPLE_WEIGHT: the kind of the first invalid weight
    bad_weight_at: int  # its flat index
    bad_weight_bits: int  # the bits of its value, a float64

    def extremes(self) -> tuple[tuple[int, int], ...]:
        """Return (label, flat index) of the smallest and largest labels."""
        pairs = (
            (self.smallest, self.smallest_at),
            (self.second_smallest, self.second_smallest_at),
            (self.largest, self.largest_at),
            (self.second_largest, self.second_largest_at),
        )
        return tuple((label, at) for label, at in pairs if label != NO_LABEL)


NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM, SAMPLE_WEIGHT = range(4)
NO_COUNTS = [0] * 7  # the fields before `problem`
NO_FINDINGS = [NO_LABEL, 0] * 4 + [-1, NO_LABEL] + [NO_WEIGHT, 0, 0]  # the fields after it


@dataclass(frozen=True)
class LabelSet:
    """What one rank passes for one head. The values are unchecked until `checks.problem_of` has seen them."""

    name: str | None
    labels: Any
    label_weights: Any = None
    sample_weights: Any = None

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are sent to the other ranks."""
        weights = (self.label_weights, self.sample_weights)
        return [self.labels.detach(), *(w.detach().double() for w in weights if w is not None)]

    def take(self, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return labels, label weights and sample weights from gathered tensors in the order of `tensors()`."""
        labels = next(tensors)
        label_weights = None if self.label_weights is None else next(tensors)
        return labels, label_weights, None if self.sample_weights is None else next(tensors)


def as_matrix(labels: Tensor) -> Tensor:
    """Return labels `[N]` or `[N, L]` as `[N, L]`."""
    return labels if labels.ndim == 2 else labels[:, None]


def inspect(embeddings: Tensor, sets: list[LabelSet], problem: str, wants_grad: bool, look: bool) -> Tensor:
    """Return this rank's statuses, int64 `[label sets, 21]`; a single one where there is a problem.

    look: search for extreme labels, non-finite embeddings and invalid weights. Never raises, because the other ranks
    are waiting for the status, and does not wait for the device.
    """
    if problem:
        return torch.tensor([[*NO_COUNTS, 1, *NO_FINDINGS]])
    samples, width = embeddings.shape
    names = _digest([each.name for each in sets if each.name is not None])
    counts = []
    for each in sets:
        labels_each = each.labels.shape[1] if each.labels.ndim == 2 else 0
        weights = (each.label_weights is not None) + 2 * (each.sample_weights is not None)
        dtype = DTYPES.index(embeddings.dtype)
        counts.append([samples, width, dtype, labels_each, weights, int(wants_grad), names, 0])
    if not look or not samples:
        return torch.tensor([row + NO_FINDINGS for row in counts])
    bad = (embeddings * 0).sum(1) != 0  # NaN for a row with a NaN or infinity; a tenth of the time of isfinite().all(1)
    found = []
    for each in sets:
        first_labels = as_matrix(each.labels)[:, 0]
        found.append(
            torch.cat((_extremes(each.labels.reshape(-1)), _first_nonfinite(bad, first_labels), _bad_weight(each)))
        )
    return torch.cat((torch.tensor(counts).to(embeddings.device), torch.stack(found)), 1)


def _digest(names: list[str]) -> int:
    """Return a number from 1 to 2**56 for the names; 0 if there are none."""
    if not names:
        return 0
    return 1 + int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big")


def _extremes(labels: Tensor) -> Tensor:
    """Return the two smallest and two largest distinct labels of `[n]`, each with its index: int64 `[8]`."""
    out = []
    for find, nobody in ((torch.min, NO_LABEL), (torch.max, -NO_LABEL)):
        value, at = find(labels, 0)
        others = torch.where(labels == value, nobody, labels)
        other, other_at = find(others, 0)
        out += [value, at, torch.where(other == nobody, NO_LABEL, other), other_at]
    return torch.stack(out)


def _first_nonfinite(bad: Tensor, labels: Tensor) -> Tensor:
    """Return (index of the first True of `bad [n]` or -1, its label)."""
    any_bad, at = bad.max(0)
    label = labels.take(at)  # `labels[at]` would wait for `at` on the host
    return torch.stack((torch.where(any_bad, at, -1), torch.where(any_bad, label, NO_LABEL)))


def _bad_weight(given: LabelSet) -> Tensor:
    """Return (kind, flat index, bits of the value) of the first invalid weight or sum of weights: int64 `[3]`.

    A sample whose labels are all negative (some head's ignore_index) has no class: its weights need not sum to 1.
    """
    found = given.labels.new_zeros(3)  # NO_WEIGHT
    if given.sample_weights is not None:
        values = given.sample_weights.detach().double()
        found = _first_bad(SAMPLE_WEIGHT, ~_is_weight(values), values, found)
    if given.label_weights is not None:
        values = given.label_weights.detach().double()
        sums = values.sum(1)
        off = ((sums - 1).abs() > _tolerance(given.label_weights.dtype)) & (given.labels >= 0).any(1)
        found = _first_bad(LABEL_SUM, off, sums, found)
        found = _first_bad(LABEL_WEIGHT, ~_is_weight(values).reshape(-1), values.reshape(-1), found)
    return found


def _first_bad(kind: int, bad: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Return (kind, index, bits of the value) of the first of `values [n]` that is bad, or `otherwise`."""
    any_bad, at = bad.max(0)
    return torch.where(any_bad, torch.stack((any_bad * kind, at, values.take(at).view(torch.int64))), otherwise)


def _is_weight(values: Tensor) -> Tensor:
    return values.isfinite() & (values >= 0)


def _tolerance(dtype: torch.dtype) -> float:
    """Return how far from 1 a sum may be: weights in half precision are rounded by more than SUM_TOLERANCE."""
    return max(SUM_TOLERANCE, torch.finfo(dtype).eps) if dtype.is_floating_point else SUM_TOLERANCE
