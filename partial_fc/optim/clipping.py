"""`clip_grad_norm_`: one gradient norm over replicated parameters and sharded rows.

    ‖g‖ = (Σ over backbone ‖g_p‖^k + Σ over heads Σ over ranks ‖g_rows‖^k)^(1/k)     k = norm_type

One all-reduce a loss sums the norms of its shards. It also carries the flags of the step's check (`nonfinite`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc import errors
from partial_fc.distributed.dtensors import local_part
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.nonfinite.scalers import look_at_wiring
from partial_fc.nonfinite.step_check import decide, local_flags, others
from partial_fc.optim.row_state import HALF
from partial_fc.rows import ClassRows, HasClassRows

NORM = "the norm of gradients over ranks"  # in a `RankMissing`


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    *heads: HasClassRows,
    max_norm: float,
    norm_type: float = 2.0,
    scaler: Any = None,
) -> Tensor:
    """Clip the gradients of replicated parameters and sharded heads by their one global norm; return the norm before.

    It checks the step, as `check_gradients` does: if a loss or the norm is not finite on any rank, all raise
    NonFiniteError, or `head.skipped` becomes True on all and gradients are forgotten. Call it after a scaler's
    unscale_().

    Args:
        parameters: of the backbone, replicated (counted once) or FSDP2's DTensors (summed over their shards); those of
            `heads` among them are ignored.
        heads: every `PartialFC` and `CenterLoss` of the step. One small collective a head (two on a 2-D mesh).
        scaler: the GradScaler, if there is one, so that its optimizers skip a step together.

    One wait for the device; none if every head has on_nonfinite="log" or checks no more (validate).
    """
    norm_type = float(norm_type)  # "inf" too, as in torch
    if not (norm_type > 0 and max_norm >= 0):
        raise errors.no_norm(norm_type, max_norm)
    class_rows = [head.class_rows for head in heads]
    plain = others(parameters, class_rows)
    watched = any(rows.record.watches for rows in class_rows)
    if scaler is not None or not watched:
        look_at_wiring(scaler, plain, class_rows)
    norms, flags = gradient_norms(plain, class_rows, norm_type, watched)
    if not norms:
        return torch.tensor(0.0)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
    if flags is not None:
        flags[0] += (~total.isfinite()).to(flags)
        if not decide(class_rows, flags, plain, scaler):
            return total
    factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
    of_losses = [p for rows in class_rows for p in (*rows.shared.values(), *rows.carriers)]
    for parameter in [*plain, *of_losses]:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(factor.to(parameter.grad.device))
    return total


@torch.no_grad()
def gradient_norms(
    parameters: Iterable[Tensor] | Tensor, heads: Sequence[ClassRows], norm_type: float, check: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Return (norms of all gradients, those of each loss over its ranks; agreed flags for `decide`, if `check`)."""
    for rows in heads:
        if rows.live_optimizer is not None and rows.live_optimizer.update_in_backward:
            raise errors.clipped_in_backward()
    plain = [*others(parameters, heads), *(p for rows in heads for p in rows.shared.values())]
    norms = [_norm(p.grad, norm_type) for p in plain if p.grad is not None]
    flags = local_flags(heads, [~norm.isfinite() for norm in norms]) if check else None
    for rows in heads:
        norm, flags = _norm_over_ranks(rows, norm_type, flags)
        norms.append(norm)
    return norms, flags


def _norm(grad: Tensor, norm_type: float) -> Tensor:
    """Return the norm of one gradient over all its shards, float64; half precision is summed in float32."""
    norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32 if grad.dtype in HALF else None)
    if isinstance(norm, DTensor):
        with naming_the_missing(NORM):
            norm = norm.full_tensor()
    return norm.double()


def _norm_over_ranks(rows: ClassRows, norm_type: float, flags: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return (norm of all shards, flags of any rank): one collective; with flags one more between replicas."""
    ranks = rows.shards.ranks
    grads = [local_part(carrier.grad) for carrier in rows.carriers if carrier.grad is not None]
    parts = [_norm(grad, norm_type) for grad in grads if grad.numel()]
    parts = parts or [torch.zeros((), dtype=torch.float64, device=rows.device)]
    norm = torch.linalg.vector_norm(torch.stack(parts), norm_type)
    if ranks.group is None:
        return norm, flags
    largest = math.isinf(norm_type)
    own = norm if largest else norm.pow(norm_type)
    if flags is not None:  # a maximum may lose a NaN, which flags do not
        flags = torch.stack((flags[0] + (~own.isfinite()).to(flags), flags[1])).to(rows.device)
    numbers = own[None] if flags is None else torch.cat((own[None], flags))
    with naming_the_missing(NORM, ranks.group):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=ranks.group)
    if flags is not None:
        flags = numbers[1:].contiguous()
        if ranks.replica_group is not None:
            with naming_the_missing(NORM, ranks.replica_group):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.replica_group)
    return numbers[0] if largest else numbers[0].pow(1 / norm_type), flags
