"""`RowOptimizer` runs any `torch.optim` class whose update treats rows apart over the class rows of a loss.

For a block of rows it gathers weights and state, lets the class take its step on them as on a small dense parameter, and
writes both back (`row_update`):

    sampled      rows [S] of the step: weight[rows], state[rows]  ──  class.step()  ──>  weight[rows], state[rows]
    all rows     row blocks of the shard, as views: no temporary of the shard's size

Rows without a gradient keep weight and state bit for bit: no decay, no momentum (as SparseAdam does). Scalar state, such
as Adam's step, counts optimizer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from partial_fc.nonfinite.describe import not_finite
from partial_fc.nonfinite.step_check import agree_on_flags, check_step, decide, local_flags
from partial_fc.optim.optimizer_class import check_rows_apart, construct, initial_state
from partial_fc.optim.row_state import RowState
from partial_fc.optim.row_update import RowUpdate, row_blocks
from partial_fc.rows import ClassRows, HasClassRows, UpdateRows
from partial_fc.shards import local_part

LowPrecision = Literal["master", "stochastic"]


class RowOptimizer(RowState):
    """`optimizer_class` over the class rows of a head: `RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)`.

    A `torch.optim.Optimizer`: schedulers, `GradScaler` and `zero_grad` work as with any other. Under sampling
    `param_groups` holds a compact carrier whose gradient is that of the selected rows. State is allocated once, at the
    first step, for the shard.

    Args:
        update_in_backward: move the rows of a tile inside backward, as soon as their gradient is known, so that no gradient
            of the whole weight exists; for sample_rate=1.0. step() is called as usual and does nothing more. Whatever
            needs the whole gradient first (clipping, accumulation over micro-batches, a GradScaler) raises RuntimeError.
        low_precision: for weights in bfloat16 or float16, whose updates are often below their resolution: "master" keeps
            float32 weights in the state; "stochastic" rounds up or down at random in proportion, keyed by seed, step and
            class id (bfloat16 only).

    Raises ValueError for a class whose update of a row depends on other rows (LAMB, LARS, Shampoo, Muon, Adafactor,
    L-BFGS): those rows are on other ranks, or not selected.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        head: HasClassRows,
        *,
        update_in_backward: bool = False,
        low_precision: LowPrecision | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(
                f"optimizer_class must be a torch.optim.Optimizer class such as torch.optim.SGD, not {optimizer_class!r}"
            )
        rows = getattr(head, "class_rows", None)
        if not isinstance(rows, ClassRows):
            raise TypeError(f"a RowOptimizer trains a PartialFC, not {type(head).__name__}")
        if update_in_backward and rows.sampled:
            raise ValueError(
                "update_in_backward is for sample_rate=1.0; a sampled head has no gradient of the whole weight to save"
            )
        if low_precision not in (None, "master", "stochastic"):
            raise ValueError(f'low_precision must be None, "master" or "stochastic", not {low_precision!r}')
        if low_precision == "stochastic" and any(p.dtype == torch.float16 for p in rows.parameters.values()):
            raise ValueError('low_precision="stochastic" rounds to bfloat16, and the weights are float16; use "master"')
        check_rows_apart(optimizer_class, options)
        self.class_rows = rows
        self.initial_state = initial_state(optimizer_class, options)  # row state of a row that never had a gradient
        self.inner = construct(optimizer_class, rows.everything, options)  # the class itself, stepped on blocks of rows
        self.update_in_backward = update_in_backward
        self.low_precision = low_precision
        self._moved_in_backward = False
        torch.optim.Optimizer.__init__(self, list(rows.trainable), self.inner.defaults)
        self.param_groups[0]["params"] = rows.trainable  # this very list, which backward changes in place
        rows.optimizer = weakref.ref(self)
        # makes a GradScaler call step() in any case and say so: then what cannot work is refused instead of ignored
        self._step_supports_amp_scaling = update_in_backward

    @property
    def moved_in_backward(self) -> bool:
        """Whether a backward has moved the rows since the last step() (update_in_backward)."""
        return self._moved_in_backward

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and which rows had one. They cannot be zeros: it would not be known of which rows."""
        self.class_rows.clear()
        self.class_rows.record.end()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient; do nothing in a skipped step (`head.skipped`).

        If neither `clip_grad_norm_` nor `check_gradients` was called, losses and row gradients are checked here alike.
        """
        rows, record = self.class_rows, self.class_rows.record
        if rows.live_optimizer not in (None, self):
            raise RuntimeError(
                "another RowOptimizer was built for this head after this one, and both would move its rows; "
                "keep one, and build it again only where nothing steps the old one"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.update_in_backward:
            if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
                raise RuntimeError(
                    "update_in_backward cannot be joined with a GradScaler: rows moved before their gradient was unscaled"
                )
            self._moved_in_backward = False
        if record.watches and not record.checked and not record.skipped:
            check_step([rows], [])
        record.end()
        if record.skipped:
            return loss
        with record_function("partial_fc::update"):
            for parameter in rows.shared.values():
                if parameter.grad is not None:
                    RowUpdate(self, parameter).apply(None, 0, len(parameter), local_part(parameter.grad))
            if not self.update_in_backward:
                self._update_rows()
        return loss

    def _update_rows(self) -> None:
        rows = self.class_rows
        grads = [local_part(c.grad) if c.grad is not None else None for c in rows.carriers]
        if all(grad is None for grad in grads):
            return
        rows.used = True
        selected = rows.grad_rows if rows.sampled else None
        for parameter, grad in zip(rows.parameters.values(), grads, strict=True):
            update = RowUpdate(self, parameter)
            if grad is not None:
                for a, b in row_blocks(len(grad), grad):
                    update.apply(None if selected is None else selected[a:b], a, b, grad[a:b])

    def begin_update_in_backward(self) -> UpdateRows:
        """Begin a step inside backward; call the result with local rows a to b and their gradients, each row once."""
        if self._moved_in_backward:
            raise RuntimeError(
                "update_in_backward cannot be joined with accumulation over micro-batches: call step() after every "
                "backward, or build the RowOptimizer without update_in_backward"
            )
        self._moved_in_backward = True
        if self.class_rows.record.watches and not self._loss_is_finite():
            return lambda a, b, grads: None
        updates = [RowUpdate(self, parameter) for parameter in self.class_rows.parameters.values()]

        def update_rows(a: int, b: int, grads: list[Tensor]) -> None:
            with record_function("partial_fc::update"), torch.no_grad():
                for update, grad in zip(updates, grads, strict=True):
                    update.apply(None, a, b, grad)

        return update_rows

    def _loss_is_finite(self) -> bool:
        """Check the losses and their gradients alone: those of the rows do not exist yet."""
        rows = [self.class_rows]
        bad = [not_finite(backward.grad) for backward in self.class_rows.record.backwards]
        return decide(rows, agree_on_flags(local_flags(rows, bad), rows), [])
