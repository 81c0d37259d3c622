"""What is given by name to be saved: an epoch and a step have an object of their own, and plain values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import any_message_of
from torch import nn

from partial_fc import Checkpointer, PartialFC, Progress, load_checkpoint, save_checkpoint

PLAIN: dict[str, tuple[Any, str]] = {
    "epoch": (3, "epoch=3 is a plain value without a state dict; count epochs and steps in a partial_fc.Progress("),
    "seconds": (1.5, "seconds=1.5 is a plain value"),
    "note": ("best", "note='best' is a plain value"),
    "done": (True, "done=True is a plain value"),
    "scaler": (None, "scaler=None is a plain value"),
    "names": (["a"], "it is a list, which has no state_dict()"),
    "losses": (torch.ones(2), "it is a Tensor, which has no state_dict()"),
    "backbone": (nn.Linear(1, 1).state_dict(), "it is a OrderedDict, which has no state_dict(); give each object by"),
    "head": (PartialFC, "it is the class PartialFC; give an object of it"),
    "draws": (torch.Generator(), "a Generator has no state_dict()"),
}


def test_an_epoch_and_a_step_are_saved(tmp_path):
    head, progress = PartialFC(4, 5), Progress()
    progress.epoch += 2
    progress.step = 17
    save_checkpoint(tmp_path / "one", head=head, progress=progress)
    found = Progress()
    load_checkpoint(tmp_path / "one", head=head, progress=found)
    assert (found.epoch, found.step) == (2, 17) and repr(found) == "Progress(epoch=2, step=17)"
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(17, head=head, progress=progress)
    assert checkpointer.load(progress=Progress()) == 17
    assert "integer" in any_message_of(Progress, 1.5)
    assert "no epoch and step" in any_message_of(load_checkpoint, tmp_path / "one", head=found)
    assert "no epoch and step" in any_message_of(Progress().load_state_dict, {"epoch": 1})


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_value_is_refused_by_its_name(tmp_path, name):
    value, words = PLAIN[name]
    checkpointer = Checkpointer(tmp_path / "run")
    for use in (
        lambda: save_checkpoint(tmp_path / "one", model=nn.Linear(1, 1), **{name: value}),
        lambda: checkpointer.save(3, model=nn.Linear(1, 1), **{name: value}),
        lambda: load_checkpoint(tmp_path / "one", **{name: value}),
    ):
        text = any_message_of(use)
        assert text.startswith(f"TypeError: {name} cannot be ")
        assert words.replace("state_dict()", "load_state_dict()") in text or words in text
    assert not (tmp_path / "one").exists() and not checkpointer.steps()


def one_rank_gives_a_value(rank: int, world: int, folder: str) -> list[str]:
    given = {"progress": 3 if rank == 1 else Progress(3)}
    checkpointer = Checkpointer(Path(folder) / "run")
    return [
        any_message_of(save_checkpoint, Path(folder) / "one", **given),
        any_message_of(checkpointer.save, 1, **given),
        any_message_of(load_checkpoint, Path(folder) / "one", **given),
    ]


def test_a_value_on_one_rank_is_refused_on_all(ranks, tmp_path):
    first, second = ranks(2).run(one_rank_gives_a_value, str(tmp_path))
    assert first == second
    assert all("rank 1: progress cannot be" in text and "progress=3 is a plain value" in text for text in first)
