"""The step of SGD, Adam or AdamW on class rows, in place, by one kernel: 20 bytes an element for SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.batch.row_sums import add_to_rows
from partial_fc.kernels.launch import device_code, ran
from partial_fc.kernels.rows import Blocks


@dataclass(frozen=True)
class Numbers:
    """One step. Of SGD: a momentum, b 1 − dampening. Of Adam: a 1 − β1, b β2, and corrections of the step count:
    by_rate lr / (1 − β1^t), by_root 1 / √(1 − β2^t), or both in `factors [2]` on the card."""

    lr: float
    a: float
    b: float
    decay: float
    adam: bool = False
    eps: float = 0.0
    by_rate: float = 0.0
    by_root: float = 0.0
    factors: Tensor | None = None
    nesterov: bool = False
    decoupled: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class Memory:
    """Rows `[C, D]`, contiguous, and their state; taken: copies `[n, D]` of the rows that are stepped, where rows and
    state are not in memory as they are. low: rows in half precision, written beside `rows`."""

    rows: Tensor
    state: tuple[Tensor, ...]
    taken: tuple[Tensor, ...] = ()
    low: Tensor | None = None


class Through(NamedTuple):
    """What takes gradients `[n, D]` by directions through the lengths of rows: 1/length `[n, 1]`, and the gradients
    `extra [P, D]` of some rows on top, slot `[n]` says which: the first of them for a row, or P."""

    inverse: Tensor
    slot: Tensor
    extra: Tensor

    @classmethod
    def of(cls, inverse: Tensor, positions: Tensor, values: Tensor) -> Through:
        """values: `[P, D]`, added to the rows at positions `[P]`, always in the same order."""
        places = torch.arange(len(positions), device=positions.device)
        slot = torch.full((len(inverse),), len(positions), dtype=torch.int64, device=positions.device)
        slot.scatter_reduce_(0, positions, places, "amin")
        extra = torch.zeros_like(values)
        return cls(inverse, slot, add_to_rows(extra, slot[positions], values))


def step_rows(
    grad: Tensor,
    memory: Memory,
    numbers: Numbers,
    index: Tensor | None,
    start: int,
    rounding: tuple[int, int] | None,
    through: Through | None = None,
) -> bool:
    """Step the rows index `[n]`, or start, start + 1, ..., by their gradients `[n, D]`; return whether the kernel ran.
    through: the gradients are those by the rows' directions.

    index: each row once; a negative one is passed over. rounding: (class id of row 0, key), to round at random.
    """
    rows, taken, low = memory.rows, memory.taken, memory.low
    count, width = grad.shape
    grad, how = grad if grad.stride(1) == 1 else grad.contiguous(), Blocks.of(width)
    source, *states = taken or (rows, *memory.state)
    first_from, second_from = [*states, rows, rows][:2]
    first, second = [*memory.state, rows, rows][:2]
    first_id, key = rounding or (0, 0)
    inverse, slot, extra = through or (rows, rows, rows)

    def launch() -> None:
        kernel = device_code("rows").step_rows[(-(-count // how.BR),)]
        kernel(
            grad, source, rows, rows if low is None else low, first_from, first, second_from, second,
            rows if index is None else index, rows if numbers.factors is None else numbers.factors,
            inverse, slot, extra, len(extra), count, start, width, grad.stride(0), numbers.lr, numbers.a, numbers.b,
            numbers.decay, numbers.eps, numbers.by_rate, numbers.by_root, first_id, key & 0x7FFFFFFF,
            GATHER=index is not None, TAKEN=bool(taken), ADAM=numbers.adam, MOMENTUM=bool(memory.state),
            NESTEROV=numbers.nesterov, MAXIMIZE=numbers.maximize, DECAY=numbers.decay != 0,
            DECOUPLED=numbers.decoupled, FACTORS=numbers.factors is not None, LOW=low is not None,
            STOCHASTIC=rounding is not None, THROUGH=through is not None, **how._asdict(),
        )  # fmt: skip

    if count and not ran("step_rows", launch, rows):
        return False
    for written in (rows, *memory.state, *(() if low is None else (low,))):
        torch.autograd.graph.increment_version(written)
    return True
