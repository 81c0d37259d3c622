"""Non-finite numbers: what is found where, who hears of it, and what is left out; the same on every rank.

    forward     embeddings: the exchange's status says it to every host, before anything is computed from them
    backward    the losses of the forwards it came from are kept [N] each, and looked at when the step is judged
    judge       once a step, before an optimizer moves: losses, gradients of the heads' rows, gradients of the backbone
                two flags a rank ride on the norm's collective (clip_grad_norm_) or travel alone (check_gradients, RowOptimizer.step,
                center.step); then the host reads them, once
    verdict     "raise": NonFiniteError, before anything has moved
                "skip": gradients are forgotten, so that optimizers that are stepped nevertheless do nothing; counted; a limit
                a GradScaler's: the forward was finite, the scaled gradient was not; left out by both, not counted, no error

What is bad is named in words (rank, sample, label, class row) by collectives that only a bad step takes part in.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import Ranks
from partial_fc.errors import NonFiniteError
from partial_fc.nonfinite.step_record import Watched
from partial_fc.nonfinite.words import explain, not_finite, rows_device
from partial_fc.shards import local_part

log = logging.getLogger("partial_fc")


def local_flags(heads: Sequence[Watched], bad_gradient: Iterable[Tensor]) -> Tensor:
    """float64 `[2]` on the heads' device: whether a gradient, and whether a loss, is not finite as far as this rank knows.

    bad_gradient: 0-d bools. Waits for no device.
    """
    device = rows_device(heads[0])
    losses = [backward.losses.detach().sum() for head in heads for backward in head._record.backwards]
    flags = []
    for found in (list(bad_gradient), [~loss.isfinite() for loss in losses]):
        flags.append(
            torch.stack([each.to(device) for each in found]).any()
            if found
            else torch.zeros((), dtype=torch.bool, device=device)
        )
    return torch.stack(flags).double()


def over_ranks(flags: Tensor, ranks: Ranks) -> Tensor:
    """The largest of every flag over all ranks: one small collective, two on a 2-D mesh."""
    for group in (ranks.group, ranks.replica_group):
        if group is not None:
            with naming_the_missing("the agreement on a step", group):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags


def judge(heads: Sequence[Watched], parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Look at losses and gradients, agree, and decide: whether the step may be taken. parameters: of the backbone."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads += [
        p.grad for head in heads for p in (*head._rows.carriers, *head._rows.shared.values()) if p.grad is not None
    ]
    return decide(heads, over_all(local_flags(heads, [not_finite(grad) for grad in grads]), heads), parameters, scaler)


def over_all(flags: Tensor, heads: Sequence[Watched]) -> Tensor:
    """`over_ranks` over the ranks of all heads, which are the same as a rule."""
    seen: list[Ranks] = []
    for head in heads:
        ranks = head._rows.shards.ranks
        if not any(ranks.same_as(other) for other in seen):
            seen.append(ranks)
            flags = over_ranks(flags, ranks)
    return flags


def decide(heads: Sequence[Watched], flags: Tensor, parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """What is done about agreed `flags` (gradient, loss): whether the step may be taken. One wait for the device.

    Raises NonFiniteError, on every rank alike, if a head wants that, or if too many steps in a row were left out.
    """
    of_gradient, of_loss = (value != 0 for value in flags.tolist())
    found = any(head.skipped for head in heads)  # the exchange has found it, or an earlier look at this step
    watching = [head for head in heads if head._watches]
    if not (found or of_gradient or of_loss):
        for head in heads:
            head._record.conclude()
        return True
    why = next((head._record.last for head in heads if head.skipped and head._record.last), "")
    scalers = scalers_at_work(scaler, heads)
    by_scale = not of_loss and (not why if found else bool(scalers))
    if not by_scale and not why:
        why = explain(heads, parameters)
    for head in heads:
        head._record.conclude()
        head._record.bad_step, head._record.last = True, why
    if not by_scale:
        if any(head.on_nonfinite == "raise" for head in watching):
            raise NonFiniteError(why)
        if not found:
            log.warning("%s; the step is skipped", why)
        for head in heads:
            head._record.leave_out(why)
    if scalers:
        for each in scalers:
            _tell_scaler(each)
    else:
        forget(heads, parameters)
    return False


def forget(heads: Sequence[Watched], parameters: Sequence[Tensor]) -> None:
    """No gradients: an optimizer's step then changes neither weights nor state."""
    for parameter in parameters:
        parameter.grad = None
    for head in heads:
        head._rows.clear()


# ---------------------------------------------------------------------------------------------------- scalers


def scalers_at_work(scaler: Any, heads: Sequence[Watched]) -> list[Any]:
    """The GradScalers between unscale_() and update(): the given one, or those that there are.

    Nothing tells a gradient that it was scaled, so the process's objects are searched, which a bad step alone has to wait for.
    """
    if scaler is not None:
        return [scaler] if scaler.is_enabled() else []
    kind = torch.amp.GradScaler
    # type() and not isinstance(), which would ask lazy modules and proxies for their class
    found = [each for each in gc.get_objects() if issubclass(type(each), kind)]
    return [each for each in found if each.is_enabled() and len(each._per_optimizer_states)]


def _tell_scaler(scaler: Any) -> None:
    """All optimizers that were unscaled find an infinity, so that they skip together."""
    for state in scaler._per_optimizer_states.values():
        for found in state["found_inf_per_device"].values():
            local_part(found).fill_(1.0)


# ---------------------------------------------------------------------------------------------------- in words


# ---------------------------------------------------------------------------------------------------- the public function


def check_gradients(parameters: Iterable[Tensor] | Tensor, *heads: Watched, scaler: Any = None) -> bool:
    """Whether the step may be taken, on every rank alike: no loss of `heads` and no gradient is a NaN or infinity on any rank.

    For loops that do not clip, between backward and the optimizers; `clip_grad_norm_` says the same by its norm. If the answer is no,
    `head.skipped` is True of all `heads`, gradients of all that is given are forgotten, and optimizers that are stepped nevertheless do
    nothing.

    Args:
        parameters: of the backbone; any that belong to `heads` are left out.
        heads: every `PartialFC` and `CenterLoss` of the step.
        scaler: the GradScaler, if there is one, after its unscale_() of every optimizer: a gradient that is not finite though the loss is
            makes all its optimizers skip, is not counted and no error.

    One pass over the gradients, one small collective (two on a 2-D mesh) and one wait for the device; nothing at all, and True, where
    every head has on_nonfinite="log" or looks no more (validate).

    Raises NonFiniteError, the same on every rank, if a head has on_nonfinite="raise", or after more than `max_skips` skips in a row;
    ValueError without a head.
    """
    if not heads:
        raise ValueError(
            "check_gradients needs the heads of the step, whose ranks agree: check_gradients(parameters, head)"
        )
    if not any(head._watches for head in heads):
        return not any(head.skipped for head in heads)
    return judge(heads, others(parameters, heads), scaler)


def others(parameters: Iterable[Tensor] | Tensor, heads: Sequence[Watched]) -> list[Tensor]:
    """Those parameters that are of no head."""
    theirs = {id(p) for head in heads for p in head._rows.everything}
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [p for p in given if id(p) not in theirs]
