"""Hard negatives: the nearest classes of the batch's classes are in the sample, at every world size and after every
resumption, and the table of them follows the classes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from common import any_message_of, local, message_of, needs
from missing_ranks import told
from shards import everyones, part_of, selected_by_all, two_by_two
from torch import Tensor

from partial_fc import (
    ArcFace,
    NonFiniteError,
    NormFace,
    PartialFC,
    RowOptimizer,
    SubCenterArcFace,
    gather,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.classes import approximate, hard_negatives
from partial_fc.sampling import draw_window

D, C, K = 5, 23, 3
N = 7
RATE = 0.2
SGD = {"lr": 0.3, "momentum": 0.9}


def build(rank: int = 0, world: int = 1, k: int = K, every: int = 4, **options: Any) -> PartialFC:
    given: dict[str, Any] = {"dtype": torch.float64, "init_std": 1.0, "sample_rate": RATE, **options}
    given.setdefault("margin", ArcFace(scale=16.0))
    return PartialFC(D, given.pop("classes", C), hard_negatives=k, hard_negatives_every=every, **given)


def batch(step: int, rank: int, world: int, classes: int = C) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    part = part_of(N, rank, world)
    return x[part].requires_grad_(), torch.randint(0, classes, (N,), generator=generator)[part]


def train(head: PartialFC, optimizer: Any, steps: range, rank: int, world: int) -> list[float]:
    losses = []
    for step in steps:
        loss = head(*batch(step, rank, world))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def told_by_the_log() -> Iterator[list[str]]:
    """What partial_fc logs inside."""
    found: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("partial_fc")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def all_rows(head: PartialFC) -> Tensor:
    return torch.cat(everyones(local(head.weight.detach()).clone()))


def nearest_by_hand(rows: Tensor, k: int) -> Tensor:
    """`[C, k]` of rows `[C, D]` or `[C, centers, D]`."""
    unit = torch.nn.functional.normalize(rows if rows.ndim == 3 else rows[:, None], dim=2)
    cosines = torch.einsum("iad,jbd->ijab", unit, unit).amax((2, 3)).fill_diagonal_(-2.0)
    return cosines.argsort(dim=1, descending=True)[:, :k]


# --------------------------------------------------------------------------------------------------- the table


def tables(rank: int, world: int, mesh: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(table, that by hand, rows as they were) of some kinds of heads."""
    hard_negatives.PIECE_BYTES = 100  # two or three classes of each rank at a time
    found = []
    for options in (
        {},
        {"dtype": torch.float32},
        {"margin": SubCenterArcFace(centers=2)},
        {"k": C - 1},
        {"k": 1, "classes": 2},
        {"k": 2, "classes": 4, "sample_rate": 0.5},
    ):
        head = build(group=two_by_two() if mesh else None, **options)
        assert head.neighbours is not None and head.neighbours.dtype == torch.int32
        assert bool((head.neighbours == -1).all())
        assert head.refresh_hard_negatives() is None
        rows = all_rows(head)[: head.num_classes]
        found.append((head.neighbours.long(), nearest_by_hand(rows, head.hard_negatives), rows))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_table_is_that_of_a_dense_search(ranks, world):
    for found in ranks(world).run(tables, False, timeout=150):
        for table, by_hand, _ in found:
            assert torch.equal(table, by_hand)


def test_replicas_have_the_same_table(ranks):
    for found in ranks(4).run(tables, True, timeout=150):
        for table, by_hand, _ in found:
            assert torch.equal(table, by_hand)


def test_one_process_without_a_group():
    for table, by_hand, _ in tables(0, 1, False):
        assert torch.equal(table, by_hand)


# --------------------------------------------------------------------------------------------------- a forward


