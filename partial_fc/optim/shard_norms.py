"""Norms over ranks that the usual step does not take: of DTensors of the backbone (FSDP2), and maxima."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc.batch.status import HALF
from partial_fc.distributed.ranks import Ranks, naming_the_missing
from partial_fc.nonfinite.check_gradients import sum_of_flags

NORM = "the norm of gradients over ranks"  # in a `RankMissing`


def norm_of_shards(grad: DTensor, norm_type: float) -> Tensor:
    """Return the norm of one gradient over all its shards; half precision is summed in float32."""
    norm = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32 if grad.dtype in HALF else None)
    with naming_the_missing(NORM):
        return norm.full_tensor().double()  # type: ignore[attr-defined, no-any-return]


def largest_norm(norm: Tensor, flags: Tensor | None, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """Return (the largest norm of a shard, flags of all ranks): a maximum may lose a NaN, so flags travel alone."""
    with naming_the_missing(NORM, ranks.group):
        dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=ranks.group)
    return norm, None if flags is None else sum_of_flags(flags.to(norm.device), ranks, NORM)
