"""float16 has too little range for small probabilities and their products: rows are scaled by their largest value."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_exponentials(logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return (e `[N, T]` in float16, factor `[N, 1]`) with e · factor = exp(logits − lse); overwrites the logits."""
    peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(peak).exp_().to(torch.float16), (peak - lse).exp_()


def scaled_values(e: Tensor) -> tuple[Tensor, Tensor]:
    """Return (e `[N, T]` in float16, factor `[N, 1]`) whose product is e."""
    peak = e.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(e.dtype).tiny)
    return (e / peak).to(torch.float16), peak


def scaled_product(e: Tensor, weighted: Tensor) -> Tensor:
    """Return `eᵀ weighted` in the dtype of `weighted`, multiplied in float16."""
    largest = weighted.new_ones(())
    if weighted.numel():
        largest = weighted.abs().amax().clamp_(min=torch.finfo(weighted.dtype).tiny)
    return torch.mm(e.t(), (weighted / largest).to(torch.float16)).to(weighted.dtype) * largest
