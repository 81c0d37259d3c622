"""A loss that cannot be built on one rank is built on none."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from partial_fc import CenterLoss, PartialFC, RankMissing, RowOptimizer, Softmax

D, C = 4, 10
BAD_ON_ONE: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a value": (PartialFC, {"sample_rate": 2.0}, ValueError, "sample_rate"),
    "a shared value": (PartialFC, {"reduction": "median"}, ValueError, "reduction must be one of"),
    "a margin": (PartialFC, {"margin": torch.nn.Identity()}, TypeError, "margin"),
    "a correction": (PartialFC, {"sampling_correction": "importance"}, ValueError, "sample_rate below 1"),
    "hard negatives": (PartialFC, {"hard_negatives": 10, "sample_rate": 0.5}, ValueError, "hard_negatives"),
    "class weights": (PartialFC, {"class_weights": torch.ones(C + 1)}, ValueError, "class_weights"),
    "an argument that is not": (PartialFC, {"sampling_rate": 0.5}, TypeError, "sampling_rate"),
    "a device": (PartialFC, {"device": "nowhere"}, RuntimeError, "nowhere"),
    "memory": (PartialFC, {"num_classes": 1 << 58}, RuntimeError, ""),
    "centers": (CenterLoss, {"alpha": 2.0}, ValueError, "alpha must be in"),
    "centers' update": (CenterLoss, {"update": "sometimes"}, ValueError, "update must be one of"),
}


def build(kind: Any, options: dict[str, Any], group: Any = None) -> Exception | None:
    try:
        kind(**{"embedding_size": D, "num_classes": C, "group": group, **options})
    except Exception as error:
        return error
    return None


def built(rank: int, world: int) -> list[tuple[str, type, str]]:
    told = []
    for name, (kind, options, _, _) in BAD_ON_ONE.items():
        error = build(kind, options if rank == 1 else {})
        told.append((name, type(error), str(error)))
        head = PartialFC(D, C)  # the group goes on as if nothing had been
        RowOptimizer(torch.optim.SGD, head, lr=0.1)
    return told


def test_what_is_wrong_on_one_rank_is_raised_on_all(ranks):
    for here, there in zip(*ranks(2).run(built, timeout=60), strict=True):
        name, kind, text = here
        _, wanted, words = BAD_ON_ONE[name][1:]
        assert issubclass(there[1], wanted) and words in there[2], there
        assert kind is wanted and text == f"rank 1: {there[2]}", (name, here, there)


def alike(rank: int, world: int) -> list[str]:
    found = [str(build(PartialFC, {"sample_rate": 2.0}))]  # on all: nobody is named
    found.append(str(build(PartialFC, {"margin": Softmax()} if rank else {})))  # right on each, but not the same
    found.append(str(build(PartialFC, {"seed": None} if rank == 2 else {"seed": "x"} if rank else {})))
    return found


def test_where_all_fail_nobody_is_named_and_where_two_fail_the_first_is(ranks):
    first, second, third = ranks(3).run(alike)
    assert first[0] == second[0] == third[0] and first[0].startswith("sample_rate")
    assert first[1] == second[1] == third[1] and "margin is ArcFace on rank 0 and Softmax on ranks 1 and 2" in first[1]
    assert first[2] == f"rank 1: {second[2]}" and second[2] != third[2]


def in_a_part(rank: int, world: int) -> str:
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    mine = groups[rank % 2]
    return str(build(PartialFC, {"init_std": -1.0} if rank else {}, mine))


def test_only_the_group_of_the_loss_is_told(ranks):
    first, alone, last = ranks(3).run(in_a_part)
    assert first == f"rank 2: {last}" and alone == last and last.startswith("init_std")


def test_on_the_meta_device_nothing_is_exchanged(ranks):
    assert ranks(2).run(on_meta) == ["", "sample_rate is a share of the classes in (0, 1], not 2.0"]


def on_meta(rank: int, world: int) -> str:
    error = build(PartialFC, {"device": "meta", "sample_rate": 2.0 if rank else 1.0})
    return "" if error is None else str(error)


def while_others_step(rank: int, world: int) -> str:
    head = PartialFC(D, C)
    if rank == 1:
        error = build(PartialFC, {"sample_rate": 2.0})
    else:
        with pytest.raises(RankMissing) as caught:
            head(torch.randn(2, D), torch.zeros(2, dtype=torch.int64))
        error = caught.value
    PartialFC(D, C)  # the group goes on
    return str(error)


def test_a_rank_that_fails_while_others_step_raises_its_own_error_at_once(ranks):
    stepping, failing = ranks(2).run(while_others_step, timeout=60)
    assert "rank 1 is in the building of a head" in stepping
    assert failing.startswith("sample_rate")


def while_others_do_not_come(rank: int, world: int) -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    error = build(PartialFC, {"sample_rate": 2.0}, group) if rank == 1 else None
    dist.barrier()
    return str(error)


def test_a_rank_that_fails_alone_raises_its_own_error_after_the_timeout(ranks):
    none, failing = ranks(2).run(while_others_do_not_come, timeout=120)
    assert none == "None" and failing.startswith("sample_rate")
