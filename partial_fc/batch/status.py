"""The status of a batch: 24 integers with which each rank describes its part before anything large is sent.

    embeddings [N_local, D], labels [N_local] or [N_local, L]  ── inspect ──>  int64 [label sets, 24]

Every rank receives all statuses and checks them on the host, which must read the sample counts anyway. So a bad input
on one rank raises the same error on every rank, without another wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.batch.facts import Agreed, digest_of
from partial_fc.batch.weights import KINDS, first_bad_weight, kinds_of_weights
from partial_fc.distributed.meeting import BATCH, operation_number

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
NO_LABEL = 2**62  # stands for a smallest or largest label where there is none


class Status(NamedTuple):
    """One rank's local batch and one of its label sets. Indices are flat. Before `problem` stands what `inspect`
    counts, after it what it finds, then `statistics`. A new field raises `meeting.WIDTH` as well."""

    operation: int  # that this is a batch (distributed/meeting.py)
    facts: int  # digest of what all ranks must have alike (facts.py); 0 from `gather`
    samples: int
    width: int
    dtype: int  # index into DTYPES
    labels_each: int  # L of labels [N_local, L]; 0 for labels [N_local]
    weights: int  # which there are: bits of `weights.kinds_of_weights`
    wants_grad: int  # whether its embeddings take part in backward; if those of any rank do, all must
    names: int  # digest of the names of all label sets; 0 for labels without a name
    problem: int  # 1: this batch cannot be gathered; the other fields mean nothing then
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
    bad_weight: int  # kind of the first invalid weight (`weights.py`), its flat index, the bits of its value
    bad_weight_at: int
    bad_weight_bits: int
    statistics: int  # bits of the sum of running statistics

    @property
    def layout(self) -> tuple[int, ...]:
        """What must be the same on every rank."""
        return self.width, self.dtype, self.labels_each, self.weights & KINDS

    @property
    def together(self) -> tuple[int, ...]:
        """What must be the same on every rank before anything else is looked at."""
        return self.operation, self.names, self.facts, self.statistics

    @property
    def labels(self) -> tuple[int, ...]:
        """The smallest and largest labels, NO_LABEL where there is none."""
        return self.smallest, self.second_smallest, self.largest, self.second_largest


NO_COUNTS = [operation_number(BATCH)] + [0] * 8  # the fields before `problem`
NO_FINDINGS = [NO_LABEL, 0] * 4 + [-1, NO_LABEL] + [0, 0, 0]  # the fields after it, but statistics


@dataclass(frozen=True)
class LabelSet:
    """What one rank passes for one head; unchecked until `problem_of` has seen it."""

    name: str | None
    labels: Any
    label_weights: Any = None
    sample_weights: Any = None

    @property
    def weighted(self) -> bool:
        return self.label_weights is not None or self.sample_weights is not None

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are sent to the other ranks."""
        weights = (self.label_weights, self.sample_weights)
        return [self.labels.detach(), *(w.detach().double() for w in weights if w is not None)]

    def unpack(self, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return labels, label weights and sample weights from gathered tensors in the order of `tensors()`."""
        labels = next(tensors)
        label_weights = None if self.label_weights is None else next(tensors)
        return labels, label_weights, None if self.sample_weights is None else next(tensors)


def as_matrix(labels: Tensor) -> Tensor:
    """Return labels `[N]` or `[N, L]` as `[N, L]`."""
    return labels if labels.ndim == 2 else labels[:, None]


def is_usual(embeddings: Tensor, given: LabelSet, device: torch.device | None) -> bool:
    """Return whether embeddings `[N, D]` and labels `[N]` fit each other and the loss; else see `problems.py`."""
    labels = given.labels
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or given.weighted:
        return False
    fit = embeddings.ndim == 2 and embeddings.dtype in DTYPES and labels.shape == embeddings.shape[:1]
    return fit and embeddings.device == labels.device and device in (None, embeddings.device)


def inspect(
    embeddings: Tensor, sets: list[LabelSet], problem: str, wants_grad: bool, look: bool, agreed: Agreed | None = None
) -> Tensor:
    """Return this rank's statuses, int64 `[label sets, 24]`; a single one where there is a problem.

    look: search for extreme labels, non-finite embeddings and invalid weights. Neither raises nor waits for the device.
    """
    if problem:
        return torch.tensor([[*NO_COUNTS, 1, *NO_FINDINGS, 0]], device="cpu")
    samples, width = embeddings.shape
    dtype = DTYPES.index(embeddings.dtype)
    facts, statistics = (0, None) if agreed is None else (agreed.digest, agreed.statistics)
    names = [each.name for each in sets if each.name is not None]
    digest = 1 + digest_of(names) if names else 0
    counts = []
    for each in sets:
        labels_each = each.labels.shape[1] if each.labels.ndim == 2 else 0
        weights = kinds_of_weights(each.label_weights, each.sample_weights) if each.weighted else 0
        counts.append([NO_COUNTS[0], facts, samples, width, dtype, labels_each, weights, int(wants_grad), digest, 0])
    statistics = torch.zeros((), dtype=torch.float64, device="cpu") if statistics is None else statistics
    bits = statistics.view(torch.int64).expand(len(sets), 1)
    if not look or not samples:
        return torch.cat((bits.new_tensor([row + NO_FINDINGS for row in counts]), bits), 1)
    bad = (embeddings * 0).sum(1) != 0  # NaN for a row with a NaN or infinity; a tenth of the time of isfinite().all(1)
    found = []
    for each in sets:
        nonfinite = _first_nonfinite(bad, as_matrix(each.labels)[:, 0])
        weight = each.labels.new_zeros(3)
        if each.weighted:
            weight = first_bad_weight(each.labels, each.label_weights, each.sample_weights)
        found.append(torch.cat((_extremes(each.labels.reshape(-1)), nonfinite, weight)))
    return torch.cat((bits.new_tensor(counts).to(embeddings.device), torch.stack(found), bits.to(embeddings.device)), 1)


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
