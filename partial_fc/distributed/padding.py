"""Rows of ranks with different numbers of them, for collectives that take as many from each."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_rows(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return `[k · longest, D]`: rows `[N, D]`, of which each of k ranks has `counts`, and zeros behind each rank's.

    One copy, however many ranks there are.
    """
    longest = torch.arange(max(counts), device="cpu")
    places = (longest < torch.tensor(counts, device="cpu")[:, None]).flatten().nonzero()[:, 0]
    padded = rows.new_zeros(len(counts) * len(longest), *rows.shape[1:])
    return padded.index_copy_(0, places.to(rows.device, non_blocking=True), rows)
