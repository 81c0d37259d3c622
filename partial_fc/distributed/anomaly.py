"""torch.autograd.detect_anomaly over gradients that are split by rows.

It asks whether any number of a gradient is NaN. For DTensors torch does not know how to answer that, and raises; here
each rank answers for its rows, and any rank's yes is the answer of all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard


@cache
def allow_anomaly_detection() -> None:
    """Tell torch how a DTensor answers the question; once a process."""
    try:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(torch.ops.aten._is_any_true.default)(_any_true)
    except (ImportError, AttributeError):  # anomaly detection stays an error of torch
        pass


def _any_true(x: Any) -> list[tuple[list[Any], list[Any]]]:
    """Return the placements of the answer for those of the question."""
    return [([Replicate()], [Replicate()]), *(([Partial("max")], [Shard(dim)]) for dim in range(x.ndim))]
