"""Blocks that are computed again in the backward instead of being kept (gradient checkpointing, arXiv:1604.06174).

forward    x -> block -> block -> ...    each block's input is kept, what is inside of it is not
backward   each block again from its input, in the mode and under the autocast of the forward; then its gradients

Batch normalisation adds the statistics of a batch to its running ones in every forward in training, so a block that is
computed twice would count its batch twice. `keep_statistics` makes the second time leave them alone.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_KEPT = "_statistics_outside_of_recomputation"


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: bool, random: bool = False) -> torch.Tensor:
    """`x` through `blocks`, one after another; with `recompute` they are computed again in the backward.

    `random`: the blocks draw random numbers, and must draw the same ones again.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=random)
        else:
            x = block(x)
    return x


def keep_statistics(module: nn.Module) -> None:
    """Let batch normalisation within `module` leave its running statistics alone while a backward computes it again."""
    for each in module.modules():
        if isinstance(each, _BatchNorm):
            each.register_forward_pre_hook(_before)
            each.register_forward_hook(
                _after, always_call=True
            )  # a recomputation ends by an exception as soon as it can


def _before(norm: nn.Module, inputs: Any) -> None:
    # torch.utils.checkpoint asks the same question to tell one backward from another; -1 is outside of any
    if norm.training and torch._C._current_graph_task_id() != -1:
        norm.__dict__[_KEPT] = dict(norm._buffers)
        # copies: the kernel updates what it is given, and the second time must save as many tensors as the first
        norm._buffers.update({name: None if value is None else value.clone() for name, value in norm._buffers.items()})


def _after(norm: nn.Module, inputs: Any, output: Any) -> None:
    if _KEPT in norm.__dict__:
        norm._buffers.update(norm.__dict__.pop(_KEPT))
