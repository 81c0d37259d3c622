"""How rows change owners when classes come and go: from the chunk rule of C classes to that of C' classes, in blocks of rows.

    merge=, drop=         ── class_mapping ──>  mapping [C]
    mapping [C]           new id of each old class, -1 where it is dropped; several old classes with one new id are merged
    Moves                 the old ids that stay, sorted by (new id, old id): rank r of the new split takes a contiguous part of this list
    one block a rank      old owners ── all-to-all ──>  new owner: rows in the order of the list; single ones are copied bit for bit,
                          merged ones are summed in the order of their old ids, whichever rank they come from

Both ends know the list, so nothing but rows travels: one all-to-all a block. A block holds at most `BLOCK_BYTES` on every rank, so what a
move takes beside the old and the new shard does not grow with the number of classes. The list itself is int64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.shards import ClassShards, shard_bounds

BLOCK_BYTES = 8 << 20


Mapped = Tensor | Sequence[int] | Mapping[int, int]


@dataclass(frozen=True)
class Moves:
    """Where M old classes go. old, new: `[M]` int64 on the CPU, sorted by (new, old). share: `[M]` float64 weights of rows in the class
    that they become part of, together 1 in each; None if every new class has one old class at most.
    """

    old: Tensor
    new: Tensor
    share: Tensor | None = None

    @classmethod
    def all_stay(cls, num_classes: int) -> Moves:
        ids = torch.arange(num_classes)
        return cls(ids, ids)

    @classmethod
    def of(cls, mapping: Tensor, weights: Tensor | None = None) -> Moves:
        """From new ids `[C]` (-1: dropped); merged classes count by `weights [C]`, equally without."""
        old = mapping.argsort(stable=True)
        old = old[int((mapping < 0).sum()) :]
        new = mapping[old]
        if not bool((new[1:] == new[:-1]).any()):
            return cls(old, new)
        shares = torch.ones(len(old), dtype=torch.float64) if weights is None else weights.double()[old]
        total = torch.zeros(int(new[-1]) + 1, dtype=torch.float64).index_add_(0, new, shares)
        moves = cls(old, new)
        return cls(old, new, torch.where(moves.first & moves.last, 1.0, shares / total[new]))

    @cached_property
    def first(self) -> Tensor:
        """`[M]`: the lowest old id of its new class."""
        return torch.cat((torch.ones(1, dtype=torch.bool), self.new[1:] != self.new[:-1]))

    @cached_property
    def last(self) -> Tensor:
        """`[M]`: the highest old id of its new class."""
        return torch.cat((self.new[1:] != self.new[:-1], torch.ones(1, dtype=torch.bool)))

    def lowest_only(self) -> Moves:
        """The same, of merged classes the one with the lowest old id alone."""
        return self if self.share is None else Moves(self.old[self.first], self.new[self.first])

    def part(self, lo: int, hi: int) -> tuple[int, int]:
        """Which part of the list goes to new ids `[lo, hi)`."""
        a, b = torch.searchsorted(self.new, torch.tensor([lo, hi])).tolist()
        return a, b

    def merged_into(self, lo: int, hi: int) -> Tensor:
        """New ids in `[lo, hi)` that several old classes became."""
        a, b = self.part(lo, hi)
        return self.new[a:b][self.first[a:b] & ~self.last[a:b]]

    def of_all(self, values: Tensor) -> Tensor:
        """`[C']` of a number for each old class `[C]` that every rank holds."""
        values = values.cpu().double()[self.old]
        values = values if self.share is None else values * self.share
        return torch.zeros(int(self.new[-1]) + 1, dtype=torch.float64).index_add_(0, self.new, values)


def class_mapping(num_classes: int, *, merge: Iterable[Sequence[int]] = (), drop: Iterable[int] = ()) -> Tensor:
    """The `[C]` int64 mapping for `remap` that merges and drops classes and leaves no gaps: new id of each old one, -1 where dropped.

    merge: groups of ids, such as `[(5, 9), (1, 7, 8)]`; a group takes the place of its first id. drop: ids. All others keep their order.
    Labels follow by `mapping[labels]`. Raises ValueError for an id that is out of range or named twice.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    goes_to: dict[int, int] = {}
    groups = [[int(i) for i in group] for group in merge]
    for ids, to in [*((group, group[0] if group else 0) for group in groups), ([int(i) for i in drop], -1)]:
        if not ids and to >= 0:
            raise ValueError("merge has a group without classes")
        for i in ids:
            if not 0 <= i < num_classes:
                raise ValueError(f"there is no class {i} to merge or drop; valid are 0 to {num_classes - 1}")
            if i in goes_to:
                raise ValueError(f"class {i} is named twice in merge and drop")
            goes_to[i] = to
    target = torch.arange(num_classes)
    if goes_to:
        target[torch.tensor(list(goes_to))] = torch.tensor(list(goes_to.values()))
    stays = target == torch.arange(num_classes)
    if not stays.any():
        raise ValueError(f"all {num_classes} classes are dropped; at least one must stay")
    return torch.where(target < 0, -1, (stays.cumsum(0) - 1)[target])


