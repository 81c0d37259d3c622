"""Rows updated in the backward pass, half-precision weights, tiled logits, compilation, collectives of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from near import near
from shards import local, part_of
from side_by_side import small_tiles
from torch import Tensor, nn
from watching import Allocations, collectives

from partial_fc import ArcFace, Margin, PartialFC, RowOptimizer, Softmax, clip_grad_norm_, gather

D = 6


def batch(step: int, n: int, classes: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, D, generator=generator, dtype=torch.float64), torch.randint(
        0, classes, (n,), generator=generator
    )


# ----------------------------------------------------------------------------------------------- update in the backward


def updated_in_backward(
    rank: int, world: int, margin: Margin, classes: int, budget: int | None, options: dict[str, Any]
) -> None:
    cls = torch.optim.AdamW if "betas" in options else torch.optim.SGD
    heads = [PartialFC(D, classes, margin, dtype=torch.float64, init_std=1.0, logits_budget=budget) for _ in range(2)]
    optimizers = [
        RowOptimizer(cls, h, update_in_backward=early, **options) for h, early in zip(heads, (False, True), strict=True)
    ]
    for step in range(4):
        grads = []
        for head, optimizer in zip(heads, optimizers, strict=True):
            x, labels = batch(step, 3 + rank, classes, rank)
            with small_tiles():
                head(x.requires_grad_(), labels).backward()
            grads.append(x.grad)
            assert (head.weight.grad is None) == optimizer.update_in_backward
            optimizer.step()
            optimizer.zero_grad()
        near(grads[0], grads[1])
        for mine, theirs in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            near(local(mine), local(theirs))
    states = [o.state[h.weight] for o, h in zip(optimizers, heads, strict=True)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        near(local(value), local(states[1][key]))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("classes", [2, 301])
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize(
    ("margin", "options"),
    [
        (ArcFace(scale=8.0), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (Softmax(), {"lr": 0.05, "betas": (0.9, 0.99)}),
    ],
)
def test_rows_updated_in_backward_end_where_they_would(ranks, world, classes, budget, margin, options):
    ranks(world).run(updated_in_backward, margin, classes, budget, options)


def largest_allocation(rank: int, world: int) -> int:
    head = PartialFC(D, 4_000, ArcFace(), logits_budget=0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=0.1, update_in_backward=True)
    for _ in range(2):  # the first step allocates the state
        x = torch.randn(4, D, requires_grad=True)
        with small_tiles(), Allocations() as made:
            head(x, torch.arange(4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return made.elements


def test_no_gradient_of_the_whole_weight_exists(ranks):
    for largest in ranks(2).run(largest_allocation):
        assert 0 < largest <= 2_000  # 1/length of the shard's rows; the weight has 12,000 numbers


def test_what_cannot_be_joined_with_it_is_refused():
    head = PartialFC(D, 10)
    x, labels = torch.randn(2, D), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="sample_rate=1"):
        RowOptimizer(torch.optim.SGD, PartialFC(D, 10, sample_rate=0.5), lr=0.1, update_in_backward=True)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, update_in_backward=True)
    head(x, labels).backward()
    with pytest.raises(RuntimeError, match="clipping"):
        clip_grad_norm_([], head, max_norm=1.0)
    loss = head(x, labels)
    with pytest.raises(RuntimeError, match="accumulation"):
        loss.backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="float16"):
        head(x, labels)
    scaler.scale(head(x.requires_grad_(), labels)).backward()
    with pytest.raises((RuntimeError, AssertionError), match=r"GradScaler|No inf checks"):
        scaler.step(optimizer)


# ----------------------------------------------------------------------------------------------- half-precision weights


def train_low(rank: int, world: int, dtype: torch.dtype, low: Any, rate: float) -> Tensor:
    """Many small steps the same way, each below half of bfloat16's resolution for most weights."""
    head = PartialFC(D, 23, ArcFace(scale=8.0), rate, dtype=dtype, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=4e-3, low_precision=low)
    x, labels = batch(0, 6, 23)
    part = part_of(6, rank, world)
    for _ in range(75):
        head(x[part].float(), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if low:
        assert all(
            local(v).dtype == torch.float32
            for v in optimizer.state[head.weight].values()
            if isinstance(v, Tensor) and v.ndim
        )
    assert head.weight.dtype == dtype
    return local(head.weight).detach().float().clone()


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("low", ["master", "stochastic"])
def test_bf16_weights_follow_float32(ranks, low, rate):
    """Steps below bfloat16's resolution: plain bfloat16 weights stay behind, with either option they go where float32
    goes."""
    start = PartialFC(D, 23, init_std=1.0).weight.detach()
    exact, plain, mine = (
        train_low(0, 1, dtype, option, rate)
        for dtype, option in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, low))
    )
    way = (exact - start).norm()
    assert (mine - exact).norm() < (
        0.2 if low == "master" else 0.35
    ) * way  # stochastic rounding adds noise of a rounding a step
    assert (plain - exact).norm() > (2 if low == "master" else 1.5) * (mine - exact).norm()
    shards = torch.cat(ranks(2).run(train_low, torch.bfloat16, low, rate))
    assert (shards - mine).norm() < 0.1 * way


