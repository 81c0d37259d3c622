"""What the ranks of a head say to each other in a step, measured on the ranks that are there: how long, and what share of the step.

    status [21] int64              all-gather       sizes and what is wrong; waited for by the host
    payload [n, D], [n]            all-gather       embeddings and labels
    statistics [4, N]              all-gather       maximum, sum and target of every sample
    embedding gradient [N, D]      reduce-scatter
    clip norm, flags [3] float64   all-reduce
    backbone gradient [P]          all-reduce       in buckets, as DDP sends them

Each is called as the head calls it (batch/, softmax/), with tensors of the same size, a warm-up and `repeats` times; a rank's median counts,
and of the ranks the slowest. The same with the smallest message is its latency. The head's own work is timed on one rank's share of the
classes, or on a part of it and scaled. Bytes are those of `costs.collectives`.
"""

from __future__ import annotations

import hashlib
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch.exchange import exchange_payload
from partial_fc.batch.status import NO_LABEL, Status
from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.ranks import Ranks, all_gather, all_gather_mesh, start_reduce_scatter
from partial_fc.head import PartialFC
from partial_fc.planning.costs import Collective, Sizes, collectives, sizes
from partial_fc.planning.plan import size

BUCKET = 25 << 20  # bytes of DDP's buckets
MOST_BYTES = 256 << 20  # of class rows in the measurement of the head
MOST_SECONDS = 0.5  # of one of its steps
HINTS = {
    "status": "it is a message of 168 bytes, so that this is latency: more samples a step, or fewer ranks",
    "payload": "embeddings of all samples travel to all ranks: a smaller embedding_size, or fewer ranks that share a head",
    "statistics": "every rank tells 4 numbers a sample: fewer ranks that share a head",
    "embedding gradient": "gradients of all samples travel back: a smaller embedding_size, or fewer ranks that share a head",
    "clip norm": "it is three numbers, so that this is latency: clip every few steps, or not at all",
    "backbone gradient": "accumulate gradients over micro-batches (no_sync), or let DDP send bfloat16 (a communication hook)",
}
INTERFACE = "see that the fast interface is used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


@dataclass(frozen=True)
class Measured:
    """One collective. own, sent, received: bytes of a rank, as in `costs.Collective`; seconds: of a call; latency: of the smallest one."""

    name: str
    own: int
    sent: int
    received: int
    seconds: float
    latency: float

    @property
    def rate(self) -> float:
        """10⁹ bytes a second that a rank sends."""
        return self.sent / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def late(self) -> bool:
        """Whether it is latency rather than bytes that takes the time."""
        return self.latency > self.seconds / 2


