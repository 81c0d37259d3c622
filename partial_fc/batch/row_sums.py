"""Row gradients of several backward passes, added up; gradients of the losses of all ranks' samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.distributed.ranks import Ranks, all_gather

Gradients = list[Tensor | None]  # [S, ...] of rows, for each parameter


@dataclass(frozen=True)
class Pads:
    """Rows that stand among the S rows of a gradient once more, with a gradient of 0, where the host does not wait for
    how many rows there are."""

    first: int  # none stands before
    are: Tensor  # [S − first] whether each of the others is one
    of: Tensor | None = None  # [S] where the row stands that each is; None: all are the row before `first`

    @classmethod
    def of_sorted(cls, rows: Tensor) -> Pads:
        """Return those of sorted `rows [S]`, of which the first of each has the gradient."""
        first = torch.searchsorted(rows, rows)
        return cls(0, first != torch.arange(len(rows), device=rows.device), first)

    def real(self) -> Tensor:
        """Return `[S]`, whether a row is none."""
        return ~torch.nn.functional.pad(self.are, (self.first, 0))

    def set(self, grad: Tensor, *, as_rows: bool) -> None:
        """Give each the gradient of the row that it is, or 0 again."""
        are, rest = self.are.view(-1, *[1] * (grad.ndim - 1)), grad[self.first :]
        if not as_rows:
            rest.masked_fill_(are, 0)
        elif self.of is None:
            grad[self.first :] = torch.where(are, grad[self.first - 1], rest)
        else:
            grad.copy_(grad.index_select(0, self.of))


def add_rows(
    old_rows: Tensor, old: Gradients, rows: Tensor, values: Gradients, *, stale: bool, pads: Pads | None
) -> tuple[Tensor, Gradients, Pads | None]:
    """Return (rows of both, sums of the values of both `[S, ...]`, pads among them): sorted and without pads on a CPU.

    Where one has no values of a parameter, they are 0. A row may stand in one more than once. stale: an optimizer has
    used the old ones, so that they were to be cleared; warns. pads: of the old ones.
    """
    if stale:
        warnings.warn(
            "row gradients of the last step are still there and add up; call zero_grad() of the RowOptimizer",
            stacklevel=3,
        )
        for value in old if pads is not None else ():
            if value is not None:
                pads.set(value, as_rows=False)  # type: ignore[union-attr]
    both = torch.cat((old_rows, rows))
    joined = [_joined(b, len(old_rows), v, len(rows)) for b, v in zip(old, values, strict=True)]
    if both.device.type == "cpu":
        union, place = torch.unique(both, return_inverse=True)
        sums = [v if v is None else add_to_rows(v.new_zeros(len(union), *v.shape[1:]), place, v) for v in joined]
        return union, sums, None
    ordered, order = both.sort(stable=True)
    at = torch.arange(len(both), device=both.device)
    begins = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    of = torch.empty_like(order).scatter_(0, order, order.index_select(0, at.where(begins, 0).cummax(0).values))
    sums = [v if v is None else add_to_rows(torch.zeros_like(v), of, v) for v in joined]
    return both, sums, Pads(0, of != at, of)


def _joined(before: Tensor | None, rows_before: int, now: Tensor | None, rows: int) -> Tensor | None:
    """Return the values of both, one behind the other; 0 where there are none."""
    some = before if now is None else now
    if some is None:
        return None
    first, last = (
        some.new_zeros(count, *some.shape[1:]) if each is None else each
        for each, count in ((before, rows_before), (now, rows))
    )
    return torch.cat((first, last))


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