def step_without_rows(rank: int, world: int, low: Any) -> bool:
    head = PartialFC(D, 2, Softmax(), 0.5, dtype=torch.bfloat16)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.5, low_precision=low)
    before = local(head.weight).detach().clone()
    head(torch.ones(1, D), torch.tensor([rank % 2])).backward()
    optimizer.step()
    return not torch.equal(local(head.weight), before)


@pytest.mark.parametrize("low", [None, "master", "stochastic"])
def test_a_rank_without_rows_takes_part_in_a_step(ranks, low):
    moved = ranks(3).run(step_without_rows, low)
    assert moved == [True, True, False]  # of two classes the third rank has none


def test_stochastic_rounding_is_refused_for_float16():
    with pytest.raises(ValueError, match='"stochastic" rounds to bfloat16, and the weights are float16; use "master"'):
        RowOptimizer(torch.optim.SGD, PartialFC(D, 4, dtype=torch.float16), lr=0.1, low_precision="stochastic")


def test_stochastic_rounding_keeps_the_mean_and_the_grid():
    from partial_fc.optim.rounding import round_at_random

    values = torch.full((4000, 5), 1.0 + 0.3 * 2**-7)
    rounded = round_at_random(values, torch.arange(4000), key=7)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1.0 + 0.3 * 2**-7, abs=2e-4)
    negative = round_at_random(-values, torch.arange(4000), key=7)
    assert torch.equal(negative, -rounded)
    special = torch.tensor([[float("inf"), float("nan"), 0.0, -0.0, 3.0]])
    assert torch.equal(
        round_at_random(special, torch.zeros(1, dtype=torch.int64), 1).nan_to_num(5.0), special.nan_to_num(5.0)
    )
    again = round_at_random(values[100:200], torch.arange(100, 200), key=7)
    assert torch.equal(again, rounded[100:200])


# ---------------------------------------------------------------------------------------------------- communication


def collectives_of_a_step(rank: int, world: int, rate: float, joint: bool) -> list[tuple[str, int]]:
    head = PartialFC(D, 1000, ArcFace(), rate)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    x, labels = torch.randn(8, D, requires_grad=True), torch.arange(8)
    with collectives() as calls:
        (head(gather(x, labels)) if joint else head(x, labels)).backward()
        optimizer.step()
    return calls


