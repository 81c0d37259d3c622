"""Class rows between the host and a GPU, for a loss that computes there and keeps its rows in a storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import local_part


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Return them there. To a GPU they go by pinned memory, and the host goes on meanwhile."""
    if device.type != "cuda" or rows.is_cuda or not rows.numel():
        return rows.to(device)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(rows).to(device, non_blocking=True)  # torch keeps the memory until it has arrived


def send_rows(class_rows: Any, index: Tensor, taken: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return by parameter the local rows `index [S]` of a forward on the device of the loss.

    class_rows: the `ClassRows`, in which the numbers of these rows stay, there and here. taken: rows as they are, where
    the memory has older ones.
    """
    class_rows.sent = index.to(class_rows.device), index
    of = class_rows.parameters
    taken = taken or {name: local_part(p.detach()).index_select(0, index) for name, p in of.items()}
    return {name: to_device(rows, class_rows.device) for name, rows in taken.items()}


def brought_home(class_rows: Any, rows: Tensor, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return local rows and their gradients where the rows are."""
    last, class_rows.sent = class_rows.sent, None
    here = last[1] if last is not None and last[0] is rows else rows.to(class_rows.home)
    return here, [each.to(class_rows.home) for each in values]
