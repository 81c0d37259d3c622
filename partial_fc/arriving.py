"""Numbers on their way from a device to the host, which does not wait for them until it needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arriving:
    """numbers: of a device other than a CPU. Its copy begins now."""

    def __init__(self, numbers: Tensor) -> None:
        device, pinned = numbers.device, numbers.device.type == "cuda"
        host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=pinned)
        self.numbers = host.copy_(numbers, non_blocking=True)
        module = torch.get_device_module(device)
        self.event: Any = module.Event()
        self.event.record(module.current_stream(device))  # without it that of the current device, maybe another

    def values(self) -> Tensor:
        """Return them, on the CPU."""
        if self.event is not None:
            if not self.event.query():
                self.event.synchronize()
            self.event = None
        return self.numbers
