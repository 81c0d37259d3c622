"""Class rows on their way from the host to a GPU, for a head that computes there and keeps its rows in a storage."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Return them there. To a GPU they go by pinned memory, and the host goes on meanwhile."""
    if device.type != "cuda" or rows.device == device or not rows.numel():
        return rows.to(device)
    pinned = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(rows).to(device, non_blocking=True)  # torch keeps the memory until it has arrived
