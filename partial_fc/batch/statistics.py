"""The running statistics of a margin: what ranks compare, and what a bad step puts back."""

from __future__ import annotations

from typing import Any

from torch import nn

A_FEW = 4096  # numbers of a running statistic; more are a table, which no step moves


def statistics_of(margin: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where the running statistics of a margin stand: its buffers of one number, and saved ones of a few."""
    saved = margin.state_dict(keep_vars=True)
    places = [(each._buffers, f"{at}.{n}".lstrip("."), n) for at, each in margin.named_modules() for n in each._buffers]
    given = [(held, path, n, held[n]) for held, path, n in places if held[n] is not None]
    return [(b, n) for b, path, n, value in given if not value.ndim or (path in saved and value.numel() <= A_FEW)]
