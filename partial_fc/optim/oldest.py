"""The oldest half of the steps that rows may have missed is forgotten, so that tables stay small.

Rows that have missed a step of that half make their steps now; all others keep their place in the tables. A window
comes to each row at least once every ⌈1/r⌉ steps, so in a long run there are none or few, and no pass over all rows is
needed.
"""

from __future__ import annotations

from typing import Any

from partial_fc.optim.adam_moves import AdamMoves

ROWS_AT_ONCE = 1 << 12


def forget_oldest(behind: Any) -> None:
    """Do so for the rows of one loss, a `SkippedRows` that has counted as many steps as are kept."""
    cut, done = behind.steps // 2, behind.done
    for first in range(0, len(done), ROWS_AT_ONCE):
        old = (done[first : first + ROWS_AT_ONCE] < cut).nonzero()[:, 0]
        if len(old):
            old.add_(first)
            if behind.rows.store is not None:
                behind.rows.store.ready(old, ahead=False)
            behind.catch_up(old)
        done[first : first + ROWS_AT_ONCE].sub_(cut)
    for each in behind.parameters.values():
        table, entries = each.moves.table, 0 if isinstance(each.moves, AdamMoves) else 1  # which dimension they are
        each.moves.table = table.narrow(entries, cut, behind.steps + 1 - cut).clone()
    behind.steps -= cut
    behind.tables = []
