"""One optimizer for frameworks that take only one: it joins the backbone's and those of the heads.

JointOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.2))

param_groups    the groups of all of them, not copies: a schedule changes every learning rate from its own initial value
bad steps       all skip a step with non-finite gradients: if clip_grad_norm_ has not checked them, step() does
                (partial_fc.check_gradients)
state dict      the backbone's alone, which frameworks write from one rank; save the heads' by `save_checkpoint`
hooks           of steps and of the state dict, as of any optimizer
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from partial_fc.checkpoint.named import unwrapped
from partial_fc.nonfinite.check_gradients import check_gradients
from partial_fc.nonfinite.step_check import is_skipped
from partial_fc.optim.protocol import (
    copied_optimizer,
    is_caller,
    refuse_by_name,
    with_loading_hooks,
    with_saving_hooks,
)
from partial_fc.optim.row_optimizer import RowOptimizer


class JointOptimizer(torch.optim.Optimizer):
    """A backbone's optimizer and those of heads as one optimizer.

    Not for use with a GradScaler, which cannot handle plain and sharded gradients together ("got mixed torch.Tensor and
    DTensor").

    Raises TypeError if the first is one of heads itself, or another is none, and ValueError if a `RowOptimizer` is
    given twice or the first has parameters of their heads: rows would move twice in a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *heads: RowOptimizer) -> None:
        # without super().__init__(): groups and state are those of the parts
        _check_parts(optimizer, heads)
        self.optimizer = optimizer
        self.heads = heads
        self._first_groups = len(optimizer.param_groups)
        self.__setstate__({})  # hooks, and a step() that calls them

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        own = self.optimizer.param_groups
        of_heads = [group for head in self.heads for group in head.param_groups]
        # groups that are added later are the last ones, as schedules expect
        return [*own[: self._first_groups], *of_heads, *own[self._first_groups :]]

    @property
    def state(self) -> Any:  # type: ignore[override]
        if is_caller(sys._getframe(1), "_init_optim_state"):
            refuse_by_name("a JointOptimizer, because the rows of its heads are split by class")
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def saved_beside(self) -> tuple[RowOptimizer, ...]:
        """The optimizers that `save_checkpoint` must be given, too."""
        return self.heads

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the backbone's optimizer; ValueError for parameters of a head, which has its own."""
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        refuse_rows("the group", [p[1] if isinstance(p, tuple) else p for p in given], self.heads)
        self.optimizer.add_param_group({**param_group, "params": given})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # computes the gradients, which must be checked before any optimizer steps
            with torch.enable_grad():
                loss = closure()
        records = [head.class_rows.record for head in self.heads]
        if any(record.unchecked or (record.watches and not record.checked) for record in records):
            check_gradients([p for group in self.optimizer.param_groups for p in group["params"]], *self.heads)
        if is_skipped([head.class_rows for head in self.heads]):
            return loss
        self.optimizer.step()
        for head in self.heads:
            head.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in (self.optimizer, *self.heads):
            part.zero_grad(set_to_none)

    @with_saving_hooks
    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    @with_loading_hooks
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a JointOptimizer cannot be pickled or copied by copy.copy, because it holds those of heads: save its "
            "state_dict() and its heads by partial_fc.save_checkpoint, or copy it with its modules by copy.deepcopy"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied_optimizer(self, memo)


def refuse_rows(what: str, parameters: Iterable[torch.Tensor], heads: Iterable[RowOptimizer]) -> None:
    """Raise ValueError if `parameters` has some of the heads: they would move twice in a step."""
    theirs = {id(p) for head in heads for p in (*head.class_rows.everything, *head.class_rows.trainable)}
    if any(id(p) in theirs for p in parameters):
        raise ValueError(
            f"{what} has parameters of a head, which the RowOptimizer of that head steps; leave them out, and "
            "set its options in the RowOptimizer's param_groups[0]"
        )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters in the groups of an optimizer; of a joint one, those of the backbone."""
    inner = optimizer.optimizer if isinstance(optimizer, JointOptimizer) else optimizer
    return [p for group in inner.param_groups for p in group["params"]]


def _check_parts(optimizer: torch.optim.Optimizer, heads: tuple[RowOptimizer, ...]) -> None:
    of_rows = [o for o in (optimizer, unwrapped(optimizer)) if isinstance(o, RowOptimizer | JointOptimizer)]
    if of_rows:
        raise TypeError(
            f"the first optimizer is a {type(of_rows[0]).__name__}; give JointOptimizer the backbone's, and "
            "then a RowOptimizer for each head. Heads alone need none: use the RowOptimizer itself"
        )
    for head in heads:
        if not isinstance(head, RowOptimizer):
            raise TypeError(f"a JointOptimizer takes a RowOptimizer for each head, not {type(head).__name__}")
    if len({id(head) for head in heads}) < len(heads):
        raise ValueError("a RowOptimizer is given twice, and would step twice; give one for each head")
    refuse_rows("the backbone's optimizer", parameters_of(optimizer), heads)
