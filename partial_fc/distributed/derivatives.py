"""First derivatives of losses that have no second one, and which of them a backward is asked for.

    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative("PartialFC", Function.backward, ctx, grad, ctx.embeddings)
        ...

`torch.autograd.function.once_differentiable` says nothing where the incoming gradient needs no gradient, as that of
`loss.backward(create_graph=True)`: a penalty on the gradient then trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.forwards import works


def first_derivative(
    name: str, backward: Callable[..., Any], ctx: Any, grad: Tensor, *sources: Tensor | None
) -> tuple[Any, ...]:
    """Return what `backward(ctx, grad)` returns, so that deriving it once more raises RuntimeError.

    name: whose it is. sources: inputs of the forward, which a second derivative would be by.
    """
    with torch.no_grad():
        results = backward(ctx, grad)
    results = results if isinstance(results, tuple) else (results,)
    given = [r for r in results if r is not None]
    # that require grad, because a loss without parameters has no source that does
    marked = iter(_NoSecond.apply(name, len(given), *(r.detach().requires_grad_() for r in given), *sources))
    return tuple(None if r is None else next(marked) for r in results)


class _NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.whose = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count] if tensor is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.whose} has no second derivative: its backward, which is split over the ranks, cannot be "
            "differentiated. Put a penalty on gradients of the backbone's own output; for second derivatives of the "
            "loss itself use a dense head (torch.nn.functional.linear and cross_entropy)"
        )


@lru_cache
def executes() -> Callable[[Any], bool]:
    """Return a function that tells, in backward, whether the node of a leaf is executed: whether the leaf's gradient is
    wanted. It is not by `torch.autograd.grad(loss, another)`, and then nobody has asked for gradients of class rows.

    A private function of torch; where it is missing or does something else, every gradient is wanted.
    """
    function = getattr(torch._C, "_will_engine_execute_node", None)
    return function if function is not None and works(_tells, function) else lambda node: True


def _tells(function: Callable[[Any], bool]) -> bool:
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            seen.append(function(ctx.next_functions[-1][0]))
            return grad, grad

    a, b = (torch.zeros((), device="cpu", requires_grad=True) for _ in range(2))
    total = Probe.apply(a * 1, b)
    torch.autograd.grad(total, a, retain_graph=True)
    torch.autograd.backward(total)
    return seen == [False, True]
