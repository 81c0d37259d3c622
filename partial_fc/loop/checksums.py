"""Checksums of the bits of tensors, computed on their device without a wait.

    tensor ── view as int64 words ──> [n] ── sum of 1,024 words ──> [n / 1024] ── mix, weight by position, sum ──> int64

Integer sums wrap around and do not depend on their order, so equal bits have equal checksums on any device, and one
changed bit always changes the checksum.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WORDS = 1024  # words of 8 bytes that are summed before they are mixed
GOLDEN = -7046029254386353131  # odd 64-bit number (the golden ratio)
MIX = -4658895280553007687  # odd 64-bit number (from splitmix64)


def checksums(tensors: list[Tensor]) -> Tensor:
    """Return int64 `[len(tensors)]`: a checksum of the bits of each, on a GPU if any of them is on one.

    Two kernels per tensor, and a few in all. Changes can cancel each other out only within the same 1,024 words. The
    remaining words at the end of a tensor are mixed one by one.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    # where most of them are: a sum that left a GPU for the CPU would be waited for
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    rest = torch.zeros(len(tensors), 8 * WORDS, dtype=torch.uint8, device=device)  # zero-padded ends of the tensors
    parts, counts = [], []
    for row, tensor in zip(rest, tensors, strict=True):
        octets = _bytes_of(tensor)
        count = len(octets) // (8 * WORDS)
        cut = count * 8 * WORDS
        counts.append(count)
        if count:
            parts.append(octets[:cut].view(torch.int64).view(-1, WORDS).sum(1).to(device))
        if cut < len(octets):
            row[: len(octets) - cut] = octets[cut:]
    found = (mixed(rest.view(torch.int64)) * torch.arange(1, 2 * WORDS, 2, device=device)).sum(1)
    if not parts:
        return found
    # the sums of all tensors in one row: weight by position, and take the difference of running sums at the ends
    sums = mixed(torch.cat(parts))
    running = (sums * torch.arange(3, 2 * len(sums) + 3, 2, device=device)).cumsum(0)
    running = torch.cat((running.new_zeros(1), running))
    ends = _ends_of(tuple(counts), device)
    return found + running[ends[1:]] - running[ends[:-1]]


@lru_cache(maxsize=8)
def _ends_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where the words of each tensor end; a watch looks at the same tensors in every step."""
    with torch.inference_mode(False):
        return torch.tensor([0, *counts], device="cpu").cumsum(0).to(device)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8 `[n]`, at an address that can be viewed as words of 8 bytes."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    return flat.view(torch.uint8)


def mixed(values: Tensor) -> Tensor:
    """Apply a one-to-one function of int64 that turns small differences into large ones."""
    values = (values ^ (values >> 32)) * GOLDEN
    values = (values ^ (values >> 29)) * MIX
    return values ^ (values >> 32)
