"""Classes that come and go: rows and optimizer state against one dense float64 process that trains on a matrix it edits
as a whole.

The dense reference indexes and concatenates the full matrix; it shares no code with the core, except that under
sampling it is told which classes a step drew, and for fresh rows what was drawn.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from common import any_message_of as message_of
from dense_losses import Loss
from dense_optimizers import DenseAdamW, DenseSGD
from near import near
from shards import local, part_of, selected_by_all, two_by_two, whole
from torch import Tensor
from watching import Allocations

import partial_fc.classes.moves
from partial_fc import (
    AdaptiveMargin,
    ArcFace,
    CenterLoss,
    CurricularFace,
    Margin,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    SubCenterArcFace,
    class_mapping,
    load_checkpoint,
    save_checkpoint,
)

D = 5
N = 12
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def full(tensor: Tensor) -> Tensor:
    return whole(tensor).clone()


def mesh_of(mesh: bool) -> Any:
    return two_by_two() if mesh else None


@contextlib.contextmanager
def small_blocks(rows: int = 2) -> Iterator[None]:
    """Moves of a few rows at a time, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_fc.classes.moves, "BLOCK_BYTES", rows * D * 8)
        yield


def batch(step: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (N,), generator=generator)


# ---------------------------------------------------------------------------------------------- against a dense process


@dataclass
class Case:
    """margin: "arc", "softmax" (with a bias). optimizer: "sgd", "adamw"; plain: a torch optimizer in the place of a
    RowOptimizer."""

    margin: str = "arc"
    optimizer: str = "sgd"
    rate: float = 1.0
    plain: bool = False
    mesh: bool = False
    weights: list[float] | None = None
    merge: str = "mean"
    mapping: list[int] = field(default_factory=lambda: [2, -1, 0, 5, 1, 5, -1, 3, 5, 4, 1])
    more: int = 6


CASES = {
    "sgd": Case(),
    "adamw": Case(optimizer="adamw", weights=[1, 0, 2, 0.5, 3, 1.5, 1, 1, 0, 1, 1.0]),
    "sgd-sampled": Case(rate=0.4, weights=[1, 0, 2, 0.5, 3, 1.5, 1, 1, 0, 1, 1.0]),
    "adamw-sampled": Case(optimizer="adamw", rate=0.4, merge="first"),
    "bias": Case(margin="softmax", rate=0.4),
    "bias-plain": Case(margin="softmax", optimizer="adamw", plain=True),
    "sgd-plain": Case(plain=True),
    "few": Case(mapping=[-1, 1, -1, -1, 0, -1, -1, 1, -1, -1, -1], more=1),
    "one": Case(mapping=[0] * 11, more=1, optimizer="adamw"),
    "many": Case(mapping=list(range(11))[::-1], more=2000, rate=0.4),
}


@dataclass
class Dense:
    """The whole matrix with a bias column apart, its optimizer's tensors as a list, edited row by row."""

    w: Tensor
    bias: Tensor | None
    optimizers: list[Any]

    def tensors(self) -> list[tuple[Tensor, Any, str]]:
        """Every tensor that has a row for each class: (values, owner, name)."""
        found: list[tuple[Tensor, Any, str]] = [(self.w, self, "w")]
        if self.bias is not None:
            found.append((self.bias, self, "bias"))
        for optimizer in self.optimizers:
            if isinstance(optimizer, DenseSGD):
                found.append((optimizer.buffer, optimizer, "buffer"))  # type: ignore[arg-type]
            else:
                found += [(moment, optimizer.moments, k) for k, moment in enumerate(optimizer.moments)]  # type: ignore[misc]
        return found

    def edit(self, change: Any) -> None:
        for values, owner, name in self.tensors():
            changed = change(values)
            if isinstance(owner, list):
                owner[name] = changed  # type: ignore[call-overload]
            else:
                setattr(owner, name, changed)

    def remap(self, mapping: list[int], weights: list[float] | None, merge: str) -> None:
        def change(values: Tensor) -> Tensor:
            rows = []
            for new in range(max(mapping) + 1):
                members = [old for old, to in enumerate(mapping) if to == new]
                if merge == "first" or len(members) == 1:
                    rows.append(values[members[0]])
                else:
                    counts = [1.0 if weights is None else weights[old] for old in members]
                    rows.append(sum(c * values[old] for c, old in zip(counts, members, strict=True)) / sum(counts))
            return torch.stack(rows)

        self.edit(change)

    def expand(self, rows: Tensor) -> None:
        before = self.w
        self.edit(
            lambda values: torch.cat(
                (values, rows if values is before else values.new_zeros(len(rows), *values.shape[1:]))
            )
        )

    def step(self, x: Tensor, labels: Tensor, ids: Tensor, loss: Loss) -> float:
        w, bias = self.w[ids].requires_grad_(), None if self.bias is None else self.bias[ids].requires_grad_()
        value = loss(x, w, torch.searchsorted(ids, labels), ids, bias=bias)
        value.backward()
        for optimizer, values, rows in zip(self.optimizers, (self.w, self.bias), (w, bias), strict=False):
            if values is not None:
                grad = torch.zeros_like(values)
                grad[ids] = rows.grad  # type: ignore[union-attr]
                # rows that were not selected move as well
                optimizer.step(values, grad, torch.arange(len(values)) if isinstance(optimizer, DenseSGD) else ids)
        return value.item()


