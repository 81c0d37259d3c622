"""plan() against sums worked out by hand, the modes and collectives of a real head, and measured memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from watching import collectives

from partial_fc import ArcFace, PartialFC, Plan, RowOptimizer, RowWiseAdagrad, SubCenterArcFace, plan
from partial_fc.batch.status import Status
from partial_fc.optim import adam_moves, moves
from partial_fc.optim import row_optimizer as optim
from partial_fc.optim import skipped_rows as later
from partial_fc.planning import memory
from partial_fc.planning.costs import OPTIMIZERS
from partial_fc.planning.memory import PHASES
from partial_fc.softmax import tiles
from partial_fc.softmax.tiles import Workspace
from partial_fc.training.cli.main import main
from partial_fc.training.cli.plan import byte_count, plan_command
from partial_fc.training.errors import UserError

GPUS: dict[str, Any] = {"num_classes": 29_000_000, "embedding_size": 512, "world_size": 8, "batch_size": 1024}


def item(made: Plan, name: str) -> int:
    return next(i.largest for i in made.items if i.name == name)


def test_a_small_head_by_hand():
    made = plan(1000, 8, 1, 4, device="cpu")
    assert (made.classes, made.rows, made.tile, made.mode, made.logits) == (1000, 1000, 1000, "kept", 4 * 1000 * 4)
    assert item(made, "weights") == item(made, "optimizer state") == item(made, "weight gradient") == 1000 * 8 * 4
    assert item(made, "kept logits") == 4 * 1000 * 4
    assert item(made, "logits of a tile") == 0
    assert item(made, "rows of a tile") == 2 * 1000 * 8 * 4  # directions, and the product that is summed along them
    assert item(made, "blocks of the optimizer") == 1000 * 8 * 4  # their state in the first step
    assert item(made, "heap") == item(made, "rows of a tile") + item(made, "blocks of the optimizer")  # as much again
    assert item(made, "embeddings and their gradient") == 6 * 4 * 8 * 4
    assert item(made, "selection") == 1000 * 4  # 1/length of the rows
    assert item(made, "initial rows") == 2 * 32768 * 4 + 32768 * 8 * 10  # a block, and what it is drawn with
    assert made.phases["backward"] == 32_000 * 3 + 16_000 + 64_000 + 96_000 + 768 + 4_000
    assert made.phases["build"] == 32_000 + 2 * 32768 * 4 + 32768 * 8 * 10
    assert made.operations["matrix products"] == 3 * 2 * 4 * 1000 * 8
    assert made.collectives == ()
    assert made.traffic["class rows"] == 1000 * 8 * 4 * (
        1 + 2 + 1 + 2 + 1
    )  # measured, divided, used; divided and used again
    assert plan(1000, 8, 1, 4, logits_budget=0).operations["matrix products"] == 4 * 2 * 4 * 1000 * 8


def test_sampled_rows_by_hand():
    """They are gathered once, into the memory that their gradient takes over."""
    made = plan(10_000, 8, 1, 4, 0.1, skipped_rows="still")
    assert made.rows == 1004
    gradient = next(i for i in made.items if i.name == "row gradients")
    assert gradient.bytes == dict.fromkeys(("forward", "combine", "backward", "update"), 1004 * 8 * 4)
    rows = next(i for i in made.items if i.name == "rows of a tile")
    assert rows.bytes == {
        "forward": 0,
        "backward": 2 * 1004 * 8 * 4,
    }  # the product, and what is summed along the directions
    assert made.traffic["class rows"] == 1004 * 8 * 4 * (2 + 1 + 2 + 1 + 1)  # gathered, measured, divided; used twice
    half = plan(10_000, 8, 1, 4, 0.1, dtype=torch.bfloat16, skipped_rows="still")
    gradient = next(i for i in half.items if i.name == "row gradients")
    assert gradient.bytes == dict.fromkeys(("backward", "update"), 1004 * 8 * 2)
    gathered, divided, used = 2 * 2 + 2, 2, 2  # divided in float32, but read and written in half precision
    assert half.traffic["class rows"] == 1004 * 8 * (2 + 2 * (gathered + divided) + 2 * used)


def test_rows_that_make_the_steps_that_they_missed_by_hand():
    """They are taken with their momentum, and their gradient has memory of its own."""
    made, still = plan(10_000, 8, 1, 4, 0.1), plan(10_000, 8, 1, 4, 0.1, skipped_rows="still")
    items = {i.name: i.bytes for i in made.items}
    rows = 1004 * 8 * 4
    assert items["row gradients"] == dict.fromkeys(("backward", "update"), rows)
    phases = ("select", "forward", "combine", "backward", "update")
    assert items["rows and state, up to date"] == dict.fromkeys(phases, 2 * rows)
    assert items["steps of each row"] == dict.fromkeys(PHASES[1:], 4 * 10_000)
    assert items["rows of a tile"] == {"forward": rows, "backward": 2 * rows}  # directions; and the product with them
    # rows and momentum, before and after; once in many steps of all rows, else no copies of rows and state
    assert items["blocks of the optimizer"]["update"] == 2 * 2 * 10_000 * 8 * 4
    assert item(still, "blocks of the optimizer") == 2 * rows
    assert made.traffic["class rows"] == rows * (1 + 2 + 1 + 2 + 1)
    assert made.traffic["update"] == still.traffic["update"] - 2 * 2 * rows
    gathered, moved, taken = 2 * 2, 2 * (2 + 3), 2 * 2  # by a product, and one that is added to it
    assert made.traffic["steps that rows missed"] == rows * (gathered + moved + taken)
    extra = made.operations["elementwise (estimate)"] - still.operations["elementwise (estimate)"]
    assert extra == 1004 * 8 * (1 + 2 * 3)  # directions again in backward, three operations for rows and for momentum
    assert (made.skipped_rows, still.skipped_rows, plan(1000, 8, 1, 4).skipped_rows) == ("dense", "still", None)
    assert "skipped rows: dense" in str(made) and "skipped rows: still" in str(still)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_an_optimizer_that_moves_no_row_without_gradient_notes_nothing(optimizer):
    made = plan(10_000, 8, 1, 4, 0.1, optimizer)
    assert (
        made.skipped_rows == "dense" and made.peak == plan(10_000, 8, 1, 4, 0.1, optimizer, skipped_rows="still").peak
    )


def test_skipped_rows_are_those_of_the_optimizer():
    """Adamax has no form of its steps."""
    for name in (*OPTIMIZERS, torch.optim.NAdam, torch.optim.Adamax):
        cls, options = OPTIMIZERS[name] if isinstance(name, str) else (name, {})
        head = PartialFC(8, 1000, sample_rate=0.1)
        optimizer = RowOptimizer(cls, head, **options)
        for _ in range(3):
            head(torch.randn(4, 8), torch.arange(4)).backward()
            optimizer.step()
            optimizer.zero_grad()
        made = plan(1000, 8, 1, 4, 0.1, name)
        assert made.skipped_rows == optimizer.skipped_rows, name
        notes = head.class_rows.behind is not None and head.class_rows.behind.done is not None
        assert notes == any(i.name == "steps of each row" for i in made.items), name


def test_the_network_by_hand():
    status, payload, statistics, gradient = plan(1000, 8, 4, 40).collectives
    assert (status.own, status.sent) == (8 * len(Status._fields), 3 * status.own)
    assert payload.own == 10 * 8 * 4 + 10 * 8
    assert payload.sent == payload.received == 3 * payload.own
    assert (statistics.own, statistics.sent) == (3 * 40 * 4, 3 * 3 * 40 * 4)
    assert (gradient.own, gradient.sent, gradient.received) == (40 * 8 * 4, 30 * 8 * 4, 30 * 8 * 4)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_statistics_of_many_ranks_are_reduced(dtype):
    numbers = (3 + (dtype is torch.float16)) * 65_536
    for world in (8, 64, 1024):
        made = plan(10_000_000, 128, world, 65_536, 0.1, autocast=dtype)
        (statistics,) = (c for c in made.collectives if c.name == "statistics (all-reduce)")
        assert statistics.own == 4 * numbers and statistics.sent == 2 * 4 * numbers * (world - 1) // world
        assert 2 * statistics.sent < 10e6
        (table,) = (item for item in made.items if item.name == "steps of a cycle")
        assert table.largest == 4 * -(-10_000_000 // world)
    assert [c.name for c in plan(10_000, 128, 8, 1024, 0.1).collectives][2] == "statistics (all-gather)"


def _bytes_put_in(rank: int, world: int) -> list[int]:
    """What each collective of a training step is given on this rank."""
    head = PartialFC(8, 100)
    with collectives() as seen:
        head(torch.randn(5, 8, requires_grad=True), torch.arange(5)).backward()
    return [size for _, size in seen]


def test_the_network_as_the_head_uses_it(ranks):
    for seen in ranks(2).run(_bytes_put_in, timeout=120):
        assert seen == [c.own for c in plan(100, 8, 2, 10).collectives]


def test_sampling_counts_the_window_and_the_positives():
    head = PartialFC(8, 5000, sample_rate=0.1)
    RowOptimizer(torch.optim.SGD, head, lr=0.1)
    head(torch.randn(64, 8), torch.randperm(5000)[:64])
    made = plan(5000, 8, 1, 64, 0.1)
    assert made.rows == 500 + 58  # 0.9 * 64 positives are not in the window
    assert abs(len(head.selected) - made.rows) < 12
    assert item(made, "row gradients") == made.rows * 8 * 4
    assert plan(5000, 8, 4, 64, 0.1).rows == 140
    assert plan(10, 8, 4, 64, 0.9).rows == 3  # never more than the shard


def test_hard_negatives_by_hand():
    made = plan(4000, 8, 4, 40, 0.1, hard_negatives=5, device="cpu")
    assert made.rows == 100 + 54  # of 240 ids 0.9 are not in the window; a quarter is this rank's
    assert item(made, "hard negatives") == 4 * 4000 * 5
    assert {i.name: len(i.bytes) for i in made.items if "hard" in i.name} == {
        "hard negatives": len(PHASES),
        "search for hard negatives": 1,
    }
    lists, tile, rows, received = 1000 * 5 * (4 + 8), 1000 * 1000 * 4, 2 * 1000 * 8 * 4, 2 * 1000 * 8 * 4
    assert item(made, "search for hard negatives") == lists + tile + rows + received + 4 * tile
    assert made.search is not None and made.search.operations == 2 * 1000 * 4000 * 8
    rows_sent, ids_sent = made.search.collectives
    assert (rows_sent.own, rows_sent.received) == (1000 * 8 * 4, 3 * 1000 * 8 * 4)
    assert (ids_sent.own, ids_sent.received) == (1000 * 5 * 4, 3 * 1000 * 5 * 4)
    assert made.collectives == plan(4000, 8, 4, 40, 0.1, device="cpu").collectives, "none in a step"
    assert plan(4000, 8, 4, 40, 0.1, hard_negatives=5).rows == 100 + 240  # elsewhere a slot for each id
    alone = plan(4000, 8, 1, 40, 0.1, hard_negatives=5)
    assert alone.search is not None and alone.search.collectives == ()
    assert alone.search.operations == 4000 * 4000 * 8
    text = str(made)
    assert "5 hard negatives a class" in text and "one search for hard negatives, per rank" in text
    assert plan(4000, 8, 4, 40, 0.1).search is None and "hard" not in str(plan(4000, 8, 4, 40, 0.1))
    fit = plan(4000, 8, 4, 40, 0.1, hard_negatives=5, memory=10**9).fit
    assert fit is not None and fit.largest_rate is not None
    assert fit.largest_rate.arguments == {"sample_rate": 1.0, "hard_negatives": 0}


def test_planned_rows_are_those_of_a_head_with_hard_negatives():
    head = PartialFC(8, 5000, sample_rate=0.1, hard_negatives=4)
    RowOptimizer(torch.optim.SGD, head, lr=0.1)
    head.refresh_hard_negatives()
    head(torch.randn(64, 8), torch.randperm(5000)[:64])
    made = plan(5000, 8, 1, 64, 0.1, hard_negatives=4)
    assert abs(len(head.selected) - plan(5000, 8, 1, 64, 0.1, hard_negatives=4, device="cpu").rows) < 40
    assert made.rows == 500 + 64 * 5


def test_bytes_scale():
    def sizes(**changes: Any) -> Plan:
        return plan(**{**GPUS, "sample_rate": 0.1, **changes})

    one, names = sizes(), ("weights", "optimizer state")
    for name in names:
        assert item(sizes(num_classes=58_000_000), name) == 2 * item(one, name)
        assert item(sizes(world_size=16), name) * 2 == item(one, name)
        assert item(sizes(dtype=torch.float64), name) == 2 * item(one, name)
        assert item(sizes(dtype=torch.bfloat16), name) * 2 == item(one, name)
        assert item(sizes(sample_rate=0.2), name) == item(one, name)
    assert item(sizes(sample_rate=0.2), "row gradients") == pytest.approx(2 * item(one, "row gradients"), rel=1e-3)
    kept = item(sizes(autocast=torch.bfloat16), "kept logits")  # in tiles of equal size, multiples of 8
    assert kept == pytest.approx(1024 * one.rows * 2, rel=1e-3)
    assert one.mode == "tiled"
    assert sizes(batch_size=4096).operations["matrix products"] == pytest.approx(
        4 * one.operations["matrix products"], rel=0.01
    )
    tile = 29_000_000 // 8 / 56  # 56 tiles of equal size, of at most 65,536 rows
    in_backward = item(plan(**GPUS, update_in_backward=True), "weight gradient")
    assert in_backward == pytest.approx(tile * 512 * 4, rel=1e-3)
    master = sizes(dtype=torch.bfloat16, low_precision="master")
    assert item(master, "optimizer state") == 2 * item(one, "optimizer state")  # float32 weights and momentum
    phases = one.phases
    assert (list(phases), phases[one.peak_phase], one.peak) == (
        list(PHASES),
        max(phases.values()),
        max(phases.values()),
    )


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("sgd", 0),
        ("sgd-momentum", 1),
        ("adam", 2),
        ("adamw", 2),
        ("rmsprop", 1),
        ("adagrad", 1),
        (torch.optim.NAdam, 2),
    ],
)
def test_state_of_the_optimizers(name, states):
    assert item(plan(1000, 8, 1, 4, optimizer=name), "optimizer state") == states * 1000 * 8 * 4
    cls, options = OPTIMIZERS[name] if isinstance(name, str) else (name, {})
    head = PartialFC(8, 1000)
    optimizer = RowOptimizer(cls, head, **options)
    head(torch.randn(4, 8), torch.arange(4)).backward()
    optimizer.step()
    assert (
        sum(v.nbytes for v in optimizer.state[head.weight].values() if torch.is_tensor(v) and v.ndim)
        == states * 1000 * 8 * 4
    )


@pytest.mark.parametrize(
    ("dtype", "autocast", "width"),
    [
        (torch.float32, None, 4),
        (torch.float32, torch.bfloat16, 2),
        (torch.bfloat16, None, 2),
        (torch.float64, None, 8),
        (torch.float64, torch.bfloat16, 8),
    ],
)
@pytest.mark.parametrize("over", [0, 1])
def test_the_mode_is_the_heads_at_the_boundary_of_the_budget(over, dtype, autocast, width):
    budget = 6 * 500 * width - over
    head = PartialFC(8, 500, logits_budget=budget, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        loss = head(torch.randn(6, 8), torch.arange(6))
    made = plan(500, 8, 1, 6, logits_budget=budget, autocast=autocast, device="cpu", dtype=dtype)
    assert head.logits_mode == made.mode == ("tiled" if over else "kept")
    assert made.logits == 6 * 500 * width
    assert over or made.logits + width == head._workspace._buffers["logits"].nbytes  # one number more
    loss.backward()


@pytest.mark.parametrize("over", [0, 1])
def test_the_budget_counts_all_centers(over):
    head = PartialFC(8, 50, SubCenterArcFace(centers=3), logits_budget=6 * 150 * 4 - over)
    head(torch.randn(6, 8), torch.arange(6))
    assert head.logits_mode == ("tiled" if over else "kept")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centers": 0}, "centers must be an integer of at least 1, not 0"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, not 0"),
        ({"embedding_size": 2.5}, "embedding_size must be an integer of at least 1, not 2.5"),
        ({"world_size": True}, "world_size must be an integer of at least 1, not True"),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, not -1"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\], not 1.5"),
        ({"sample_rate": float("nan")}, r"sample_rate must be in \(0, 1\], not nan"),
        ({"hard_negatives": -1, "sample_rate": 0.5}, "hard_negatives must be at least 0, not -1"),
        ({"hard_negatives": 5}, "hard_negatives is 5, but with sample_rate=1.0 all classes take part"),
        ({"hard_negatives": 5, "sample_rate": 0.5, "num_classes": 5}, "with 5 classes it can be at most 4"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, sgd-momentum, adam, .*, not 'lion'"),
        ({"optimizer": torch.nn.Linear}, "optimizer must be one of"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS cannot update rows one block at a time"),
        ({"dtype": torch.int8}, "dtype must be one of float32, float64, bfloat16, float16, not int8"),
        ({"autocast": torch.float32}, "autocast must be None, bfloat16 or float16, not float32"),
        ({"low_precision": "none"}, "low_precision must be None"),
        ({"skipped_rows": "lazy"}, 'skipped_rows must be "dense" or "still", not \'lazy\''),
        ({"skipped_rows": "dense", "optimizer": torch.optim.Adamax}, 'Adamax .*, or skipped_rows="still"'),
        ({"memory": 0}, "memory must be a number of bytes of at least 1, or None, not 0"),
        ({"logits_budget": -1}, "logits_budget must be a number of bytes of at least 0, or None, not -1"),
        ({"update_in_backward": True, "sample_rate": 0.5}, "update_in_backward requires sample_rate=1.0, not 0.5"),
        (
            {"update_in_backward": True, "autocast": torch.float16},
            "update_in_backward is incompatible with autocast float16",
        ),
        ({"device": "gpu"}, "device must be a type of device such as"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**{**GPUS, **change})


@pytest.mark.parametrize("gigabytes", [60, 24, 20, 18])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_advised_rate_fits_and_a_larger_one_does_not(gigabytes, autocast):
    asked = {**GPUS, "autocast": autocast, "memory": gigabytes * 10**9}
    fit = plan(**asked).fit
    assert fit is not None and fit.largest_rate is not None
    rate = fit.largest_rate.arguments["sample_rate"]
    at = plan(**{**asked, **fit.largest_rate.arguments})
    assert at.fit is not None and at.fit.fits and at.peak == fit.largest_rate.peak
    assert fit.fits == (plan(**asked).peak <= asked["memory"])
    if rate < 1:
        for budget in (0, None):
            more = plan(**{**asked, "sample_rate": rate * 1.002, "logits_budget": budget}).fit
            assert more is not None and not more.fits


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"sample_rate": 0.1},
        {"dtype": torch.bfloat16, "low_precision": "master"},
        {"batch_size": 65536, "logits_budget": 1 << 40},
    ],
)
@pytest.mark.parametrize("gigabytes", [3, 14, 16])
def test_every_change_that_is_advised_makes_it_fit(asked, gigabytes):
    asked = {**GPUS, **asked, "memory": gigabytes * 10**9}
    made = plan(**asked)
    assert made.fit is not None and not made.fit.fits and made.fit.changes
    for change in made.fit.changes:
        changed = plan(**{**asked, **change.arguments})
        assert changed.fit is not None and changed.fit.fits and changed.peak == change.peak, change
        for name, nearer in (("world_size", -1), ("batch_size", GPUS["world_size"])):  # no more than is needed
            if name in change.arguments:
                less = {**asked, **change.arguments, name: change.arguments[name] + nearer}
                assert not plan(**{**less, "logits_budget": 0}).fit.fits  # type: ignore[union-attr]
    if gigabytes == 3:
        assert made.fit.largest_rate is None
        assert any("world_size" in change.arguments for change in made.fit.changes)
        assert "no sampling rate makes it fit; each of these changes does:" in str(made)


def test_savers_are_joined_where_one_is_not_enough():
    made = plan(10_000_000, 512, 1, 1024, memory=24 * 10**9)
    assert made.fit is not None and made.fit.changes
    texts = [change.text for change in made.fit.changes]
    assert "update in backward (no clipping, no accumulation) and plain SGD" in texts
    assert not any(text.count(" and ") > 1 for text in texts)  # no more than is needed
    sampled = plan(10_000_000, 512, 1, 1024, 0.1, memory=24 * 10**9).fit
    assert sampled is not None and "plain SGD" in [change.text for change in sampled.changes]


def test_what_never_fits():
    made = plan(2_000_000, 512, 8, 4096, memory=10**6)
    assert made.fit is not None and made.fit.changes == () and made.fit.largest_rate is None
    assert "none of the changes that were tried makes it fit" in str(made)


def test_text_and_dictionary():
    made = plan(**GPUS, sample_rate=0.1, autocast=torch.bfloat16, memory=80 * 10**9)
    text = str(made)
    for part in (
        "29,000,000 classes",
        "weights                             6.91 GiB",
        "peak, in backward",
        "fit into 74.51 GiB",
    ):
        assert part in text
    again = json.loads(json.dumps(made.to_dict()))
    assert again == made.to_dict()
    assert (again["peak"], again["arguments"]["dtype"], again["arguments"]["autocast"]) == (
        made.peak,
        "float32",
        "bfloat16",
    )
    assert sum(i["bytes"].get(again["peak_phase"], 0) for i in again["items"]) == made.peak


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("512mib", 512 << 20),
        ("123", 123),
        ("4kB", 4000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_with_units(text, count):
    assert byte_count(text) == count


def test_the_command(capsys):
    sizes = ["--num_classes", "29000000", "--world_size", "8", "--batch_size", "1024", "--sample_rate", "0.1"]
    arguments = [*sizes, "--autocast", "bfloat16", "--memory", "80GB"]
    plan_command(arguments)
    made = plan(**GPUS, sample_rate=0.1, autocast=torch.bfloat16, memory=80 * 10**9)
    assert capsys.readouterr().out == f"{made}\n"
    plan_command([*(a.replace("_", "-") for a in arguments), "--json"])
    assert json.loads(capsys.readouterr().out) == made.to_dict()
    plan_command([*sizes, "--skipped_rows", "still"])
    assert capsys.readouterr().out == f"{plan(**GPUS, sample_rate=0.1, skipped_rows='still')}\n"
    assert main(["plan", *sizes]) == 0
    assert capsys.readouterr().out.startswith("C = 29,000,000 classes")
    assert main(["plan", "--num_classes", "10"]) == 2
    assert capsys.readouterr().err.startswith("partial-fc: error: the following arguments are required: --batch_size;")
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    assert "--sample_rate r" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num_classes 10", "required: --batch_size"),
        ("--num_classes 10 --batch_size 0", "batch_size must be an integer of at least 1, not 0"),
        ("--num_classes x --batch_size 1", "--num_classes: 'x' is not a whole number"),
        (
            "--num_classes 10 --batch_size 1 --memory 80XB",
            "--memory: '80XB' is not a number of bytes; write it as 80GB",
        ),
        ("--num_classes 10 --batch_size 1 --optimizer lamb", "--optimizer: invalid choice: 'lamb'"),
        ("--num_classes 10 --batch_size 1 --speed 3", "unrecognized arguments: --speed 3"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        plan_command(arguments.split())


# ---------------------------------------------------------------------------------------------------- memory

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def small(monkeypatch):
    """Tiles and blocks as small as the problems here, and buffers that end with the step, as on a GPU."""
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 1 << 18)
    monkeypatch.setattr(tiles, "TILE_BYTES_ELSEWHERE", 1 << 18)
    for module in (optim, memory):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 18)
        monkeypatch.setattr(module, "BLOCK_BYTES_ELSEWHERE", 1 << 18)
    for name in ("BLOCK_BYTES", "BLOCK_BYTES_ELSEWHERE"):
        monkeypatch.setattr(later, name, 1 << 18)
    for form in (moves.LinearMoves, adam_moves.AdamMoves):
        monkeypatch.setattr(form, "MOST", 2)  # all rows are brought up to date in one of the steps
    catch_up = later.SkippedRows.catch_up

    def all_of_them(self: Any, index: Any = None) -> None:
        """Leave out none of the rows, as on a GPU."""
        if index is None and self.done is not None:
            self.done.zero_()
        catch_up(self, index)

    monkeypatch.setattr(later.SkippedRows, "catch_up", all_of_them)
    monkeypatch.setattr(Workspace, "get", lambda self, name, shape, dtype, device: torch.empty(shape, dtype=dtype))


def allocated(made: Plan) -> dict[str, int]:
    """Bytes of tensors of a head as planned, at most, in each phase of its first four steps, as torch's profiler sees
    them."""
    a = made.arguments
    cls, options = OPTIMIZERS[a["optimizer"]]
    head = PartialFC(
        a["embedding_size"],
        a["num_classes"],
        ArcFace() if a["centers"] == 1 else SubCenterArcFace(centers=a["centers"]),
        sample_rate=a["sample_rate"],
        logits_budget=a["logits_budget"],
        dtype=a["dtype"],
    )
    kinds = {name: a[name] for name in ("update_in_backward", "low_precision", "skipped_rows")}
    optimizer = RowOptimizer(cls, head, **kinds, **options)
    x = torch.randn(
        a["batch_size"], a["embedding_size"], dtype=torch.promote_types(a["dtype"], torch.float32), requires_grad=True
    )
    # how many rows a step selects depends on them
    labels = torch.randperm(a["num_classes"], generator=torch.Generator().manual_seed(0))[: a["batch_size"]]
    gc.collect()  # what others leave would be subtracted when it goes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for _ in range(4):
            x.grad = None
            with torch.autocast("cpu", a["autocast"] or BF16, enabled=a["autocast"] is not None):
                loss = head(x, labels)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    names = {f"partial_fc::{name}": name for name in PHASES} | {
        "partial_fc::targets": "forward",
        "partial_fc::backward_tiles": "backward",
    }
    if a["update_in_backward"]:
        del names["partial_fc::update"]
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    phase, now = "gather", head.weight.nbytes
    peaks = {phase: now}
    for event in sorted(events, key=lambda e: e.start_ns()):
        phase = names.get(event.name(), phase)
        now += event.nbytes() if event.name() == "[memory]" else 0
        peaks[phase] = max(peaks.get(phase, 0), now)
    return peaks


def _id(changes: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in changes.items()) or "as it is"


SAMPLED: list[dict[str, Any]] = [
    {"sample_rate": 0.1},
    {"sample_rate": 0.5},
    {"sample_rate": 0.5, "logits_budget": 0},
    {"sample_rate": 0.5, "autocast": BF16},
    {"sample_rate": 0.5, "autocast": BF16, "logits_budget": 0},
    {"sample_rate": 0.5, "dtype": BF16, "low_precision": "stochastic"},
    {"sample_rate": 0.5, "dtype": BF16, "low_precision": "master"},
    {"sample_rate": 0.5, "dtype": torch.float64},
    {"sample_rate": 0.5, "dtype": F16},
    {"sample_rate": 0.5, "optimizer": "adamw"},
    {"sample_rate": 0.5, "optimizer": "rmsprop"},
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logits_budget": 0},
        *({**changes, "skipped_rows": choice} for changes in SAMPLED for choice in ("dense", "still")),
        {"sample_rate": 0.5, "optimizer": "sgd"},
        {"autocast": BF16},
        {"autocast": F16},
        {"autocast": F16, "logits_budget": 0},
        {"dtype": BF16, "low_precision": "master"},
        {"dtype": BF16, "low_precision": "stochastic", "logits_budget": 0},
        {"update_in_backward": True},
        {"update_in_backward": True, "logits_budget": 0},
        {"update_in_backward": True, "dtype": BF16, "low_precision": "stochastic"},
        {"optimizer": "rmsprop"},
    ],
    ids=_id,
)
def test_tensors_are_those_that_were_planned(changes):
    """Every allocation counts here; the plan is one for GPUs."""
    check_tensors(changes)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("changes", [c for c in SAMPLED if "logits_budget" not in c], ids=_id)
def test_tensors_of_rows_that_are_brought_up_to_date_in_place(changes, monkeypatch):
    monkeypatch.setattr(later, "TAKEN_BYTES", 0)
    check_tensors(changes)
    made, still = plan(10_000, 8, 1, 4, 0.1), plan(10_000, 8, 1, 4, 0.1, skipped_rows="still")
    assert [i for i in made.items if i.name == "row gradients"] == [i for i in still.items if i.name == "row gradients"]
    assert not [i for i in made.items if i.name == "rows and state, up to date"]
    assert item(made, "steps of each row") == 4 * 10_000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("changes", [{}, {"logits_budget": 0}, {"sample_rate": 0.5}], ids=_id)
def test_tensors_of_sub_centers(changes):
    """As planned but for what the maximum over a class's rows takes in a tile."""
    made = plan(2000, 64, 1, 64, centers=3, **changes)
    found = allocated(made)
    print({phase: (made.phases[phase], found[phase]) for phase in found})
    assert item(made, "weights") == item(made, "optimizer state") == 3 * 2000 * 64 * 4
    assert made.peak == pytest.approx(max(found.values()), rel=0.1)


