"""Errors about a batch that every rank raises alike, in words. Nothing here runs for a batch that is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from partial_fc.batch.status import DTYPES, NO_LABEL, Status, of_set
from partial_fc.batch.weights import describe_bad_weight
from partial_fc.distributed.forwards import WIRING
from partial_fc.distributed.ranks import Ranks
from partial_fc.distributed.texts import gather_texts

AGREED = {
    "width": "embedding width",
    "dtype": "embedding dtype",
    "labels_each": "labels a sample (0: a plain [N])",
    "weights": "weights (1: label weights, 2: sample weights)",
}


def raise_problem(
    status: Sequence[Status], problem: str, names: Sequence[str | None], ranks: Ranks, device: torch.device
) -> None:
    """Raise ValueError where a rank has a batch that cannot be gathered, or label sets of other names. A collective."""
    if any(row.problem for row in status):
        texts = gather_texts(problem, ranks, device)
        text, flat = next((text, flat) for flat, text in enumerate(texts) if text)
        if text.startswith(WIRING):
            raise RuntimeError(ranks.name(flat) + text.removeprefix(WIRING))
        raise ValueError(ranks.name(flat) + text)
    own = sorted(repr(name) for name in names if name is not None)
    texts = gather_texts(f"a dict of {', '.join(own)}" if own else "no dict", ranks, device)
    flat = next(flat for flat, row in enumerate(status) if row.names != status[0].names)
    raise ValueError(
        f"ranks disagree: labels are {texts[0]} on {ranks.name(0)} and {texts[flat]} on {ranks.name(flat)}; "
        "every rank must bring the same names"
    )


def raise_finding(status: Sequence[Status], ranks: Ranks, name: str | None) -> None:
    """Raise ValueError where ranks differ in what must be the same, or have invalid weights."""
    first = status[0]
    for flat, row in enumerate(status):
        for field, description in AGREED.items():
            mine, theirs = getattr(first, field), getattr(row, field)
            if mine != theirs:
                if field == "dtype":
                    mine, theirs = DTYPES[mine], DTYPES[theirs]
                of_labels = "" if field in ("width", "dtype") else of_set(name)
                raise ValueError(
                    f"ranks disagree{of_labels}: {description} {mine} on {ranks.name(0)} and {theirs} on "
                    f"{ranks.name(flat)}; every rank must bring the same"
                )
    for flat, row in enumerate(status):
        if row.bad_weight:
            text = describe_bad_weight(row.bad_weight, row.bad_weight_at, row.bad_weight_bits, row.labels_each)
            raise ValueError(f"{ranks.name(flat)}{of_set(name)}: {text}")


def describe_bad_label(label: int, at: int, row: Status, valid: range, ignore_index: int) -> str:
    """Return what is wrong with a label; at: its flat index."""
    where = at if row.labels_each == 0 else f"{at // row.labels_each}, {at % row.labels_each}"
    hint = "; labels are counted from 0" if label == valid.stop and not valid.start else ""
    return (
        f"labels[{where}] is {label}; valid are {valid.start} to {valid.stop - 1} and ignore_index {ignore_index}{hint}"
    )


def describe_nonfinite(row: Status) -> str:
    """Return which embedding is not finite."""
    of_class = "" if row.nonfinite_label == NO_LABEL else f" (label {row.nonfinite_label})"
    return f"embeddings[{row.nonfinite_at}]{of_class} holds a NaN or infinity"
