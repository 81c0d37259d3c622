"""Work on one tile of logits `[N, T]`: how large it is, in which dtype, its product, its targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partial_fc.softmax.inputs import LossOptions
from partial_fc.softmax.row_tiles import OwnTargets

TILE_BYTES = {"cpu": 4 << 20}  # a tile of logits stays in a core's cache; elsewhere large products matter more
TILE_BYTES_ELSEWHERE = 256 << 20


def tile_rows(samples: int, width: int, device_type: str) -> int:
    """Return T: so many class rows that neither `[N, T]` nor `[T, D]` in float32 is larger than a tile may be."""
    budget = TILE_BYTES.get(device_type, TILE_BYTES_ELSEWHERE)
    return max(64, budget // (4 * max(samples, width, 1)) // 64 * 64)


def compute_dtypes(embeddings: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return (dtype of statistics, dtype of matrix products): at least float32 for the first, autocast's for the second."""
    if torch.float64 in (embeddings.dtype, weight.dtype):
        return torch.float64, torch.float64
    if torch.is_autocast_enabled(embeddings.device.type):
        return torch.float32, torch.get_autocast_dtype(embeddings.device.type)
    low = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.float32, weight.dtype if low else torch.float32


def logits_bytes(samples: int, rows: int, product: torch.dtype) -> int:
    """Return the size of kept logits `[N, S]`: exponentials in the dtype of the matrix products."""
    return samples * rows * product.itemsize


def is_bounded(options: LossOptions, stats: torch.dtype, product: torch.dtype) -> bool:
    """Return whether no sum of exponentials can leave the range of its dtype, so that no maximum need be subtracted.

    A cosine times the scale is at most the scale; 64 and a thousand million classes fit into float32.
    """
    margin = options.margin
    if margin.binary:
        return True
    if not margin.normalize or margin.has_rule or product is torch.float16:
        return False
    return margin.scale + math.log(options.num_classes) < math.log(torch.finfo(stats).max) - 2


def tile_logits(scaled: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Return `scaled wᵀ + bias` `[N, T]`, written into `out`."""
    if scaled.dtype == out.dtype:
        torch.mm(scaled, w.to(scaled.dtype).t(), out=out)
    else:
        out.copy_(torch.mm(scaled, w.to(scaled.dtype).t()))
    return out if bias is None else out.add_(bias)


def mask_targets(logits: Tensor, targets: OwnTargets, samples: int, a: int, centers: int = 1) -> None:
    """Write −inf where row a + column is a target of the sample: targets count with their margin elsewhere."""
    width = logits.shape[1]
    if not logits.numel():
        return
    first = (targets.first - a).view(samples, -1)
    own = targets.own.view(samples, -1)
    # a sample whose targets are elsewhere writes back what it reads; several targets a sample go one by one, so that none
    # undoes another
    for each in range(first.shape[1]):
        for center in range(centers):
            at = first[:, each : each + 1] + center
            here = own[:, each : each + 1] & (at >= 0) & (at < width)
            at = at.clamp(0, width - 1)
            logits.scatter_(1, at, torch.where(here, -torch.inf, logits.gather(1, at)))


def low_precision_product(e: Tensor, weighted: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `eᵀ weighted`, both in `dtype`. float16 has little range: `weighted` is divided by its largest value first."""
    if dtype is not torch.float16:
        return torch.mm(e.t(), weighted.to(dtype))
    largest = weighted.new_ones(())
    if weighted.numel():
        largest = weighted.abs().amax().clamp_(min=torch.finfo(weighted.dtype).tiny)
    return torch.mm(e.t(), (weighted / largest).to(dtype)).to(weighted.dtype) * largest
