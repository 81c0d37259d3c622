"""What `torch.optim.Optimizer` promises besides a step, kept or refused by `RowOptimizer` and `JointOptimizer`.

hooks      those of state_dict() and load_state_dict() are called, as torch's own optimizers do
groups     a RowOptimizer has one, the trained parameters of its loss: options may be set in it, another is refused
copies     copy.deepcopy((head, optimizer)) is a pair like the first; pickling is refused
by name    torch.distributed.checkpoint.state_dict finds the state of an optimizer by its model's parameters: refused
trials     an optimizer that the user does not see steps without the hooks of all optimizers (`step_quietly`)
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch

from partial_fc import errors
from partial_fc.distributed.ranks import local_part
from partial_fc.rows import ClassRows

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
STATE_DICTS = "torch.distributed.checkpoint.state_dict"
SAVE = "partial_fc.save_checkpoint(path, head=head, head_optimizer=optimizer) and load_checkpoint"


def step_quietly(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer, whose step() is now without what torch puts around it: the hooks of all optimizers."""
    step = type(optimizer).step
    plain = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    optimizer.step = MethodType(plain, optimizer)  # type: ignore[method-assign]
    return optimizer


# ---------------------------------------------------------------------------------------------------- state dicts


def with_saving_hooks(state_dict: Callable[[Optimizer], dict[str, Any]]) -> Callable[[Optimizer], dict[str, Any]]:
    """Return the method with the hooks of register_state_dict_pre_hook and _post_hook."""

    @functools.wraps(state_dict)
    def hooked(self: Optimizer) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = state_dict(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state)
            state = state if replaced is None else replaced
        return state

    return hooked


