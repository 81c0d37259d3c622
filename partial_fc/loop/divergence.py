"""Check that ranks still hold the same values: one checksum per step, compared every so many steps.

    each step     every replicated tensor ── checksums ──> int64 each ── combine ──> one int64 per step, kept on
                  the device for `every` steps; no wait, nothing is sent
    every steps   these numbers ── all-gather [world, 2, every + 1] ──> the first step at which ranks differ
    if so         the checksums of that step by name, as objects ──> the first tensor that differs, and the ranks

Two kinds of values are compared (`ALL`, `SHARD`): those that are the same on all ranks, and those that are the same on
the ranks of one shard in different replicas of a 2-D mesh.
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
from partial_fc.distributed.given import as_whole, whole
from partial_fc.distributed.groups import device_of, ranks_of
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.objects import gather_objects
from partial_fc.distributed.ranks import all_gather
from partial_fc.distributed.shards import local_part
from partial_fc.loop.checksums import checksums, mixed
from partial_fc.sharded import ShardedLoss
from partial_fc.sharded_module import check_choice

log = logging.getLogger("partial_fc")

ALL = 0  # the same on all ranks
SHARD = 1  # the same on the ranks of one shard in all replicas


class DivergenceError(RuntimeError):
    """Ranks hold different values of something that should be the same on all of them."""


@dataclass(frozen=True)
class Divergence:
    """A difference between ranks.

    step: the first step at which it was seen. since: the last step at which all values were equal, None if they never
    were. name: the first tensor that differs, in the order of the watched objects. ranks: the ranks that differ from
    most others.
    """

    step: int
    since: int | None
    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = ("rank " if len(self.ranks) == 1 else "ranks ") + ", ".join(map(str, self.ranks))
        only_rank_1 = self.ranks == (1,) and dist.get_world_size() == 2
        others = "rank 0" if only_rank_1 else "the other ranks"
        before = (
            "no earlier step was equal on all ranks"
            if self.since is None
            else f"all ranks were equal at step {self.since}"
        )
        return f"ranks diverged: at step {self.step} {self.name} on {ranks} differs from {others} ({before})"


class DivergenceWatch:
    """Detect ranks that diverge: `watch = DivergenceWatch(backbone, head, every=100)`, then `watch.step()` per step.

    Call `watch.step()` after the optimizers' steps.

    Args:
        things: modules, heads and center losses (also inside modules), and plain optimizers of replicated parameters.
            Of a module, its parameters are compared, except those that an engine has sharded (FSDP2); of a head, all
            replicated state (statistics and parameters of the margin, the forward count) and, on a 2-D mesh, the rows
            of its replicas (with sampling, those of the last forward); of an optimizer, its tensors.
        every: number of steps between comparisons; must be the same on all ranks.
        on_divergence: "raise" DivergenceError on every rank, or "log" it once per name and continue.
        buffers: also compare buffers of modules. The default is False, because running statistics of batch
            normalization differ between the ranks of DDP until the next forward, which broadcasts those of rank 0.
        group: the ranks to compare; None for all. Does nothing without a process group.

    Attributes:
        found: the differences found, by name.

    The exact step is known, because the checksums of every step are kept until the comparison. The cost is one pass
    over the watched tensors per step, and one small all-gather and a wait for the device every `every` steps.
    """

    def __init__(
        self,
        *things: nn.Module | torch.optim.Optimizer,
        every: int = 100,
        on_divergence: Literal["raise", "log"] = "raise",
        buffers: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_choice("on_divergence", on_divergence, ("raise", "log"))
        for thing in things:
            if not isinstance(thing, nn.Module | torch.optim.Optimizer):
                raise TypeError(f"a DivergenceWatch takes modules and optimizers, not {type(thing).__name__}")
            if hasattr(thing, "class_rows") and isinstance(thing, torch.optim.Optimizer):
                raise TypeError(
                    "the state of a RowOptimizer is split over the ranks, which have nothing in common to compare: "
                    "give the DivergenceWatch its head"
                )
        self.things = things
        self.on_divergence = on_divergence
        self.buffers = buffers
        self.group = dist.group.WORLD if group is None and dist.is_initialized() else group
        self.found: dict[str, Divergence] = {}
        self._step = 0
        self._last_equal: int | None = None  # the last step known to be equal on all ranks
        self._recorded: list[_StepSums] = []
        steps = as_whole(every)
        check_same("every", repr(every) if steps is None else steps, self.group)
        if steps is None or steps < 1:
            raise ValueError(f"every must be at least 1 step, not {every!r}")
        self.every = steps

    def step(self, number: int | None = None) -> None:
        """Record the checksums of this step; every `every` steps, compare the recorded ones. Every rank must call it.

        number: of the step, in messages; counted from 1 if None. Raises DivergenceError, the same on every rank.
        """
        if self.group is None:
            return
        self._step = self._step + 1 if number is None else whole("number", number)
        self._recorded.append(self._sums())
        if len(self._recorded) >= self.every:
            self.compare()

    @torch.no_grad()
    def _sums(self) -> _StepSums:
        names: tuple[list[str], list[str]] = ([], [])
        tensors: tuple[list[Tensor], list[Tensor]] = ([], [])
        numbers: dict[str, int] = {}
        for kind, name, value in self._watched():
            if isinstance(value, Tensor):
                names[kind].append(name)
                tensors[kind].append(local_part(value.detach()))
            else:
                numbers[name] = int(value)
        sums = tuple(checksums(each) for each in tensors)
        return _StepSums(self._step, names, (sums[0], sums[1]), numbers)

    def compare(self) -> None:
        """Compare the checksums recorded since the last comparison; `step` calls it. Every rank must call it."""
        recorded, self._recorded = self._recorded, []
        if self.group is None or not recorded:
            return
        ranks = ranks_of(self.group)
        device = device_of(ranks)  # what is watched may be elsewhere, or nothing but numbers
        steps = meet("the comparison of checksums", ranks, device, (len(recorded),))
        if any(count != steps[0] for count in steps):
            raise ValueError(
                "ranks have called step() of a DivergenceWatch different numbers of times since the last comparison: "
                f"{', '.join(str(count) for (count,) in steps)}; every rank must call it once a training step"
            )
        there = next((s.device for each in recorded for s in each.sums if s.device.type != "cpu"), device)
        mine = torch.stack([sums.combined(there) for sums in recorded], 1).to(device)  # [2, steps]
        shard = torch.full((2, 1), self._shard(), dtype=torch.int64, device=device)
        table = all_gather(torch.cat((shard, mine), 1), self.group).tolist()
        for i, sums in enumerate(recorded):
            for kind in (ALL, SHARD):
                values = [(rank[kind][0] if kind == SHARD else 0, rank[kind][1 + i]) for rank in table]
                if _differing(values):
                    self._report(sums, kind, [key for key, _ in values])
            if not self.found:
                self._last_equal = sums.step

    def _report(self, sums: _StepSums, kind: int, shards: list[int]) -> None:
        """Find the tensors that differ at that step: gather all its checksums. shards: the shard of each rank, or 0."""
        mine = dict(zip(sums.names[kind], sums.sums[kind].tolist(), strict=True)) | (
            sums.numbers if kind == ALL else {}
        )
        everyone = gather_objects(mine, "the comparison of checksums", self.group)
        for name in dict.fromkeys(name for each in everyone for name in each):
            differing = _differing([(shard, each.get(name)) for shard, each in zip(shards, everyone, strict=True)])
            if not differing or name in self.found:
                continue
            ranks = tuple(
                dist.get_global_rank(self.group, rank) if self.group is not None else rank for rank in differing
            )
            self.found[name] = Divergence(sums.step, self._last_equal, name, ranks)
            if self.on_divergence == "raise":
                raise DivergenceError(str(self.found[name]))
            log.error("%s", self.found[name])

    # ------------------------------------------------------------------------------------------------ watched values

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

    def _watched(self) -> Iterator[tuple[int, str, Tensor | int]]:
        """Yield (ALL or SHARD, name, value), in the same order on all ranks."""
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
                        if id(tensor) not in of_heads and _is_replicated(tensor):
                            known[id(tensor)] = f"{prefix}{name}"
                            yield ALL, f"{prefix}{name}", tensor
        for thing in self.things:
            if isinstance(thing, torch.optim.Optimizer):
                yield from _of_optimizer(thing, known, of_heads)


@dataclass
class _StepSums:
    """The checksums of one step.

    names, sums: for each kind, the names and checksums `[P]` of its tensors. numbers: plain numbers of kind ALL.
    """

    step: int
    names: tuple[list[str], list[str]]
    sums: tuple[Tensor, Tensor]
    numbers: dict[str, int]

    def combined(self, device: torch.device) -> Tensor:
        """Return int64 `[2]`: one checksum per kind, of all its names, numbers and checksums."""
        out = []
        for kind in (ALL, SHARD):
            numbers = sorted(self.numbers.items()) if kind == ALL else ()
            names = zlib.crc32(repr((self.names[kind], numbers)).encode())
            places = torch.arange(1, len(self.sums[kind]) + 1, device=device)
            out.append((mixed(self.sums[kind].to(device)) * (places * 2 + 1)).sum() + names)
        return torch.stack(out)


def _of_head(head: ShardedLoss, prefix: str) -> Iterator[tuple[int, str, Tensor | int]]:
    for name, tensor in (*head.class_rows.shared.items(), *head.named_buffers()):
        yield ALL, f"{prefix}{name}", tensor
    yield ALL, f"{prefix}forward count", getattr(head, "forward_count", 0)
    yield ALL, f"{prefix}number of skipped steps", head.skips
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
            if id(parameter) in of_heads or not _is_replicated(parameter):
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and _is_replicated(value):
                    yield ALL, f"{key} of {known.get(id(parameter), f'parameter {i}')}", value


def _is_replicated(tensor: Tensor) -> bool:
    """Whether every rank holds all of the tensor."""
    return not isinstance(tensor, DTensor) or all(isinstance(p, Replicate) for p in tensor.placements)


def _differing(values: list[tuple[int, Any]]) -> tuple[int, ...]:
    """Return the ranks whose value differs from the most common one with the same key; ties go to the lowest rank.

    values: (key, value) of each rank.
    """
    groups: dict[int, list[int]] = {}
    for rank, (key, _) in enumerate(values):
        groups.setdefault(key, []).append(rank)
    differing = []
    for ranks in groups.values():
        usual = Counter(values[rank][1] for rank in ranks).most_common(1)[0][0]
        differing += [rank for rank in ranks if values[rank][1] != usual]
    return tuple(sorted(differing))
