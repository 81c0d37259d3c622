"""Forwards that are not steps: called again in backward, in eval() where rows do not move, transformed, never trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as cp
from common import any_message_of, message_of
from shards import local
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, jacrev, vmap

from partial_fc import (
    ArcFace,
    CenterLoss,
    CurricularFace,
    PartialFC,
    RowOptimizer,
    SphereFace2,
    check_gradients,
    clip_grad_norm_,
    gather,
)
from partial_fc.engines.joint import JointOptimizer

D, C = 6, 40
LABELS = torch.tensor([0, 13, 25, 39])


def embeddings(rank: int = 0, seed: int = 0) -> Tensor:
    return torch.randn(4, D, generator=torch.Generator().manual_seed(10 * seed + rank), requires_grad=True)


def sampled(**options: Any) -> tuple[PartialFC, RowOptimizer]:
    head = PartialFC(D, C, CurricularFace(scale=16.0), 0.3, init_std=1.0, **options)
    return head, RowOptimizer(torch.optim.SGD, head, lr=0.1)


# ----------------------------------------------------------------------------------------------------- checkpointing


class Call(nn.Module):
    """A loss with its labels, as a module of one argument."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x, LABELS)


class ByHand(torch.autograd.Function):
    """Recomputation without torch.utils.checkpoint: nothing tells before backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        result: Tensor = function(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return x.grad, None


def deepspeed_checkpoint(function: Any, x: Tensor) -> Tensor:
    from partial_fc.engines.deepspeed import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.activation_checkpointing import checkpointing

    result: Tensor = checkpointing.checkpoint(function, x)
    return result


def transformers_checkpoint(function: nn.Module, x: Tensor) -> Tensor:
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = function

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    layer = Layer()  # in train(), whatever the loss is in
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda f, *arguments: cp.checkpoint(f, *arguments, use_reentrant=False)
    result: Tensor = layer(x)
    return result


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda f, x: cp.checkpoint(f, x, use_reentrant=True),  # type: ignore[no-any-return]
    "not reentrant": lambda f, x: cp.checkpoint(f, x, use_reentrant=False),  # type: ignore[no-any-return]
    "sequential": lambda f, x: cp.checkpoint_sequential(nn.Sequential(f, nn.Identity()), 2, x, use_reentrant=False),  # type: ignore[no-any-return]
    "wrapper": lambda f, x: checkpoint_wrapper(f)(x),  # type: ignore[no-any-return]
    "composable": lambda f, x: composable(nn.Sequential(f))(x),
    "nested": lambda f, x: cp.checkpoint(lambda y: cp.checkpoint(f, y, use_reentrant=False), x, use_reentrant=True),  # type: ignore[no-any-return]
    "deepspeed": deepspeed_checkpoint,
    "transformers": transformers_checkpoint,
}


def state_of(loss: Any) -> list[Any]:
    """All that a forward counts, draws or moves."""
    record = loss.class_rows.record
    state = [getattr(loss, "forward_count", 0), getattr(loss, "_pending", None), getattr(loss, "selected_rows", None)]
    state += [loss._seen_batch, record.finished, record.bad_forward, record.skips, loss.class_rows.grad_rows]
    return [*state, *(b.item() for b in loss.buffers() if b.ndim == 0)]


def checkpointed(rank: int, world: int, names: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """What each loss says in each kind of checkpoint; in eval() all work."""
    losses: dict[str, Any] = {
        "sampled": sampled()[0],
        "exact": PartialFC(D, C, ArcFace(), init_std=1.0),
        "center": CenterLoss(D, C),
    }
    optimizer = RowOptimizer(torch.optim.SGD, losses["sampled"], lr=0.1)
    found = {}
    for name in names:
        for kind, loss in losses.items():
            if kind == "exact" and "reentrant" not in name:
                continue
            calls: list[Any] = [Call(loss)]
            if name in ("reentrant", "not reentrant"):
                calls.append(Call(lambda x, labels, loss=loss: loss(gather(x, labels))))
            for call in calls:
                before = state_of(loss)
                found[name, kind] = message_of(WAYS[name], call, embeddings(rank))
                after = state_of(loss)
                assert all(a is b or a == b for a, b in zip(before, after, strict=True)), (name, kind)
                loss.eval()
                inside, outside = embeddings(rank), embeddings(rank)
                result = WAYS[name](call, inside)
                assert state_of(loss)[0] == before[0]
                result.sum().backward()
                call(outside).backward()
                torch.testing.assert_close(inside.grad, outside.grad)
                loss.train()
                loss.zero_grad()
    optimizer.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("names", [tuple(WAYS)[:-2], tuple(WAYS)[-2:]])
def test_a_head_inside_a_checkpoint_is_refused_before_it_counts(ranks, names):
    for found in ranks(2).run(checkpointed, names, timeout=150.0):  # engines take their time to import
        for (name, kind), text in found.items():
            owner = "CenterLoss" if kind == "center" else "PartialFC"
            assert text.startswith("RuntimeError: "), (name, kind, text)
            assert f"this {owner} in train() is called inside activation checkpointing" in text
            assert "Checkpoint the backbone alone" in text
            assert "logits_budget" in text


def one_rank_checkpoints(rank: int, world: int) -> str:
    head, _ = sampled()
    x = embeddings(rank)
    if rank:
        return message_of(cp.checkpoint, head, x, LABELS, use_reentrant=False)
    return message_of(head, x, LABELS)


def test_what_one_rank_checkpoints_all_refuse(ranks):
    first, second = ranks(2).run(one_rank_checkpoints)
    assert first == second
    assert first.startswith("RuntimeError: rank 1: this PartialFC in train() is called inside activation checkpointing")


def backbone_checkpointed(rank: int, world: int) -> None:
    """A checkpointed backbone with head and center loss outside trains as one that is not checkpointed."""
    for joint in (False, True):
        grads = []
        for way in (None, "reentrant", "not reentrant", "wrapper"):
            torch.manual_seed(0)
            backbone = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
            head, optimizer = sampled()
            center = CenterLoss(D, C)
            x = embeddings(rank)
            features = backbone(x) if way is None else WAYS[way](backbone, x)
            batch = gather(features, LABELS)
            loss = head(batch) + center(batch) if joint else head(features, LABELS) + center(features, LABELS)
            loss.backward()
            clip_grad_norm_(backbone.parameters(), head, center, max_norm=1.0)
            optimizer.step()
            center.step()
            assert head.forward_count == 1
            grads.append([p.grad for p in backbone.parameters()] + [local(head.weight.detach()), local(center.centers)])
        for other in grads[1:]:
            torch.testing.assert_close(other, grads[0])


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpointed_backbone_keeps_working(ranks, world):
    ranks(world).run(backbone_checkpointed)


def test_a_batch_gathered_inside_a_reentrant_checkpoint_is_refused_outside():
    """It has no way back to the backbone, which would not be trained."""
    head, _ = sampled()
    x = embeddings()
    batch = cp.checkpoint(lambda x: gather(x, LABELS), x, use_reentrant=True)
    assert "gathered inside activation checkpointing" in message_of(head, batch)
    batch = cp.checkpoint(lambda x: gather(2 * x, LABELS), x, use_reentrant=False)
    head(batch).backward()
    assert x.grad is not None
    with torch.no_grad():  # features of a frozen backbone
        batch = gather(x, LABELS)
    head(batch).backward()


def by_hand(rank: int, world: int) -> str:
    head, _ = sampled()
    loss = ByHand.apply(embeddings(rank), Call(head))
    before = state_of(head)
    said = message_of(loss.backward)
    assert state_of(head) == before
    return said


def test_recomputation_by_hand_is_refused_in_backward(ranks):
    for said in ranks(2).run(by_hand):
        assert said.startswith("RuntimeError: this PartialFC in train() is called inside a backward pass")


def test_without_torchs_private_functions_frames_are_enough(monkeypatch):
    from partial_fc.distributed import forwards

    for name in ("_top_saved_tensors_default_hooks", "_current_graph_task_id", "peek_interpreter_stack"):
        for place in (torch._C, torch._C._autograd, torch._C._functorch):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, lambda *arguments: "something else")
    forwards.surroundings.cache_clear()
    try:
        head, _ = sampled()
        for reentrant in (False, True):
            said = message_of(cp.checkpoint, head, embeddings(), LABELS, use_reentrant=reentrant)
            assert "inside activation checkpointing" in said
        head(embeddings(), LABELS).backward()
    finally:
        monkeypatch.undo()
        forwards.surroundings.cache_clear()


def test_hooks_that_save_tensors_elsewhere_are_no_checkpoint():
    head, _ = sampled()
    with torch.autograd.graph.save_on_cpu():
        head(embeddings(), LABELS).backward()
    with torch.no_grad():
        head(embeddings(), LABELS)
    assert head.forward_count == 2


# ------------------------------------------------------------------------------------------------------------- eval()


def center_of(update: Any) -> tuple[CenterLoss, Any]:
    center = CenterLoss(D, C, update=update)
    return center, RowOptimizer(torch.optim.SGD, center, lr=0.1) if update == "gradient" else None


def early() -> tuple[PartialFC, RowOptimizer]:
    head = PartialFC(D, C, ArcFace(), init_std=1.0)
    return head, RowOptimizer(torch.optim.SGD, head, lr=0.1, update_in_backward=True)


def decisions() -> tuple[PartialFC, RowOptimizer]:
    head = PartialFC(D, C, SphereFace2(), 0.3, init_std=1.0)
    return head, RowOptimizer(torch.optim.SGD, head, lr=0.1)


UNTRAINED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "sampled": sampled,
    "update_in_backward": early,
    "SphereFace2": decisions,
    "center, paper": lambda: center_of("paper"),
    "center, gradient": lambda: center_of("gradient"),
}


def trained_in_eval(rank: int, world: int, only_one: bool) -> dict[str, list[str]]:
    """What clipping, checking and stepping say after a backward in eval(), and that nothing moved."""
    found: dict[str, list[str]] = {}
    for name, build in UNTRAINED.items():
        for on_nonfinite in ("raise", "log"):
            loss, optimizer = build()
            loss.on_nonfinite = on_nonfinite
            before = [local(p.detach()).clone() for p in loss.parameters()]
            step = loss.step if optimizer is None else optimizer.step
            loss.eval()
            loss(embeddings(rank), LABELS).backward()
            if name != "update_in_backward":
                found.setdefault(name, []).append(message_of(clip_grad_norm_, [], loss, max_norm=1.0))
            found.setdefault(name, []).append(message_of(check_gradients, [], loss))
            found[name].append(message_of(step))
            for parameter, value in zip(loss.parameters(), before, strict=True):
                assert torch.equal(local(parameter.detach()), value)
            (loss if optimizer is None else optimizer).zero_grad()
            loss.train()
            loss(embeddings(rank), LABELS).backward()
            assert check_gradients([], loss)
            step()
            assert not torch.equal(local(next(loss.parameters()).detach()), before[0])
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_in_eval_that_is_trained_is_refused(ranks, world):
    for found in ranks(world).run(trained_in_eval, False):
        for name, texts in found.items():
            owner = "CenterLoss" if name.startswith("center") else "PartialFC"
            for text in texts:
                assert text.startswith(f"RuntimeError: the loss of a {owner} in eval() was trained"), (name, text)
                assert "call train()" in text and "zero_grad()" in text


def one_rank_in_eval(rank: int, world: int) -> str:
    center, _optimizer = center_of("gradient")
    center.train(rank == 0)
    return message_of(center, embeddings(rank), LABELS)


def test_what_one_rank_trains_in_eval_all_refuse(ranks):
    first, second = ranks(2).run(one_rank_in_eval)
    assert first == second
    assert first.startswith("ValueError: ranks disagree: mode is train() on rank 0 and eval() on rank 1")


def test_a_joint_optimizer_refuses_before_the_backbone_moves():
    backbone, (head, optimizer) = nn.Linear(D, D), sampled()
    joint = JointOptimizer(torch.optim.SGD(backbone.parameters(), lr=0.1), optimizer)
    before = backbone.weight.detach().clone()
    for on_nonfinite in ("raise", "log"):
        head.on_nonfinite = on_nonfinite
        head.eval()
        head(backbone(embeddings()), LABELS).backward()
        assert "in eval() was trained" in message_of(joint.step)
        assert torch.equal(backbone.weight.detach(), before)
        joint.zero_grad()


def test_a_gradient_by_the_input_in_eval_keeps_working():
    """By autograd.grad it is no training at all; by backward() it is forgotten with the gradients."""
    head, optimizer = sampled()
    center, _ = center_of("paper")

    def attack() -> Tensor:
        head.eval(), center.eval()
        x = embeddings()
        (gradient,) = torch.autograd.grad(head(x, LABELS) + center(x, LABELS), x)
        head.train(), center.train()
        return gradient

    def step() -> None:
        (head(embeddings(), LABELS) + center(embeddings(), LABELS)).backward()
        clip_grad_norm_([], head, center, max_norm=1.0)
        optimizer.step()
        center.step()

    assert attack().any()
    step()
    optimizer.zero_grad()
    head.eval()
    head(embeddings(), LABELS).backward()  # a saliency map
    optimizer.zero_grad()
    head.train()
    attack()
    step()
    head.requires_grad_(False).eval()  # a frozen head that trains a backbone
    optimizer.zero_grad()
    head(embeddings(), LABELS).backward()
    clip_grad_norm_([], head, max_norm=1.0)


def test_an_exact_head_in_eval_is_trained_as_before():
    rows = []
    for training in (True, False):
        head = PartialFC(D, C, ArcFace(), init_std=1.0).train(training)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        head(embeddings(), LABELS).backward()
        clip_grad_norm_([], head, max_norm=1.0)
        optimizer.step()
        rows.append(head.weight.detach().clone())
    assert torch.equal(*rows)


def test_a_scaler_that_steps_a_head_trained_in_eval_says_so():
    head, optimizer = sampled()
    scaler = torch.amp.GradScaler("cpu")
    head.eval()
    scaler.scale(head(embeddings(), LABELS)).backward()
    assert "in eval() was trained" in message_of(scaler.step, optimizer)


# ------------------------------------------------------------------------------------- losses that are used otherwise


def gradient_of(loss: Any) -> Tensor:
    """Of all rows of a head or center loss, 0 where there is none."""
    rows = loss.class_rows
    whole = torch.zeros_like(local(rows.main.detach()))
    if rows.sampled and rows.grad_rows is not None:
        whole[rows.grad_rows] = rows.gradients()[0]
    elif not rows.sampled and rows.main.grad is not None:
        whole = local(rows.main.grad).clone()
    return whole


def plainly_sampled() -> tuple[PartialFC, RowOptimizer]:
    head = PartialFC(D, C, ArcFace(), 0.3, init_std=1.0)
    return head, RowOptimizer(torch.optim.SGD, head, lr=0.1)


BUILDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "sampled": plainly_sampled,
    "exact": lambda: (PartialFC(D, C, ArcFace(), init_std=1.0), None),
    "center": lambda: center_of("gradient"),
}


def used_otherwise(rank: int, world: int) -> None:
    """Backward twice, of one of two forwards, of a sum of two: gradients add up as those of any module."""
    for name, build in BUILDS.items():
        alone = []
        for seed in (0, 1):
            loss, _optimizer = build()
            if name == "sampled":
                loss.forward_count = seed
            loss(embeddings(rank, seed), LABELS).backward()
            alone.append(gradient_of(loss))
        loss, _optimizer = build()
        first, second = (loss(embeddings(rank, seed), LABELS) for seed in (0, 1))
        second.backward()
        torch.testing.assert_close(gradient_of(loss), alone[1], msg=f"{name}: one of two")
        first.backward(retain_graph=True)
        torch.testing.assert_close(gradient_of(loss), alone[0] + alone[1], msg=f"{name}: both")
        first.backward()
        torch.testing.assert_close(gradient_of(loss), 2 * alone[0] + alone[1], msg=f"{name}: twice")
        loss, _optimizer = build()
        total = loss(embeddings(rank, 0), LABELS) + loss(embeddings(rank, 1), LABELS)
        total.backward()
        torch.testing.assert_close(gradient_of(loss), alone[0] + alone[1], msg=f"{name}: a sum")
        # a loss without backward leaves nothing behind
        before = gradient_of(loss)
        loss(embeddings(rank, 2), LABELS)
        assert torch.equal(gradient_of(loss), before)
        # a gradient by the embeddings alone is none of the rows
        loss, _optimizer = build()
        x = embeddings(rank)
        (of_x,) = torch.autograd.grad(loss(x, LABELS), x)
        assert of_x.any() and not gradient_of(loss).any(), name
        if name == "sampled":
            loss.forward_count = 0
        loss(x, LABELS).backward(inputs=[x])
        assert not gradient_of(loss).any(), name
        torch.testing.assert_close(x.grad, of_x)
        # that by the rows as well is, as without inputs
        (weight,) = loss.class_rows.parameters.values()
        if name == "sampled":
            loss.forward_count = 0
        loss(x, LABELS).backward(inputs=[x, weight])
        torch.testing.assert_close(gradient_of(loss), alone[0], msg=f"{name}: inputs")
        if name != "exact":
            by_rows = message_of(torch.autograd.grad, loss(x, LABELS), weight)
            assert "cannot give the gradient by the rows" in by_rows, name
            assert torch.equal(gradient_of(loss), alone[0]), name


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_of_rows_add_up_as_those_of_any_module(ranks, world):
    ranks(world).run(used_otherwise)


def test_rows_do_not_move_inside_a_gradient_by_the_embeddings():
    head, optimizer = early()
    before = head.weight.detach().clone()
    x = embeddings()
    torch.autograd.grad(head(x, LABELS), x)
    assert torch.equal(head.weight.detach(), before)
    head(x, LABELS).backward(inputs=[x, head.weight])
    optimizer.step()
    assert not torch.equal(head.weight.detach(), before)
    optimizer.zero_grad()
    total = head(x, LABELS) + head(x, LABELS)
    assert "accumulation over micro-batches" in message_of(total.backward)


@pytest.mark.parametrize("name", BUILDS)
def test_a_loss_without_a_graph_says_what_torch_says(name):
    loss, _optimizer = BUILDS[name]()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            result = loss(embeddings(), LABELS)
        assert "does not require grad" in message_of(result.backward)
    loss(embeddings(), LABELS).backward()
    assert gradient_of(loss).any()


def test_margins_that_moved_in_inference_mode_train_on():
    head, optimizer = sampled()
    center, _ = center_of("paper")
    with torch.inference_mode():
        head(embeddings(), LABELS)
        center(embeddings(), LABELS)
    (head(embeddings(), LABELS) + center(embeddings(), LABELS)).backward()
    clip_grad_norm_([], head, center, max_norm=1.0)
    optimizer.step()
    center.step()


def transformed(rank: int, world: int) -> list[str]:
    head, _ = sampled()
    exact, center = PartialFC(D, C, ArcFace(), init_std=1.0), CenterLoss(D, C)
    x = embeddings(rank).detach()
    said = []
    for loss in (head, exact, center, lambda x, labels: gather(x, labels).embeddings.sum()):
        if not isinstance(loss, PartialFC | CenterLoss):
            modes: tuple[Any, ...] = (None,)
        else:
            modes = (True, False)
        for mode in modes:
            if mode is not None:
                loss.train(mode)  # type: ignore[union-attr]
            said.append(any_message_of(grad(loss), x, LABELS))
            said.append(any_message_of(jacrev(loss), x, LABELS))
            said.append(any_message_of(vmap(loss), x[:, None], LABELS[:, None]))
            said.append(any_message_of(torch.func.jvp, lambda x, loss=loss: loss(x, LABELS), (x,), (x,)))
    assert head.forward_count == 0
    return said


def test_transforms_of_a_loss_are_refused_in_words(ranks):
    for said in ranks(2).run(transformed):
        for text in said:
            assert text.startswith("RuntimeError: a ") and "cannot be transformed by torch.func" in text, text


def test_a_functional_call_works_or_is_refused():
    exact = PartialFC(D, C, ArcFace(), init_std=1.0)
    weight = (2 * exact.weight.detach()).requires_grad_()
    functional_call(exact, {"weight": weight}, (embeddings(), LABELS)).backward()
    assert weight.grad is not None and exact.weight.grad is None
    for build in (sampled, early):
        head, _optimizer = build()
        weight = head.weight.detach().clone().requires_grad_()
        said = message_of(functional_call, head, {"weight": weight}, (embeddings(), LABELS))
        assert "functional_call gave this head another weight" in said
        head.eval()
        functional_call(head, {"weight": weight}, (embeddings(), LABELS)).backward()
        assert weight.grad is not None
