"""Center loss at any world size against one dense float64 process; its state, its errors, its example."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from common import message_of, needs
from dense_centers import DenseCenters, center_losses
from dense_losses import Loss, reduced, share_of
from dense_optimizers import DenseAdamW, DenseSGD
from near import assert_near, near
from shards import classes_of, local, part_of, samples_of, two_by_two, whole
from side_by_side import check_cases
from torch import Tensor, nn
from watching import Allocations, collectives

import partial_fc.batch.status
from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer, gather, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
D = 6
TOLERANCE = 1e-11
SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
Batch = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------ against dense float64


@dataclass
class Case:
    classes: int = 23
    counts: tuple[int, ...] = (5, 3, 0, 4)  # samples of each rank; a world takes the first ones
    update: str = "paper"
    optimizer: str = "sgd"
    reduction: str = "mean"
    joint: bool = False
    each: int = 0  # labels a sample, with weights; 0 for plain labels
    weighted: bool = False  # sample weights, one of them 0
    ignored: int = 1
    micro: int = 1  # batches before a step
    alpha: float = 0.5
    scale_embedding_grad: bool = True
    mesh: bool = False


def global_batch(case: Case, n: int, seed: int) -> Batch:
    """Labels are drawn from few classes, so that most are on several ranks at once."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, min(case.classes, 7), (n, max(1, case.each)), generator=generator) * max(
        1, case.classes // 7
    )
    labels[torch.randperm(n, generator=generator)[: case.ignored]] = -100
    batch = {
        "x": torch.randn(n, D, generator=generator, dtype=torch.float64),
        "labels": labels if case.each else labels[:, 0],
    }
    if case.each:
        weights = torch.rand(n, case.each, generator=generator, dtype=torch.float64) + 0.1
        weights[::3, 0] = 0.0
        labels[1::4, -1] = -100  # the others of the sample stay
        batch["label_weights"] = weights / weights.sum(1, keepdim=True)
    if case.weighted:
        batch["sample_weights"] = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
        batch["sample_weights"][:1] = 0.0
    return batch


