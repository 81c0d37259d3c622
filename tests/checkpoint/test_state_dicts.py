"""`state_dict` and `load_state_dict` on several ranks: a state knows whose rows it has, and all ranks load or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from common import outcome_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from partial_fc import ArcFace, CenterLoss, CosFace, CurricularFace, PartialFC, RowOptimizer

D = 4
attempt = partial(outcome_of, fine="loaded")


def build(classes: int, seed: int = 0, margin: Any = None) -> tuple[PartialFC, RowOptimizer]:
    """A head and its optimizer after two steps."""
    head = PartialFC(D, classes, margin or CurricularFace(scale=8.0), seed=seed)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        head(torch.randn(3, D, generator=generator), torch.tensor([0, 1, classes - 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head, optimizer


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def of_one_rank(rank: int, world: int, folder: str, classes: int) -> dict[str, Any]:
    """Rank 0 saves what state_dict() gives it, all load it; then each its own file; then whole tensors."""
    os.chdir(folder)
    head, optimizer = build(classes)
    model = nn.ModuleDict({"backbone": nn.Linear(2, D), "head": head})
    center = CenterLoss(D, classes)
    savers = {"head": head, "optimizer": optimizer, "model": model, "center": center}
    for name, each in savers.items():
        torch.save(each.state_dict(), f"{name}-{rank}.pt")
    other, its_optimizer = build(classes, seed=1)
    others = {
        "head": other,
        "optimizer": its_optimizer,
        "model": nn.ModuleDict({"backbone": nn.Linear(2, D), "head": other}),
        "center": CenterLoss(D, classes, seed=1),
    }
    before = whole(other.weight.detach()).clone()
    found: dict[str, Any] = {}
    torch.distributed.barrier()
    for name, each in others.items():
        state = torch.load(f"{name}-0.pt", weights_only=False)
        found[f"rank 0's {name}"] = attempt(lambda each=each, state=state: each.load_state_dict(state))
    found["unchanged"] = torch.equal(whole(other.weight.detach()), before)
    for name, each in others.items():
        state = torch.load(f"{name}-{rank}.pt", weights_only=False)
        found[f"own {name}"] = attempt(lambda each=each, state=state: each.load_state_dict(state))
    found["own rows"] = torch.equal(whole(other.weight.detach()), whole(head.weight.detach()))
    momentum = [whole(each.state_dict()["state"][0]["momentum_buffer"]) for each in (optimizer, its_optimizer)]
    found["own momentum"] = torch.equal(*momentum)
    third, third_optimizer = build(classes, seed=2)
    plain = {name: whole(v) if isinstance(v, Tensor) else v for name, v in head.state_dict().items()}
    found["whole head"] = attempt(lambda: third.load_state_dict(plain))
    state = optimizer.state_dict()
    state["state"] = {0: {key: whole(v) if isinstance(v, Tensor) else v for key, v in state["state"][0].items()}}
    found["whole optimizer"] = attempt(lambda: third_optimizer.load_state_dict(state))
    found["whole rows"] = torch.equal(whole(third.weight.detach()), whole(head.weight.detach()))
    buffer = third_optimizer.state_dict()["state"][0]["momentum_buffer"]
    found["whole momentum"] = torch.equal(whole(buffer), momentum[0])
    return found


@pytest.mark.parametrize("classes", [8, 7], ids=["divisible", "uneven"])
def test_what_one_rank_saved_is_refused_alike_and_what_each_saved_is_taken(ranks, tmp_path, classes):
    results = ranks(2).run(of_one_rank, str(tmp_path), classes)
    assert results[0] == results[1]
    found = results[0]
    for name in ("head", "optimizer", "model", "center"):
        said = found[f"rank 0's {name}"]
        assert said.startswith("ValueError: rank 1: this state of a "), said
        assert "as rank 0 of 2 saved them; this rank owns 4 to" in said
        assert "save_checkpoint on every rank" in said and "import_weights" in said
        assert found[f"own {name}"] == "loaded"
    assert found["whole head"] == found["whole optimizer"] == "loaded"
    assert all(found[key] is True for key in found if "rows" in key or "momentum" in key or key == "unchanged")


def wrong_on_one_rank(rank: int, world: int) -> dict[str, str]:
    head, optimizer = build(8)
    last = rank == world - 1

    def state(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        found = {**head.state_dict()}
        if last:
            change(found)
        return found

    other = PartialFC(D, 8, CosFace(scale=8.0)).state_dict()
    larger = PartialFC(D, 9, CurricularFace(scale=8.0)).state_dict()
    cases: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a missing key": lambda s: s.pop("weight"),
        "a missing buffer": lambda s: s.pop("margin.t"),
        "one more key": lambda s: s.update(more=torch.zeros(2)),
        "other classes": lambda s: s.update(weight=larger["weight"]),
        "another margin": lambda s: s.update(_extra_state=other["_extra_state"]),
        "half the rows": lambda s: s.update(weight=torch.zeros(4, D)),
        "no tensor": lambda s: s.update(weight=3),
    }
    found = {name: attempt(lambda change=change: head.load_state_dict(state(change))) for name, change in cases.items()}
    found["assign"] = attempt(lambda: head.load_state_dict(head.state_dict(), assign=last))
    found["not strict"] = attempt(lambda: head.load_state_dict(state(lambda s: s.pop("weight")), strict=False))
    adam = RowOptimizer(torch.optim.Adam, PartialFC(D, 8), lr=0.1)
    its_state = optimizer.state_dict()
    found["no state of an optimizer"] = attempt(lambda: optimizer.load_state_dict({} if last else its_state))
    found["another optimizer"] = attempt(
        lambda: optimizer.load_state_dict(adam.state_template() if last else its_state)
    )
    return found


def test_one_rank_that_cannot_load_keeps_all_from_it(ranks):
    results = ranks(3).run(wrong_on_one_rank)
    assert results[0] == results[1] == results[2]
    expected = {
        "other classes": "weight is [9, 4] in it, and [8, 4] here",
        "another margin": "it is of a head with CosFace",
        "half the rows": "weight is [4, 4] in it, and [8, 4] here: give all 8 rows to every rank",
        "no tensor": "weight is int in it",
        "assign": "assign=True would put other tensors in the place of its parameters",
        "no state of an optimizer": "it is no state of an optimizer",
        "another optimizer": "it is the state of another optimizer",
    }
    for name, text in expected.items():
        said = results[0][name]
        assert said.startswith("ValueError: rank 2: this state of a ") and text in said, (name, said)
    for name, text in (
        ("a missing key", 'Missing key(s) in state_dict: "weight"'),
        ("a missing buffer", 'Missing key(s) in state_dict: "margin.t"'),
        ("one more key", 'Unexpected key(s) in state_dict: "more"'),
    ):
        assert results[0][name].startswith("RuntimeError") and text in results[0][name], (name, results[0][name])
    assert results[0]["not strict"] == "loaded"


def by_torch(rank: int, world: int, folder: str) -> list[str]:
    """torch.distributed.checkpoint, by itself and with its functions of state dicts, on the CPU and whole."""
    head, _ = build(7)
    model = nn.ModuleDict({"backbone": nn.Linear(2, D), "head": head})
    said = []
    for kind, options in (
        ("sharded", StateDictOptions()),
        ("offloaded", StateDictOptions(cpu_offload=True)),
        ("whole", StateDictOptions(full_state_dict=True)),
    ):
        other, _ = build(7, seed=1)
        target = nn.ModuleDict({"backbone": nn.Linear(2, D), "head": other})
        dcp.save(get_model_state_dict(model, options=options), checkpoint_id=f"{folder}/{kind}")
        state = get_model_state_dict(target, options=options)
        dcp.load(state, checkpoint_id=f"{folder}/{kind}")
        said.append(attempt(lambda t=target, s=state, o=options: set_model_state_dict(t, s, options=o)))
        same = torch.equal(whole(other.weight.detach()), whole(head.weight.detach()))
        said.append(f"{kind}: {same} {other.forward_count}")
    return said


def test_checkpoints_of_torch(ranks, tmp_path):
    for said in ranks(2).run(by_torch, str(tmp_path)):
        assert said == ["loaded", "sharded: True 2", "loaded", "offloaded: True 2", "loaded", "whole: True 2"]


def test_rows_of_a_group_are_refused_by_one_process(ranks, tmp_path):
    ranks(2).run(of_one_rank, str(tmp_path), 8)
    # a process without a group cannot even read a DTensor's mesh; torch says so, or the head does
    head = PartialFC(D, 8, CurricularFace(scale=8.0))
    before = head.weight.detach().clone()
    with pytest.raises((RuntimeError, ValueError)):
        head.load_state_dict(torch.load(tmp_path / "head-1.pt", weights_only=False))
    assert torch.equal(head.weight, before)


def assigned(rank: int, world: int) -> list[str]:
    """`weight.data = rows` on one rank alone, then on all."""
    found = []
    rows = torch.randn(8, D, generator=torch.Generator().manual_seed(3))
    batch = torch.ones(2, D), torch.tensor([0, 1])
    for everywhere in (False, True):
        for given in (rows, PartialFC(D, 8, seed=1).weight.detach()):
            head = PartialFC(D, 8, ArcFace(scale=8.0), sample_rate=0.5)
            optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
            head(*batch)
            if everywhere or rank:
                head.weight.data = given
            found.append(attempt(lambda head=head: head(*batch)))
            if everywhere:
                for action in (head.state_dict, lambda head=head: head.topk(batch[0], 1)):
                    found.append(attempt(action))
            assert optimizer
    head = PartialFC(D, 8, ArcFace(scale=8.0))
    found.append(attempt(lambda: head.load_state_dict({"weight": rows}, strict=False)))
    assert torch.equal(whole(head.weight.detach()), rows)
    head.weight.data.mul_(2)  # in place, on the rows themselves
    found.append(attempt(lambda: head(*batch)))
    assert torch.equal(whole(head.weight.detach()), 2 * rows)
    return found


def test_data_that_are_assigned_have_an_effect_or_an_error(ranks):
    first, last = ranks(2).run(assigned)
    *refused, taken, stepped = last
    assert len(refused) == 8 and taken == stepped == "loaded"
    for said in refused:
        assert "RuntimeError: " in said[:14] and "a tensor was assigned to weight.data of this PartialFC" in said, said
        assert "strict=False) on every rank" in said
    for said in first[:2]:
        assert said.startswith("RuntimeError: rank 1: a tensor was assigned to weight.data"), said
    assert first[2:] == last[2:]
