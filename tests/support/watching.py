"""Watches what a piece of code does: the collectives that it takes part in, the tensors that it makes.

with collectives() as calls: ...        calls: [("all_gather", 192), ("reduce_scatter", 384), ...]
with Allocations() as made: ...         made.elements, made.bytes: of the largest tensor
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from shards import local
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import partial_fc.distributed.ranks

OF_TORCH = ("all_reduce", "broadcast", "all_gather", "barrier", "reduce", "all_to_all_single")


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes that this rank brings) of every collective of tensors, in their order; torch's all_gather is
    "list_all_gather"."""
    calls: list[tuple[str, int]] = []

    def noting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            given = [each for each in arguments if isinstance(each, Tensor)]
            calls.append((name, given[-1].nbytes if given else 0))
            return function(*arguments, **options)

        return call

    ranks: Any = partial_fc.distributed.ranks
    with ExitStack() as stack:
        for name in ("_all_gather_single", "_reduce_scatter_single"):
            noted = noting(name.strip("_").removesuffix("_single"), getattr(ranks, name))
            stack.enter_context(mock.patch.object(ranks, name, noted))
        for name in OF_TORCH:
            noted = noting("list_all_gather" if name == "all_gather" else name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, noted))
        yield calls


def sizes(calls: list[tuple[str, int]]) -> dict[str, list[int]]:
    """The bytes by the name of the collective."""
    found: dict[str, list[int]] = {}
    for name, size in calls:
        found.setdefault(name, []).append(size)
    return found


class Allocations(TorchDispatchMode):
    """Tensors on memory that none of an operation's arguments has; and what was copied into memory that was there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []  # elements of floating-point tensors
        self.elements = self.bytes = self.copied = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        held = {_storage(each).data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor).data_ptr() not in held:
                elements = _storage(tensor).nbytes() // tensor.element_size()
                self.elements = max(self.elements, elements)
                self.bytes = max(self.bytes, _storage(tensor).nbytes())
                self.made += [elements] * tensor.dtype.is_floating_point
        if function is torch.ops.aten.copy_.default:
            self.copied = max(self.copied, local(args[1]).nbytes)
        return result


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return local(tensor).untyped_storage()
