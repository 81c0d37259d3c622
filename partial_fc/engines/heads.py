"""The heads within a module, which engines are to leave alone.

model = Model(backbone, head)         model.head.weight [C, D] is a DTensor of its own, split by classes over the ranks
heads_of(model)                       {"head": head}
head_names(model)                     {"head.weight", "head.margin.t", ...}: its parameters and buffers as the model names them
head_parameters(model)                {head.weight, ...}: what `fully_shard(model, ignored_params=...)` is given
without_heads(model)                  the state dict of all else
"""

from __future__ import annotations

from typing import Any

from torch import nn

from partial_fc.sharded import ShardedLoss


def heads_of(module: nn.Module) -> dict[str, ShardedLoss]:
    """Every `PartialFC` and `CenterLoss` within `module`, by the name that it has there ("" for `module` itself)."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ShardedLoss)}


def head_names(module: nn.Module) -> set[str]:
    """The names that the heads' parameters and buffers have in `module`; those of buffers that are not saved, too."""
    names = set()
    for prefix, head in heads_of(module).items():
        own = [*(name for name, _ in head.named_parameters()), *(name for name, _ in head.named_buffers())]
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def head_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The heads' parameters, for FSDP2: `fully_shard(module, ignored_params=head_parameters(module))` leaves the heads as they are."""
    return {parameter for head in heads_of(module).values() for parameter in head.parameters()}


def without_heads(module: nn.Module) -> dict[str, Any]:
    """The state dict of `module` without its heads, whose rows lie on all ranks and belong into `save_checkpoint`."""
    prefixes = tuple(f"{name}." if name else "" for name in heads_of(module))
    return {name: value for name, value in module.state_dict().items() if not (prefixes and name.startswith(prefixes))}