def new_ids(mapping: Mapped, num_classes: int) -> Tensor:
    """`[C]` int64 on the CPU, without gaps; ValueError for anything else."""
    if isinstance(mapping, Mapping):
        missing = next((i for i in range(num_classes) if i not in mapping), None)
        if missing is not None or len(mapping) != num_classes:
            what = f"{missing} is missing" if missing is not None else f"it has {len(mapping)} entries"
            raise ValueError(
                f"mapping as a dict must name every old class, 0 to {num_classes - 1}, and no other: {what}"
            )
        mapping = [mapping[i] for i in range(num_classes)]
    ids = torch.as_tensor(mapping)
    if ids.shape != (num_classes,) or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"mapping must be a whole number for each of {num_classes} classes, not {list(ids.shape)} {ids.dtype}"
        )
    ids = ids.detach().cpu().long()
    bad = (ids < -1).nonzero()
    if len(bad):
        raise ValueError(
            f"mapping[{int(bad[0])}] is {int(ids[bad[0]])}; a new id is at least 0, or -1 for a class that is dropped"
        )
    distinct = ids[ids >= 0].unique()
    if not len(distinct):
        raise ValueError(f"mapping drops all {num_classes} classes; at least one must stay")
    gap = (distinct != torch.arange(len(distinct))).nonzero()
    if len(gap):
        raise ValueError(
            f"mapping has no class with the new id {int(gap[0])}, but one with {int(distinct[-1])}: new ids must be 0 to C' - 1 "
            "without gaps; partial_fc.class_mapping(num_classes, merge=..., drop=...) makes such a mapping"
        )
    return ids


def moves_of(mapping: Tensor, merge: str, weights: Any) -> Moves:
    if merge not in ("mean", "first"):
        raise ValueError(f"merge must be one of mean, first, not {merge!r}")
    if weights is not None:
        if merge == "first":
            raise ValueError('weights are for merge="mean"; "first" takes the lowest old id alone')
        weights = torch.as_tensor(weights).detach().cpu()
        if weights.shape != mapping.shape:
            raise ValueError(
                f"weights must be one number for each of {len(mapping)} classes, not {list(weights.shape)}"
            )
        bad = (~weights.double().isfinite() | (weights < 0)).nonzero()
        if len(bad):
            raise ValueError(
                f"weights[{int(bad[0])}] is {weights[int(bad[0])].item()}; a weight is a number of at least 0"
            )
    moves = Moves.of(mapping, weights)
    if moves.share is not None and bool((empty := moves.share.isnan()).any()):
        at = moves.new[empty][0]
        together = moves.old[moves.new == at].tolist()
        raise ValueError(f"weights of the classes {together} that are merged are all 0; at least one must be more")
    return moves if merge == "mean" else moves.lowest_only()


# ---------------------------------------------------------------------------------------------------- rows


