"""Numbers as callers give them: one value, however it is spelled, is one number.

plain    64, np.int64(64), torch.tensor(64)          -> 64         np.float32(0.35), torch.tensor(0.35) -> 0.35
whole    3, 3.0, np.int64(3), torch.tensor(3), 1e6   -> int        ValueError for 2.5, True, None, "3"
real     64, 64.0, np.float64(64)                    -> float      ValueError for True, None, "64"
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Return the bool, int or float that `value` stands for, also in a 0-d tensor or array; else the value itself."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Tensor):
        single = value.ndim == 0 and value.device.type != "meta" and not value.is_complex()
        return _shortest(value.detach().item(), value.dtype) if single else value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _shortest(float(value), getattr(value, "dtype", None))
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # an array, or numpy's bool
        found = value.item()
        return _shortest(found, value.dtype) if isinstance(found, bool | int | float) else value
    return value


def _shortest(number: Any, dtype: Any) -> Any:
    """Return the shortest decimal fraction that is `number` in its dtype: 0.35, not what float32 makes of it."""
    size = getattr(dtype, "itemsize", 8)
    if not isinstance(number, float) or size > 4 or not math.isfinite(number):
        return number
    kind = dtype if isinstance(dtype, torch.dtype) else {2: torch.float16, 4: torch.float32}[size]
    decimals = (float(f"{number:.{digits}g}") for digits in range(1, 10))
    return next((each for each in decimals if torch.tensor(each, dtype=kind).item() == number), number)


def as_whole(value: Any) -> int | None:
    """Return the whole number that `value` is, None if it is none. A bool is none."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1:
        return None
    return int(number) if math.isfinite(number) else None


def whole(name: str, value: Any, least: int | None = None) -> int:
    """Return the whole number that `value` is. ValueError, naming the argument, if it is none or below `least`."""
    number = as_whole(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def real(name: str, value: Any) -> float:
    """Return the number that `value` is, as a float. ValueError, naming the argument, if it is none; a bool is none."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return float(number)


def whole_if_any(value: Any) -> Any:
    """Return the whole number that `value` is, and anything else as it is, for a check that follows."""
    number = as_whole(value)
    return value if number is None else number
