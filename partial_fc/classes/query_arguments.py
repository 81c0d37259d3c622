"""Check the arguments of a query for nearest classes on every rank, and compare them between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.problems import embeddings_problem
from partial_fc.batch.status import DTYPES
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.texts import gather_texts
from partial_fc.errors import NonFiniteError
from partial_fc.rows import ClassRows

BLOCK = 1024  # embeddings that are checked at a time
NO_DIRECTION = 1e-12  # a shorter row has cosine 0 to everything
QUERY = "a query for nearest classes"  # in a `RankMissing`


@dataclass(frozen=True)
class _QueryArguments:
    """The arguments of one rank as numbers, which all ranks compare."""

    problem: int  # 0: none; 1: an argument; 2: an embedding that is not finite
    k: int
    tile_bytes: int
    dtype: int  # of the embeddings, an index into DTYPES; -1 without embeddings
    samples: int


def check_query(
    class_rows: ClassRows, k: Any, limit: int, tile_bytes: Any, embeddings: Any, other_problem: str = ""
) -> list[int]:
    """Return the number of embeddings of every rank.

    other_problem: what is wrong with further arguments of this rank.

    Raises the same ValueError or NonFiniteError on every rank if the arguments of one are wrong or differ.
    """
    ranks = class_rows.shards.ranks
    device = class_rows.device
    problem, kind = _number_problem(k, limit, tile_bytes) or other_problem, 1
    if not problem and embeddings is not None:
        problem, kind = _query_problem(embeddings, class_rows.main.shape[-1], device)
    if problem:
        mine = _QueryArguments(kind, 0, 0, 0, 0)
    elif embeddings is None:
        mine = _QueryArguments(0, k, tile_bytes, -1, 0)
    else:
        mine = _QueryArguments(0, k, tile_bytes, DTYPES.index(embeddings.dtype), len(embeddings))
    table = meet(QUERY, ranks, device, list(vars(mine).values()))
    everyone = [_QueryArguments(*row) for row in table]
    wrong = next((flat for flat, each in enumerate(everyone) if each.problem), None)
    if wrong is not None:
        text = f"{ranks.name(wrong)}: {gather_texts(problem, ranks, device)[wrong]}"
        raise NonFiniteError(text) if everyone[wrong].problem == 2 else ValueError(text)
    for what in ("k", "tile_bytes", "dtype"):
        values = [getattr(each, what) for each in everyone]
        flat = next((flat for flat, value in enumerate(values) if value != values[0]), None)
        if flat is not None:
            here, there = values[0], values[flat]
            name = what
            if what == "dtype":
                here, there = DTYPES[here], DTYPES[there]
                name = "embedding dtype"
            raise ValueError(
                f"ranks disagree: {name} is {here} on {ranks.name(0)} and {there} on {ranks.name(flat)}; "
                "pass the same on every rank"
            )
    return [each.samples for each in everyone]


def _number_problem(k: Any, limit: int, tile_bytes: Any) -> str:
    for name, value in (("k", k), ("tile_bytes", tile_bytes)):
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{name} must be an int, not {type(value).__name__}"
    if not limit:
        return "there is only one class, so it has no nearest other class"
    if not 1 <= k <= limit:
        return f"k is {k}; valid are 1 to {limit}"
    return "" if 1 <= tile_bytes < 2**62 else f"tile_bytes is {tile_bytes}; it must be at least 1"


def _query_problem(embeddings: Any, width: int, device: torch.device) -> tuple[str, int]:
    """Return (what is wrong with the embeddings or "", the kind of problem: 1 or 2)."""
    if not isinstance(embeddings, Tensor):
        return f"embeddings must be a tensor [N, D], not {type(embeddings).__name__}", 1
    problem = embeddings_problem(embeddings)
    if problem:
        return problem, 1
    if embeddings.device != device:
        return f"the head is on {device}, embeddings on {embeddings.device}", 1
    if embeddings.shape[1] != width:
        return f"embeddings have width {embeddings.shape[1]}, the head has embedding_size {width}", 1
    for start in range(0, len(embeddings), BLOCK):
        part = embeddings.detach()[start : start + BLOCK]
        bad = unit_factors(part if part.dtype == torch.float64 else part.float()).isnan().nonzero()
        if len(bad):
            at = start + int(bad[0, 0])
            return f"the length of embeddings[{at}] is not finite (a NaN, infinity or overflow)", 2
    return "", 1


def unit_factors(rows: Tensor) -> Tensor:
    """Return 1 / length of `rows [..., D]` as `[..., 1]`: 0 if too short for a direction, NaN if not finite."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(length < NO_DIRECTION, 0.0, torch.where(length.isfinite(), 1 / length, torch.nan))