def build(case: Case, classes: int = 11) -> tuple[PartialFC, torch.optim.Optimizer]:
    margin = ArcFace(16.0) if case.margin == "arc" else Softmax()
    head = PartialFC(D, classes, margin, case.rate, init_std=1.0, seed=7, dtype=torch.float64, group=mesh_of(case.mesh))
    cls: Any = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
    options: Any = SGD if case.optimizer == "sgd" else {"lr": 0.05}
    skipped: Any = "dense" if case.optimizer == "sgd" else "still"
    if case.plain:
        return head, cls(head.parameters(), **options)
    return head, RowOptimizer(cls, head, skipped_rows=skipped, **options)


def check(rank: int, world: int, case: Case) -> list[float]:
    """Train, remap, train, expand, train; after each step the same loss and matrix as the dense process, and the same
    state at the end."""
    head, optimizer = build(case)
    parameters = list(head.parameters())
    given: Any = {"optimizers": optimizer} if case.plain else {}
    kinds = {"sgd": lambda: DenseSGD(**SGD), "adamw": lambda: DenseAdamW(lr=0.05)}
    dense = Dense(
        full(head.weight), None if head.bias is None else full(head.bias), [kinds[case.optimizer]() for _ in range(2)]
    )
    dense.optimizers = dense.optimizers[: 1 if head.bias is None else 2]
    loss_of = Loss("ArcFace", {"scale": 16.0}) if case.margin == "arc" else Loss("Softmax")
    losses = []

    def train(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            x, labels = batch(step, head.num_classes)
            mine = part_of(N, rank, world)
            loss = head(x[mine], labels[mine])
            loss.backward()
            expected = dense.step(x, labels, selected_by_all(head), loss_of)
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == pytest.approx(expected, rel=1e-9)
            losses.append(loss.item())
        head.class_rows.catch_up()
        near(full(head.weight), dense.w, 1e-9)

    train(0, 3)
    before = full(head.weight)
    with small_blocks():
        head.remap(case.mapping, merge=case.merge, weights=case.weights and torch.tensor(case.weights), **given)  # type: ignore[arg-type]
    dense.remap(case.mapping, case.weights, case.merge)
    assert head.num_classes == len(dense.w)
    near(full(head.weight), dense.w)
    stay = [
        old
        for old, new in enumerate(case.mapping)
        if new >= 0 and (case.mapping.index(new) == old if case.merge == "first" else case.mapping.count(new) == 1)
    ]
    assert torch.equal(full(head.weight)[[case.mapping[old] for old in stay]], before[stay])
    train(3, 3)
    before = full(head.weight)
    with small_blocks(7):
        head.expand(case.more, **given)
    assert head.weight.shape == (len(dense.w) + case.more, D) and torch.equal(full(head.weight)[: len(before)], before)
    dense.expand(full(head.weight)[len(before) :])
    train(6, 4)
    assert all(a is b for a, b in zip(parameters, head.parameters(), strict=True)), "parameters are others"
    found = [full(head.weight)] + ([] if head.bias is None else [full(head.bias)])
    for parameter in parameters:
        keys = ["momentum_buffer"] if case.optimizer == "sgd" else ["exp_avg", "exp_avg_sq"]
        found += [full(optimizer.state[parameter][key]) for key in keys]
        if case.optimizer == "adamw":
            assert float(optimizer.state[parameter]["step"]) == 10
    for (expected_values, _, name), values in zip(dense.tensors(), found, strict=True):
        torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    return losses


@pytest.mark.parametrize("world", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_float64(ranks, world, name):
    results = ranks(world).run(check, CASES[name])
    assert all(losses == results[0] for losses in results)


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_float64_without_a_group(name):
    check(0, 1, CASES[name])


@pytest.mark.parametrize("name", ["adamw-sampled", "bias"])
def test_replicas_of_shards_equal_dense_float64(ranks, name):
    ranks(4).run(check, Case(**{**vars(CASES[name]), "mesh": True}))


# ------------------------------------------------------------------------------------- bit for bit, at every world size


def edited(rank: int, world: int, dtype: torch.dtype, low_precision: str | None, update: str) -> dict[str, Tensor]:
    """Weights and state after set rows were merged, moved and added to; the rows are the same whatever the world."""
    if update:
        loss: Any = CenterLoss(D, 40, update=update, init_std=1.0, dtype=dtype)  # type: ignore[arg-type]
    else:
        loss = PartialFC(D, 40, ArcFace(), init_std=1.0, dtype=dtype)
    parameter = next(loss.parameters())
    optimizer = None
    if update != "paper":
        optimizer = RowOptimizer(torch.optim.Adam, loss, lr=0.1, low_precision=low_precision)  # type: ignore[arg-type]
        template = optimizer.state_template()
        for k, value in enumerate(v for v in template["state"][0].values() if v.ndim):
            rows = torch.randn(40, D, generator=torch.Generator().manual_seed(k)) * 3
            local(value).copy_(rows[loss.shards.lo : loss.shards.hi])
        optimizer.load_state_dict(template)
        if low_precision:
            local(parameter.detach()).copy_(local(optimizer.state[parameter]["master_weight"]))
    mapping = class_mapping(40, merge=[(30, 2, 17, 5), (1, 39), (20, 21)], drop=[0, 3, 8])
    with small_blocks(3):
        loss.remap(mapping, weights=torch.arange(1, 41))
        loss.expand(3)
        loss.expand(4)
    found = {"weight": full(parameter)}
    if optimizer is not None:
        found.update({k: full(v) for k, v in optimizer.state[parameter].items() if v.ndim})
    return found


@pytest.mark.parametrize(
    ("dtype", "low_precision", "update"),
    [
        (torch.float32, None, ""),
        (torch.float64, None, ""),
        (torch.bfloat16, None, ""),
        (torch.bfloat16, "master", ""),
        (torch.float32, None, "paper"),
        (torch.float32, None, "gradient"),
    ],
)
def test_the_same_bits_at_every_world_size(ranks, dtype, low_precision, update):
    alone = edited(0, 1, dtype, low_precision, update)
    assert all(value.shape == (39, D) for value in alone.values())  # 40 - 3 dropped - 5 merged into others, then 7 more
    for world in (1, 2, 3, 4):
        for found in ranks(world).run(edited, dtype, low_precision, update):
            for key, value in alone.items():
                assert torch.equal(found[key], value), (world, key)
    weight = alone["weight"].double()
    assert len(weight.unique(dim=0)) == len(weight), "a fresh row repeats another"
    assert alone["weight"].dtype == dtype
    if low_precision:
        master = alone["master_weight"]
        assert torch.equal(master.to(dtype), alone["weight"]), "the rounded weights are not those of the state"
    if not update and not low_precision:
        start = PartialFC(D, 40, ArcFace(), init_std=1.0, dtype=dtype).weight.detach()
        mapping = class_mapping(40, merge=[(30, 2, 17, 5), (1, 39), (20, 21)], drop=[0, 3, 8])
        for old, new in enumerate(mapping.tolist()):
            if new >= 0 and mapping.tolist().count(new) == 1:
                assert torch.equal(alone["weight"][new], start[old])
        group = torch.tensor([2, 5, 17, 30])
        mean = (start[group].double() * (group + 1)[:, None]).sum(0) / (group + 1).sum()
        torch.testing.assert_close(alone["weight"][int(mapping[30])], mean.to(dtype))


def fresh(rank: int, world: int) -> Tensor:
    """Half of the classes go and as many are added, twice; then also at once. 2,400 classes, so that draws are cut by
    rows and blocks."""
    head = PartialFC(D, 2400, init_std=1.0)
    rows = [full(head.weight)]
    for _ in range(2):
        head.remap(class_mapping(2400, drop=range(1200, 2400)))
        head.expand(1200)
        rows.append(full(head.weight)[1200:])
    return torch.cat(rows)


def test_fresh_rows_are_the_same_everywhere_and_never_drawn_again(ranks):
    expected = fresh(0, 1)
    assert len(expected.unique(dim=0)) == len(expected)
    assert 0.95 < expected[2400:].std() < 1.05
    for world in (2, 3):
        assert all(torch.equal(rows, expected) for rows in ranks(world).run(fresh))


# ---------------------------------------------------------------------------------------------------- starting rows


def class_batches(rank: int, world: int, low: int, high: int) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Tensor]]:
    """Rank r brings r batches with labels from low on, the first none; (this rank's, the mean of every class that has
    samples)."""
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for r in range(4):
        generator = torch.Generator().manual_seed(r)
        sizes = [3 + k for k in range(r)]
        batches.append(
            [
                (20 * torch.randn(n, D, generator=generator), torch.randint(low, high - 2, (n,), generator=generator))
                for n in sizes
            ]
        )
    batches[1][0][1][0] = -100
    members: dict[int, list[Tensor]] = {}
    for x, labels in (pair for each in batches for pair in each):
        for row, label in zip(x.double(), labels.tolist(), strict=True):
            members.setdefault(label, []).append(row)
    members.pop(-100)
    own = [pair for r in range(rank, 4, world) for pair in batches[r]]
    return own, {label: torch.stack(rows).mean(0) for label, rows in members.items()}


