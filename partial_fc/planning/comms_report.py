"""The result of `measure_comms.comms`: the time of each collective, the bottleneck, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from partial_fc.planning.plan import size

NETWORK_IS_FINE = 0.2  # below this share of a step, communication is not worth advice

HINTS = {
    "status": "it is a message of 192 bytes, so this is latency: use more samples per step, or fewer ranks",
    "payload": "all ranks receive all embeddings: use a smaller embedding_size or fewer ranks per head",
    "statistics": "every rank sends 3 numbers per sample: use fewer ranks per head",
    "embedding gradient": "all embedding gradients are sent back: use a smaller embedding_size or fewer ranks per head",
    "clip norm": "it is four numbers, so this is latency: clip every few steps, or not at all",
    "backbone gradient": "accumulate gradients over micro-batches (no_sync), or use DDP's bfloat16 communication hook",
}
INTERFACE = "check that the fast network interface is used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


@dataclass(frozen=True)
class Measured:
    """One collective.

    own, sent, received: bytes per rank, as in `costs.Collective`. seconds: of a call. latency: seconds of the smallest.
    """

    name: str
    own: int
    sent: int
    received: int
    seconds: float
    latency: float

    @property
    def rate(self) -> float:
        """10⁹ bytes per second that a rank sends."""
        return self.sent / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def late(self) -> bool:
        """Whether latency takes more of the time than the bytes do."""
        return self.latency > self.seconds / 2


@dataclass(frozen=True)
class Comms:
    """What `comms` measured: seconds of one step on the slowest rank, if nothing overlapped."""

    arguments: dict[str, Any]
    ranks: int
    nodes: int
    backend: str
    device: str
    collectives: tuple[Measured, ...]
    head_seconds: float  # forward and backward, without communication
    head_rows: int  # rows per step and rank
    measured_rows: int  # how many of them were measured
    backbone_seconds: float  # 0 if unknown

    @property
    def step(self) -> float:
        return self.head_seconds + self.backbone_seconds + sum(c.seconds for c in self.collectives)

    def share(self, name: str) -> float:
        """Return the share of a step of the first collective whose name starts with `name`."""
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
        name = self.bottleneck
        communication = sum(c.seconds for c in self.collectives) / self.step
        if self.ranks == 1:
            return "one rank: nothing is sent"
        if name in ("head", "backbone"):
            seconds = self.head_seconds if name == "head" else self.backbone_seconds
            own = (
                f"the {name}'s own work takes {seconds / self.step:.0%} of the step, communication {communication:.0%}"
            )
            if communication < NETWORK_IS_FINE:
                return f"{own}: the network is not the bottleneck"
            return f"{own}, most of it {self._slowest()}"
        found = next(c for c in self.collectives if c.name == name)
        where = f"between {self.nodes} nodes" if self.nodes > 1 else "within one node"
        speed = f"latency of {found.latency * 1e3:.3g} ms" if found.late else f"network of {found.rate:.2g} GB/s"
        content, operation = name.removesuffix(")").split(" (", 1)
        hints = [HINTS[content]]
        if self.nodes > 1:
            across = [self._across_nodes()] if content in ("payload", "statistics", "embedding gradient") else []
            hints = [INTERFACE, *across, *hints]
        share = f"{found.seconds / self.step:.0%}"
        return f"the {operation} of the {content} takes {share} of the step: {speed} {where}; {'; or '.join(hints)}"

    def _across_nodes(self) -> str:
        """Say whether replicas of the head, one per node, would send less: class gradients instead of embeddings."""
        sharded = sum(c.sent for c in self.collectives if c.name.startswith(("payload", "embedding gradient")))
        # an all-reduce of the gradients of `nodes` times as many rows
        replicated = 2 * self.head_rows * (self.nodes - 1) * self.arguments["embedding_size"] * 4
        instead = f"{_size(replicated)} of class gradients between nodes instead of {_size(sharded)} of embeddings"
        if replicated >= sharded:
            return f"leave the head sharded across all nodes, because replicas of it would send more ({instead})"
        return f"shard within a node and replicate across nodes (group=a 2-D DeviceMesh of nodes and ranks): {instead}"

    def _slowest(self) -> str:
        found = max(self.collectives, key=lambda c: c.seconds)
        return f"the {found.name} ({found.seconds / self.step:.0%}, {found.rate:.2g} GB/s)"

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
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
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)} on {self.nodes} node{'s' * (self.nodes > 1)}"
        lines = [
            f"C = {a['num_classes']:,} classes, D = {a['embedding_size']:,}, N = {a['batch_size']:,} samples, "
            f"r = {a['sample_rate']:g}",
            f"{ranks}, {self.backend}, on {self.device}",
            "",
            f"{'one step, per rank':38}{'bytes':>12}{'sent':>12}{'ms':>11}{'latency':>10}{'GB/s':>9}{'share':>8}",
        ]
        for c in self.collectives:
            numbers = f"{c.seconds * 1e3:>11.3f}{c.latency * 1e3:>10.3f}{c.rate:>9.3g}{c.seconds / self.step:>8.1%}"
            lines.append(f"  {c.name:36}{_size(c.own):>12}{_size(c.sent):>12}{numbers}")
        scaled = ""
        if self.measured_rows != self.head_rows:
            scaled = f", scaled from {self.measured_rows:,} of {self.head_rows:,} rows"
        work = {
            f"head, forward and backward{scaled}": self.head_seconds,
            "backbone, forward and backward": self.backbone_seconds,
        }
        for name, seconds in work.items():
            if seconds:
                lines.append(f"  {name:60}{seconds * 1e3:>13.3f}{seconds / self.step:>27.1%}")
        return "\n".join([*lines, f"  {'step, if nothing overlapped':60}{self.step * 1e3:>13.3f}", "", self.advice])


def _size(count: int) -> str:
    return f"{count} B" if count < 1024 else size(count)
