"""On the pretend GPU: errors in words, losses that change their device, the doctor, protocols of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import message_of
from on_gpu import ALONE, CLASSES, RANKS, SLOW_ON_REPLICAS, WIDTH, Place, Pools, on_both
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    CenterLoss,
    CurricularFace,
    JoinedBatches,
    MarginSchedule,
    NonFiniteError,
    PartialFC,
    RowOptimizer,
    Softmax,
    check_gradients,
    clip_grad_norm_,
    doctor,
    gather,
    load_checkpoint,
)
from partial_fc.training.protocols.identification import identify_embeddings
from partial_fc.training.protocols.retrieval import retrieve_embeddings
from partial_fc.training.protocols.templates import pool_templates, score_templates
from partial_fc.training.protocols.verification_bin import verify_embeddings


def head_of(place: Place, **options: Any) -> PartialFC:
    return PartialFC(WIDTH, CLASSES, **{"device": place.device, "group": place.group, "init_std": 1.0, **options})


# ---------------------------------------------------------------------------------------------------- what goes wrong


def last(place: Place) -> bool:
    """Whether it is the last rank, on which something goes wrong."""
    return place.rank == place.world - 1


def bad_batches(place: Place) -> list[tuple[str, Callable[[], Any]]]:
    """(words of the error, forward; and backward and the check, where a device finds what is wrong)."""
    head, (x, y) = head_of(place), place.batch(0)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings.detach().requires_grad_(), labels).backward()
        check_gradients([], head)

    wrong = last(place)
    nan = x.detach().clone()
    nan[1, 2] = float("nan") if wrong else 0.0
    two = torch.stack((y, y.flip(0)), 1)
    halves, ones = (
        torch.full(shape, value, device=place.device) for shape, value in (((len(y), 2), 0.5), ((len(y),), 1.0))
    )

    def weighted(bad: float, *, of_labels: bool, loss: Any = head, train: bool = True) -> Callable[[], None]:
        """A step of which one weight is bad."""
        labels, samples = halves.clone(), ones.clone()
        (labels[1] if of_labels else samples)[1] = bad if wrong else 0.5

        def run() -> None:
            loss.train(train)
            given = {"label_weights": labels, "sample_weights": samples, "group": place.group}
            loss(gather(x.detach().requires_grad_(), two, **given)).backward()
            check_gradients([], loss)

        return run

    center = CenterLoss(WIDTH, CLASSES, device=place.device, group=place.group)
    named = {"a" if wrong or place.world == 1 else "b": y}
    return [
        (f"valid are 0 to {CLASSES - 1}", lambda: step(x, y + (1000 if wrong else 0))),
        (r"embeddings\[1\] \(label \d+\)", lambda: step(nan, y)),
        ("must be an int64 tensor", lambda: head(x, y.int() if wrong else y)),
        ("embeddings must be \\[N, D\\]", lambda: head(x[0] if wrong else x, y)),
        ("width" if place.world == 1 else "width|dtype|differ", lambda: head(x[:, :-1], y)),
        (r"label_weights\[1\] sums to 1.25; ", weighted(0.75, of_labels=True)),
        (r"label_weights\[1, 1\] is -0.5; ", weighted(-0.5, of_labels=True)),
        (r"label_weights\[1, 1\] is nan; ", weighted(math.nan, of_labels=True)),
        (r"sample_weights\[1\] is -1; ", weighted(-1.0, of_labels=False)),
        (r"sample_weights\[1\] is inf; ", weighted(math.inf, of_labels=False)),
        (r"sample_weights\[1\] is -1; ", weighted(-1.0, of_labels=False, train=False)),
        (r"sample_weights\[1\] is -1; ", weighted(-1.0, of_labels=False, loss=center)),
        ("" if place.world == 1 else "names", lambda: gather(x, named, group=place.group)),
    ]


def bad_steps(place: Place) -> list[tuple[str, Callable[[], Any]]]:
    """(words of the error, step)."""

    def step(check: Callable[[PartialFC, Tensor], Any], rate: float, spoil: str) -> Callable[[], Any]:
        def run() -> None:
            head, (x, y) = head_of(place, sample_rate=rate), place.batch(0)
            optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
            loss = head(x, y)
            if spoil == "loss":
                loss = loss * float("nan")
            loss.backward()
            if spoil == "rows" and last(place):
                (carrier,) = optimizer.param_groups[0]["params"]
                carrier.grad.mul_(float("inf"))
            check(head, x)
            optimizer.step()

        return run

    def clip(head: PartialFC, x: Tensor) -> None:
        clip_grad_norm_([x], head, max_norm=1.0)

    def look(head: PartialFC, x: Tensor) -> None:
        check_gradients([x], head)

    def nothing(head: PartialFC, x: Tensor) -> None: ...

    rows, factor = "the gradient of weight of class", "the factor of the loss is not finite"
    checks = (clip, look, nothing)
    return [(factor, step(check, rate, "loss")) for check in checks for rate in (1.0, 0.5)] + [
        (rows, step(check, rate, "rows")) for check in checks for rate in (1.0, 0.5)
    ]


def bad_calls(place: Place) -> list[tuple[str, Callable[[], Any]]]:
    head = head_of(place)
    head(*place.batch(0)).backward()  # pending gradients

    def failing() -> Any:
        yield place.batch(0)
        if last(place):
            raise OSError("the disk is gone")
        yield place.batch(1)

    alone = place.world == 1
    return [
        ("there are gradients", lambda: head.expand(3)),
        ("C|num_classes|k ", lambda: head.topk(place.batch(0)[0].detach(), CLASSES + 1)),
        ("no complete checkpoint|no checkpoint|there is no", lambda: load_checkpoint("/nowhere/at/all", head=head)),
        ("disk is gone", lambda: list(JoinedBatches(failing(), group=place.group))),
        ("" if alone else "seed is", lambda: head_of(place, seed=place.rank)),
        ("" if alone else "steps of|forward|margin|statistics", lambda: moved_margin(place)),
    ]


def moved_margin(place: Place) -> Any:
    """Ranks whose statistics differ."""
    head = head_of(place, margin=CurricularFace())
    with torch.no_grad():
        head.margin.t.add_(place.rank)  # type: ignore[operator, union-attr]
    head(*place.batch(0)).backward()
    check_gradients([], head)  # on a device the forward does not wait for statistics


def told(place: Place, of: Callable[[Place], list[tuple[str, Callable[[], Any]]]]) -> list[int]:
    """Each says what is wrong, in the same words on every rank."""
    said = []
    for words, action in of(place):
        if not words:
            action()
            continue
        with pytest.raises((ValueError, RuntimeError, NonFiniteError, OSError), match=words) as caught:
            action()
        said.append(str(caught.value))
    if dist.is_initialized():
        everyone: list[Any] = [None] * place.world
        dist.all_gather_object(everyone, said)
        assert everyone[0] == everyone[1]
    return [len(said)]


@pytest.mark.parametrize("of", [bad_batches, bad_steps, bad_calls])
@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_what_is_wrong_is_told(gpu_ranks: Pools, ranks: Pools, layout: str, of: Any):
    on_both(gpu_ranks, ranks, layout, told, of)


def coarse_weights(place: Place) -> list[Any]:
    """Label weights in bfloat16 may sum to 1.002, though they travel in float64; those of float32 may not."""
    head, (x, y) = head_of(place), place.batch(0)
    two = torch.stack((y, y.flip(0)), 1)
    weights = torch.tensor([0.6, 0.4], dtype=torch.bfloat16, device=place.device).expand(len(y), 2)

    def step(weights: Tensor) -> Tensor:
        loss = head(gather(x, two, label_weights=weights, group=place.group))
        loss.backward()
        check_gradients([], head)
        return loss.detach()

    found = [step(weights), x.grad.clone()]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"label_weights\[0\] sums to 1.00195; "):
        step(weights.float())
    return found


@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_weights_are_as_exact_as_their_dtype(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, coarse_weights)


def one_device_too_many(place: Place) -> list[int]:
    """Labels, then embeddings, that were left on the CPU."""
    if place.device.type == "cpu":
        return [2]
    head, (x, y) = head_of(place), place.batch(0)
    assert "labels are on cpu, embeddings on gpu" in message_of(head, x, y.cpu())
    assert "the head is on gpu:0, embeddings on cpu" in message_of(head, x.detach().cpu(), y.cpu())
    return [2]


@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_tensors_of_another_device_are_refused(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, one_device_too_many)


# ---------------------------------------------------------------------------------------------------- unusual batches


def unusual_shapes(place: Place, rate: float) -> list[Any]:
    """A rank without samples, nobody with samples, samples that are all ignored, ranks without classes; and backward by
    the embeddings alone, twice, in eval(), of other dtypes."""
    found: list[Any] = []
    x, y = place.batch(0)
    some = len(x) if place.rank == 0 else 0
    batches = [(x[:some], y[:some]), (x[:0], y[:0]), (x, torch.full_like(y, -100)), (x, y)]
    for classes, metrics in ((CLASSES, False), (1, True)):
        head = PartialFC(
            WIDTH, classes, sample_rate=rate, device=place.device, group=place.group, init_std=1.0, metrics=metrics
        )
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        for inputs, labels in batches:
            leaf = inputs.detach().requires_grad_()
            loss = head(leaf, labels.clamp(max=classes - 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [loss.detach(), leaf.grad]
        found.append(head.weight)
    loss = head_of(place, sample_rate=rate)(x, y)
    found += torch.autograd.grad(loss, x, retain_graph=True)
    found += torch.autograd.grad(loss, x)
    head = head_of(place, sample_rate=rate).eval()
    found.append(head(x, y).detach())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        loss = head_of(place, sample_rate=rate)(leaf, y)
        loss.backward()
        found += [loss.detach(), leaf.grad]
    return found


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_unusual_batches(gpu_ranks: Pools, ranks: Pools, layout: str, rate: float):
    on_both(gpu_ranks, ranks, layout, unusual_shapes, rate)


# ---------------------------------------------------------------------------------------------------- moves and defaults


def built_elsewhere(place: Place) -> list[Any]:
    """On the default device; on no device; with state of the CPU."""
    found: list[Any] = []

    def train(head: PartialFC, optimizer: RowOptimizer | None = None) -> RowOptimizer:
        optimizer = optimizer or RowOptimizer(torch.optim.AdamW, head, lr=0.1)
        loss = head(*place.batch(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.extend([loss.detach(), head.weight])
        return optimizer

    with torch.device(place.device):
        head = head_of(place, device=None, sample_rate=0.5)
    optimizer = train(head)
    empty = head_of(place, device="meta", sample_rate=0.5)
    empty.to_empty(device=place.device)
    empty.reset_parameters()
    train(empty)
    on_host = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in optimizer.state_dict().items()
    }
    other = head_of(place, sample_rate=0.5)
    other.load_state_dict(head.state_dict())
    its_optimizer = RowOptimizer(torch.optim.AdamW, other, lr=0.1)
    its_optimizer.load_state_dict(on_host)
    train(other, its_optimizer)
    half = head_of(place).to(torch.bfloat16)
    found.append(half(*place.batch(0)).detach())
    return found


@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_losses_that_are_built_elsewhere(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, built_elsewhere)


def moved(place: Place) -> list[Any]:
    """A process of its own builds on the CPU, and moves head, center loss and state."""
    head = head_of(place, device="cpu", margin=CurricularFace(), class_weights=torch.ones(CLASSES))
    center = CenterLoss(WIDTH, CLASSES, device="cpu")
    optimizer = RowOptimizer(torch.optim.AdamW, head, lr=0.1)
    found: list[Any] = []
    for device in ("cpu", place.device):
        head.to(device)
        center.to(device)
        x, y = (each.detach().to(device) for each in place.batch(0))
        batch = gather(x.requires_grad_(), y)
        loss = head(batch) + center(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        center.step()
        found += [loss.detach(), head.weight, center.centers]
    return found


def test_losses_that_move(gpu_ranks: Pools, ranks: Pools):
    on_both(gpu_ranks, ranks, ALONE, moved)


def scheduled(place: Place) -> list[Any]:
    head = head_of(place, margin=ArcFace(margin=0.1))
    schedule = MarginSchedule(head, start=0.0, end=0.4, begin_step=0, end_step=4)
    found: list[Any] = []
    for step in range(3):
        found.append(head(*place.batch(step)).detach())
        schedule.step()
    return found


@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_a_margin_that_moves(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, scheduled)


# ---------------------------------------------------------------------------------------------------- doctor, protocols


def diagnosed(place: Place) -> list[Any]:
    """Whether each check is passed, failed, or left out."""
    backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    with torch.no_grad():
        backbone[0].weight.copy_(torch.eye(WIDTH))
        backbone[0].bias.zero_()
    backbone.to(place.device)
    head = head_of(place, margin=Softmax(), sample_rate=0.5)
    optimizers = [RowOptimizer(torch.optim.SGD, head, lr=0.1), torch.optim.SGD(backbone.parameters(), lr=0.1)]
    x, y = place.batch(0)
    report = doctor(backbone, head, optimizers, batch=(x.detach(), y))
    assert place.world > 1 or report.ok, str(report)
    return [{check.name: str(check.ok) != "False" for check in report.checks}]


@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_the_doctor(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, diagnosed)


def of_ranks(place: Place) -> dict[str, Any]:
    """What a protocol takes to share its work; sums travel on the device."""

    def add(tensor: Tensor) -> Tensor:
        moved = tensor.to(place.device)
        if dist.is_initialized():
            dist.all_reduce(moved)
        return moved.to(tensor.device)

    return {"rank": place.rank, "world": place.world, "reduce": add, "name": "x"}


def known(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}


def protocols(place: Place, labels_on_host: bool) -> list[Any]:
    x, how = place.filled(80, WIDTH), of_ranks(place)
    labels = torch.arange(80, device="cpu" if labels_on_host else place.device) % 16
    others = {"distractors": x[64:], "distractor_labels": labels[64:] + 16}
    found = [
        identify_embeddings(x[:32], labels[:32], x[32:64], labels[32:64], tile=10, **how),
        identify_embeddings(x[:32], labels[:32], x[32:64], labels[32:64], **others, **how),
        retrieve_embeddings(x[:32], labels[:32], x[32:], labels[32:], tile=10, **how),
        retrieve_embeddings(x, labels, **how),
        verify_embeddings(x, labels[:40] % 2 == 0, block=7, **how),
    ]
    return [known(each.figures) for each in found]


@pytest.mark.parametrize("labels_on_host", [False, True])
@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_protocols(gpu_ranks: Pools, ranks: Pools, layout: str, labels_on_host: bool):
    on_both(gpu_ranks, ranks, layout, protocols, labels_on_host)


def templates(place: Place, labels_on_host: bool) -> list[Any]:
    x, labels = place.filled(80, WIDTH), torch.arange(80, device="cpu" if labels_on_host else place.device) % 16
    ids, pooled = pool_templates(x, labels, labels % 2, weights=torch.ones(80, device=labels.device))
    pairs = torch.stack((labels[:16], labels[:16].flip(0)), 1)
    result, scores = score_templates(ids, pooled, pairs, labels[:16] % 2 == 0, **of_ranks(place))
    return [known(result.figures), ids, pooled, scores]


@pytest.mark.parametrize("labels_on_host", [False, True])
@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_templates(gpu_ranks: Pools, ranks: Pools, layout: str, labels_on_host: bool):
    on_both(gpu_ranks, ranks, layout, templates, labels_on_host)