def test_sub_centers_by_hand(capsys):
    """Rows of a class are K; what is counted by class stays."""
    one, made = plan(10_000, 8, 2, 40, 0.1), plan(10_000, 8, 2, 40, 0.1, centers=3)
    assert (made.classes, made.rows, made.logits) == (one.classes, 3 * one.rows, 3 * one.logits)
    for name in ("weights", "optimizer state", "row gradients", "rows and state, up to date"):
        assert item(made, name) == 3 * item(one, name), name
    for name in ("steps of a cycle", "steps of each row", "embeddings and their gradient"):
        assert item(made, name) == item(one, name), name
    assert made.collectives == one.collectives
    assert "3 sub-centers a class" in str(made) and "sub-centers" not in str(one)
    sizes = ["--num_classes", "10000", "--embedding_size", "8", "--world_size", "2", "--batch_size", "40"]
    plan_command([*sizes, "--sample_rate", "0.1", "--centers", "3", "--optimizer", "AdamW"])
    assert capsys.readouterr().out == f"{plan(10_000, 8, 2, 40, 0.1, 'AdamW', centers=3)}\n"


def test_whether_it_fits_is_said_first():
    assert " do not fit into " in str(plan(**GPUS, memory=10**9)).splitlines()[0]
    fits = str(plan(**GPUS, sample_rate=0.1, memory=80 * 10**9)).splitlines()
    assert " fit into 74.51 GiB" in fits[0] and fits[3].startswith("C = 29,000,000 classes")
    assert any(line.startswith("  not counted: gradients of earlier micro-batches (") for line in fits)
    assert "micro-batches" not in str(plan(**GPUS, update_in_backward=True))


