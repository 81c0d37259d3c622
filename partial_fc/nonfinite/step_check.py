"""The check of a training step, as far as every step takes it: flags of this rank, and what agreed flags mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from partial_fc.nonfinite.bad_step import refuse_step
from partial_fc.nonfinite.wiring import REFUSED, raise_refusal
from partial_fc.rows import ClassRows


def others(parameters: Iterable[Tensor] | Tensor, heads: Sequence[ClassRows]) -> list[Tensor]:
    """Return the given parameters that do not belong to a loss."""
    theirs = {id(p) for rows in heads for p in rows.everything}
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [p for p in given if id(p) not in theirs]


def local_flags(heads: Sequence[ClassRows], bad_gradients: Iterable[Tensor]) -> Tensor:
    """Return float64 `[2]`: whether a gradient, and whether a loss, is non-finite as far as this rank knows.

    bad_gradients: 0-d bools. Does not wait for the device.
    """
    device = heads[0].device
    fine = torch.zeros((), dtype=torch.bool, device=device)
    sums = [backward.losses.detach().sum() for rows in heads for backward in rows.record.backwards]
    bad_losses = [~total.isfinite() for total in sums]
    flags = [torch.stack([fine, *(each.to(device) for each in bad)]).any() for bad in (bad_gradients, bad_losses)]
    refused = any(rows.record.untrained or rows.record.half_unscaled for rows in heads)
    return torch.stack(flags).double() + REFUSED * refused


def decide(heads: Sequence[ClassRows], flags: Tensor, parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Return whether the step may be taken, by the agreed `flags` (gradient, loss). One wait for the device.

    Raises NonFiniteError, on every rank alike, if a loss wants that, or if too many steps in a row were skipped.
    """
    found = flags.tolist()
    if max(found) >= REFUSED:
        raise_refusal(heads)
    bad_gradient, bad_loss = (value != 0 for value in found)
    records = [rows.record for rows in heads]
    already_skipped = any(record.skipped for record in records)  # by the batch's status, or by an earlier check
    if not (already_skipped or bad_gradient or bad_loss):
        for record in records:
            record.mark_checked()
        return True
    refuse_step(heads, parameters, scaler, bad_loss, already_skipped)
    return False
