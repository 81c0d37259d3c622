"""The communication of a head's step, measured on the launched ranks: how long it takes, and what share of the step.

    status [24] int64              all-gather       sizes, and what is wrong with the batch; the host waits for it
    payload [n, D], [n]            all-gather       embeddings and labels
    statistics [3, N]              all-gather       sum, target and its cosine of every sample; of many ranks all-reduce
    embedding gradient [N, D]      reduce-scatter
    clip norm, flags [4] float64   all-reduce
    backbone gradient [P]          all-reduce       in buckets, as DDP sends them

Each is called as the head calls it (batch/, softmax/), with tensors of the same size: once to warm up,
then `repeats` times. The result is the median per rank, of the slowest rank. The same call with the smallest message
gives the latency. The head's own work is timed on one rank's share of the classes, or on a part of it and scaled. Bytes
are those of `costs.collectives`.
"""

from __future__ import annotations

import hashlib
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch.exchange import exchange_payload
from partial_fc.batch.status import NO_LABEL, Status
from partial_fc.distributed.given import real, whole
from partial_fc.distributed.groups import backends_of, device_of, ranks_of
from partial_fc.distributed.objects import gather_objects
from partial_fc.distributed.ranks import Ranks, all_gather, all_gather_mesh, start_reduce_scatter
from partial_fc.head import PartialFC
from partial_fc.planning.comms_report import Comms, Measured
from partial_fc.planning.costs import Collective, Sizes, all_reduce, collectives, sizes

BUCKET = 25 << 20  # bytes of DDP's buckets
MOST_BYTES = 256 << 20  # of class rows when the head is measured
MOST_SECONDS = 0.5  # of one step when the head is measured


def comms(
    num_classes: int,
    embedding_size: int,
    batch_size: int,
    sample_rate: float = 1.0,
    *,
    backbone_parameters: int = 0,
    backbone_seconds: float = 0.0,
    device: torch.device | str | None = None,
    repeats: int = 7,
) -> Comms:
    """Measure the communication of a head's training step. Every rank must call it; all return the same result.

    Args:
        num_classes, embedding_size, sample_rate: as of `PartialFC`.
        batch_size: N, samples of the global batch.
        backbone_parameters: how many float32 numbers of the backbone's gradient DDP sums across ranks; 0 to skip it.
        backbone_seconds: seconds of the backbone's forward and backward on this rank, if known.
        device: the device of this rank; default: one whose tensors the group can exchange.
        repeats: calls of each collective, of which the median is taken.

    Raises ValueError for invalid arguments.
    """
    num_classes = whole("num_classes", num_classes, least=1)
    embedding_size = whole("embedding_size", embedding_size, least=1)
    batch_size = whole("batch_size", batch_size, least=1)
    backbone_parameters = whole("backbone_parameters", backbone_parameters)
    repeats, sample_rate = whole("repeats", repeats), real("sample_rate", sample_rate)
    if backbone_parameters < 0 or repeats < 1 or not 0 < sample_rate <= 1:
        raise ValueError("backbone_parameters must be at least 0, repeats at least 1, and sample_rate in (0, 1]")
    ranks = ranks_of(None)
    device = device_of(ranks) if device is None else torch.device(device)
    options = (torch.float32, None, None, False, None, device.type)
    z = sizes(num_classes, embedding_size, ranks.world, batch_size, sample_rate, "sgd-momentum", *options)
    timer = _Timer(ranks, device, repeats)
    measured = []
    for one in planned(z, backbone_parameters):
        kind = one.name.split(" (", 1)[0]
        actual, smallest = _calls(kind, z, one, ranks, device)
        seconds, latency = timer.median(actual), timer.median(smallest)
        measured.append(Measured(one.name, one.own, one.sent, one.received, seconds, latency))
    head_seconds, measured_rows = _head_seconds(z, sample_rate, ranks, device, timer)
    return Comms(
        arguments={
            "num_classes": num_classes,
            "embedding_size": embedding_size,
            "batch_size": batch_size,
            "sample_rate": sample_rate,
            "backbone_parameters": backbone_parameters,
        },
        ranks=ranks.world,
        nodes=_nodes(),
        backend=_backend(ranks, device),
        device=device.type,
        collectives=tuple(measured),
        head_seconds=head_seconds,
        head_rows=z.S,
        measured_rows=measured_rows,
        backbone_seconds=timer.slowest(backbone_seconds),
    )


def _backend(ranks: Ranks, device: torch.device) -> str:
    """Return the name of what sends tensors of this device."""
    if ranks.group is None:
        return "no process group"
    return backends_of(ranks.group).get(device.type, "none for this device")


def planned(z: Sizes, backbone_parameters: int) -> tuple[Collective, ...]:
    """Return the collectives of a step: the head's, the norm for clipping, DDP's; none on a single rank."""
    if z.world == 1:
        return ()
    found = [*collectives(z), all_reduce("clip norm", 32, z.world)]
    if backbone_parameters:
        found.append(all_reduce("backbone gradient", 4 * backbone_parameters, z.world))
    return tuple(found)


Call = Callable[[], object]


