"""Large buffers that are used again in the next step, once nobody holds them any more.

The first write to fresh memory of the CPU costs far more than the write itself: the kernel maps and clears it page by page (44 ms
against 3 ms for 100 MB on the machine where the step's costs were measured; `benchmarks/head.py`). Memory of GPUs comes from torch's
caching allocator, which does the same as this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLACK = 1.1  # the number of selected rows differs a little from step to step


def _holders(tensor: Tensor) -> int:
    """How many tensors, views and saved variables hold this storage, this one included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1  # less the storage object made here


class Workspace:
    """Buffers by name; each is given out again when the one given out before is held by nobody else.

    Names that start with "selected" are of a size that changes: they get some slack.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor, of remembered memory if it is free and large enough."""
        size = math.prod(shape)
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.dtype != dtype
            or not size <= buffer.numel() <= SLACK**2 * size
            or _holders(buffer) > 1
        ):
            # drop the old one first: two at a time would be a higher peak than without this class
            self._buffers.pop(name, None)
            buffer = None
            buffer = torch.empty(int(size * (SLACK if name.startswith("selected") else 1)), dtype=dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def __deepcopy__(self, memo: dict[int, object]) -> Workspace:
        return Workspace()
