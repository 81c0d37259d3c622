"""GradScalers: those at work when a step turns out bad, and what they were not told.

    scaler.unscale_(optimizer)        of every optimizer of the step, before gradients are clipped or checked
    scaler.unscale_(head_optimizer)   one that is forgotten leaves gradients 65,536 times as large as the others

A scaler knows its optimizers by their ids alone (`_per_optimizer_states`, private: read here only, and looked at
before it is believed).
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import local_part
from partial_fc.nonfinite.wiring import refuse_alone
from partial_fc.rows import ClassRows

SUSPICIOUS = 256.0  # a gradient by the loss from which on a scale is looked for
_found: dict[int, weakref.ref[Any] | None] = {}  # optimizers by id; None where no object was found


def active_scalers(scaler: Any) -> list[Any]:
    """Return the GradScalers between unscale_() and update(): the given one, or all that exist.

    A gradient does not say that it was scaled, and neither a gradient nor an optimizer leads to its scaler. Loops that
    clip or check without `scaler=` still have to skip a step whose scale overflowed, so the objects of the process are
    searched. Only a bad step pays for that.
    """
    if scaler is not None:
        return [scaler] if scaler.is_enabled() else []
    return [each for each in all_scalers() if each.is_enabled() and len(each._per_optimizer_states)]


def all_scalers() -> list[Any]:
    kind = torch.amp.GradScaler
    # type() and not isinstance(), which would ask lazy modules and proxies for their class
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def report_overflow(scaler: Any) -> None:
    """Let all optimizers that were unscaled find an infinity, so that the scaler skips them together."""
    for state in scaler._per_optimizer_states.values():
        for found in state["found_inf_per_device"].values():
            local_part(found).fill_(1.0)


# ------------------------------------------------------------------------------------------------ a scaler told half


def look_at_wiring(scaler: Any, parameters: Sequence[Tensor], heads: Sequence[ClassRows]) -> None:
    """Note, for the check of the step to raise on every rank, that gradients were scaled and not unscaled.

    parameters: of the backbone. Raises RuntimeError at once where no loss is watched, so that there is no check.
    """
    problem = "" if scaler is None else _half_unscaled(scaler, parameters, heads)
    if problem and not heads:
        raise RuntimeError(problem)
    if heads:
        heads[0].record.half_unscaled = problem
        refuse_alone(heads)


def _half_unscaled(scaler: Any, parameters: Sequence[Tensor], heads: Sequence[ClassRows]) -> str:
    ids = _unscaled(scaler)
    if ids is None:
        return ""
    missing = []
    held, known = _held(ids)
    for rows in heads:
        optimizer = rows.live_optimizer
        scaled = [p for p in rows.trainable if p.grad is not None and id(p) not in held]
        if scaled and id(optimizer) not in ids and (known or optimizer is not None):
            missing.append(f"scaler.unscale_(the optimizer of this {rows.owner})")
    plain = [p for p in parameters if p.grad is not None]
    left = [p for p in plain if id(p) not in held]
    if left and (known or not ids - {id(rows.live_optimizer) for rows in heads}):
        which = "" if len(left) == len(plain) else f", which holds {len(left)} of the {len(plain)} parameters given"
        missing.append(f"scaler.unscale_(the optimizer of the backbone{which})")
    if not missing:
        return ""
    alone = "; parameters that no optimizer holds must have no gradient, or not be given" if left else ""
    return (
        "scaler.unscale_() was not called for every optimizer, so that some gradients are still multiplied by the loss "
        f"scale: call {' and '.join(missing)} after backward and before gradients are clipped or checked{alone}"
    )


def _unscaled(scaler: Any) -> set[int] | None:
    """Return the ids of optimizers that the scaler has unscaled in this step; None if it scales nothing, or is none of
    torch's, whose state nobody knows."""
    states = getattr(scaler, "_per_optimizer_states", None)
    if not isinstance(scaler, torch.amp.GradScaler) or not scaler.is_enabled() or not isinstance(states, Mapping):
        return None
    if getattr(scaler, "_scale", True) is None:  # no loss was scaled yet
        return None
    try:
        return {key for key, state in states.items() if state["stage"].name == "UNSCALED"}
    except (AttributeError, KeyError, TypeError):
        return None


def _held(ids: set[int]) -> tuple[set[int], bool]:
    """Return (the ids of all parameters of the optimizers with these ids; whether all of them are known)."""
    optimizers = [_optimizer(key, ids) for key in ids]
    known = [optimizer for optimizer in optimizers if optimizer is not None]
    held = {id(p) for optimizer in known for group in optimizer.param_groups for p in group["params"]}
    return held, len(known) == len(optimizers)


def _optimizer(key: int, ids: set[int]) -> Any:
    """Return the optimizer with this id. The objects of the process are searched once for each new one."""
    known = _found.get(key)
    if key in _found and (known is None or known() is not None):
        return None if known is None else known()
    _found.update(dict.fromkeys(ids - _found.keys() | {key}))
    for each in gc.get_objects():
        if id(each) in ids and issubclass(type(each), torch.optim.Optimizer):
            _found[id(each)] = weakref.ref(each)
    found = _found[key]
    return None if found is None else found()


# ---------------------------------------------------------------------------------- an optimizer that steps by itself


def largest_factor(rows: ClassRows) -> Tensor:
    """Return the largest gradient by a loss of the step, float64 `[1]`; 0 without any."""
    grads = [backward.grad.detach().double().reshape(-1) for backward in rows.record.backwards if backward.grad.numel()]
    grads = grads or [torch.zeros(1, dtype=torch.float64, device=rows.device)]
    return torch.cat([grad.to(rows.device) for grad in grads]).abs().amax()[None]


def scaled_and_stepped(rows: ClassRows) -> str:
    """Return what is wrong where a scaler scaled the loss, and the optimizer's step() was called directly; else "".

    For steps that nobody has checked: it waits for the device. The gradient by the loss tells, if it is large, that a
    scale may be in it; then the scalers of the process are searched.
    """
    largest = float(largest_factor(rows))
    if not SUSPICIOUS <= largest < math.inf:
        return ""
    scalers = [(scaler, ids) for scaler in all_scalers() if (ids := _unscaled(scaler)) is not None]
    if any(_unscaled_rows(ids, rows) for _, ids in scalers):
        return ""  # by the scaler that this step goes through; the others are those of other losses
    scales = [scale for scaler, _ in scalers if largest * SUSPICIOUS >= (scale := scaler.get_scale()) >= SUSPICIOUS]
    if not scales:
        return ""
    likely = min(scales, key=lambda scale: abs(math.log(scale / largest)))
    return (
        f"the loss of this {rows.owner} was scaled by a GradScaler ({likely:g}), and step() of its optimizer was "
        "called directly, which would move the rows by the scaled gradient: call scaler.step(optimizer), before "
        "scaler.update()"
    )


def _unscaled_rows(ids: set[int], rows: ClassRows) -> bool:
    """Return whether one of the optimizers with these ids is that of the rows."""
    return id(rows.live_optimizer) in ids or not _held(ids)[0].isdisjoint(map(id, rows.trainable))