def direction(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def means_of_existing(rank: int, world: int, margin: str, mesh: bool) -> Tensor:
    margins: dict[str, Any] = {"arc": ArcFace, "sub": lambda: SubCenterArcFace(centers=3), "softmax": Softmax}
    head = PartialFC(D, 23, margins[margin](), init_std=1.0, dtype=torch.float64, group=mesh_of(mesh))
    before = full(head.weight)
    batches, means = class_batches(rank, world, 0, 23)
    head.init_from_embeddings(iter(batches))
    after = full(head.weight)
    assert 4 < len(means) < 23
    rest = [j for j in range(23) if j not in means]
    assert torch.equal(after[rest], before[rest])
    for j, mean in means.items():
        if margin == "softmax":
            torch.testing.assert_close(after[j], mean)
            continue
        torch.testing.assert_close(after[j].norm(dim=-1), before[j].norm(dim=-1))
        nearest = after[j] if margin == "arc" else after[j, 0]
        torch.testing.assert_close(direction(nearest), direction(mean))
        if margin == "sub":
            angles = torch.acos(direction(after[j]) @ direction(mean))[1:]
            assert bool((angles > 0.003).all() and (angles < 0.11).all()), angles
            assert not torch.allclose(direction(after[j, 1]), direction(after[j, 2]), atol=1e-4)
    head(*batches[0] if batches else (torch.empty(0, D), torch.empty(0, dtype=torch.int64))).backward()
    return after


@pytest.mark.parametrize("margin", ["arc", "sub", "softmax"])
def test_rows_start_from_class_means(ranks, margin):
    alone = means_of_existing(0, 1, margin, False)
    for world, mesh in ((1, False), (2, False), (3, False), (4, False), (4, True)):
        for rows in ranks(world).run(means_of_existing, margin, mesh):
            near(rows, alone, 1e-9)


def means_of_new(rank: int, world: int, kind: str, mesh: bool) -> Tensor:
    kinds: dict[str, Any] = {
        "arc": lambda **o: PartialFC(D, 10, ArcFace(), init_std=0.1, **o),
        "sub": lambda **o: PartialFC(D, 10, SubCenterArcFace(centers=2), init_std=0.1, **o),
        "softmax": lambda **o: PartialFC(D, 10, Softmax(), init_std=0.1, **o),
        "center": lambda **o: CenterLoss(D, 10, init_std=0.1, **o),
    }
    loss, twin = (kinds[kind](dtype=torch.float64, group=mesh_of(mesh)) for _ in range(2))
    twin.expand(13)
    batches, means = class_batches(rank, world, 10, 23)
    loss.expand(13, batches)
    rows, drawn = full(next(loss.parameters())), full(next(twin.parameters()))
    rest = [j for j in range(23) if j not in means]
    assert torch.equal(rows[rest], drawn[rest]) and max(rest) == 22 and means
    length = drawn[:10].norm(dim=-1).mean()
    for j, mean in means.items():
        first = rows[j, 0] if kind == "sub" else rows[j]
        normalised = kind in ("arc", "sub")
        torch.testing.assert_close(first, direction(mean) * length if normalised else mean)
        if kind == "sub":
            torch.testing.assert_close(rows[j, 1].norm(), length)
            assert 0.003 < torch.acos(direction(rows[j, 1]) @ direction(mean)) < 0.11
    return rows


@pytest.mark.parametrize("kind", ["arc", "sub", "softmax", "center"])
def test_new_rows_start_from_class_means(ranks, kind):
    alone = means_of_new(0, 1, kind, False)
    for world, mesh in ((1, False), (3, False), (4, False), (4, True)):
        for rows in ranks(world).run(means_of_new, kind, mesh):
            near(rows, alone, 1e-9)


def given_vectors(rank: int, world: int, centers: int) -> None:
    head = PartialFC(D, 3, SubCenterArcFace(centers=centers), dtype=torch.float64)
    vectors = torch.randn(8, *((centers, D) if centers > 1 else (D,)), generator=torch.Generator().manual_seed(5))
    head.expand(8, vectors)
    assert torch.equal(full(head.weight)[3:], vectors.double())
    texts = [
        message_of(head.expand, 8, wrong)
        for wrong in (vectors[:7], vectors.long(), torch.full_like(vectors, math.inf), vectors + rank)
    ]
    for text, expected in zip(texts, ("not [7", "not [8", "init[0] holds", "ranks disagree: init"), strict=True):
        assert expected in text or (world == 1 and "disagree" in expected)


@pytest.mark.parametrize("centers", [1, 2])
def test_new_rows_start_from_given_vectors(ranks, centers):
    for world in (2, 3):
        ranks(world).run(given_vectors, centers)


def test_means_reach_the_float32_weights_of_a_half_precision_head():
    head = PartialFC(D, 4, ArcFace(), dtype=torch.bfloat16)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.0, low_precision="master")
    x, labels = torch.randn(6, D), torch.tensor([0, 1, 1, 2, 2, 2])
    head(x, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    head.init_from_embeddings([(x, labels)])
    head.expand(2, torch.full((2, D), 1 / 3))
    expected = full(head.weight)
    head(x, labels).backward()
    optimizer.step()
    assert torch.equal(full(head.weight), expected), "the step brought back rows of before"
    assert torch.equal(optimizer.state[head.weight]["master_weight"][4:], torch.full((2, D), 1 / 3))
    torch.testing.assert_close(direction(expected[2].float()), direction(x[3:].mean(0)), rtol=0, atol=0.01)


def test_a_mean_without_direction_leaves_its_row():
    head = PartialFC(D, 2, dtype=torch.float64)
    before = full(head.weight)
    x = torch.randn(1, D)
    head.init_from_embeddings([(torch.cat((x, -x)), torch.tensor([1, 1]))])
    assert torch.equal(full(head.weight), before)


# --------------------------------------------------------------------------------------------------- tables and margins


def test_class_weights_follow():
    weights = torch.tensor([1.0, 2, 3, 4])
    head = PartialFC(D, 4, class_weights=weights)
    head.remap([0, -1, 1, 1], weights=torch.tensor([1, 1, 1, 3]))
    assert head.class_weights.tolist() == [1, (3 + 3 * 4) / 4]
    assert "pass class_weights for the 2 new classes" in message_of(head.expand, 2)
    assert "for each of 2 classes" in message_of(head.expand, 2, class_weights=torch.ones(3))
    head.expand(2, class_weights=torch.tensor([5.0, 6]))
    assert head.class_weights.tolist() == [1, 3.75, 5, 6]
    head.remap([0, 0, 1, 1], merge="first")
    assert head.class_weights.tolist() == [1, 5]
    assert "class_weights" not in head.state_dict()
    assert "this one has none" in message_of(PartialFC(D, 4).expand, 1, class_weights=torch.ones(1))
    assert "CenterLoss has no class_weights" in message_of(CenterLoss(D, 4).expand, 1, class_weights=torch.ones(1))


def tables(rank: int, world: int) -> None:
    head = PartialFC(D, 4, AdaptiveMargin([4, 3, 2, 1]), dtype=torch.float64)
    text = message_of(head.expand, 1)
    assert "AdaptiveMargin has one number per class: pass margin=AdaptiveMargin(...) for the 5 classes" in text
    assert "must hold 5 numbers" in message_of(head.expand, 1, margin=AdaptiveMargin([1, 2]))
    assert "must be a AdaptiveMargin" in message_of(head.expand, 1, margin=ArcFace())
    assert head.num_classes == 4
    new = AdaptiveMargin([4, 3, 2, 1, 9])
    head.eval()
    head.expand(1, margin=new)
    assert head.margin is new and not new.training
    x, labels = batch(0, 5)
    expected = PartialFC(D, 5, AdaptiveMargin([4, 3, 2, 1, 9]), dtype=torch.float64)
    local(expected.weight.detach()).copy_(local(head.weight.detach()))
    assert head(x, labels) == expected.eval()(x, labels)
    head.remap({0: 0, 1: 0, 2: 1, 3: -1, 4: 2}, margin=AdaptiveMargin([7, 2, 9]))
    assert len(head.margin.margins) == 3
    if world > 1:
        text = message_of(head.expand, 1, margin=AdaptiveMargin([1, 2, 3, 1 + rank]))
        assert (
            text == "ValueError: ranks disagree: margin differs between rank 0 and rank 1; pass the same on every rank"
        )


def test_margins_with_a_number_for_each_class_are_given_anew(ranks):
    tables(0, 1)
    ranks(2).run(tables)


def other_margins(rank: int, world: int) -> None:
    """Running statistics and SphereFace2's trained offset stay, and go on."""
    head = PartialFC(D, 9, CurricularFace(16.0), dtype=torch.float64)
    x, labels = batch(0, 4)
    head(x, labels)
    t = head.margin.t.item()
    head.remap(class_mapping(9, drop=[5, 6]))
    assert head.margin.t.item() == t != 0
    assert "this head keeps its CurricularFace" in message_of(head.expand, 1, margin=CurricularFace())
    head = PartialFC(D, 9, SphereFace2(), 0.5, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.Adam, head, lr=0.1)
    offset = head.margin.offset
    for change in (lambda: head.expand(300), lambda: head.remap(class_mapping(309, drop=range(100, 309)))):
        head(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = local(offset.detach()).clone()
        change()
        assert head.margin.offset is offset and torch.equal(local(offset.detach()), before)
    head.margin.reset()
    expected = local(PartialFC(D, 100, SphereFace2(), 0.5, dtype=torch.float64).margin.offset)
    assert torch.equal(local(offset.detach()), expected)


@pytest.mark.parametrize("world", [1, 2])
def test_other_margins_keep_their_state(ranks, world):
    ranks(world).run(other_margins)


class Forgotten(Margin):
    """A table by class, made in prepare, that its author did not tell of."""

    def target(self, cosine: Tensor, positives: Any) -> Tensor:
        return cosine

    def prepare(self, num_classes: int, selected: int) -> None:
        self.register_buffer("table", torch.zeros(num_classes), persistent=False)


def test_a_table_that_is_not_declared_is_found():
    head = PartialFC(D, 4, Forgotten())
    assert "Forgotten must set by_class = True" in message_of(head.expand, 1)
    assert len(head.margin.table) == 4 and head.num_classes == 4


# ---------------------------------------------------------------------------------------------------- checkpoints


def grown(rank: int, world: int, path: str, kind: str, load: bool) -> tuple[list[float], Tensor]:
    """Train 11 classes, change them to 14, train, save, go on; or load at 14 and go on. A change after loading draws
    the same rows."""

    def build(classes: int) -> tuple[Any, Any]:
        if kind == "center":
            center = CenterLoss(D, classes, dtype=torch.float64, init_std=1.0)
            return center, None
        head = PartialFC(D, classes, ArcFace(16.0), 0.5, dtype=torch.float64, init_std=1.0)
        return head, RowOptimizer(torch.optim.AdamW, head, lr=0.05)

    def train(loss: Any, optimizer: Any, first: int) -> list[float]:
        values = []
        for step in range(first, first + 3):
            x, labels = batch(step, loss.num_classes)
            mine = part_of(N, rank, world)
            value = loss(x[mine], labels[mine])
            if optimizer is None:
                loss.step()
            else:
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
            values.append(value.item())
        return values

    loss, optimizer = build(14 if load else 11)
    named = {"loss": loss} if optimizer is None else {"loss": loss, "optimizer": optimizer}
    if load:
        load_checkpoint(path, **named)
    else:
        train(loss, optimizer, 0)
        loss.remap(class_mapping(11, merge=[(1, 7), (2, 9)], drop=[4]))
        loss.expand(6)
        train(loss, optimizer, 3)
        save_checkpoint(path, **named)
    losses = train(loss, optimizer, 6)
    loss.expand(2)
    return losses, full(next(loss.parameters()))


@pytest.mark.parametrize("kind", ["head", "center"])
def test_checkpoints_of_changed_classes_are_read_at_any_world_size(ranks, tmp_path, kind):
    path = str(tmp_path / "checkpoint")
    expected, rows = ranks(2).run(grown, path, kind, False)[0]
    for world in (1, 3, 4):
        for losses, found in ranks(world).run(grown, path, kind, True):
            assert losses == pytest.approx(expected, rel=1e-12)
            near(found, rows)
            assert torch.equal(found[14:], rows[14:])


def test_states_from_before_classes_could_change_are_read():
    head, center = PartialFC(D, 4), CenterLoss(D, 4)
    state = {**head.state_dict(), "_extra_state": torch.tensor(5)}
    head.load_state_dict(state)
    extra = head.get_extra_state()
    assert (extra["step"], extra["class_changes"], extra["skips"]) == (5, 0, 0)
    center.expand(1)
    other = CenterLoss(D, 5)
    other.load_state_dict(center.state_dict())
    assert (other.get_extra_state()["class_changes"], other.get_extra_state()["skips"]) == (1, 0)
    other.load_state_dict({"centers": center.centers.detach()})
    assert (other.get_extra_state()["class_changes"], other.get_extra_state()["skips"]) == (0, 0)


# ---------------------------------------------------------------------------------------------------- what can be wrong


def test_class_mapping():
    assert class_mapping(10, merge=[(5, 9), (1, 7, 8)], drop=[0]).tolist() == [-1, 0, 1, 2, 3, 4, 5, 0, 0, 4]
    assert class_mapping(4, merge=[(3, 0)]).tolist() == [2, 0, 1, 2]
    assert class_mapping(3).tolist() == [0, 1, 2] and class_mapping(3).dtype == torch.int64
    assert class_mapping(3, drop=torch.tensor([1])).tolist() == [0, -1, 1]
    for options, text in (
        ({"merge": [(0, 3)]}, "class 3 in merge or drop is out of range; valid are 0 to 2"),
        ({"drop": [-1]}, "class -1 in merge or drop is out of range"),
        ({"merge": [(0, 1)], "drop": [1]}, "class 1 is named twice"),
        ({"merge": [(0, 1), (1, 2)]}, "class 1 is named twice"),
        ({"merge": [()]}, "an empty group"),
        ({"drop": [0, 1, 2]}, "all 3 classes are dropped"),
    ):
        assert text in message_of(class_mapping, 3, **options)
    assert "at least 1, not 0" in message_of(class_mapping, 0)


GOOD = [0, 1, 2, -1]
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gap": ([0, 1, 3, 3], {}, "no new id 2, but has 3.*partial_fc.class_mapping"),
    "far": ([0, 1, 10**15, 2], {}, "no new id 3"),
    "negative": ([0, -2, 1, 2], {}, r"mapping\[1\] is -2"),
    "all": ([-1] * 4, {}, "drops all 4 classes"),
    "length": ([0, 1, 2], {}, r"for each of 4 classes, not \[3\]"),
    "floats": ([0.0, 1, 2, 3], {}, "not .* torch.float32"),
    "dict": ({0: 0, 2: 1, 3: 2}, {}, "1 is missing"),
    "dict of more": ({i: i for i in range(5)}, {}, "5 entries"),
    "merge": (GOOD, {"merge": "sum"}, "merge must be one of mean, first, not 'sum'"),
    "weights": (GOOD, {"weights": torch.ones(3)}, r"for each of 4 classes, not \[3\]"),
    "bad weight": (GOOD, {"weights": torch.tensor([1, 1, math.nan, 1])}, r"weights\[2\] is nan"),
    "weights of first": (GOOD, {"merge": "first", "weights": torch.ones(4)}, "takes the lowest old id"),
    "no weight": ([0, 1, 0, 1], {"weights": torch.tensor([1, 0, 1, 0])}, r"weights of the merged classes \[1, 3\]"),
    "optimizer": (
        GOOD,
        {"optimizers": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])},
        "SGD that does not hold the parameters",
    ),
    "no optimizer": (GOOD, {"optimizers": ["sgd"]}, "TypeError: .*optimizers must be torch optimizers, not str"),
    "margin": (GOOD, {"margin": ArcFace()}, "this head keeps its ArcFace"),
}


