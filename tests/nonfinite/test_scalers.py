"""GradScalers that were told half: who has not been unscaled is named, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import message_of
from shards import local
from torch import Tensor, nn

from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer, check_gradients, clip_grad_norm_, gather

D, C = 6, 40
LABELS = torch.arange(4)
SAMPLED, EXACT, CENTER = (
    f"scaler.unscale_(the optimizer of this {owner})" for owner in ("PartialFC", "PartialFC", "CenterLoss")
)
BACKBONE = "scaler.unscale_(the optimizer of the backbone)"


class Loop:
    """A backbone with two optimizers, a sampled and an exact head, a center loss, a scaler; after its backward."""

    def __init__(self, rank: int = 0, enabled: bool = True, on_nonfinite: Any = "raise") -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        self.heads = {
            "sampled": PartialFC(D, C, ArcFace(), 0.3, init_std=1.0, on_nonfinite=on_nonfinite),
            "exact": PartialFC(D, C, ArcFace(), init_std=1.0, on_nonfinite=on_nonfinite),
            "center": CenterLoss(D, C, update="gradient", on_nonfinite=on_nonfinite),
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: RowOptimizer(torch.optim.SGD, head, lr=0.1) for name, head in self.heads.items()
        }
        self.optimizers["first"] = torch.optim.SGD(self.backbone[0].parameters(), lr=0.1)
        self.optimizers["second"] = torch.optim.SGD(self.backbone[1].parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        self.backward(rank)

    def backward(self, rank: int) -> None:
        x = torch.randn(4, D, generator=torch.Generator().manual_seed(rank))
        batch = gather(self.backbone(x), LABELS)
        self.scaler.scale(sum(head(batch) for head in self.heads.values())).backward()

    def unscale(self, *names: str) -> None:
        for name in names:
            self.scaler.unscale_(self.optimizers[name])

    def clip(self) -> Tensor:
        return clip_grad_norm_(self.backbone.parameters(), *self.heads.values(), max_norm=5.0, scaler=self.scaler)

    def check(self) -> bool:
        return check_gradients(self.backbone.parameters(), *self.heads.values(), scaler=self.scaler)

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()


ALL = ("sampled", "exact", "center", "first", "second")
FORGOTTEN: dict[tuple[str, ...], list[str]] = {
    ("sampled",): [SAMPLED],
    ("exact",): [EXACT],
    ("center",): [CENTER],
    ("exact", "center"): [EXACT, CENTER],
    ("first",): ["the optimizer of the backbone, which holds 2 of the 4 parameters given"],
    ("first", "second"): [BACKBONE],
    ALL: [SAMPLED, EXACT, CENTER, BACKBONE],
}


def told_half(rank: int, world: int) -> None:
    for on_nonfinite in ("raise", "log"):
        for forgotten, calls in FORGOTTEN.items():
            loop = Loop(rank, on_nonfinite=on_nonfinite)
            loop.unscale(*(name for name in ALL if name not in forgotten))
            for function in (loop.clip, loop.check):
                said = message_of(function)
                assert said.startswith("RuntimeError: scaler.unscale_() was not called for every optimizer"), said
                assert all(call in said for call in calls), (forgotten, said)
                assert said.count("unscale_(the ") == len(calls), (forgotten, said)
            loop.unscale(*forgotten)  # what it asks for is enough
            loop.clip()
            loop.step()
            loop.backward(rank)
            loop.unscale(*ALL)
            assert loop.check()
            loop.step()


@pytest.mark.parametrize("world", [1, 2])
def test_a_scaler_that_was_told_half(ranks, world):
    ranks(world).run(told_half)


def one_rank_forgets(rank: int, world: int) -> str:
    loop = Loop(rank)
    loop.unscale(*(name for name in ALL if rank == 0 or name != "first"))
    return message_of(loop.clip)


def test_what_one_rank_forgets_all_refuse(ranks):
    first, second = ranks(2).run(one_rank_forgets)
    assert first == second
    assert first.startswith("RuntimeError: rank 1: scaler.unscale_() was not called for every optimizer")


def test_nothing_to_tell():
    """A disabled scaler, one that never scaled, none, parameters without gradients, a loss without any."""
    loop = Loop(enabled=False)
    loop.clip()
    assert loop.check()
    loop.step()
    loop.scaler = torch.amp.GradScaler("cpu")
    sum(p.sum() for p in loop.backbone.parameters()).backward()  # type: ignore[union-attr]
    loop.clip()
    loop.scaler = None  # type: ignore[assignment]
    loop.clip()
    loop = Loop()
    loop.unscale("sampled", "exact", "center")
    for parameter in loop.backbone.parameters():
        parameter.grad = None
    loop.clip()
    loop = Loop()
    loop.optimizers["sampled"].zero_grad()
    loop.unscale("exact", "center", "first", "second")
    loop.clip()


def test_no_head_at_all():
    loop = Loop()
    parameters = list(loop.backbone.parameters())
    said = message_of(clip_grad_norm_, parameters, max_norm=1.0, scaler=loop.scaler)
    assert BACKBONE in said
    loop.unscale("first", "second")
    clip_grad_norm_(parameters, max_norm=1.0, scaler=loop.scaler)


def test_twice_is_refused_by_torch():
    loop = Loop()
    loop.unscale("sampled")
    assert "unscale_() has already been called" in message_of(loop.unscale, "sampled")


def test_a_plain_optimizer_of_an_exact_head():
    head, backbone = PartialFC(D, C, ArcFace(), init_std=1.0), nn.Linear(D, D)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (head, backbone)]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(head(backbone(torch.randn(4, D)), LABELS)).backward()
    scaler.unscale_(optimizers[1])
    assert SAMPLED in message_of(clip_grad_norm_, backbone.parameters(), head, max_norm=1.0, scaler=scaler)
    scaler.unscale_(optimizers[0])
    clip_grad_norm_(backbone.parameters(), head, max_norm=1.0, scaler=scaler)


class Unknown:
    """What another library calls a scaler, with states that nobody here knows."""

    _per_optimizer_states = {1: "unscaled"}

    def is_enabled(self) -> bool:
        return True


def test_a_scaler_that_nobody_knows_is_believed():
    loop = Loop(enabled=False)
    loop.scaler = Unknown()  # type: ignore[assignment]
    loop.clip()


def test_states_of_another_form_are_not_believed(monkeypatch):
    loop = Loop()
    loop.scaler._per_optimizer_states = {1: "unscaled"}  # type: ignore[assignment]
    loop.clip()


# ---------------------------------------------------------------------------------- an optimizer that steps by itself


def stepped_directly(rank: int, world: int) -> list[str]:
    other = torch.amp.GradScaler("cpu", init_scale=256.0)
    other.scale(torch.ones(()))  # of another loss
    loop = Loop(rank)
    said = [message_of(loop.optimizers[name].step) for name in ("sampled", "exact", "center")]
    for name in ("sampled", "exact", "center"):
        loop.scaler.step(loop.optimizers[name])  # what it asks for
        assert local(next(loop.heads[name].parameters()).detach()).abs().max() < 100
    return said


def test_a_step_past_the_scaler_is_refused(ranks):
    for said in ranks(2).run(stepped_directly):
        for text, owner in zip(said, ("PartialFC", "PartialFC", "CenterLoss"), strict=True):
            assert text.startswith(f"RuntimeError: the loss of this {owner} was scaled by a GradScaler (65536)"), text
            assert "call scaler.step(optimizer)" in text


def test_a_second_scaler_beside_that_of_the_step_is_no_mistake():
    other = torch.amp.GradScaler("cpu", init_scale=256.0)
    other.scale(torch.ones(()))
    loop = Loop()
    loop.step()  # the scaler of the loop unscales before each optimizer
    assert all(local(p.detach()).abs().max() < 100 for head in loop.heads.values() for p in head.parameters())
    assert other.get_scale() == 256


def test_rows_that_moved_past_the_scaler_say_so():
    head = PartialFC(D, C, ArcFace(), init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=1e-6, update_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(head(torch.randn(4, D, requires_grad=True), LABELS)).backward()
    assert "update_in_backward cannot be joined with a GradScaler" in message_of(optimizer.step)


def test_large_losses_and_scalers_of_others_are_no_mistake():
    others = torch.amp.GradScaler("cpu")
    others.scale(torch.ones(()))
    head = PartialFC(D, C, ArcFace(), 0.3, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    for factor in (1.0, 1e6, 1e-3):
        (factor * head(torch.randn(4, D), LABELS)).backward()
        optimizer.step() if factor < 1e6 else optimizer.zero_grad()
        optimizer.zero_grad()
    (float("inf") * head(torch.randn(4, D), LABELS)).backward()
    assert message_of(optimizer.step).startswith("NonFiniteError")  # no scale is infinite
    optimizer.zero_grad()
    del others
    (1e6 * head(torch.randn(4, D), LABELS)).backward()  # no scaler is there
    optimizer.step()
