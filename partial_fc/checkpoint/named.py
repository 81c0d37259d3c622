"""What is given by name to be saved or loaded, checked before anything is: each must be an object with a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.agreement import on_every_rank


def check_to_save(named: Mapping[str, Any]) -> None:
    """Raise, the same on every rank, TypeError for a value without a state dict, and ValueError for an optimizer whose
    other parts would be left out. Every rank must call it."""
    on_every_rank(lambda: check_to_save_here(named))


def check_to_load(named: Mapping[str, Any]) -> None:
    """Raise TypeError, the same on every rank, for a value that takes no state dict. Every rank must call it."""
    on_every_rank(lambda: _check_methods(named, "load_state_dict", "loaded"))


def check_to_save_here(named: Mapping[str, Any]) -> None:
    """As `check_to_save`, on this rank alone."""
    _check_methods(named, "state_dict", "saved")
    for name, thing in named.items():
        # such as those of a `JointOptimizer`, whose state dict is that of one of its parts
        for part in getattr(thing, "saved_beside", ()):
            if not any(part is other or part is unwrapped(other) for other in named.values()):
                raise ValueError(
                    f"{name} cannot be saved alone: the state dict of a {type(thing).__name__} is that of the "
                    f"backbone's optimizer; name those of its heads, too: {name}={name}, head_optimizer={name}.heads[0]"
                )


def unwrapped(thing: Any) -> Any:
    """Return the optimizer that another one, such as Accelerate's, wraps; else the thing itself."""
    inner = getattr(thing, "optimizer", None) if isinstance(thing, torch.optim.Optimizer) else None
    return thing if inner is None else inner


def _check_methods(named: Mapping[str, Any], method: str, verb: str) -> None:
    for name, thing in named.items():
        if isinstance(thing, type):
            raise TypeError(f"{name} cannot be {verb}: it is the class {thing.__name__}; give an object of it")
        if not callable(getattr(thing, method, None)):
            raise TypeError(f"{name} cannot be {verb}: {_without_state(name, thing, method)}")


def _without_state(name: str, thing: Any, method: str) -> str:
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return (
            f"{name}={thing!r} is a plain value without a state dict; count epochs and steps in a "
            "partial_fc.Progress(epoch=0, step=0) and give that (progress=progress), and keep other values in an "
            "object of your own with state_dict() and load_state_dict(state)"
        )
    if isinstance(thing, Mapping | Tensor | list | tuple | set):
        return (
            f"it is a {type(thing).__name__}, which has no {method}(); give each object by a name of its own, not its "
            "state dict, and keep tensors and values in an object with state_dict() and load_state_dict(state)"
        )
    return f"a {type(thing).__name__} has no {method}(); give an object with state_dict() and load_state_dict(state)"
