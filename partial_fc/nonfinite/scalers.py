"""GradScalers that are at work when a step turns out bad."""

from __future__ import annotations

import gc
from typing import Any

import torch

from partial_fc.distributed.dtensors import local_part


def active_scalers(scaler: Any) -> list[Any]:
    """Return the GradScalers between unscale_() and update(): the given one, or all that exist.

    A gradient does not say that it was scaled, and neither a gradient nor an optimizer leads to its scaler. Loops that
    clip or check without `scaler=` still have to skip a step whose scale overflowed, so the objects of the process are
    searched. Only a bad step pays for that.
    """
    if scaler is not None:
        return [scaler] if scaler.is_enabled() else []
    kind = torch.amp.GradScaler
    # type() and not isinstance(), which would ask lazy modules and proxies for their class
    found = [each for each in gc.get_objects() if issubclass(type(each), kind)]
    return [each for each in found if each.is_enabled() and len(each._per_optimizer_states)]


def report_overflow(scaler: Any) -> None:
    """Let all optimizers that were unscaled find an infinity, so that the scaler skips them together."""
    for state in scaler._per_optimizer_states.values():
        for found in state["found_inf_per_device"].values():
            local_part(found).fill_(1.0)
