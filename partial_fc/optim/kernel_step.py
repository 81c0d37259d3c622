"""The step of rows by a kernel where the class is torch's own SGD, Adam or AdamW: what `RowUpdate.apply` does, in
place.

The first step is the class's own: it makes the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from partial_fc.batch.row_sums import Pads
from partial_fc.distributed.ranks import local_part
from partial_fc.kernels.choice import HALF_OR_SINGLE, WIDEST
from partial_fc.kernels.small_problems import StepCase
from partial_fc.kernels.trial import step_tried
from partial_fc.kernels.update import Memory, Numbers, Through, step_rows
from partial_fc.optim.row_state import COUNT
from partial_fc.sampling import mix

STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}


class Update(Protocol):
    """One step of one parameter, a `RowUpdate`."""

    optimizer: Any
    weight: Tensor
    state: dict[str, Any]
    before: dict[str, Any]
    wide: Any

    @property
    def taken(self) -> Mapping[str, Tensor]: ...


class KernelStep:
    """One step of one parameter; call it for each block of rows. It returns False where the class itself must step."""

    def __init__(self, update: Update) -> None:
        rows, options = update.optimizer.class_rows, update.optimizer.inner.param_groups[0]
        self.update = update
        self.keys = STATE.get(type(update.optimizer.inner), ())
        if self.keys == ("momentum_buffer",) and not options["momentum"]:
            self.keys = ()
        self.numbers = None
        if serves(update, self.keys, options):
            self.numbers = numbers_of(options, update.before.get("step"), type(update.optimizer.inner))
        self.rounding = None
        if update.wide is not None and update.wide.stochastic:
            self.rounding = rows.shards.lo, mix(rows.seed, update.state[COUNT])

    def __call__(
        self, index: Tensor | None, a: int, b: int, grad: Tensor, through: Callable[[], Through] | None = None
    ) -> bool:
        """As `RowUpdate.apply`. through: makes what takes gradients by directions to those by rows."""
        update, numbers = self.update, self.numbers
        weight, wide = update.weight, update.wide
        master = wide is not None and wide.source is not weight
        if numbers is None or (through is not None and master):  # directions are those of the rows in half precision
            return False
        width = math.prod(weight.shape[1:])
        taken: tuple[Tensor, ...] = ()
        if update.taken:
            taken = tuple(update.taken[key][a:b].view(-1, width) for key in ("", *self.keys))
        memory = Memory(
            rows=(wide.source if wide is not None else weight).view(-1, width),
            state=tuple(local_part(update.state[key]).view(-1, width) for key in self.keys),
            taken=taken,
            low=weight.view(-1, width) if master else None,
        )
        if index is not None:
            index = without_pads(index, update.optimizer.class_rows.pads, a, b)
        grad = grad.reshape(-1, width)
        how = {"gather": index is not None, "stochastic": self.rounding is not None, "through": through is not None}
        if not step_tried(lambda: StepCase.of(grad, memory, numbers, **how), weight.device):
            return False
        if not step_rows(grad, memory, numbers, index, a, self.rounding, through and through()):
            return False
        if numbers.adam:
            update.state["step"] = update.before["step"] + 1
        return True


def serves(update: Update, keys: tuple[str, ...], options: Mapping[str, Any]) -> bool:
    """Return whether the kernel does what the class would do, for every block of this step."""
    optimizer, weight = update.optimizer, update.weight
    kernels, lr = optimizer.class_rows.kernels, options.get("lr")
    if kernels is None or not kernels.rows or type(optimizer.inner) not in STATE:
        return False
    known = all(key in update.before for key in keys) and (not update.taken or all(key in update.taken for key in keys))
    on_card = isinstance(lr, Tensor) and lr.device.type != "cpu"  # the host would wait for it
    other = options.get("amsgrad") or options.get("capturable") or options.get("differentiable")
    other = other or any(isinstance(beta, Tensor) for beta in options.get("betas", ()))
    tensors = [weight, *(local_part(update.state[key]) for key in keys if key in update.state)]
    plain = all(t.is_contiguous() and t.dtype in HALF_OR_SINGLE for t in tensors)
    return known and plain and not on_card and not other and weight.ndim > 1 and math.prod(weight.shape[1:]) <= WIDEST


def numbers_of(options: Mapping[str, Any], step: Any, cls: type[torch.optim.Optimizer]) -> Numbers:
    """Return the numbers of a step. step: of Adam, how many there were."""
    lr, decay = float(options["lr"]), float(options["weight_decay"])
    maximize = bool(options.get("maximize"))
    if cls is torch.optim.SGD:
        b = 1.0 - float(options["dampening"])
        return Numbers(lr, float(options["momentum"]), b, decay, nesterov=options["nesterov"], maximize=maximize)
    b1, b2 = options["betas"]
    decoupled = bool(options.get("decoupled_weight_decay", cls is torch.optim.AdamW))
    own: dict[str, Any] = {"adam": True, "eps": float(options["eps"]), "decoupled": decoupled, "maximize": maximize}
    if isinstance(step, Tensor) and step.device.type != "cpu":
        on_card = step.double() + 1
        by_rate, by_root = lr / (1 - b1**on_card), (1 - b2**on_card).rsqrt()
        return Numbers(lr, 1 - b1, b2, decay, factors=torch.stack((by_rate, by_root)).float(), **own)
    count = float(step) + 1
    return Numbers(lr, 1 - b1, b2, decay, by_rate=lr / (1 - b1**count), by_root=(1 - b2**count) ** -0.5, **own)


def without_pads(index: Tensor, pads: Pads | None, a: int, b: int) -> Tensor:
    """Return the index `[b − a]` of rows a to b of a step with −1 for the pads among them: rows that it has twice."""
    return index if pads is None else torch.where(pads.real()[a:b], index, -1)
