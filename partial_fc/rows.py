"""Gradients of a few rows: what a sampled head hands to its optimizer instead of a dense `[C_local, ...]` gradient.

    backward 1:  rows [S1] sorted, values [S1, ...]      ─┐
    backward 2:  rows [S2] sorted, values [S2, ...]      ─┴─>  rows of both, values summed where both have one

They are shown to the outside (optimizers' `param_groups`, `GradScaler`, clipping) as *carriers*: one parameter for each sharded one,
without storage of its own, whose `.grad` is the values. A DTensor's `.grad` cannot be sparse, so the sharded parameter itself has none.
The carriers are DTensors as their parameters are; `GradScaler.unscale_` therefore agrees on found_inf over the ranks.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partial_fc.shards import ClassShards, local_part

if TYPE_CHECKING:
    from partial_fc.optim.row_optimizer import RowOptimizer


class ShardedRows:
    """The sharded parameters of one head, and the gradient of their rows between backward and `zero_grad`.

    parameters: name -> parameter `[C, ...]`. shared: parameters of the same head that all ranks hold alike, and whose gradients are the
    same on all. trainable: what optimizers hold: the parameters themselves when all rows have a gradient (`sampled=False`), else the
    carriers, then the shared ones; one list object, changed in place. optimizer: a weak reference to the `RowOptimizer`, if any.
    """

    def __init__(self, shards: ClassShards, sampled: bool) -> None:
        self.shards, self.sampled = shards, sampled
        self.parameters: dict[str, nn.Parameter] = {}
        self.shared: dict[str, nn.Parameter] = {}
        self.trainable: list[nn.Parameter] = []
        self.rows: Tensor | None = None
        self.optimizer: weakref.ref[RowOptimizer] | None = None
        self.stepped = False  # an optimizer has used these gradients
        self.lost = 0  # how often gradients were cleared that no optimizer could have used

    @property
    def live_optimizer(self) -> RowOptimizer | None:
        """The `RowOptimizer` that takes these gradients, if it was built and still exists."""
        return None if self.optimizer is None else self.optimizer()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "optimizer": None}  # a copy's optimizer is another one

    @property
    def everything(self) -> list[nn.Parameter]:
        """All parameters, the sharded ones first."""
        return [*self.parameters.values(), *self.shared.values()]

    def hold(self, parameters: dict[str, nn.Parameter], shared: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Take these parameters (again): after construction, a move to another device, a change of dtype."""
        self.parameters, self.shared, self.shards = parameters, shared, shards
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        self.lost += self.rows is not None and self.live_optimizer is None
        self.rows, self.stepped = None, False
        for parameter in self.everything:
            parameter.grad = None
        if self.sampled:
            nothing = [local_part(p.detach())[:0] for p in self.parameters.values()]
            self.trainable[:] = [*(self._carrier(values, None) for values in nothing), *self.shared.values()]
        else:
            self.trainable[:] = self.everything

    def accumulate(self, rows: Tensor, values: list[Tensor]) -> None:
        """Add the gradients `values[k] [S, ...]` of the sorted local rows `[S]`."""
        before = self.values()
        if self.rows is not None and len(before) == len(values):
            if self.stepped:
                warnings.warn(
                    "row gradients of the last step are still there and add up; call zero_grad() of the RowOptimizer",
                    stacklevel=2,
                )
                self.stepped = False
            union = torch.unique(torch.cat((self.rows, rows)))
            old, new = torch.searchsorted(union, self.rows), torch.searchsorted(union, rows)
            sums = [v.new_zeros(len(union), *v.shape[1:]) for v in values]
            for total, earlier, now in zip(sums, before, values, strict=True):
                total[old] = earlier
                total.index_add_(0, new, now)
            rows, values = union, sums
        self.rows = rows
        self.trainable[:] = [*(self._carrier(v, v) for v in values), *self.shared.values()]

    def values(self) -> list[Tensor]:
        """The gradients `[S, ...]` of `rows`, one tensor a parameter; what `GradScaler` or clipping did to them included."""
        return [local_part(carrier.grad) for carrier in self.carriers if carrier.grad is not None]

    @property
    def carriers(self) -> list[nn.Parameter]:
        """Of `trainable`, what stands for the sharded parameters."""
        return self.trainable[: len(self.parameters)]

    def _carrier(self, like: Tensor, grad: Tensor | None) -> nn.Parameter:
        size = len(like) * self.shards.ranks.world
        placeholder = like.new_empty(1).expand(like.shape)
        carrier = nn.Parameter(self.shards.wrap(placeholder, rows=size))
        if grad is not None:
            carrier.grad = self.shards.wrap(grad, rows=size)
        return carrier