def selected(rank: int, world: int, mesh: bool) -> None:
    head = build(every=3, ignore_index=2, group=two_by_two() if mesh else None)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    graph = torch.full((C, K), -1)
    for step in range(11):
        if step and step % 3 == 0:
            graph = nearest_by_hand(all_rows(head)[:C], K)  # the rows before this forward
        x, labels = batch(step, rank, world)
        given: tuple[Any, ...] = x, labels
        if step % 2:  # two labels each, of which the second may be an ignored one
            labels = torch.stack((labels, labels.flip(0)), 1)
            shares = torch.tensor([0.75, 0.25]).expand(len(x), 2)
            given = (gather(x, labels, label_weights=shares, group=head.shards.ranks.mesh),)
        head(*given).backward()
        everyone = torch.cat(everyones(labels.reshape(-1)))
        positives = everyone[everyone != 2]
        window = draw_window(C, RATE, seed=0, step=step, device=torch.device("cpu"))
        expected = torch.cat((window, positives, graph[positives].flatten())).unique()
        assert torch.equal(selected_by_all(head), expected[expected >= 0]), step
        optimizer.step()
        optimizer.zero_grad()
        before = head.neighbours.clone()  # type: ignore[union-attr]
        head.eval()
        with torch.no_grad():
            head(*given)
        head.train()
        assert torch.equal(before, head.neighbours) and torch.equal(before.long(), graph)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_forward_takes_the_window_the_classes_of_the_batch_and_their_neighbours(ranks, world):
    ranks(world).run(selected, False, timeout=150)


def test_replicas_take_the_neighbours_of_all_classes_of_the_mesh(ranks):
    ranks(4).run(selected, True, timeout=150)


def losses(rank: int, world: int) -> tuple[list[float], Tensor, Tensor]:
    head = build()
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    found = train(head, optimizer, range(30), rank, world)
    return found, head.neighbours.clone(), all_rows(head)  # type: ignore[union-attr]


def test_a_run_is_the_same_at_every_world_size(ranks):
    runs = [ranks(world).run(losses, timeout=150) for world in (1, 2, 3)]
    for found, table, rows in (each for run in runs for each in run):
        torch.testing.assert_close(found, runs[0][0][0], rtol=1e-10, atol=1e-10)
        assert torch.equal(table, runs[0][0][1])
        torch.testing.assert_close(rows, runs[0][0][2], rtol=1e-9, atol=1e-9)
    head = build(k=0)
    without = train(head, RowOptimizer(torch.optim.SGD, head, **SGD), range(30), 0, 1)
    assert without[:4] == pytest.approx(runs[0][0][0][:4], rel=1e-12)
    assert without[4:] != pytest.approx(runs[0][0][0][4:], rel=1e-3)


def test_a_loss_is_that_of_the_selected_classes():
    """Against torch, over the classes that the forward says it took."""
    head = build(margin=NormFace(scale=16.0))
    head.refresh_hard_negatives()
    x, labels = batch(0, 0, 1)
    loss = head(x, labels)
    unit = torch.nn.functional.normalize
    logits = 16.0 * unit(x, dim=1) @ unit(head.weight.detach(), dim=1).T
    outside = torch.ones(C, dtype=torch.bool).index_fill_(0, head.selected, False)
    expected = torch.nn.functional.cross_entropy(logits.masked_fill(outside, -torch.inf), labels)
    torch.testing.assert_close(loss, expected)
    assert loss.item() > build(margin=NormFace(scale=16.0))(x, labels).item(), "more classes in the denominator"


# --------------------------------------------------------------------------------------------------- saved state


def until(rank: int, world: int, folder: str) -> None:
    head = build()
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    train(head, optimizer, range(14), rank, world)
    save_checkpoint(folder, head=head, optimizer=optimizer)


def resumed(rank: int, world: int, folder: str) -> list[float]:
    head = build()
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    load_checkpoint(folder, head=head, optimizer=optimizer)
    return train(head, optimizer, range(14, 30), rank, world)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_a_resumed_run_draws_as_one_that_was_not_interrupted(ranks, tmp_path, before, after):
    (expected, _, _) = ranks(1).run(losses)[0]
    ranks(before).run(until, str(tmp_path))
    for found in ranks(after).run(resumed, str(tmp_path)):
        torch.testing.assert_close(found, expected[14:], rtol=1e-10, atol=1e-10)


