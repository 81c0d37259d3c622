"""A head that is about to be wrapped by an engine says so, in words, before the engine replaces or averages its rows.

    DistributedDataParallel(model)     collects model.named_parameters(), for which it walks head.named_modules()
    fully_shard(model)                 collects head.named_parameters(recurse=False)

Nothing tells a module that it is being wrapped, and what torch does next with rows that are split already is an error
about flattening tensors, or, without the first synchronisation, no error at all: gradients of different classes are
averaged. So the head looks who asks for its parameters. A wrapper that was told to ignore them may have them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc.distributed.callers import callers


@dataclass(frozen=True)
class _Wrapper:
    """An engine's function that takes modules apart, and what tells which parameters it was told to leave alone."""

    name: str
    code: Callable[[], CodeType | None]  # None where it was not imported
    left_alone: Callable[[dict[str, Any]], Iterable[Any]]  # of the function's local variables: names or parameters
    inside: str  # how to have a head within the wrapped module


_DDP_INIT = inspect.unwrap(DistributedDataParallel.__init__).__code__


def _fully_shard() -> CodeType | None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return None if fsdp is None else inspect.unwrap(fsdp.fully_shard).__code__


DDP = _Wrapper(
    "DistributedDataParallel",
    lambda: _DDP_INIT,
    lambda local: getattr(local.get("self"), "parameters_to_ignore", ()),
    "call partial_fc.engines.ddp.ignore_heads(model) on the module that is wrapped, before it is",
)
FSDP2 = _Wrapper(
    "fully_shard (FSDP2)",
    _fully_shard,
    lambda local: local.get("ignored_params") or (),
    "pass ignored_params=partial_fc.engines.heads.head_parameters(model)",
)


def refuse(wrapper: _Wrapper, head: nn.Module, prefix: str) -> None:
    """RuntimeError if `wrapper` asks for the parameters of `head`, which it calls `prefix`, and was not told to leave
    them alone."""
    code = wrapper.code()
    for frame in callers() if code is not None else ():
        if frame.f_code is code:
            left_alone = set(wrapper.left_alone(frame.f_locals))
            own = {f"{prefix}.{key}" if prefix else key: p for key, p in head._parameters.items() if p is not None}
            if not all(key in left_alone or p in left_alone for key, p in own.items()):
                kind = type(head).__name__
                raise RuntimeError(
                    f"{wrapper.name} was given a {kind} ({', '.join(own)}), whose rows are split over the ranks "
                    "already; it would take "
                    f"them for copies. Wrap the backbone alone and call the {kind} on its output; if it has to "
                    f"be inside, {wrapper.inside}"
                )
            return
