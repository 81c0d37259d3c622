"""What numbers depend on and torch does not promise: each is tried here when it is first used, and not used where it
does not do what it should. docs/versions.md lists all private names of other packages.

holders of a storage        memory is used again once nothing holds it                else it is never used again
use count of a parameter    classes change while no graph holds the weight            else they do not change
norms of many tensors       one launch for the gradients of a backbone                else one each
id of a backward pass       statistics stand still while blocks are computed again    else blocks are not
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn


@lru_cache
def tells_holders(held: Callable[[Tensor], bool]) -> bool:
    """Return whether `held(buffer)` is true as long as a view of the buffer lives, in Python or inside torch alone."""
    with torch.inference_mode(False):
        buffer, other = (torch.empty(size, dtype=torch.float32, device="cpu") for size in (8, 4))
        found = [held(buffer)]
        view = buffer[:4].view(2, 2)
        found.append(held(buffer))
        other.grad = view.view(4)  # as backward leaves a gradient
        del view
        found.append(held(buffer))
        other.grad = None
        found.append(held(buffer))
    return found == [False, True, True, False]


@lru_cache
def tells_graphs(held: Callable[[Tensor], bool]) -> bool:
    """Return whether `held(parameter)` is true as long as an autograd graph has saved the parameter."""
    with torch.inference_mode(False), torch.enable_grad():
        parameter = nn.Parameter(torch.ones(4, dtype=torch.float32, device="cpu"))
        found = [held(parameter)]
        loss = (parameter * parameter).sum()
        found.append(held(parameter))
        loss.backward()
        found.append(held(parameter))
        loss = (parameter * parameter).sum()
        del loss
        found.append(held(parameter))
    return found == [False, True, False, False]


@lru_cache
def tells_backward(within: Callable[[], bool]) -> bool:
    """Return whether `within()` is true in a backward pass and not outside. Call it outside of one."""
    found = [within()]
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True)
        loss = x.sum()
        loss.register_hook(lambda grad: found.append(within()))
        loss.backward()
    return [*found, within()] == [False, True, False]


@lru_cache
def foreach_norm() -> Callable[..., Sequence[Tensor]]:
    """Return a function of (tensors of one dtype, order, dtype) that returns the norm of each, 0-d."""
    function = getattr(torch, "_foreach_norm", None)
    with torch.inference_mode(False), torch.no_grad():
        tensors = [torch.tensor(values, dtype=torch.bfloat16, device="cpu") for values in ([3.0, 4.0], [256.0, 1.0])]
        try:
            found = [norm.item() for norm in function(tensors, 2.0, dtype=torch.float32)]  # type: ignore[misc]
        except (RuntimeError, TypeError):
            found = []
    if function is not None and found == [5.0, torch.tensor(65537.0, device="cpu").sqrt().item()]:
        return function  # type: ignore[no-any-return]
    return lambda tensors, order, dtype=None: [torch.linalg.vector_norm(t, order, dtype=dtype) for t in tensors]


def give_tensor(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Give a parameter the tensor of another one. It stays the same object, with its attributes and hooks."""
    torch.utils.swap_tensors(parameter, other)
    kept = {name: value for name, value in vars(other).items() if name not in vars(parameter)}
    vars(parameter).update(kept)  # what is the tensor's own has been swapped
    # the lists of hooks are those of the object, but what calls them is the tensor's: setting them tells it
    parameter._backward_hooks = parameter._backward_hooks  # type: ignore[assignment]
    later = parameter._post_accumulate_grad_hooks
    if later is not None:
        parameter._post_accumulate_grad_hooks = later


def check_can_be_given(name: str, parameter: nn.Parameter) -> None:
    """Raise RuntimeError where `give_tensor` could not: torch swaps no tensor that has weak references."""
    if weakref.getweakrefs(parameter):
        raise RuntimeError(
            f"there are weak references to {name} (weakref.ref, a WeakTensorKeyDictionary, a compiled function), with "
            "which torch cannot give it other rows: drop them first"
        )
