"""Two nodes for real, as far as one machine goes: two network namespaces with host names of their own, joined by a
cable (a veth pair).

No process of one reaches the other's loopback, so whatever finds its way does so over the network between them. What is
trained across both equals what is trained on one, also with a copy of the class weights on each node (head.replicas),
with and without sampling.

    pytest tests/project/test_two_nodes.py -m "slow or not slow"      all launchers, about three minutes on two cores
    (as root)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import MPIRUN_OPTIONS, ROOT, losses, start, succeed, succeed_together, tell_tale, tiny_run
from runner import free_port

pytestmark = pytest.mark.timeout(400)  # two or three starts of two ranks each, on machines with other work

CABLE = "cable0"  # what either node calls its end
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Nodes:
    """Namespaces and host names `NAME-0` and `NAME-1`, which either node resolves to the address on the cable."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}-{node}" for node in range(2)]
        self.settings = [
            Path("/etc/netns") / each for each in self.names
        ]  # what lies here, `ip netns exec` lays over /etc

    def lay(self) -> str:
        """Make the namespaces and the cable; what went wrong, if anything did."""
        first, second = self.names
        commands = [("netns", "add", first), ("netns", "add", second)]
        commands += [("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)]
        for name, address in zip(self.names, ADDRESSES, strict=True):
            commands += [
                ("-n", name, "link", "set", "lo", "up"),
                ("-n", name, "addr", "add", f"{address}/24", "dev", CABLE),
            ]
            commands += [("-n", name, "link", "set", CABLE, "up")]
        for words in commands:
            done = ip(*words)
            if done.returncode:
                return f"`ip {' '.join(words)}` failed: {done.stderr.strip()}"
        hosts = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, self.names, strict=True))
        for folder in self.settings:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        return ""

    def remove(self) -> None:
        for name, folder in zip(self.names, self.settings, strict=True):
            ip("netns", "del", name)
            shutil.rmtree(folder, ignore_errors=True)

    def on(self, node: int, command: str) -> list[str]:
        name = self.names[node]
        return ["ip", "netns", "exec", name, "unshare", "--uts", "bash", "-c", f"hostname {name}; exec {command}"]

    def run(self, command: str, timeout: float = 150, **more: str) -> None:
        """The command on both nodes, a variable that is "NODE" being the node's number; both must succeed."""
        shared = {"GLOO_SOCKET_IFNAME": CABLE, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(free_port()), **more}
        succeed_together(
            [
                start(self.on(n, command), **{k: str(n) if v == "NODE" else v for k, v in shared.items()})
                for n in range(2)
            ],
            timeout,
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Nodes(f"pfc{os.getpid()}")
    try:
        problem = made.lay()
    except FileNotFoundError:
        problem = "there is no command `ip` (Debian's package iproute2)"
    if problem:
        made.remove()
        pytest.skip(f"this machine makes no network namespaces: {problem}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


def one_node(run: Path, out: Path, ranks: int, settings: str = "") -> list[tuple[float, ...]]:
    succeed(
        f"launch/torchrun.sh {run} --output.folder {out} {settings}", NPROC=str(ranks), MASTER_PORT=str(free_port())
    )
    history = tell_tale(out)
    assert [row[0] for row in history] == [1, 2, 3]
    return history


@pytest.fixture(scope="module")
def alone(tiny) -> list[tuple[float, ...]]:
    return one_node(tiny, tiny.parent / "one_node", 2)


def test_the_nodes_are_apart(nodes):
    reach = "bash -c 'echo > /dev/tcp/{}/{}'"
    port = free_port()
    listener = start(nodes.on(0, f"python -m http.server {port} --bind 0.0.0.0"))
    try:
        there, wrong = (nodes.on(1, reach.format(address, port)) for address in (ADDRESSES[0], "127.0.0.1"))
        waited = f"for i in $(seq 100); do {shlex.join(there)} 2>/dev/null && exit; sleep 0.1; done; exit 1"
        assert subprocess.run(["bash", "-c", waited], check=False, timeout=60).returncode == 0
        assert subprocess.run(wrong, check=False, capture_output=True, timeout=60).returncode != 0
    finally:
        listener.kill()
        listener.communicate()


@pytest.mark.slow
def test_torchrun_with_a_copy_of_the_classes_on_each_node(nodes, tiny, alone):
    """A rank a node: every one holds all classes, and the gradient of the rows crosses the cable."""
    out = tiny.parent / "torchrun"
    nodes.run(
        f"launch/torchrun.sh {tiny} --output.folder {out} --head.replicas 2", NPROC="1", NNODES="2", NODE_RANK="NODE"
    )
    close(tell_tale(out), alone)


def close(one: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> None:
    """Loss and norm, equal to the rounding of sums in another order; angles are measured on the batch of a replica."""
    assert len(one) == len(other)
    for (*mine, _), (*theirs, _) in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_torchrun(nodes, tiny, alone):
    out = tiny.parent / "torchrun_whole"
    nodes.run(f"launch/torchrun.sh {tiny} --output.folder {out}", NPROC="1", NNODES="2", NODE_RANK="NODE")
    assert tell_tale(out) == alone


@pytest.mark.slow
def test_accelerate(nodes, tiny, alone):
    out, file = tiny.parent / "accelerate", tiny.parent / "two_nodes.yaml"
    file.write_text(
        (ROOT / "configs/accelerate/two_nodes.yaml").read_text().replace("num_processes: 16", "num_processes: 2")
    )
    nodes.run(f"launch/accelerate_nodes.sh {file} {tiny} --output.folder {out}", MACHINE_RANK="NODE")
    assert tell_tale(out) == alone


@pytest.mark.slow
def test_elastic_torchrun(nodes, tiny, alone):
    out = tiny.parent / "elastic"
    command = f"launch/torchrun_elastic.sh {tiny} --output.folder {out}"
    nodes.run(command, NPROC="1", NNODES="2", RDZV_ENDPOINT=f"{ADDRESSES[0]}:{free_port()}")
    assert tell_tale(out) == alone


@pytest.mark.slow
def test_mpirun(nodes, tiny, alone):
    """mpirun on the first node; where it would use ssh to start its daemon on the second, a script enters that
    namespace. The master is the first node's name, as MPI tells it."""
    out, agent = tiny.parent / "mpirun", tiny.parent / "agent.sh"
    second = shlex.join(nodes.on(1, "")[:-1])
    agent.write_text(f'#!/usr/bin/env bash\nshift\nexec {second} "hostname {nodes.names[1]}; $*"\n')
    agent.chmod(0o755)
    hosts = ",".join(f"{address}:1" for address in ADDRESSES)
    passed = " ".join(f"-x {name}" for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"))
    options = f"{MPIRUN_OPTIONS} --prtemca plm_ssh_agent {agent} --host {hosts} {passed}"
    command = nodes.on(0, f"launch/mpirun.sh {tiny} --output.folder {out}")
    succeed(command, RANKS="2", MPIRUN_OPTIONS=options, GLOO_SOCKET_IFNAME=CABLE)
    assert tell_tale(out) == alone


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_a_copy_on_each_node_split_over_its_ranks(nodes, tiny, rate):
    """A mesh of 2 nodes by 2 ranks has the losses of 4 ranks on one node; under sampling it draws the same classes, and
    so has them too."""
    settings, parent = f"--head.sample_rate {rate}", tiny.parent
    flat = one_node(tiny, parent / f"flat{rate}", 4, settings)
    out = parent / f"mesh{rate}"
    nodes.run(
        f"launch/torchrun.sh {tiny} --output.folder {out} {settings} --head.replicas 2",
        NPROC="2",
        NNODES="2",
        NODE_RANK="NODE",
    )
    close(tell_tale(out), flat)
    assert len(set(losses(out))) == 3
