"""Which classes take part in a step: the same draw on every rank, at every world size, on CPU and CUDA.

A forward needs its positives (classes of the batch) and a window of `w = round(r · C)` classes drawn from all. Windows
walk a keyed permutation of the class ids: training forward `t` of a cycle takes `[t · w, (t + 1) · w)`, the last window
of a cycle wraps round to its beginning, and the next cycle uses another permutation. So every class is drawn at least
once in `ceil(C / w)` steps, no window holds a class twice, and a step costs O(w) integer operations and no
communication: every rank evaluates the same function of (seed, step).

The permutation is a Feistel network with additions modulo `a` and `b` on pairs (p // b, p % b), `a·b >= C > a·b - a`
(Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Fewer than `a` of its values lie outside `[0, C)`.
Where each ends if the permutation is applied until it comes back inside ("cycle walking") is put in a table of at most
`sqrt(C)` entries once a cycle, so that a step has no loop that depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROUNDS = 6  # even; four are enough for what looks random; six leave a margin and cost 30 operations a class
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


def keyed_below(values: Tensor, key: int, bound: int) -> Tensor:
    """A keyed hash of each value, in `[0, bound)`; `bound <= 2**31`. Integers wrap alike on CPU and CUDA."""
    h = (values + (key & 0x7FFFFFFF)) * 0x2545F4914F6CDD1D
    h ^= h >> 29
    h *= 0x27D4EB2F165667C5
    h >>= 33
    h &= 0x7FFFFFFF
    h *= bound
    h >>= 31
    return h


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of `range(size)`, evaluated where it is needed and never stored."""

    size: int
    key: int

    @property
    def _sides(self) -> tuple[int, int]:
        a = max(1, math.isqrt(self.size))
        return a, -(-self.size // a)

    def _walk_once(self, positions: Tensor) -> Tensor:
        """The network itself: a permutation of `range(a * b)`."""
        a, b = self._sides
        left, right = positions // b, positions % b
        for i in range(ROUNDS):
            left = left + keyed_below(right, mix(self.key, i), a)
            left -= a * (left >= a)
            left, right, a, b = right, left, b, a
        return left * b + right

    def outside(self) -> Tensor:
        """Return where cycle walking takes each value in `[size, a * b)`. On the CPU, once a permutation."""
        a, b = self._sides
        start = torch.arange(self.size, a * b)
        values = self._walk_once(start)
        # a value that comes back to its start is on a cycle that never gets inside; nothing inside leads to it either
        while bool((walking := (values >= self.size) & (values != start)).any()):
            values = torch.where(walking, self._walk_once(values), values)
        return torch.where(values == start, 0, values)

    def __call__(self, positions: Tensor, outside: Tensor) -> Tensor:
        """Return the permuted ids of `positions` (int64). outside: the table of `outside()` on the same device."""
        ids = self._walk_once(positions)
        if len(outside):
            ids = torch.where(ids >= self.size, outside[(ids - self.size).clamp_(min=0)], ids)
        return ids


@lru_cache(maxsize=8)
def _cycle(num_classes: int, seed: int, cycle: int, device: torch.device) -> tuple[Permutation, Tensor]:
    permutation = Permutation(num_classes, mix(seed, cycle))
    return permutation, permutation.outside().to(device)


def window_size(num_classes: int, sample_rate: float, block: int = 1) -> int:
    """Return how many ids a step draws on all ranks together: `round(r * C)`, at least one; or whole blocks."""
    return max(1, round(sample_rate * -(-num_classes // block))) * block


def draw_window(
    num_classes: int, sample_rate: float, *, seed: int, step: int, device: torch.device, steps: int = 1, block: int = 1
) -> Tensor:
    """Return the class ids `[round(r * C)]` that `step` draws, distinct, unsorted: the same on every rank.

    steps: of one cycle, one after another. block: so many consecutive ids at a time; from C on they are no class.
    """
    blocks, size = -(-num_classes // block), window_size(num_classes, sample_rate, block) // block
    steps_in_cycle = -(-blocks // size)
    permutation, outside = _cycle(blocks, seed, step // steps_in_cycle, device)
    start = step % steps_in_cycle * size
    ids = permutation(torch.arange(start, start + steps * size, device=device) % blocks, outside)
    return ids if block == 1 else (ids[:, None] * block + torch.arange(block, device=device)).flatten()


def select_rows(window: Tensor, labels: Tensor, lo: int, hi: int) -> Tensor:
    """Return this rank's share of `window` united with its positives, as sorted local rows `[S]`.

    window, labels: class ids in any order and number; those outside `[lo, hi)` belong to other ranks or to nobody.
    """
    ids = torch.cat((window, labels.reshape(-1)))
    return torch.unique(ids[(ids >= lo) & (ids < hi)]) - lo
