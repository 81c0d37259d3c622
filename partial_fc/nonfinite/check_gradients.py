"""`check_gradients`: the check of a training step, for loops that do not clip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from partial_fc.nonfinite.step_check import check_step, others, rows_of
from partial_fc.rows import HasClassRows


def check_gradients(parameters: Iterable[Tensor] | Tensor, *heads: HasClassRows, scaler: Any = None) -> bool:
    """Return whether the step may be taken: no loss and no gradient is NaN or infinite on any rank. Alike on every rank.

    For loops that do not clip, between backward and the optimizers; `clip_grad_norm_` includes the same check. If the
    answer is no, `head.skipped` is True for all `heads`, all gradients are forgotten, and optimizers that step
    nevertheless do nothing.

    Args:
        parameters: of the backbone; parameters of `heads` among them are ignored.
        heads: every `PartialFC` and `CenterLoss` of the step.
        scaler: the GradScaler, if there is one, after its unscale_() of every optimizer. A non-finite gradient of a finite
            loss then makes all its optimizers skip; it is not counted and no error.

    Costs one pass over the gradients, one small collective (two on a 2-D mesh) and one wait for the device. Does nothing
    and returns True where every head has on_nonfinite="log" or checks no more (validate).

    Raises NonFiniteError, the same on every rank, if a head has on_nonfinite="raise", or after more than `max_skips` skips
    in a row; ValueError without a head.
    """
    if not heads:
        raise ValueError(
            "check_gradients needs the heads of the step, whose ranks agree: check_gradients(parameters, head)"
        )
    losses = rows_of(heads)
    if not any(rows.record.watches for rows in losses):
        return not any(rows.record.skipped for rows in losses)
    return check_step(losses, others(parameters, losses), scaler)
