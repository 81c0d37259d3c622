"""A head inside the module that DistributedDataParallel wraps: `ignore_heads` makes DDP ignore it.

    backbone parameters    broadcast from rank 0 when wrapped, gradients averaged across ranks (as usual)
    head parameters        ignored; their gradients are already those of the global batch
    head buffers           ignored; every rank computes the same from the global batch

Prefer to wrap the backbone alone and call the head on its output, which needs nothing from this module. This is for
frameworks that need one module which returns its loss.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc.engines.heads import head_names


def ignore_heads(module: nn.Module) -> list[str]:
    """Make DDP ignore the heads in `module`, and return all names that it ignores. Call it before wrapping.

    `module` must be the module that is wrapped, because DDP reads its list of ignored names only there. Names already
    on the list stay.

    Raises ValueError if `module` contains no head, or no other trainable parameters.
    """
    names = head_names(module)
    if not names:
        raise ValueError(f"there is no PartialFC or CenterLoss in this {type(module).__name__}; wrap it without this")
    if not any(p.requires_grad for name, p in module.named_parameters() if name not in names):
        raise ValueError(
            f"this {type(module).__name__} has no trainable parameters besides those of heads, which are sharded "
            "across ranks; do not wrap it: DistributedDataParallel is for the backbone"
        )
    names |= set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))
    return sorted(names)
