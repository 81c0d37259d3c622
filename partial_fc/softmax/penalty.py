"""What a margin adds to each loss, as MagFace does."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.margins.base import Margin
from partial_fc.softmax.smoothing import Smoothing


def penalty_of(
    margin: Margin, norms: Tensor, needs_grad: bool, smoothing: Smoothing | None
) -> tuple[Tensor | float, Tensor]:
    """Return (what is added to the losses `[N]`, its derivative by the embeddings' lengths `[N]`)."""
    with torch.set_grad_enabled(needs_grad):
        leaf = norms.detach().requires_grad_(needs_grad)
        penalty = margin.penalty(leaf)
        if penalty is not None and penalty.shape != norms.shape:
            raise ValueError(
                f"{type(margin).__name__}.penalty must return a number for each sample, {list(norms.shape)}, not "
                f"{list(penalty.shape)}"
            )
        if penalty is not None and smoothing is not None:  # class weights are within the loss there
            penalty = penalty * smoothing.of_samples
        if penalty is None or not penalty.requires_grad:  # or does not depend on the lengths
            return 0.0 if penalty is None else penalty, torch.zeros_like(norms)
        return penalty.detach(), torch.autograd.grad(penalty.sum(), leaf)[0]
