"""The combination of the softmax over many ranks: reduced on the way, where a gather brings all ranks' numbers to each.

    maximum, hardest  [N] each  ──  all-reduce, largest  ──>  [N] each    where logits are not bounded; for metrics
    all else          [N] each  ──  all-reduce, sum      ──>  [N] each    Σ exp brought to the largest maximum before

Of each target one rank has a logit and a cosine, and the others have 0: these sums are exact. Σ exp is a sum of k
positive numbers, each of which is a sum of many more, so its relative error is below k · 2⁻²⁴, and the loss takes its
logarithm.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.sums import reduced

COMBINATION = "the combination of the softmax"
LARGEST = ("maximum", "hardest")  # all others are sums


def combine_maxima(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return by name what the ranks found together. found: by name what each of them found `[world, N]`."""
    if "maximum" in found:
        largest = found["maximum"].amax(0)
        found["total"] = found["total"] * (found["maximum"] - largest).exp()
    return {name: each.amax(0) if name in LARGEST else each.sum(0) for name, each in found.items()}


def combine_by_sums(parts: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return by name what the ranks found together. parts: by name what this rank found."""
    found: dict[str, Tensor] = {}
    for largest in (True, False):
        those = {name: each for name, each in parts.items() if (name in LARGEST) == largest}
        if those:
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            together = reduced(torch.cat(list(those.values())), group, COMBINATION, op)
            found |= dict(zip(those, together.split([len(each) for each in those.values()]), strict=True))
        if largest and "maximum" in found:
            parts = {**parts, "total": parts["total"] * (parts["maximum"] - found["maximum"]).exp()}
    return found
