"""A head inside the module that DistributedDataParallel wraps: DDP is told to leave it alone.

    backbone parameters    broadcast from rank 0 when wrapped, gradients averaged over the ranks    (as ever)
    head parameters        as they are; their gradients are already those of the global batch
    head buffers           as they are; every rank computes the same from the global batch

Wrapping the backbone alone and calling the head on its output needs nothing from here and is to be preferred. This is for frameworks
that want one module which returns its loss.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc.engines.heads import head_names


def ignore_heads(module: nn.Module) -> list[str]:
    """Keep DDP off the heads in `module`, and return the names that it ignores from now on. Call it before wrapping.

    `module` must be the very module that is wrapped: DDP looks for its list there alone. Names that are on the list already stay.

    Raises ValueError if there is no head in `module`, or nothing else that could be trained.
    """
    names = head_names(module)
    if not names:
        raise ValueError(f"there is no PartialFC or CenterLoss in this {type(module).__name__}: wrap it as it is")
    if not any(p.requires_grad for name, p in module.named_parameters() if name not in names):
        raise ValueError(
            f"this {type(module).__name__} has no parameters but those of heads, which are split over the ranks: "
            "leave it as it is; DistributedDataParallel is for the backbone"
        )
    names |= set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))
    return sorted(names)
