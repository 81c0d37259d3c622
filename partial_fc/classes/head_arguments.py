"""What a head can be built with: each number in one spelling, TypeError or ValueError for the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

from partial_fc.distributed.given import real, whole
from partial_fc.margins.base import Margin


class HeadNumbers(NamedTuple):
    """Arguments of a head, each in one spelling."""

    sample_rate: float
    label_smoothing: float
    interclass_filter: float | None
    inter_topk: int
    inter_topk_penalty: float
    logits_budget: int | None


def checked_block(sample_block: int, num_classes: int, sample_rate: float) -> int:
    """Return it as an int. ValueError for what no head can have."""
    sample_block = whole("sample_block", sample_block, least=1)
    if sample_block > num_classes:
        raise ValueError(f"sample_block is a number of classes, at most {num_classes}, not {sample_block}")
    if sample_block > 1 and sample_rate == 1:
        raise ValueError(
            f"sample_block is {sample_block}, but with sample_rate=1.0 nothing is drawn: leave it at 1, or give a "
            "sample_rate below 1"
        )
    return sample_block


def check_head_arguments(
    margin: Margin,
    sample_rate: float,
    label_smoothing: float,
    interclass_filter: float | None,
    inter_topk: int,
    inter_topk_penalty: float,
    logits_budget: int | None,
) -> HeadNumbers:
    """Return all but the margin as plain numbers; TypeError or ValueError for what no head can have."""
    sample_rate, label_smoothing = real("sample_rate", sample_rate), real("label_smoothing", label_smoothing)
    interclass_filter = None if interclass_filter is None else real("interclass_filter", interclass_filter)
    inter_topk = whole("inter_topk, a number of classes,", inter_topk, least=0)
    inter_topk_penalty = real("inter_topk_penalty", inter_topk_penalty)
    if not 0 <= inter_topk_penalty < math.pi:
        raise ValueError(f"inter_topk_penalty is an angle in radians in [0, pi), not {inter_topk_penalty}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is a share of the classes in (0, 1], not {sample_rate}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if logits_budget is not None:
        logits_budget = whole("logits_budget, a number of bytes,", logits_budget, least=0)
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be an instance such as ArcFace(scale=64.0), not {margin!r}")
    name = type(margin).__name__
    if type(margin).target is Margin.target:
        raise TypeError(f"{name} defines no target(cosine, positives), which every margin needs: docs/margins.md")
    if [key for key, _ in margin.named_parameters()] != (["offset"] if margin.binary else []):
        raise ValueError(f"{name} has parameters; a margin may have buffers, but nothing would train parameters")
    if margin.binary and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with {name}, whose classes are not one distribution")
    if interclass_filter is not None and not (margin.takes_cosines and -1 < interclass_filter <= 1):
        raise ValueError(
            f"interclass_filter is a cosine in (-1, 1], for margins that normalise, not {interclass_filter}"
        )
    if inter_topk and not margin.takes_cosines:
        raise ValueError(
            f"inter_topk moves angles to other classes and is for margins that normalise; it must be 0 with {name}, "
            f"not {inter_topk}"
        )
    return HeadNumbers(sample_rate, label_smoothing, interclass_filter, inter_topk, inter_topk_penalty, logits_budget)
