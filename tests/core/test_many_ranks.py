"""Many ranks: what they add up on the way instead of gathering it, and 16 and 32 of them beside one dense process.

    launch/test -m slow tests/core/test_many_ranks.py       the cases of 16 and 32 ranks

Statistics of a test are few and would be gathered: `nothing_gathered` has them reduced.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from dense_losses import Loss
from dense_optimizers import DenseSGD
from missing_ranks import answers, set_timeout, told
from near import assert_near
from runner import Ranks
from shards import classes_of, everyones, local, positions, samples_of, whole
from side_by_side import Case, check_cases
from torch.distributed.device_mesh import init_device_mesh
from watching import collectives, sizes

from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer
from partial_fc.distributed import sums
from partial_fc.softmax import forward, nearest_others

ROOT = Path(__file__).parents[2]
D = 8
USERS = (sums, forward, nearest_others)  # of MOST_GATHERED

CASES = [
    Case(),
    Case("Softmax", sample_rate=0.4),
    Case("CurricularFace", sample_rate=0.4),
    Case("SphereFace2"),
    Case("AdaFace", optimizer="adamw", budget=0),
    Case(smoothing=0.1, sample_rate=0.4, reduction="sum"),
    Case("Softmax", smoothing=0.2, reduction="none", budget=0),
    Case(nearest=3, sample_rate=0.4),
    Case(nearest=2, counts=(1, 0, 0, 0), ignored=0),
]


@contextmanager
def nothing_gathered() -> Iterator[None]:
    """However few numbers there are."""
    with ExitStack() as stack:
        for module in USERS:
            stack.enter_context(mock.patch.object(module, "MOST_GATHERED", -1))
        yield


def check_reduced(rank: int, world: int, cases: list[Case]) -> None:
    with nothing_gathered():
        check_cases(rank, world, cases)


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_of_many_ranks_equal_dense_float64(ranks: Any, world: int) -> None:
    ranks(world).run(check_reduced, CASES, timeout=150)


def losses_of(rank: int, world: int, reduced: bool) -> tuple[list[str], list[float], dict[str, list[int]]]:
    """The losses of float32 steps, bit by bit; what a center loss gives its samples; the collectives of the last."""
    found = []
    with nothing_gathered() if reduced else ExitStack():
        for margin, metrics in ((ArcFace(32.0), False), (ArcFace(1000.0), True)):
            head = PartialFC(D, 301, margin, metrics=metrics, seed=3, init_std=1.0)
            generator = torch.Generator().manual_seed(5)
            x = torch.randn(6 * world, D, generator=generator)
            labels = torch.randint(0, 301, (6 * world,), generator=generator)
            part = samples_of((6,) * world, rank)
            with collectives() as calls:
                found.append(float(head(x[part], labels[part])).hex())
            if metrics:
                found += [float(value).hex() for value in head.metrics.values()]
        center = CenterLoss(D, 301, reduction="none", seed=3)
        of_centers = center(x[part], labels[part]).tolist()
    return found, of_centers, sizes(calls)


def test_the_sum_has_the_same_bits_on_all_ranks(ranks: Any) -> None:
    gathered, reduced = (ranks(3).run(losses_of, way) for way in (False, True))
    assert len({tuple(found) for found, _, _ in gathered}) == len({tuple(found) for found, _, _ in reduced}) == 1
    for (a, of_a, calls_a), (b, of_b, calls_b) in zip(gathered, reduced, strict=True):
        assert [float.fromhex(v) for v in b] == pytest.approx([float.fromhex(v) for v in a], rel=1e-6)
        assert of_b == of_a
        N = 18
        assert calls_a["all_gather"][-1] == 5 * N * 4 and "all_reduce" not in calls_a
        assert calls_b["all_reduce"] == [2 * N * 4, 3 * N * 4], "the largest: maximum and hardest; then the sums"
        assert len(calls_a["all_gather"]) == len(calls_b["all_gather"]) + 1


@pytest.mark.slow
def test_a_step_sends_and_launches_no_more_with_more_ranks(tmp_path: Path) -> None:
    """One of 8 to 1,024 ranks of torch's fake process group: the command of docs/many-ranks.md, at small sizes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "many_ranks.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    for bounded in (True, False):
        of = [s for s in found["steps"] if s["bounded"] == bounded]
        assert [s["world"] for s in of] == [8, 64, 256, 1024]
        assert len({s["operators"] for s in of[1:]}) == 1
        assert of[0]["operators"] <= of[1]["operators"] + 8, "gathered numbers are added by an operator each"
        limit = 2 * 2 * (3 + (not bounded)) * of[0]["samples"] * 4
        assert all(s["statistics"] <= limit for s in of[1:]) and of[0]["statistics"] <= 2 * sums.MOST_GATHERED
        assert [c["kind"] for c in of[-1]["collectives"]].count("all-gather") == 2, "statuses and the batch"
    for classes in {d["classes"] for d in found["draws"]}:
        of = [d for d in found["draws"] if d["classes"] == classes]
        for few, many in pairwise(of):
            ranks_more = many["world"] / few["world"]
            assert many["places looked up a step"] < 1.1 * few["places looked up a step"] / ranks_more
            assert many["operators a step"] <= few["operators a step"]
    assert all(sum(p["bytes"][name] for name in p["bytes"] if "statistics" in name) < 10e6 for p in found["plans"])
    assert (tmp_path / "many-ranks.png").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------- 16 and 32 ranks

