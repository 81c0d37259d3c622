"""A head and a dense float64 process side by side: the same training steps on both, compared at every step.

    Case ── on every rank: check_case(rank, world, case) ── AssertionError where a number is off by more than 1e-9

Compared in each step: the loss, the gradients of embeddings, class rows, bias and offset, the selected rows after the
optimizer's step, the margin's state. Rows that were not selected move on as under the dense optimizer and are compared
at the end; under AdamW they stand still, and must keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from dense_losses import Loss, share_of, taken_of, unit
from dense_optimizers import DenseAdamW, DenseSGD
from near import assert_near
from shards import classes_of, local, positions, row_gradient, samples_of, selected_by_all, whole
from torch import Tensor

import partial_fc
from partial_fc import PartialFC, RowOptimizer, gather, margins

D = 8
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Callable[[], Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, lambda: DenseSGD(0.05)),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}, lambda: DenseAdamW(0.02)),
}


@dataclass
class Case:
    margin: str = "ArcFace"
    settings: dict[str, Any] = field(default_factory=dict)  # of the margin
    classes: int = 23
    counts: tuple[int, ...] = (5, 3, 0, 4)  # samples of each rank; a world takes the first ones
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    early: bool = False  # update_in_backward
    budget: int | None = None
    smoothing: float = 0.0
    reduction: str = "mean"
    beyond: float | None = None  # interclass_filter
    nearest: int = 0  # inter_topk
    penalty: float = 0.1  # inter_topk_penalty
    correction: str = "none"  # sampling_correction
    class_weights: bool = False
    ignored: int = 1
    joint: bool = False
    steps: int = 4


@contextmanager
def small_tiles() -> Iterator[None]:
    """Logits that are not kept are computed in tiles of 64 rows."""
    sizes = partial_fc.softmax.tiles.TILE_BYTES
    before, sizes["cpu"] = sizes["cpu"], 1
    try:
        yield
    finally:
        sizes["cpu"] = before


def global_batch(case: Case, world: int, step: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of all ranks."""
    generator = torch.Generator().manual_seed(50 + step)
    n = sum(case.counts[:world])
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, case.classes, (n,), generator=generator)
    labels[torch.randperm(n, generator=generator)[: case.ignored]] = -100
    return x, labels


def check_cases(rank: int, world: int, cases: list[Any], check: Callable[[int, int, Any], None] | None = None) -> None:
    """Every case, in small tiles; an error says which case it is."""
    for case in cases:
        try:
            with small_tiles():
                (check or check_case)(rank, world, case)
        except Exception as error:
            raise AssertionError(f"{case} at world {world}: {type(error).__name__} {error}") from error


