"""What ranks hold differently: mode, step, settings, margin, optimizer. Every rank hears who has what, before a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import outcome_of
from torch import Tensor

from partial_fc import (
    AdaFace,
    ArcFace,
    CenterLoss,
    CurricularFace,
    PartialFC,
    RowOptimizer,
    SphereFace2,
    clip_grad_norm_,
    gather,
)
from partial_fc.batch.facts import comparable

D, C = 6, 11
attempt = partial(outcome_of, fine="nothing")


def data(rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, D, generator=generator), torch.tensor([0, 1, 9])


def _set(path: str, value: Any) -> Callable[[Any, RowOptimizer | None], None]:
    *owners, name = path.split(".")

    def change(loss: Any, optimizer: RowOptimizer | None) -> None:
        for owner in owners:
            loss = getattr(loss, owner)
        setattr(loss, name, value)

    return change


# What the last rank does to its head, and what every rank hears of it.
HEAD: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "mode": (lambda head, _: head.eval(), "mode is train() on {others} and eval() on {last}"),
    "mode of the margin": (lambda head, _: head.margin.eval(), ""),
    "step": (_set("forward_count", 7), "forward_count is 0 on {others} and 7 on {last}"),
    "label smoothing": (_set("label_smoothing", 0.1), "label_smoothing is 0 on {others} and 0.1 on {last}"),
    "filter": (_set("interclass_filter", 0.5), "interclass_filter is None on {others} and 0.5 on {last}"),
    "nearest": (_set("inter_topk", 2), "inter_topk is 0 on {others} and 2 on {last}"),
    "penalty": (_set("inter_topk_penalty", 0.1), "inter_topk_penalty is 0.06 on {others} and 0.1 on {last}"),
    "searches": (_set("_hard_negatives_every", 7), "hard_negatives_every is 1000 on {others} and 7 on {last}"),
    "search": (
        _set("_hard_negatives_search", "faiss"),
        "hard_negatives_search is exact on {others} and faiss on {last}",
    ),
    "correction": (
        _set("sampling_correction", "importance"),
        "sampling_correction is none on {others} and importance on {last}",
    ),
    "reduction": (_set("reduction", "sum"), "reduction is mean on {others} and sum on {last}"),
    "ignore_index": (_set("ignore_index", 3), "ignore_index is -100 on {others} and 3 on {last}"),
    "scaling": (_set("scale_embedding_grad", False), "scale_embedding_grad is True on {others} and False on {last}"),
    "validate": (_set("validate", "never"), "validate is always on {others} and never on {last}"),
    "on_nonfinite": (_set("on_nonfinite", "skip"), "on_nonfinite is raise on {others} and skip on {last}"),
    "metrics": (_set("collect_metrics", True), "metrics is False on {others} and True on {last}"),
    "sample rate": (_set("_sample_rate", 0.7), "sample_rate is 0.5 on {others} and 0.7 on {last}"),
    "scale": (_set("margin.scale", 32.0), "margin.scale is 16 on {others} and 32 on {last}"),
    "margin": (_set("margin.m2", 0.3), "margin.m2 is 0.5 on {others} and 0.3 on {last}"),
    "another margin": (_set("margin", AdaFace()), "margin is CurricularFace on {others} and AdaFace on {last}"),
    "statistics": (lambda head, _: head.margin.t.fill_(0.5), "the running statistics of the margin sum to 0"),
    "frozen": (
        lambda head, _: head.requires_grad_(False),
        "weight is torch.float32 on {others} and torch.float32, frozen on {last}",
    ),
    "learning rate": (
        lambda _, optimizer: optimizer.param_groups[0].update(lr=0.2),
        "RowOptimizer.lr is 0.1 on {others} and 0.2 on {last}",
    ),
    "skipped rows": (
        lambda _, optimizer: setattr(optimizer, "skipped_rows", "still"),
        "RowOptimizer.skipped_rows is dense on {others} and still on {last}",
    ),
    "skips": (_set("class_rows.record.skips", 2), "skips is 0 on {others} and 2 on {last}"),
    "max_skips": (_set("class_rows.record.max_skips", 2), "max_skips is 20 on {others} and 2 on {last}"),
    "class changes": (_set("class_changes", 1), "class_changes is 0 on {others} and 1 on {last}"),
    "seed": (_set("seed", 1), "seed is 0 on {others} and 1 on {last}"),
    "optimizer": (
        lambda head, _: setattr(head, "new", RowOptimizer(torch.optim.Adam, head, lr=0.1)),
        "RowOptimizer is SGD on {others} and Adam on {last}",
    ),
}
DO_NOT_MATTER = {
    "logits_budget",
    "logits_mode",
    "kernels_in_use",
    "selected_rows",
    "class_rows",
    "training",
    "collect_metrics",
    "margin",
}


def changed_on_one_rank(rank: int, world: int, gathered: bool) -> dict[str, tuple[str, bool]]:
    """What a forward says, and whether nothing has moved."""
    found = {}
    for name, (change, _) in HEAD.items():
        head = PartialFC(D, C, CurricularFace(scale=16.0), sample_rate=0.5)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        if rank == world - 1:
            change(head, optimizer)
        before = head.forward_count, head.margin.state_dict()
        said = attempt(lambda head=head: head(gather(*data(rank))) if gathered else head(*data(rank)))
        found[name] = said, (head.forward_count, str(head.margin.state_dict())) == (before[0], str(before[1]))
    return found


@pytest.mark.parametrize("gathered", [False, True], ids=["own exchange", "gathered"])
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_hears_who_has_what(ranks, world, gathered):
    results = ranks(world).run(changed_on_one_rank, gathered)
    others, last = ("rank 0", "rank 1") if world == 2 else ("ranks 0 and 1", "rank 2")
    for name, (_, expected) in HEAD.items():
        assert len({each[name] for each in results}) == 1, "the same on every rank"
        said, unmoved = results[0][name]
        if not expected:
            assert said == "nothing"
            continue
        assert unmoved, name
        assert said.startswith("ValueError: ranks disagree: "), (name, said)
        assert expected.format(others=others, last=last) in said, (name, said)
        assert "on every rank" in said


def test_every_attribute_is_a_fact_or_may_differ():
    """A new attribute of a head has to be agreed, or to be listed as one that ranks may hold differently."""
    for loss in (PartialFC(D, C), CenterLoss(D, C)):
        public = {name for name in vars(loss) if not name.startswith("_")}
        agreed = set(loss.FACTS) | {path.split(".")[0] for path in loss.FACTS.values()}
        assert public <= agreed | DO_NOT_MATTER, public - agreed


def other_ways(rank: int, world: int) -> dict[str, str]:
    """Modes of torch on one rank, another loss, an own rank that cannot train, the center loss and a binary margin."""
    last = rank == world - 1
    x, labels = data(rank)
    head, center = PartialFC(D, C, ArcFace(scale=16.0)), CenterLoss(D, C)
    found = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=last):
        found["autocast"] = attempt(lambda: head(x, labels))
    with torch.set_grad_enabled(not last):
        found["no_grad"] = attempt(lambda: head(x, labels))
    found["gather"] = attempt(lambda: gather(x, labels) if last else head(x, labels))
    found["another loss"] = attempt(lambda: center(x, labels) if last else head(x, labels))
    center.alpha = 0.25 if last else 0.5
    found["alpha"] = attempt(lambda: center(x, labels))
    binary = PartialFC(D, C, SphereFace2())
    if last:
        torch.nn.init.constant_(binary.margin.offset, 3.0)
    found["offset"] = attempt(lambda: binary(x, labels))
    for name, rate in (("no step", 1.0), ("no zero_grad", 0.5)):
        trained = PartialFC(D, C, sample_rate=rate)
        optimizer = RowOptimizer(torch.optim.SGD, trained, lr=0.1)
        trained(x, labels).backward()
        clip_grad_norm_([], trained, max_norm=1.0)
        if not last or name != "no step":
            optimizer.step()
        if not last or name != "no zero_grad":
            optimizer.zero_grad()
        found[name] = attempt(lambda trained=trained: trained(x, labels))
    center = CenterLoss(D, C)
    center(x, labels)
    if not last:
        center.step()
    found["no step of centers"] = attempt(lambda: center(x, labels))
    replaced = PartialFC(D, C)
    if last:
        replaced.weight = torch.nn.Parameter(replaced.weight.detach().clone())
    found["replaced"] = attempt(lambda: replaced(x, labels))
    found["replaced, gathered"] = attempt(lambda: replaced(gather(x, labels)))
    with torch.no_grad():
        found["alike"] = attempt(lambda: head.eval()(x, labels))
    return found


def test_other_ways_to_differ(ranks):
    first, last = ranks(2).run(other_ways)
    both = {
        "autocast": "autocast is off on rank 0 and torch.bfloat16 on rank 1",
        "no_grad": "gradients is recorded on rank 0 and off (no_grad) on rank 1",
        "gather": "loss is PartialFC on rank 0 and gather on rank 1",
        "another loss": "loss is PartialFC on rank 0 and CenterLoss on rank 1",
        "alpha": "alpha is 0.5 on rank 0 and 0.25 on rank 1",
        "offset": "the running statistics of the margin sum to",
        "no step": "steps of the optimizer is 1 on rank 0 and 0 on rank 1",
        "no zero_grad": "the gradient of an earlier backward is cleared on rank 0 and kept on rank 1",
        "no step of centers": "steps of the optimizer is 1 on rank 0 and 0 on rank 1",
    }
    for name, expected in both.items():
        assert first[name] == last[name] and expected in first[name], (name, first[name], last[name])
    for name in ("replaced", "replaced, gathered"):
        assert "another tensor was put in the place of this PartialFC's weight" in last[name]
        assert last[name] == first[name] and first[name].startswith("RuntimeError: rank 1: ")
        assert "another tensor was put in the place of this PartialFC's weight" in first[name]
        assert "rank 1" in first[name]
    assert first["alike"] == last["alike"] == "nothing"


def test_a_number_is_what_it_is_worth():
    import numpy as np

    assert (
        comparable(64)
        == comparable(64.0)
        == comparable(np.int64(64))
        == comparable(np.float32(64))
        == comparable(torch.tensor(64.0))
        == 64
    )
    assert repr(comparable(64.0)) == repr(comparable(np.int64(64)))
    assert comparable(True) is True and repr(comparable(1.0)) == "1"
    assert comparable((0.9, 1)) == [0.9, 1] and comparable(None) == "None"
    assert repr(comparable(float("nan"))) == "nan" and comparable(float("inf")) == float("inf")
