"""Train with different numbers of batches per rank: a rank that has ended continues with stand-ins until all have.

    for images, labels in JoinedBatches(loader):          every rank gets as many batches as the rank with the most
        loss = head(model(images), labels)                the same loop as before, with backward and optimizer step

    each step         all ranks report one number: has a batch, has ended, never had a batch, or failed
    has a batch       yields it
    has ended         yields its last batch again with every label set to ignore_index: backbone,
                      DistributedDataParallel and the head's collectives run, but no gradient results
    never had one     gets a batch of another rank once, to make its stand-in of
    no rank has one   all leave the loop at the same step

The head's loss is the mean over the valid samples of the global batch, so a step is that of one process with all
existing samples, whichever ranks hold them. torch's `Join` supports only DistributedDataParallel: it repeats its
reductions on ranks that have ended, but cannot know the head's collectives between them.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.given import whole
from partial_fc.distributed.groups import current_device, device_of, ranks_of
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.ranks import Group, Ranks, naming_the_missing
from partial_fc.distributed.texts import gather_texts

Batch = TypeVar("Batch")

ENDED, HAS, FAILED, NEVER_HAD = range(4)
WHO = "the check which ranks have a batch (JoinedBatches)"  # in a `RankMissing`


class JoinedBatches(Generic[Batch]):
    """Yield this rank's batches, then stand-ins until all ranks have ended. Every rank must iterate over it.

    Args:
        loader: this rank's batches, any number; may be empty.
        labels: where the labels are in a batch: an index of a tuple or list, a key, or the name of an attribute.
            Default: the last item of a tuple or list (TypeError where several may be labels), else "labels". Labels are
            an integer tensor, or a dict of them (`gather` with labels by name).
        ignore_index: the head's; a dict by name for several heads.
        stand_in: function that makes a stand-in from a batch, instead of ignoring its labels.
        group: the ranks that train together, as for the head; None for all.

    Attributes:
        ended: whether the last batch was a stand-in, for other uses of the batch (counts, other losses).

    Costs one small collective per step, for which the host waits. Without a process group, batches pass through
    unchanged. If one rank's loader raises, every rank raises the same RuntimeError, which names the rank; a TypeError
    or KeyError in it means that the labels were not found.

    A stand-in passes through the backbone: BatchNorm on a rank that has ended sees its last batch again, and dropout
    consumes random numbers. Batches must not be changed in place.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        labels: int | str | None = None,
        ignore_index: int | Mapping[str, int] = -100,
        stand_in: Callable[[Batch], Batch] | None = None,
        group: Group = None,
    ) -> None:
        if labels is not None and not isinstance(labels, str):
            labels = whole("labels, the place of the labels,", labels)
        if isinstance(ignore_index, Mapping):
            ignore_index = {name: _label("ignore_index", each) for name, each in ignore_index.items()}
        else:
            ignore_index = _label("ignore_index", ignore_index)
        self.loader = loader
        self.group = group
        self.ended = False
        self._make_stand_in = stand_in or (lambda batch: _with_ignored_labels(batch, labels, ignore_index))

    def __iter__(self) -> Iterator[Batch]:
        ranks, iterator = ranks_of(self.group), iter(self.loader)
        if ranks.group is None:
            self.ended = False
            yield from iterator
            return
        device = device_of(ranks)
        last: Batch | None = None  # this rank's last batch, or its stand-in after the end
        at_end = False
        while True:
            batch, failure = None, None
            try:
                batch = None if at_end else _next(iterator)
                if batch is not None and last is None:
                    # raise now if the labels are not found, and not when another rank already waits for a stand-in
                    self._make_stand_in(batch)
                if batch is None and not at_end and last is not None:
                    last = self._make_stand_in(last)
            except Exception as error:
                failure = error
            state = FAILED if failure is not None else _state(batch, last)
            states = [each for (each,) in meet(WHO, ranks, device, (state,))]
            if FAILED in states:
                texts = gather_texts("" if failure is None else f"{type(failure).__name__}: {failure}", ranks, device)
                flat = states.index(FAILED)
                raise RuntimeError(f"{ranks.name(flat)} failed to load its next batch: {texts[flat]}") from failure
            if HAS not in states:
                return
            at_end = self.ended = batch is None
            if NEVER_HAD in states:
                received = _batch_of(batch, states.index(HAS), ranks, device)
                last = self._make_stand_in(received) if last is None and batch is None else last
            if batch is not None:
                last = batch
            yield batch if batch is not None else last  # type: ignore[misc]


def _next(iterator: Iterator[Batch]) -> Batch | None:
    """Return the next batch, None at the end."""
    try:
        batch = next(iterator)
    except StopIteration:
        return None
    if batch is None:
        raise TypeError("the loader gave None for a batch, and other ranks may have one: leave such batches out in it")
    return batch


