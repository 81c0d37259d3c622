"""Where each class goes when classes are dropped, merged and renumbered.

merge=, drop=     ── class_mapping ──>      mapping [C]: the new id of each old class, -1 to drop it
mapping [C]       ── validate_mapping ──>   the same as a tensor, without gaps
mapping, weights  ── class_moves ──>        ClassMoves: the old ids that stay, sorted by (new id, old id)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.given import whole

Mapped = Tensor | Sequence[int] | Mapping[int, int]


@dataclass(frozen=True)
class ClassMoves:
    """The new ids of M old classes.

    old, new: `[M]` int64 on the CPU, sorted by (new, old). share: `[M]` float64, the weight of each row in its merged
    row, with sum 1 per new class; None if no classes are merged.
    """

    old: Tensor
    new: Tensor
    share: Tensor | None = None

    @classmethod
    def identity(cls, num_classes: int) -> ClassMoves:
        """All classes keep their ids."""
        ids = torch.arange(num_classes, device="cpu")
        return cls(ids, ids)

    @classmethod
    def of(cls, mapping: Tensor, weights: Tensor | None = None) -> ClassMoves:
        """Build from new ids `[C]` (-1: dropped). weights: `[C]`, of merged classes; equal if None."""
        old = mapping.argsort(stable=True)
        old = old[int((mapping < 0).sum()) :]
        new = mapping[old]
        if not bool((new[1:] == new[:-1]).any()):
            return cls(old, new)
        shares = torch.ones(len(old), dtype=torch.float64, device="cpu") if weights is None else weights.double()[old]
        total = shares.new_zeros(int(new[-1]) + 1).index_add_(0, new, shares)
        moves = cls(old, new)
        return cls(old, new, torch.where(moves.first & moves.last, 1.0, shares / total[new]))

    @cached_property
    def first(self) -> Tensor:
        """`[M]`: whether it has the lowest old id of its new class."""
        return torch.nn.functional.pad(self.new[1:] != self.new[:-1], (1, 0), value=True)

    @cached_property
    def last(self) -> Tensor:
        """`[M]`: whether it has the highest old id of its new class."""
        return torch.nn.functional.pad(self.new[1:] != self.new[:-1], (0, 1), value=True)

    def lowest_only(self) -> ClassMoves:
        """Return the moves without merging: of merged classes only the lowest old id stays."""
        return self if self.share is None else ClassMoves(self.old[self.first], self.new[self.first])

    def part(self, lo: int, hi: int) -> tuple[int, int]:
        """Return (a, b): entries [a, b) go to new ids `[lo, hi)`."""
        a, b = torch.searchsorted(self.new, torch.tensor([lo, hi], device="cpu")).tolist()
        return a, b

    def merged_into(self, lo: int, hi: int) -> Tensor:
        """Return the new ids in `[lo, hi)` that several old classes are merged into."""
        a, b = self.part(lo, hi)
        return self.new[a:b][self.first[a:b] & ~self.last[a:b]]

    def of_all(self, values: Tensor) -> Tensor:
        """Return `[C']` from one number per old class, `[C]`; merged classes get their weighted mean."""
        values = values.cpu().double()[self.old]
        values = values if self.share is None else values * self.share
        return values.new_zeros(int(self.new[-1]) + 1).index_add_(0, self.new, values)


def class_mapping(num_classes: int, *, merge: Iterable[Sequence[int]] = (), drop: Iterable[int] = ()) -> Tensor:
    """Return a mapping for `remap` that merges and drops classes: `[C]` int64, the new id of each class, -1 if dropped.

    Args:
        num_classes: C, classes before.
        merge: groups of ids, such as `[(5, 9), (1, 7, 8)]`; each group becomes one class, at the place of its first id.
        drop: ids. All other classes keep their order, and new ids have no gaps.

    `mapping[labels]` converts labels. Raises ValueError for an id that is out of range or named twice.
    """
    num_classes = whole("num_classes", num_classes, least=1)
    goes_to: dict[int, int] = {}  # id -> first id of its group, or -1
    groups = [[whole("a class in merge", i) for i in group] for group in merge]
    dropped = [whole("a class in drop", i) for i in drop]
    for ids, to in [*((group, group[0] if group else 0) for group in groups), (dropped, -1)]:
        if not ids and to >= 0:
            raise ValueError("merge has an empty group")
        for i in ids:
            if not 0 <= i < num_classes:
                raise ValueError(f"class {i} in merge or drop is out of range; valid are 0 to {num_classes - 1}")
            if i in goes_to:
                raise ValueError(f"class {i} is named twice in merge and drop")
            goes_to[i] = to
    own = torch.arange(num_classes, device="cpu")
    target = own.clone()
    if goes_to:
        target[torch.tensor(list(goes_to), device="cpu")] = torch.tensor(list(goes_to.values()), device="cpu")
    stays = target == own
    if not stays.any():
        raise ValueError(f"all {num_classes} classes are dropped; at least one must stay")
    return torch.where(target < 0, -1, (stays.cumsum(0) - 1)[target])


def validate_mapping(mapping: Mapped, num_classes: int) -> Tensor:
    """Return the mapping as `[C]` int64 on the CPU. ValueError unless new ids are 0 to C' - 1 without gaps."""
    if isinstance(mapping, Mapping):
        missing = next((i for i in range(num_classes) if i not in mapping), None)
        if missing is not None or len(mapping) != num_classes:
            what = f"{missing} is missing" if missing is not None else f"it has {len(mapping)} entries"
            raise ValueError(f"the keys of a mapping must be the old classes, 0 to {num_classes - 1}: {what}")
        mapping = [mapping[i] for i in range(num_classes)]
    ids = torch.as_tensor(mapping, device="cpu")
    if ids.shape != (num_classes,) or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"mapping must have one integer for each of {num_classes} classes, not {list(ids.shape)} {ids.dtype}"
        )
    ids = ids.detach().cpu().long()
    bad = (ids < -1).nonzero()
    if len(bad):
        raise ValueError(
            f"mapping[{int(bad[0])}] is {int(ids[bad[0]])}; a new id must be at least 0, or -1 to drop the class"
        )
    distinct = ids[ids >= 0].unique()
    if not len(distinct):
        raise ValueError(f"mapping drops all {num_classes} classes; at least one must stay")
    gap = (distinct != torch.arange(len(distinct), device="cpu")).nonzero()
    if len(gap):
        raise ValueError(
            f"mapping has no new id {int(gap[0])}, but has {int(distinct[-1])}: new ids must be 0 to C' - 1 without "
            "gaps; partial_fc.class_mapping(num_classes, merge=..., drop=...) builds such a mapping"
        )
    return ids


def class_moves(mapping: Tensor, merge: str, weights: Any) -> ClassMoves:
    """Return the moves of a validated mapping; ValueError for a wrong `merge` or `weights` of `remap`."""
    if merge not in ("mean", "first"):
        raise ValueError(f"merge must be one of mean, first, not {merge!r}")
    if weights is not None:
        if merge == "first":
            raise ValueError('weights need merge="mean"; merge="first" takes the lowest old id')
        weights = torch.as_tensor(weights, device="cpu").detach()
        if weights.shape != mapping.shape:
            raise ValueError(
                f"weights must have one number for each of {len(mapping)} classes, not {list(weights.shape)}"
            )
        bad = (~weights.double().isfinite() | (weights < 0)).nonzero()
        if len(bad):
            raise ValueError(
                f"weights[{int(bad[0])}] is {weights[int(bad[0])].item()}; a weight must be finite and at least 0"
            )
    moves = ClassMoves.of(mapping, weights)
    if moves.share is not None and bool((undefined := moves.share.isnan()).any()):
        at = moves.new[undefined][0]
        merged = moves.old[moves.new == at].tolist()
        raise ValueError(f"the weights of the merged classes {merged} are all 0; at least one must be positive")
    return moves if merge == "mean" else moves.lowest_only()
