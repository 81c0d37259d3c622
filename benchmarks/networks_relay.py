"""A bad road between nodes, in user space: every packet of an IPv4 network passes through this process, which loses,
delays or overtakes it.

    the node's interface (TUN)   ── packet ──>  here: lost? else due at now + delay ± jitter   ── when due ──>  that of its
                                                                                               destination

Without `reorder` packets of one destination stay in their order, however long each is delayed (as with netem on one
queue, which this replaces where the kernel has none). With it a share of them waits and is overtaken by all others.

    python benchmarks/networks_relay.py '{"nodes": {"10.77.0.1": "tun0", ...}, "delay": 0.1, "jitter": 0.05}'

makes the interfaces in the namespace that it is started in (they may be moved afterwards: the process keeps its end),
prints "ready", and works until SIGTERM. Then it prints what it did to how many packets, as JSON.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass, field

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
LARGEST = 65_536  # bytes of a packet


@dataclass
class Road:
    """What happens to a packet. Seconds and shares; `seed` is of the draws."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    """The share of packets that are overtaken: they wait for `late` seconds more."""
    late: float = 0.02
    seed: int = 0


@dataclass
class Relay:
    """The process' ends of the interfaces, and the packets that are on their way."""

    road: Road
    ends: dict[str, int]
    """Of each node's address, the descriptor."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("packets", "lost", "overtaken"), 0))

    def __post_init__(self) -> None:
        self._random = random.Random(self.road.seed)
        self._due: list[tuple[float, int, int, bytes]] = []  # when, which in order, to where, what
        self._last = dict.fromkeys(self.ends.values(), 0.0)  # when the newest packet to each is due

    def take(self, packet: bytes, now: float) -> None:
        """Decide what becomes of a packet that a node has sent."""
        end = self.ends.get(socket.inet_ntoa(packet[16:20])) if packet[0] >> 4 == 4 else None
        if end is None:
            return  # IPv6, or to nobody
        self.counts["packets"] += 1
        if self._random.random() < self.road.loss:
            self.counts["lost"] += 1
            return
        due = now + self.road.delay + self._random.uniform(-self.road.jitter, self.road.jitter)
        if self._random.random() < self.road.reorder:
            self.counts["overtaken"] += 1
            due += self.road.late
        else:
            due = self._last[end] = max(due, self._last[end])
        heapq.heappush(self._due, (due, self.counts["packets"], end, packet))

    def deliver(self, now: float) -> float:
        """Send what is due; return the seconds until the next one is."""
        while self._due and self._due[0][0] <= now:
            _, _, end, packet = heapq.heappop(self._due)
            try:
                os.write(end, packet)
            except OSError:  # the node has gone, or its queue is full
                self.counts["lost"] += 1
        return max(0.0, self._due[0][0] - now) if self._due else 1.0

    def work(self) -> None:
        """Until the process is asked to stop."""
        poll = select.poll()
        for end in self.ends.values():
            poll.register(end, select.POLLIN)
        while True:
            wait = self.deliver(time.monotonic())
            for end, _ in poll.poll(wait * 1000):
                try:
                    while True:
                        self.take(os.read(end, LARGEST), time.monotonic())
                except OSError:  # nothing more to read, or the interface is down
                    continue


def make_interface(name: str) -> int:
    """Make a TUN interface; the descriptor of this end."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return end


def main(asked: dict[str, object]) -> int:
    nodes: dict[str, str] = asked.pop("nodes")  # type: ignore[assignment]
    relay = Relay(Road(**asked), {address: make_interface(name) for address, name in nodes.items()})  # type: ignore[arg-type]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    try:
        relay.work()
    except SystemExit:
        print(json.dumps({**relay.counts, **asdict(relay.road)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
