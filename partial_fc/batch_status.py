"""What each rank tells all others about its part of a batch before anything large is sent, and how it is judged."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import Ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


NO_LABEL = 2**62  # in the place of a smallest or largest label where there is none


SUM_TOLERANCE = 1e-3  # how far from 1 the weights of a sample's labels may add up to


@dataclass(frozen=True)
class Status:
    """What one rank tells all others about its local batch and one label set of it, before anything large is sent."""

    samples: int
    width: int
    dtype: int  # index into DTYPES
    labels_each: int  # L of labels [N_r, L]; 0 for labels [N_r]
    weights: int  # bit 0: label weights, bit 1: sample weights
    wants_grad: int  # whether its embeddings take part in backward: if any rank's do, all must
    names: int  # digest of the names of all label sets; 0 for labels without a name
    problem: int  # whether it has a batch that cannot be exchanged; then nothing else here counts
    # the two smallest and two largest distinct labels, so that a head can set its own ignore_index aside; NO_LABEL where there is none
    smallest: int
    smallest_at: int
    second_smallest: int
    second_smallest_at: int
    largest: int
    largest_at: int
    second_largest: int
    second_largest_at: int
    nonfinite_at: int
    nonfinite_label: int
    bad_weight: int  # NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM or SAMPLE_WEIGHT: what the next two are about
    bad_weight_at: int  # flat index
    bad_weight_bits: int  # of its value, a float64

    def extremes(self) -> tuple[tuple[int, int], ...]:
        """(label, flat index) of the smallest and largest labels that there are."""
        pairs = (
            (self.smallest, self.smallest_at),
            (self.second_smallest, self.second_smallest_at),
            (self.largest, self.largest_at),
            (self.second_largest, self.second_largest_at),
        )
        return tuple((label, at) for label, at in pairs if label != NO_LABEL)


NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM, SAMPLE_WEIGHT = range(4)


NO_COUNTS = [0] * 7  # what stands before `problem`


NO_FINDINGS = [NO_LABEL, 0] * 4 + [-1, NO_LABEL] + [NO_WEIGHT, 0, 0]


def as_matrix(labels: Tensor) -> Tensor:
    """Labels `[N]` or `[N, L]` as `[N, L]`."""
    return labels if labels.ndim == 2 else labels[:, None]


@dataclass(frozen=True)
class _LabelSet:
    """What one rank brings for one head, as its caller gave it: anything at all until `_problem_of` has looked at it."""

    name: str | None
    labels: Any
    label_weights: Any = None
    sample_weights: Any = None

    def tensors(self) -> list[Tensor]:
        """What of it travels."""
        weights = (self.label_weights, self.sample_weights)
        return [self.labels.detach(), *(w.detach().double() for w in weights if w is not None)]

    def take(self, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels, label weights and sample weights, from what has travelled in the order of `tensors`."""
        labels = next(tensors)
        label_weights = None if self.label_weights is None else next(tensors)
        return labels, label_weights, None if self.sample_weights is None else next(tensors)


def _of_set(name: str | None) -> str:
    return "" if name is None else f", {name!r}"


def _label_sets(labels: Any, label_weights: Any, sample_weights: Any) -> tuple[list[_LabelSet], str]:
    """(label sets, sorted by name; what is wrong with the names or "")."""
    weights = {"label_weights": label_weights, "sample_weights": sample_weights}
    named = {what: given for what, given in weights.items() if isinstance(given, Mapping)}
    if not isinstance(labels, Mapping):
        problem = f": {next(iter(named))} are a dict, but labels are not" if named else ""
        return [_LabelSet(None, labels, label_weights, sample_weights)], problem
    if not labels:
        return [], ": labels are an empty dict; it needs a name and labels for each head"
    for name in labels:
        if not isinstance(name, str):
            return [], f": the names of labels must be strings, not {name!r}"
    if label_weights is not None and "label_weights" not in named:
        return [], ": labels are a dict, so label_weights must be one too, with the names that have weights"
    for what, given in named.items():
        for name in given:
            if name not in labels:
                return [], f": {what} are given for {name!r}, labels for {_listed(labels)} only"
    of_labels = label_weights or {}
    of_samples = named.get("sample_weights", dict.fromkeys(labels, sample_weights))
    return [_LabelSet(name, labels[name], of_labels.get(name), of_samples.get(name)) for name in sorted(labels)], ""


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _problem_of(embeddings: Tensor, given: _LabelSet, device: torch.device | None) -> str:
    """What is wrong with the types and shapes of a label set or its embeddings, as it is told after the rank's name; "" if nothing is."""
    problem = _embeddings_problem(embeddings)
    if problem:
        return f": {problem}"
    problem = _labels_problem(embeddings, given.labels) or _weights_problem(embeddings, given)
    if problem:
        return f"{_of_set(given.name)}: {problem}"
    if device is not None and embeddings.device != device:
        return f": the head is on {device}, embeddings on {embeddings.device}"
    return ""


def _embeddings_problem(embeddings: Tensor) -> str:
    if embeddings.ndim != 2:
        return f"embeddings must be [N, D], but have {embeddings.ndim} dimensions"
    return (
        ""
        if embeddings.dtype in DTYPES
        else f"embeddings must be float32, float64, bfloat16 or float16, not {embeddings.dtype}"
    )


