"""Rows of a sampled head that have missed steps are saved as they are: saving changes nothing of a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tier_runs import ADAMW, SGD, C, assert_equal, head_of, state_of, train

from partial_fc import Checkpointer, RowOptimizer, load_checkpoint, save_checkpoint
from partial_fc.checkpoint.save_load import stored_tensors, stored_values, stream_tensor

Made = dict[str, Any]


def made(optimizer: Any = SGD, skipped: str = "dense", **more: Any) -> Made:
    head = head_of(None, **{"sample_rate": 0.05, **more})
    return {"head": head, "optimizer": RowOptimizer(optimizer[0], head, skipped_rows=skipped, **optimizer[1])}


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_is_saved_has_the_bits_of_one_that_is_not(tmp_path, optimizer, asynchronous):
    undisturbed, run = made(optimizer), made(optimizer)
    expected = train(*undisturbed.values(), 9)
    checkpointer = Checkpointer(tmp_path, keep_last=9, asynchronous=asynchronous)
    losses = []
    for step in range(9):
        losses += train(*run.values(), 1, step)
        checkpointer.save(step + 1, **run)
    checkpointer.wait()
    assert losses == expected
    assert_equal(state_of(run["optimizer"]), state_of(undisturbed["optimizer"]))
    for step in (1, 4, 8):
        loaded = made(optimizer)
        checkpointer.load(step=step, **loaded)
        assert train(*loaded.values(), 9 - step, step) == expected[step:]
        assert_equal(state_of(loaded["optimizer"]), state_of(undisturbed["optimizer"]))


def test_a_table_as_long_as_there_are_classes(tmp_path):
    run = made(ADAMW, num_classes=12)
    train(*run.values(), 11)  # its table has an entry for each step, and one more
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(11, **run)
    loaded = made(ADAMW, num_classes=12)
    checkpointer.load(**loaded)
    assert stored_tensors(checkpointer.path(11))["optimizer/missed_steps/parameters/weight/table"][0][0] == 12
    assert train(*loaded.values(), 3, 11) == train(*run.values(), 3, 11)


def test_whoever_takes_the_head_alone_has_rows_up_to_date(tmp_path):
    run = made()
    train(*run.values(), 7)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(7, **run)
    expected = state_of(run["optimizer"])
    alone = made()
    checkpointer.load(head=alone["head"])
    assert torch.equal(alone["head"].weight, expected["weight"])
    state = made()
    checkpointer.load(optimizer=state["optimizer"])
    assert torch.equal(state_of(state["optimizer"])["weight/momentum_buffer"], expected["weight/momentum_buffer"])
    streamed = torch.zeros_like(expected["weight"])
    stream_tensor(
        checkpointer.path(7), "head/weight", lambda a, rows: streamed.__setitem__(slice(a, a + len(rows)), rows)
    )
    assert torch.equal(streamed, expected["weight"])
    assert stored_tensors(checkpointer.path(7))["head/weight"][0] == (C, expected["weight"].shape[1])
    assert stored_values(checkpointer.path(7), "optimizer")["missed_steps"]["steps"] == 7


def test_what_is_saved_without_its_optimizer_is_up_to_date(tmp_path):
    run = made()
    train(*run.values(), 7)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(7, head=run["head"])
    alone = made()
    checkpointer.load(head=alone["head"])
    assert torch.equal(alone["head"].weight, state_of(run["optimizer"])["weight"])


def test_a_single_checkpoint_is_up_to_date(tmp_path):
    run = made()
    train(*run.values(), 7)
    save_checkpoint(tmp_path / "saved", **run)
    assert run["head"].class_rows.behind.steps == 0
    loaded = made(skipped="still")
    load_checkpoint(tmp_path / "saved", **loaded)
    assert_equal(state_of(loaded["optimizer"]), state_of(run["optimizer"]))


def damaged(change: Any) -> Any:
    def spoil(state: dict[str, Any]) -> dict[str, Any]:
        change(state["missed_steps"])
        return state

    return spoil


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda missed: missed.update(form="Other"), "'Other'"),
        (lambda missed: missed.update(form="AdamMoves"), "another class of optimizer"),
        (lambda missed: missed.update(steps=-1), "its counts"),
        (lambda missed: missed.update(first="many"), "its counts"),
        (lambda missed: missed.pop("parameters"), "'parameters'"),
        (lambda missed: missed.update(parameters={"weight": {}}), "'keys'"),
        (lambda missed: missed.update(parameters={"other": missed["parameters"]["weight"]}), "other"),
        (lambda missed: missed["parameters"]["weight"].update(table=None), "table"),
        (lambda missed: missed.update(first=3), "its table of"),
    ],
    ids=[
        "form",
        "other form",
        "steps",
        "first",
        "no parameters",
        "no keys",
        "other parameter",
        "no table",
        "short table",
    ],
)
def test_what_cannot_be(tmp_path, change, words):
    run = made()
    train(*run.values(), 7)
    rows = run["head"].class_rows
    rows.as_they_are = True
    state = damaged(change)(run["optimizer"].state_dict())
    rows.as_they_are = False
    other = made()
    with pytest.raises(ValueError, match=words):
        other["optimizer"].load_state_dict(state)
    assert not other["optimizer"].state


def test_state_dicts_as_rows_are(tmp_path):
    run = made()
    train(*run.values(), 7)
    run["head"].class_rows.as_they_are = True
    states = copy.deepcopy({name: each.state_dict() for name, each in run.items()})
    run["head"].class_rows.as_they_are = False
    loaded = made()
    for name, state in states.items():
        loaded[name].load_state_dict(state)
    assert train(*loaded.values(), 3, 7) == train(*run.values(), 3, 7)