def wrong(rank: int, world: int, only_last: bool) -> dict[str, str]:
    """The message of each mistake, of all ranks or of the last one alone; nothing has changed, and then a right call
    works."""
    head = PartialFC(D, 4, ArcFace())
    before, texts = full(head.weight), {}
    for name, (mapping, options, _) in WRONG.items():
        mistaken = not only_last or rank == world - 1
        texts[name] = message_of(head.remap, mapping if mistaken else GOOD, **(options if mistaken else {}))
    for name, arguments in (("count", (0,)), ("fraction", (1.5,)), ("init", (1, "zeros")), ("no init", (1, 3))):
        texts[name] = message_of(head.expand, *arguments)
    other = PartialFC(D, 4)
    texts["another's"] = message_of(head.expand, 1, optimizers=RowOptimizer(torch.optim.SGD, other, lr=0.1))
    sub = PartialFC(D, 4, SubCenterArcFace(centers=2))
    texts["centers"] = message_of(sub.remap, [0, 0, 1, 2])
    sub.remap([0, 0, 1, 2], merge="first")
    assert head.num_classes == 4 and torch.equal(full(head.weight), before) and head.class_changes == 0
    head.remap(GOOD)
    assert head.weight.shape == (3, D)
    return texts


@pytest.mark.parametrize(("world", "only_last"), [(1, False), (3, False), (3, True)])
def test_mistakes_are_named_on_every_rank(ranks, world, only_last):
    results = ranks(world).run(wrong, only_last)
    assert all(texts == results[0] for texts in results)
    texts = results[0]
    for name, (_, _, expected) in WRONG.items():
        assert re.search(expected, texts[name]), f"{name}: {texts[name]}"
        assert ("rank 2: " in texts[name]) == only_last
    assert "at least 1, not 0" in texts["count"] and "at least 1, not 1.5" in texts["fraction"]
    assert "not 'zeros'" in texts["init"] and "not int" in texts["no init"]
    assert "RowOptimizer that does not hold" in texts["another's"]
    assert "no common order" in texts["centers"]


