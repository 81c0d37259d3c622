"""Find the heads inside a module, which engines must ignore.

model = Model(backbone, head)    model.head.weight [C, D] is a DTensor that is sharded by class across ranks
heads_of(model)                  {"head": head}
head_names(model)                {"head.weight", "head.margin.t", ...}: parameters and buffers by their names in the
                                 model
head_parameters(model)           {head.weight, ...}: for `fully_shard(model, ignored_params=...)`
without_heads(model)             the state dict of everything else
"""

from __future__ import annotations

from typing import Any

from torch import nn

from partial_fc.sharded import ShardedLoss


def heads_of(module: nn.Module) -> dict[str, ShardedLoss]:
    """Return every `PartialFC` and `CenterLoss` in `module` by its name there ("" for `module` itself)."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ShardedLoss)}


def head_names(module: nn.Module) -> set[str]:
    """Return the names of the heads' parameters and buffers in `module`, including buffers that are not saved."""
    names = set()
    for prefix, head in heads_of(module).items():
        own = [*(name for name, _ in head.named_parameters()), *(name for name, _ in head.named_buffers())]
        names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names


def head_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the heads' parameters, for FSDP2: `fully_shard(module, ignored_params=head_parameters(module))`."""
    return {parameter for head in heads_of(module).values() for parameter in head.parameters()}


def without_heads(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of `module` without its heads, which are sharded: save them by `save_checkpoint`."""
    prefixes = tuple(f"{name}." if name else "" for name in heads_of(module))
    return {name: value for name, value in module.state_dict().items() if not (prefixes and name.startswith(prefixes))}