def dense_loss(case: Case, batch: Batch, x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """(the reduced loss, what each class counts for in each sample `[N, C]`)."""
    share, some = share_of(batch["labels"], case.classes, batch.get("label_weights"))
    worth = some * batch.get("sample_weights", torch.ones(len(x), dtype=torch.float64))
    return reduced(center_losses(x, centers, share), worth, case.reduction)[0], share * worth[:, None]


def check_case(rank: int, world: int, case: Case) -> None:
    group = two_by_two() if case.mesh else None
    center = CenterLoss(
        D, case.classes, alpha=case.alpha, update=case.update, reduction=case.reduction,  # type: ignore[arg-type]
        scale_embedding_grad=case.scale_embedding_grad, group=group, dtype=torch.float64,
    )  # fmt: skip
    c = torch.randn(case.classes, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mine = classes_of(case.classes, rank % 2, 2) if case.mesh else classes_of(case.classes, rank, world)
    with torch.no_grad():
        local(center.centers).copy_(c[mine])
    paper = DenseCenters(case.alpha)
    cls: Any = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
    options = SGD if case.optimizer == "sgd" else {"lr": 0.1, "weight_decay": 0.01}
    skipped: Any = "dense" if case.optimizer == "sgd" else "still"
    optimizer = RowOptimizer(cls, center, skipped_rows=skipped, **options) if case.update == "gradient" else None
    dense: Any = DenseSGD(0.02, 0.9, 0.01) if case.optimizer == "sgd" else DenseAdamW(0.1)
    here, n = samples_of(case.counts, rank), sum(case.counts[:world])
    for step in range(3):
        grad, touched = torch.zeros_like(c), torch.zeros(case.classes, dtype=torch.bool)
        for micro in range(case.micro):
            batch = global_batch(case, n, 50 + 10 * step + micro)
            own = {k: v[here].clone() for k, v in batch.items()}
            kept = {k: v.clone() for k, v in own.items()}
            x = own.pop("x").requires_grad_()
            labels = own.pop("labels")
            loss = center(gather(x, labels, group=group, **own)) if case.joint else center(x, labels)
            x_all, c_all = batch["x"].clone().requires_grad_(), c.clone().requires_grad_()
            expected, weights = dense_loss(case, batch, x_all, c_all)
            assert_near("loss", loss, expected[here] if case.reduction == "none" else expected, TOLERANCE)
            if case.reduction == "none":  # each rank's scalar counts as averaged over the ranks
                (3 * loss.sum() * (rank + 1)).backward()
                factor = torch.repeat_interleave(torch.arange(1, world + 1), torch.tensor(case.counts[:world]))
                expected = (expected * factor).sum() / world
            else:
                (3 * loss).backward()  # a loss weight or a scaler
            (3 * expected + 0 * (x_all.sum() + c_all.sum())).backward()
            assert torch.equal(x, kept["x"]) and torch.equal(labels, kept["labels"]), "a caller's tensor was modified"
            assert x_all.grad is not None and c_all.grad is not None
            factor = world if case.scale_embedding_grad else 1
            assert_near("embedding gradient", x.grad, x_all.grad[here] * factor, TOLERANCE)
            paper.note(batch["x"], c, weights)
            grad += c_all.grad
            touched |= (weights != 0).any(0)
        assert torch.equal(local(center.centers), c[mine]) or step, "centers moved before step()"
        if optimizer is None:
            center.step()
            paper.step(c)
            still = local(center.centers).clone()
            center.step()
            assert torch.equal(local(center.centers), still), "a step with nothing new moved centers"
        else:
            seen = center.class_rows.grad_rows
            assert seen is not None and torch.equal(seen, touched[mine].nonzero()[:, 0])
            optimizer.step()
            optimizer.zero_grad()
            optimizer.catch_up()
            dense.step(c, grad, touched.nonzero()[:, 0] if skipped == "still" else torch.arange(len(c)))
        assert_near(f"centers after step {step}", local(center.centers), c[mine], TOLERANCE)


REDUCTIONS = [
    Case(update=update, reduction=reduction, joint=joint)
    for update in ("paper", "gradient")
    for reduction in ("mean", "sum", "none")
    for joint in (False, True)
]
SHAPES = [
    Case(**{"update": update, **shape})
    for update in ("paper", "gradient")
    for shape in (
        {"classes": 1},
        {"classes": 3, "counts": (2, 3, 4, 1)},
        {"classes": 3, "counts": (1, 0, 0, 2), "ignored": 0},
        {"counts": (0, 0, 0, 0), "ignored": 0},
        {"counts": (3, 0, 0, 0), "ignored": 3},
        {"counts": (1, 1, 1, 1), "ignored": 0, "classes": 1},
        {"counts": (0, 6, 2, 3), "joint": True},
        {"classes": 1024 + 37, "counts": (4, 4, 4, 4)},
        {"scale_embedding_grad": False},
    )
]
WEIGHTS: list[dict[str, Any]] = [
    {"joint": True, "each": 2},
    {"joint": True, "weighted": True},
    {"joint": True, "each": 3, "weighted": True, "ignored": 2},
    {"joint": True, "each": 2, "weighted": True, "reduction": "none"},
    {"joint": True, "each": 2, "reduction": "sum", "classes": 3},
    # so few samples that a class is named with weight 0 alone: it is not touched, in no replica
    {"joint": True, "each": 2, "counts": (1, 1, 1, 1), "ignored": 0},
    {"joint": True, "weighted": True, "counts": (1, 0, 1, 1), "ignored": 0},
]
SOFT = [Case(**{"update": update, **weights}) for update in ("paper", "gradient") for weights in WEIGHTS]
STEPS = [
    Case(micro=3),
    Case(micro=2, alpha=1.0, classes=3, counts=(0, 1, 5, 0)),
    Case(micro=3, joint=True, each=2, weighted=True, alpha=0.05),
    Case(micro=3, update="gradient"),
    Case(micro=2, update="gradient", optimizer="adamw"),
    Case(update="gradient", optimizer="adamw", joint=True, each=2, weighted=True),
]
GROUPS = {"reductions": REDUCTIONS, "shapes": SHAPES, "soft": SOFT, "steps": STEPS}


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3, 4))])
@pytest.mark.parametrize("name", GROUPS)
def test_equals_dense_float64(ranks, world, name):
    ranks(world).run(check_cases, GROUPS[name], check_case, timeout=150)


@pytest.mark.parametrize("name", GROUPS)
def test_equals_dense_float64_without_a_group(name):
    check_cases(0, 1, GROUPS[name], check_case)


