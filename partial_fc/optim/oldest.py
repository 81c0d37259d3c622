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
    cut, done = (behind.steps - behind.first) // 2, behind.done
    for start in range(0, len(done), ROWS_AT_ONCE):
        old = (done[start : start + ROWS_AT_ONCE] < behind.first + cut).nonzero()[:, 0]
        if len(old):
            old.add_(start)
            if behind.rows.store is not None:
                behind.rows.store.wrote()  # the step
                behind.rows.store.ready(old, ahead=False)
            behind.catch_up(old)
    for each in behind.parameters.values():
        table, entries = each.moves.table, dimension_of_steps(each.moves)
        each.moves.table = table.narrow(entries, cut, table.shape[entries] - cut).clone()
    behind.first += cut
    behind.tables = {}


def dimension_of_steps(moves: Any) -> int:
    """Return which dimension of a table has an entry for each step."""
    return 0 if isinstance(moves, AdamMoves) else 1