def with_loading_hooks(
    load_state_dict: Callable[[Optimizer, dict[str, Any]], None],
) -> Callable[[Optimizer, dict[str, Any]], None]:
    """Return the method with the hooks of register_load_state_dict_pre_hook and _post_hook. It gets a copy."""

    @functools.wraps(load_state_dict)
    def hooked(self: Optimizer, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state)
            state = state if replaced is None else replaced
        load_state_dict(self, state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    return hooked


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of torch that a step over class rows cannot have."""
    if options.get("differentiable"):
        raise ValueError(
            "differentiable=True is not for a RowOptimizer, which moves rows in place, outside autograd; leave it out, "
            "and differentiate through the update of a small dense head by torch.func instead"
        )


def checked_groups(state: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Return a state dict with options of its own and state by place; ValueError unless it has one group of as many
    parameters."""
    groups = state.get("param_groups")
    if not groups or "state" not in state:
        found = ", ".join(map(str, state)) or "nothing"
        raise ValueError(f'it is no state of an optimizer, which has "state" and "param_groups": it has {found}')
    if len(groups) != 1 or len(groups[0]["params"]) != parameters:
        theirs = " and ".join(str(len(group["params"])) for group in groups)
        raise ValueError(
            f"it is the state of another optimizer: it has groups of {theirs} parameters, a RowOptimizer has one group "
            f"of {parameters}; load each state dict into the optimizer of its own head"
        )
    places = {str(name): place for place, name in enumerate(groups[0]["params"])}
    unknown = [name for name in state["state"] if str(name) not in places]
    if unknown:
        raise ValueError(f"it has state of {unknown[0]!r}, which is in none of its groups")
    by_place = {places[str(name)]: value for name, value in state["state"].items()}
    group = {**copy.deepcopy(groups[0]), "params": list(range(parameters))}
    return {**state, "state": by_place, "param_groups": [group]}


class GuardedState(defaultdict[Any, dict[str, Any]]):
    """The state of an optimizer by parameter, which torch's state-dict functions may not initialise.

    They ask whether it is empty before they do anything else: then gradients of zeros and a learning rate of 0 would be
    set, and a step taken.
    """

    def __bool__(self) -> bool:
        if is_caller(sys._getframe(1), "_init_optim_state"):
            refuse_by_name("a RowOptimizer, whose rows are split by class")
        return len(self) > 0


def is_caller(frame: Any, function: str) -> bool:
    """Return whether a frame is of that function of torch.distributed.checkpoint.state_dict."""
    return frame.f_code.co_name == function and frame.f_globals.get("__name__") == STATE_DICTS


def refuse_by_name(what: str) -> NoReturn:
    raise RuntimeError(
        f"{STATE_DICTS} cannot save or load {what}: it looks for the optimizer's parameters among those of the model. "
        f"Use {SAVE}, at any number of ranks, and give its functions the backbone's optimizer alone"
    )


# ---------------------------------------------------------------------------------------------------- an optimizer


class OneGroup(torch.optim.Optimizer):
    """Base of `RowState`: one group, the trained parameters of one loss."""

    class_rows: ClassRows

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, GuardedState):
            value = GuardedState(dict, value)
        if name == "state" and hasattr(self, "state"):
            settle(self.class_rows)  # by the state that is replaced
        if name == "param_groups" and value and hasattr(self, "param_groups"):
            value = [self._own_group(value)]
        super().__setattr__(name, value)

    def _own_group(self, groups: Any) -> dict[str, Any]:
        """Return the group in use with the options of another list of groups; ValueError unless that has one."""
        own = self.param_groups[0]
        groups = list(groups)
        if len(groups) != 1 or not isinstance(groups[0], dict):
            raise ValueError(f"param_groups has {len(groups)} groups; {one_group(self.class_rows.owner)}")
        own.update({k: v for k, v in groups[0].items() if k != "params"})
        return own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group, in words."""
        if self.param_groups:
            raise ValueError(f"a group cannot be added; {one_group(self.class_rows.owner)}")
        super().add_param_group(param_group)

    def keep_zeros(self) -> None:
        """Set the gradients of all rows to zero in place."""
        for parameter in self.class_rows.everything:
            if parameter.grad is not None:
                local_part(parameter.grad).zero_()

    def refuse_step(self) -> NoReturn:
        """Raise because another optimizer took the loss, or because groups or parameters in them were replaced."""
        if self.class_rows.live_optimizer not in (None, self):
            raise errors.second_optimizer()
        raise ValueError(f"param_groups or the parameters in them were replaced; {one_group(self.class_rows.owner)}")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied by copy.copy, because its rows are those of a head: "
            f"save both by {SAVE}, copy both by copy.deepcopy((head, optimizer)), or build one for the other head and "
            "load the state_dict() of this one"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return an optimizer of the copied loss, which `memo` has if both are copied together."""
        copied = copied_optimizer(self, memo)
        copied.class_rows.optimizer = weakref.ref(copied)
        return copied


def settle(rows: ClassRows) -> None:
    """Let rows make the steps that they have missed. Who looks at them calls `catch_up`, missed steps or not."""
    if rows.behind is not None and rows.behind.steps:
        rows.catch_up()


def one_group(owner: str) -> str:
    return (
        f"a RowOptimizer has one group, the rows of one {owner}: set options in param_groups[0], build another "
        "RowOptimizer for another head or center loss, and a torch optimizer for any other parameter"
    )


def copied_optimizer(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Return a deep copy with all attributes but hooks and methods that schedulers and engines have put on it."""
    new = type(optimizer).__new__(type(optimizer))
    memo[id(optimizer)] = new
    inner = vars(optimizer).get("inner")
    if inner is not None:
        vars(new)["inner"] = copied_optimizer(inner, memo)
        step_quietly(new.inner)  # type: ignore[attr-defined]
    left_out = {"step", "zero_grad", "inner"}
    kept = {k: v for k, v in vars(optimizer).items() if k not in left_out and not k.startswith("_optimizer_")}
    vars(new).update({k: copy.deepcopy(v, memo) for k, v in kept.items()})
    new.__setstate__({})
    return new
