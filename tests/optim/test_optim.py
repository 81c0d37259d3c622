"""RowOptimizer equals torch's optimizers on dense weights; one norm over all ranks for clipping; a GradScaler on ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from near import near
from shards import everyones, local, part_of, row_gradient, whole
from torch import Tensor, nn
from watching import Allocations

from partial_fc import (
    ArcFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)

D = 6


class EarlyState(torch.optim.Optimizer):
    """State of all kinds is made by the constructor, as torch's Adagrad did until 2.11: by row, a tensor, a number."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"sum": torch.full_like(p, 0.3), "mean": torch.zeros_like(p)}
            self.state[p] |= {"step": torch.tensor(0.0), "count": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                state = self.state[p]
                state["step"] += 1
                state["count"] += 1
                state["sum"].addcmul_(p.grad, p.grad)
                state["mean"].lerp_(p.grad, 0.5)
                rate = self.param_groups[0]["lr"] / float(state["step"] + state["count"])
                p.addcdiv_(state["mean"], state["sum"].sqrt(), value=-rate)


class Anchored(EarlyState):
    """Keeps the weights of when it was built."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["anchor"] = p.detach().clone()


CLASSES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": False}),
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "foreach": True}),
    (torch.optim.AdamW, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    (torch.optim.NAdam, {"lr": 0.05}),
    (EarlyState, {"lr": 0.05}),
]


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize(("cls", "options"), CLASSES, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_rows_move_as_under_the_dense_class(cls, options, rate, monkeypatch):
    """A dense parameter of the same weights; rows without a gradient are put back after each of its steps."""
    monkeypatch.setattr("partial_fc.optim.row_optimizer.BLOCK_BYTES", 7 * D * 8)  # blocks of 7 rows
    head = PartialFC(D, 50, ArcFace(), rate, dtype=torch.float64, init_std=1.0, seed=1)
    dense = nn.Parameter(head.weight.detach().clone())
    mine, theirs = RowOptimizer(cls, head, skipped_rows="still", **options), cls([dense], **options)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        head(
            torch.randn(5, D, generator=generator, dtype=torch.float64), torch.randint(0, 50, (5,), generator=generator)
        ).backward()
        ids, values = head.row_grad or (torch.arange(50), head.weight.grad)
        dense.grad = torch.zeros_like(dense)
        dense.grad[ids] = values
        before = (
            dense.detach().clone(),
            {k: v.clone() for k, v in theirs.state[dense].items() if isinstance(v, Tensor) and v.ndim},
        )
        theirs.step()
        rest = torch.ones(50, dtype=torch.bool)
        rest[ids] = False
        with torch.no_grad():
            dense[rest] = before[0][rest]
            for key, value in theirs.state[dense].items():
                if isinstance(value, Tensor) and value.ndim:
                    value[rest] = (
                        before[1][key][rest] if key in before[1] else options.get("initial_accumulator_value", 0.0)
                    )
        mine.step()
        mine.zero_grad()
        near(head.weight.detach(), dense.detach())
        for key, value in theirs.state[dense].items():
            if isinstance(value, Tensor):
                near(mine.state[head.weight][key], value)


def test_classes_that_mix_rows_are_refused():
    head = PartialFC(D, 20)
    with pytest.raises(ValueError, match="LBFGS"):
        RowOptimizer(torch.optim.LBFGS, head)
    with pytest.raises(ValueError, match=r"Adafactor moves a row by what other rows hold"):
        RowOptimizer(torch.optim.Adafactor, head)
    if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
        with pytest.raises(ValueError, match="Muon"):
            RowOptimizer(torch.optim.Muon, head)
    with pytest.raises(ValueError, match="Anchored makes its state anchor from the weights when it is built"):
        RowOptimizer(Anchored, head)
    with pytest.raises(ValueError, match="TrustRatio moves a row"):
        RowOptimizer(TrustRatio, head, lr=0.1)
    with pytest.raises(TypeError, match="momentun"):
        RowOptimizer(torch.optim.SGD, head, lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match="PartialFC"):
        RowOptimizer(torch.optim.SGD, nn.Linear(2, 2), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer_class"):
        RowOptimizer("sgd", head)  # type: ignore[arg-type]


EARLY = [EarlyState, torch.optim.Adagrad]


def train_early(head: PartialFC, optimizer: RowOptimizer, steps: range, part: slice) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, labels = torch.randn(6, D, generator=generator), torch.randint(0, 11, (6,), generator=generator)
        head(x[part].to(head.weight.dtype), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_early(rank: int, world: int, folder: str, options: dict[str, Any]) -> list[Tensor]:
    """Weights of each class after three steps, two of a head that loads them, and one with two more classes."""
    found = []
    for cls in EARLY:
        for sampled in (False, True) if "update_in_backward" not in options else (False,):
            for after in (range(3), range(3, 5)):
                dtype = torch.bfloat16 if "low_precision" in options else torch.float64
                head = PartialFC(D, 11, Softmax(), 0.6 if sampled else 1.0, dtype=dtype, init_std=1.0, seed=3)
                optimizer = RowOptimizer(cls, head, lr=0.05, **options)
                if after.start:
                    load_checkpoint(folder, head=head, optimizer=optimizer)
                train_early(head, optimizer, after, part_of(6, rank, world))
                if not after.start:
                    save_checkpoint(folder, head=head, optimizer=optimizer)
            kinds = {torch.float32 if "low_precision" in options else head.weight.dtype}
            state = optimizer.state[head.weight]
            assert {v.dtype for k, v in state.items() if isinstance(v, Tensor) and v.ndim} == kinds
            assert float(state["step"]) == 5, "a block and a rank count as one"
            if "update_in_backward" not in options:
                head.expand(2)
                begun = {EarlyState: 0.3, torch.optim.Adagrad: 0.0}[cls]
                assert whole(optimizer.state[head.weight]["sum"])[-2:].eq(begun).all()
            train_early(head, optimizer, range(5, 6), part_of(6, rank, world))
            found.append(whole(head.weight).float())
    return found


@pytest.mark.parametrize("options", [{}, {"low_precision": "master"}, {"update_in_backward": True}], ids=str)
def test_state_of_a_constructor_goes_on_at_any_world_size(ranks, tmp_path, options):
    alone = saved_early(0, 1, str(tmp_path / "alone"), options)
    for found in ranks(3).run(saved_early, str(tmp_path / "ranks"), options):
        for mine, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-2 if options else 1e-6, atol=1e-2 if options else 1e-6)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_move(dtype, options):
    """Also where the fused kernel leaves them where they are: torch 2.13's of SGD on the CPU does."""
    head = PartialFC(16, 10, ArcFace(scale=8.0), dtype=dtype, init_std=1.0)
    before = head.weight.detach().float()
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.5, **options)
    head(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)).backward()
    assert head.weight.grad is not None
    expected = before - 0.5 * head.weight.grad.float()
    assert (expected - before).abs().max() > 0.1
    optimizer.step()
    torch.testing.assert_close(head.weight.detach().float(), expected, rtol=2**-8, atol=2**-8)


