"""A case of the property tests: plain numbers and names that say everything about a few training steps, and the steps
on the ranks.

    Case ── on every rank: run_case(rank, world, case) ──> numbers of each micro-batch and each step, as NumPy arrays
         ── in the test: fuzz_dense.check(case, results) ──> compared with one dense float64 process

A case is made of nothing but its fields, so `repr(case)` is all that is needed to run it again. Ranks compare nothing:
they do the same whatever is found, so that a case that differs costs no restart of processes while it is made smaller.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy
import torch
from common import local
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import partial_fc
from partial_fc import (
    CenterLoss,
    FileRows,
    HostRows,
    MarginSchedule,
    PartialFC,
    RowOptimizer,
    clip_grad_norm_,
    gather,
    margins,
)

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    world: int = 1  # 0: one process without a process group
    replicas: int = 1  # of a 2-D mesh (replicate, shard), where there are more; divides the world size
    classes: int = 5
    width: int = 4
    counts: tuple[int, ...] = (3,)  # samples of each rank
    margin: str = "ArcFace"
    settings: dict[str, Any] = field(default_factory=dict)  # of the margin
    sample_rate: float = 1.0
    weight_dtype: str = "float64"
    embedding_dtype: str = "float64"
    length: float = 1.0  # of embeddings, about
    zero: bool = False  # the first embedding is zero
    budget: int | None = None
    small_tiles: bool = False
    smoothing: float = 0.0
    beyond: float | None = None  # interclass_filter
    corrected: bool = False  # sampling_correction
    nearest: int = 0  # inter_topk
    nearer_by: float = 0.1  # inter_topk_penalty, radians
    hard: int = 0  # hard_negatives
    hard_every: int = 2  # hard_negatives_every
    block: int = 1  # sample_block
    storage: str | None = None  # host | file: HostRows, FileRows
    kernels: bool = False  # in Triton's interpreter
    autocast: bool = False  # the head's forward under autocast to bfloat16
    class_weights: bool = False
    reduction: str = "mean"
    scale_embedding_grad: bool = True
    metrics: bool = False
    validate: str = "always"
    ignore: int = -100
    ignored: float = 0.0  # share of the labels
    pattern: str = "random"  # random | one | few | last
    each: int = 0  # labels a sample with weights; 0: plain labels
    sample_weights: bool = False
    joint: bool = False  # through gather
    frozen: bool = False  # embeddings have no gradient
    optimizer: str = "sgd"  # sgd | adamw | plain (torch's own SGD on the parameters)
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False  # of sgd with momentum
    skipped: str = "still"  # skipped_rows
    rate_falls: bool = False  # the learning rate of a step is 0.6 of that of the step before
    early: bool = False  # update_in_backward
    low: str | None = None  # low_precision
    # (argument, start, end, shape) of a MarginSchedule over the steps
    schedule: tuple[str, float, float, str] | None = None
    change: str | None = None  # expand | remap-mean | remap-first: of the classes, before the second step
    micro: int = 1
    steps: int = 1
    clip: float | None = None
    center: str | None = None  # update= of a CenterLoss beside the head
    seed: int = 0

    @property
    def ranks(self) -> int:
        return max(1, self.world)

    @property
    def gathered(self) -> bool:
        """Whether batches go through `gather`, which alone takes weights."""
        return self.joint or self.each > 0 or self.sample_weights

    @property
    def lr(self) -> float:
        return 0.02 if self.optimizer == "adamw" else 0.3

    def lr_of(self, step: int) -> float:
        return self.lr * (0.6**step if self.rate_falls else 1.0)

    def at(self, step: int) -> Case:
        """The case as it is in a step: classes after a change, arguments of the margin after the schedule."""
        found = self
        if self.schedule is not None:
            argument, start, end, shape = self.schedule
            found = replace(found, settings={**self.settings, argument: scheduled(start, end, shape, step, self.steps)})
        return replace(found, classes=len_after(self)) if self.change and step else found

    def __repr__(self) -> str:
        """What differs from the defaults, which is all that is needed to run it again."""
        given = (f for f in fields(self) if f.name == "world" or getattr(self, f.name) != default_of(f))
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


def default_of(each: Any) -> Any:
    return each.default_factory() if each.name == "settings" else each.default


def scheduled(start: float, end: float, shape: str, step: int, steps: int) -> float:
    """The argument of the margin in a step: after so many steps of a schedule that ends with the last."""
    u = step / steps
    if shape == "step":
        u = 0.5 * (step >= 1) + 0.5 * (step >= 2)
    if shape == "exponential" and u < 1:
        u = 1 - math.exp(u * math.log(1e-3 / (1 + 1e-6)))
    return end if u == 1 else start + (end - start) * u


def mapping_of(case: Case) -> list[int]:
    """The new id of each old class: some are dropped, some merged, all are renumbered."""
    generator = torch.Generator().manual_seed(case.seed + 9)
    groups = torch.randint(0, max(1, case.classes * 3 // 4), (case.classes,), generator=generator)
    groups[torch.rand(case.classes, generator=generator) < 0.15] = -1
    groups[0] = 0  # one class at least
    kept = sorted(set(groups.tolist()) - {-1}, key=lambda group: (group * 7919) % 101)
    return [kept.index(group) if group >= 0 else -1 for group in groups.tolist()]


ADDED = 3  # classes, by "expand"
MOST = 1000  # classes


def len_after(case: Case) -> int:
    """How many classes there are after the change."""
    return case.classes + ADDED if case.change == "expand" else max(mapping_of(case)) + 1


CENTER_LR, CENTER_ALPHA, CENTER_FACTOR = 0.25, 0.5, 0.1


@dataclass
class Batch:
    """Of all ranks, in their order. labels [N] or [N, L]."""

    x: Tensor
    labels: Tensor
    label_weights: Tensor | None
    sample_weights: Tensor | None
    # [N]: what the caller multiplies each sample's loss with, for reduction "none"; else the first one counts
    factors: Tensor

    def of(self, here: slice) -> Batch:
        weights = (None if w is None else w[here] for w in (self.label_weights, self.sample_weights))
        return Batch(self.x[here], self.labels[here], *weights, self.factors[here])


def global_batch(case: Case, step: int, micro: int) -> Batch:
    generator = torch.Generator().manual_seed(case.seed * 1000 + step * 10 + micro)
    n, each = sum(case.counts), max(1, case.each)
    x = torch.randn(n, case.width, generator=generator, dtype=torch.float64) * case.length
    if case.zero and n:
        x[0] = 0.0
    highest = {"random": case.classes, "one": 1, "few": min(3, case.classes), "last": min(2, case.classes)}[
        case.pattern
    ]
    labels = torch.randint(0, highest, (n, each), generator=generator)
    if case.pattern == "last":
        labels = case.classes - 1 - labels
    labels[torch.rand(n, each, generator=generator) < case.ignored] = case.ignore
    label_weights = sample_weights = None
    if case.each:
        label_weights = torch.rand(n, each, generator=generator, dtype=torch.float64) + 0.05
        label_weights[torch.rand(n, each, generator=generator) < 0.15] = 0.0
        label_weights[:, 0] += 0.1
        label_weights /= label_weights.sum(1, keepdim=True)
    if case.sample_weights:
        sample_weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
        sample_weights[torch.rand(n, generator=generator) < 0.2] = 0.0
    factors = torch.rand(max(n, 1), generator=generator, dtype=torch.float64) + 0.5
    return Batch(
        x.to(DTYPES[case.embedding_dtype]),
        labels if case.each else labels[:, 0],
        label_weights,
        sample_weights,
        factors,
    )


def class_weights_of(case: Case) -> Tensor | None:
    if not case.class_weights:
        return None
    generator = torch.Generator().manual_seed(case.seed + 7)
    weights = torch.rand(MOST, generator=generator, dtype=torch.float64) + 0.2
    weights[torch.rand(MOST, generator=generator) < 0.1] = 0.0
    return weights[: case.classes]  # the same for a class whatever their number


def class_counts_of(case: Case) -> list[int]:
    generator = torch.Generator().manual_seed(case.seed + 8)
    return torch.randint(0, 1000, (case.classes,), generator=generator).tolist()


def margin_of(case: Case) -> margins.Margin:
    settings = dict(case.settings)
    if case.margin == "AdaptiveMargin":
        settings["class_counts"] = class_counts_of(case)
    margin: margins.Margin = getattr(margins, case.margin)(**settings)
    return margin


def plain(tensor: Tensor | None) -> Any:
    """As it is sent: every number of half precision and of float32 is a float64."""
    if tensor is None:
        return None
    tensor = local(tensor.detach())
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy().copy()


def mesh_of(case: Case) -> Any:
    if case.replicas == 1:
        return None
    shape = (case.replicas, case.world // case.replicas)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


class Trainer:
    """Head, center loss and optimizers of a case on one rank."""

    def __init__(self, rank: int, case: Case) -> None:
        self.case = case
        partial_fc.softmax.tiles.TILE_BYTES["cpu"] = 1 if case.small_tiles else 4 << 20  # 1: tiles of 64 rows
        mesh = mesh_of(case)
        self.margin, self.drawn = margin_of(case), list[Any]()
        dtype = DTYPES[case.weight_dtype]
        options: dict[str, Any] = {
            "ignore_index": case.ignore,
            "reduction": case.reduction,
            "validate": case.validate,
            "seed": case.seed,
        }
        options |= {"scale_embedding_grad": case.scale_embedding_grad, "group": mesh, "dtype": dtype, "init_std": 1.0}
        more: dict[str, Any] = {
            "logits_budget": case.budget,
            "label_smoothing": case.smoothing,
            "interclass_filter": case.beyond,
            "class_weights": class_weights_of(case),
            "metrics": case.metrics,
            "sampling_correction": "importance" if case.corrected else "none",
            "inter_topk": case.nearest,
            "inter_topk_penalty": case.nearer_by,
            "hard_negatives": case.hard,
            "hard_negatives_every": case.hard_every,
            "sample_block": case.block,
            "kernels": "interpret" if case.kernels else "off",
        }
        self.initial = None  # rows that a store has not yet filled
        if case.storage is not None:
            self.initial = PartialFC(case.width, case.classes, margin_of(case), **options).weight.detach()
            more["storage"] = HostRows() if case.storage == "host" else FileRows(tempfile.gettempdir())
        self.head = PartialFC(case.width, case.classes, self.margin, case.sample_rate, **more, **options)
        self.schedule = None
        if case.schedule is not None:
            argument, start, end, shape = case.schedule
            when: dict[str, Any] = {"milestones": [1, 2]} if shape == "step" else {"end_step": case.steps}
            self.schedule = MarginSchedule(
                self.head, start=start, end=end, argument=argument, shape=shape, **when  # type: ignore[arg-type]
            )  # fmt: skip
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == "plain":
            self.optimizer = torch.optim.SGD(
                self.head.parameters(), lr=case.lr, momentum=case.momentum, weight_decay=case.decay
            )
        else:
            kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[case.optimizer]
            sgd = {"momentum": case.momentum, "nesterov": case.nesterov} if case.optimizer == "sgd" else {}
            low: Any = case.low
            skipped: Any = case.skipped
            self.optimizer = RowOptimizer(
                kind,
                self.head,
                lr=case.lr,
                weight_decay=case.decay,
                update_in_backward=case.early,
                low_precision=low,
                skipped_rows=skipped,
                **sgd,
            )
        self.center = None
        if case.center is not None:
            self.center = CenterLoss(case.width, case.classes, alpha=CENTER_ALPHA, update=case.center, **options)  # type: ignore[arg-type]
            if case.center == "gradient":
                self.center_optimizer = RowOptimizer(torch.optim.SGD, self.center, lr=CENTER_LR)
        if isinstance(self.margin, margins.ElasticFace):
            draw: Callable[..., Tensor] = self.margin._margins

            def remembered(cosine: Tensor, positives: margins.Positives) -> Tensor:
                drawn = draw(cosine, positives)
                self.drawn.append(plain(drawn))
                return drawn

            self.margin._margins = remembered  # type: ignore[method-assign]
        start = sum(case.counts[:rank])
        self.here = slice(start, start + case.counts[rank])

    def parameters(self) -> dict[str, Any]:
        """This rank's rows as they lie in memory, and what all ranks hold alike."""
        weight = local(self.head.weight.detach())
        if self.initial is not None:
            touched = self.head.class_rows.store.touched.view(-1, *[1] * (weight.ndim - 1))
            weight = torch.where(touched, weight, local(self.initial))
        found = {"weight": plain(weight), "bias": plain(self.head.bias)}
        found["offset"] = plain(self.margin.get_parameter("offset")) if self.margin.binary else None
        found["centers"] = None if self.center is None else plain(self.center.centers)
        found["state"] = {name: float(b) for name, b in self.margin.named_buffers() if b.ndim == 0}
        return found

    def gradients(self) -> dict[str, Any]:
        """Of rows by class id, and of the offset; None where rows have moved already."""
        head = self.head
        if self.case.early:
            return {"ids": None}
        if self.case.sample_rate < 1:
            assert head.row_grad is not None and head.weight.grad is None
            ids, values = head.row_grad[0], head.class_rows.gradients()
        else:
            assert head.row_grad is None and head.weight.grad is not None
            ids, values = torch.arange(head.shards.lo, head.shards.hi), [head.weight.grad]
            values += [] if head.bias is None or head.bias.grad is None else [head.bias.grad]
        found = {"ids": plain(ids), "weight": plain(values[0]), "bias": plain(values[1]) if len(values) > 1 else None}
        found["offset"] = plain(self.margin.get_parameter("offset").grad) if self.margin.binary else None
        return found

    def micro_batch(self, step: int, micro: int) -> Numbers:
        case, everything = self.case, global_batch(self.case.at(step), step, micro)
        batch = everything.of(self.here)
        x = batch.x.clone().requires_grad_(not case.frozen)
        before = [
            None if t is None else t.clone()
            for t in (x.detach(), batch.labels, batch.label_weights, batch.sample_weights)
        ]
        arguments: Any = (x, batch.labels)
        if case.gathered:
            arguments = (
                gather(
                    x,
                    batch.labels,
                    label_weights=batch.label_weights,
                    sample_weights=batch.sample_weights,
                    group=self.group,
                ),
            )
        self.drawn.clear()
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
            loss = self.head(*arguments)
        by_center = None if self.center is None else self.center(*arguments)
        factors = batch.factors if case.reduction == "none" else everything.factors[0]
        total = (loss * factors).sum() + (0 if by_center is None else CENTER_FACTOR * (by_center * factors).sum())
        total.backward()
        for mine, then in zip(
            (x.detach(), batch.labels, batch.label_weights, batch.sample_weights), before, strict=True
        ):
            assert mine is then is None or torch.equal(mine, then), "a caller's tensor was modified"  # type: ignore[arg-type]
        found: Numbers = {
            "loss": plain(loss),
            "center": plain(by_center),
            "x": plain(x.grad),
            "selected": plain(self.head.selected),
        }
        found["drawn"] = self.drawn[0] if self.drawn else None
        found["state"] = {name: float(b) for name, b in self.margin.named_buffers() if b.ndim == 0}
        found["accuracy"] = float(self.head.metrics["accuracy"]) if case.metrics else None
        return found

    @property
    def group(self) -> Any:
        return self.head.shards.ranks.mesh

    def step(self, step: int) -> Numbers:
        case = self.case
        for group in self.optimizer.param_groups:
            group["lr"] = case.lr_of(step)
        found: Numbers = {
            "changed": self.change() if case.change and step == 1 else None,
            "micro": [self.micro_batch(step, micro) for micro in range(case.micro)],
            "grads": self.gradients(),
            "norm": None,
        }
        if case.clip is not None:
            found["norm"] = float(clip_grad_norm_([], self.head, max_norm=case.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.center is not None:
            if case.center == "paper":
                self.center.step()
            else:
                self.center_optimizer.step()
                self.center_optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        if case.kernels and case.classes > 1 and self.here.start != self.here.stop:
            assert not self.head.kernels_in_use.startswith("none"), self.head.kernels_in_use
        return found | {"after": self.parameters()}

    def change(self) -> Numbers:
        """Change the classes, and return what the rows are then."""
        case, after = self.case, self.case.at(1)
        others = [self.optimizer] if case.optimizer == "plain" else []
        margin = margin_of(after) if case.margin == "AdaptiveMargin" else None
        if case.change == "expand":
            added = class_weights_of(after)
            self.head.expand(
                ADDED, optimizers=others, margin=margin, class_weights=None if added is None else added[-ADDED:]
            )
        else:
            merge: Any = "mean" if case.change == "remap-mean" else "first"
            self.head.remap(torch.tensor(mapping_of(case)), merge=merge, optimizers=others, margin=margin)
        self.margin = self.head.margin
        if case.hard:
            self.head.refresh_hard_negatives()
        return self.parameters()

    def end(self) -> Numbers | None:
        """All rows up to date, where those that were not selected make their steps late."""
        if self.case.skipped != "dense":
            return None
        assert isinstance(self.optimizer, RowOptimizer)
        self.optimizer.catch_up()
        return self.parameters()


def run_case(rank: int, world: int, case: Case) -> Numbers:
    trainer = Trainer(rank, case)
    return numbers_of(trainer, trainer.parameters())


def numbers_of(trainer: Trainer, before: Numbers) -> Numbers:
    steps = [trainer.step(step) for step in range(trainer.case.steps)]
    return {"before": before, "steps": steps, "end": trainer.end()}


def ordered(results: list[Numbers], case: Case, of: Any) -> Any:
    """The rows of all shards one after another, where each rank holds some; replicas hold the same."""
    shards = case.ranks // case.replicas
    parts = [of(result) for result in results]
    for replica in range(1, case.replicas):
        for mine, other in zip(parts, parts[replica * shards : (replica + 1) * shards], strict=False):
            assert numpy.array_equal(mine, other), "replicas differ"
    return numpy.concatenate(parts[:shards])
