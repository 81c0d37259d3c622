"""Metrics and settings as text: nested values by dotted keys, shares in per cent, a dash for what is missing.

{"tar": {"1e-3": 0.5}, "steps": 4321}   ── leaves ──>       ("tar.1e-3", 0.5), ("steps", 4321)
                                        ── figure_cell ──>  "50.00 %", "4,321"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from partial_fc.training.evaluation import percent

DASH = "—"
SHARES = re.compile(  # names of figures that are shares
    r"accuracy(_std)?|eer|rank-?\d+|data_wait|(tar|dir|cmc|recall)@.*|mAP(@R)?|R-precision"
)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of each leaf of nested mappings and lists; a list of plain values is one leaf."""
    if isinstance(value, Mapping) and (value or not prefix):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(child, Mapping | list | tuple) for child in value):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, child in children:
        yield from leaves(child, f"{prefix}.{key}" if prefix else key)


def flatten(value: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of each leaf."""
    return ((key, as_text(leaf)) for key, leaf in leaves(value))


def as_text(value: Any) -> str:
    """Return a setting as text."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value) or DASH
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_share(key: str) -> bool:
    """Return whether the metric with this dotted key is a share: "tar.1e-3", "training.data_wait", "lfw/accuracy".

    Thresholds are cosines, not shares.
    """
    path = key.split(".")
    if "thresholds" in path:
        return False
    return path[0] == "tar" or SHARES.fullmatch(path[-1].rsplit("/", 1)[-1]) is not None


def figure_cell(key: str, value: Any) -> str:
    """Return a metric as text: shares in per cent, other numbers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return as_text(value)
    if isinstance(value, int):
        return f"{value:,}"
    return percent(value) if is_share(key) else f"{value:,.6g}"
