"""A head with frozen parts, casts, copies, schedulers, compiled backbones, and ranks without data."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from shards import local
from torch import Tensor, nn

from partial_fc import ArcFace, NormFace, PartialFC, RowOptimizer, Softmax, gather, load_checkpoint, save_checkpoint

D = 6
SGD = {"lr": 0.1, "momentum": 0.9}


def batch(n: int = 4, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator), torch.randint(0, classes, (n,), generator=generator)


def one_rank_without_grad(rank: int, world: int, rate: float, joint: bool) -> None:
    """A rank without data brings an empty tensor that does not require grad; the others must not wait for it in
    backward."""
    head = PartialFC(D, 10, sample_rate=rate)
    x, labels = batch() if rank else (torch.empty(0, D), torch.empty(0, dtype=torch.int64))
    x.requires_grad_(rank > 0)
    (head(gather(x, labels)) if joint else head(x, labels)).backward()
    assert (x.grad is not None) == (rank > 0)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("joint", [False, True])
def test_a_rank_whose_embeddings_need_no_gradient_keeps_nobody_waiting(ranks, rate, joint):
    ranks(2).run(one_rank_without_grad, rate, joint, timeout=20)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_frozen_backbone_trains_the_head(rate):
    head = PartialFC(D, 10, sample_rate=rate)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    before = head.weight.detach().clone()
    head(*batch()).backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_frozen_head_passes_gradients_on_and_stays(rate):
    head = PartialFC(D, 10, sample_rate=rate)
    head.weight.requires_grad_(False)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    before = head.weight.detach().clone()
    for _ in range(2):
        x, labels = batch()
        head(x.requires_grad_(), labels).backward()
        assert x.grad is not None and x.grad.any()
        optimizer.step()
    assert torch.equal(head.weight, before)
    assert head.row_grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    head = PartialFC(D, 10)
    x, labels = batch()
    expected = head(x, labels).item()
    with mode():
        assert head(x, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_skipped_step_under_a_scaler(rate):
    head = PartialFC(D, 10, sample_rate=rate, on_nonfinite="skip")
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    scaler = torch.amp.GradScaler("cpu")
    before = head.weight.detach().clone()
    x, labels = batch()
    scaler.scale(head(torch.full_like(x, math.inf).requires_grad_(), labels)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert head.skipped
    assert torch.equal(head.weight, before)
    head.eval()
    head(x, labels)
    assert head.skipped, "an evaluation in between says nothing of the training step"


def moved(rank: int, world: int) -> None:
    """Moves and casts after the optimizer was built keep the parameters that it holds."""
    head = PartialFC(D, 10, Softmax())
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    parameter = head.weight
    head(*batch()).backward()
    head.float().to("cpu")
    assert head.weight is parameter and parameter.grad is not None, "a move to the same place changes nothing"
    optimizer.step()
    assert optimizer.state[head.weight]
    head.double()
    assert head.weight is parameter
    assert parameter.dtype == torch.float64 and local(parameter).dtype == torch.float64
    assert optimizer.param_groups[0]["params"][0] is parameter
    plain = torch.optim.SGD(head.parameters(), lr=0.1)
    head.float()
    before = local(head.weight).detach().clone()
    head(*batch()).backward()
    plain.step()
    assert not torch.equal(local(head.weight), before)


@pytest.mark.parametrize("world", [1, 2])
def test_moves_keep_the_parameters_identity(ranks, world):
    ranks(world).run(moved)


def test_a_copy_has_no_optimizer_until_it_gets_one():
    head = PartialFC(D, 10, sample_rate=0.5)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    twin = copy.deepcopy(head)
    twin(*batch()).backward()
    with pytest.raises(RuntimeError, match="RowOptimizer"):
        twin(*batch())
    own = RowOptimizer(torch.optim.SGD, twin, **SGD)
    before = twin.weight.detach().clone(), head.weight.detach().clone()
    own.step()
    assert not torch.equal(twin.weight, before[0])
    assert torch.equal(head.weight, before[1])
    assert optimizer.param_groups[0]["params"] is not own.param_groups[0]["params"]


def test_gradients_that_are_cleared_unused_again_and_again_raise():
    head = PartialFC(D, 10, sample_rate=0.5)
    with pytest.raises(RuntimeError, match="RowOptimizer"):
        for _ in range(4):
            head(*batch()).backward()
            head.zero_grad()


def test_gradients_that_are_not_cleared_after_a_step_are_told_of():
    head = PartialFC(D, 10, sample_rate=0.5)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    head(*batch()).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="call zero_grad"):
        head(*batch()).backward()


def test_states_go_to_another_dtype():
    first, second = PartialFC(D, 10), PartialFC(D, 10, dtype=torch.float64)
    optimizers = [RowOptimizer(torch.optim.AdamW, h, lr=0.1) for h in (first, second)]
    first(*batch()).backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    second(*batch()).backward()
    optimizers[1].step()
    assert optimizers[1].state[second.weight]["exp_avg"].dtype == torch.float64
    assert float(optimizers[1].state[second.weight]["step"]) == 2
    with pytest.raises(ValueError, match=r"\[10, 6\].*\[11, 6\]"):
        RowOptimizer(torch.optim.AdamW, PartialFC(D, 11), lr=0.1).load_state_dict(optimizers[0].state_dict())


def test_a_scheduler_may_change_momentum():
    head = PartialFC(D, 10)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.9
    head(*batch()).backward()
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[head.weight]


def test_reduction_none_counts_sample_weights_in_value_and_gradient():
    x, labels = batch()
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5])
    head = PartialFC(D, 10, reduction="none", dtype=torch.float64)
    plain, weighted = x.double().requires_grad_(), x.double().requires_grad_()
    losses = head(plain, labels)
    losses.sum().backward()
    scaled = head(gather(weighted, labels, sample_weights=weights))
    scaled.sum().backward()
    torch.testing.assert_close(scaled, losses * weights)
    assert plain.grad is not None and weighted.grad is not None
    torch.testing.assert_close(weighted.grad, plain.grad * weights.double()[:, None])


def test_a_label_of_weight_zero_is_no_target():
    x, labels = batch()
    head = PartialFC(D, 10)
    both = torch.stack((labels, (labels + 1) % 10), 1)
    mixed = head(gather(x, both, label_weights=torch.tensor([[1.0, 0.0]]).expand(4, 2)))
    torch.testing.assert_close(mixed, head(x, labels))


def test_small_probabilities_survive_float16_tiles():
    """With 4 million classes a probability of 1/C is below float16's range; its gradient must not be lost."""
    classes, n = 200_000, 4
    x, labels = torch.randn(n, D), torch.arange(n)
    grads = []
    for budget in (0, None):
        head = PartialFC(D, classes, NormFace(scale=0.01), logits_budget=budget)
        with torch.autocast("cpu", torch.float16):
            loss = head(x, labels)
        loss.backward()
        assert head.weight.grad is not None
        grads.append(head.weight.grad[n:])
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() < 2e-3


