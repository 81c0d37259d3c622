"""Gradient checkpointing (arXiv:1604.06174): blocks are recomputed in the backward pass instead of stored.

forward    x -> block -> block -> ...    the input of each block is stored, its intermediate results are not
backward   each block is recomputed from its input, in the mode and with the autocast of the forward; then its gradients

In training, every forward of a batch normalisation updates its running statistics, so a recomputed block would count
its batch twice. `keep_statistics` leaves the running statistics unchanged during recomputation.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from partial_fc.distributed.inside_torch import tells_backward

_SAVED = "_buffers_before_recomputation"  # attribute of a normalisation while it is recomputed


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: bool, random: bool = False) -> torch.Tensor:
    """Apply `blocks` to `x` in order; with `recompute`, they are recomputed in the backward pass.

    `random`: the blocks draw random numbers; the recomputation then draws the same ones.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=random)
        else:
            x = block(x)
    return x


def keep_statistics(module: nn.Module) -> None:
    """Leave the running statistics of batch normalisations in `module` unchanged when they are recomputed.

    Raises RuntimeError where torch does not tell a backward pass, so that each batch would count twice.
    """
    if not tells_backward(_in_backward):
        raise RuntimeError(
            f"torch {torch.__version__} does not tell whether a backward pass is in progress, so blocks with batch "
            "normalisation cannot be computed again in it; use a version that docs/versions.md lists"
        )
    for each in module.modules():
        if isinstance(each, _BatchNorm):
            each.register_forward_pre_hook(_save_buffers)
            # always_call: torch ends a recomputation early by an exception
            each.register_forward_hook(_restore_buffers, always_call=True)


def _in_backward() -> bool:
    return int(torch._C._current_graph_task_id()) != -1  # torch.utils.checkpoint identifies backward passes by it


def _save_buffers(norm: nn.Module, inputs: Any) -> None:
    if norm.training and _in_backward():
        norm.__dict__[_SAVED] = dict(norm._buffers)
        # The kernel updates copies. Without buffers it would save fewer tensors for the backward than the first time.
        norm._buffers.update({name: None if value is None else value.clone() for name, value in norm._buffers.items()})


def _restore_buffers(norm: nn.Module, inputs: Any, output: Any) -> None:
    if _SAVED in norm.__dict__:
        norm._buffers.update(norm.__dict__.pop(_SAVED))