def check_tensors(changes: dict[str, Any]) -> None:
    made = plan(**{"num_classes": 6000, "embedding_size": 64, "world_size": 1, "batch_size": 64, **changes})
    found = allocated(made)
    table = sum(each.largest for each in made.items if each.name == "steps of a cycle")  # none alone on a CPU
    for phase in ("select", "forward", "backward", "update"):
        if phase in found and (phase != "select" or any(i.name == "steps of each row" for i in made.items)):
            # in half precision the CPU has temporaries of its own, which differ from one processor to another
            # and weights that stand still without a gradient (RMSprop) are not copied when their row is moved
            rel = 0.06 if changes.get("dtype") not in (BF16, F16) else 0.1
            own = made.phases[phase] - (2 if phase == "select" else 1) * table  # there beside that of the cycle before
            assert own == pytest.approx(found[phase], rel=rel), phase
    assert made.peak - table == pytest.approx(max(found.values()), rel=0.02)


MEASURED: dict[str, dict[str, Any]] = {
    "kept": {"sample_rate": 1.0, "logits_budget": None},
    "tiled": {"sample_rate": 1.0, "logits_budget": 0},
    "sampled": {"sample_rate": 0.1, "logits_budget": None},
    "sampled_still": {"sample_rate": 0.1, "logits_budget": None, "skipped_rows": "still"},
}
CLASSES, WIDTH, SAMPLES, STEPS = 150_000, 256, 128, 2


