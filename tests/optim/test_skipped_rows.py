"""Rows that a step does not select move as the dense optimizer moves them: a sampled run is the run of torch's own
optimizer over all rows, in one float64 process, whose gradient is zero where a row was not selected."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from common import message_of
from dense_losses import Loss
from near import near
from shards import part_of, positions, selected_by_all, whole
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SubCenterArcFace,
    clip_grad_norm_,
    export_weights,
    import_weights,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.moves import Probe

D, C, N, STEPS = 5, 203, 12, 50
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def batch(step: int, samples: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, C, (samples,), generator=generator)


def rate_of(step: int) -> float:
    """Warm-up, then half a cosine."""
    return min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / STEPS)) / 2


@dataclass
class Dense:
    """All rows under a torch optimizer."""

    weight: Tensor
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameter = nn.Parameter(self.weight.double().clone())
        self.optimizer = self.cls([self.parameter], **self.options)

    def step(self, step: int, classes: Tensor) -> None:
        x, labels = batch(step)
        loss = Loss()(x, self.parameter[classes], positions(labels, classes, C), classes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = self.options["lr"] * rate_of(step)
        self.optimizer.step()
        self.losses.append(loss.item())


def head_of(rate: float, seed: int = 3, **options: Any) -> PartialFC:
    return PartialFC(D, C, ArcFace(), rate, dtype=torch.float64, init_std=0.3, seed=seed, **options)


def take(head: PartialFC, optimizer: RowOptimizer, lr: float, step: int, rank: int, world: int) -> float:
    """A step of the head; its loss."""
    x, labels = batch(step)
    part = part_of(N, rank, world)
    loss = head(x[part], labels[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.param_groups[0]["lr"] = lr * rate_of(step)
    optimizer.step()
    return loss.item()


def check_run(
    rank: int, world: int, rate: float, cls: Any, options: dict[str, Any], bounds: tuple[float, float]
) -> None:
    head = head_of(rate)
    dense = Dense(whole(head.weight), cls, options)
    optimizer = RowOptimizer(cls, head, skipped_rows="dense", **options)
    for step in range(STEPS):
        loss = take(head, optimizer, options["lr"], step, rank, world)
        dense.step(step, selected_by_all(head))
        near(loss, dense.losses[-1], bounds[0])
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), bounds[1])


KINDS = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "decay": {"lr": 0.3, "weight_decay": 0.01},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 5e-4, "maximize": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_sgd_is_that_of_all_rows(kind, rate):
    check_run(0, 1, rate, SGD, KINDS[kind], (1e-9, 1e-9))


@pytest.mark.parametrize(
    ("world", "kind", "rate"),
    [
        (2, "dampening", 0.02),
        *(
            pytest.param(world, kind, rate, marks=pytest.mark.slow)
            for world, kind, rate in (
                (2, "nesterov", 0.1),
                (3, "nesterov", 0.1),
                (4, "momentum", 0.5),
                (3, "plain", 0.02),
                (3, "decay", 0.1),
                (4, "dampening", 0.02),
            )
        ),
    ],
)
def test_sgd_is_that_of_all_rows_on_ranks(ranks, world, kind, rate):
    ranks(world).run(check_run, rate, SGD, KINDS[kind], (1e-9, 1e-9))


OF_ADAM = (1e-6, 1e-6)  # of losses and of weights

ADAMS = [
    (ADAMW, {"lr": 0.01, "weight_decay": 0.05}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.9, 0.95)}),
    (ADAMW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.NAdam, {"lr": 0.01}),
]


@pytest.mark.parametrize(("cls", "options"), ADAMS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_adam_is_nearly_that_of_all_rows(cls, options, rate):
    check_run(0, 1, rate, cls, options, OF_ADAM)


@pytest.mark.parametrize("missed", [1, 2, 5, 40, 400])
@pytest.mark.parametrize(
    ("betas", "eps"),
    [
        ((0.9, 0.999), {}),
        ((0.9, 0.95), {}),
        ((0.9, 0.9), {}),  # √v falls as fast as the moment
        ((0.99, 0.9), {}),  # and faster
        ((0.9, 0.5), {}),
        ((0.5, 0.1), {}),
        ((0.0, 0.9), {}),
        ((0.9, 0.999), {3: 1e-3, 20: 1e-10}),  # set in the run
    ],
)
@pytest.mark.parametrize("begun", [0, 1000])
def test_steps_that_adam_misses_at_any_betas(betas, eps, missed, begun):
    """The table of many steps against these steps, for √v from far below ε to far above it."""
    options = {"lr": 0.01, "betas": betas, "eps": 1e-8, "weight_decay": 0.01}
    generator, n = torch.Generator().manual_seed(0), 91
    second = 10.0 ** torch.linspace(-32, 4, n, dtype=torch.float64)
    first = second.sqrt() * torch.randn(n, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(n, 1, generator=generator, dtype=torch.float64))
    given = [weight.detach().clone(), first[:, None].clone(), second[:, None].clone()]
    optimizer = ADAMW([weight], **options)
    state = {"exp_avg": given[1].clone(), "exp_avg_sq": given[2].clone()}
    optimizer.state[weight] = {"step": torch.tensor(float(begun)), **state}
    weight.grad = torch.zeros_like(weight)
    moves = AdamMoves(("exp_avg", "exp_avg_sq"))
    probe = Probe(ADAMW, options, {"step": torch.tensor(float(begun))})
    for step in range(missed):
        options["eps"] = optimizer.param_groups[0]["eps"] = eps.get(step, options["eps"])
        moves.extend(moves.find(probe, options))
        optimizer.step()
    found = [torch.empty_like(each) for each in given]
    moves.move(given, moves.coefficients()[:1].expand(n, -1), found)
    moved = 1 + (weight.detach() - given[0]).abs()
    near(found[0] / moved, weight.detach() / moved, 1e-6)
    near(found[1], optimizer.state[weight]["exp_avg"], 1e-9)


# ------------------------------------------------------------------------------------------------ whatever may come


def test_warm_up_of_momentum_and_decay_that_change():
    """Options that change from step to step, from zero too, are those of each step."""
    head, options = head_of(0.1), {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    dense, optimizer = Dense(whole(head.weight), SGD, options), RowOptimizer(SGD, head, skipped_rows="dense", **options)
    for step in range(STEPS):
        for each in (dense.optimizer, optimizer):
            group = each.param_groups[0]
            group["momentum"] = 0.0 if step < 5 else min(0.95, 0.5 + step / 50)
            group["weight_decay"] = 0.0 if step < 12 else 0.01 * (step % 3)
        near(take(head, optimizer, 0.1, step, 0, 1), dense_step(dense, step, head), 1e-9)
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), 1e-9)


def changed(what: str, step: int, optimizer: torch.optim.Optimizer) -> None:
    """What somebody does to an optimizer before this step of a run with decay."""
    group = optimizer.param_groups[0]
    if (what == "rates of zero" and step % 4 > 1) or (what == "the rate zero at last" and step > 20):
        group["lr"] = 0.0
    elif what == "decay off and on":
        group["weight_decay"] = 0.0 if 10 <= step < 30 else 0.02
    elif what == "momentum from zero":
        group["momentum"] = 0.9 if step >= 15 else 0.0
    elif what == "momentum off and on":
        group["momentum"] = 0.0 if 15 <= step < 25 else 0.9
    elif what == "eps raised and lowered":
        group["eps"] = 1e-3 if 10 <= step < 25 else 1e-9
    elif what == "other betas":
        group["betas"] = (0.9, 0.999) if step < 10 else (0.8, 0.9)
    elif what == "amsgrad off":
        group["amsgrad"] = step < 10
    elif what == "state forgotten" and step in (10, 30):
        optimizer.state.clear()


CHANGES = {
    "rates of zero": [("SGD", {}), ("SGD", {"momentum": 0.9}), ("AdamW", {})],
    "the rate zero at last": [("SGD", {}), ("AdamW", {})],
    "decay off and on": [("SGD", {}), ("SGD", {"momentum": 0.9}), ("AdamW", {})],
    "momentum from zero": [("SGD", {})],
    "momentum off and on": [("SGD", {"momentum": 0.9})],
    "state forgotten": [("SGD", {"momentum": 0.9}), ("AdamW", {})],
    "eps raised and lowered": [("AdamW", {}), ("NAdam", {"weight_decay": 0.0})],
    "other betas": [("AdamW", {})],
    "amsgrad off": [("AdamW", {"amsgrad": True})],
}


@pytest.mark.parametrize(
    ("what", "cls", "options"), [(what, *each) for what, cases in CHANGES.items() for each in cases]
)
def test_a_run_in_which_something_changes(what, cls, options, caplog):
    """Rows make the steps that they have missed once, with the options that each of these steps had."""
    given = {"lr": 0.1 if cls == "SGD" else 0.01, "weight_decay": 0.02, **options}
    kind, head = getattr(torch.optim, cls), head_of(0.1)
    dense, optimizer = Dense(whole(head.weight), kind, given), RowOptimizer(kind, head, skipped_rows="dense", **given)
    bounds = (1e-9, 1e-9) if cls == "SGD" else OF_ADAM
    for step in range(STEPS):
        x, labels = batch(step)
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        for each in (optimizer, dense.optimizer):
            each.param_groups[0]["lr"] = given["lr"] * rate_of(step)
            changed(what, step, each)
        optimizer.step()
        classes = selected_by_all(head)
        of_dense = Loss()(x, dense.parameter[classes], positions(labels, classes, C), classes)
        dense.optimizer.zero_grad()
        of_dense.backward()
        dense.optimizer.step()
        near(loss.item(), of_dense.item(), bounds[0])
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), bounds[1])
    assert "written between steps" not in caplog.text


def test_amsgrad_is_not_switched_on_in_a_run():
    for built in (False, True):
        head = head_of(0.1)
        optimizer = RowOptimizer(ADAMW, head, amsgrad=built)
        for step, on in enumerate((built, False, True)):
            optimizer.param_groups[0]["amsgrad"] = on
            head(*batch(step)).backward()
            if step == 2:
                with pytest.raises(ValueError, match="amsgrad of AdamW was switched on in a run"):
                    optimizer.step()
            else:
                optimizer.step()
                optimizer.zero_grad()


def dense_step(dense: Dense, step: int, head: PartialFC) -> float:
    dense.step(step, selected_by_all(head))
    return dense.losses[-1]


def test_a_rate_that_is_a_tensor_changed_in_place():
    head, rate = head_of(0.1), torch.tensor(0.1, dtype=torch.float64)
    dense = Dense(whole(head.weight), SGD, {"lr": 0.1, "momentum": 0.9})
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", lr=rate, momentum=0.9)
    for step in range(20):
        x, labels = batch(step)
        head(x, labels).backward()
        rate.fill_(0.1 * rate_of(step))
        optimizer.step()
        optimizer.zero_grad()
        dense_step(dense, step, head)
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), 1e-9)


def resumed(rank: int, world: int, folder: str, first: int, last: int) -> tuple[list[float], Tensor]:
    """Steps from `first` to `last`, from the checkpoint of another world size if there is one, and to a checkpoint."""
    head = head_of(0.05)
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **KINDS["nesterov"])
    if first:
        load_checkpoint(f"{folder}/{first}", head=head, head_optimizer=optimizer)
    losses = [take(head, optimizer, 0.1, step, rank, world) for step in range(first, last)]
    save_checkpoint(f"{folder}/{last}", head=head, head_optimizer=optimizer)
    return losses, whole(head.weight)


def test_a_run_goes_on_at_another_world_size(ranks, tmp_path):
    """Saving brings all rows up to date; so the run differs by rounding from one that never saved."""
    start, _ = resumed(0, 1, str(tmp_path), 0, 17)
    middle, _ = ranks(3).run(resumed, str(tmp_path), 17, 34)[0]
    last, weight = ranks(2).run(resumed, str(tmp_path), 34, STEPS)[0]
    head = head_of(0.05)
    dense = Dense(whole(head.weight), SGD, KINDS["nesterov"])
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **KINDS["nesterov"])
    for step in range(STEPS):
        take(head, optimizer, 0.1, step, 0, 1)
        dense_step(dense, step, head)
    near(start + middle + last, dense.losses, 1e-9)
    near(weight, dense.parameter.detach(), 1e-9)


@pytest.mark.parametrize("what", ["skipped", "overflow", "lost forward", "no_grad", "evaluation", "read"])
def test_what_is_no_step_is_none_for_any_row(what):
    """A skipped step, an overflow of a scaler, forwards that no backward follows, evaluation, and reading in between."""
    head = head_of(0.1, on_nonfinite="skip")
    options = KINDS["nesterov"]
    dense = Dense(whole(head.weight), SGD, options)
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **options)
    for step in range(30):
        near(take(head, optimizer, 0.1, step, 0, 1), dense_step(dense, step, head), 1e-9)
        if step % 7 != 3:
            continue
        x, labels = batch(500 + step)
        optimizer.zero_grad()
        if what == "skipped":
            head(torch.full_like(x, math.nan), labels).backward()
            optimizer.step()
            assert head.skipped
        elif what == "overflow":
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            (scaler.scale(head(x, labels)) * math.inf).backward()
            scaler.step(optimizer)
            scaler.update()
        elif what == "lost forward":
            head(x, labels)
        elif what == "no_grad":
            with torch.no_grad():
                head(x, labels)
        elif what == "evaluation":
            head.eval()
            with torch.no_grad():
                head(x, labels)
            head.train()
        else:
            near(head.state_dict()["weight"], dense.parameter.detach(), 1e-9)
        optimizer.zero_grad()
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), 1e-9)


def test_micro_batches_clipping_and_a_late_backward():
    """Rows of several forwards, and of one whose backward comes a step later, are up to date when they are stepped."""
    head, options = head_of(0.1), KINDS["dampening"]
    dense = Dense(whole(head.weight), SGD, options)
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **options)
    late, late_dense = None, None
    for step in range(24):
        rows = torch.zeros_like(dense.parameter)
        for micro in range(2):
            x, labels = batch(2 * step + micro)
            loss = head(x, labels)
            classes = head.selected
            leaf = dense.parameter.detach()[classes].requires_grad_()
            expected = Loss()(x, leaf, positions(labels, classes, C), classes)
            near(loss.item(), expected.item(), 1e-9)
            if micro and step % 3 == 1:  # its backward comes in the next step
                late, late_dense = loss, (classes, torch.autograd.grad(expected, leaf)[0])
                continue
            loss.backward()
            rows[classes] += torch.autograd.grad(expected, leaf)[0]
        if late is not None and step % 3 == 2:
            late.backward()
            rows[late_dense[0]] += late_dense[1]  # type: ignore[index]
            late = None
        norm = clip_grad_norm_([], head, max_norm=1.0)
        near(float(norm), float(rows.norm()), 1e-8)
        dense.parameter.grad = rows * min(1.0, 1.0 / (float(rows.norm()) + 1e-6))
        dense.optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.catch_up()
    near(whole(head.weight), dense.parameter.detach(), 1e-8)


def test_every_sharded_parameter_moves_and_no_row_is_left():
    """Biases and sub-centers; and many blocks, and a table that is full."""
    for margin in (Softmax(), SubCenterArcFace(scale=8.0, centers=3)):
        head = PartialFC(D, C, margin, 0.05, dtype=torch.float64, init_std=0.3)
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in head.named_parameters()}
        theirs = SGD(copies.values(), **KINDS["nesterov"])
        optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **KINDS["nesterov"])
        for step in range(30):
            x, labels = batch(step)
            head(x, labels).backward()
            for name, carrier in zip(copies, head.class_rows.carriers, strict=True):
                copies[name].grad = torch.zeros_like(copies[name])
                copies[name].grad[head.selected] = carrier.grad  # type: ignore[index]
            theirs.step()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.catch_up()
        for name, parameter in head.named_parameters():
            near(parameter.detach(), copies[name].detach(), 1e-9)


def test_small_tables_blocks_and_memory_change_nothing(monkeypatch):
    monkeypatch.setattr("partial_fc.optim.skipped_rows.BLOCK_BYTES", 4 * D * 7)
    monkeypatch.setattr("partial_fc.optim.moves.LinearMoves.MOST", 9)
    check_run(0, 1, 0.1, SGD, KINDS["nesterov"], (1e-9, 1e-9))
    monkeypatch.setattr("partial_fc.optim.skipped_rows.TAKEN_BYTES", 100)
    check_run(0, 1, 0.1, SGD, KINDS["nesterov"], (1e-9, 1e-9))


@pytest.mark.parametrize("low", ["master", "stochastic"])
def test_half_precision_rows(low):
    """With float32 rows in the state exactly as a float32 run, but for what bfloat16 rows do to gradients; with
    stochastic rounding in the mean."""
    drift = []
    for seed in range(4 if low == "stochastic" else 1):
        head = PartialFC(D, 10 * C, ArcFace(scale=8.0), 0.05, seed=seed, init_std=0.5, dtype=torch.bfloat16)
        before = head.weight.detach().float().clone()
        optimizer = RowOptimizer(SGD, head, skipped_rows="dense", low_precision=low, lr=0.01, weight_decay=0.01)
        for _ in range(STEPS):  # no sample counts: all rows move by decay alone
            head(torch.randn(2, D, dtype=torch.bfloat16), torch.full((2,), -100)).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.catch_up()
        after = optimizer.state[head.weight]["master_weight"] if low == "master" else head.weight.detach().float()
        drift.append((after * before).sum() / (before * before).sum())
    expected = (1 - 1e-4) ** STEPS
    mean = torch.stack(drift).mean().item()
    assert mean == pytest.approx(expected, abs=1e-6 if low == "master" else 2e-4)
    assert abs(expected - 1) > 4e-3, "nearest rounding of every step would leave rows where they are"


# ------------------------------------------------------------------------------------------------ readers, writers


def trained(steps: int = 12, **options: Any) -> tuple[PartialFC, RowOptimizer, Tensor]:
    """A head whose rows are behind, its optimizer, and the rows as a dense optimizer has them."""
    head = head_of(0.1)
    options = options or KINDS["nesterov"]
    dense = Dense(whole(head.weight), SGD, options)
    optimizer = RowOptimizer(SGD, head, skipped_rows="dense", **options)
    for step in range(steps):
        take(head, optimizer, options["lr"], step, 0, 1)
        dense_step(dense, step, head)
    optimizer.zero_grad()
    assert float((head.weight - dense.parameter).detach().abs().max()) > 1e-4
    return head, optimizer, dense.parameter.detach()


def nearest(head: PartialFC) -> Tensor:
    head.nearest_classes(1)
    return head.weight.detach()


def exported(head: PartialFC, folder: Any) -> Tensor:
    export_weights(folder / "rows.safetensors", head)
    other = head_of(0.1, seed=1)
    import_weights(folder / "rows.safetensors", other)
    return other.weight.detach()


READERS: dict[str, Any] = {
    "state_dict": lambda head, folder: head.state_dict()["weight"],
    "state of the optimizer": lambda head, folder: (head.class_rows.live_optimizer.state_dict(), head.weight)[1],
    "copy": lambda head, folder: copy.deepcopy(head).weight,
    "pickle": lambda head, folder: pickle.loads(pickle.dumps(head)).weight,
    "move": lambda head, folder: head.double().weight if head.float() else None,
    "queries": lambda head, folder: nearest(head),
    "topk": lambda head, folder: (head.topk(torch.randn(2, D, dtype=torch.float64), 2), head.weight)[1],
    "export": exported,
    "remap": lambda head, folder: (head.remap(torch.arange(C)), head.weight)[1],
    "expand": lambda head, folder: (head.expand(1), head.weight[:-1])[1],
    "another optimizer": lambda head, folder: (RowOptimizer(SGD, head, lr=0.1), head.weight)[1],
    "average": lambda head, folder: torch.optim.swa_utils.AveragedModel(head).module.weight,
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_rows_sees_them_up_to_date(tmp_path, reader):
    head, optimizer, expected = trained()
    near(READERS[reader](head, tmp_path).detach().double(), expected, 1e-6 if reader == "move" else 1e-9)
    assert optimizer is not None


def test_rows_do_not_lose_their_steps_with_the_optimizer():
    head, optimizer, expected = trained()
    del optimizer
    gc.collect()
    near(head.state_dict()["weight"], expected, 1e-9)


def test_state_is_up_to_date_too():
    head, optimizer, _ = trained()
    before = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    other = head_of(0.1)
    other.load_state_dict(head.state_dict())
    again = RowOptimizer(SGD, other, skipped_rows="dense", **KINDS["nesterov"])
    again.load_state_dict(optimizer.state_dict())
    near(again.state[other.weight]["momentum_buffer"], before, 0)
    losses = [take(h, o, 0.1, 12, 0, 1) for h, o in ((head, optimizer), (other, again))]
    assert losses[0] == losses[1]


def written(head: PartialFC, rows: Tensor, how: str, folder: Any) -> None:
    if how == "load":
        head.load_state_dict({**head.state_dict(), "weight": rows})
    elif how == "import":
        other = head_of(0.1, seed=1)
        other.load_state_dict({**other.state_dict(), "weight": rows})
        export_weights(folder / "rows.safetensors", other)
        import_weights(folder / "rows.safetensors", head)
    elif how == "reset":
        head.reset_parameters()
    elif how == "assigned":
        head.weight.data = rows.clone()
    else:
        with torch.no_grad():
            head.weight.copy_(rows)


@pytest.mark.parametrize("how", ["load", "import", "reset", "assigned", "in place"])
def test_rows_that_are_written_are_current(tmp_path, how, caplog):
    """No step from before moves them; in a loop that writes without a word it is said."""
    head, optimizer, _ = trained(momentum=0.9, lr=0.1)
    rows = head_of(0.1, seed=3).weight.detach() if how == "reset" else torch.randn(C, D, dtype=torch.float64)
    written(head, rows, how, tmp_path)
    near(head.state_dict()["weight"], rows, 0)
    head.zero_grad()
    head(*batch(0))
    optimizer.catch_up()
    near(head.weight.detach(), rows, 0)
    assert ("taken as they are" in caplog.text) == (how in ("assigned", "in place"))


def test_a_mean_of_embeddings_is_current():
    head, optimizer, expected = trained()
    x, labels = torch.randn(6, D, dtype=torch.float64), torch.arange(6)
    head.init_from_embeddings([(x, labels)])
    near(head.weight.detach()[6:], expected[6:], 1e-9)
    now = head.weight.detach().clone()
    optimizer.catch_up()
    near(head.weight.detach(), now, 0)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"weight_decay": 0.1}),
        (torch.optim.Adagrad, {"weight_decay": 0.1}),
        (torch.optim.Adamax, {}),
        (torch.optim.RAdam, {}),
    ],
)
def test_a_class_without_a_form_is_refused_or_stands_still(cls, options, caplog):
    head = head_of(0.1)
    words = message_of(RowOptimizer, cls, head, skipped_rows="dense", lr=0.1, **options)
    assert 'skipped_rows="still"' in words and cls.__name__ in words
    assert RowOptimizer(cls, head, lr=0.1, **options).skipped_rows == "still"
    assert "stand still" in caplog.text


def test_the_choice_is_one_of_two():
    assert "still" in message_of(RowOptimizer, SGD, head_of(0.1), lr=0.1, skipped_rows="lazy")
    assert RowOptimizer(SGD, head_of(0.1), lr=0.1).skipped_rows == "dense"


def test_the_choice_may_change_between_steps():
    head, optimizer, expected = trained()
    optimizer.skipped_rows = "still"
    near(head.weight.detach(), expected, 1e-9)
    before = head.weight.detach().clone()
    take(head, optimizer, 0.1, 12, 0, 1)
    rest = torch.ones(C, dtype=torch.bool)
    rest[head.selected] = False
    optimizer.catch_up()
    assert torch.equal(head.weight.detach()[rest], before[rest]) and rest.any()
    optimizer.skipped_rows = "dense"
    take(head, optimizer, 0.1, 13, 0, 1)
    optimizer.catch_up()
    assert not torch.equal(head.weight.detach()[rest], before[rest])


def test_decay_that_is_switched_on_in_a_run_is_refused_before_anything_moves():
    head = head_of(0.1)
    optimizer = RowOptimizer(torch.optim.Adam, head, skipped_rows="dense", lr=0.1)
    take(head, optimizer, 0.1, 0, 0, 1)
    optimizer.zero_grad()
    head(*batch(1)).backward()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = head.weight.detach().clone()
    assert "decay" in message_of(optimizer.step)
    assert torch.equal(head.weight.detach(), before)


def test_a_state_whose_options_have_no_form_is_refused_and_nothing_changes():
    head = head_of(0.1)
    optimizer = RowOptimizer(torch.optim.Adam, head, skipped_rows="dense", lr=0.1)
    take(head, optimizer, 0.1, 0, 0, 1)
    state = optimizer.state_dict()
    before = optimizer.state[head.weight]["exp_avg"].clone()
    state["param_groups"] = [{**state["param_groups"][0], "weight_decay": 0.1}]
    assert "decay" in message_of(optimizer.load_state_dict, state)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert torch.equal(optimizer.state[head.weight]["exp_avg"], before)


def test_rows_that_stand_still_under_the_dense_class_cost_nothing():
    """Adagrad and plain SGD leave a row without a gradient alone: nothing is noted."""
    for cls in (torch.optim.Adagrad, SGD):
        head = head_of(0.1)
        optimizer = RowOptimizer(cls, head, lr=0.1, skipped_rows="dense")
        for step in range(3):
            take(head, optimizer, 0.1, step, 0, 1)
        assert head.class_rows.behind.done is None
