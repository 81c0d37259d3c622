"""`update_in_backward`: rows move tile by tile inside backward, so that no gradient of the whole weight exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.distributed.ranks import local_part
from partial_fc.kernels.update import Through
from partial_fc.nonfinite.check_gradients import agree_on_flags
from partial_fc.nonfinite.scalers import scaled_and_stepped
from partial_fc.nonfinite.step_check import decide, local_flags
from partial_fc.rows import ClassRows, UpdateRows


class _Update(Protocol):
    kernel: Any

    def apply(self, index: Tensor | None, a: int, b: int, grad: Tensor) -> None: ...


def begin_update(optimizer: Any, make: Callable[..., _Update]) -> UpdateRows:
    """Begin a step of a `RowOptimizer` inside backward. make: returns the update of a parameter.

    The result moves rows a to b and returns True. Given `through`, the gradients are those by the rows' directions, and
    a kernel takes them through the lengths; it returns False, and has done nothing, where none does.
    """
    if optimizer.moved_in_backward:
        raise RuntimeError(
            "update_in_backward cannot be joined with accumulation over micro-batches: call step() after every "
            "backward, or build the RowOptimizer without update_in_backward"
        )
    optimizer.moved_in_backward = True
    rows: ClassRows = optimizer.class_rows
    # the hook of the loss has run: its losses and their gradient are in the record
    optimizer.scaled_in_backward = bool(scaled_and_stepped(rows))
    if rows.record.watches and not _loss_is_finite(rows):
        return lambda a, b, grads, through=None: True
    updates = [make(optimizer, p) if p.requires_grad else None for p in rows.parameters.values()]
    if rows.store is not None:
        rows.store.note(None)

    def update_rows(a: int, b: int, grads: list[Tensor], through: Callable[[], Through] | None = None) -> bool:
        with record_function("partial_fc::update"), torch.no_grad():
            grads = [grad.to(rows.home) for grad in grads] if rows.travels else grads
            if through is not None:
                by_kernel = updates[0].kernel if len(updates) == 1 and updates[0] is not None else None
                return by_kernel is not None and by_kernel(None, a, b, grads[0], through)
            for update, grad in zip(updates, grads, strict=True):
                if update is not None:
                    update.apply(None, a, b, grad)
        return True

    return update_rows


def end_update(optimizer: Any) -> None:
    """The optimizer's step() was called; RuntimeError if by a GradScaler, which gives it these attributes, or after one
    has scaled the loss."""
    given = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    if given or getattr(optimizer, "scaled_in_backward", False):
        optimizer.scaled_in_backward = False
        raise RuntimeError(
            "update_in_backward cannot be joined with a GradScaler: rows moved before their gradient was unscaled"
        )
    if optimizer.moved_in_backward:  # the backward of another loss would be wrong from here on
        for parameter in optimizer.class_rows.parameters.values():
            torch.autograd.graph.increment_version(local_part(parameter.detach()))
    optimizer.moved_in_backward = False


def _loss_is_finite(rows: ClassRows) -> bool:
    """Check the losses and their gradients alone: those of the rows do not exist yet."""
    grads = [backward.grad.sum() for backward in rows.record.backwards]
    return decide([rows], agree_on_flags(local_flags([rows], grads), [rows]).tolist(), [])
