"""A keyed permutation of class ids, evaluated forwards at positions or backwards at ids, and never stored.

It is a Feistel network with additions modulo `a` and `b` on pairs (p // b, p % b), `a·b >= size > a·b - a` (Black and
Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Fewer than `a` of its values lie outside `[0, size)`. Where each
ends if the network is applied until it comes back inside ("cycle walking") is put in a table of at most `sqrt(size)`
entries, one for either direction, so that nothing else has a loop that depends on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROUNDS = 6  # even; four are enough for what looks random; six leave a margin and cost 30 operations a class


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
    """A permutation of `range(size)`. keys: one for each round."""

    size: int
    keys: tuple[int, ...]

    def at(self, positions: Tensor) -> Tensor:
        """Return the ids (int64) at `positions`."""
        return self._inside(self._network(positions), self._outside_forwards)

    def positions_of(self, ids: Tensor) -> Tensor:
        """Return where `ids` stand: the inverse of `at`."""
        return self._inside(self._network_backwards(ids), self._outside_backwards)

    @property
    def _sides(self) -> tuple[int, int]:
        a = max(1, math.isqrt(self.size))
        return a, -(-self.size // a)

    def _network(self, positions: Tensor) -> Tensor:
        """A permutation of `range(a * b)`."""
        a, b = self._sides
        left, right = positions // b, positions % b
        for key in self.keys:
            left = left + keyed_below(right, key, a)
            left -= a * (left >= a)
            left, right, a, b = right, left, b, a
        return left * b + right

    def _network_backwards(self, ids: Tensor) -> Tensor:
        a, b = self._sides  # the number of rounds is even, so that they are those of the result, too
        left, right = ids // b, ids % b
        for key in reversed(self.keys):
            left, right, a, b = right, left, b, a
            left = left - keyed_below(right, key, a)
            left += a * (left < 0)
        return left * b + right

    @cached_property
    def _outside_forwards(self) -> Tensor:
        return self._outside(self._network)

    @cached_property
    def _outside_backwards(self) -> Tensor:
        return self._outside(self._network_backwards)

    def _outside(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return where cycle walking takes each value in `[size, a * b)`, on the CPU."""
        a, b = self._sides
        start = torch.arange(self.size, a * b, device="cpu")
        values = network(start)
        # a value that comes back to its start is on a cycle that never gets inside; nothing inside leads to it either
        while bool((walking := (values >= self.size) & (values != start)).any()):
            values = torch.where(walking, network(values), values)
        return torch.where(values == start, 0, values)

    def _inside(self, values: Tensor, outside: Tensor) -> Tensor:
        if not len(outside):
            return values
        table = outside.to(values.device)
        return torch.where(values >= self.size, table[(values - self.size).clamp_(min=0)], values)