@dataclass(frozen=True)
class Comms:
    """What `comms` measured. Seconds of one step of the slowest rank, as if nothing overlapped."""

    arguments: dict[str, Any]
    ranks: int
    nodes: int
    backend: str
    device: str
    collectives: tuple[Measured, ...]
    head_seconds: float  # forward and backward, without communication
    head_rows: int  # rows a rank's step has
    measured_rows: int  # of them in the measurement
    backbone_seconds: float  # 0 where it is not known

    @property
    def step(self) -> float:
        return self.head_seconds + self.backbone_seconds + sum(c.seconds for c in self.collectives)

    def share(self, name: str) -> float:
        """Of a step, of what begins with `name`."""
        return next(c.seconds for c in self.collectives if c.name.startswith(name)) / self.step

    @property
    def bottleneck(self) -> str:
        """What takes the largest part of a step: the name of a collective, "head" or "backbone"."""
        parts = {
            "head": self.head_seconds,
            "backbone": self.backbone_seconds,
            **{c.name: c.seconds for c in self.collectives},
        }
        return max(parts, key=parts.__getitem__)

    @property
    def advice(self) -> str:
        """The bottleneck in words, and what to do about it."""
        name, talk = self.bottleneck, sum(c.seconds for c in self.collectives) / self.step
        if self.ranks == 1:
            return "one rank: nothing is sent"
        if name in ("head", "backbone"):
            seconds = self.head_seconds if name == "head" else self.backbone_seconds
            own = f"the {name}'s own work takes {seconds / self.step:.0%} of the step, communication {talk:.0%}"
            return f"{own}: the network is not the bottleneck" if talk < 0.2 else f"{own}, most of it {self._slowest()}"
        found = next(c for c in self.collectives if c.name == name)
        where = f"between {self.nodes} nodes" if self.nodes > 1 else "within one node"
        speed = f"latency of {found.latency * 1e3:.3g} ms" if found.late else f"network of {found.rate:.2g} GB/s"
        kind = name.split(" (", 1)
        hints = [HINTS[kind[0]]]
        if self.nodes > 1:
            across = [self._across()] if kind[0] in ("payload", "statistics", "embedding gradient") else []
            hints = [INTERFACE, *across, *hints]
        return f"the {kind[1][:-1]} of the {kind[0]} takes {found.seconds / self.step:.0%} of the step: {speed} {where}; {'; or '.join(hints)}"

    def _across(self) -> str:
        """Whether replicas of the head on each node would send less: class gradients instead of embeddings and their gradients."""
        now = sum(c.sent for c in self.collectives if c.name.startswith(("payload", "embedding gradient")))
        then = (
            2 * self.head_rows * (self.nodes - 1) * self.arguments["embedding_size"] * 4
        )  # an all-reduce of nodes times the rows
        instead = f"{_size(then)} of class gradients between nodes instead of {_size(now)} of embeddings"
        if then >= now:
            return f"leave the head sharded over all nodes, as replicas of it would send more ({instead})"
        return f"shard within a node and replicate across nodes (group=a 2-D DeviceMesh of nodes and ranks): {instead}"

    def _slowest(self) -> str:
        found = max(self.collectives, key=lambda c: c.seconds)
        return f"the {found.name} ({found.seconds / self.step:.0%}, {found.rate:.2g} GB/s)"

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        own = asdict(self)
        for one, measured in zip(own["collectives"], self.collectives, strict=True):
            one.update(gigabytes_per_second=measured.rate, share=measured.seconds / self.step)
        shares = {"head": self.head_seconds / self.step, "backbone": self.backbone_seconds / self.step}
        return {
            **own,
            "step_seconds": self.step,
            "shares": shares,
            "bottleneck": self.bottleneck,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        a = self.arguments
        lines = [
            f"C = {a['num_classes']:,} classes, D = {a['embedding_size']:,}, N = {a['batch_size']:,} samples, r = {a['sample_rate']:g}",
            f"{self.ranks} rank{'s' * (self.ranks > 1)} on {self.nodes} node{'s' * (self.nodes > 1)}, {self.backend}, on {self.device}",
            "",
            f"{'a step of a rank':38}{'bytes':>12}{'sent':>12}{'ms':>11}{'latency':>10}{'GB/s':>9}{'share':>8}",
        ]
        for c in self.collectives:
            numbers = f"{c.seconds * 1e3:>11.3f}{c.latency * 1e3:>10.3f}{c.rate:>9.3g}{c.seconds / self.step:>8.1%}"
            lines.append(f"  {c.name:36}{_size(c.own):>12}{_size(c.sent):>12}{numbers}")
        rows = (
            ""
            if self.measured_rows == self.head_rows
            else f", scaled from {self.measured_rows:,} of {self.head_rows:,} rows"
        )
        work = {
            f"head, forward and backward{rows}": self.head_seconds,
            "backbone, forward and backward": self.backbone_seconds,
        }
        for name, seconds in work.items():
            if seconds:
                lines.append(f"  {name:60}{seconds * 1e3:>13.3f}{seconds / self.step:>27.1%}")
        return "\n".join([*lines, f"  {'step, as if nothing overlapped':60}{self.step * 1e3:>13.3f}", "", self.advice])


def comms(
    num_classes: int,
    embedding_size: int,
    batch_size: int,
    sample_rate: float = 1.0,
    *,
    backbone_parameters: int = 0,
    backbone_seconds: float = 0.0,
    device: torch.device | str = "cpu",
    repeats: int = 7,
) -> Comms:
    """Measure the communication of a head's step on all ranks, which must all call it; the same result on every one.

    Args:
        num_classes, embedding_size, sample_rate: as of `PartialFC`.
        batch_size: N, samples of the global batch.
        backbone_parameters: numbers of the backbone's gradient that DDP sums over the ranks, in float32; 0 to leave it out.
        backbone_seconds: of the backbone's forward and backward on a rank, if it is known.
        device: of this rank.
        repeats: calls of each collective; the median counts.

    Raises ValueError for bad arguments.
    """
    for name, value, least in (
        ("num_classes", num_classes, 1),
        ("embedding_size", embedding_size, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if backbone_parameters < 0 or repeats < 1 or not 0 < sample_rate <= 1:
        raise ValueError("backbone_parameters must be at least 0, repeats at least 1, sample_rate a share in (0, 1]")
    ranks, device = ranks_of(None), torch.device(device)
    options = (torch.float32, None, None, False, None, device.type)
    z = sizes(num_classes, embedding_size, ranks.world, batch_size, sample_rate, "sgd-momentum", *options)
    watch = _Watch(ranks, device, repeats)
    measured = []
    for one in planned(z, backbone_parameters):
        kind = one.name.split(" (", 1)[0]
        actual, smallest = _calls(kind, z, one, ranks, device)
        measured.append(
            Measured(one.name, one.own, one.sent, one.received, watch.median(actual), watch.median(smallest))
        )
    seconds, rows = _head_seconds(z, sample_rate, ranks, device, watch)
    arguments = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "batch_size": batch_size,
        "sample_rate": sample_rate,
        "backbone_parameters": backbone_parameters,
    }
    backend = dist.get_backend() if ranks.group is not None else "no process group"
    return Comms(
        arguments,
        ranks.world,
        _nodes(),
        backend,
        device.type,
        tuple(measured),
        seconds,
        z.S,
        rows,
        watch.slowest(backbone_seconds),
    )


def planned(z: Sizes, backbone_parameters: int) -> tuple[Collective, ...]:
    """The collectives of a step: the head's, the norm for clipping, DDP's. None on a single rank."""
    if z.world == 1:
        return ()
    found = [*collectives(z), _all_reduce("clip norm", 24, z.world)]
    if backbone_parameters:
        found.append(_all_reduce("backbone gradient", 4 * backbone_parameters, z.world))
    return tuple(found)


def _all_reduce(name: str, own: int, world: int) -> Collective:
    """In a ring it is a reduce-scatter and an all-gather."""
    moved = 2 * own * (world - 1) // world
    return Collective(f"{name} (all-reduce)", own, moved, moved)


def _calls(
    kind: str, z: Sizes, one: Collective, ranks: Ranks, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(the collective as the head calls it, the same with the smallest message)."""
    world, n = ranks.world, z.N_local
    tiny = torch.zeros(1, device=device)
    if kind == "status":
        row = torch.full((len(fields(Status)),), NO_LABEL, device=device)
        call = lambda: all_gather_mesh(row, ranks).tolist()  # noqa: E731
        return call, call
    if kind == "payload":
        parts = [torch.zeros(n, z.D, device=device), torch.zeros(n, dtype=torch.int64, device=device)]
        return lambda: exchange_payload(parts, (n,) * world, n, ranks.group), lambda: all_gather(tiny, ranks.group)
    if kind == "statistics":
        found = torch.zeros(one.own // 4, device=device)
        return lambda: all_gather(found, ranks.group), lambda: all_gather(tiny, ranks.group)
    if kind == "embedding gradient":
        grad, least = torch.zeros(n * world, z.D, device=device), torch.zeros(world, 1, device=device)
        ones = (1,) * world
        return lambda: start_reduce_scatter(grad, ranks, (n,) * world)(), lambda: start_reduce_scatter(
            least, ranks, ones
        )()
    if kind == "clip norm":
        norm = torch.zeros(3, dtype=torch.float64, device=device)
        call = lambda: dist.all_reduce(norm, group=ranks.group)  # noqa: E731
        return call, call
    assert kind == "backbone gradient"
    buckets = [torch.zeros(count // 4, device=device) for count in _buckets(one.own)]
    return lambda: [dist.all_reduce(bucket, group=ranks.group) for bucket in buckets], lambda: dist.all_reduce(
        tiny, group=ranks.group
    )


def _buckets(total: int) -> list[int]:
    return [min(BUCKET, total - start) for start in range(0, total, BUCKET)]


class _Watch:
    """Times what all ranks do together."""

    def __init__(self, ranks: Ranks, device: torch.device, repeats: int) -> None:
        self.ranks, self.device, self.repeats = ranks, device, repeats

    def median(self, action: Callable[[], object]) -> float:
        """Seconds of the slowest rank's median call, after one that is not counted; all begin together."""
        times = []
        for _ in range(self.repeats + 1):
            self._wait()
            if self.ranks.group is not None:
                dist.barrier(self.ranks.group)
            begin = time.perf_counter()
            action()
            self._wait()
            times.append(time.perf_counter() - begin)
        return self.slowest(statistics.median(times[1:]))

    def slowest(self, seconds: float) -> float:
        return float(all_gather(torch.tensor(seconds, dtype=torch.float64, device=self.device), self.ranks.group).max())

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _head_seconds(z: Sizes, sample_rate: float, ranks: Ranks, device: torch.device, watch: _Watch) -> tuple[float, int]:
    """(seconds of the forward and backward of a rank's rows, rows of a step in the measurement).

    A head over this rank alone, with the whole batch, of which this rank's share of samples has its class here. As many rows as
    `MOST_BYTES` and `MOST_SECONDS` let: work grows with them.
    """
    group = [dist.new_group([r]) for r in range(ranks.world)][ranks.rank] if ranks.group is not None else None
    classes = min(z.C_local, max(1, MOST_BYTES // (4 * z.D)))
    trial = min(classes, 2048)
    seconds = _time_head(z, trial, sample_rate, group, ranks.world, device, watch)
    while trial < classes:
        longer = min(classes, max(trial + 1, int(trial * min(8.0, MOST_SECONDS / max(seconds, 1e-6)))))
        if longer < 1.5 * trial and longer < classes:
            break
        trial, seconds = longer, _time_head(z, longer, sample_rate, group, ranks.world, device, watch)
    if group is not None:
        dist.destroy_process_group(group)
    rows = z.S if trial == z.C_local else max(1, round(z.S * trial / z.C_local))
    return seconds * z.S / rows, rows


def _time_head(
    z: Sizes, classes: int, rate: float, group: Any, world: int, device: torch.device, watch: _Watch
) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    labels = torch.randint(0, classes * world, (z.N,), generator=generator, device="cpu")
    labels = torch.where(labels < classes, labels, -100).to(device)
    embeddings = torch.randn(z.N, z.D, generator=generator, device="cpu").to(device)
    head = PartialFC(z.D, classes, sample_rate=rate, group=group, device=device, dtype=torch.float32)

    def step() -> None:
        x: Tensor = embeddings.detach().requires_grad_()
        head(x, labels).backward()
        head.zero_grad()
        head.class_rows.lost = 0  # no optimizer is to take these

    return watch.median(step)


def _nodes() -> int:
    """How many machines the ranks are on."""
    if not dist.is_initialized():
        return 1
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, hashlib.blake2b(socket.gethostname().encode(), digest_size=8).hexdigest())
    return len(set(names))


def _size(count: int) -> str:
    return f"{count} B" if count < 1024 else size(count)
