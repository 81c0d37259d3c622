"""Checkpoints of rows in a storage: what changed since the one before, the rows as they are, complete by themselves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import forking
from shards import two_by_two, whole
from tier_runs import ADAMW, ROW_WISE, SGD, C, D, assert_equal, batch, head_of, state_of, storage_of, train
from torch import Tensor

from partial_fc import (
    CenterLoss,
    Checkpointer,
    FileRows,
    HostRows,
    RowOptimizer,
    Softmax,
    SubCenterArcFace,
    export_weights,
    gather,
    import_weights,
    load_checkpoint,
)
from partial_fc.checkpoint import increments, layout, parts
from partial_fc.checkpoint.save_load import stored_tensors, stream_tensor
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.moves import LinearMoves

Made = dict[str, Any]
RATE = 0.02  # 6 of 300 classes a step, beside those of the batch


def made(storage: Any, optimizer: Any = SGD, skipped: str | None = None, low: str | None = None, **more: Any) -> Made:
    head = head_of(storage, **{"sample_rate": RATE, **more})
    options = {"skipped_rows": skipped, "low_precision": low, **optimizer[1]}
    return {"head": head, "optimizer": RowOptimizer(optimizer[0], head, **options)}


def trained(run: Made, steps: int, first: int = 0) -> list[float]:
    """Steps of three samples, so that most rows are in none of them."""

    def labels(step: int) -> Tensor:
        return batch(step, run["head"].num_classes)[1]

    return train(run["head"], run["optimizer"], steps, first, labels)


def manifest(checkpointer: Checkpointer, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpointer.path(step) / "manifest.json").read_text())
    return found


def counts(checkpointer: Checkpointer, step: int) -> list[int]:
    """How many rows each part has, the newest last."""
    return list(manifest(checkpointer, step)["rows"]["head"]["counts"])


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "saved", keep_last=20)


KINDS = {
    "SGD": ({}, SGD, "dense", None),
    "SGD-still": ({}, SGD, "still", None),
    "AdamW": ({}, ADAMW, "dense", None),
    "RowWiseAdagrad": ({}, ROW_WISE, "still", None),
    "bias": ({"margin": Softmax()}, SGD, "dense", None),
    "sub-centers": ({"margin": SubCenterArcFace(scale=16.0, centers=3)}, SGD, "dense", None),
    "master": ({"dtype": torch.bfloat16}, SGD, "dense", "master"),
    "stochastic": ({"dtype": torch.bfloat16}, ADAMW, "dense", "stochastic"),
    "blocks": ({"sample_block": 3}, SGD, "dense", None),
}


@pytest.mark.parametrize(
    ("kind", "asynchronous"), [*((kind, False) for kind in KINDS), ("SGD", True), ("AdamW", True), ("master", True)]
)
def test_a_run_goes_on_from_any_of_them_as_if_nothing_had_been_saved(tmp_path, kind, asynchronous):
    more, optimizer, skipped, low = KINDS[kind]
    storage = FileRows(tmp_path) if asynchronous else HostRows()
    undisturbed, run = (made(storage, optimizer, skipped, low, **more) for _ in range(2))
    expected = trained(undisturbed, 12)
    checkpointer = Checkpointer(tmp_path / "saved", keep_last=20, asynchronous=asynchronous)
    losses = []
    for step in range(12):
        losses += trained(run, 1, step)
        checkpointer.save(step + 1, **run)
    checkpointer.wait()
    assert losses == expected
    assert_equal(state_of(run["optimizer"]), state_of(undisturbed["optimizer"]))
    assert max(len(counts(checkpointer, step)) for step in checkpointer.steps()) > 2
    for step, other in ((1, HostRows()), (5, None), (9, FileRows(tmp_path)), (11, HostRows())):
        loaded = made(other, optimizer, skipped, low, **more)
        Checkpointer(tmp_path / "saved").load(step=step, **loaded)
        assert trained(loaded, 12 - step, step) == expected[step:]
        assert_equal(state_of(loaded["optimizer"]), state_of(undisturbed["optimizer"]))


def test_only_rows_that_may_have_changed_are_written(checkpointer):
    run = made(HostRows(), seed=5)
    checkpointer.save(0, **run)
    assert counts(checkpointer, 0) == [0]  # nobody has looked at a row
    trained(run, 20)
    touched = int(run["head"].class_rows.store.touched.sum())
    checkpointer.save(20, **run)
    assert counts(checkpointer, 20) == [touched]  # more than twice what there was: anew
    used = set()
    for step in (20, 21):
        trained(run, 1, step)
        used |= set(run["head"].selected.tolist())
    checkpointer.save(22, **run)
    assert counts(checkpointer, 22) == [touched, len(used)]
    assert manifest(checkpointer, 22)["parts"] == ["part-0000"]
    data = checkpointer.path(22) / "data-0001"
    assert os.stat(data / "part-0000" / "__0_0.distcp").st_nlink == 2
    rows = stored_tensors(checkpointer.path(22))
    assert rows["head/weight"] == (torch.Size([C, D]), torch.float32)
    assert not any("#" in key for key in rows)
    checkpointer.save(23, **run)  # nothing has changed
    assert counts(checkpointer, 23) == [touched, len(used), 0]


def test_all_rows_are_written_anew_when_half_have_changed_or_parts_are_many(checkpointer, monkeypatch):
    monkeypatch.setattr(increments, "MOST_PARTS", 3)
    run = made(HostRows())
    trained(run, 60)
    lengths = []
    for step in range(60, 70):
        trained(run, 1, step)
        checkpointer.save(step, **run)
        lengths.append(len(counts(checkpointer, step)))
    assert lengths == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    trained(run, 60, 70)
    checkpointer.save(130, **run)
    assert len(counts(checkpointer, 130)) == 1


def test_each_is_complete_by_itself(tmp_path):
    checkpointer = Checkpointer(tmp_path / "saved", keep_last=1)
    run = made(HostRows())
    trained(run, 30)
    for step in range(30, 34):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    assert checkpointer.steps() == [33]
    assert len(counts(checkpointer, 33)) == 4
    shutil.copytree(tmp_path / "saved" / "step-000000033", tmp_path / "moved")
    shutil.rmtree(tmp_path / "saved")
    loaded = made(None)
    load_checkpoint(tmp_path / "moved", **loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_a_resumed_run_writes_changes_alone(checkpointer, tmp_path):
    run = made(HostRows())
    trained(run, 30)
    checkpointer.save(30, **run)
    loaded, again = made(FileRows(tmp_path), seed=3), Checkpointer(tmp_path / "saved", keep_last=20)
    again.load(**loaded)
    trained(loaded, 1, 30)
    again.save(31, **loaded)
    assert counts(again, 31)[1:] == [len(loaded["head"].selected)]
    trained(run, 1, 30)
    third = made(HostRows())
    again.load(**third)
    assert_equal(state_of(third["optimizer"]), state_of(run["optimizer"]))
    alone = head_of(HostRows(), sample_rate=RATE)
    again.load(head=alone)  # its momentum is not that of the checkpoint
    optimizer = RowOptimizer(SGD[0], alone, **SGD[1])
    again.save(32, head=alone, optimizer=optimizer)
    assert len(counts(again, 32)) == 1


def test_rows_that_no_part_has_are_those_of_the_seed_that_wrote_it(checkpointer):
    run = made(HostRows(), seed=8, init_std=0.3)
    trained(run, 2)
    checkpointer.save(2, **run)
    for storage in (None, HostRows()):
        loaded = made(storage, seed=9)
        checkpointer.load(**loaded)
        assert_equal(state_of(loaded["optimizer"]), state_of(made_again(8, 0.3)["optimizer"]))


def made_again(seed: int, init_std: float) -> Made:
    run = made(None, seed=seed, init_std=init_std)
    trained(run, 2)
    return run


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("files", [False, True])
def test_rows_that_nobody_has_touched_stay_so_when_a_run_goes_on(checkpointer, tmp_path, kind, files):
    more, optimizer, skipped, low = KINDS[kind]
    run, undisturbed = (made(HostRows(), optimizer, skipped, low, **more) for _ in range(2))
    expected = trained(undisturbed, 9)
    for step in range(0, 6, 2):
        trained(run, 2, step)
        checkpointer.save(step + 2, **run)
    touched = run["head"].class_rows.store.touched
    assert 0 < touched.sum() < C
    loaded = made(FileRows(tmp_path / "rows") if files else HostRows(), optimizer, skipped, low, **more)
    checkpointer.load(step=6, **loaded)
    store = loaded["head"].class_rows.store
    assert torch.equal(store.touched, touched)
    assert store.untouched == int((~touched).sum())
    checkpointer.save(7, **loaded)
    assert counts(checkpointer, 7)[-1] == 0  # nothing has changed
    assert trained(loaded, 3, 6) == expected[6:]
    assert store.untouched
    assert_equal(state_of(loaded["optimizer"]), state_of(undisturbed["optimizer"]))


def test_rows_that_were_all_saved_are_all_there(checkpointer):
    run = made(HostRows())
    trained(run, 2)
    run["head"].topk(torch.randn(2, D), 3)  # looks at all rows
    checkpointer.save(2, **run)
    loaded = made(HostRows())
    checkpointer.load(**loaded)
    assert not loaded["head"].class_rows.store.untouched
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def half_step(run: Made, step: int) -> None:
    """Forward and backward alone."""
    x, labels = batch(step, run["head"].num_classes)
    run["head"](x.requires_grad_(), labels).backward()


@pytest.mark.parametrize("place", ["between two micro-batches", "before the step"])
@pytest.mark.parametrize(
    ("kind", "asynchronous"), [("SGD", False), ("SGD-still", False), ("AdamW", False), ("SGD-still", True)]
)
def test_rows_of_a_step_that_a_save_interrupts_are_in_the_next_one(checkpointer, tmp_path, place, kind, asynchronous):
    more, optimizer, skipped, low = KINDS[kind]
    run = made(FileRows(tmp_path / "rows") if asynchronous else HostRows(), optimizer, skipped, low, **more)
    saves = Checkpointer(tmp_path / "saved", keep_last=20, asynchronous=asynchronous)
    trained(run, 12)
    saves.save(12, **run)
    half_step(run, 12)
    saves.save(13, **run)
    if place == "between two micro-batches":
        half_step(run, 13)
    run["optimizer"].step()
    run["optimizer"].zero_grad()
    saves.save(14, **run)
    saves.wait()
    assert len(counts(saves, 14)) == 3  # what has changed, each time
    loaded = made(None, optimizer, skipped, low, **more)
    Checkpointer(tmp_path / "saved").load(step=14, **loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_centers_that_move_after_a_save_are_in_the_next_one(checkpointer):
    center = CenterLoss(D, C, storage=HostRows(), init_std=1.0)
    center(*batch(0, C, 100))
    center.step()
    checkpointer.save(0, center=center)
    center(*batch(1, C))
    checkpointer.save(1, center=center)
    center.step()
    checkpointer.save(2, center=center)
    loaded = CenterLoss(D, C, init_std=1.0)
    checkpointer.load(center=loaded)
    center.class_rows.catch_up()
    assert torch.equal(loaded.centers, center.centers)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("to", ["still", "all classes"])
def test_missed_steps_that_are_made_when_a_run_goes_on_are_in_the_next_one(checkpointer, to, steps):
    run = made(HostRows())
    trained(run, 12)
    checkpointer.save(12, **run)

    def other(storage: Any) -> Made:
        if to == "still":
            return made(storage, skipped="still")
        head = head_of(storage, sample_rate=1.0)
        return {"head": head, "optimizer": RowOptimizer(SGD[0], head, update_in_backward=True, **SGD[1])}

    resumed = other(HostRows())
    checkpointer.load(**resumed)
    trained(resumed, steps, 12)
    checkpointer.save(20, **resumed)
    loaded = other(None)
    checkpointer.load(**loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(resumed["optimizer"]))


@pytest.mark.parametrize("storage", [None, HostRows()], ids=["memory", "host"])
def test_a_head_in_a_wrapper_or_in_a_model_beside_it_has_all_its_rows(checkpointer, storage):
    run = made(storage)
    trained(run, 5)
    compiled = torch.compile(run["head"])
    checkpointer.save(5, head=compiled, optimizer=run["optimizer"])
    loaded = made(None)
    checkpointer.load(head=torch.compile(loaded["head"]), optimizer=loaded["optimizer"])
    expected = state_of(run["optimizer"])
    assert_equal(state_of(loaded["optimizer"]), expected)
    alone = made(None)["head"]
    checkpointer.load(head=torch.compile(alone))
    assert torch.equal(alone.weight, expected["weight"])

    class Model(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = torch.nn.Linear(3, D), head

    run = made(storage)
    trained(run, 5)
    checkpointer.save(6, model=Model(run["head"]), **run)
    alone = made(None)["head"]
    checkpointer.load(model=Model(alone))
    assert torch.equal(alone.weight, state_of(run["optimizer"])["weight"])


@pytest.mark.parametrize("storage", [None, HostRows()], ids=["memory", "host"])
def test_other_dtypes_and_options_load_as_from_a_whole_checkpoint(checkpointer, tmp_path, storage):
    run = made(HostRows())
    trained(run, 12)
    checkpointer.save(12, **run)
    narrow = made(storage, dtype=torch.bfloat16)
    checkpointer.load(**narrow)
    expected = state_of(run["optimizer"])
    near = torch.testing.assert_close
    near(state_of(narrow["optimizer"])["weight"].float(), expected["weight"], rtol=0.02, atol=1e-4)
    run = made(HostRows())
    trained(run, 12)
    checkpointer.save(13, **run)
    plain = made(storage, (torch.optim.SGD, {"lr": 0.1}))
    checkpointer.load(**plain)  # the options come with the state
    assert plain["optimizer"].param_groups[0]["momentum"] == SGD[1]["momentum"]
    assert_equal(state_of(plain["optimizer"]), state_of(run["optimizer"]))


def test_a_head_in_memory_beside_one_in_a_storage(checkpointer):
    """Its rows are in every part; those of the other only where they changed."""
    run, memory = made(HostRows()), made(None, seed=7)
    named = {**run, "other": memory["head"], "its": memory["optimizer"]}
    for step in range(4):
        trained(run, 12 if not step else 1, 20 * step)
        trained(memory, 2, 20 * step)
        checkpointer.save(step, **named)
    assert len(counts(checkpointer, 3)) == 4
    loaded, other = made(None), made(None, seed=8)
    checkpointer.load(**loaded, other=other["head"], its=other["optimizer"])
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))
    assert_equal(state_of(other["optimizer"]), state_of(memory["optimizer"]))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["linear", "Adam"])
def test_steps_that_are_forgotten(tmp_path, monkeypatch, optimizer):
    for moves in (LinearMoves, AdamMoves):
        monkeypatch.setattr(moves, "MOST", 6)
    checkpointer = Checkpointer(tmp_path / "saved", keep_last=40)
    undisturbed, run = made(HostRows(), optimizer), made(HostRows(), optimizer)
    expected, losses = trained(undisturbed, 30), []
    for step in range(30):
        losses += trained(run, 1, step)
        checkpointer.save(step + 1, **run)
    assert losses == expected
    for step in (5, 7, 13, 22):
        loaded = made(HostRows(), optimizer)
        checkpointer.load(step=step, **loaded)
        assert trained(loaded, 30 - step, step) == expected[step:]
        assert_equal(state_of(loaded["optimizer"]), state_of(undisturbed["optimizer"]))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_whoever_takes_a_part_of_it_gets_rows_up_to_date(checkpointer, tmp_path, optimizer):
    run = made(HostRows(), optimizer)
    trained(run, 30)
    for step in (30, 31):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    expected = state_of(run["optimizer"])
    path = checkpointer.path(31)
    for storage in (None, FileRows(tmp_path)):
        alone = made(storage, optimizer)
        load_checkpoint(path, head=alone["head"])
        assert torch.equal(whole(alone["head"].weight), expected["weight"])
        state = made(storage, optimizer)
        load_checkpoint(path, optimizer=state["optimizer"])
        found = state_of(state["optimizer"])
        assert all(torch.equal(found[key], expected[key]) for key in expected if key != "weight" and "step" not in key)
        imported = made(storage, optimizer)
        import_weights(path, imported["head"])
        assert torch.equal(whole(imported["head"].weight), expected["weight"])
    streamed = torch.full((C, D), float("nan"))
    stream_tensor(path, "head/weight", lambda a, rows: streamed.__setitem__(slice(a, a + len(rows)), rows))
    assert torch.equal(streamed, expected["weight"])
    export_weights(tmp_path / "rows.safetensors", imported["head"])
    still = made(HostRows(), optimizer, "still")
    load_checkpoint(path, **still)
    assert_equal(state_of(still["optimizer"]), expected)


@pytest.mark.parametrize("skipped", ["dense", "still"])
def test_rows_that_somebody_else_writes_are_in_the_next_one(checkpointer, skipped):
    run = made(HostRows(), skipped=skipped)
    trained(run, 30)
    checkpointer.save(30, **run)
    trained(run, 1, 30)
    with torch.no_grad():
        run["optimizer"].catch_up()
        run["head"].weight[17].fill_(0.5)
    trained(run, 1, 31)
    checkpointer.save(32, **run)
    run["optimizer"].catch_up()
    trained(run, 1, 32)
    checkpointer.save(33, **run)
    trained(run, 1, 33)
    with torch.no_grad():
        run["head"].weight[19].fill_(0.25)  # without a word, right before a save
    checkpointer.save(34, **run)
    for step in (33, 34):
        loaded = made(None, skipped=skipped)
        checkpointer.load(step=step, **loaded)
        if step == 33:
            trained(loaded, 1, 33)
            with torch.no_grad():
                loaded["head"].weight[19].fill_(0.25)
        assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_after_what_looks_at_all_rows_or_moves_them(checkpointer):
    run = made(HostRows())
    trained(run, 30)
    checkpointer.save(30, **run)
    changes = [
        lambda: run["head"].topk(batch(0)[0], 3),
        lambda: run["head"].expand(5),
        lambda: run["head"].remap({i: i // 2 for i in range(C + 5)}),
        lambda: run["head"].init_from_embeddings([batch(7, 100)]),
        lambda: run["head"].reset_parameters(),
    ]
    for i, change in enumerate(changes):
        trained(run, 2, 30 + 2 * i)
        change()
        checkpointer.save(31 + i, **run)
        loaded = made(None, num_classes=run["head"].num_classes)
        checkpointer.load(**loaded)
        assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_centers_and_several_heads(checkpointer):
    def all_of_it(storage: Any) -> Made:
        one, two = made(storage), made(storage, ADAMW, seed=4)
        centers = CenterLoss(D, C, storage=storage, alpha=0.3)
        return {"one": one, "two": two, "centers": centers}

    def steps(run: Made, steps: int, first: int) -> None:
        for step in range(first, first + steps):
            trained(run["one"], 1, step)
            trained(run["two"], 1, step)
            x, y = batch(step)
            run["centers"](x.requires_grad_(), y).backward()
            run["centers"].step()

    def named(run: Made) -> Made:
        pairs = {f"{name}_{k}": v for name in ("one", "two") for k, v in run[name].items()}
        return {**pairs, "centers": run["centers"]}

    run = all_of_it(HostRows())
    for step in range(6):
        steps(run, 4, 4 * step)
        checkpointer.save(step, **named(run))
    assert set(manifest(checkpointer, 5)["rows"]) == {"one_head", "two_head", "centers"}
    loaded = all_of_it(None)
    checkpointer.load(**named(loaded))
    for each in (run, loaded):
        steps(each, 3, 24)
        each["centers"].class_rows.catch_up()
    for name in ("one", "two"):
        assert_equal(state_of(loaded[name]["optimizer"]), state_of(run[name]["optimizer"]))
    assert torch.equal(loaded["centers"].centers, run["centers"].centers)


class Wrapping(torch.optim.Optimizer):
    """As engines wrap optimizers."""

    def __init__(self, optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


def test_an_optimizer_that_is_wrapped(checkpointer):
    run, loaded = made(HostRows()), made(None)
    trained(run, 30)
    for step in (30, 31):
        trained(run, 1, step)
        checkpointer.save(step, head=run["head"], optimizer=Wrapping(run["optimizer"]))
    assert len(counts(checkpointer, 31)) == 2
    checkpointer.load(head=loaded["head"], optimizer=Wrapping(loaded["optimizer"]))
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


@pytest.mark.parametrize("rows", [5, 64])
def test_in_blocks(checkpointer, monkeypatch, rows):
    for module in (layout, parts, increments):
        monkeypatch.setattr(module, "block_rows", lambda *_: rows)
    run = made(HostRows())
    trained(run, 3)  # some rows are in no part
    for step in range(3, 6):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    expected = state_of(run["optimizer"])
    for storage in (None, HostRows()):
        loaded, alone = made(storage), made(storage)
        checkpointer.load(**loaded)
        checkpointer.load(head=alone["head"])
        assert_equal(state_of(loaded["optimizer"]), expected)
        assert torch.equal(whole(alone["head"].weight), expected["weight"])


def test_the_same_step_again(checkpointer):
    run = made(HostRows())
    trained(run, 30)
    for step in (30, 31):
        trained(run, 1, step)
        checkpointer.save(7, **run)
    assert len(counts(checkpointer, 7)) == 2
    assert sorted(path.name for path in checkpointer.path(7).iterdir()) == ["data-0002", "manifest.json"]
    loaded = made(None)
    checkpointer.load(**loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_off(tmp_path):
    checkpointer = Checkpointer(tmp_path / "saved", incremental=False)
    run = made(HostRows())
    for step in range(2):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    assert manifest(checkpointer, 1)["format"] == 1
    loaded = made(None)
    checkpointer.load(**loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("asynchronous", [False, True])
def test_after_a_save_that_failed_all_rows_are_written(tmp_path, monkeypatch, asynchronous):
    checkpointer = Checkpointer(tmp_path / "saved", keep_last=20, asynchronous=asynchronous)
    run = made(HostRows())
    trained(run, 30)
    checkpointer.save(30, **run)
    checkpointer.wait()
    trained(run, 1, 30)
    with monkeypatch.context() as patch:
        patch.setattr(parts.os, "link", failing)
        patch.setattr(parts.shutil, "copyfile", failing)

        def save() -> None:
            checkpointer.save(31, **run)
            checkpointer.wait()

        with pytest.raises(OSError, match="No space left"):
            save()
    assert checkpointer.steps() == [30]
    trained(run, 1, 31)
    checkpointer.save(32, **run)
    checkpointer.wait()
    assert len(counts(checkpointer, 32)) == 1
    loaded = made(None)
    checkpointer.load(**loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_chosen_rows_are_found_again_in_any_order(monkeypatch):
    monkeypatch.setattr(increments, "FLAGS", 8)
    for seed, share in enumerate((0.0, 0.02, 0.3, 1.0)):
        flags = torch.rand(101, generator=torch.Generator().manual_seed(seed)) < share
        rows, chosen = flags.nonzero()[:, 0], increments._Chosen(flags)
        assert len(chosen) == len(rows)
        for a in range(len(rows)):
            for b in range(a + 1, len(rows) + 1):
                assert torch.equal(chosen.rows(a, b), rows[a:b])


def failing(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_until(folder: str, kill_at: int, report: Any) -> None:
    """Go on with a run and save step 31; SIGKILL at the kill_at-th function call of the save, if it comes to that."""
    torch.set_num_threads(1)
    run, checkpointer, count = made(HostRows()), Checkpointer(folder, keep_last=1), 0
    checkpointer.load(**run)
    trained(run, 1, 30)

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    checkpointer.save(31, **run)
    sys.setprofile(None)
    report.put(count)


@pytest.mark.slow
def test_killed_while_saving(checkpointer, tmp_path):
    run = made(HostRows())
    trained(run, 30)
    checkpointer.save(30, **run)
    checkpointer.release()
    expected = {step: state_of_loaded(checkpointer.folder, step) for step in (30,)}
    trained(run, 1, 30)
    expected[31] = state_of(run["optimizer"])
    context = forking()
    report, found = context.Queue(), []
    total = 0
    for point in range(21):
        there = tmp_path / f"run-{point}"
        shutil.copytree(checkpointer.folder, there)
        kill_at = 1 + (point - 1) * (total - 1) // 19 if point else 0
        process = context.Process(target=save_until, args=(str(there), kill_at, report))
        process.start()
        total = report.get(timeout=60) if not point else total
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if point else 0)
        loaded = made(None)
        found.append(Checkpointer(there).load(**loaded))
        assert_equal(state_of(loaded["optimizer"]), expected[found[-1]])
        again = Checkpointer(there)  # and a run goes on
        again.load(**loaded)
        again.save(40, **loaded)
    assert set(found) == {30, 31}


def state_of_loaded(folder: Path, step: int) -> dict[str, Any]:
    loaded = made(None)
    Checkpointer(folder).load(step=step, **loaded)
    return state_of(loaded["optimizer"])


def test_without_hard_links(checkpointer, monkeypatch):
    monkeypatch.setattr(parts.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    flushed, flush = [], os.fsync
    monkeypatch.setattr(
        parts.os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), flush(file))
    )
    run = made(HostRows())
    trained(run, 30)
    for step in (30, 31):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    assert len(counts(checkpointer, 31)) == 2
    copied = {str(file) for file in checkpointer.path(31).rglob("part-0000/*")}
    assert copied
    assert copied <= set(flushed)
    loaded = made(None)
    checkpointer.load(**loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def test_when_the_one_before_is_gone_or_damaged(checkpointer):
    run = made(HostRows())
    trained(run, 30)
    for step, harm in ((30, shutil.rmtree), (31, lambda path: (path / "manifest.json").write_text("{")), (32, None)):
        trained(run, 1, step)
        checkpointer.save(step, **run)
        assert len(counts(checkpointer, step)) == 1
        if harm is not None:
            harm(checkpointer.path(step))


def spoil_part(path: Path) -> None:
    (path / "data-0001" / "part-0000" / "__0_0.distcp").unlink()


def shorten_part(path: Path) -> None:
    file = path / "data-0001" / "part-0000" / "__0_0.distcp"
    content = file.read_bytes()
    file.unlink()  # a link
    file.write_bytes(content[:-10])


def edited(change: Any) -> Any:
    def edit(path: Path) -> None:
        found = json.loads((path / "manifest.json").read_text())
        change(found)
        (path / "manifest.json").write_text(json.dumps(found))

    return edit


def entry(found: dict[str, Any]) -> dict[str, Any]:
    return found["rows"]["head"]


HARM = {
    "a part is missing": spoil_part,
    "a part is short": shorten_part,
    "a path for a part": edited(lambda m: m.update(parts=["../../x"])),
    "an absolute part": edited(lambda m: m.update(parts=["/tmp"])),
    "a part that is not there": edited(lambda m: m.update(parts=["part-0007"])),
    "parts are no list": edited(lambda m: m.update(parts="part-0000")),
    "no parts": edited(lambda m: m.pop("parts")),
    "no rows": edited(lambda m: m.pop("rows")),
    "rows are a list": edited(lambda m: m.update(rows=[1])),
    "a loss is a number": edited(lambda m: m["rows"].update(head=3)),
    "no tensors": edited(lambda m: entry(m).pop("tensors")),
    "no optimizer": edited(lambda m: entry(m).pop("optimizer")),
    "another optimizer": edited(lambda m: entry(m).update(optimizer=["x"])),
    "an optimizer that is not there": edited(lambda m: entry(m).update(optimizer="other")),
    "classes": edited(lambda m: entry(m).update(classes="many")),
    "negative classes": edited(lambda m: entry(m).update(classes=-4)),
    "other classes": edited(lambda m: entry(m).update(classes=C + 1)),
    "huge classes": edited(lambda m: entry(m).update(classes=10**15)),
    "a dtype that is none": edited(lambda m: entry(m)["tensors"]["head/weight"].update(dtype="load")),
    "another dtype": edited(lambda m: entry(m)["tensors"]["head/weight"].update(dtype="float64")),
    "another width": edited(lambda m: entry(m)["tensors"]["head/weight"].update(row=[D + 1])),
    "a width that is none": edited(lambda m: entry(m)["tensors"]["head/weight"].update(row=[None])),
    "no initial values": edited(lambda m: entry(m)["tensors"]["head/weight"].pop("initial")),
    "initial values that are none": edited(
        lambda m: entry(m)["tensors"]["head/weight"]["initial"].update(std="x", seed=[])
    ),
    "a file elsewhere": edited(lambda m: m["files"].update({"part-0000/../../../x": 3})),
    "a tensor of nobody": edited(
        lambda m: entry(m)["tensors"].update({"head/other": entry(m)["tensors"]["head/weight"]})
    ),
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    checkpointer, run = Checkpointer(tmp_path_factory.mktemp("saved")), made(HostRows())
    trained(run, 3)  # most rows are in no part
    for step in (3, 4, 5):
        trained(run, 1, step)
        checkpointer.save(step, **run)
    return checkpointer.path(5)


@pytest.mark.parametrize("harm", list(HARM))
def test_a_damaged_one_is_an_error_and_changes_nothing(undamaged, tmp_path, harm):
    path = tmp_path / "checkpoint"
    shutil.copytree(undamaged, path)
    HARM[harm](path)
    loaded = made(None)
    before = {k: v.clone() for k, v in loaded["head"].state_dict().items() if isinstance(v, Tensor)}
    with pytest.raises((ValueError, FileNotFoundError)) as found:
        load_checkpoint(path, **loaded)
    assert str(path) in str(found.value)
    for key, value in before.items():
        assert torch.equal(loaded["head"].state_dict()[key], value)


@pytest.mark.parametrize("ids", ["descending", "too large", "negative"])
def test_class_ids_that_are_none(checkpointer, monkeypatch, ids):
    run = made(HostRows())
    trained(run, 30)
    checkpointer.save(30, **run)
    trained(run, 1, 30)
    spoilt = {"descending": lambda t: t.flip(0), "too large": lambda t: t + C, "negative": lambda t: t - C}[ids]
    of_loss = increments._Loss.ids

    def of_spoilt(self: Any) -> Any:
        blocks = of_loss(self)
        take = blocks.take
        blocks.take = lambda a, b: spoilt(take(a, b))
        return blocks

    monkeypatch.setattr(increments._Loss, "ids", of_spoilt)
    checkpointer.save(31, **run)
    with pytest.raises(ValueError, match="ids are not ascending"):
        checkpointer.load(**made(None))


# ------------------------------------------------------------------------------------------------- ranks


def saved_by_ranks(rank: int, world: int, folder: str, kind: str, asynchronous: bool, first: int) -> dict[str, Any]:
    """Three steps, each saved, from the newest checkpoint on."""
    run = made(storage_of(kind, folder), num_classes=101, sample_rate=0.05)
    checkpointer = Checkpointer(folder + "/saved", keep_last=20, asynchronous=asynchronous)
    if first:
        assert checkpointer.load(**run) == first
    for step in range(first, first + 3):
        x, y = batch(step, 101)
        run["head"](x[rank::world], y[rank::world]).backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        checkpointer.save(step + 1, **run)
    checkpointer.wait()
    checkpointer.release()
    return state_of(run["optimizer"])


def test_at_any_number_of_ranks(ranks, tmp_path):
    expected = None
    for i, world in enumerate((2, 3, 1, 2)):
        work = (saved_by_ranks, str(tmp_path), "files", i % 2 == 0, 3 * i)
        found = ranks(world).run(*work, timeout=300) if world > 1 else [saved_by_ranks(0, 1, *work[1:])]
        expected = found[0]
        for each in found:
            assert_equal(each, expected)
    checkpointer = Checkpointer(tmp_path / "saved")
    assert max(len(counts(checkpointer, step)) for step in checkpointer.steps()) > 3
    memory = made(None, num_classes=101, sample_rate=0.05)
    for step in range(12):
        x, y = batch(step, 101)
        memory["head"](x, y).backward()
        memory["optimizer"].step()
        memory["optimizer"].zero_grad()
    for key, value in state_of(memory["optimizer"]).items():
        assert (value - expected[key]).abs().max() <= 2e-6 * value.abs().max()


def saved_by_replicas(rank: int, world: int, folder: str) -> dict[str, Any]:
    head = head_of(HostRows(), num_classes=101, sample_rate=0.05, group=two_by_two())
    optimizer = RowOptimizer(SGD[0], head, **SGD[1])
    checkpointer = Checkpointer(folder)
    for step in range(4):
        x, y = batch(step, 101)
        gathered = gather(x[rank::world].requires_grad_(), y[rank::world], group=head.shards.ranks.mesh)
        head(gathered).backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(step, head=head, optimizer=optimizer)
    return state_of(optimizer)


@pytest.mark.slow
def test_on_replicas(ranks, tmp_path):
    states = ranks(4).run(saved_by_replicas, str(tmp_path), timeout=300)
    loaded = made(None, num_classes=101, sample_rate=0.05)
    Checkpointer(tmp_path).load(**loaded)
    assert len(counts(Checkpointer(tmp_path), 3)) > 1
    for each in states:
        assert_equal(each, state_of(loaded["optimizer"]))