@pytest.mark.parametrize(
    "name", ["steps", *(pytest.param(name, marks=pytest.mark.slow) for name in GROUPS if name != "steps")]
)
def test_replicas_of_shards_equal_dense_float64(ranks, name):
    ranks(4).run(check_cases, [dataclasses.replace(case, mesh=True) for case in GROUPS[name]], check_case, timeout=150)


# ---------------------------------------------------------------------------------------------------- beside a head


def joined_with_a_head(rank: int, world: int, mesh: bool) -> None:
    """head(batch) + 0.1 · center(batch): gradients of embeddings, class weights and centers of the one dense
    objective."""
    group = two_by_two() if mesh else None
    head = PartialFC(D, 11, ArcFace(scale=8.0), group=group, dtype=torch.float64, init_std=1.0)
    paper = CenterLoss(D, 11, group=group, dtype=torch.float64, init_std=1.0, seed=1)
    trained = CenterLoss(D, 11, update="gradient", group=group, dtype=torch.float64, init_std=1.0, seed=2)
    RowOptimizer(torch.optim.SGD, trained, lr=1.0)
    w, c, t = (whole(p).clone().requires_grad_() for p in (head.weight, paper.centers, trained.centers))
    counts = (3, 0, 2, 4)[:world]
    generator = torch.Generator().manual_seed(3)
    x_all = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 11, (sum(counts),), generator=generator)
    here = samples_of(counts, rank)
    x = x_all.detach()[here].clone().requires_grad_()
    batch = gather(x, labels[here], group=group)
    loss = head(batch) + 0.1 * paper(batch) + 0.3 * trained(batch)
    loss.backward()
    share = share_of(labels, 11)[0]
    by_center = [center_losses(x_all, each, share).mean() for each in (c, t)]
    expected = Loss("ArcFace", {"scale": 8.0})(x_all, w, labels) + 0.1 * by_center[0] + 0.3 * by_center[1]
    expected.backward()
    assert x_all.grad is not None and w.grad is not None and t.grad is not None
    lo, hi = head.shards.lo, head.shards.hi
    near([loss.detach(), x.grad], [expected.detach(), x_all.grad[here] * world], TOLERANCE)
    near(local(head.weight.grad), w.grad[lo:hi], TOLERANCE)
    assert trained.class_rows.grad_rows is not None
    near(trained.class_rows.gradients()[0], t.grad[trained.class_rows.grad_rows + trained.shards.lo], TOLERANCE)


def test_a_head_and_centers_share_one_gather(ranks):
    joined_with_a_head(0, 1, False)
    for world, mesh in ((1, False), (2, False), (3, False), (4, True)):
        ranks(world).run(joined_with_a_head, mesh)


def collectives_of_a_step(rank: int, world: int, update: str, joint: bool) -> list[tuple[str, int]]:
    head, center = PartialFC(D, 1000), CenterLoss(D, 1000, update=update)  # type: ignore[arg-type]
    optimizer = RowOptimizer(torch.optim.SGD, center, lr=0.1) if update == "gradient" else center
    x, labels = torch.randn(8, D, requires_grad=True), torch.arange(8)
    with collectives() as calls:
        batch = gather(x, labels) if joint else None
        (center(x, labels) if batch is None else head(batch) + 0.1 * center(batch)).backward()
        optimizer.step()
    return calls


@pytest.mark.parametrize("update", ["paper", "gradient"])
@pytest.mark.parametrize("joint", [False, True])
def test_centers_cost_a_head_one_number_over_the_network(ranks, update, joint):
    for calls in ranks(2).run(collectives_of_a_step, update, joint):
        status = len(partial_fc.batch.status.Status._fields) * 8
        assert calls[:2] == [("all_gather", status), ("all_gather", 8 * D * 4 + 8 * 8)]
        # of each loss of a gathered batch: what all ranks must have alike, then its numbers
        statistics = [status, 3 * 16 * 4, status, 4] if joint else [4]
        assert calls[2:-1] == [*(("all_gather", size) for size in statistics), ("reduce_scatter", 16 * D * 4)]
        assert calls[-1][0] == "all_reduce", "two flags, since nobody has judged the step before"


