"""What all ranks of one loss must have alike: settings, mode, step, margin, optimizer. Compared with every batch.

forward      digest and statistics  ── with the status of the batch ──>  the same on all ranks
if they differ             facts    ── gather_texts ──>                  ValueError on every rank: who has what
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.statistics import statistics_of
from partial_fc.distributed.ranks import local_part


@dataclass(frozen=True)
class Agreed:
    """facts: by the name that a message gives them. digest: of all facts. statistics: 0-d float64, the sum of running
    statistics and shared parameters."""

    facts: dict[str, Any]
    digest: int
    statistics: Tensor | None = None

    @classmethod
    def of(cls, loss: Any, **more: Any) -> Agreed:
        """Read them from a loss, whose `FACTS` has the name of each fact and where it stands; and some more."""
        rows, margin, optimizer = loss.class_rows, getattr(loss, "margin", None), loss.class_rows.live_optimizer
        facts: dict[str, Any] = {"loss": rows.owner, "mode": "train()" if loss.training else "eval()"}
        facts |= {name: comparable(attrgetter(path)(loss)) for name, path in loss.FACTS.items()}
        facts["gradients"] = "recorded" if torch.is_grad_enabled() else "off (no_grad)"
        kind = rows.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        facts["autocast"] = str(torch.get_autocast_dtype(kind)) if cast else "off"
        named = (*rows.parameters.items(), *rows.shared.items())
        facts |= {name: f"{p.dtype}{'' if p.requires_grad else ', frozen'}" for name, p in named}
        if loss.training:
            pending = rows.grad_rows is not None or any(p.grad is not None for _, p in named)
            facts["the gradient of an earlier backward"] = "kept" if pending else "cleared"
        statistics = [local_part(p.detach()) for p in rows.shared.values()]
        if margin is not None:
            facts["margin"] = type(margin).__name__
            facts |= settings_of(vars(margin), "margin")
            if next(margin.buffers(), None) is not None:
                statistics += [held[name] for held, name in statistics_of(margin)]
        if optimizer is not None:
            facts["RowOptimizer"] = type(optimizer.inner).__name__
            own = {"update_in_backward": optimizer.update_in_backward, "low_precision": optimizer.low_precision}
            own["skipped_rows"] = "still" if rows.behind is None else "dense"
            facts |= settings_of({**own, **optimizer.param_groups[0]}, "RowOptimizer")
        statistics = statistics if kind == "cpu" else []  # the host would wait for them
        facts |= more
        total = torch.stack([each.double().sum() for each in statistics]).sum() if statistics else None
        return cls(facts, digest_of(facts), total)


def comparable(value: Any) -> Any:
    """Return a value as it is compared and shown: a number is what it is worth, however it is spelled."""
    if isinstance(value, Tensor):
        return comparable(value.tolist()) if value.numel() <= 64 and value.device.type == "cpu" else "a tensor"
    if isinstance(value, tuple | list):
        return [comparable(each) for each in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value if isinstance(value, bool) else str(value)
    number = float(value)
    return int(number) if math.isfinite(number) and number.is_integer() else number


def settings_of(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the plain values of public names, each under "owner.name"."""
    kinds = (str, Real, tuple, list, Tensor, type(None))
    public = {k: v for k, v in values.items() if k[0] != "_" and k not in ("training", "params", "initial_lr")}
    return {f"{owner}.{k}": comparable(v) for k, v in public.items() if isinstance(v, kinds)}


def digest_of(facts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "big")
