"""One value, two spellings: counts, numbers and margins are the same however a caller writes them."""

from __future__ import annotations

import copy
import inspect
import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from common import any_message_of, message_of

from partial_fc import (
    ArcFace,
    CenterLoss,
    Checkpointer,
    CosFace,
    DivergenceWatch,
    JoinedBatches,
    Margin,
    PartialFC,
    SubCenterArcFace,
    check_margin,
    class_mapping,
    doctor,
    export_weights,
    gather,
    import_weights,
    load_checkpoint,
    margins,
    plan,
    save_checkpoint,
)
from partial_fc.distributed.given import plain, real, whole
from partial_fc.margins.description import same_margin
from partial_fc.training.cli.main import main

D, C = 4, 12
SPELLINGS = {
    "int": int,
    "float": float,
    "numpy int": np.int64,
    "numpy float": np.float64,
    "numpy float32": np.float32,
    "numpy array": np.array,
    "tensor": lambda value: torch.tensor(int(value)),
    "tensor of a float": lambda value: torch.tensor(float(value)),
    "half": lambda value: torch.tensor(float(value), dtype=torch.bfloat16),
}
COUNTS_OF_NONE = {"True": True, "numpy True": np.True_, "a tensor True": torch.tensor(True), "text": "3", "half": 2.5,
                  "nan": float("nan"), "inf": float("inf"), "two": torch.tensor([3, 3]), "complex": 3 + 0j, "list": [3]}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_count_is_taken_in_every_spelling(tmp_path, spelling):
    n = SPELLINGS[spelling]
    head = PartialFC(n(D), n(C), SubCenterArcFace(centers=n(2)), seed=n(3), ignore_index=n(-1), max_skips=n(5),
                     logits_budget=n(64), init_std=1.0)  # fmt: skip
    same = PartialFC(
        D, C, SubCenterArcFace(centers=2), seed=3, ignore_index=-1, max_skips=5, logits_budget=64, init_std=1.0
    )
    numbers = ("embedding_size", "num_classes", "seed", "ignore_index", "max_skips", "logits_budget", "init_std")
    assert [type(getattr(head, name)) for name in numbers] == [type(getattr(same, name)) for name in numbers]
    assert head.agreed_settings() == same.agreed_settings() and torch.equal(head.weight, same.weight)
    x = torch.randn(3, D)
    assert torch.equal(head(x, torch.tensor([1, -1, 2])), same(x, torch.tensor([1, -1, 2])))
    assert torch.equal(head.topk(x, n(3), tile_bytes=n(64)).ids, same.topk(x, 3, tile_bytes=64).ids)
    assert torch.equal(head.nearest_classes(n(2)).ids, same.nearest_classes(2).ids)
    head.zero_grad()
    head.expand(n(2))
    assert head.num_classes == C + 2 and isinstance(head.num_classes, int)
    center = CenterLoss(n(D), n(C), seed=n(0), ignore_index=n(-1), max_skips=n(2), alpha=n(1))
    assert center.agreed_settings() == CenterLoss(D, C, ignore_index=-1, max_skips=2, alpha=1.0).agreed_settings()
    checkpointer = Checkpointer(tmp_path, keep_last=n(2), keep_best=n(1))
    checkpointer.save(n(7), head=head)
    assert checkpointer.load(step=n(7), head=head) == 7 and checkpointer.path(n(7)) == checkpointer.path(7)
    watch = DivergenceWatch(head, every=n(2))
    watch.step(n(1))
    assert isinstance(watch.every, int)
    sizes = plan(n(C), n(D), n(2), n(8), memory=n(64), logits_budget=n(32))
    assert sizes == plan(C, D, 2, 8, memory=64, logits_budget=32)
    assert (
        class_mapping(n(C), merge=[(n(1), n(2))], drop=[n(4)]).tolist()
        == class_mapping(C, merge=[(1, 2)], drop=[4]).tolist()
    )
    joined = list(JoinedBatches([(x, torch.zeros(3))], labels=n(1), ignore_index=n(-1)))
    assert len(joined) == 1
    check_margin(ArcFace(n(16)), worlds=(n(1),)) if spelling == "float" else None  # it starts processes


