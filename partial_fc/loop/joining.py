"""Ranks whose data end at different times: those that have ended go on with stand-ins until all have.

    for images, labels in JoinedBatches(loader):          every rank gets as many batches as the rank with the most
        loss = head(model(images), labels)                the same loop as before, backward and steps included

    each step   one exchange of one number a rank: who still has a batch (1), has none any more (0), never had one (3), or failed (2)
    who has     gives its batch
    who has not gives its last batch again with every label ignore_index: backbone, DistributedDataParallel and the head's collectives
                run on, but no gradient comes of it; a rank that never had a batch gets one of another rank's, once
    at the end  no rank has a batch: all leave the loop at the same step

The head's loss is the mean over the valid samples of the global batch, so that the step is that of one process with the samples there are,
whichever ranks hold them. torch's `Join` does this for DistributedDataParallel alone: it repeats its reductions on ranks that have ended,
and cannot know the head's collectives between them.
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

from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import Group, Ranks, all_gather_mesh
from partial_fc.distributed.texts import gather_texts

Batch = TypeVar("Batch")

ENDED, HAS, FAILED, NEVER_HAD = range(4)
WHO = "the question who still has a batch (JoinedBatches)"


class JoinedBatches(Generic[Batch]):
    """Batches of this rank, then stand-ins until no rank has any more; every rank must walk over it.

    Args:
        loader: this rank's batches, as many as it has; none is allowed.
        labels: where a batch has its labels: a place in a tuple or list, a key, or the name of an attribute. By default the last one of a
            tuple or list, else "labels". They are an integer tensor, or a dict of them (`gather` with labels by name).
        ignore_index: of the head; of several heads by name a dict.
        stand_in: makes the stand-in of a batch in another way than by its labels.
        group: ranks that train together, as for the head; None for all.

    ended: whether the batch given last is a stand-in, for what else a loop does with batches (counts, other losses).

    One small collective a step, whose answer the host waits for. Without a process group batches pass through. Raises the same RuntimeError
    on every rank if one's loader raises, naming the rank; TypeError or KeyError in there mean that the labels were not found.

    A stand-in goes through the backbone: batch statistics (BatchNorm) of a rank that has ended see its last batch again, and the random
    numbers of its dropout are used up. Batches must not be changed in place.
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
        self.loader, self.group, self.ended = loader, group, False
        self._make = stand_in or (lambda batch: _ignored(batch, labels, ignore_index))

    def __iter__(self) -> Iterator[Batch]:
        ranks, iterator = ranks_of(self.group), iter(self.loader)
        if ranks.group is None:
            self.ended = False
            yield from iterator
            return
        device = device_of(ranks)
        last: Batch | None = None  # this rank's last batch, then its stand-in
        over = False
        while True:
            batch, failure = None, None
            try:
                batch = None if over else next(iterator, None)
                if batch is not None and last is None:
                    self._make(
                        batch
                    )  # whether the labels are found must be known on all ranks before one needs a stand-in
                if batch is None and not over and last is not None:
                    last = self._make(last)
            except Exception as error:
                failure = error
            state = (
                FAILED
                if failure is not None
                else HAS
                if batch is not None
                else ENDED
                if last is not None
                else NEVER_HAD
            )
            everyone = all_gather_mesh(torch.tensor([state], device=device), ranks, WHO).flatten().tolist()
            if FAILED in everyone:
                told = gather_texts("" if failure is None else f"{type(failure).__name__}: {failure}", ranks, device)
                flat = everyone.index(FAILED)
                raise RuntimeError(f"{ranks.name(flat)} has no next batch, its data raised {told[flat]}") from failure
            if HAS not in everyone:
                return
            over = self.ended = batch is None
            if NEVER_HAD in everyone:
                another = _from_rank(batch, everyone.index(HAS), ranks, device)
                last = self._make(another) if last is None and batch is None else last
            if batch is not None:
                last = batch
            yield batch if batch is not None else last  # type: ignore[misc]


def device_of(ranks: Ranks) -> torch.device:
    """Where tensors must be for the group's collectives: the CPU, or the current GPU under NCCL."""
    assert ranks.group is not None
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(ranks.group) == "nccl"
        else torch.device("cpu")
    )


def _from_rank(batch: Any, flat: int, ranks: Ranks, device: torch.device) -> Any:
    """The batch of the `flat`-th rank, on every rank; its tensors on the CPU or on this rank's GPU, as they were there."""
    buffer = io.BytesIO()
    own = flat == ranks.replica * ranks.world + ranks.rank
    if own:
        torch.save(batch, buffer)
    length = _from(torch.tensor([len(buffer.getvalue())], device=device), flat, ranks)
    mine = (
        torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        if own
        else torch.empty(int(length), dtype=torch.uint8)
    )
    received = _from(mine.to(device), flat, ranks)
    if own:
        return batch
    place = lambda storage, where: storage if where == "cpu" else storage.to(device=device)  # noqa: E731
    content = bytearray(len(received))
    torch.frombuffer(content, dtype=torch.uint8).copy_(received)
    return torch.load(io.BytesIO(content), map_location=place, weights_only=False)


def _from(tensor: Tensor, flat: int, ranks: Ranks) -> Tensor:
    """The tensor of the `flat`-th rank, in the place of each rank's own: over its replica, then across the replicas."""
    replica, rank = divmod(flat, ranks.world)
    for group, source, takes_part in (
        (ranks.group, rank, ranks.replica == replica),
        (ranks.replica_group, replica, ranks.replica_group is not None),
    ):
        if takes_part:
            assert group is not None
            with naming_the_missing("the exchange of a stand-in (JoinedBatches)", group):
                dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)
    return tensor


def _ignored(batch: Any, where: int | str | None, ignore_index: int | Mapping[str, int]) -> Any:
    """The same batch with labels that take no part; the batch itself stays as it is."""
    if where is None:
        where = -1 if isinstance(batch, tuple | list) else "labels"
    if isinstance(batch, tuple | list):
        if not isinstance(where, int):
            raise TypeError(f"labels={where!r} names no place in a {type(batch).__name__}; give a number")
        parts = list(batch)
        parts[where] = _filled(parts[where], ignore_index)
        if isinstance(batch, list):
            return parts
        return type(batch)._make(parts) if hasattr(batch, "_make") else tuple(parts)
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)
        changed[where] = _filled(batch[where], ignore_index)
        return changed
    if not isinstance(where, str) or not hasattr(batch, where):
        raise TypeError(
            f"a batch of type {type(batch).__name__} has no {where!r}; say where its labels are, or give stand_in"
        )
    value = _filled(getattr(batch, where), ignore_index)
    if dataclasses.is_dataclass(batch):
        return dataclasses.replace(batch, **{where: value})  # type: ignore[type-var]
    changed = copy.copy(batch)
    setattr(changed, where, value)
    return changed


def _filled(labels: Any, ignore_index: int | Mapping[str, int]) -> Any:
    if isinstance(labels, Mapping):
        each = ignore_index if isinstance(ignore_index, Mapping) else dict.fromkeys(labels, ignore_index)
        return {name: _filled(value, each[name]) for name, value in labels.items()}
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"the labels of a batch must be an integer tensor, not {kind}; say where they are (labels=), or give stand_in"
        )
    if isinstance(ignore_index, Mapping):
        raise TypeError("ignore_index is a dict, but the labels of a batch are not")
    return torch.full_like(labels, ignore_index)
