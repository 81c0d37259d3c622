"""Errors about a batch that every rank raises alike, in words. Nothing here runs for a batch that is right."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import torch

from partial_fc.batch.facts import Agreed, digest_of
from partial_fc.batch.status import DTYPES, NO_LABEL, Status, inspect
from partial_fc.batch.weights import describe_bad_weight
from partial_fc.distributed.forwards import WIRING
from partial_fc.distributed.inquiry import names_of
from partial_fc.distributed.meeting import BATCH, GATHERED, meet, refuse_apart
from partial_fc.distributed.ranks import Ranks, all_gather_mesh
from partial_fc.distributed.texts import gather_texts
from partial_fc.errors import NonFiniteError, log, not_a_step

AGREED = {  # the parts of `Status.layout`
    "width": "embedding width",
    "dtype": "embedding dtype",
    "labels_each": "labels",
    "weights": "weights",
}
WEIGHTS = ("none", "label_weights", "sample_weights", "label_weights and sample_weights")


TOLERANCE = 1e-6  # of running statistics, whose last bits may depend on the device
ALIKE = (
    "Every rank must build the head with the same arguments, and call forward, backward, step(), zero_grad(), train(), "
    "eval(), autocast, no_grad and load_checkpoint alike: load_checkpoint on every rank, nothing under `if rank == 0`"
)


def of_set(name: str | None) -> str:
    """Return how a message names a label set."""
    return "" if name is None else f", {name!r}"


def origin_of(batch: Any, flat: int) -> str:
    """Return how an error names the part of a `GlobalBatch` that came from the `flat`-th rank of the mesh."""
    return str(batch.ranks.name(flat) + of_set(batch.name))


def raise_problem(
    status: Sequence[Status],
    problem: str,
    names: Sequence[str | None],
    agreed: Agreed | None,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Raise on every rank where ranks came to different operations (RankMissing), or where a rank has a batch that
    cannot be gathered, or label sets of other names, or other facts (ValueError). A collective.

    Running statistics that differ in their last bits only are no difference.
    """
    refuse_apart([row.operation for row in status], ranks)
    if any(row.problem for row in status):
        texts = gather_texts(problem, ranks, device)
        text, flat = next((text, flat) for flat, text in enumerate(texts) if text)
        if text.startswith(WIRING):
            raise _of_wiring(texts, ranks)
        raise ValueError(ranks.name(flat) + text)
    other = next((flat for flat, row in enumerate(status) if row.names != status[0].names), None)
    if other is not None:
        own = sorted(repr(name) for name in names if name is not None)
        texts = gather_texts(f"a dict of {', '.join(own)}" if own else "no dict", ranks, device)
        raise ValueError(
            f"ranks disagree: labels are {texts[0]} on {ranks.name(0)} and {texts[other]} on {ranks.name(other)}; "
            "every rank must pass the same names"
        )
    if any(row.facts != status[0].facts for row in status):
        refuse_difference(agreed, ranks, device)
    refuse_statistics([row.statistics for row in status], ranks)


def tell_others(error: Exception, gathered: bool, ranks: Ranks, device: torch.device) -> None:
    """Raise an error of this rank on every rank: the others wait for its batch. gathered: it has been gathered before.

    Returns where there are no others.
    """
    if ranks.group is None or torch.compiler.is_compiling():
        return
    problem = f"{WIRING}: {error}"
    if gathered:
        facts = {"problem": problem}
        agree(Agreed(facts, digest_of(facts)), ranks, device, GATHERED)
    else:
        mine = inspect(torch.empty(0, 0, device="cpu"), [], problem, False, False)[0].to(ranks.place_of_counts(device))
        status = [Status(*row) for row in all_gather_mesh(mine, ranks, BATCH).tolist()]
        raise_problem(status, problem, [], None, ranks, device)


def refuse_difference(mine: Agreed | None, ranks: Ranks, device: torch.device) -> None:
    """Raise ValueError on every rank: the digests differ, so say in what. A collective."""
    facts = {"loss": "gather"} if mine is None else mine.facts
    everyone = [json.loads(text) for text in gather_texts(json.dumps(facts), ranks, device)]
    if any("problem" in each for each in everyone):
        raise _of_wiring([each.get("problem", "") for each in everyone], ranks, [each.get("kind") for each in everyone])
    different = []
    same_loss = len({each["loss"] for each in everyone}) == 1
    for name in {name: None for each in everyone for name in each} if same_loss else ("loss",):
        who: dict[str, list[int]] = {}
        for flat, each in enumerate(everyone):
            who.setdefault(str(each.get(name, "nothing")), []).append(ranks.global_rank(flat))
        if len(who) > 1:
            different.append(f"{name} is {' and '.join(f'{value} on {names_of(them)}' for value, them in who.items())}")
    raise ValueError(f"ranks disagree: {'; '.join(different)}. {ALIKE}")


def _of_wiring(texts: Sequence[str], ranks: Ranks, kinds: Sequence[str | None] = ()) -> Exception:
    """Return the error of the first rank that has one; without its name where all have the same.

    kinds: the names of the errors' classes, where they may be others than RuntimeError.
    """
    flat = next(flat for flat, text in enumerate(texts) if text)
    text = texts[flat].removeprefix(WIRING)
    kind = {"ValueError": ValueError, "TypeError": TypeError}.get(kinds[flat] or "" if kinds else "", RuntimeError)
    return kind(text.removeprefix(": ") if len(set(texts)) == 1 else ranks.name(flat) + text)


