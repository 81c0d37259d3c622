"""What networks.py builds, starts and breaks: nodes as network namespaces, the network between them, and a run on them.

Nodes      a namespace a node, with a host name, process ids and an interface `net0` of its own
Switch     a bridge in a namespace that joins them: cut by nftables, slowed by tbf, unplugged
Relay      in the switch's place, a process that passes every packet on, or not (networks_relay.py)
Started    a command on a node, with the time of each line that it prints
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).parents[1]
PORT = "net0"  # what every node calls its interface
NET = "10.77.0"


class NoNetwork(Exception):
    """This machine cannot make what was asked for, in words."""


def command(*words: str, **more: Any) -> str:
    """Run it and return what it prints. NoNetwork if it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, **more)
    except FileNotFoundError:
        package = {"nft": "nftables"}.get(words[0], "iproute2")
        raise NoNetwork(f"there is no command `{words[0]}` (Debian's package {package})") from None
    if done.returncode:
        raise NoNetwork(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


class Network(Protocol):
    """What joins the nodes."""

    def lay(self, nodes: Nodes) -> None: ...

    def remove(self) -> dict[str, Any]:
        """Take it away; return what it has to say of itself."""
        ...


class Nodes:
    """`count` nodes of the name NAME-0, NAME-1, ..., which all of them resolve, on one network. A context manager."""

    def __init__(self, name: str, count: int, network: Network) -> None:
        self.names = [f"{name}-{node}" for node in range(count)]
        self.addresses = [f"{NET}.{node + 1}" for node in range(count)]
        self.network = network
        self.said: dict[str, Any] = {}  # by the network, when it was removed
        self.retries: int | None = None  # net.ipv4.tcp_retries2 of each node, if not as it is
        self._over_etc = [Path("/etc/netns") / each for each in self.names]  # `ip netns exec` lays it over /etc

    def __enter__(self) -> Nodes:
        if os.geteuid() != 0:
            raise NoNetwork("network namespaces need root: run it as root, in a sandbox of your own")
        self.__exit__()  # what one that was killed has left
        try:
            hosts = "".join(f"{a} {n}\n" for a, n in zip(self.addresses, self.names, strict=True))
            for name, folder in zip(self.names, self._over_etc, strict=True):
                command("ip", "netns", "add", name)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
            self.network.lay(self)
            for name, address in zip(self.names, self.addresses, strict=True):
                command("ip", "-n", name, "link", "set", "lo", "up")
                command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", PORT)
                command("ip", "-n", name, "link", "set", PORT, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.said = self.network.remove()
        for name, folder in zip(self.names, self._over_etc, strict=True):
            with contextlib.suppress(NoNetwork):
                command("ip", "netns", "del", name)
            shutil.rmtree(folder, ignore_errors=True)

    def inside(self, node: int, line: str) -> list[str]:
        """The words that run a line of bash on a node, as the first process of a machine with that node's name."""
        name = self.names[node]
        alone = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        kernel = "" if self.retries is None else f"echo {self.retries} > /proc/sys/net/ipv4/tcp_retries2; "
        return ["ip", "netns", "exec", name, *alone, "bash", "-c", f"{kernel}hostname {name}; exec {line}"]


class Switch:
    """A bridge with a port for each node; `nft` and `tc` act on the ports."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-switch"
        self._count = 0

    def lay(self, nodes: Nodes) -> None:
        self._count = len(nodes.names)
        command("ip", "netns", "add", self.name)
        command("ip", "-n", self.name, "link", "add", "bridge0", "type", "bridge")
        for node, name in enumerate(nodes.names):
            far = ["peer", "name", PORT, "netns", name]
            command("ip", "link", "add", f"port{node}", "netns", self.name, "type", "veth", *far)
            command("ip", "-n", self.name, "link", "set", f"port{node}", "master", "bridge0", "up")
        command("ip", "-n", self.name, "link", "set", "bridge0", "up")

    def cut(self, *ways: tuple[int, int]) -> None:
        """Drop what goes from the one node to the other, for each way, and nothing else any more."""
        drops = [f"iifname port{a} oifname port{b} counter drop" for a, b in ways]
        rules = ["chain ways {", "type filter hook forward priority 0; policy accept;", *drops, "}"]
        self._nft("\n".join(["table bridge cuts", "delete table bridge cuts", "table bridge cuts {", *rules, "}"]))

    def mend(self) -> None:
        """Let everything pass, and plug every node in."""
        self._nft("table bridge cuts\ndelete table bridge cuts")
        for node in range(self._count):
            command("ip", "-n", self.name, "link", "set", f"port{node}", "up")

    def unplug(self, node: int) -> None:
        command("ip", "-n", self.name, "link", "set", f"port{node}", "down")

    def slow(self, rate: str) -> None:
        """Give every node a line of so many bits a second, by a token bucket."""
        for node in range(self._count):
            bucket = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
            command("tc", "-n", self.name, "qdisc", "replace", "dev", f"port{node}", "root", *bucket)

    def remove(self) -> dict[str, Any]:
        with contextlib.suppress(NoNetwork):
            command("ip", "netns", "del", self.name)
        return {}

    def _nft(self, text: str) -> None:
        command("ip", "netns", "exec", self.name, "nft", "-f", "-", input=text + "\n")


class Relay:
    """A process of networks_relay.py between the nodes. road: its settings."""

    def __init__(self, **road: float) -> None:
        self.road = road
        self.process: subprocess.Popen[str] | None = None

    def lay(self, nodes: Nodes) -> None:
        names = {address: f"pfc{os.getpid() % 10_000}t{node}" for node, address in enumerate(nodes.addresses)}
        asked = json.dumps({"nodes": names, **self.road})
        script = Path(__file__).with_name("networks_relay.py")
        self.process = subprocess.Popen([sys.executable, str(script), asked], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise NoNetwork("TUN interfaces cannot be made here (/dev/net/tun)")
        for name, interface in zip(nodes.names, names.values(), strict=True):
            command("ip", "link", "set", interface, "netns", name, "name", PORT)

    def remove(self) -> dict[str, Any]:
        if self.process is None:
            return {}
        self.process.terminate()
        text, _ = self.process.communicate()
        self.process = None
        return json.loads(text) if text.strip() else {}


@dataclass
class Started:
    """A command that runs on a node; `lines` are (clock, text) of what it has printed."""

    process: subprocess.Popen[str]
    log: Path
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: float | None = None
    frozen: bool = False

    @classmethod
    def on(cls, nodes: Nodes, node: int, line: str, log: Path, **variables: str) -> Started:
        own = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": PORT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **variables,
        }
        process = subprocess.Popen(
            nodes.inside(node, line),
            cwd=ROOT,
            env={**os.environ, **own},
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started = cls(process, log)
        threading.Thread(target=started._read, daemon=True).start()
        return started

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe, self.log.open("a") as file:
            for line in pipe:
                if "step/s" in line or "it/s" in line or not line.strip():
                    continue  # progress
                self.lines.append((time.monotonic(), line.rstrip("\n")))
                file.write(line)
                file.flush()
        self.process.wait()
        self.ended = time.monotonic()

    @property
    def code(self) -> int | None:
        """The exit code, once it has ended and all that it printed was read."""
        return None if self.ended is None else self.process.returncode

    def tree(self) -> list[psutil.Process]:
        """All its processes, the first first."""
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def freeze(self) -> None:
        self.frozen = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a rank that has stopped itself go on."""
        if not self.frozen:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for each in self.tree():
            with contextlib.suppress(psutil.Error):
                each.send_signal(number)

    def kill(self) -> None:
        """End all of it, stopped or not."""
        for each in reversed(self.tree()):
            with contextlib.suppress(psutil.Error):
                each.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        deadline = time.monotonic() + 5
        while self.ended is None and time.monotonic() < deadline:  # until all was read
            time.sleep(0.05)

    def tail(self) -> str:
        return "\n".join(text for _, text in self.lines[-30:])