def largest_allocation(rank: int, world: int, update: str) -> int:
    """The largest tensor that a step after the first one makes, in elements."""
    center = CenterLoss(D, 20_000, update=update)  # type: ignore[arg-type]
    optimizer = RowOptimizer(torch.optim.SGD, center, **SGD) if update == "gradient" else center
    for step in range(2):  # the first step allocates the optimizer's state
        x = torch.randn(16, D, requires_grad=True)
        with Allocations() as made:
            center(x, torch.arange(16) + step).backward()
            optimizer.step()
            center.zero_grad()
    return made.elements


@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_nothing_of_the_size_of_the_shard_is_made(ranks, update):
    for largest in ranks(2).run(largest_allocation, update):
        assert 0 < largest <= 2_000  # the exchanged bytes; the shard has 60,000 numbers


def test_bf16_under_autocast_stays_near_float64():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(32, 64, generator=generator).bfloat16(), torch.randint(0, 9, (32,), generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        center = CenterLoss(64, 9, dtype=dtype, init_std=1.0)
        leaf = x.to(torch.bfloat16 if dtype == torch.float32 else torch.float64).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = center(leaf, labels)
        loss.backward()
        center.step()
        assert (
            loss.dtype == dtype
            and center.centers.dtype == dtype
            and leaf.grad is not None
            and leaf.grad.dtype == leaf.dtype
        )
        results.append((loss.detach().double(), center.centers.detach().double(), leaf.grad.double()))
    for mine, exact, tolerance in zip(*results, (1e-6, 1e-6, 4e-3), strict=True):
        assert (mine - exact).norm() <= tolerance * exact.norm()


# ---------------------------------------------------------------------------------------------------- when centers stay


def test_the_paper_update_is_the_worked_example():
    """Two samples of class 1 and one of class 0, by hand."""
    center = CenterLoss(2, 3, alpha=0.5, init_std=0.0)
    loss = center(torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]]), torch.tensor([1, 1, 0]))
    assert loss.item() == pytest.approx((9 + 9 + 8) / 6)
    center.step()
    assert center.centers.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    assert not center.centers.requires_grad


@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_evaluation_moves_nothing(update):
    center = CenterLoss(D, 5, update=update)
    optimizer = RowOptimizer(torch.optim.SGD, center, lr=1.0) if update == "gradient" else center
    before = center.centers.detach().clone()
    x, labels = torch.randn(4, D, requires_grad=True), torch.arange(4)
    center.eval()
    loss = center(x, labels)
    loss.backward()
    assert x.grad is not None and x.grad.any()
    with pytest.raises(RuntimeError, match=r"in eval\(\) was trained"):  # tests/core/test_not_steps.py
        optimizer.step()
    assert torch.equal(center.centers, before)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(center.centers, before)
    center.train()
    assert center(x, labels).item() == loss.item()
    center.eval()
    center(x, labels)
    if update == "paper":
        optimizer.step()
        assert not torch.equal(center.centers, before), "an evaluation in between forgot the training forward"


def skip_a_batch(rank: int, world: int, update: str) -> None:
    """A bad micro-batch leaves the whole step out, with what the good one has noted; the next step moves as if nothing
    had been."""
    center, other = (CenterLoss(D, 10, update=update, on_nonfinite="skip") for _ in range(2))  # type: ignore[arg-type]
    optimizers = [RowOptimizer(torch.optim.SGD, c, lr=0.1) if update == "gradient" else c for c in (center, other)]
    x, labels = torch.randn(2, D, requires_grad=True), torch.tensor([0, 9])
    bad = x.detach().clone()
    bad[0, 0] = float("nan") if rank == world - 1 else 0.0
    before = local(center.centers).detach().clone()
    loss = center(bad.requires_grad_(), labels)
    loss.backward()
    assert center.skipped and loss.item() == 0 and bad.grad is not None and not bad.grad.any()
    optimizers[0].step()
    center.zero_grad()
    assert torch.equal(local(center.centers), before)
    center(bad, labels).backward()
    center(x, labels).backward()
    assert center.skipped
    optimizers[0].step()
    center.zero_grad()
    assert center.skips == 2 and torch.equal(local(center.centers), before)
    for each, optimizer in zip((center, other), optimizers, strict=True):
        each(x, labels).backward()
        optimizer.step()
    assert torch.equal(local(center.centers), local(other.centers))
    assert not len(before) or not torch.equal(local(center.centers), before)


@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_a_skipped_batch_counts_nothing(ranks, update):
    ranks(2).run(skip_a_batch, update)


