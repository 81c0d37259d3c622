"""A loss is built on all ranks or on none: what one rank finds wrong while it builds is raised on all.

constructor  ── fails ──>  its error goes to the other ranks, and is raised here
             ── else ───>  what was built is compared; another rank's error is raised with the name of that rank
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from partial_fc.batch.facts import Agreed, digest_of
from partial_fc.batch.refusals import agree
from partial_fc.distributed.forwards import WIRING
from partial_fc.distributed.groups import device_of, device_of_rows, ranks_of
from partial_fc.distributed.machines import know_store_host
from partial_fc.distributed.own_gpu import check_own_gpus
from partial_fc.distributed.ranks import Ranks

BUILDING = "the building of a head"


class Shared(Protocol):
    """A loss that all ranks build."""

    def agree_on_building(self) -> None:
        """Raise the same error on every rank unless all have built the same; by `agree_to_build`."""


Built = TypeVar("Built", bound=Shared)
Arguments = ParamSpec("Arguments")
Constructor = Callable[Concatenate[Built, Arguments], None]


_built: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # losses of each process group


def place_in_group(ranks: Ranks) -> int:
    """Return how many losses of the group were built before this one. All ranks build them in the same order, so that
    it tells two from each other that are built alike."""
    place = _built.get(ranks.group, 0)
    _built[ranks.group] = place + 1
    return place


def digest_of_values(values: Tensor) -> list[Any]:
    """Return the shape and a 64-bit hash of the values, each at its place."""
    total = 0
    for k, block in enumerate(values.detach().reshape(-1).split(1 << 20)):
        bits = block.cpu().double().view(torch.int64) if block.is_floating_point() else block.cpu().long()
        h = (bits + (torch.arange(len(bits), device="cpu") + (k << 20)) * 0x1F83D9ABFB41BD6B) * 0x2545F4914F6CDD1D
        h = (h ^ (h >> 29)) * 0x27D4EB2F165667C5
        total = total * 31 + int((h ^ (h >> 32)).sum()) & (1 << 64) - 1
    return [list(values.shape), total]


def agree_to_build(mine: Agreed, ranks: Ranks, device: torch.device) -> None:
    """Raise the same error on every rank unless all have the same facts. A collective. device: of the rows."""
    check_own_gpus(ranks, device, BUILDING)
    agree(mine, ranks, device_of(ranks), BUILDING)
    know_store_host()  # all ranks are registered


def together(constructor: Constructor[Built, Arguments]) -> Constructor[Built, Arguments]:
    """Return a constructor, with arguments `group` and `device`, that ends in an agreement, also where it fails."""

    @functools.wraps(constructor)
    def build(loss: Built, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            constructor(loss, *arguments, **options)
        except Exception as error:
            with suppress(Exception):  # what is wrong here is more than that others find the same, or do not come
                _tell(error, options.get("group"), options.get("device"))
            raise
        loss.agree_on_building()

    return build


def _tell(error: Exception, group: Any, asked: Any) -> None:
    ranks = ranks_of(group)
    try:
        device = device_of_rows(asked, ranks)
    except (RuntimeError, TypeError):  # the device may be what is wrong
        device = device_of_rows(None, ranks)
    if ranks.group is not None and device.type != "meta":
        facts = {"problem": f"{WIRING}: {error}", "kind": type(error).__name__}
        agree_to_build(Agreed(facts, digest_of(facts)), ranks, device)
