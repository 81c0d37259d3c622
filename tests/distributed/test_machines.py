"""Machines that do not reach each other are named, with their ranks.

Ranks of one machine pretend to be on others: each with an id, a host name and an address (of the loopback) of its own.
The slow test has two machines for real, as network namespaces, and cuts one direction of the network between them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from missing_ranks import answers, set_timeout, told
from runner import free_port

from partial_fc import PartialFC
from partial_fc.distributed import inquiry, machines
from partial_fc.distributed.machines import Process

ROOT = Path(__file__).parents[2]
BATCH = "the exchange of a batch"


def pretend(machine: int) -> None:
    """This process is on a machine of its own. Before its first head."""
    machines.machine_id = lambda: f"machine {machine}"  # type: ignore[assignment]
    machines.socket.gethostname = lambda: f"node-{machine}"  # type: ignore[attr-defined]
    machines._connection = lambda store: (f"127.0.0.{machine + 1}", machine == 0)  # type: ignore[assignment]


def forward(head: PartialFC) -> Any:
    return head(torch.randn(3, 6, requires_grad=True), torch.tensor([0, 1, 9]))


def of_two_machines(rank: int, world: int) -> tuple[Any, Any]:
    """Ranks 0 and 1 are on the machine of the store, ranks 2 and 3 on another; rank 3 stays away."""
    pretend(rank // 2)
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    inquiry.SETTLE = 0.3
    head = PartialFC(6, 10)
    forward(head).sum().backward()
    dist.barrier()
    set_timeout(2.0)
    if rank == 3:
        time.sleep(60)
    host = machines.store_host()
    assert host is not None
    return told(lambda: forward(head)), (host[0], host[1].place, host[1].is_elsewhere)


def test_the_machine_of_a_missing_rank_is_named():
    results = answers(4, of_two_machines, silent=(3,))
    for rank, ((message, missing, _), host) in results.items():
        assert missing == (3,) and f"rank 3 did not reach {BATCH}" in message
        elsewhere = "; rank 3 is on node-1 (127.0.0.2)" in message and inquiry.MACHINE in message
        assert elsewhere == (rank < 2), message  # rank 2 is on that machine, and sees the process itself
        assert ("is running, but elsewhere" in message) == (rank == 2), message
        assert host == ([0, 1], "node-0 (127.0.0.1)", rank == 2)


def without_the_store(rank: int, world: int) -> Any:
    """Rank 1 cannot reach the store when it asks who is missing."""
    pretend(rank)
    head = PartialFC(6, 10)
    dist.barrier()
    set_timeout(2.0)
    if rank == 0:
        time.sleep(60)

    def refused(store: Any) -> Any:
        raise ConnectionRefusedError

    inquiry.own_connection = refused  # type: ignore[assignment]
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return told(lambda: forward(head))


def test_the_machine_of_the_store_is_known_where_the_store_is_out_of_reach():
    message, missing, _ = answers(2, without_the_store, silent=(0,))[1]
    assert missing == (0,)
    assert message.startswith(f"rank 0 on node-0 (127.0.0.1) did not reach {BATCH} (waited 2 s, the timeout; the store")
    assert "does not respond). What runs there has ended or hangs, or the machine or the network to it" in message


def apart(rank: int, world: int) -> Any:
    """Nobody takes the connections to the machine of rank 2 but that itself; all ranks see their collective fail."""
    pretend(rank)
    inquiry.SETTLE = 0.3
    machines.PROBE = 1.0
    PartialFC(6, 10)
    dist.barrier()
    if rank == 2:

        class Closed:
            """A server whose port is another's, which takes nothing."""

            def __enter__(self) -> Closed:
                return self

            def __exit__(self, *_: object) -> None: ...

            def getsockname(self) -> tuple[str, int]:
                return "", free_port()

        machines.socket.create_server = lambda *_, **__: Closed()  # type: ignore[attr-defined, assignment]
    lost = RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation")
    what = BATCH if rank else "the sum of the losses"  # one is a collective further than the others
    found = inquiry.explain_failure(lost, what, None, 2.0)
    dist.barrier()
    return found