class TrustRatio(torch.optim.Optimizer):
    """LARS in small: the step of a parameter is scaled by the norm of all of it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * (group["lr"] * p.norm() / p.grad.norm()))


class Counting(torch.optim.Optimizer):
    """Keeps the number of its steps in the options of its group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / group["k"])


class Copying(torch.optim.Optimizer):
    """Copies weights into its state when it first steps them, as Lookahead does."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                p.sub_(p.grad * group["lr"]).lerp_(slow, 0.5)


class Clipping(torch.optim.Optimizer):
    """Clips the gradient of all of its parameters by their norm, if it is large."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(p.grad * (group["lr"] * (50 / norm).clamp(max=1)))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Counting, r"Counting counts its steps in the options of its param group \(k\)"),
        (Copying, "Copying makes its state slow from the weights when a row is first stepped"),
        (Clipping, "Clipping moves a row by what other rows hold"),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_classes_whose_rows_are_not_apart(cls, words, rate):
    head = PartialFC(D, 10, Softmax(bias=False), rate)
    with pytest.raises(ValueError, match=words):
        RowOptimizer(cls, head, lr=0.1)


def test_schedulers_set_the_learning_rate():
    head = PartialFC(D, 10, Softmax(bias=False), dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before = head.weight.detach().clone()
        head(torch.ones(1, D, dtype=torch.float64), torch.tensor([1])).backward()
        grad = head.weight.grad
        assert grad is not None
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(before - 0.5**step * grad, head.weight.detach())
        optimizer.zero_grad()
        assert head.weight.grad is None


def largest_allocation(rank: int, world: int) -> int:
    """Of a sampled step after the first one, which allocates the state."""
    head = PartialFC(D, 20_000, ArcFace(), 0.01)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        with Allocations() as made:
            head(torch.randn(4, D), torch.arange(4)).backward()
            clip_grad_norm_([], head, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
    return made.elements


def test_a_sampled_step_makes_nothing_of_the_shards_size(ranks):
    for largest in ranks(2).run(largest_allocation):
        assert 0 < largest < 10_000


def clip(rank: int, world: int, rate: float, norm_type: float) -> None:
    head = PartialFC(D, 11, ArcFace(scale=8.0), rate, dtype=torch.float64, init_std=1.0)
    backbone = nn.Linear(3, D).double()
    with torch.no_grad():
        for p in backbone.parameters():
            dist.broadcast(p, 0)
    for bound in (1e9, 0.5):
        head.zero_grad()
        backbone.zero_grad()
        torch.manual_seed(1)
        head(backbone(torch.randn(4, 3, dtype=torch.float64)), torch.randint(0, 11, (4,))).backward()
        grads = [p.grad for p in backbone.parameters() if p.grad is not None]
        mine = row_gradient(head)
        everything = torch.cat([g.flatten() for g in [*grads, *everyones(mine.clone())]])
        expected = torch.linalg.vector_norm(everything, norm_type)
        before = mine.clone()
        total = clip_grad_norm_([*backbone.parameters(), *head.parameters()], head, max_norm=bound, norm_type=norm_type)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            row_gradient(head), before * min(1.0, bound / (expected.item() + 1e-6)), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_one_norm_over_backbone_and_shards(ranks, world, rate, norm_type):
    ranks(world).run(clip, rate, norm_type)


def scale(rank: int, world: int, rate: float) -> tuple[list[float], bool]:
    """A GradScaler over head and backbone: the same steps as without; an infinity in one shard skips the head
    everywhere."""
    heads = [PartialFC(D, 11, ArcFace(scale=8.0), rate, dtype=torch.float64, init_std=1.0) for _ in range(2)]
    optimizers = [RowOptimizer(torch.optim.SGD, h, lr=0.1, momentum=0.9) for h in heads]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, moved = [], True
    for step in range(3):
        x, labels = torch.randn(4, D, dtype=torch.float64), torch.randint(0, 11, (4,))
        scaler.scale(heads[0](x, labels)).backward()
        heads[1](x, labels).backward()
        if step == 2 and rank == world - 1:
            row_gradient(heads[0])[0, 0] = float("inf")
        before = local(heads[0].weight).detach().clone()
        scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        scales.append(scaler.get_scale())
        if step < 2:
            optimizers[1].step()
            near(local(heads[0].weight), local(heads[1].weight))
        else:
            moved = not torch.equal(local(heads[0].weight), before)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return scales, moved


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_an_infinity_in_one_shard_is_agreed_on_by_the_scaler(ranks, rate):
    for scales, moved in ranks(2).run(scale, rate):
        assert scales == [1024.0, 1024.0, 512.0]
        assert not moved


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (1.0, {}),
        (1.0, {"update_in_backward": True}),
        (0.2, {"skipped_rows": "dense"}),
        (0.2, {"skipped_rows": "still"}),
    ],
)
def test_a_frozen_parameter_stays_where_it_is_and_the_other_moves_as_before(rate, options, frozen):
    """As with any torch optimizer, which leaves out what has no gradient; missed steps from before are made."""
    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)), torch.arange(0, 24, 3)

    head = PartialFC(6, 24, Softmax(), rate, init_std=0.3, seed=5)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=0.01, **options)
    in_backward = options.get("update_in_backward", False)
    before = {}
    for step in range(8):
        if step == 4:
            up_to_date, _ = copy.deepcopy((head, optimizer))
            before = {name: p.detach().clone() for name, p in up_to_date.named_parameters()}
            getattr(head, frozen).requires_grad_(False)
        for _ in range(1 if in_backward else 2):
            head((x + 0.1 * step).requires_grad_(), y).backward()
        if not in_backward:
            clip_grad_norm_([], head, max_norm=100.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.catch_up()
    after = {name: p.detach().clone() for name, p in head.named_parameters()}
    assert torch.equal(after[frozen], before[frozen])
    other = "bias" if frozen == "weight" else "weight"
    assert not torch.equal(after[other], before[other])