def other_tables(rank: int, world: int, folder: str) -> None:
    """Checkpoints and states between heads with other K, or none."""
    full = build(k=K)
    full.refresh_hard_negatives()
    table = full.neighbours
    assert table is not None
    filled = torch.nn.functional.pad(table, (0, 2), value=-1)
    save_checkpoint(f"{folder}/full", head=full)
    save_checkpoint(f"{folder}/none", head=build(k=0))
    ways: tuple[Callable[[PartialFC], Any], ...] = (
        lambda head: load_checkpoint(f"{folder}/full", head=head),
        lambda head: head.load_state_dict(full.state_dict()),
    )
    for load in ways:
        for k, expected in ((K, table), (K - 1, table[:, : K - 1]), (K + 2, filled)):
            head = build(k=k, seed=1, init_std=2.0)
            load(head)
            assert head.neighbours is not None and torch.equal(head.neighbours, expected), k
            assert torch.equal(local(head.weight), local(full.weight))
        none = build(k=0, seed=1)
        load(none)
        assert none.neighbours is None and torch.equal(local(none.weight), local(full.weight))
    for load in (
        lambda head: load_checkpoint(f"{folder}/none", head=head),
        lambda head: head.load_state_dict(build(k=0).state_dict()),
    ):
        head = build()
        head.refresh_hard_negatives()
        load(head)
        assert head.neighbours is not None and bool((head.neighbours == -1).all())
    # rows alone are no whole state: the table stays until it is searched again
    head = build()
    head.refresh_hard_negatives()
    assert head.load_state_dict({"weight": torch.zeros(C, D)}, strict=False).unexpected_keys == []
    assert torch.equal(head.neighbours, table)  # type: ignore[arg-type]
    wrong = any_message_of(build(classes=C + 1, k=K).load_state_dict, full.state_dict())
    assert "weight" in wrong
    if world > 1:  # what one rank lacks, none loads
        head = build()
        head.refresh_hard_negatives()
        state = full.state_dict()
        if rank == 0:
            del state["neighbours"]
        head.load_state_dict(state)
        assert bool((head.neighbours == -1).all())  # type: ignore[union-attr]


@pytest.mark.parametrize("world", [1, 2])
def test_a_table_of_other_neighbours_or_none_loads(ranks, tmp_path, world):
    ranks(world).run(other_tables, str(tmp_path))


def test_without_a_group_too(tmp_path):
    other_tables(0, 1, str(tmp_path))


def test_it_starts_anew_and_stays_whole_numbers(tmp_path):
    head = build()
    head.refresh_hard_negatives()
    table = head.neighbours
    assert table is not None
    for cast in (head.half, head.double, lambda: head.type(torch.bfloat16), lambda: head.to(torch.float64)):
        cast()
        assert torch.equal(head.neighbours, table) and head.neighbours.dtype == torch.int32  # type: ignore[arg-type,union-attr]
    head.reset_parameters()
    assert bool((head.neighbours == -1).all())  # type: ignore[union-attr]
    empty = build(device="meta")
    assert empty.neighbours is not None and empty.neighbours.is_meta
    assert "meta device" in message_of(empty.refresh_hard_negatives)
    empty.to_empty(device="cpu").reset_parameters()
    assert bool((empty.neighbours == -1).all())
    assert set(head.state_dict()) == {*build(k=0).state_dict(), "neighbours"}


# --------------------------------------------------------------------------------------------------- other classes


def changed(rank: int, world: int) -> None:
    for merge in ("mean", "first"):
        head = build(every=1000)
        RowOptimizer(torch.optim.SGD, head, **SGD)
        head.refresh_hard_negatives()
        assert head.neighbours is not None
        before = head.neighbours.tolist()
        mapping = [-1, 4, 4, 0, 1, 2, 3, *range(5, C - 2)]
        hard_negatives.BLOCK = 4
        head.remap(mapping, merge=merge)
        classes = max(mapping) + 1
        expected = [[-1] * K for _ in range(classes)]
        for old in reversed(range(C)):
            if (new := mapping[old]) >= 0:
                renamed = [mapping[each] for each in before[old]]
                expected[new] = [-1 if each == new else each for each in renamed]
        assert head.neighbours.tolist() == expected
        head.expand(3)
        assert head.neighbours.tolist() == expected + [[-1] * K] * 3
        x, labels = batch(0, rank, world, classes + 3)
        head(x, labels).backward()
        head.zero_grad()
        head.refresh_hard_negatives()
        rows = all_rows(head)
        assert torch.equal(head.neighbours.long(), nearest_by_hand(rows, K))
        state = local(head.weight.detach()).clone(), head.neighbours.clone()
        few = [0, 1, 2, *[-1] * (classes)]
        message = message_of(head.remap, few, merge=merge)
        assert message == (
            "ValueError: hard_negatives is 3, the number of nearest other classes of a class; with 3 classes it can be "
            "at most 2"
        )
        assert torch.equal(state[0], local(head.weight.detach())) and torch.equal(state[1], head.neighbours)
        assert head.num_classes == classes + 3
        many = [0, 1, 2, 3, *[-1] * (classes - 1)]
        head.remap(many, merge=merge)
        assert head.neighbours.shape == (4, K)