def disagree(rank: int, world: int) -> list[str]:
    head = PartialFC(D, 4, ArcFace())
    calls: list[Any] = [
        lambda: head.remap([0, 1, 2, -1] if rank < 2 else [0, 1, -1, 2]),
        lambda: head.remap([0, 0, 1, 2], weights=torch.tensor([1, 1 + rank, 1, 1])),
        lambda: head.remap([0, 0, 1, 2], merge="mean" if rank < 2 else "first"),
        lambda: head.expand(1 + rank),
        lambda: head.expand(1, torch.ones(1, D) * (1 + rank)),
    ]
    return [message_of(call) for call in calls]


def test_what_differs_between_ranks_raises_on_all(ranks):
    results = ranks(3).run(disagree)
    assert all(texts == results[0] for texts in results)
    what = ["mapping", "weights", "merge", "new_classes", "init"]
    there = [2, 1, 2, 1, 1]
    for text, name, rank in zip(results[0], what, there, strict=True):
        assert text.startswith(f"ValueError: ranks disagree: {name} differs between rank 0 and rank {rank};"), text


def pending(rank: int, world: int) -> list[str]:
    x, labels = batch(0, 4)
    texts = []
    for rate in (0.5, 1.0):
        head = PartialFC(D, 4, Softmax(), rate, dtype=torch.float64)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        head(x, labels).backward()
        texts.append(message_of(head.expand, 1))
        optimizer.step()
        texts.append(message_of(head.remap, [0, 1, 2, -1]))
        optimizer.zero_grad()
        head.expand(1)
    head = PartialFC(D, 4, Softmax(), dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, update_in_backward=True)
    head(x, labels).backward()
    texts.append(message_of(head.expand, 1))
    optimizer.step()
    head.expand(1)
    head(x, labels).backward()
    center = CenterLoss(D, 4, dtype=torch.float64)
    center(x, labels)
    texts.append(message_of(center.expand, 1))
    center.step()
    center.expand(1)
    return texts


