"""The same error on every rank, for what goes wrong on one rank outside a training step (files, arguments).

    on_every_rank(action)    every rank calls it; if any fails, all ranks raise the error of the first that failed
    on_first_rank(action)    rank 0 calls it; every rank returns its result, or raises its error
    check_same(what, value)  ValueError on every rank unless all ranks pass an equal value

All three are collectives. They send pickled objects, which come from the ranks themselves and never from a file.
Without a process group they are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from partial_fc.distributed.groups import device_of, ranks_of
from partial_fc.distributed.meeting import AGREEMENT, meet
from partial_fc.distributed.objects import gather_objects, group_of_objects
from partial_fc.distributed.ranks import naming_the_missing

Result = TypeVar("Result")

# A class and a message, never the exception itself: some cannot be pickled, and their traceback holds tensors.
Failure = tuple[type[Exception], str]


def on_every_rank(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `action` on every rank and return this rank's result.

    If any rank fails with an OSError, ValueError or TypeError, all raise that of the first failed rank. It names that
    rank unless all failed.
    """
    result = None
    error = None
    try:
        result = action()
    except (OSError, ValueError, TypeError) as caught:
        error = caught
    if dist.is_initialized() and any(failed for (failed,) in _meet(AGREEMENT, group, error is not None)):
        failures: list[Failure | None] = gather_objects(_failure(error), AGREEMENT, group)
        rank, (kind, text) = next((rank, failure) for rank, failure in enumerate(failures) if failure is not None)
        raise kind(text if None not in failures else f"{ranks_of(group).name(rank)}: {text}") from error
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `action` on the first rank of the group, when all ranks have come; return its result, or raise its error
    everywhere (OSError, ValueError, TypeError)."""
    if not dist.is_initialized():
        return action()
    _meet(AGREEMENT, group)
    shared: list[Result | Failure | None] = [None, None]
    error = None
    if dist.get_rank(group) == 0:
        try:
            shared[0] = action()
        except (OSError, ValueError, TypeError) as caught:
            error = caught
            shared[1] = _failure(caught)
    with naming_the_missing(AGREEMENT, group):
        dist.broadcast_object_list(shared, group=group_of_objects(group), group_src=0)
    if shared[1] is not None:
        kind, text = shared[1]  # type: ignore[misc]
        raise kind(text) from error
    return shared[0]  # type: ignore[return-value]


def check_same(what: str, value: object, group: dist.ProcessGroup | None = None) -> None:
    """Raise ValueError on every rank unless all pass an equal `value`, which must be small and of plain types."""
    if not dist.is_initialized():
        return
    _meet("check_same", group)
    values = gather_objects(value, f"the comparison of {what}", group)
    ranks = ranks_of(group)
    for rank, other in enumerate(values):
        if other != values[0]:
            first, here = ranks.name(0), ranks.name(rank)
            raise ValueError(f"ranks disagree: {what} is {values[0]!r} on {first} and {other!r} on {here}")


def _meet(what: str, group: dist.ProcessGroup | None, *values: int) -> list[list[int]]:
    ranks = ranks_of(group)
    return meet(what, ranks, device_of(ranks), values)


def _failure(error: OSError | ValueError | TypeError | None) -> Failure | None:
    """Return the error's class (or the base class that callers distinguish) and its message; None for no error."""
    if error is None:
        return None
    kinds = (FileNotFoundError, FileExistsError, BlockingIOError, PermissionError, OSError, ValueError, TypeError)
    return next(kind for kind in kinds if isinstance(error, kind)), str(error)