def _calls(kind: str, z: Sizes, planned: Collective, ranks: Ranks, device: torch.device) -> tuple[Call, Call]:
    """Return (the collective as the head calls it, the same collective with the smallest message)."""
    world = ranks.world
    n = z.N_local
    tiny = torch.zeros(1, device=device)

    def gather_tiny() -> object:
        return all_gather(tiny, ranks.group)

    if kind == "status":
        row = torch.full((len(Status._fields),), NO_LABEL, device=device)

        def gather_status() -> object:
            return all_gather_mesh(row, ranks).tolist()

        return gather_status, gather_status
    if kind == "payload":
        parts = [torch.zeros(n, z.D, device=device), torch.zeros(n, dtype=torch.int64, device=device)]
        return lambda: exchange_payload(parts, (n,) * world, n, ranks.group), gather_tiny
    if kind == "statistics":
        found = torch.zeros(planned.own // 4, device=device)
        if z.reduced:
            return lambda: dist.all_reduce(found, group=ranks.group), lambda: dist.all_reduce(tiny, group=ranks.group)
        return lambda: all_gather(found, ranks.group), gather_tiny
    if kind == "embedding gradient":
        grad = torch.zeros(n * world, z.D, device=device)
        least = torch.zeros(world, 1, device=device)
        return (
            lambda: start_reduce_scatter(grad, ranks, (n,) * world)(),
            lambda: start_reduce_scatter(least, ranks, (1,) * world)(),
        )
    if kind == "clip norm":
        norm = torch.zeros(4, dtype=torch.float64, device=device)

        def reduce_norm() -> object:
            return dist.all_reduce(norm, group=ranks.group)

        return reduce_norm, reduce_norm
    assert kind == "backbone gradient"
    buckets = [torch.zeros(size // 4, device=device) for size in _buckets(planned.own)]
    return (
        lambda: [dist.all_reduce(bucket, group=ranks.group) for bucket in buckets],
        lambda: dist.all_reduce(tiny, group=ranks.group),
    )


def _buckets(total: int) -> list[int]:
    return [min(BUCKET, total - start) for start in range(0, total, BUCKET)]


class _Timer:
    """Times calls that all ranks make together."""

    def __init__(self, ranks: Ranks, device: torch.device, repeats: int) -> None:
        self.ranks = ranks
        self.device = device
        self.repeats = repeats

    def median(self, call: Call) -> float:
        """Return the median seconds of a call on the slowest rank. Ranks start together; the first call warms up."""
        times = []
        for _ in range(self.repeats + 1):
            self._synchronize()
            if self.ranks.group is not None:
                dist.barrier(self.ranks.group)
            begin = time.perf_counter()
            call()
            self._synchronize()
            times.append(time.perf_counter() - begin)
        return self.slowest(statistics.median(times[1:]))

    def slowest(self, seconds: float) -> float:
        """Return the largest `seconds` across ranks."""
        return float(all_gather(torch.tensor(seconds, dtype=torch.float64, device=self.device), self.ranks.group).max())

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _head_seconds(z: Sizes, sample_rate: float, ranks: Ranks, device: torch.device, timer: _Timer) -> tuple[float, int]:
    """Return (seconds of forward and backward for this rank's rows, number of rows per step that were measured).

    Measures a head on this rank alone, with the global batch, of which this rank's share of samples has its class in
    this shard. Uses as many rows as `MOST_BYTES` and `MOST_SECONDS` allow and scales the time, as work is proportional
    to the rows.
    """
    group = [dist.new_group([r]) for r in range(ranks.world)][ranks.rank] if ranks.group is not None else None
    classes = min(z.C_local, max(1, MOST_BYTES // (4 * z.D)))
    measured = min(classes, 2048)
    seconds = _time_head(z, measured, sample_rate, group, ranks.world, device, timer)
    while measured < classes:
        growth = min(8.0, MOST_SECONDS / max(seconds, 1e-6))
        more = min(classes, max(measured + 1, int(measured * growth)))
        if more < 1.5 * measured and more < classes:
            break
        measured = more
        seconds = _time_head(z, measured, sample_rate, group, ranks.world, device, timer)
    if group is not None:
        dist.destroy_process_group(group)
    rows = z.S if measured == z.C_local else max(1, round(z.S * measured / z.C_local))
    return seconds * z.S / rows, rows


def _time_head(
    z: Sizes, classes: int, rate: float, group: Any, world: int, device: torch.device, timer: _Timer
) -> float:
    """Return the seconds of forward and backward of a head with `classes` classes, one of `world` equal shards."""
    generator = torch.Generator("cpu").manual_seed(0)
    labels = torch.randint(0, classes * world, (z.N,), generator=generator, device="cpu")
    labels = torch.where(labels < classes, labels, -100).to(device)
    embeddings = torch.randn(z.N, z.D, generator=generator, device="cpu").to(device)
    head = PartialFC(z.D, classes, sample_rate=rate, group=group, device=device, dtype=torch.float32)

    def step() -> None:
        x: Tensor = embeddings.detach().requires_grad_()
        head(x, labels).backward()
        head.zero_grad()
        head.class_rows.lost = 0  # no optimizer will use these gradients

    return timer.median(step)


def _nodes() -> int:
    """Return the number of machines that the ranks run on."""
    name = hashlib.blake2b(socket.gethostname().encode(), digest_size=8).hexdigest()
    return len(set(gather_objects(name, "the count of machines")))
