"""comms() sends what a training step sends, and its report names the slowest part."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import finish, fork
from watching import collectives

from partial_fc import PartialFC, RowOptimizer, clip_grad_norm_
from partial_fc.planning import costs
from partial_fc.planning.measure_comms import BUCKET, Comms, Measured, comms, planned
from partial_fc.training.cli.main import main
from partial_fc.training.errors import UserError

ROOT = Path(__file__).parents[2]
comms_module = importlib.import_module("partial_fc.planning.measure_comms")
C, D, P = 50, 6, 1000


def bytes_of_a_step(
    rank: int, world: int, rate: float
) -> tuple[list[tuple[str, int]], dict[str, int], set[tuple[str, int]]]:
    """What a real step sends; what comms reports; what comms sends."""
    n = 4
    head = PartialFC(D, C, sample_rate=rate)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    x, labels = torch.randn(n, D, requires_grad=True), torch.arange(n)
    with collectives() as real:
        head(x, labels).backward()
        clip_grad_norm_([], head, max_norm=1.0)
        optimizer.step()
    with collectives() as sent:
        report = comms(C, D, n * world, rate, backbone_parameters=P, repeats=1)
    return real, {c.name: c.own for c in report.collectives}, set(sent)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_it_sends_what_a_step_sends(ranks, world, rate):
    z = costs.sizes(C, D, world, 4 * world, rate, "sgd", torch.float32, None, None, False, None, "cpu")
    for real, reported, sent in ranks(world).run(bytes_of_a_step, rate):
        kinds = [(name.split("(")[1][:-1].replace("-", "_"), own) for name, own in reported.items()]
        assert real == kinds[:-1], "status, payload, statistics, embedding gradient, clip norm, in the order of a step"
        assert reported == {c.name: c.own for c in costs.collectives(z)} | {
            "clip norm (all-reduce)": 32,
            "backbone gradient (all-reduce)": 4 * P,
        }
        assert set(kinds) <= sent
        assert reported["status (all-gather)"] == 192


def test_what_is_planned():
    z = costs.sizes(C, D, 4, 16, 1.0, "sgd", torch.float32, None, None, False, None, "cpu")
    assert planned(z, 0)[:-1] == costs.collectives(z)
    backbone = planned(z, 30 << 20)[-1]
    assert (backbone.own, backbone.sent) == (120 << 20, 180 << 20)  # each number is sent 2 (k - 1) / k times
    alone = costs.sizes(C, D, 1, 16, 1.0, "sgd", torch.float32, None, None, False, None, "cpu")
    assert planned(alone, P) == ()


def buckets(rank: int, world: int) -> list[int]:
    with collectives() as sent:
        comms(C, D, 8, backbone_parameters=(BUCKET + 400) // 4, repeats=1)
    return [size for name, size in sent if name == "all_reduce"]


def test_the_backbones_gradient_goes_in_buckets(ranks):
    for sent in ranks(2).run(buckets):
        assert sent.count(BUCKET) == 2 and sent.count(400) == 2  # a warm-up and a repeat


def late(rank: int, world: int, where: str, only_one: bool) -> tuple[str, str, dict[str, Any]]:
    """A collective that takes 300 ms more, on one rank or on all."""
    usual = getattr(comms_module, where)

    def slow(*arguments: Any, **options: Any) -> Any:
        if rank == 1 or not only_one:
            time.sleep(0.3)
        return usual(*arguments, **options)

    with mock.patch.object(comms_module, where, slow):
        report = comms(C, D, 8, repeats=2)
    return report.bottleneck, str(report), report.to_dict()


@pytest.mark.parametrize("only_one", [False, True])
@pytest.mark.parametrize(
    ("where", "expected"),
    [("start_reduce_scatter", "embedding gradient (reduce-scatter)"), ("exchange_payload", "payload (all-gather)")],
)
def test_what_is_late_is_the_bottleneck(ranks, where, expected, only_one):
    found = ranks(2).run(late, where, only_one)
    assert len({text for _, text, _ in found}) == 1, "every rank has the same report"
    name, text, as_dict = found[0]
    assert name == expected, text
    kind, operation = expected[:-1].split(" (")
    assert f"the {operation} of the {kind} takes" in text.splitlines()[-1] and "within one node" in text
    assert json.loads(json.dumps(as_dict))["bottleneck"] == expected
    assert sum(c["share"] for c in as_dict["collectives"]) + sum(as_dict["shares"].values()) == pytest.approx(1)


def test_a_step_of_which_a_part_was_measured(monkeypatch):
    monkeypatch.setattr("partial_fc.planning.measure_comms.MOST_BYTES", 3000 * 4 * D)
    report = comms(30_000, D, 8, 0.5, repeats=1)
    assert report.head_rows == pytest.approx(15_000, abs=8) and report.measured_rows == pytest.approx(1500, abs=8)
    assert f"scaled from {report.measured_rows:,} of {report.head_rows:,} rows" in str(report)
    assert report.collectives == () and report.advice == "one rank: nothing is sent"
    whole = comms(100, D, 8, repeats=1)
    assert whole.measured_rows == whole.head_rows == 100 and "scaled" not in str(whole)


def made(nodes: int, head: float, backbone: float, rows: int = 10, **seconds: float) -> Comms:
    kinds = {
        "payload": "all-gather",
        "embedding_gradient": "reduce-scatter",
        "status": "all-gather",
        "backbone_gradient": "all-reduce",
    }
    items = tuple(
        Measured(
            f"{name.replace('_', ' ')} ({kinds[name]})",
            10**8,
            10**8,
            10**8,
            value,
            0.9 * value if name == "status" else 1e-4,
        )
        for name, value in seconds.items()
    )
    arguments = {"num_classes": C, "embedding_size": D, "batch_size": 8, "sample_rate": 1.0}
    return Comms(arguments, 4, nodes, "gloo", "cpu", items, head, rows, rows, backbone)


def test_the_advice():
    slow = made(2, 0.1, 0.05, embedding_gradient=1.0, payload=0.05)
    assert slow.share("embedding") == pytest.approx(1 / 1.2)
    assert slow.advice.startswith(
        "the reduce-scatter of the embedding gradient takes 83% of the step: network of 0.1 GB/s between 2 nodes; check that the fast "
    )
    # rows of a rank: 10, or 20 where two nodes each have a whole head; of an all-reduce over two nodes each number is
    # sent once
    assert "shard within a node and replicate across nodes" in slow.advice
    assert "480 B of class gradients between nodes instead of 190.73 MiB of embeddings" in slow.advice
    many = made(2, 0.1, 0.05, rows=10_000_000, embedding_gradient=1.0, payload=0.05).advice
    assert "leave the head sharded across all nodes" in many and "457.76 MiB of class gradients" in many
    assert "nodes" not in made(1, 0.1, 0.0, embedding_gradient=1.0).advice
    assert "accumulate gradients over micro-batches" in made(2, 0.1, 0.0, backbone_gradient=1.0).advice
    assert "latency of 450 ms" in made(1, 0.1, 0.0, status=0.5).advice
    assert made(1, 1.0, 0.0, payload=0.1).advice.endswith("the network is not the bottleneck")
    text = made(1, 0.0, 1.0, payload=0.9).advice
    assert text.startswith("the backbone's own work takes 53%") and text.endswith(
        "most of it the payload (all-gather) (47%, 0.11 GB/s)"
    )


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_in_one_process(capsys, mistake):
    assert (
        main(["comms", "--num_classes", "100", "--batch_size", "8", "--embedding_size", "6", "--repeats", "1", "--cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "C = 100 classes, D = 6, N = 8 samples, r = 1" in out and "one rank: nothing is sent" in out
    assert "num_classes must be at least 1, not 0" in mistake(
        "comms", "--num_classes", "0", "--batch_size", "8", "--cpu"
    )
    assert "--num_classes" in mistake("comms", "--batch_size", "8")
    assert "nowhere.yaml" in mistake("comms", "nowhere.yaml")


def no_device(cpu: bool) -> None:
    raise UserError(f"devices were looked at, cpu={cpu}")


def test_commands_choose_their_gpu_before_they_build_anything(monkeypatch, mistake):
    sizes = ("--num_classes", "8", "--embedding_size", "4", "--batch_size", "2")
    for command, given in (("comms", (*sizes, "--cpu")), ("doctor", ("configs/quickstart.yaml",))):
        monkeypatch.setattr(f"partial_fc.training.cli.{command}.check_devices", no_device)
        assert "devices were looked at, cpu=True" in mistake(command, *given)


def test_the_command_of_a_run_on_two_ranks():
    code, out, err = finish(
        fork("comms", "configs/quickstart.yaml", "--train.accumulation", "2", "--repeats", "2", "--json")
    )
    assert code == 0, out + err
    found = json.loads(out)
    arguments = found["arguments"]
    assert (arguments["num_classes"], arguments["batch_size"], arguments["embedding_size"]) == (1000, 128, 128)
    assert found["ranks"] == 2 and found["nodes"] == 1 and found["backbone_seconds"] > 0 and found["head_rows"] == 500
    own = {c["name"]: c["own"] for c in found["collectives"]}
    assert (
        own["embedding gradient (reduce-scatter)"] == 128 * 128 * 4
        and own["backbone gradient (all-reduce)"] == 4 * arguments["backbone_parameters"]
    )
    assert all(c["seconds"] > 0 and c["gigabytes_per_second"] > 0 for c in found["collectives"])
