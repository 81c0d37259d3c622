"""Comparing with a reference: the largest difference, and what it is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_near(what: str, mine: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Same shape, and no number is off by more than `tolerance`."""
    assert isinstance(mine, Tensor) and isinstance(expected, Tensor), f"{what}: {mine} beside {expected}"
    assert mine.shape == expected.shape, f"{what}: {tuple(mine.shape)} is not {tuple(expected.shape)}"
    error = float((mine.detach() - expected.detach()).abs().max()) if mine.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.3e}"


def near(mine: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Tensors, or tuples, lists and dicts of tensors: same shapes and dtypes, and no number is off by more than
    `tolerance`."""
    torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)
