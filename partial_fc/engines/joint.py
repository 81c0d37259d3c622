"""One optimizer for frameworks that take only one: it joins the backbone's and those of the heads.

JointOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.2))

param_groups    the groups of all of them, not copies: a schedule changes every learning rate from its own initial value
bad steps       all skip a step with non-finite gradients: if clip_grad_norm_ has not checked them, step() does
                (partial_fc.check_gradients)
state dict      the backbone's alone, which frameworks write from one rank; save the heads' by `save_checkpoint`
"""

from __future__ import annotations

from typing import Any

import torch

from partial_fc.nonfinite.check_gradients import check_gradients
from partial_fc.optim.row_optimizer import RowOptimizer


class JointOptimizer(torch.optim.Optimizer):
    """A backbone's optimizer and those of heads as one optimizer.

    Not for use with a GradScaler, which cannot handle plain and sharded gradients together ("got mixed torch.Tensor and
    DTensor").
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *heads: RowOptimizer) -> None:
        # without super().__init__(): groups and state are those of the parts
        self.optimizer = optimizer
        self.heads = heads

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in (self.optimizer, *self.heads) for group in part.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # computes the gradients, which must be checked before any optimizer steps
            with torch.enable_grad():
                loss = closure()
        records = [head.class_rows.record for head in self.heads]
        if any(record.unchecked or (record.watches and not record.checked) for record in records):
            check_gradients([p for group in self.optimizer.param_groups for p in group["params"]], *self.heads)
        if any(record.skipped for record in records):
            return loss
        self.optimizer.step()
        for head in self.heads:
            head.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in (self.optimizer, *self.heads):
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