def test_machines_without_a_connection_are_named_where_all_ranks_live():
    for rank, (message, missing) in answers(3, apart).items():
        assert missing == []
        assert "rank 0 on node-0 (127.0.0.1) and rank 2 on node-2 (127.0.0.3), nor between rank 1 on node-1" in message
        assert message.startswith("all ranks live, but there is no connection between"), (rank, message)
        assert "different collectives" not in message


def whole_again(rank: int, world: int) -> Any:
    """The network was cut for as long as the timeout: when all ask, everything is in reach."""
    pretend(rank)
    inquiry.SETTLE = 0.3
    PartialFC(6, 10)
    dist.barrier()
    lost = RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation")
    found = inquiry.explain_failure(lost, BATCH, None, 2.0)
    dist.barrier()
    return found


def test_machines_are_named_where_the_network_is_whole_again():
    for rank, (message, missing) in answers(2, whole_again).items():
        assert missing == [] and message.startswith(
            f"all ranks reached {BATCH}, but the connection between them failed"
        )
        assert f"; rank {1 - rank} is on node-{1 - rank} (127.0.0.{2 - rank}))" in message


def test_a_message_names_a_few_of_many_machines():
    processes = {rank: Process(f"m{rank}", 1, "1", f"node-{rank}", f"10.0.0.{rank}") for rank in range(1, 101)}
    words = inquiry._places_of(processes)
    assert words.count("; rank") == 8 and words.endswith("; others are on 92 more machines")


def test_a_record_of_an_older_version_is_read():
    """Ranks of two versions may share a store for a while."""
    process = Process(*json.loads('["machine", 5, "77"]'))
    assert process.host == process.address == "" and machines.machines_of({0: process}) == {}


# --------------------------------------------------------------------------------------------------- a real network

STEPS = """
from datetime import timedelta
import torch, torch.distributed as dist
from partial_fc import PartialFC
dist.init_process_group("gloo", timeout=timedelta(seconds=15))
head = PartialFC(6, 10)
while True:
    head(torch.randn(3, 6, requires_grad=True), torch.tensor([0, 1, 9])).backward()
    print("a step", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_direction_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the node without the store sends is lost. Both name the other, within the timeout and 30 s."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from networks_run import Nodes, NoNetwork, Started, Switch

    name, script = f"pfcm{os.getpid()}", tmp_path / "steps.py"
    script.write_text(STEPS)
    nodes = Nodes(name, 2, Switch(name))
    try:
        nodes.__enter__()
        nodes.network.cut()
    except NoNetwork as error:
        nodes.__exit__()
        pytest.skip(f"this machine makes no network to be cut: {error}")
    started = []
    try:
        for rank in range(2):
            of_rank = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": nodes.addresses[0], "MASTER_PORT": "29500"}
            line = f"{sys.executable} {script}"
            started.append(Started.on(nodes, rank, line, tmp_path / f"{rank}.log", **of_rank))
        wait_for(lambda: all(any("a step" in text for _, text in each.lines) for each in started), 120, started)
        nodes.network.cut((1, 0))
        cut = time.monotonic()
        wait_for(lambda: all(each.ended is not None for each in started), 15 + 30 + 30, started)
    finally:
        for each in started:
            each.kill()
        nodes.__exit__()
    for node, other in ((0, 1), (1, 0)):
        (when, message) = next((when, text) for when, text in started[node].lines if "RankMissing: " in text)
        assert when - cut < 15 + 30
        for word in (f"rank {other}", f"{name}-{other} ({nodes.addresses[other]})"):
            assert word in message, (node, message)


def wait_for(there: Any, seconds: float, started: list[Any]) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "\n".join(each.tail() for each in started)
        time.sleep(0.1)