def test_a_batch_that_raises_counts_nothing():
    center = CenterLoss(D, 5)
    before = center.centers.detach().clone()
    with pytest.raises(ValueError, match="labels"):
        center(torch.randn(2, D), torch.tensor([0, 5]))
    center.step()
    assert torch.equal(center.centers, before)


def test_clearing_gradients_does_not_clear_what_step_needs():
    """zero_grad between forward and backward is a common order."""
    center, model = CenterLoss(D, 5), nn.Linear(D, D)
    before = center.centers.detach().clone()
    loss = center(model(torch.randn(2, D)), torch.tensor([0, 1]))
    center.zero_grad()
    model.zero_grad()
    loss.backward()
    center.step()
    assert not torch.equal(center.centers[:2], before[:2]) and torch.equal(center.centers[2:], before[2:])


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], not 0.0"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\], not 1.5"),
        ({"alpha": math.nan}, "alpha"),
        ({"update": "adam"}, "update must be one of paper, gradient, not 'adam'"),
        ({"init_std": -1.0}, "init_std"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"reduction": "median"}, "reduction"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CenterLoss(**{"embedding_size": D, "num_classes": 10, **arguments})


def different_settings(rank: int, world: int) -> list[str]:
    last = rank == world - 1
    options: list[dict[str, Any]] = [
        {"seed": rank},
        {"alpha": 0.3 if last else 0.5},
        {"update": "gradient" if last else "paper"},
    ]
    return [message_of(lambda o=o: CenterLoss(D, 10, **o)) for o in options]


def test_settings_that_disagree_raise_on_every_rank(ranks):
    texts = ranks(3).run(different_settings)
    assert texts[0] == texts[1] == texts[2]
    assert "seed is 0 on rank 0 and 1 on rank 1" in texts[0][0]
    assert "alpha is 0.5 on ranks 0 and 1 and 0.3 on rank 2" in texts[0][1]
    assert "update is paper on ranks 0 and 1 and gradient on rank 2" in texts[0][2]


def bad_labels(rank: int, world: int) -> list[Any]:
    center = CenterLoss(D, 10)
    labels = torch.tensor([0, 10 if rank == world - 1 else 9])
    texts = [
        message_of(center, torch.randn(2, D), labels),
        message_of(center, torch.randn(2, D + 1), labels.clamp(max=9)),
    ]
    return [*texts, math.isfinite(center(torch.randn(2, D), labels.clamp(max=9)).item())]


def test_a_bad_label_on_one_rank_raises_the_same_error_on_all(ranks):
    results = ranks(3).run(bad_labels)
    assert results[0] == results[1] == results[2]
    assert "rank 2: labels[1] is 10" in results[0][0] and "width 7" in results[0][1] and results[0][2]


def test_labels_are_needed():
    with pytest.raises(TypeError, match=r"CenterLoss.*needs labels"):
        CenterLoss(D, 10)(torch.randn(2, D))


def test_who_moves_centers_is_said_where_it_goes_wrong():
    x, labels = torch.randn(2, D), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="step\\(\\) of a RowOptimizer"):
        CenterLoss(D, 10, update="gradient").step()
    center = CenterLoss(D, 10)
    optimizer = RowOptimizer(torch.optim.SGD, center, lr=0.1)
    with pytest.raises(RuntimeError, match=r"moved by center\.step"):
        center(x, labels)
    del optimizer
    center(x, labels)
    alone = CenterLoss(D, 10, update="gradient")
    with pytest.raises(RuntimeError, match="no RowOptimizer takes the row gradients of this CenterLoss"):
        for _ in range(2):
            alone(x, labels).backward()
    frozen = CenterLoss(D, 10, update="gradient")
    frozen.centers.requires_grad_(False)
    for _ in range(2):
        frozen(x.requires_grad_(), labels).backward()
    assert x.grad is not None and frozen.class_rows.grad_rows is None


class Model(nn.Module):
    def __init__(self, update: str) -> None:
        super().__init__()
        self.backbone = nn.Linear(D, D)
        self.center = CenterLoss(D, 10, update=update)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.center(self.backbone(x), labels)


def wrap(rank: int, world: int, update: str) -> list[str]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    wrappers = (nn.parallel.DistributedDataParallel, Accelerator(cpu=True).prepare)
    return [
        message_of(lambda w=w: w(Model(update))(torch.randn(2, D), torch.tensor([0, 1])).backward()) for w in wrappers
    ]