def move_rows(local: Tensor, moves: Moves, before: ClassShards, after: ClassShards) -> Tensor:
    """This rank's rows `[C'_local, ...]` after `moves`, from its rows `[C_local, ...]`; every rank of the group must call it.

    Rows of new ids that no old class moves to are not initialised. Merged rows are summed in float32 or better.
    """
    if not local.is_floating_point():
        moves = moves.lowest_only()
    out = local.new_empty(after.local, *local.shape[1:])
    world, rank = after.ranks.world, after.ranks.rank
    parts = [moves.part(*shard_bounds(after.num_classes, r, world)) for r in range(world)]
    block = max(1, BLOCK_BYTES // max(1, local[:0].new_empty(1, *local.shape[1:]).nbytes) // world)
    arrivals = _Arrivals(out, moves, after.lo)
    for start in range(0, max(b - a for a, b in parts), block):
        wanted = [(min(a + start, b), min(a + start + block, b)) for a, b in parts]
        rows = _exchange_rows(local, [moves.old[a:b] for a, b in wanted], before, rank)
        arrivals.take(rows, *wanted[rank])
    return out


def _exchange_rows(local: Tensor, wanted: list[Tensor], before: ClassShards, rank: int) -> Tensor:
    """Rows of the old ids `wanted[rank]`, in that order; wanted: old ids for each rank, of which each owner sends its own."""
    if before.ranks.group is None:
        return local.index_select(0, wanted[rank].to(local.device))
    sent = [ids[(ids >= before.lo) & (ids < before.hi)] - before.lo for ids in wanted]
    chunk = shard_bounds(before.num_classes, 0, len(wanted))[1]
    owners = wanted[rank] // chunk
    counts = torch.bincount(owners, minlength=len(wanted)).tolist()
    rows = local.index_select(0, torch.cat(sent).to(local.device))
    received = rows.new_empty(len(owners), *rows.shape[1:])
    each = max(1, rows[:0].new_empty(1, *rows.shape[1:]).nbytes)
    # as bytes, which every backend knows
    with naming_the_missing("the move of class rows", before.ranks.group):
        dist.all_to_all_single(
            received.view(-1).view(torch.uint8),
            rows.view(-1).view(torch.uint8),
            [count * each for count in counts],
            [len(ids) * each for ids in sent],
            group=before.ranks.group,
        )
    # it came in the order of the owners
    return received.index_select(0, owners.argsort(stable=True).argsort().to(local.device))


class _Arrivals:
    """Puts rows, as they arrive in the order of the list, in their places; remembers a class whose rows are not all there yet."""

    def __init__(self, out: Tensor, moves: Moves, lo: int) -> None:
        self.out, self.moves, self.lo = out, moves, lo
        self.unfinished: Tensor | None = None  # [1, ...] in the dtype of sums

    def take(self, rows: Tensor, a: int, b: int) -> None:
        """`rows [b - a, ...]`: those of places a to b of the list."""
        places = (self.moves.new[a:b] - self.lo).to(rows.device)
        if self.moves.share is None:
            self.out.index_copy_(0, places, rows)
            return
        single = self.moves.first[a:b] & self.moves.last[a:b]
        alone = single.nonzero()[:, 0].to(rows.device)
        self.out.index_copy_(0, places[alone], rows.index_select(0, alone))
        merged = (~single).nonzero()[:, 0]
        if len(merged):
            self._add(rows, places, merged, a)

    def _add(self, rows: Tensor, places: Tensor, merged: Tensor, a: int) -> None:
        moves, device = self.moves, rows.device
        assert moves.share is not None
        first = moves.first[a + merged]
        begins = bool(first[0])
        group = first.cumsum(0) - int(begins)
        count = int(group[-1]) + 1
        sums = rows.new_zeros(count, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
        if not begins:
            assert self.unfinished is not None
            sums[:1] = self.unfinished
        starts = torch.searchsorted(group, torch.arange(count))
        turn = torch.arange(len(merged)) - starts[group]
        shares = moves.share[a + merged].to(device, sums.dtype).view(-1, *[1] * (rows.ndim - 1))
        for k in range(
            int(turn.max()) + 1
        ):  # the k-th row of each class: no two of one class at a time, so the order is the list's
            now = (turn == k).nonzero()[:, 0]
            here = merged[now].to(device)
            sums.index_add_(
                0, group[now].to(device), rows.index_select(0, here).to(sums.dtype) * shares[now.to(device)]
            )
        done = count if bool(moves.last[a + merged[-1]]) else count - 1
        self.out.index_copy_(0, places[merged[starts[:done]].to(device)], sums[:done].to(self.out.dtype))
        self.unfinished = None if done == count else sums[done:]