def refuse_statistics(bits: Sequence[int], ranks: Ranks) -> None:
    """Raise ValueError on every rank unless running statistics are equal. bits: of the float64 sum of each rank."""
    first, *others = struct.unpack(f"{len(bits)}d", struct.pack(f"{len(bits)}q", *bits))
    for flat, value in enumerate(others, 1):
        if bits[flat] != bits[0] and not abs(value - first) <= TOLERANCE * max(abs(first), abs(value)):  # NaN is unlike
            raise ValueError(
                f"ranks disagree: the running statistics of the margin sum to {first:.9g} on {ranks.name(0)} and to "
                f"{value:.9g} on {ranks.name(flat)}. {ALIKE}"
            )


def check_gathered(batch: Any, ranks: Ranks, agreed: Agreed | None, device: torch.device) -> None:
    """Raise if a `GlobalBatch` is not for a loss of these ranks and facts, now. A collective where there are facts."""
    if batch.cut_off and torch.is_grad_enabled():
        raise not_a_step("")
    if not batch.ranks.same_as(ranks):
        raise RuntimeError("the batch was gathered over another group than the head's")
    if agreed is not None:
        agree(agreed, ranks, device, GATHERED)


def agree(mine: Agreed, ranks: Ranks, device: torch.device, what: str) -> None:
    """Raise ValueError on every rank unless all have the same facts. A collective; one wait for the device."""
    bits = 0 if mine.statistics is None else int(mine.statistics.view(torch.int64))
    table = meet(what, ranks, device, (mine.digest, bits))
    if any(digest != mine.digest for digest, _ in table):
        refuse_difference(mine, ranks, device)
    refuse_statistics([bits for _, bits in table], ranks)


def raise_finding(status: Sequence[Status], ranks: Ranks, name: str | None) -> None:
    """Raise ValueError where ranks differ in what must be the same, or have invalid weights."""
    for flat, row in enumerate(status):
        for (field, description), mine, theirs in zip(AGREED.items(), status[0].layout, row.layout, strict=True):
            if mine != theirs:
                shown = [_shown(field, value) for value in (mine, theirs)]
                of_labels = "" if field in ("width", "dtype") else of_set(name)
                raise ValueError(
                    f"ranks disagree{of_labels}: {description} {shown[0]} on {ranks.name(0)} and {shown[1]} on "
                    f"{ranks.name(flat)}; every rank must pass the same"
                )
    text = bad_weight_in(status, ranks, name)
    if text:
        raise ValueError(text)


def _shown(field: str, value: int) -> str:
    if field == "labels_each":
        return f"[N, {value}]" if value else "[N]"
    return str({"dtype": DTYPES, "weights": WEIGHTS}[field][value] if field in ("dtype", "weights") else value)


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


def describe_no_tensor(embeddings: object) -> str:
    """Return what was given instead of embeddings."""
    kind = type(embeddings).__name__
    tracing = kind == "Proxy" and type(embeddings).__module__.startswith("torch.fx")
    hint = (
        "; torch.fx cannot trace a head, which exchanges batches with other ranks: trace the backbone, or make the "
        "head a leaf of your Tracer (is_leaf_module)"
    )
    return f": embeddings must be a tensor [N, D], not {kind}{hint if tracing else ''}"


def bad_label_in(batch: Any, valid: range, ignore_index: int) -> str:
    """Return the first label of a `GlobalBatch` that is no class, in words; "" if there is none."""
    for flat, row in enumerate(batch.status):
        places = row.smallest_at, row.second_smallest_at, row.largest_at, row.second_largest_at
        for label, at in zip(row.labels, places, strict=True):
            if label not in (ignore_index, NO_LABEL) and label not in valid:
                return f"{origin_of(batch, flat)}: {describe_bad_label(label, at, row, valid, ignore_index)}"
    return ""


def bad_weight_in(status: Sequence[Status], ranks: Ranks, name: str | None) -> str:
    """Return the first invalid weight of a batch, in words; "" if there is none. name: of the label set."""
    for flat, row in enumerate(status):
        if row.bad_weight:
            text = describe_bad_weight(row.bad_weight, row.bad_weight_at, row.bad_weight_bits, row.labels_each)
            return f"{ranks.name(flat)}{of_set(name)}: {text}"
    return ""


def report_nonfinite(batch: Any, on_nonfinite: str) -> str:
    """Raise NonFiniteError for the first embedding of a `GlobalBatch` that is not finite, or log it; return why the
    batch is to be skipped, or ""."""
    flat, row = next((flat, row) for flat, row in enumerate(batch.status) if row.nonfinite_at >= 0)
    message = f"{origin_of(batch, flat)}: {describe_nonfinite(row)}"
    if on_nonfinite == "raise":
        raise NonFiniteError(message)
    skip = on_nonfinite == "skip"
    log.warning("%s%s", message, "; the step is skipped" if skip else "")
    return message if skip else ""
