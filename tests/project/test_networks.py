"""What benchmarks/networks.py says of a run, and the road that its packets take; no network is made here."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def packet(number: int, to: str = SECOND) -> bytes:
    """An IPv4 header as far as the relay reads it, and a number."""
    return b"\x45" + bytes(15) + socket.inet_aton(to) + number.to_bytes(4, "big")


def arrived(end: int) -> list[int]:
    found = []
    while True:
        try:
            found.append(int.from_bytes(os.read(end, 24)[-4:], "big"))
        except BlockingIOError:
            return found


def passed(road: Any, count: int) -> tuple[list[int], list[int], dict[str, int]]:
    """The numbers of the packets that arrive in the middle of the way's time, of all, and the relay's counts."""
    from networks_relay import Relay

    here, there = os.pipe()
    try:
        os.set_blocking(here, False)
        relay = Relay(road, {SECOND: there})
        for number in range(count):
            relay.take(packet(number), now=number * 1e-3)
        relay.take(packet(0, to="10.77.0.9"), now=0.0)  # to nobody
        relay.deliver(road.delay + road.jitter + count * 0.5e-3)
        early = arrived(here)
        relay.deliver(1e9)
        return early, early + arrived(here), relay.counts
    finally:
        os.close(here)
        os.close(there)


def test_packets_are_late_but_in_order(benchmarks: None) -> None:
    from networks_relay import Road

    early, all_of_them, counts = passed(Road(delay=0.1, jitter=0.05), 1000)
    assert 300 < len(early) < 700 and all_of_them == list(range(1000))
    assert counts == {"packets": 1000, "lost": 0, "overtaken": 0}


def test_packets_are_lost_and_overtaken(benchmarks: None) -> None:
    from networks_relay import Road

    _, got, counts = passed(Road(loss=0.05, reorder=0.25), 1000)
    assert len(got) == 1000 - counts["lost"] and 20 < counts["lost"] < 90
    assert sorted(got) != got and 180 < counts["overtaken"] < 300


def test_the_words_of_an_error_are_judged(benchmarks: None, tmp_path: Path) -> None:
    """It must come in time, and name rank, host and address."""
    import networks
    from networks_run import Nodes, Started, Switch

    nodes = Nodes("node", 2, Switch("node"))
    good = "rank 1 did not reach the exchange of a batch (rank 1 is on node-1 (10.77.0.2))"
    for text, after, wrong in (
        (good, 25.0, []),
        (good, 100.0, ["after 100 s, not within 60 s"]),
        (good.replace("node-1", "node-2"), 25.0, ["'node-1'"]),
        ("a rank did not reach the exchange of a batch", 25.0, ["branks", "'node-1'", "10\\\\.77"]),
    ):
        started = Started(subprocess.Popen(["true"]), tmp_path / "log")
        started.process.wait()
        started.lines = [(100.0 + after, f"[rank0]: partial_fc.distributed.inquiry.RankMissing: {text}")]
        stage = networks.Stage(networks.Case("cut", "", names={0: (1,)}), nodes, tmp_path, [started], clock=100.0)
        words = networks.said(stage, 0)
        assert words == {"after": after, "text": text}
        found = networks.wrong_in(stage, 0, words)
        assert len(found) == len(wrong) and all(a in b for a, b in zip(wrong, found, strict=True)), found
    assert networks.wrong_in(stage, 0, {})[0].startswith("node 0 has said nothing")


def test_cases_have_names_of_their_own(benchmarks: None) -> None:
    import networks

    names = [case.name for case in networks.CASES]
    assert len(set(names)) == len(names) > 20
    for case in networks.CASES:
        assert (case.event is None) == bool(case.road or case.rate)
        assert not {*(case.names or {}), *(n for them in (case.names or {}).values() for n in them)} - {
            *range(case.nodes)
        }