def test_pending_gradients_are_refused(ranks):
    alone = pending(0, 1)
    assert all(text.startswith("RuntimeError: ") and "step()" in text for text in alone), alone
    assert all("zero_grad() of the optimizer first" in text for text in alone[:4])
    assert "update_in_backward" in alone[4] and "noted moves of the centers" in alone[5]
    assert ranks(2).run(pending) == [alone] * 2


@pytest.mark.parametrize("margin", [ArcFace(), Softmax(), CurricularFace(), SphereFace2()])
def test_a_loss_that_is_not_freed_is_told_of(margin):
    head = PartialFC(D, 4, margin)
    x, labels = batch(0, 4)
    loss = head(x.float(), labels)
    text = message_of(head.expand, 1)
    assert "weight is still held by the autograd graph of a loss" in text
    loss.backward()
    head.zero_grad()
    head.expand(1)  # the loss is still there, but its graph is gone
    assert loss.isfinite()
    head(x.float(), labels).backward()


def test_optimizers_that_cannot_follow_are_refused():
    head = PartialFC(D, 4)
    optimizer = torch.optim.Adafactor(head.parameters(), lr=0.1)
    x, labels = batch(0, 4)
    head(x.float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    text = message_of(head.expand, 1, optimizers=[optimizer])
    assert "Adafactor holds" in text and "build the optimizer anew" in text
    head.expand(1)


def on_meta(rank: int, world: int) -> None:
    head = PartialFC(D, 4).to("meta")
    assert "on the meta device" in message_of(head.expand, 1)


def test_a_head_without_rows_is_refused(ranks):
    ranks(2).run(on_meta)


def bad_batches(rank: int, world: int) -> list[tuple[str, bool]]:
    found = []
    good = torch.randn(2, D), torch.tensor([4, 5])
    for kind in ("old label", "beyond", "nan", "width", "raises"):
        head = PartialFC(D, 4)
        before = full(head.weight)
        x, labels = good[0].clone(), good[1].clone()
        if rank == 1:
            if kind == "old label":
                labels[1] = 3
            if kind == "beyond":
                labels[0] = 6
            if kind == "nan":
                x[1, 0] = math.nan
            if kind == "width":
                x = torch.randn(2, D + 1)

        def batches(x: Tensor = x, labels: Tensor = labels, kind: str = kind) -> Any:
            yield good
            if kind == "raises" and rank == 1:
                raise ValueError("no such file")
            yield x, labels

        found.append(
            (message_of(head.expand, 2, batches()), head.num_classes == 4 and torch.equal(full(head.weight), before))
        )
    return found


def test_a_bad_batch_of_new_classes_changes_nothing(ranks):
    results = ranks(2).run(bad_batches)
    assert results[0][:-1] == results[1][:-1]
    texts = [text for text, unchanged in results[0] if unchanged]
    assert "rank 1: labels[1] is 3; valid are 4 to 5" in texts[0]
    assert "rank 1: labels[0] is 6" in texts[1]
    assert "rank 1: embeddings[1] (label 5) holds a NaN" in texts[2]
    assert "width" in texts[3]
    assert texts[4] == "RuntimeError: rank 1 failed to read its batches; see the error on that rank"
    assert results[1][4] == ("ValueError: no such file", True)


# ---------------------------------------------------------------------------------------------------- memory


def largest_allocations(rank: int, world: int) -> int:
    """The most elements of a tensor that a change makes, the new shards left out; rows are moved in blocks."""
    head = PartialFC(64, 20_000)
    optimizer = RowOptimizer(torch.optim.Adam, head, lr=0.1)
    head(torch.randn(2, 64), torch.tensor([1, 2])).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_fc.classes.moves, "BLOCK_BYTES", 500 * 64 * 4)
        with Allocations() as made:
            head.remap(class_mapping(20_000, merge=[(k, k + 10_000) for k in range(5_000)], drop=range(6_000, 7_000)))
            head.expand(300)
    shards = {math.ceil(n / world) * 64 for n in (20_000, 14_000, 14_300)}
    short = {(n - (world - 1) * math.ceil(n / world)) * 64 for n in (20_000, 14_000, 14_300)}
    return max(n for n in made.made if n not in shards | short)


def test_nothing_of_the_size_of_a_shard_is_made_but_the_new_one(ranks):
    for world in (1, 2):
        # shares and numbers by class are a number a class; a block of rows and one of draws are all else
        assert all(largest <= max(20_000, 1024 * 64) for largest in ranks(world).run(largest_allocations))


def test_classes_are_not_fewer_than_a_block():
    head = PartialFC(D, 12, sample_rate=0.5, sample_block=8)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="sample_block is a number of classes, at most 5, not 8"):
        head.remap(torch.arange(12) % 5)
    assert torch.equal(head.weight, before)