@needs("accelerate")
@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_wrapped_centers_raise_instead_of_being_broadcast(ranks, update):
    for texts in ranks(2).run(wrap, update):
        assert all("whose rows are split over the ranks" in text for text in texts), texts


# -------------------------------------------------------------------------------------------------- where centers start


def from_weights(rank: int, world: int) -> None:
    head = PartialFC(D, 7, seed=3, init_std=1.0)
    center = CenterLoss(D, 7, dtype=torch.float64)
    center(torch.ones(1, D), torch.tensor([3]))
    center.init_from_weights(head)
    center.step()
    assert torch.equal(local(center.centers), local(head.weight).double()), "what was noted of other centers was kept"
    texts = [message_of(center.init_from_weights, other) for other in (PartialFC(D, 8), PartialFC(D + 1, 7))]
    assert "[8, 6]" in texts[0] and "[7, 7]" in texts[1] and all("[7, 6]" in text for text in texts)
    if world > 1:
        everyone = torch.distributed.new_group(list(range(world)))
        assert "another group" in message_of(center.init_from_weights, PartialFC(D, 7, group=everyone))


def test_centers_start_from_class_weights(ranks):
    for world in (1, 3):
        ranks(world).run(from_weights)


def from_embeddings(rank: int, world: int, mesh: bool) -> None:
    """Rank r brings r batches, the first rank none."""
    group = two_by_two() if mesh else None
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for r in range(world):
        generator = torch.Generator().manual_seed(r)
        sizes = [3 + k for k in range(r)]
        batches.append(
            [(torch.randn(n, D, generator=generator), torch.randint(0, 9, (n,), generator=generator)) for n in sizes]
        )
    if world > 1:
        batches[1][0][1][0] = -100
    center = CenterLoss(D, 23, group=group, dtype=torch.float64, init_std=1.0)
    expected = whole(center.centers).clone()
    everything = [pair for each in batches for pair in each]
    for j in range(23):
        members = [x for xs, ys in everything for x, y in zip(xs.double(), ys.tolist(), strict=True) if y == j]
        if members:
            expected[j] = sum(members) / len(members)
    center(torch.ones(1, D, dtype=torch.float64), torch.tensor([3]))
    center.init_from_embeddings(iter(batches[rank]))
    center.step()
    near(local(center.centers), expected[center.shards.lo : center.shards.hi], TOLERANCE)
    assert not center.skipped and center.training


def test_centers_start_from_class_means(ranks):
    from_embeddings(0, 1, False)
    for world, mesh in ((1, False), (2, False), (4, False), (4, True)):
        ranks(world).run(from_embeddings, mesh)


def from_bad_embeddings(rank: int, world: int) -> tuple[str, bool]:
    center = CenterLoss(D, 23)
    before = local(center.centers).detach().clone()
    labels = torch.tensor([0, 22])
    second = (torch.randn(2, D), labels + rank)
    text = message_of(center.init_from_embeddings, [(torch.randn(2, D), labels), second])
    return text, torch.equal(local(center.centers), before)


def test_a_bad_batch_leaves_centers_as_they_were(ranks):
    results = ranks(2).run(from_bad_embeddings)
    assert results[0] == results[1]
    assert "rank 1: labels[1] is 23" in results[0][0] and results[0][1]


def test_a_batch_with_nan_is_left_out_of_the_means_if_steps_are_skipped():
    center = CenterLoss(D, 3, on_nonfinite="skip")
    good = torch.randn(2, D)
    bad = torch.full((2, D), math.nan), torch.tensor([0, 1])
    center.init_from_embeddings([bad, (good, torch.tensor([1, 1])), bad])
    torch.testing.assert_close(center.centers[1], good.mean(0))
    assert torch.equal(center.centers[0], CenterLoss(D, 3).centers[0]) and not center.skipped


def start(rank: int, world: int, classes: int) -> Tensor:
    return local(CenterLoss(D, classes, seed=4).centers).detach().clone()


def test_centers_start_the_same_at_every_world_size(ranks):
    for classes in (2, 2500):
        for world in (1, 3):
            assert torch.equal(torch.cat(ranks(world).run(start, classes)), start(0, 1, classes))


# ---------------------------------------------------------------------------------------------------- state


