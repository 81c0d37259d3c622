"""`clip_grad_norm_`: one gradient norm over replicated parameters and sharded rows.

    ‖g‖ = (Σ over backbone ‖g_p‖^k + Σ over heads Σ over ranks ‖g_rows‖^k)^(1/k)     k = norm_type

One all-reduce a head sums the norms of its shards. It also carries the flags of the step's check (`nonfinite`).
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
from partial_fc.distributed.ranks import local_part, naming_the_missing, sum_over_replicas
from partial_fc.nonfinite.scalers import look_at_wiring
from partial_fc.nonfinite.step_check import alike, decide, local_flags, norms_of, of_backbone
from partial_fc.optim.shard_norms import NORM, largest_norm, norm_of_shards
from partial_fc.rows import ClassRows, HasClassRows


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
    NonFiniteError, or `head.skipped` becomes True on all and gradients are forgotten. Call it after unscale_().

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
    class_rows = list({id(head.class_rows): head.class_rows for head in heads}.values())
    plain = of_backbone(parameters, class_rows)
    watched = any(rows.record.watches for rows in class_rows)
    if scaler is not None or not watched:
        look_at_wiring(scaler, plain, class_rows)
    norms, flags = gradient_norms(plain, class_rows, norm_type, watched)
    if not norms:
        return torch.tensor(0.0, device="cpu")
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([n.to(total.device) for n in norms]), norm_type)
    if flags is None:
        factor: Tensor | float = (max_norm / (total + 1e-6)).clamp_(max=1.0)
    else:
        *found, norm = torch.cat((flags, total.to(flags)[None])).tolist()
        found = found if math.isfinite(norm) else [norm, *found[1:]]  # the total may overflow where no part does
        if not decide(class_rows, found, plain, scaler):
            return total
        factor = min(max_norm / (norm + 1e-6), 1.0)
    of_losses = [p for rows in class_rows for p in (*rows.shared.values(), *rows.carriers)]
    grads = [local_part(p.grad) for p in [*plain, *of_losses] if p.grad is not None]
    for (device, dtype), same in alike(grads) if factor != 1.0 else ():
        torch._foreach_mul_(same, factor.to(device, dtype) if isinstance(factor, Tensor) else factor)
    return total


@torch.no_grad()
def gradient_norms(
    parameters: Iterable[Tensor] | Tensor, heads: Sequence[ClassRows], norm_type: float, check: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Return (float64 norms of gradients, those of each loss over its ranks; agreed flags for `decide`, if `check`)."""
    if any(optimizer is not None and optimizer.update_in_backward for optimizer in (h.live_optimizer for h in heads)):
        raise errors.clipped_in_backward()
    plain = [*of_backbone(parameters, heads), *(p for rows in heads for p in rows.shared.values())]
    grads = [p.grad for p in plain if p.grad is not None]
    norms = [norm.double() for norm in norms_of([g for g in grads if not isinstance(g, DTensor)], norm_type)]
    norms += [norm_of_shards(grad, norm_type) for grad in grads if isinstance(grad, DTensor)]
    own = [_own_norm(rows, norm_type) for rows in heads]
    flags = local_flags(heads, [*norms, *own]) if check else None
    for rows, norm in zip(heads, own, strict=True):
        norm, flags = _over_ranks(rows, norm, norm_type, flags)
        norms.append(norm)
    return norms, flags


def _own_norm(rows: ClassRows, norm_type: float) -> Tensor:
    """Return the norm of this rank's rows."""
    parts = [part.double() for part in norms_of([grad for grad in rows.gradients() if grad.numel()], norm_type)]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=rows.device)
    norm = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), norm_type)
    return norm.to(rows.device)


def _over_ranks(rows: ClassRows, norm: Tensor, norm_type: float, flags: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return (norm of all shards, flags of all ranks): one collective; with flags one more between replicas, and for a
    maximum, which may lose a NaN."""
    ranks = rows.shards.ranks
    if ranks.group is None:
        return norm, flags
    if math.isinf(norm_type):
        return largest_norm(norm, flags, ranks)
    own = norm.pow(norm_type)[None]
    numbers = own if flags is None else torch.cat((own, flags.to(rows.device)))
    with naming_the_missing(NORM, ranks.group):
        dist.all_reduce(numbers, group=ranks.group)
    if flags is not None:
        flags = sum_over_replicas(numbers[1:].contiguous(), ranks, NORM)
    return numbers[0].pow(1 / norm_type), flags
