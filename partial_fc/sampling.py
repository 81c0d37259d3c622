"""Which classes take part in a step: the same draw on every rank, at every world size, on CPU and CUDA.

A forward needs its positives (classes of the batch) and a window of `w = round(r · C)` classes drawn from all. Windows
walk a keyed permutation of the class ids: forward `t` of a cycle takes `[t · w, (t + 1) · w)`, the last window wraps
round to the beginning, and the next cycle has another permutation. So every class is drawn at least once in
`ceil(C / w)` steps, no window holds a class twice, and all ranks evaluate one function of (seed, step).

    own classes [C_local]  ──  once a cycle, the step of each (cycle_table.py)  ──>  a step's rows here, about w / world
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from partial_fc.cycle_table import CycleTable, make_table
from partial_fc.permutation import ROUNDS, Permutation

# a CPU has a table of a cycle for shards of at most so many rows, or windows; larger ones, and all classes, have none
SMALL_SHARD, MOST_WINDOWS = 1 << 22, 64
_MASK64 = (1 << 64) - 1


def mix(*values: int) -> int:
    """One well-mixed 63-bit key from several integers (SplitMix64's finaliser, applied to each in turn)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state >> 1


@lru_cache(maxsize=8)
def permutation_of(size: int, seed: int, cycle: int) -> Permutation:
    """Return the permutation that the windows of a cycle walk."""
    return Permutation(size, tuple(mix(mix(seed, cycle), i) for i in range(ROUNDS)))


def window_size(num_classes: int, sample_rate: float, block: int = 1) -> int:
    """Return how many ids a step draws on all ranks together: `round(r * C)`, at least one; or whole blocks."""
    return max(1, round(sample_rate * -(-num_classes // block))) * block


def draw_window(
    num_classes: int, sample_rate: float, *, seed: int, step: int, device: torch.device, block: int = 1
) -> Tensor:
    """Return the class ids `[round(r * C)]` that `step` draws, distinct, unsorted: the same on every rank.

    block: so many consecutive ids at a time; from C on they are no class.
    """
    blocks, size = -(-num_classes // block), window_size(num_classes, sample_rate, block) // block
    cycle, place = divmod(step, -(-blocks // size))
    positions = torch.arange(place * size, (place + 1) * size, device=device) % blocks
    ids = permutation_of(blocks, seed, cycle).at(positions)
    return ids if block == 1 else (ids[:, None] * block + torch.arange(block, device=device)).flatten()


class Windows:
    """This rank's part of the windows of one head: those of the class ids `[lo, hi)`."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.tables: dict[int, CycleTable] = {}  # by cycle: of this one, and of the next one where somebody asked

    def __getstate__(self) -> dict[str, Any]:
        return {"key": (), "tables": {}}

    def fit(
        self, num_classes: int, sample_rate: float, seed: int, lo: int, hi: int, device: torch.device, block: int
    ) -> Windows:
        """Return this, made for a head as it is now: what was found before is forgotten if anything differs."""
        key = (num_classes, sample_rate, seed, lo, hi, device, block)
        if self.key != key:
            self.key, self.tables, local = key, {}, hi - lo
            self.blocks, self.size = -(-num_classes // block), window_size(num_classes, sample_rate, block) // block
            self.steps = -(-self.blocks // self.size)  # of a cycle
            small = local < num_classes and local <= max(SMALL_SHARD, MOST_WINDOWS * self.size * block)
            self.tabled = self.steps <= local and (small or device.type != "cpu")
        return self

    def rows(self, step: int) -> Tensor:
        """Return the local rows of the step's window, int64; sorted, if they come from a table."""
        num_classes, sample_rate, seed, lo, hi, device, block = self.key
        if not self.tabled:
            ids = draw_window(num_classes, sample_rate, seed=seed, step=step, device=device, block=block)
            return ids[(ids >= lo) & (ids < hi)] - lo
        cycle, place = divmod(step, self.steps)
        table = self.table(cycle)
        if cycle - 1 in self.tables:
            self.tables = {cycle: table}
        bounds = table.bounds if isinstance(table.bounds, Tensor) else table.bounds.values()
        ranges = [(place + 1, place + 2)]
        if place in (0, self.steps - 1) and self.blocks % self.size:  # both have the first places of the cycle
            ranges.append((0, 1))
        found = [table.rows[i:j] for a, b in ranges for i, j in bounds[:, (a, b)].tolist()]
        rows = torch.cat(found).long()
        return rows if len(ranges) == 1 else rows.sort().values

    def table(self, cycle: int) -> CycleTable:
        """Return that of a cycle; once it is made, it is known until another is asked for."""
        found = self.tables.get(cycle)
        if found is None:
            _, _, seed, lo, hi, device, block = self.key
            found = make_table(permutation_of(self.blocks, seed, cycle), self.size, lo, hi, device, block)
            self.tables = {cycle: found, **{c: t for c, t in self.tables.items() if abs(c - cycle) == 1}}
        return found


def select_rows(window: Tensor, positives: Tensor, lo: int, hi: int) -> Tensor:
    """Return the local rows of `window` united with this rank's positives, sorted `[S]`.

    positives: class ids in any order and number; those outside `[lo, hi)` belong to other ranks or to nobody.
    """
    ids = positives.reshape(-1)
    return torch.unique(torch.cat((window, ids[(ids >= lo) & (ids < hi)] - lo)))