def _labels_problem(embeddings: Tensor, labels: Any) -> str:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        return f"labels must be an int64 tensor, not {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}"
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and not labels.shape[1]):
        return f"labels must be [N] or [N, L] with L at least 1, but are {list(labels.shape)}"
    if len(labels) != len(embeddings):
        return f"labels are for {len(labels)} samples, embeddings for {len(embeddings)}"
    return (
        ""
        if labels.device == embeddings.device
        else f"labels are on {labels.device}, embeddings on {embeddings.device}"
    )


def _weights_problem(embeddings: Tensor, given: _LabelSet) -> str:
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


def _inspect(embeddings: Tensor, sets: list[_LabelSet], problem: str, wants_grad: bool, inspect: bool) -> Tensor:
    """`[sets, numbers]` int64: this rank's `Status` of each label set, or of none in particular if there is a problem.

    Never raises, because the others are waiting for it, and waits for no device.
    """
    if problem:
        return torch.tensor([[*NO_COUNTS, 1, *NO_FINDINGS]])
    samples, width = embeddings.shape
    names = _digest([each.name for each in sets if each.name is not None])
    counts = []
    for each in sets:
        labels_each = each.labels.shape[1] if each.labels.ndim == 2 else 0
        weights = (each.label_weights is not None) + 2 * (each.sample_weights is not None)
        counts.append([samples, width, DTYPES.index(embeddings.dtype), labels_each, weights, int(wants_grad), names, 0])
    if not inspect or not samples:
        return torch.tensor([row + NO_FINDINGS for row in counts])
    bad = (embeddings * 0).sum(1) != 0  # NaN where anything is not finite; a tenth of the time of isfinite().all(1)
    found = [
        torch.cat((_extremes(s.labels.reshape(-1)), _nonfinite(bad, as_matrix(s.labels)[:, 0]), _bad_weight(s)))
        for s in sets
    ]
    return torch.cat((torch.tensor(counts).to(embeddings.device), torch.stack(found)), 1)


def _digest(names: list[str]) -> int:
    """A number from 1 to 2**56 for the names; 0 if there are none."""
    return 1 + int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big") if names else 0


def _extremes(labels: Tensor) -> Tensor:
    """Smallest, second smallest, largest and second largest distinct labels of `[n]`, each with its index: int64 `[8]`."""
    out = []
    for find, nobody in ((torch.min, NO_LABEL), (torch.max, -NO_LABEL)):
        value, at = find(labels, 0)
        others = torch.where(labels == value, nobody, labels)
        other, other_at = find(others, 0)
        out += [value, at, torch.where(other == nobody, NO_LABEL, other), other_at]
    return torch.stack(out)


def _nonfinite(bad: Tensor, labels: Tensor) -> Tensor:
    """(index of the first of the rows `bad [n]` or -1, its label). `take`, because `labels[at]` would wait for `at` on the host."""
    any_bad, at = bad.max(0)
    return torch.stack((torch.where(any_bad, at, -1), torch.where(any_bad, labels.take(at), NO_LABEL)))


def _bad_weight(given: _LabelSet) -> Tensor:
    """(kind, flat index, bits of the value) of the first weight or sum of weights that is not allowed: int64 `[3]`.

    Labels below 0 can only be somebody's ignore_index, so a sample that has no others is of no class and its weights need not add up.
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
    """(kind, index, bits of the value) of the first of `values [n]` that is bad, if any is."""
    any_bad, at = bad.max(0)
    return torch.where(any_bad, torch.stack((any_bad * kind, at, values.take(at).view(torch.int64))), otherwise)


def _is_weight(values: Tensor) -> Tensor:
    return values.isfinite() & (values >= 0)


def _tolerance(dtype: torch.dtype) -> float:
    """Weights in half precision are rounded by more than SUM_TOLERANCE."""
    return max(SUM_TOLERANCE, torch.finfo(dtype).eps) if dtype.is_floating_point else SUM_TOLERANCE


EMBEDDINGS_AGREED = {"width": "embedding width", "dtype": "embedding dtype"}


LABELS_AGREED = {
    "labels_each": "labels a sample (0: a plain [N])",
    "weights": "weights (1: label weights, 2: sample weights)",
}


def _agree(status: tuple[Status, ...], agreed: dict[str, str], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank if ranks differ in what must be the same."""
    first = status[0]
    for flat, row in enumerate(status):
        for what, description in agreed.items():
            mine, theirs = getattr(first, what), getattr(row, what)
            if mine != theirs:
                if what == "dtype":
                    mine, theirs = DTYPES[mine], DTYPES[theirs]
                raise ValueError(
                    f"ranks disagree{_of_set(name)}: {description} {mine} on {ranks.name(0)} and {theirs} on {ranks.name(flat)}; "
                    "every rank must bring the same"
                )


def _judge_weights(status: tuple[Status, ...], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank about the first bad weight that a rank has found."""
    for flat, row in enumerate(status):
        if row.bad_weight == NO_WEIGHT:
            continue
        at, (value,) = row.bad_weight_at, struct.unpack("d", struct.pack("q", row.bad_weight_bits))
        rule = "the weights of a sample's labels are a distribution: each at least 0, together 1"
        if row.bad_weight == LABEL_WEIGHT:
            found = f"label_weights[{at // row.labels_each}, {at % row.labels_each}] is {value:.6g}"
        elif row.bad_weight == LABEL_SUM:
            found = f"label_weights[{at}] sums to {value:.6g}"
        else:
            found, rule = f"sample_weights[{at}] is {value:.6g}", "the weight of a sample is finite and at least 0"
        raise ValueError(f"{ranks.name(flat)}{_of_set(name)}: {found}; {rule}")
