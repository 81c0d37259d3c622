"""Do all ranks still hold the same? A checksum a step of everything that should be alike, compared every so many steps.

    each step    words [n] of every tensor (its raw bits as int64) ──> sums of 1,024 words ──> mixed with their places ──> one int64 each
                 kept on the device, `every` steps of them; no wait for the device, nothing sent
    every steps  one int64 a step ── all-gather [world, 2, every + 1] ──> on every host: the first step at which a rank is not as others
    if so        the checksums of that step by name, as objects: the first tensor, and which ranks

Integer sums wrap and have no order, so that equal bits have equal checksums on any device, and one changed bit always changes them.
Two kinds of things are compared: what all ranks hold alike, and what ranks of the same shard do in different replicas of a 2-D mesh.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from partial_fc.distributed.agreement import check_same
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import all_gather
from partial_fc.sharded import ShardedLoss
from partial_fc.sharded_module import check_choice
from partial_fc.shards import local_part

log = logging.getLogger("partial_fc")

WORDS = 1024  # words of 8 bytes that are summed before they are mixed
GOLDEN, MIX = -7046029254386353131, -4658895280553007687  # odd 64-bit numbers (the golden ratio; from splitmix64)

ALL, SHARD = 0, 1  # who should hold the same: all ranks, or the ranks of one shard in all replicas


class DivergenceError(RuntimeError):
    """Ranks hold different values of what should be the same on all of them."""


@dataclass(frozen=True)
class Divergence:
    """step: the first at which it was seen. since: the step at which all was still alike; None if it was never seen alike.

    name: the first tensor, in the order of the things that are watched. ranks: those that are not as most are.
    """

    step: int
    since: int | None
    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = ("rank " if len(self.ranks) == 1 else "ranks ") + ", ".join(map(str, self.ranks))
        others = "the others" if len(self.ranks) > 1 or self.ranks[0] != 1 or dist.get_world_size() > 2 else "rank 0"
        began = "the first step that was looked at" if self.since is None else f"after step {self.since} all were alike"
        return f"ranks diverged: at step {self.step} {self.name} on {ranks} is not as on {others} ({began})"


class DivergenceWatch:
    """Watches that ranks stay alike: `watch = DivergenceWatch(backbone, head, every=100)`, and `watch.step()` after each optimizer step.

    Args:
        things: modules, heads and center losses (also within modules), plain optimizers of replicated parameters. Of a module its
            parameters, but not those that an engine has split (FSDP2); of a head what all ranks hold alike (the margin's statistics and
            parameters, the number of training forwards) and, on a 2-D mesh, its rows, which every replica has: under sampling those of
            the last forward; of an optimizer its tensors.
        every: steps between two exchanges; must be the same on all ranks.
        on_divergence: "raise" DivergenceError on every rank, or "log" it once for each name and go on.
        buffers: of modules, too. Running statistics of batch normalisation differ between the ranks of DDP until the next forward, which
            takes those of rank 0, so they are left out unless asked for.
        group: whose ranks are compared; all of them if None. Without a process group nothing is done.

    found: what was seen, by name. The very step is known although only every `every`-th exchanges, because each step's checksums are kept.
    Costs one pass over what is watched a step, and one small all-gather and a wait for the device every `every` steps.
    """

    def __init__(
        self,
        *things: nn.Module | torch.optim.Optimizer,
        every: int = 100,
        on_divergence: Literal["raise", "log"] = "raise",
        buffers: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of steps, at least 1, not {every}")
        check_choice("on_divergence", on_divergence, ("raise", "log"))
        for thing in things:
            if not isinstance(thing, nn.Module | torch.optim.Optimizer):
                raise TypeError(f"a DivergenceWatch takes modules and optimizers, not {type(thing).__name__}")
        self.things, self.every, self.on_divergence, self.buffers = things, every, on_divergence, buffers
        self.group = dist.group.WORLD if group is None and dist.is_initialized() else group
        self.found: dict[str, Divergence] = {}
        self._step = 0
        self._alike: int | None = None  # the last step known to be alike on all ranks
        self._ring: list[_Sums] = []
        check_same("every", every, self.group)

    def step(self, number: int | None = None) -> None:
        """Take the checksums of this step, and compare those since the last exchange if it is time. Every rank must call it.

        number: what the step is called in reports; counted from 1 if None. Raises DivergenceError, the same on every rank.
        """
        if self.group is None:
            return
        self._step = self._step + 1 if number is None else number
        self._ring.append(self._sums())
        if len(self._ring) >= self.every:
            self.compare()

    @torch.no_grad()
    def _sums(self) -> _Sums:
        names: tuple[list[str], list[str]] = ([], [])
        tensors: tuple[list[Tensor], list[Tensor]] = ([], [])
        numbers: dict[str, int] = {}
        for kind, name, value in self._everything():
            if isinstance(value, Tensor):
                names[kind].append(name)
                tensors[kind].append(local_part(value.detach()))
            else:
                numbers[name] = int(value)
        sums = tuple(checksums(each) for each in tensors)
        return _Sums(self._step, names, (sums[0], sums[1]), numbers)

    def compare(self) -> None:
        """Exchange what was taken since the last exchange, and judge it; `step` does it by itself. Every rank must call it."""
        ring, self._ring = self._ring, []
        if self.group is None or not ring:
            return
        device = ring[0].sums[0].device
        mine = torch.stack([sums.combined(device) for sums in ring], 1)  # [2, steps]
        shard = torch.full((2, 1), self._shard(), dtype=torch.int64, device=device)
        table = all_gather(torch.cat((shard, mine), 1), self.group).tolist()
        for i, sums in enumerate(ring):
            for kind in (ALL, SHARD):
                values = [(rank[kind][0] if kind == SHARD else 0, rank[kind][1 + i]) for rank in table]
                if _odd(values):
                    self._report(sums, kind, [where for where, _ in values])
            if not self.found:
                self._alike = sums.step

    def _report(self, sums: _Sums, kind: int, shards: list[int]) -> None:
        """Name what differs at that step: the ranks tell each other all its checksums."""
        mine = dict(zip(sums.names[kind], sums.sums[kind].tolist(), strict=True)) | (
            sums.numbers if kind == ALL else {}
        )
        everyone: list[dict[str, int]] = [{}] * len(shards)
        with naming_the_missing("the comparison of checksums", self.group):
            dist.all_gather_object(everyone, mine, group=self.group)
        for name in dict.fromkeys(name for each in everyone for name in each):
            odd = _odd([(where, each.get(name)) for where, each in zip(shards, everyone, strict=True)])
            if not odd or name in self.found:
                continue
            ranks = tuple(dist.get_global_rank(self.group, rank) if self.group is not None else rank for rank in odd)
            self.found[name] = Divergence(sums.step, self._alike, name, ranks)
            if self.on_divergence == "raise":
                raise DivergenceError(str(self.found[name]))
            log.error("%s", self.found[name])

    # ------------------------------------------------------------------------------------------------ what is watched

    def _shard(self) -> int:
        return next((head.class_rows.shards.ranks.rank for head in self._heads()), 0)

    def _heads(self) -> Iterator[ShardedLoss]:
        return (
            m
            for thing in self.things
            if isinstance(thing, nn.Module)
            for m in thing.modules()
            if isinstance(m, ShardedLoss)
        )

    def _everything(self) -> Iterator[tuple[int, str, Tensor | int]]:
        """(who should hold the same, name, value) in an order that all ranks have."""
        of_heads = {id(t) for head in self._heads() for t in (*head.parameters(), *head.buffers())}
        known: dict[int, str] = {}
        for i, thing in enumerate(self.things):
            if isinstance(thing, nn.Module):
                prefix = "" if i == 0 else f"{type(thing).__name__}."
                for name, module in thing.named_modules():
                    if isinstance(module, ShardedLoss):
                        yield from _of_head(
                            module, f"{prefix}{name}." if name else prefix or f"{type(thing).__name__}."
                        )
                plain: list[Iterable[tuple[str, Tensor]]] = [
                    thing.named_parameters(),
                    thing.named_buffers() if self.buffers else (),
                ]
                for named in plain:
                    for name, tensor in named:
                        if id(tensor) not in of_heads and _is_whole(tensor):
                            known[id(tensor)] = f"{prefix}{name}"
                            yield ALL, f"{prefix}{name}", tensor
        for thing in self.things:
            if isinstance(thing, torch.optim.Optimizer):
                yield from _of_optimizer(thing, known, of_heads)


@dataclass
class _Sums:
    """Of one step: by kind the names, and for each name its checksum [P]; numbers of all ranks, by name."""

    step: int
    names: tuple[list[str], list[str]]
    sums: tuple[Tensor, Tensor]
    numbers: dict[str, int]

    def combined(self, device: torch.device) -> Tensor:
        """int64 `[2]`: one number for all of each kind, their names among them."""
        out = []
        for kind in (ALL, SHARD):
            also = zlib.crc32(repr((self.names[kind], sorted(self.numbers.items()) if kind == ALL else ())).encode())
            places = torch.arange(1, len(self.sums[kind]) + 1, device=device)
            out.append((_mixed(self.sums[kind].to(device)) * (places * 2 + 1)).sum() + also)
        return torch.stack(out)


def _of_head(head: ShardedLoss, prefix: str) -> Iterator[tuple[int, str, Tensor | int]]:
    for name, tensor in (*head._shared_parameters().items(), *head.named_buffers()):
        yield ALL, f"{prefix}{name}", tensor
    yield ALL, f"{prefix}the number of training forwards", getattr(head, "_step", 0)
    yield ALL, f"{prefix}the number of skipped steps", head.skips
    if head.class_rows.shards.ranks.replica_group is None:
        return
    selected = getattr(head, "selected_rows", None)
    for name, parameter in head.class_rows.parameters.items():
        rows = local_part(parameter.detach())
        yield SHARD, f"{prefix}{name}", rows if selected is None else rows.index_select(0, selected)


def _of_optimizer(
    optimizer: torch.optim.Optimizer, known: dict[int, str], of_heads: set[int]
) -> Iterator[tuple[int, str, Tensor | int]]:
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if id(parameter) in of_heads or not _is_whole(parameter):
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and _is_whole(value):
                    yield ALL, f"{key} of {known.get(id(parameter), f'parameter {i}')}", value


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(isinstance(p, Replicate) for p in tensor.placements)


def _odd(values: list[tuple[int, Any]]) -> tuple[int, ...]:
    """Ranks whose value is not that of most with the same key; of equally many, that of the lowest rank counts."""
    groups: dict[int, list[int]] = {}
    for rank, (key, _) in enumerate(values):
        groups.setdefault(key, []).append(rank)
    odd = []
    for ranks in groups.values():
        usual = Counter(values[rank][1] for rank in ranks).most_common(1)[0][0]
        odd += [rank for rank in ranks if values[rank][1] != usual]
    return tuple(sorted(odd))


# ---------------------------------------------------------------------------------------------------- checksums


def checksums(tensors: list[Tensor]) -> Tensor:
    """int64 `[len(tensors)]`: a checksum of the bits of each, in two launches a tensor and a few in all.

    Words are summed by 1,024, the sums mixed, weighted by their places and summed: changes that cancel each other out would have to be
    within the same 1,024 words. The words that are left over count one by one.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    device = tensors[0].device
    rest = torch.zeros(len(tensors), 8 * WORDS, dtype=torch.uint8, device=device)
    parts, counts = [], []
    for row, tensor in zip(rest, tensors, strict=True):
        octets = _octets(tensor)
        count = len(octets) // (8 * WORDS)
        cut = count * 8 * WORDS
        counts.append(count)
        if count:
            parts.append(octets[:cut].view(torch.int64).view(-1, WORDS).sum(1).to(device))
        if cut < len(octets):
            row[: len(octets) - cut] = octets[cut:]
    found = (_mixed(rest.view(torch.int64)) * torch.arange(1, 2 * WORDS, 2, device=device)).sum(1)
    if not parts:
        return found
    sums = _mixed(torch.cat(parts))
    running = (sums * torch.arange(3, 2 * len(sums) + 3, 2, device=device)).cumsum(0)
    running = torch.cat((running.new_zeros(1), running))
    ends = torch.tensor([0, *counts]).cumsum(0).to(device)
    return found + running[ends[1:]] - running[ends[:-1]]


def _octets(tensor: Tensor) -> Tensor:
    """The bytes of a tensor `[n]`, where words of 8 may be read."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    return flat.view(torch.uint8)


def _mixed(values: Tensor) -> Tensor:
    """A one-to-one function of int64 that leaves no trace of small differences."""
    values = (values ^ (values >> 32)) * GOLDEN
    values = (values ^ (values >> 29)) * MIX
    return values ^ (values >> 32)