def test_a_count_in_the_notation_of_floats():
    head = PartialFC(8.0, 1e3, sample_rate=1, logits_budget=1e9)
    assert (head.embedding_size, head.num_classes, head.logits_budget) == (8, 1000, 10**9)
    assert plan(1e6, 512, 8, 1024, memory=80e9) == plan(10**6, 512, 8, 1024, memory=80 * 10**9)
    assert whole("a count", 1e6) == 10**6 and whole("a count", Fraction(4, 2)) == 2
    assert "num_classes must be a whole number, not 1000000.5" in message_of(PartialFC, 8, 1e6 + 0.5)


REFUSALS: dict[str, Any] = {
    "num_classes": lambda value: PartialFC(D, value),
    "embedding_size": lambda value: PartialFC(value, C),
    "seed": lambda value: PartialFC(D, C, seed=value),
    "ignore_index": lambda value: PartialFC(D, C, ignore_index=value),
    "max_skips": lambda value: PartialFC(D, C, max_skips=value),
    "logits_budget": lambda value: PartialFC(D, C, logits_budget=value),
    "embedding_size ": lambda value: CenterLoss(value, C),
    "num_classes ": lambda value: CenterLoss(D, value),
    "centers": lambda value: SubCenterArcFace(centers=value),
    "k": lambda value: PartialFC(D, C).topk(torch.ones(1, D), value),
    "k ": lambda value: PartialFC(D, C).nearest_classes(value),
    "tile_bytes": lambda value: PartialFC(D, C).topk(torch.ones(1, D), 1, tile_bytes=value),
    "new_classes": lambda value: PartialFC(D, C).expand(value),
    "keep_last": lambda value: Checkpointer("nowhere", keep_last=value),
    "keep_best": lambda value: Checkpointer("nowhere", keep_best=value),
    "step": lambda value: Checkpointer("nowhere").save(value, head=PartialFC(D, C)),
    "step ": lambda value: Checkpointer("nowhere").path(value),
    "every": lambda value: DivergenceWatch(every=value),
    "num_classes  ": lambda value: class_mapping(value),
    "a class in merge": lambda value: class_mapping(C, merge=[(1, value)]),
    "a class in drop": lambda value: class_mapping(C, drop=[value]),
    "world_size": lambda value: plan(C, D, value, 8),
    "batch_size": lambda value: plan(C, D, 2, value),
    "memory": lambda value: plan(C, D, 2, 8, memory=value),
    "worlds": lambda value: check_margin(ArcFace(), worlds=(value,)),
    "input_shape": lambda value: doctor(torch.nn.Linear(1, 1), PartialFC(D, C), [], input_shape=(value,)),
    "labels": lambda value: JoinedBatches([], labels=value) if not isinstance(value, str) else whole("labels", value),
    "ignore_index ": lambda value: JoinedBatches([], ignore_index=value),
    "ignore_index  ": lambda value: JoinedBatches([], ignore_index={"a": value}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_count_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, value in COUNTS_OF_NONE.items():
        assert name.strip() in message_of(REFUSALS[name], value), what
    assert not list(tmp_path.iterdir())


def test_no_label_is_to_be_ignored():
    for build in (PartialFC, CenterLoss):
        assert "ignore_index is a label, not None: leave it at -100" in message_of(build, D, C, ignore_index=None)
    assert "ignore_index is a label, not None" in message_of(JoinedBatches, [], ignore_index=None)
    assert PartialFC(D, C, max_skips=None).max_skips is None  # None for any number is a value of its own
    assert "max_skips is how many" in message_of(PartialFC, D, C, max_skips=-1)


def test_numbers_that_are_no_counts():
    for spelling in (float, np.float64, np.float32, torch.tensor, Fraction):
        head = PartialFC(D, C, CosFace(spelling(1)), spelling(0.5), init_std=spelling(0.25), label_smoothing=spelling(0.125),
                         interclass_filter=spelling(0.5))  # fmt: skip
        same = PartialFC(D, C, CosFace(1.0), 0.5, init_std=0.25, label_smoothing=0.125, interclass_filter=0.5)
        assert head.agreed_settings() == same.agreed_settings() and head.sample_rate == 0.5
    for name, value in itertools.product(
        ("sample_rate", "init_std", "label_smoothing", "interclass_filter"), (True, "1")
    ):
        assert f"{name} must be a number, not {value!r}" in message_of(lambda: PartialFC(D, C, **{name: value}))  # noqa: B023
    assert "alpha must be a number, not True" in message_of(CenterLoss, D, C, alpha=True)
    assert (plain(torch.tensor(0.35)), plain(np.float32(0.35)), plain(np.float16(0.1)), real("x", 1)) == (
        0.35,
        0.35,
        0.1,
        1,
    )
    assert plain(torch.tensor(0.35, dtype=torch.float64)) == 0.35 and isinstance(plain(torch.tensor(2)), int)
    assert plain(torch.tensor(1 / 3)) == pytest.approx(1 / 3, rel=1e-7)


# ---------------------------------------------------------------------------------------------------- margins


class Plain(Margin):
    """A user's margin, which keeps its arguments as they come."""

    def __init__(self, m: Any = 0.25, name: Any = "x") -> None:
        super().__init__()
        self.m, self.name = m, name

    def target(self, cosine, positives):  # type: ignore[no-untyped-def]
        return cosine - float(self.m)


def margins_of(value: Any) -> list[Margin]:
    """One margin of each class, every number of which is spelled by `value`."""
    found = []
    for name in margins.__all__:
        cls = getattr(margins, name)
        if name in ("Margin", "Positives"):
            continue
        parameters = inspect.signature(cls).parameters
        options = {
            k: value(p.default)
            for k, p in parameters.items()
            if isinstance(p.default, int | float) and not isinstance(p.default, bool)
        }
        options |= {"class_counts": [1, 2, 3]} if "class_counts" in parameters else {}
        options |= {"margin": value(0.5)} if name == "ElasticFace" else {}
        found.append(cls(**options))
    return [*found, Plain(value(0.25))]


@pytest.mark.parametrize("spelling", [np.float64, np.float32, lambda v: torch.tensor(v), lambda v: np.array(v), lambda v: int(v) if v == int(v) else v])  # fmt: skip
def test_a_margin_has_one_description_for_all_spellings(spelling):
    for one, other in zip(margins_of(spelling), margins_of(lambda v: v), strict=True):
        assert one.describe() == other.describe()
        changed = copy.deepcopy(other)
        changed.scale = other.scale  # nothing is refused that changes nothing
        assert changed.describe() == other.describe()


def build_with(rank: int, world: int) -> str:
    """Ranks write the same margin in two ways; it is one head, and one checkpoint."""
    margin = (ArcFace(64, 0.5), ArcFace(np.float64(64.0), torch.tensor(0.5)))[rank]
    head = PartialFC((D, float(D))[rank], (C, 1.2e1)[rank], margin, (1, 1.0)[rank], seed=(0, np.int64(0))[rank])
    own = PartialFC(D, C, Plain((1, 1.0)[rank]))
    head(torch.randn(2, D), torch.tensor([1, 2])).backward()
    assert own.margin.describe() == "Plain(scale=64.0, m=1.0, name='x')"
    return any_message_of(lambda: PartialFC(D, C, ArcFace(gradient=("exact", "straight_through")[rank])))


def test_ranks_that_spell_it_differently_agree(ranks):
    found = ranks(2).run(build_with)
    assert (
        found[0] == found[1] and "ranks disagree: margin.gradient is exact on rank 0 and straight_through" in found[0]
    )


OLD = [
    ("ArcFace(scale=64, m1=1.0, m2=0.5, m3=0.0, gradient='exact')", ArcFace),
    ("ArcFace(scale=64.0, m1=1.0, m2=0.5, m3=0.0, gradient='straight_through')", ArcFace),
    ("ArcFace(scale=np.float64(64.0), m1=1.0, m2=0.5, m3=0.0, gradient='exact')", ArcFace),
    ("SubCenterArcFace(scale=64.0, m1=1.0, m2=0.5, m3=0.0, gradient='exact', centers=3)", SubCenterArcFace),
    ("AdaFace(scale=64, margin=0.4, h=0.333, momentum=0.01)", margins.AdaFace),
    ("SphereFace2(scale=40, margin=0.4, t=3, balance=0.7, binary=(0.0175, 0.0075))", margins.SphereFace2),
    ("ElasticFace(scale=64.0, kind='arc', margin=0.5, deviation=0.0125, plus=False, sees_all=False)", margins.ElasticFace),
    ("Softmax(scale=1.0, bias=True)", margins.Softmax),
    ("Plain(scale=64.0, m=0.25, name='x')", Plain),
    ("Plain(scale=64.0, name='x')", lambda: Plain(np.array(0.25))),  # left out what was not a plain number
]  # fmt: skip


@pytest.mark.parametrize(("text", "build"), OLD)
def test_descriptions_of_earlier_versions_still_fit(text, build):
    head = PartialFC(D, C, build())
    state = head.state_dict()
    state["_extra_state"] = {"step": 3, "class_changes": 0, "margin": text, "skips": 0}
    head.load_state_dict(state)
    assert head.forward_count == 3
    for old, new in ((",", ", scale2=1.0,"), ("scale=", "scale=1"), ("=", "=(")):
        state["_extra_state"]["margin"] = text.replace(old, new, 1)
        assert "it is of a head with" in message_of(head.load_state_dict, state)


def test_what_two_descriptions_have_in_common():
    arc = ArcFace().describe()
    assert same_margin(arc, arc) and same_margin("what", "what") and not same_margin("what", "else")
    assert not same_margin(arc, arc.replace("ArcFace", "CosFace")) and not same_margin(arc, arc.replace("0.5", "0.4"))
    assert not same_margin(arc, arc.replace("1.0", "True")) and not same_margin(arc, "ArcFace()")
    assert not same_margin(arc, "ArcFace(" * 3000) and not same_margin(arc, "-" * 9000 + "1")
    assert not same_margin("A(x=__import__('os').getcwd())", "A(x=1)") and same_margin(
        "A(x=nan, y=-inf)", "A(x=nan, y=-inf)"
    )


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_a_checkpoint_is_for_either_gradient(tmp_path, gradient, capsys):
    """insightface trains with "straight_through"; what is stored does not depend on it."""
    head = PartialFC(D, C, ArcFace(gradient=gradient))
    save_checkpoint(tmp_path / "checkpoint", head=head)
    other = PartialFC(D, C, ArcFace(64, 0.5, "exact" if gradient == "straight_through" else "straight_through"))
    before = other.margin.gradient
    load_checkpoint(tmp_path / "checkpoint", head=other)
    assert torch.equal(other.weight, head.weight) and other.margin.gradient == before
    weights = tmp_path / "weights.safetensors"
    export_weights(weights, head)
    import_weights(weights, PartialFC(D, C, CosFace()))
    assert main(["import", str(weights), "--output", str(tmp_path / "start")]) == 0
    load_checkpoint(tmp_path / "start", head=other)
    assert other.margin.gradient == before
    given = ["--margin", "ArcFace", "--margin.gradient", "straight_through"]
    assert main(["import", str(weights), "--output", str(tmp_path / "given"), *given]) == 0
    load_checkpoint(tmp_path / "given", head=head)
    assert head.margin.gradient == gradient
    capsys.readouterr()


def test_gather_takes_heads_of_any_spelling():
    heads = PartialFC(D, float(C), ignore_index=np.int64(-1)), CenterLoss(D, C, ignore_index=-1.0)
    batch = gather(torch.randn(3, D, requires_grad=True), torch.tensor([1, -1, 2]))
    sum(head(batch) for head in heads).backward()  # type: ignore[union-attr]
