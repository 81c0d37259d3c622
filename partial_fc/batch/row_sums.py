"""Row gradients of several backward passes, added up; gradients of the losses of all ranks' samples."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from partial_fc.distributed.ranks import Ranks, all_gather


def add_rows(
    old_rows: Tensor, old: list[Tensor], rows: Tensor, values: list[Tensor], *, stale: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return (sorted rows of both, sums of the values of both `[S, ...]`). The host waits for how many there are.

    A row may stand in one of them more than once. stale: an optimizer has used the old ones, so that they were to be
    cleared; warns.
    """
    if stale:
        warnings.warn(
            "row gradients of the last step are still there and add up; call zero_grad() of the RowOptimizer",
            stacklevel=3,
        )
    union = torch.unique(torch.cat((old_rows, rows)))
    before, now = torch.searchsorted(union, old_rows), torch.searchsorted(union, rows)
    sums = [add_to_rows(v.new_zeros(len(union), *v.shape[1:]), before, b) for v, b in zip(values, old, strict=True)]
    return union, [add_to_rows(total, now, value) for total, value in zip(sums, values, strict=True)]


def add_to_rows(out: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Add `values [n, ...]` to the given rows of `out`, in place; the same order of sums in every run.

    `index_add_` adds in any order elsewhere than on a CPU; there `index_put_` sorts rows that are repeated.
    """
    if out.device.type == "cpu":
        return out.index_add_(0, rows, values.to(out.dtype))
    return out.index_put_((rows,), values.to(out.dtype), accumulate=True)


def of_all_samples(grad: Tensor, counts: tuple[int, ...], ranks: Ranks) -> Tensor:
    """Return `[N]` of which this rank knows its own samples' `[N_local]`, by one all-gather."""
    padded = grad.new_zeros(max(counts))
    padded[: len(grad)] = grad
    everyone = all_gather(padded, ranks.group)
    return torch.cat([row[:n] for row, n in zip(everyone, counts, strict=True)])
