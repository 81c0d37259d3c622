"""The result of one check, and how ranks agree on it: a check fails on all ranks if it fails on any."""

from __future__ import annotations

from dataclasses import dataclass

from partial_fc.distributed.objects import gather_objects

RESULTS = "the exchange of the doctor's results"


@dataclass(frozen=True)
class Check:
    """One check. ok: True, False, or None if it could not be made; words: what was found; mend: how to fix it."""

    name: str
    ok: bool | None
    words: str
    mend: str = ""


def agreed(mine: list[Check]) -> list[Check]:
    """Return for each check the first rank's that failed, with the rank's name unless it failed on all ranks."""
    all_ranks = gather_objects([tuple(vars(check).values()) for check in mine], RESULTS)
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