def check_case(rank: int, world: int, case: Case) -> None:
    margin = getattr(margins, case.margin)(**case.settings)
    weights = None
    if case.class_weights:
        weights = torch.rand(case.classes, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    head = PartialFC(
        D, case.classes, margin, case.sample_rate, dtype=torch.float64, logits_budget=case.budget, reduction=case.reduction,  # type: ignore[arg-type]
        label_smoothing=case.smoothing, interclass_filter=case.beyond, class_weights=weights,
        sampling_correction=case.correction,  # type: ignore[arg-type]
        inter_topk=case.nearest, inter_topk_penalty=case.penalty,
    )  # fmt: skip
    loss_of = Loss(
        case.margin, case.settings, case.smoothing, case.reduction, case.beyond, weights,
        nearest=case.nearest, nearer_by=case.penalty,
    )  # fmt: skip
    cls, options, dense_optimizer = KINDS[case.optimizer]
    # AdamW over all rows is met to 1e-6 only (tests/optim/test_skipped_rows.py)
    still = case.optimizer == "adamw"
    skipped: Any = "still" if still else "dense"
    optimizer = RowOptimizer(cls, head, update_in_backward=case.early, skipped_rows=skipped, **options)

    shape = (case.classes, D) if margin.centers == 1 else (case.classes, margin.centers, D)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mine, here = classes_of(case.classes, rank, world), samples_of(case.counts, rank)
    with torch.no_grad():
        local(head.weight).copy_(w[mine])
    # what is trained: the rows; a bias, by class; an offset, the same on all ranks
    dense = {"weight": w}
    if head.bias is not None:
        dense["bias"] = torch.zeros(case.classes, dtype=torch.float64)
    if margin.binary:
        dense["offset"] = local(margin.offset).detach().clone()
    rules = {name: dense_optimizer() for name in dense}
    for step in range(case.steps):
        x_all, labels = global_batch(case, world, step)
        x = x_all[here].clone().requires_grad_()
        kept = x.detach().clone(), labels[here].clone()
        drawn = random_margins(head, x_all, w, labels) if case.margin == "ElasticFace" else None
        loss = head(gather(x, labels[here])) if case.joint else head(x, labels[here])
        (loss.sum() * (rank + 1) if case.reduction == "none" else loss).backward()
        assert case.budget is None or head.logits_mode == "tiled" or not len(head.selected)
        assert torch.equal(x, kept[0]) and torch.equal(labels[here], kept[1]), "a caller's tensor was modified"

        chosen = selected_by_all(head)
        x_all.requires_grad_()
        leaves = {n: (v if n == "offset" else v[chosen]).clone().requires_grad_() for n, v in dense.items()}
        expected = loss_of(
            x_all, leaves["weight"], positions(labels, chosen, case.classes), chosen, drawn=drawn,
            bias=leaves.get("bias"), offset=leaves.get("offset"),
            taken=taken_of(chosen, labels, case.classes, case.sample_rate) if case.correction == "importance" else None,
        )  # fmt: skip
        if case.reduction == "none":  # each rank's scalar counts as averaged over the ranks
            factor = torch.repeat_interleave(torch.arange(1, world + 1), torch.tensor(case.counts[:world]))
            (expected * factor).sum().div(world).backward()
            expected = expected[here]
        else:
            expected.backward()
        assert_near(f"loss of step {step}", loss, expected)
        assert x_all.grad is not None
        assert_near("embedding gradient", x.grad, x_all.grad[here] * world)
        grads = {name: torch.zeros_like(value) for name, value in dense.items()}
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                grads[name][torch.tensor([0]) if name == "offset" else chosen] = leaf.grad
        check_gradients(head, case, grads, mine)

        before = local(head.weight).detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert head.weight.grad is None and head.row_grad is None
        for name, rule in rules.items():
            moved = chosen if still else torch.arange(len(dense[name]))
            rule.step(dense[name], grads[name], torch.tensor([0]) if name == "offset" else moved)
        if step == case.steps - 1:
            optimizer.catch_up()
        seen = torch.arange(mine.start, mine.stop) if still or step == case.steps - 1 else head.selected
        check_rows(f"after step {step}", head, dense, seen)
        for name, value in margin.named_buffers():
            assert value.ndim or abs(float(value) - loss_of.state[name]) <= 1e-9, name
        selected = set(chosen.tolist())
        untouched = torch.tensor([c for c in range(mine.start, mine.stop) if c not in selected], dtype=torch.int64)
        at = untouched - mine.start
        assert not still or torch.equal(local(head.weight)[at], before[at]), "a row that was not selected moved"


def check_soft_labels(
    what: str,
    head: PartialFC,
    reference: Loss,
    x_all: Tensor,
    labels: Tensor,
    weights: Tensor,
    here: slice,
    corrected_at: float | None = None,
) -> None:
    """The loss and the gradients of one forward with several labels a sample, in small tiles. corrected_at: the rate of
    a head with a corrected denominator."""
    world, classes = head.shards.ranks.world, head.num_classes
    x = x_all[here].clone().requires_grad_()
    with small_tiles():
        loss = head(gather(x, labels[here], label_weights=weights[here]))
        loss.backward()
    chosen = selected_by_all(head)
    x_all.requires_grad_()
    w = whole(head.weight).clone().requires_grad_()
    expected = reference(
        x_all, w[chosen], share_of(labels, classes, weights)[0][:, chosen], chosen,
        offset=whole(head.margin.offset) if head.margin.binary else None,
        taken=None if corrected_at is None else taken_of(chosen, labels, classes, corrected_at),
    )  # fmt: skip
    expected.backward()
    assert_near(f"{what}: loss", loss, expected)
    assert x_all.grad is not None and w.grad is not None
    assert_near(f"{what}: embedding gradient", x.grad, x_all.grad[here] * world)
    assert_near(f"{what}: class gradient", row_gradient(head), w.grad[head.selected])


def check_gradients(head: PartialFC, case: Case, grads: dict[str, Tensor], mine: slice) -> None:
    if "offset" in grads:
        assert_near("gradient of the offset", local(head.margin.offset.grad), grads["offset"])  # type: ignore[union-attr]
    if case.early:
        assert head.weight.grad is None and head.row_grad is None
    elif case.sample_rate == 1:
        assert head.row_grad is None and head.weight.grad is not None
        assert_near("class gradient", local(head.weight.grad), grads["weight"][mine])
        if head.bias is not None:
            assert head.bias.grad is not None
            assert_near("bias gradient", local(head.bias.grad), grads["bias"][mine])
    else:
        assert head.row_grad is not None and head.weight.grad is None
        ids, values = head.row_grad
        assert torch.equal(ids, head.selected)
        assert_near("row gradient", values, grads["weight"][ids])


def check_rows(when: str, head: PartialFC, dense: dict[str, Tensor], ids: Tensor) -> None:
    """ids: classes of this rank."""
    at = ids - head.shards.lo
    assert_near(f"weights {when}", local(head.weight)[at], dense["weight"][ids])
    if "bias" in dense:
        assert_near(f"bias {when}", local(head.bias)[at], dense["bias"][ids])
    if "offset" in dense:
        assert head.margin.offset.grad is None  # type: ignore[union-attr]
        assert_near(f"offset {when}", local(head.margin.offset), dense["offset"])


def random_margins(head: PartialFC, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """What ElasticFace draws in the next forward: its draws are its own; what is made of them is compared."""
    target = (unit(x)[0] @ unit(w)[0].T).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    key = partial_fc.sampling.mix(0, head.forward_count)
    positives = margins.Positives(labels, torch.arange(len(x)), x.norm(dim=1), labels >= 0, key)
    assert isinstance(head.margin, margins.ElasticFace)
    return head.margin._margins(target, positives)
