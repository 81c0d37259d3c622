"""What is done about a training step that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partial_fc.batch.later import bad_value_found_later, compare_statistics
from partial_fc.errors import NonFiniteError, log
from partial_fc.nonfinite.describe import describe
from partial_fc.nonfinite.scalers import active_scalers, report_overflow
from partial_fc.rows import ClassRows
from partial_fc.step_record import StepRecord


def refuse_step(
    heads: Sequence[ClassRows], parameters: Sequence[Tensor], scaler: Any, bad_loss: bool, already_skipped: bool
) -> None:
    """Raise NonFiniteError or skip the step, on every rank alike, as the heads want it.

    already_skipped: by the status of the batch, or by an earlier check of this step.
    """
    records = [rows.record for rows in heads]
    watching = [record for record in records if record.watches]
    reason = next((record.reason for record in records if record.skipped and record.reason), "")
    scalers = active_scalers(scaler)
    # a finite loss with a non-finite gradient is the scale's fault where a scaler is at work
    overflow = not bad_loss and (not reason if already_skipped else bool(scalers))
    bad_value = bad_value_of(heads) if bad_loss else ""
    for rows in heads if bad_loss else ():
        compare_statistics([held[n] for held, n, *_ in rows.record.statistics], rows.shards.ranks, rows.device)
    if not (overflow or reason or bad_value):
        reason = describe(heads, parameters)
    for record in records:
        if not overflow:
            put_back(record)
        record.mark_checked()
        record.bad_step = True
        record.reason = reason
    if bad_value:
        forget_gradients(heads, parameters)
        raise ValueError(bad_value)
    if not overflow:
        if any(record.on_nonfinite == "raise" for record in watching):
            raise NonFiniteError(reason)
        if not already_skipped:
            log.warning("%s; the step is skipped", reason)
        for record in records:
            count_skip(record, reason)
    if scalers:
        for each in scalers:
            report_overflow(each)
    else:
        forget_gradients(heads, parameters)


def put_back(record: StepRecord) -> None:
    """Give running statistics the values of before the step."""
    for held, name, there, before in record.statistics:
        held[name] = there.copy_(before)  # a margin may have put another tensor in its place
    record.statistics = []


def bad_value_of(heads: Sequence[ClassRows]) -> str:
    """Return which label of the step is no class or which weight invalid, in the same words on every rank, or ""."""
    found = (bad_value_found_later(rows.record.backwards, rows.shards.num_classes) for rows in heads)
    return next(filter(None, found), "")


def count_skip(record: StepRecord, reason: str) -> None:
    """Count the step as skipped, once. Raise NonFiniteError after too many in a row."""
    record.reason = reason
    if record.in_skips:
        return
    record.in_skips = True
    record.skips += 1
    record.skips_in_a_row += 1
    if record.max_skips is not None and record.skips_in_a_row > record.max_skips:
        raise NonFiniteError(
            f"{record.skips_in_a_row} steps in a row were not finite, and max_skips is {record.max_skips}; the last: "
            f"{reason}. Lower the learning rate, or resume from an earlier checkpoint"
        )


def forget_gradients(heads: Sequence[ClassRows], parameters: Sequence[Tensor]) -> None:
    """Set gradients to None: an optimizer that steps nevertheless changes neither weights nor state."""
    for parameter in parameters:
        parameter.grad = None
    for rows in heads:
        rows.clear()