def compiled(x: Tensor, labels: Tensor, head: PartialFC) -> tuple[Tensor, Tensor]:
    backbone = nn.Linear(D, D)
    torch.manual_seed(3)
    nn.init.normal_(backbone.weight)
    nn.init.zeros_(backbone.bias)
    loss = head(torch.compile(backbone, backend="aot_eager")(x), labels)
    loss.backward()
    assert backbone.weight.grad is not None
    return loss.detach(), backbone.weight.grad


@pytest.mark.filterwarnings("default")
def test_a_compiled_backbone_works_beside_the_head():
    x, labels = batch()
    head = PartialFC(D, 10)
    loss, _ = compiled(x, labels, head)
    assert math.isfinite(loss.item())


def test_wrong_margins_are_named():
    with pytest.raises(TypeError, match="instance"):
        PartialFC(D, 10, ArcFace)  # type: ignore[arg-type]

    class Learned(ArcFace):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Parameter(torch.zeros(()))

    with pytest.raises(ValueError, match="Learned has parameters"):
        PartialFC(D, 10, Learned())


def different_settings(rank: int, world: int) -> str:
    try:
        PartialFC(D, 10, ArcFace(margin=0.5 if rank else 0.4))
    except ValueError as error:
        return str(error)
    return "built"


def test_ranks_that_build_different_heads_are_told(ranks):
    texts = ranks(2).run(different_settings)
    assert len(set(texts)) == 1 and "margin.m2 is 0.4 on rank 0 and 0.5 on rank 1" in texts[0]


def on_another_default(rank: int, world: int) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return local(PartialFC(D, 10).weight).detach().float()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_seed_means_the_same_weights_under_any_default_dtype(ranks):
    (weight,) = ranks(1).run(on_another_default)
    assert torch.equal(weight, PartialFC(D, 10).weight.detach())


def test_to_empty_and_reset():
    with torch.device("meta"):
        head = PartialFC(D, 10, Softmax())
    head.to_empty(device="cpu")
    head.reset_parameters()
    assert torch.equal(head.weight, PartialFC(D, 10).weight)
    assert head.bias is not None and not head.bias.any()


def test_checkpoints_of_a_frozen_and_an_untrained_head(tmp_path):
    head = PartialFC(D, 10, sample_rate=0.5)
    optimizer = RowOptimizer(torch.optim.AdamW, head, lr=0.1)
    save_checkpoint(tmp_path, head=head, optimizer=optimizer)
    load_checkpoint(tmp_path, head=head, optimizer=optimizer)
    head(*batch()).backward()
    optimizer.step()
    assert float(optimizer.state[head.weight]["step"]) == 1