def measure(sample_rate: float, logits_budget: int | None, skipped_rows: Any = None) -> int:
    """Growth of this process's resident memory at its peak, from before the head is built to after its second step."""
    x, labels = torch.randn(SAMPLES, WIDTH), torch.randperm(CLASSES)[:SAMPLES]

    def train(classes: int, samples: int) -> None:
        head = PartialFC(WIDTH, classes, sample_rate=sample_rate, logits_budget=logits_budget)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, skipped_rows=skipped_rows)
        for _ in range(STEPS):
            head(x[:samples].clone().requires_grad_(), labels[:samples] % classes).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(1000, 8)  # loads what torch loads at first use
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    train(CLASSES, SAMPLES)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes that /proc/self/status tells."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def measure_all() -> None:
    """A line "name bytes" of each case, in a process forked from this one, which has done nothing but import torch."""
    torch.set_num_threads(1)
    for name, case in MEASURED.items():
        if os.fork() == 0:
            print(name, measure(**case), flush=True)
            os._exit(0)
        os.wait()


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process's memory can be reset on Linux only"
)
@pytest.mark.slow
def test_memory_is_what_was_planned():
    """Resident memory of the CPU, heap and all. Nothing is subtracted."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests/support'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], stdout=subprocess.PIPE, text=True, env=environment, timeout=150, check=True
    )
    measured = {name: int(count) for name, count in map(str.split, done.stdout.splitlines())}
    for name, case in MEASURED.items():
        made = plan(CLASSES, WIDTH, 1, SAMPLES, device="cpu", **case)
        print(
            f"{name}: measured {measured[name] / 1e6:.1f} MB, planned {made.peak / 1e6:.1f} MB ({made.peak / measured[name] - 1:+.1%})"
        )
        assert made.mode == ("tiled" if name == "tiled" else "kept")
        assert made.peak == pytest.approx(measured[name], rel=0.1), name


if __name__ == "__main__":
    measure_all()


def test_rows_in_files():
    sizes = {"sample_rate": 0.01, "device": "cpu", "skipped_rows": "still"}
    inside = plan(100_000, 8, 2, 4, **sizes)
    made = plan(100_000, 8, 2, 4, **sizes, storage="files", sample_block=100, disk=10**6)
    assert item(made, "weights") == item(made, "optimizer state") == 0
    assert item(made, "which rows were touched") == 50_000
    assert made.phases["update"] == inside.phases["update"] - 2 * 50_000 * 8 * 4 + 50_000
    assert made.tier is not None
    assert made.tier.stored == 2 * 50_000 * 8 * 4
    assert made.tier.moved == made.rows * 2 * 8 * 4
    assert made.tier.parts == 5 + made.rows - 500  # half of ten blocks, and labels outside them
    assert made.tier.part_bytes == 100 * 8 * 4
    assert made.tier.seconds == pytest.approx(2 * 2 * made.tier.moved / 10**6)
    assert "s of a step, hidden if it takes longer" in str(made)
    one = plan(100_000, 8, 2, 4, optimizer=RowWiseAdagrad, **sizes)
    assert item(one, "optimizer state") == 0
    found = plan(100_000, 8, 2, 4, **sizes, memory=3 << 20).fit
    assert found is not None
    (change,) = (each for each in found.changes if "files" in each.text)
    assert change.arguments == {"storage": "files"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"storage": "disk"}, "storage must be"),
        ({"storage": "host", "sample_rate": 1.0}, "update_in_backward"),
        ({"sample_block": 0}, "sample_block must be"),
        ({"disk": 0}, "bytes per second"),
    ],
)
def test_storages_that_cannot_be(more, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"num_classes": 1000, "embedding_size": 8, "world_size": 1, "batch_size": 4, "sample_rate": 0.1,
                "device": "cpu", **more})  # fmt: skip


def test_the_command_plans_rows_in_files(capsys):
    sizes = "--num_classes 100000 --embedding_size 8 --batch_size 4 --sample_rate 0.01 --device cpu"
    plan_command([*sizes.split(), *["--storage", "files", "--sample_block", "100", "--disk", "1MB"]])
    printed = capsys.readouterr().out
    assert "FileRows, blocks of 100 classes" in printed
    assert "rows in files, per rank" in printed
    plan_command([*sizes.split()[:-1], "cuda", "--storage", "host"])
    printed = capsys.readouterr().out
    assert "rows in host memory, per rank" in printed and "to the GPU, and back, in a step" in printed


def test_rows_on_the_host_of_a_gpu():
    sizes = {"sample_rate": 0.001, "autocast": torch.bfloat16, "device": "cuda"}
    inside = plan(100_000_000, 512, 1, 4096, **sizes)
    made = plan(100_000_000, 512, 1, 4096, **sizes, storage="host")
    assert made.tier is not None and made.tier.stored == 100_000_000 * 512 * 2 * 4
    assert made.tier.bus == made.rows * 512 * 4 == item(made, "rows of the step")
    assert not {"weights", "optimizer state", "blocks of the optimizer"} & {each.name for each in made.items}
    assert inside.peak > 400e9 and made.peak < 10e9
    assert made.with_kernels == ()
    fit = plan(100_000_000, 512, 1, 4096, **sizes, memory=60 << 30).fit
    assert fit is not None and not fit.fits
    assert {"storage": "host"} in [each.arguments for each in fit.changes]
    in_backward = plan(1_000_000, 512, 1, 64, device="cuda", storage="host", update_in_backward=True)
    assert item(in_backward, "rows of the step") < 300e6 < 1_000_000 * 512 * 4  # a tile, not all
