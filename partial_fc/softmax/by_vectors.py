"""The derivative of the normalisation by the vectors themselves, where their directions are not at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.tiles import row_dots


def tangent_at(grad: Tensor, vector: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Return ∂/∂v from g = ∂/∂u, u = v/‖v‖, as `tangent` does: rows `[n, D]`, inverse 1/‖v‖ `[n, 1]`.

    grad: of any dtype, may be the memory of out.
    """
    return project(torch.mul(grad, inverse, out=out), vector, inverse)


def project(scaled: Tensor, vector: Tensor, inverse: Tensor) -> Tensor:
    """Return `h − (h·u) u`, u = v/‖v‖, in the memory of h = g/‖v‖."""
    return scaled.addcmul_(vector, row_dots(scaled, vector).mul_(inverse.square()), value=-1)
