"""Copies of tensors in host memory, for a save that goes on while the tensors change.

    tensor on a GPU  [n] ── a block at a time ──> one pinned block ──>  copy [n] in ordinary memory
    class rows in files  [n] ────────────────────────────────────────>  copy [n] in another file
    any other tensor [n] ────────────────────────────────────────────>  copy [n] in ordinary memory

A GPU copies to pinned memory several times faster. But what is pinned stays so until the process ends, and torch rounds
it up to a power of two: of a shard of 33 GB that would be 64 GB. So one block is pinned, and used again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.tiers.store import scratch_like

BLOCK_BYTES = 64 << 20
SMALL_BYTES = 1 << 20  # below it a copy without the block is as fast


class Snapshots:
    """Copies by name. Their memory is kept: that of a later copy of the same name, shape and dtype is the same."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._block: Tensor | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU. When it returns, the copy is complete, and later changes do not reach it."""
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            self._copies.pop(name, None)
            copy = scratch_like(tensor) if tensor.ndim else None
            if copy is None:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._copies[name] = copy
        if tensor.device.type != "cuda" or tensor.nbytes < SMALL_BYTES or not tensor.is_contiguous():
            copy.copy_(tensor)
            return copy
        if self._block is None:
            self._block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        parts = (each.view(-1).view(torch.uint8).split(len(self._block)) for each in (tensor, copy))
        for source, target in zip(*parts, strict=True):
            target.copy_(self._block[: len(source)].copy_(source))  # the inner one waits for the GPU
        return copy