@pytest.mark.parametrize("world", [1, 3])
def test_the_table_follows_the_classes(ranks, world):
    ranks(world).run(changed)


# --------------------------------------------------------------------------------------------------- bad input


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "below 0": ({"k": -1}, "hard_negatives must be at least 0, not -1"),
    "half": ({"k": 2.5}, "hard_negatives must be a whole number, not 2.5"),
    "a bool": ({"k": True}, "hard_negatives must be a whole number, not True"),
    "all classes": (
        {"k": C},
        f"hard_negatives is {C}, the number of nearest other classes of a class; with {C} classes it can be at most 22",
    ),
    "never": ({"every": 0}, "hard_negatives_every must be at least 1, not 0"),
    "no number": ({"every": None}, "hard_negatives_every must be a whole number, not None"),
    "no sampling": (
        {"sample_rate": 1.0},
        "hard_negatives is 3, but with sample_rate=1.0 all classes take part in every forward: leave it at 0, or give "
        "a sample_rate below 1",
    ),
}


def refused(rank: int, world: int) -> dict[str, str]:
    found = {name: message_of(build, **options) for name, (options, _) in BAD.items()}
    found["assigned"] = message_of(setattr, build(), "hard_negatives", 5)
    found["assigned every"] = message_of(setattr, build(), "hard_negatives_every", 0)
    found["without"] = message_of(build(k=0).refresh_hard_negatives)
    last = rank == world - 1
    if world > 1:
        found["built otherwise"] = message_of(build, k=4 if last else 3)
        head = build()
        head.hard_negatives_every = 7 if last else 4
        found["every otherwise"] = message_of(lambda: head(*batch(0, rank, world)))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_what_cannot_be_is_refused_alike(ranks, world):
    results = ranks(world).run(refused)
    assert all(each == results[0] for each in results)
    for name, (_, message) in BAD.items():
        assert results[0][name] == f"ValueError: {message}"
    assert results[0]["assigned"] == (
        "ValueError: hard_negatives of a head that is built stays 3: build another head with hard_negatives=5 and load "
        "the state of this one into it (save_checkpoint, load_checkpoint)"
    )
    assert results[0]["assigned every"] == "ValueError: hard_negatives_every must be at least 1, not 0"
    assert results[0]["without"].startswith("RuntimeError: this head has no hard negatives: build it with")
    if world > 1:
        assert "hard_negatives is 3 on rank 0 and 4 on rank 1" in results[0]["built otherwise"]
        assert "hard_negatives_every is 4 on rank 0 and 7 on rank 1" in results[0]["every otherwise"]


def test_numbers_in_other_spellings():
    head = build(k=torch.tensor(2), every=1e2)  # type: ignore[arg-type]
    assert (head.hard_negatives, head.hard_negatives_every) == (2, 100)
    head.hard_negatives_every = 3.0  # type: ignore[assignment]
    assert repr(head.hard_negatives_every) == "3"