def train(rank: int, world: int, center: CenterLoss, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, labels = (
            torch.randn(12, D, generator=generator, dtype=torch.float64),
            torch.randint(0, 23, (12,), generator=generator),
        )
        part = part_of(12, rank, world)
        loss = center(x[part].requires_grad_(), labels[part])
        loss.backward()
        optimizer.step()
        center.zero_grad()
        losses.append(loss.item())
    return losses


def checkpointed(rank: int, world: int, update: str, read: str, write: str) -> tuple[list[float], Tensor]:
    center = CenterLoss(D, 23, update=update, dtype=torch.float64, init_std=1.0, seed=len(read))  # type: ignore[arg-type]
    optimizer = RowOptimizer(torch.optim.SGD, center, **SGD) if update == "gradient" else center
    named = {"center": center, **({"optimizer": optimizer} if update == "gradient" else {})}
    if read:
        center(torch.ones(1, D, dtype=torch.float64), torch.tensor([5]))  # noted, and forgotten by load
        load_checkpoint(read, **named)
    else:
        train(rank, world, center, optimizer, range(3))
        center(torch.ones(1, D, dtype=torch.float64), torch.tensor([5]))  # noted, but not saved
    save_checkpoint(write, **named)
    assert set(center.state_dict()) == {"centers", "_extra_state"}
    loaded = local(center.centers).detach().clone()
    if not read:
        center._pending = None  # those who read have nothing noted
    return train(rank, world, center, optimizer, range(3, 6)), loaded


@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_checkpoints_are_read_at_another_world_size(ranks, tmp_path, update):
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    first = ranks(2).run(checkpointed, update, "", paths[0])
    others = [ranks(world).run(checkpointed, update, *io) for world, io in ((3, paths[:2]), (1, paths[1:]))]
    for results in others:
        assert torch.equal(torch.cat([c for _, c in results]), torch.cat([c for _, c in first]))
        for losses, _ in results:
            assert losses == pytest.approx(first[0][0], rel=1e-12)


def moves_and_copies(rank: int, world: int) -> None:
    center = CenterLoss(D, 7, alpha=0.25)
    parameter = center.centers
    x, labels = torch.randn(3, D), torch.tensor([0, 3, 6])
    center(x, labels)
    twin = copy.deepcopy(center)
    center.double()
    assert center.centers is parameter and parameter.dtype == torch.float64 and not parameter.requires_grad
    before = local(twin.centers).detach().clone()
    center.step()
    assert torch.equal(local(twin.centers), before), "a copy's centers moved with the original's"
    twin.step()
    torch.testing.assert_close(local(center.centers).float(), local(twin.centers))
    assert not torch.equal(local(twin.centers), before) or not len(before)
    center(x.double(), labels)
    center.to("meta").step()
    assert center.centers.device.type == "meta"
    assert f"classes {center.shards.lo}..{center.shards.hi} of 7, alpha=0.25" in repr(twin)


def test_moves_and_copies_keep_the_shards_and_what_was_noted(ranks):
    ranks(3).run(moves_and_copies)
    assert repr(CenterLoss(D, 7, update="gradient")) == "CenterLoss(embedding_size=6, 7 classes, update='gradient')"


def test_to_empty_and_reset():
    with torch.device("meta"):
        center = CenterLoss(D, 10)
    center.to_empty(device="cpu")
    center.reset_parameters()
    assert torch.equal(center.centers, CenterLoss(D, 10).centers)


@pytest.mark.filterwarnings("default")
def test_compiled_centers_fall_back_without_an_error():
    x, labels = torch.randn(4, D), torch.arange(4)
    centers = [CenterLoss(D, 5) for _ in range(2)]
    assert centers[0](x, labels).item() == torch.compile(centers[1])(x, labels).item()


# ---------------------------------------------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example_learns():
    from forked import finish, fork  # imports the application

    assert len((ROOT / "examples/center_loss.py").read_text().splitlines()) <= 60
    code, out, err = finish(fork("examples/center_loss.py", "2"))
    assert code == 0, err[-3000:]
    (ce, distance), (ce_after, distance_after) = (
        map(float, re.findall(r" (\d+\.\d+)", line)) for line in out.splitlines()
    )
    assert ce_after < min(ce - 0.3, 5.6), out  # chance is 6.9
    assert distance_after < 0.8 * distance, out
