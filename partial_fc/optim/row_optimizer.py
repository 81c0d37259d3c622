"""`RowOptimizer` runs any `torch.optim` class that updates each row independently over the class rows of a loss.

A block of rows is stepped as a small dense parameter:

    sampled      rows [S] of the step: weight[rows], state[rows]  ──  class.step()  ──>  weight[rows], state[rows]
    all rows     row blocks of the shard, as views: no temporary of the shard's size

Rows without a gradient wait, and make the steps that they missed when they are next used (skipped_rows.py).
Scalar state, such as Adam's step, counts optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc.batch.status import HALF
from partial_fc.distributed.ranks import local_part, naming_the_missing
from partial_fc.nonfinite.check_gradients import check_own_step
from partial_fc.nonfinite.wiring import refuse_gradients_elsewhere
from partial_fc.optim.catching_up import put_frozen
from partial_fc.optim.in_backward import begin_update, end_update
from partial_fc.optim.kernel_step import KernelStep
from partial_fc.optim.low_precision import WideRows, follow_writes, note_writes
from partial_fc.optim.moves import is_row_state
from partial_fc.optim.optimizer_class import fused_moves
from partial_fc.optim.pads import blocks_with_pads, join_far_pads
from partial_fc.optim.row_state import COUNT, MASTER, RowState
from partial_fc.rows import UpdateRows

BLOCK_BYTES = 8 << 20  # bounds temporaries, which stay in the cache of a CPU
BLOCK_BYTES_ELSEWHERE = 256 << 20


class RowOptimizer(RowState):
    """`optimizer_class` over the class rows of a head: `RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)`.

    Schedulers, `GradScaler` and `zero_grad` work as with any torch optimizer. Under sampling `param_groups` holds a
    carrier whose gradient is that of the selected rows. State is allocated once, at the first step, for the shard.

    Raises ValueError for a class whose update of a row depends on other rows (LAMB, LARS, Shampoo, Muon, Adafactor,
    L-BFGS): those rows are on other ranks, or not selected.
    """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and which rows had one; with False, gradients of all rows become zeros instead."""
        self.class_rows.clear() if set_to_none or self.class_rows.sampled else self.keep_zeros()
        self.class_rows.record.end()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient; do nothing in a skipped step (`head.skipped`).

        If neither `clip_grad_norm_` nor `check_gradients` was called, losses and row gradients are checked here alike.
        """
        rows, record = self.class_rows, self.class_rows.record
        as_built = [group["params"] is rows.trainable for group in self.param_groups] == [True]
        if rows.live_optimizer not in (None, self) or not as_built:
            self.refuse_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.update_in_backward:
            end_update(self)
        elsewhere = (rows.sampled or self.update_in_backward) and not record.untrained
        if elsewhere and any(p.grad is not None for p in rows.parameters.values()):
            refuse_gradients_elsewhere(rows)
        if record.unchecked:
            check_own_step(rows)
        skipped = record.skipped and not record.gradients_gone
        record.end()
        rows.updates += 1
        if skipped:
            return loss
        with record_function("partial_fc::update"), naming_the_missing("the update of rows", rows.shards.ranks.group):
            if rows.behind is not None:
                rows.behind.check(self.param_groups[0], self.state)
            if self.low_precision == "master":
                follow_writes(self)
            for parameter in rows.shared.values():
                if parameter.grad is not None:
                    RowUpdate(self, parameter).apply(None, 0, len(parameter), local_part(parameter.grad))
            if not self.update_in_backward:
                self._update_rows()
            if self.low_precision == "master":
                note_writes(self)
        if rows.store is not None:
            rows.store.wrote()
        return loss

    def _update_rows(self) -> None:
        rows = self.class_rows
        if rows.pads is not None:
            join_far_pads(rows, row_blocks)
        grads = [None if c.grad is None else local_part(c.grad) for c in rows.carriers]
        if all(grad is None for grad in grads):
            return
        rows.used = True
        selected = rows.grad_rows if rows.sampled else None
        if rows.store is not None:
            rows.store.note(selected)
        behind, updates, taken = rows.behind, {}, {}
        if behind is not None:
            taken = behind.of_update(selected)
        for (name, parameter), grad in zip(rows.parameters.items(), grads, strict=True):
            if grad is not None:
                updates[name] = update = RowUpdate(self, parameter, taken.get(name, {}))
                of_grad = row_blocks(len(grad), grad)
                for a, b in of_grad if rows.pads is None else blocks_with_pads(grad, rows.pads, row_blocks):
                    update.apply(None if selected is None else selected[a:b], a, b, grad[a:b])
        if behind is not None:
            if taken.keys() - updates.keys():
                put_frozen(behind, selected, taken, updates)
            behind.note_step(self.param_groups[0], updates, selected)

    def begin_update_in_backward(self) -> UpdateRows:
        return begin_update(self, RowUpdate)


class RowUpdate:
    """One step of one parameter; call `apply` for each block of rows. All blocks start from the same scalar state.

    taken: the rows that are to be stepped, under "", and their state, if not as in memory (skipped_rows.py).
    """

    def __init__(
        self, optimizer: RowOptimizer, parameter: nn.Parameter, taken: Mapping[str, Tensor] | None = None
    ) -> None:
        self.taken = taken or {}
        self.optimizer = optimizer
        self.parameter = parameter
        self.weight = local_part(parameter.detach())
        self.state = optimizer.state[parameter]
        wide = optimizer.low_precision and self.weight.dtype in HALF
        self.wide = WideRows(optimizer, parameter, self.weight) if wide else None
        self.before = {k: v for k, v in self.state.items() if k not in (MASTER, COUNT)} or optimizer.begin(parameter)
        group = optimizer.inner.param_groups[0]
        group.update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
        if group.get("fused") and not wide and self.weight.dtype in HALF and self.weight.device.type == "cpu":
            group["fused"] = fused_moves(type(optimizer.inner), self.weight.dtype)  # type: ignore[arg-type]
        self.kernel = None if optimizer.class_rows.kernels is None else KernelStep(self)

    def apply(self, index: Tensor | None, a: int, b: int, grad: Tensor) -> None:
        """Step a block of rows by `grad`. index: these local rows, at the places a to b among the rows of the step;
        None: the local rows a to b, which are stepped in place."""
        if self.kernel is not None and self.kernel(index, a, b, grad):
            return
        inner = self.optimizer.inner
        rows = self._part("", self.weight if self.wide is None else self.wide.source, index, a, b)
        block = nn.Parameter(rows.to(self.weight.dtype) if self.wide is None else rows.float())
        block.grad = grad.to(block.dtype)
        inner.param_groups[0]["params"] = [block]
        if self.before:
            inner.state[block] = {key: self._part(key, value, index, a, b) for key, value in self.before.items()}
        inner.step()  # fused steps raise no version for autograd; where rows move in backward, `end_update` does
        torch.autograd.graph.increment_version(block.grad if self.optimizer.update_in_backward else rows)
        if self.wide is not None and self.wide.source is not self.weight:
            _put(self.wide.source, block.detach(), index, a, b)
        narrow = block.detach() if self.wide is None else self.wide.narrow(block.detach(), index, a, b)
        _put(self.weight, narrow, index, a, b)
        for key, value in inner.state[block].items():
            if not is_row_state(value, block):  # scalar state
                self.state[key] = value
                continue
            if key not in self.state:
                self.state[key] = self.optimizer.allocate(self.parameter, value.dtype, key, value.shape[1:])
            _put(local_part(self.state[key]), value, index, a, b)
        inner.state.clear()
        inner.param_groups[0]["params"] = []

    def _part(self, key: str, value: Any, index: Tensor | None, a: int, b: int) -> Any:
        """Return of row state, or of the rows under "", those of the block; a copy of scalar state, because the step of
        each block advances it."""
        if key in self.taken:
            return self.taken[key][a:b].to(value.dtype) if key else self.taken[key][a:b]
        if not isinstance(value, Tensor) or not value.ndim:
            return value.clone() if isinstance(value, Tensor) else value
        rows = local_part(value)
        return rows[a:b] if index is None else rows.index_select(0, index)


def row_blocks(count: int, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Yield blocks (a, b) of bounded size; one empty block without rows, so that scalar state counts on all ranks."""
    most = BLOCK_BYTES if weight.device.type == "cpu" else BLOCK_BYTES_ELSEWHERE
    size = max(1, most // max(1, weight[:1].nbytes if len(weight) else 1))
    for a in range(0, max(count, 1), size):
        yield a, min(a + size, count)


def _put(tensor: Tensor, values: Tensor, index: Tensor | None, a: int, b: int) -> None:
    if index is not None:
        tensor.index_copy_(0, index, values)
    elif tensor[a:b].data_ptr() != values.data_ptr():  # else the class worked in place, on a view
        tensor[a:b] = values