def diverged(rank: int, world: int) -> None:
    for policy in ("raise", "skip", "log"):
        head = build(every=1, on_nonfinite=policy)
        RowOptimizer(torch.optim.SGD, head, **SGD)
        head.refresh_hard_negatives()
        before = head.neighbours.clone()  # type: ignore[union-attr]
        head(*batch(0, rank, world))
        if 20 in range(head.shards.lo, head.shards.hi):
            local(head.weight.detach())[20 - head.shards.lo] = torch.nan
        if policy == "log":
            head(*batch(1, rank, world))
        else:
            with pytest.raises(NonFiniteError, match="row of class 20 is not finite"):
                head(*batch(1, rank, world))
        with pytest.raises(NonFiniteError, match="row of class 20 is not finite"):
            head.refresh_hard_negatives()
        assert torch.equal(head.neighbours, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_are_not_finite(ranks, world):
    ranks(world).run(diverged)


def apart(rank: int, world: int) -> tuple[str, tuple[int, ...], str]:
    head = build()
    return told(lambda: head.refresh_hard_negatives() if rank == 0 else head(*batch(0, rank, world)))


def test_a_search_of_one_rank_alone(ranks):
    for message, _, _ in ranks(2).run(apart):
        where = "rank 0 is in refresh_hard_negatives, rank 1 is in the exchange of a batch. "
        assert message.startswith(f"ranks have come to different collectives: {where}"), message


def test_a_search_is_told():
    head = build(k=2)
    with told_by_the_log() as messages:
        head.refresh_hard_negatives()
    (message,) = messages
    unit = torch.nn.functional.normalize(head.weight.detach(), dim=1)
    mean = (unit @ unit.T).fill_diagonal_(-2.0).topk(2).values.mean()
    assert message.startswith("hard negatives: the 2 nearest of 23 classes in ")
    assert message.endswith(f" s, mean cosine {mean:.4f}, {4 * C * 2} bytes on every rank")


# --------------------------------------------------------------------------------------------------- an index


def indexed(rank: int, world: int, ivf: bool) -> list[float]:
    """Recall as it is told, and as it is over all classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "ROWS_AT_ONCE", 70)
        patch.setattr(approximate, "ROWS_OF_A_CELL", 40)  # faiss warns of fewer than 39
        patch.setattr(approximate, "FLAT_BELOW", 0 if ivf else 20_000)
        classes = 1501 if ivf else C
        head = build(classes=classes, k=5, dtype=torch.float32, hard_negatives_search="faiss")
        if ivf:
            drawn = torch.Generator().manual_seed(0)
            groups, noise = torch.randn(20, D, generator=drawn), torch.randn(classes, D, generator=drawn)
            rows = groups.repeat(80, 1)[:classes] + 0.2 * noise
            local(head.weight.detach()).copy_(rows[head.shards.lo : head.shards.hi])
        with told_by_the_log() as messages:
            head.refresh_hard_negatives()
        (message,) = messages
        table, by_hand = head.neighbours.long(), nearest_by_hand(all_rows(head).double(), 5)  # type: ignore[union-attr]
        assert table.shape == by_hand.shape and not bool((table == torch.arange(classes)[:, None]).any())
        hits = (table[:, None, :] == by_hand[:, :, None]).any(2).double().mean()
        assert ivf or torch.equal(table, by_hand)
        return [float(message.split("recall ")[1].split(",")[0]), float(hits)]


@pytest.mark.parametrize("world", [1, 2, 3])
@needs("faiss")
def test_an_index_finds_most(ranks, world):
    assert ranks(world).run(indexed, False, timeout=150) == [[1.0, 1.0]] * world
    found = ranks(world).run(indexed, True, timeout=150)
    assert all(each == found[0] for each in found), "the same table and recall on every rank"
    said, recall = found[0]
    assert 0.9 < recall <= 1.0 and abs(said - recall) < 0.03


def index_of_no_rows(rank: int, world: int) -> list[list[int]]:
    head = build(classes=2, k=1, sample_rate=0.5, hard_negatives_search="faiss")
    head.refresh_hard_negatives()
    return head.neighbours.tolist()  # type: ignore[union-attr]


@needs("faiss")
def test_an_index_on_ranks_without_classes(ranks):
    assert ranks(3).run(index_of_no_rows) == [[[1], [0]]] * 3


def test_what_an_index_cannot_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs faiss: pip install faiss-cpu \(or partial_fc\[faiss\]\)"):
        build(hard_negatives_search="faiss")
    head = build()
    with pytest.raises(ModuleNotFoundError, match="needs faiss"):
        head.hard_negatives_search = "faiss"
    assert build(k=0, hard_negatives_search="faiss").neighbours is None
    centers = message_of(build, margin=SubCenterArcFace(centers=2), hard_negatives_search="faiss")
    assert "takes one row a class, not 2 centers" in centers
    head = build(margin=SubCenterArcFace(centers=2))
    assert message_of(setattr, head, "hard_negatives_search", "faiss") == centers
    assert "must be one of exact, faiss, not 'near'" in message_of(build, hard_negatives_search="near")


def test_the_rows_of_every_forward_are_those_of_the_last_search():
    """Once in `every` training forwards, also under no_grad; never in eval()."""
    head = build(every=3)
    RowOptimizer(torch.optim.SGD, head, **SGD)
    searches = []
    head._search = lambda: searches.append(head.forward_count)  # type: ignore[method-assign]
    for step in range(10):
        head.train(step != 4)
        with torch.no_grad():
            head(*batch(step, 0, 1))
    assert searches == [3, 6]
