"""The result of one check, and how ranks agree on it: a check fails on all ranks if it fails on any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from partial_fc.distributed.ranks import naming_the_missing


@dataclass(frozen=True)
class Check:
    """One check. ok: True, False, or None if it could not be made; words: what was found; mend: how to fix it."""

    name: str
    ok: bool | None
    words: str
    mend: str = ""


def agreed(mine: list[Check]) -> list[Check]:
    """Return for each check the first rank's that failed, with the rank's name unless it failed on all ranks."""
    all_ranks = gather_objects([tuple(vars(check).values()) for check in mine])
    found = []
    for of_check in zip(*all_ranks, strict=True):
        checks = [Check(*values) for values in of_check]
        failed = [rank for rank, check in enumerate(checks) if check.ok is False]
        if not failed:
            found.append(next((c for c in checks if c.ok is None), checks[0]))
            continue
        first = checks[failed[0]]
        where = f"rank {failed[0]}: " if len(failed) < len(checks) else ""
        found.append(Check(first.name, False, where + first.words, first.mend))
    return found


def gather_objects(mine: Any) -> list[Any]:
    """Return the object of every rank of the default group; small objects of plain types."""
    if not dist.is_initialized():
        return [mine]
    all_ranks: list[Any] = [None] * dist.get_world_size()
    with naming_the_missing("the exchange of the doctor's results"):
        dist.all_gather_object(all_ranks, mine)
    return all_ranks
