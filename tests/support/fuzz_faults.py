"""Bad inputs for the property tests: what is wrong on which ranks, and a batch that is bad before the good ones of a
case.

run_faulty(rank, world, case, faults)     the bad batch, then `fuzz_cases.run_case` with the same head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzz_cases import Batch, Case, Numbers, Trainer, global_batch, numbers_of

from partial_fc import gather

Arguments = dict[str, Any]  # embeddings, labels, label_weights, sample_weights
Fault = tuple[int, str]  # rank, a name of FAULTS


def _put(name: str, value: Callable[[Arguments], Any]) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = value(arguments)

    return change


def _set(name: str, value: Any) -> Callable[[Arguments], None]:
    """One number of a tensor, the last."""

    def change(arguments: Arguments) -> None:
        tensor = arguments[name].clone()
        tensor.view(-1)[-1] = value
        arguments[name] = tensor

    return change


def _weights(arguments: Arguments, value: float) -> torch.Tensor:
    return torch.full((len(arguments["labels"]),), value, dtype=torch.float64)


# what every rank must see alike; "label" faults need a label that is of no class
FAULTS: dict[str, Callable[[Arguments], None]] = {
    "embeddings of 1 dimension": _put("embeddings", lambda a: a["embeddings"].reshape(-1)),
    "embeddings of 3 dimensions": _put("embeddings", lambda a: a["embeddings"][None]),
    "embeddings of another width": _put("embeddings", lambda a: torch.cat((a["embeddings"], a["embeddings"]), 1)),
    "integer embeddings": _put("embeddings", lambda a: a["embeddings"].long()),
    "embeddings of another dtype": _put("embeddings", lambda a: a["embeddings"].half()),
    "no embeddings": _put("embeddings", lambda a: None),
    "a list of embeddings": _put("embeddings", lambda a: a["embeddings"].tolist()),
    "a NaN": _set("embeddings", float("nan")),
    "an infinity": _set("embeddings", float("inf")),
    "float labels": _put("labels", lambda a: a["labels"].double()),
    "int32 labels": _put("labels", lambda a: a["labels"].int()),
    "no labels": _put("labels", lambda a: None),
    "a list of labels": _put("labels", lambda a: a["labels"].tolist()),
    "more labels": _put("labels", lambda a: torch.cat((a["labels"], a["labels"][:1]))),
    "labels of 3 dimensions": _put("labels", lambda a: a["labels"][..., None, None]),
    "a label too high": _set("labels", 10_000),
    "a huge label": _set("labels", 2**61),
    "a negative label": _set("labels", -7),
    "a negative sample weight": _put("sample_weights", lambda a: _weights(a, -1.0)),
    "an infinite sample weight": _put("sample_weights", lambda a: _weights(a, float("inf"))),
    "a list of sample weights": _put("sample_weights", lambda a: [1.0] * len(a["labels"])),
    "more sample weights": _put("sample_weights", lambda a: torch.ones(len(a["labels"]) + 1)),
    "label weights of another shape": _put("label_weights", lambda a: torch.ones(len(a["labels"]), 7)),
    "labels by name": _put("labels", lambda a: {"faces": a["labels"]}),
    "weights by name": _put("sample_weights", lambda a: {"faces": _weights(a, 1.0)}),
}
OF_GATHER = tuple(
    name for name in FAULTS if "weight" in name or "by name" in name
)  # a head's own call takes no such arguments


def attempt(trainer: Trainer, batch: Batch, faults: tuple[Fault, ...], rank: int) -> str:
    """ "Class: message" of what the bad batch raised on this rank; "" if nothing."""
    case = trainer.case
    arguments: Arguments = {"embeddings": batch.x.clone().requires_grad_(not case.frozen), "labels": batch.labels}
    arguments |= {"label_weights": batch.label_weights, "sample_weights": batch.sample_weights}
    for at, name in faults:
        if at == rank:
            FAULTS[name](arguments)
    embeddings, labels = arguments.pop("embeddings"), arguments.pop("labels")
    try:
        if case.gathered:
            batches = gather(embeddings, labels, group=trainer.group, **arguments)
            trainer.head(batches["faces"] if isinstance(batches, dict) else batches)
        else:
            trainer.head(embeddings, labels)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_faulty(rank: int, world: int, case: Case, faults: tuple[Fault, ...]) -> Numbers:
    trainer = Trainer(rank, case)
    before = trainer.parameters()
    said = attempt(trainer, global_batch(case, 0, 0).of(trainer.here), faults, rank)
    return {"said": said, **numbers_of(trainer, before)}
