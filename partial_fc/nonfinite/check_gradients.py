"""`check_gradients`: the check of a training step, for loops that do not clip; and that of optimizers nobody checked
for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.ranks import Ranks, local_part, naming_the_missing, sum_over_replicas
from partial_fc.nonfinite.scalers import SUSPICIOUS, largest_factor, look_at_wiring, scaled_and_stepped
from partial_fc.nonfinite.step_check import decide, is_skipped, local_flags, norms_of, of_backbone
from partial_fc.nonfinite.wiring import refuse_alone
from partial_fc.rows import ClassRows, HasClassRows


def check_gradients(parameters: Iterable[Tensor] | Tensor, *heads: HasClassRows, scaler: Any = None) -> bool:
    """Return whether the step may be taken: no loss and no gradient is NaN or infinite on any rank. Alike on every
    rank.

    For loops that do not clip, between backward and the optimizers; `clip_grad_norm_` includes the same check. If the
    answer is no, `head.skipped` is True for all `heads`, all gradients are forgotten, and optimizers that step
    nevertheless do nothing.

    Args:
        parameters: of the backbone; parameters of `heads` among them are ignored.
        heads: every `PartialFC` and `CenterLoss` of the step.
        scaler: the GradScaler, if there is one, after its unscale_() of every optimizer. A non-finite gradient of a
            finite loss then makes all its optimizers skip; it is not counted and no error.

    Costs one pass over the gradients, one small collective (two on a 2-D mesh) and one wait for the device. Does
    nothing and returns True where every head has on_nonfinite="log" or checks no more (validate).

    Raises NonFiniteError, the same on every rank, if a head has on_nonfinite="raise", or after more than `max_skips`
    skips in a row; ValueError without a head.
    """
    if not heads:
        raise ValueError(
            "check_gradients needs the heads of the step, whose ranks agree: check_gradients(parameters, head)"
        )
    class_rows = list({id(head.class_rows): head.class_rows for head in heads}.values())
    plain = of_backbone(parameters, class_rows)
    look_at_wiring(scaler, plain, class_rows)
    if not any(rows.record.watches for rows in class_rows):
        return not is_skipped(class_rows)
    return check_step(class_rows, plain, scaler)


def check_step(heads: Sequence[ClassRows], parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Return whether the step may be taken: check losses and gradients, and agree. parameters: of the backbone."""
    refuse_alone(heads)
    return decide(heads, agree_on_flags(flags_of(heads, parameters), heads).tolist(), parameters, scaler)


def flags_of(heads: Sequence[ClassRows], parameters: Sequence[Tensor]) -> Tensor:
    """Return this rank's flags of a step (`local_flags`)."""
    grads = [local_part(p.grad) for p in parameters if p.grad is not None]
    of_losses = [p.grad for rows in heads for p in (*rows.carriers, *rows.shared.values()) if p.grad is not None]
    grads += [local_part(grad) for grad in of_losses]
    # absolute values, whose sum overflows only where a gradient is of no use
    return local_flags(heads, norms_of([grad for grad in grads if grad.numel()], 1.0))


def check_own_step(rows: ClassRows) -> None:
    """Check, for an optimizer whose step() is called, a step that nobody has checked."""
    refuse_alone([rows])
    flags = torch.cat((flags_of([rows], []), largest_factor(rows).to(rows.device)))
    *found, largest = agree_on_flags(flags, [rows]).tolist()
    if largest / rows.shards.ranks.total < SUSPICIOUS:
        decide([rows], found, [])
        return
    rows.record.half_unscaled = scaled_and_stepped(rows)  # on all ranks, which agree once more
    check_step([rows], [])


def agree_on_flags(flags: Tensor, heads: Sequence[ClassRows]) -> Tensor:
    """Return the sum of every flag over the ranks of all heads, which as a rule are the same ranks."""
    seen: list[Ranks] = []
    for rows in heads:
        ranks = rows.shards.ranks
        if not any(ranks.same_as(other) for other in seen):
            seen.append(ranks)
            flags = sum_of_flags(flags, ranks, "the agreement on a step")
    return flags


def sum_of_flags(flags: Tensor, ranks: Ranks, what: str) -> Tensor:
    """Return the sum of every flag over all ranks: one small collective, two on a 2-D mesh. A sum keeps every NaN."""
    if ranks.group is not None:
        with naming_the_missing(what, ranks.group):
            dist.all_reduce(flags, group=ranks.group)
    return sum_over_replicas(flags, ranks, what)