def _state(batch: Any, last: Any) -> int:
    if batch is not None:
        return HAS
    return ENDED if last is not None else NEVER_HAD


def _batch_of(batch: Any, flat: int, ranks: Ranks, device: torch.device) -> Any:
    """Return, on every rank, the batch of the `flat`-th rank of the mesh; tensors from a GPU go to this rank's GPU."""
    buffer = io.BytesIO()
    own = flat == ranks.replica * ranks.world + ranks.rank
    if own:
        torch.save(batch, buffer)
    length = _broadcast(torch.tensor([len(buffer.getvalue())], device=device), flat, ranks)
    mine = (
        torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        if own
        else torch.empty(int(length), dtype=torch.uint8, device="cpu")
    )
    received = _broadcast(mine.to(device), flat, ranks)
    if own:
        return batch
    content = bytearray(len(received))
    torch.frombuffer(content, dtype=torch.uint8).copy_(received)
    return torch.load(io.BytesIO(content), map_location=_to_own_device, weights_only=False)


def _to_own_device(storage: Any, location: str) -> Any:
    """Return the storage where this rank has such tensors: location is the device of the rank that has sent it."""
    kind = location.partition(":")[0]
    return storage if kind == "cpu" else storage.to(device=current_device(kind))


def _broadcast(tensor: Tensor, flat: int, ranks: Ranks) -> Tensor:
    """Broadcast the tensor of the `flat`-th rank of the mesh in place: within its replica, then across replicas."""
    replica, rank = divmod(flat, ranks.world)
    for group, source, takes_part in (
        (ranks.group, rank, ranks.replica == replica),
        (ranks.replica_group, replica, ranks.replica_group is not None),
    ):
        if takes_part:
            assert group is not None
            with naming_the_missing("the broadcast of a stand-in (JoinedBatches)", group):
                dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)
    return tensor


def _label(name: str, value: Any) -> int:
    if value is None:
        raise ValueError(
            f"{name} is a label, not None: give the one that the head ignores (-100 unless it was built so)"
        )
    return whole(name, value)


def _may_be_labels(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 1 and not part.is_floating_point() and part.dtype != torch.bool


def _with_ignored_labels(batch: Any, where: int | str | None, ignore_index: int | Mapping[str, int]) -> Any:
    """Return a copy of the batch with all labels set to `ignore_index`. where: the place of the labels."""
    if where is None:
        where = -1 if isinstance(batch, tuple | list) else "labels"
        possible = sum(map(_may_be_labels, batch)) if isinstance(batch, tuple | list) else 0
        if possible > 1:
            raise TypeError(
                f"{possible} items of a batch may be its labels (integers [N]): say "
                "which they are, JoinedBatches(loader, labels=1)"
            )
    if isinstance(batch, tuple | list):
        if not isinstance(where, int):
            raise TypeError(f"labels={where!r} is not an index of a {type(batch).__name__}; pass an int")
        parts = list(batch)
        parts[where] = _fill_labels(parts[where], ignore_index)
        if isinstance(batch, list):
            return parts
        return type(batch)._make(parts) if hasattr(batch, "_make") else tuple(parts)
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)
        changed[where] = _fill_labels(batch[where], ignore_index)
        return changed
    if not isinstance(where, str) or not hasattr(batch, where):
        raise TypeError(
            f"a batch of type {type(batch).__name__} has no {where!r}; pass the place of its labels as labels=, "
            "or pass stand_in="
        )
    value = _fill_labels(getattr(batch, where), ignore_index)
    if dataclasses.is_dataclass(batch):
        return dataclasses.replace(batch, **{where: value})  # type: ignore[type-var]
    changed = copy.copy(batch)
    setattr(changed, where, value)
    return changed


def _fill_labels(labels: Any, ignore_index: int | Mapping[str, int]) -> Any:
    if isinstance(labels, Mapping):
        each = ignore_index if isinstance(ignore_index, Mapping) else dict.fromkeys(labels, ignore_index)
        return {name: _fill_labels(value, each[name]) for name, value in labels.items()}
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"the labels of a batch must be an integer tensor, not {kind}; pass their place as labels=, or pass "
            "stand_in="
        )
    if isinstance(ignore_index, Mapping):
        raise TypeError("ignore_index is a dict, but the labels of a batch are not a dict")
    if labels.dtype == torch.bool or not torch.iinfo(labels.dtype).min <= ignore_index <= torch.iinfo(labels.dtype).max:
        raise TypeError(
            f"labels of {labels.dtype} cannot hold ignore_index, {ignore_index}: make them int64 in the dataset, or "
            "pass stand_in="
        )
    return torch.full_like(labels, ignore_index)