UNEVEN = tuple((5 * rank + 3) % 4 for rank in range(32))  # samples a rank: 3, 0, 1, 2, ...
MANY = [
    Case(classes=101, counts=UNEVEN, sample_rate=0.3, steps=3),  # of 32 ranks the last six have no class
    Case("Softmax", classes=45, counts=UNEVEN, sample_rate=0.2, optimizer="adamw", steps=3),
    Case("CurricularFace", classes=101, counts=UNEVEN, budget=0, steps=2),
    Case(classes=7, counts=UNEVEN, sample_rate=0.5, smoothing=0.1, steps=2),
]


def check_both_ways(rank: int, world: int) -> None:
    for reduced in (False, True):
        with nothing_gathered() if reduced else ExitStack():
            check_cases(rank, world, MANY if not reduced else MANY[:2])


def check_mesh(rank: int, world: int, replicas: int) -> list[str]:
    """Three sampled steps on a 2-D mesh beside a dense process: losses, gradients of embeddings and classes, weights."""
    shards = world // replicas
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    classes, counts = 101, UNEVEN[:world]
    head = PartialFC(D, classes, ArcFace(16.0), 0.3, group=mesh, dtype=torch.float64, seed=2)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.05, momentum=0.9, weight_decay=5e-4)
    w = torch.randn(classes, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mine, here = classes_of(classes, rank % shards, shards), samples_of(counts, rank)
    with torch.no_grad():
        local(head.weight).copy_(w[mine])
    dense, loss_of, losses = DenseSGD(0.05), Loss("ArcFace", {"scale": 16.0}), []
    for step in range(3):
        generator = torch.Generator().manual_seed(50 + step)
        x_all = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, classes, (sum(counts),), generator=generator)
        x = x_all[here].clone().requires_grad_()
        loss = head(x, labels[here])
        loss.backward()
        chosen = torch.cat(everyones(head.selected)).unique()
        leaf = w[chosen].clone().requires_grad_()
        x_all.requires_grad_()
        expected = loss_of(x_all, leaf, positions(labels, chosen, classes), chosen)
        expected.backward()
        assert x_all.grad is not None and leaf.grad is not None and head.row_grad is not None
        assert_near(f"loss of step {step}", loss, expected)
        assert_near("embedding gradient", x.grad, x_all.grad[here] * world)
        grad = torch.zeros_like(w)
        grad[chosen] = leaf.grad
        ids, values = head.row_grad
        assert_near("row gradient", values, grad[ids])
        optimizer.step()
        optimizer.zero_grad()
        dense.step(w, grad, torch.arange(classes))
        losses.append(float(loss).hex())
    optimizer.catch_up()
    assert_near("weights", whole(head.weight), w)
    return losses


@pytest.fixture
def many() -> Iterator[Any]:
    """Ranks that end with the test: 32 processes are too many to keep."""
    pools: list[Ranks] = []

    def start(world: int) -> Ranks:
        pools.append(Ranks(world))
        return pools[-1]

    yield start
    for pool in pools:
        pool.stop(kill=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [16, 32])
def test_many_ranks_equal_dense_float64(many: Any, world: int) -> None:
    many(world).run(check_both_ways, timeout=1500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("replicas", "shards"), [(4, 4), (8, 4), (4, 8)])
def test_many_ranks_on_a_mesh_equal_dense_float64(many: Any, replicas: int, shards: int) -> None:
    assert len({*map(tuple, many(replicas * shards).run(check_mesh, replicas, timeout=1500))}) == 1


VICTIM, TIMEOUT = 19, 20.0


def fault(rank: int, world: int, what: int) -> tuple[str, tuple[int, ...], str, float]:
    """What a rank raises, and after how many seconds, where one of them is ended or stopped before a step."""
    head = PartialFC(D, 101, sample_rate=0.3)
    x, labels = torch.randn(2, D), torch.tensor([rank, 100])
    head(x, labels)
    set_timeout(TIMEOUT)
    if rank == VICTIM:
        os.kill(os.getpid(), what)
    start = time.monotonic()
    return *told(lambda: head(x, labels)), time.monotonic() - start


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="stopped"),
    ],
)
def test_one_of_32_is_named_on_all_others(what: signal.Signals) -> None:
    found = answers(32, fault, int(what), silent=(VICTIM,), seconds=900)
    assert sorted(found) == [rank for rank in range(32) if rank != VICTIM]
    how = "has exited" if what is signal.SIGKILL else "is stopped"
    for message, named, _, seconds in found.values():
        assert named == (VICTIM,), message
        assert f"rank {VICTIM} did not reach the exchange of a batch" in message and how in message
        # docs/faults.md: at once or at the timeout, and then ten seconds; 32 processes on few cores take longer for each
        assert seconds < 120


def mislabelled(rank: int, world: int) -> tuple[str, float]:
    head = PartialFC(D, 101, sample_rate=0.3, dtype=torch.float64)
    labels = torch.tensor([rank, 101 if rank == VICTIM else 100])
    x = torch.randn(2, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="valid are") as raised:
        head(x, labels)
    return str(raised.value), float(head(x, torch.tensor([rank, 100])))  # and the next step works


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_bad_label_of_one_of_32_is_named_on_all(many: Any) -> None:
    found = many(32).run(mislabelled, timeout=600)
    assert {message for message, _ in found} == {
        f"rank {VICTIM}: labels[1] is 101; valid are 0 to 100 and ignore_index -100; labels are counted from 0"
    }
    assert len({loss for _, loss in found}) == 1