@pytest.mark.parametrize("rate", [1.0, 0.1])
@pytest.mark.parametrize("joint", [False, True])
def test_a_step_makes_three_small_gathers_and_one_scatter(ranks, rate, joint):
    for calls in ranks(2).run(collectives_of_a_step, rate, joint):
        status, payload, statistics = 24 * 8, 8 * D * 4 + 8 * 8, 3 * 16 * 4
        assert calls[:-1] == [
            ("all_gather", status),
            ("all_gather", payload),
            *[("all_gather", status)] * joint,  # what all ranks must have alike travels with the status otherwise
            ("all_gather", statistics),
            ("reduce_scatter", 16 * D * 4),
        ]
        assert calls[-1][0] == "all_reduce", "two flags, since nobody has judged the step before"


# ---------------------------------------------------------------------------------------------- compile, profiler, mode


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_compiled_head_falls_back_without_an_error(rate):
    x, labels = torch.randn(4, D), torch.arange(4)
    heads = [PartialFC(D, 50, sample_rate=rate) for _ in range(2)]
    losses = [heads[0](x, labels), torch.compile(heads[1])(x, labels)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()


@pytest.mark.filterwarnings("default")
def test_a_compiled_backbone_beside_the_head_trains_the_same():
    x, labels = torch.randn(4, 3), torch.arange(4)
    grads = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        torch.manual_seed(0)
        backbone = nn.Linear(3, D)
        PartialFC(D, 50)(wrap(backbone)(x), labels).backward()
        grads.append(backbone.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11, of its own doing
def test_a_profile_shows_where_a_step_goes():
    head = PartialFC(D, 50, sample_rate=0.3)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        head(torch.randn(4, D, requires_grad=True), torch.arange(4)).backward()
        optimizer.step()
    names = {
        event.key.removeprefix("partial_fc::")
        for event in profile.key_averages()
        if event.key.startswith("partial_fc::")
    }
    assert names == {"gather", "select", "targets", "forward_tiles", "combine", "backward_tiles", "scatter", "update"}


def test_the_mode_is_chosen_by_the_budget_and_reported(caplog):
    caplog.set_level("INFO", "partial_fc")
    x, labels = torch.randn(4, D), torch.arange(4)
    head = PartialFC(D, 50, logits_budget=4 * 50 * 4)
    head(x, labels)
    assert head.logits_mode == "kept"
    head(torch.randn(5, D), torch.arange(5))
    assert head.logits_mode == "tiled"
    assert "logits are tiled: 1000 bytes of them on this rank, a budget of 800" in caplog.text


@pytest.mark.parametrize("margin", [ArcFace(), Softmax()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_again_for_a_second_backward(margin, dtype):
    """The first backward has written the gradient over the rows that forward gathered."""
    head = PartialFC(D, 50, margin, sample_rate=0.5, dtype=dtype)
    x, labels = torch.randn(4, D, requires_grad=True), torch.arange(4)
    loss = head(x, labels)
    seen = []
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert head.row_grad is not None
        seen.append((head.row_grad[1].clone(), x.grad))
        head.zero_grad()
        x.grad = None
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_memory_is_used_again_but_never_while_somebody_holds_it(rate):
    head = PartialFC(D, 50, sample_rate=rate)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    x, labels = torch.randn(4, D), torch.arange(4)

    def backward() -> Tensor:
        head(x, labels).backward()
        grad = head.row_grad[1] if head.row_grad else head.weight.grad
        optimizer.zero_grad()
        assert grad is not None
        return grad

    held = backward()
    before = held.clone()
    other = backward()
    assert torch.equal(held, before), "a gradient that is still held was overwritten"
    assert other.data_ptr() != held.data_ptr()
    address = other.data_ptr()
    del other
    assert backward().data_ptr() == address
    # two graphs at once have logits of their own
    batches = [(x, labels), (x.flip(1), labels.flip(0))]
    head.eval()  # all classes, so that both draws are one
    losses = [head(*each) for each in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    assert head.weight.grad is not None
    total = head.weight.grad.clone()
    optimizer.zero_grad()
    for each in batches:
        head(*each).backward()
    torch.testing.assert_close(head.weight.grad, total)
