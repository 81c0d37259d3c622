"""The check of a training step: flags of every rank, agreed across ranks, and what is done about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import Ranks
from partial_fc.errors import NonFiniteError, log
from partial_fc.nonfinite.describe import describe, not_finite
from partial_fc.nonfinite.scalers import active_scalers, report_overflow
from partial_fc.rows import ClassRows, HasClassRows


def rows_of(heads: Iterable[HasClassRows]) -> list[ClassRows]:
    return [head.class_rows for head in heads]


def others(parameters: Iterable[Tensor] | Tensor, losses: Sequence[ClassRows]) -> list[Tensor]:
    """Return the given parameters that do not belong to a loss."""
    theirs = {id(p) for rows in losses for p in rows.everything}
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [p for p in given if id(p) not in theirs]


def check_step(losses: Sequence[ClassRows], parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Return whether the step may be taken: check losses and gradients, and agree. parameters: of the backbone."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads += [p.grad for rows in losses for p in (*rows.carriers, *rows.shared.values()) if p.grad is not None]
    flags = agree_on_flags(local_flags(losses, [not_finite(grad) for grad in grads]), losses)
    return decide(losses, flags, parameters, scaler)


def local_flags(losses: Sequence[ClassRows], bad_gradients: Iterable[Tensor]) -> Tensor:
    """Return float64 `[2]`: whether a gradient, and whether a loss, is non-finite as far as this rank knows.

    bad_gradients: 0-d bools. Does not wait for the device.
    """
    device = losses[0].device
    sums = [backward.losses.detach().sum() for rows in losses for backward in rows.record.backwards]
    flags = []
    for found in (list(bad_gradients), [~total.isfinite() for total in sums]):
        if found:
            flags.append(torch.stack([each.to(device) for each in found]).any())
        else:
            flags.append(torch.zeros((), dtype=torch.bool, device=device))
    return torch.stack(flags).double()


def agree_on_flags(flags: Tensor, losses: Sequence[ClassRows]) -> Tensor:
    """Return the largest of every flag over the ranks of all losses, which as a rule are the same ranks."""
    seen: list[Ranks] = []
    for rows in losses:
        ranks = rows.shards.ranks
        if not any(ranks.same_as(other) for other in seen):
            seen.append(ranks)
            flags = max_over_ranks(flags, ranks)
    return flags


def max_over_ranks(flags: Tensor, ranks: Ranks) -> Tensor:
    """Return the largest of every flag over all ranks: one small collective, two on a 2-D mesh."""
    for group in (ranks.group, ranks.replica_group):
        if group is not None:
            with naming_the_missing("the agreement on a step", group):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags


def decide(losses: Sequence[ClassRows], flags: Tensor, parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Return whether the step may be taken, by the agreed `flags` (gradient, loss). One wait for the device.

    Raises NonFiniteError, on every rank alike, if a loss wants that, or if too many steps in a row were skipped.
    """
    bad_gradient, bad_loss = (value != 0 for value in flags.tolist())
    records = [rows.record for rows in losses]
    already_skipped = any(record.skipped for record in records)  # by the batch's status, or by an earlier check
    watching = [record for record in records if record.watches]
    if not (already_skipped or bad_gradient or bad_loss):
        for record in records:
            record.mark_checked()
        return True
    reason = next((record.reason for record in records if record.skipped and record.reason), "")
    scalers = active_scalers(scaler)
    # a finite loss with a non-finite gradient is the scale's fault where a scaler is at work
    overflow = not bad_loss and (not reason if already_skipped else bool(scalers))
    if not overflow and not reason:
        reason = describe(losses, parameters)
    for record in records:
        record.mark_checked()
        record.bad_step = True
        record.reason = reason
    if not overflow:
        if any(record.on_nonfinite == "raise" for record in watching):
            raise NonFiniteError(reason)
        if not already_skipped:
            log.warning("%s; the step is skipped", reason)
        for record in records:
            record.skip(reason)
    if scalers:
        for each in scalers:
            report_overflow(each)
    else:
        forget_gradients(losses, parameters)
    return False


def forget_gradients(losses: Sequence[ClassRows], parameters: Sequence[Tensor]) -> None:
    """Set gradients to None: an optimizer that steps nevertheless changes neither weights nor state."""
    for parameter in parameters:
        parameter.grad = None
    for rows in losses:
        rows.clear()
