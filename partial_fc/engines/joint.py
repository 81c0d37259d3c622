"""One optimizer where a framework takes one: a backbone's and those of the heads, in one step and under one schedule.

JointOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.2))
param_groups     of all, the very ones: a schedule moves every learning rate, each from its own start
a bad step       neither moves: what clip_grad_norm_ has not judged is judged here, before either (partial_fc.check_gradients)
state dict       the backbone's alone, which frameworks write from one rank; the heads' belong into `save_checkpoint`
"""

from __future__ import annotations

from typing import Any

import torch

from partial_fc.nonfinite.check_gradients import check_gradients
from partial_fc.optim.row_optimizer import RowOptimizer


class JointOptimizer(torch.optim.Optimizer):
    """A backbone's optimizer and those of heads as one.

    Not for a GradScaler, which would take plain and split gradients together and raises ("got mixed torch.Tensor and DTensor").
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *heads: RowOptimizer) -> None:
        # the base's own groups and state are not wanted: they are those of the parts
        self.optimizer, self.heads = optimizer, heads

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
        if closure is not None:  # it makes the gradients, which are judged before any optimizer steps
            with torch.enable_grad():
                loss = closure()
        records = [head.class_rows.record for head in self.heads]
        if not all(record.checked for record in records if record.watches):
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
