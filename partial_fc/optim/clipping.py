"""One gradient norm over replicated parameters and sharded rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.nonfinite import judge as nonfinite
from partial_fc.optim.row_optimizer import HALF, HasRows
from partial_fc.rows import ShardedRows
from partial_fc.shards import local_part

NORM = "the norm of gradients over ranks"  # in a `RankMissing`


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, *heads: HasRows, max_norm: float, norm_type: float = 2.0, scaler: Any = None
) -> Tensor:
    """Clip the gradients of replicated parameters and sharded heads by their one global norm, and return that norm (before clipping).

    It also judges the step, as `check_gradients` does: if a loss, or the norm, is not finite on any rank, NonFiniteError is raised on all,
    or `head.skipped` becomes True on all and the gradients are forgotten. With a GradScaler, call it after unscale_().

    Args:
        parameters: of the backbone, replicated (counted once) or FSDP2's DTensors (summed over their shards); any that belong to `heads`
            are left out.
        heads: every `PartialFC` and `CenterLoss` of the step; their shards' norms are summed over the ranks, with one small collective a
            head (and one more on a 2-D mesh), which also carries what is not finite.
        scaler: the GradScaler, if there is one, so that its optimizers skip a step together.

    One wait for the device, and none if every head has on_nonfinite="log" or looks no more (validate).
    """
    plain, judged = nonfinite.others(parameters, heads), any(head._watches for head in heads)
    norms, flags = gradient_norms(plain, heads, norm_type, judged)
    if not norms:
        return torch.tensor(0.0)
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
    if flags is not None:
        flags[0] += (~total.isfinite()).to(flags)
        if not nonfinite.decide(heads, flags, plain, scaler):
            return total
    factor = (max_norm / (total + 1e-6)).clamp_(max=1.0)
    shared = [p for head in heads for p in head._rows.shared.values()]
    carriers = [c for head in heads for c in head._rows.carriers]
    for parameter in [*plain, *shared, *carriers]:
        if parameter.grad is not None:
            local_part(parameter.grad).mul_(factor.to(parameter.grad.device))
    return total


@torch.no_grad()
def gradient_norms(
    parameters: Iterable[Tensor] | Tensor, heads: Sequence[HasRows], norm_type: float, judged: bool
) -> tuple[list[Tensor], Tensor | None]:
    """(norms of all gradients, of each head's shards over the ranks; agreed flags of what is not finite, if `judged`).

    Flags (gradient, loss) are 0 where nothing was found; the heads' own norms are not among them, since all ranks have those.
    """
    sharded = [head._rows for head in heads]
    for rows in sharded:
        if rows.live_optimizer is not None and rows.live_optimizer.update_in_backward:
            raise RuntimeError(
                "update_in_backward cannot be joined with clipping: rows moved before the norm was known"
            )
    plain = [*nonfinite.others(parameters, heads), *(p for rows in sharded for p in rows.shared.values())]
    norms = [_norm(p.grad, norm_type) for p in plain if p.grad is not None]
    flags = nonfinite.local_flags(heads, [~norm.isfinite() for norm in norms]) if judged else None
    for rows in sharded:
        local = [local_part(c.grad) for c in rows.carriers if c.grad is not None]
        norm, flags = _norm_over_ranks(local, rows, norm_type, flags)
        norms.append(norm)
    return norms, flags


def _norm(grad: Tensor, norm_type: float) -> Tensor:
    """The norm of one gradient over all its shards, float64; half precision is summed in float32."""
    low = grad.dtype in HALF
    norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32 if low else None)
    if isinstance(norm, DTensor):
        with naming_the_missing(NORM):
            norm = norm.full_tensor()
    return norm.double()


def _norm_over_ranks(
    grads: list[Tensor], rows: ShardedRows, norm_type: float, flags: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(norm of all shards; the flags of any rank of the head), by one collective, and one more between replicas if there are flags."""
    ranks, device = rows.shards.ranks, local_part(next(iter(rows.parameters.values()))).device
    parts = [_norm(g, norm_type) for g in grads if g.numel()]
    norm = (
        torch.linalg.vector_norm(torch.stack(parts), norm_type)
        if parts
        else torch.zeros((), dtype=torch.float64, device=device)
    )
    if ranks.group is None:
        return norm, flags
    largest = math.isinf(norm_type)
    own = norm if largest else norm.pow(norm_type)
    if flags is not None:  # a maximum may lose a NaN, which flags do not
        flags = torch.stack((flags[0] + (~own.isfinite()).to(flags), flags[1])).to(device)
    numbers = own[None] if flags is None else torch.cat((own[None], flags))
    with naming_the_missing(NORM, ranks.group):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=ranks.group)
    if flags is not None and ranks.replica_group is not None:
        flags = numbers[1:].contiguous()
        with naming_the_missing(NORM, ranks.replica_group):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.replica_group)
    elif flags is not None:
        flags = numbers[1:]
    return numbers[0] if largest else numbers[0].pow(1 / norm_type), flags
