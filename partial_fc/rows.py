"""`ClassRows`: the sharded parameters of one loss, and their gradients between backward and the optimizer.

    backward 1:  local rows [S1] sorted, values [S1, ...]   ─┐
    backward 2:  local rows [S2] sorted, values [S2, ...]   ─┴─>  rows of both, values summed where both have one

Optimizers, clipping, checks for NaN, queries, weight files, diagnosis and engines take `head.class_rows`.

Under sampling only some rows have a gradient. Optimizers, `GradScaler` and clipping see it through *carriers*: one
parameter for each sharded one, without storage, whose `.grad` is the values of the selected rows. (The `.grad` of a
DTensor cannot be sparse, so the sharded parameter itself has none.) Carriers are DTensors too, which makes
`GradScaler.unscale_` agree on found_inf across ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc import errors
from partial_fc.batch.row_sums import Pads, add_rows
from partial_fc.distributed.ranks import local_part, wrap_rows
from partial_fc.distributed.shards import ClassShards
from partial_fc.step_record import StepRecord
from partial_fc.tiers.travel import brought_home, send_rows

UpdateRows = Callable[..., bool]  # moves local rows a to b by their gradients, one tensor a parameter (in_backward.py)


class HasClassRows(Protocol):
    """A `PartialFC` or `CenterLoss`."""

    @property
    def class_rows(self) -> ClassRows: ...


class ClassRows:
    """The class rows of one loss on this rank.

    owner: class name of the loss, for messages. seed: of the loss. sampled: only selected rows get a gradient.
    record: the training step in progress. parameters: sharded parameters `[C, ...]` by name. shared: parameters that
    are equal on all ranks, as are their gradients. trainable: what an optimizer holds: the parameters themselves where
    all rows get a gradient, else the carriers; then the shared ones. It stays one list object, changed in place.
    grad_rows: sorted local rows `[S]` that have a gradient, or None.
    """

    def __init__(self, owner: str, shards: ClassShards, *, sampled: bool, seed: int, record: StepRecord) -> None:
        self.owner = owner
        self.shards = shards
        self.sampled = sampled
        self.seed = seed
        self.record = record
        self.store: Any = None  # the RowStore (tiers/store.py) that has the memory of the rows, or None
        self.parameters: dict[str, nn.Parameter] = {}
        self.shared: dict[str, nn.Parameter] = {}
        self.trainable: list[nn.Parameter] = []
        self.grad_rows: Tensor | None = None
        self.pads: Pads | None = None  # of grad_rows, which are sorted without
        self.optimizer: weakref.ref[Any] | None = None  # the RowOptimizer
        self.storages: dict[str, torch.UntypedStorage] = {}  # of DTensors
        self.updates = 0  # how often an update was asked for, in skipped steps too
        self.used = False  # an optimizer has used these gradients
        self.sent: tuple[Tensor, Tensor] | None = None  # rows of the last forward, on the device and on the host
        self.behind: Any = None  # steps that rows have missed (optim/skipped_rows.py), or None
        self.kernels: Any = None  # that served the last forward (kernels/choice.py), or None
        self.as_they_are = False  # a checkpoint is saved or loaded that has missed steps: nobody is to make them for it
        self.writes = 0  # how often rows were loaded or drawn anew
        self.changes = 0  # how often classes were added, removed or given other numbers
        self.lost = 0  # how often gradients were cleared that no optimizer could have used

    def __getstate__(self) -> dict[str, Any]:
        own = dict.fromkeys(("optimizer", "grad_rows", "pads", "behind", "store", "sent"))  # a copy gets its own
        return {**vars(self), **own, "storages": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.clear()

    @property
    def live_optimizer(self) -> Any:
        """The `RowOptimizer` that takes these gradients, or None."""
        return None if self.optimizer is None else self.optimizer()

    @property
    def everything(self) -> list[nn.Parameter]:
        """All parameters, the sharded ones first."""
        return [*self.parameters.values(), *self.shared.values()]

    @property
    def main(self) -> nn.Parameter:
        """The parameter `[C, D]` (or `[C, K, D]`) of class weights or centers."""
        return next(iter(self.parameters.values()))

    @property
    def device(self) -> torch.device:
        """Where the loss computes, and where its collectives take place."""
        return self.home if self.store is None else self.store.device

    @property
    def home(self) -> torch.device:
        """Where the rows are, their gradients and their state: `device`, or the host for a GPU (`storage`)."""
        return self.main.device

    @property
    def travels(self) -> bool:
        """Whether rows are brought from the host to the device of the loss, and their gradients back."""
        return self.device.type != self.home.type

    def hold(self, parameters: dict[str, nn.Parameter], shared: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Take these parameters: after construction, a move to another device, a change of dtype or of the classes."""
        self.parameters = parameters
        self.shared = shared
        self.shards = shards
        self.kernels = None
        self.storages = {name: p.untyped_storage() for name, p in parameters.items() if isinstance(p, DTensor)}
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        self.lost += self.grad_rows is not None and self.live_optimizer is None
        self.grad_rows = self.pads = None
        self.used = False
        for parameter in self.everything:
            parameter.grad = None
        if self.sampled:
            self.trainable[:] = [*(self._carrier(p, None) for p in self.parameters.values()), *self.shared.values()]
        else:
            self.trainable[:] = self.everything

    def catch_up(self, index: Tensor | None = None) -> None:
        """Bring the local rows `index`, or all, up to date: those that missed steps of a dense optimizer.

        Whoever reads or writes rows outside a step calls it first, for all.
        """
        if self.as_they_are:
            return
        if self.store is not None:
            self.store.ready(index)
        if self.behind is not None:
            self.behind.catch_up(index)

    def up_to_date(self, index: Tensor | None) -> dict[str, Tensor] | None:
        """Return by parameter the rows `index [S]` of a forward, up to date; None where the shard has them so."""
        if index is None:
            self.catch_up()
        elif self.store is not None:
            self.store.ready(index)
        taken = None if self.behind is None or index is None else self.behind.up_to_date(index)
        return send_rows(self, index, taken) if self.travels and index is not None else taken

    def accumulate(self, rows: Tensor, values: list[Tensor], pads: Pads | None = None, changes: int = -1) -> None:
        """Add the gradients `values[k] [S, ...]` of the local rows `[S]`, sorted but for pads. changes: as in the
        forward, if it looked."""
        if changes not in (-1, self.changes):
            raise errors.changed_in_between(self.owner)
        if self.travels:
            rows, values = brought_home(self, rows, values)
        before = [None if c.grad is None else local_part(c.grad) for c in self.carriers]
        now = [v if p.requires_grad else None for v, p in zip(values, self.parameters.values(), strict=True)]
        if self.grad_rows is not None and any(each is not None for each in before):
            rows, now, pads = add_rows(self.grad_rows, before, rows, now, stale=self.used, pads=self.pads)
            self.used = False
        self.grad_rows, self.pads = rows, pads
        carriers = [self._carrier(p, grad) for p, grad in zip(self.parameters.values(), now, strict=True)]
        self.trainable[:] = [*carriers, *self.shared.values()]

    def gradients(self) -> list[Tensor]:
        """Return the gradients `[S, ...]` of `grad_rows`, one tensor a parameter, as clipping and scalers left them."""
        return [local_part(carrier.grad) for carrier in self.carriers if carrier.grad is not None]

    @property
    def carriers(self) -> list[nn.Parameter]:
        """The part of `trainable` that stands for the sharded parameters."""
        return self.trainable[: len(self.parameters)]

    def _carrier(self, parameter: nn.Parameter, grad: Tensor | None) -> nn.Parameter:
        like = local_part(parameter.detach())[:0] if grad is None else grad
        size = len(like) * self.shards.ranks.world  # S differs by rank: only the local part of a carrier is ever used
        carrier = nn.Parameter(wrap_rows(like.new_empty(1).expand(like.shape), self.shards.mesh, size))
        if grad is not None:
            carrier.grad = wrap_rows(grad, self.shards.mesh, size)
        return carrier

    def check_group(self) -> None:
        """Raise RuntimeError if the loss was built before its process group, or `.data` of a DTensor was assigned."""
        if self.shards.ranks.group is None and dist.is_initialized():
            raise errors.built_before_group()
        for name, storage in self.storages.items():  # the local rows stay what they were
            if self.parameters[name].untyped_storage()._cdata != storage._cdata:
                raise errors.assigned_data(self.owner, name)
