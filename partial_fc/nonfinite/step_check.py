"""The check of a training step, as far as every step takes it: flags of this rank, and what agreed flags mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.status import HALF
from partial_fc.distributed.inside_torch import foreach_norm
from partial_fc.nonfinite.bad_step import refuse_step
from partial_fc.nonfinite.wiring import raise_refusal
from partial_fc.rows import ClassRows


def of_backbone(parameters: Iterable[Tensor] | Tensor, heads: Sequence[ClassRows]) -> list[Tensor]:
    """Return the given parameters that do not belong to a loss, nor stand for some that do."""
    theirs = {id(p) for rows in heads for p in (*rows.everything, *rows.trainable)}
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [p for p in given if id(p) not in theirs]


def alike(tensors: Iterable[Tensor]) -> Iterable[tuple[tuple[torch.device, torch.dtype], list[Tensor]]]:
    """Return tensors by device and dtype: what torch's operations on lists take at once."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return found.items()


def norms_of(grads: Iterable[Tensor], order: float) -> list[Tensor]:
    """Return 0-d norms of tensors of this rank, a few launches for all; half precision is summed in float32."""
    norms = []
    for (_, dtype), same in alike(grads):
        each = foreach_norm()(same, order, dtype=torch.float32 if dtype in HALF else None)
        norms.append(each[0] if len(each) == 1 else torch.linalg.vector_norm(torch.stack(list(each)), order))
    return norms


def local_flags(heads: Sequence[ClassRows], probes: Iterable[Tensor]) -> Tensor:
    """Return float64 `[3]`, to be summed over ranks: not finite if a gradient is not, not finite if a loss is not, and
    how many ranks refuse the step.

    probes: 0-d, not finite where a gradient is not. Does not wait for the device.
    """
    device = heads[0].device
    losses = [backward.losses.detach() for rows in heads for backward in rows.record.backwards]
    refused = any(rows.record.untrained or rows.record.half_unscaled for rows in heads)
    refusing = torch.full((), float(refused), dtype=torch.float64, device=device)
    return torch.stack([_sum([probe.detach() for probe in probes], device), _sum(losses, device), refusing])


def _sum(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    sums = [each.sum(dtype=torch.float64).to(device) for each in tensors]
    if not sums:
        return torch.zeros((), dtype=torch.float64, device=device)
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def is_skipped(heads: Sequence[ClassRows]) -> bool:
    """Return whether the step in progress is skipped: by a loss that takes part in it, where any does."""
    in_progress = [rows.record for rows in heads if not rows.record.finished]
    return any(record.skipped for record in in_progress or [rows.record for rows in heads])


def decide(
    heads: Sequence[ClassRows], found: Sequence[float], parameters: Sequence[Tensor], scaler: Any = None
) -> bool:
    """Return whether the step may be taken, by the agreed flags: of a gradient, of a loss, of refusals.

    Raises NonFiniteError, on every rank alike, if a loss wants that, or if too many steps in a row were skipped.
    """
    gradient, loss, refused = found
    if refused:
        raise_refusal(heads)
    already_skipped = is_skipped(heads)  # by the batch's status, or by an earlier check
    if not already_skipped and math.isfinite(gradient) and math.isfinite(loss):
        for rows in heads:
            rows.record.bad_step = rows.record.bad_forward = False  # of an earlier step, if it is of any
            rows.record.mark_checked()
        return True
    refuse_step(heads, parameters, scaler, not math.isfinite(loss), already_skipped)
    return False
