"""What was done to a loss before a forward that could not take part in it. No usual forward enters this file.

a parametrization     weight_norm, pruning: the parameter is gone, and what stands for it is trained by nobody
functional_call       other weights for one call: row gradients of a sampled loss would go to its own
hooks of a weight     are never called where no gradient of the whole weight exists
torch.func, export    cannot go through collectives
activation checkpointing, a forward in backward: not a step (distributed/forwards.py)
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from partial_fc import errors
from partial_fc.distributed.forwards import problem_of_forward


def check_use(loss: Any) -> None:
    """Raise RuntimeError if the forward could not be a step of this loss."""
    rows = loss.class_rows
    if torch.compiler.is_compiling():
        raise errors.exported()
    problem = problem_of_forward(rows.owner, loss.training)
    if problem:
        raise errors.not_a_step(problem)
    for key, shared in rows.shared.items():
        if attrgetter(key)(loss) is not shared:
            raise errors.replaced_parameter(rows.owner, key)
    early = rows.live_optimizer is not None and rows.live_optimizer.update_in_backward
    without_gradient = loss.training and torch.is_grad_enabled() and (rows.sampled or early)
    for key, parameter in rows.parameters.items():
        now = loss._parameters.get(key)
        if now is not parameter and isinstance(now, nn.Parameter):
            raise errors.replaced_parameter(rows.owner, key)
        if now is None:
            raise RuntimeError(errors.parametrized(key))
        if now is not parameter and (now.shape != parameter.shape or type(now.data) is not type(parameter.data)):
            raise errors.other_rows(rows.owner, key, _described(now), _described(parameter))
        if now is not parameter and without_gradient:
            raise RuntimeError(errors.given_for_a_call(key))
        if without_gradient and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
            raise RuntimeError(errors.hooked(key))


def _described(tensor: torch.Tensor) -> str:
    return f"a {type(tensor.data).__name__} {list(tensor.shape)}"
