"""Actions that all ranks take together: an error on one rank is raised on every rank, so that no rank waits forever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from partial_fc import naming_the_missing
from partial_fc.distributed.meeting import AGREEMENT
from partial_fc.distributed.objects import gather_objects, group_of_objects
from partial_fc.training.errors import Preempted, UserError, words

Returned = TypeVar("Returned")


def run_on_all(action: Callable[[], Returned], accelerator: Accelerator) -> Returned:
    """Run `action` on every rank and return its result.

    A UserError of any rank is raised on every rank, and so is an OSError, as one that names the file and the cause.
    """
    result = None
    message = None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except OSError as error:  # of a disk: the other ranks would wait for this one
        message = words(error)
    raise_on_all(message, accelerator)
    return result  # type: ignore[return-value]


def run_on_main(action: Callable[[], object], accelerator: Accelerator) -> None:
    """Run `action` on the main process only; its UserError is raised on every rank. Every rank must call it."""
    run_on_all(lambda: action() if accelerator.is_main_process else None, accelerator)


def run_on_main_for_all(action: Callable[[], Returned], accelerator: Accelerator) -> Returned:
    """Run `action` on the main process only; return its result, or raise its UserError, on every rank."""
    result: list[Returned | None] = [None]

    def run() -> None:
        result[0] = action()

    run_on_main(run, accelerator)
    if accelerator.num_processes > 1:
        with naming_the_missing("the word of the first rank"):
            dist.broadcast_object_list(result, group=group_of_objects())
    return result[0]  # type: ignore[return-value]


def raise_on_all(message: str | None, accelerator: Accelerator, stop: bool = False) -> None:
    """Raise UserError on every rank if any rank has a message, else Preempted if any rank was asked to `stop`.

    The message is that of the lowest rank that has one. Every rank must call it.
    """
    mine = message, stop
    reports = gather_objects(mine, AGREEMENT) if accelerator.num_processes > 1 else [mine]
    first = next((m for m, _ in reports if m is not None), None)
    if first is not None:
        raise UserError(first)
    if any(each for _, each in reports):
        raise Preempted("stopped as requested; all training steps are done and saved")


def sum_ranks(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum of a tensor over ranks, on every rank. With several ranks the sum is on the CPU."""
    if accelerator.num_processes == 1:
        return tensor
    total = tensor.to(accelerator.device)
    with naming_the_missing("the sum of the evaluation's counts"):
        dist.all_reduce(total)
    return total.cpu()
