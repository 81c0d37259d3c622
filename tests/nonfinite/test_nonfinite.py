"""Non-finite losses and gradients: all ranks agree before anything moves; skipped steps change nothing; limits."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import message_of
from shards import local
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from watching import collectives

from partial_fc import (
    AdaFace,
    ArcFace,
    CenterLoss,
    CurricularFace,
    NonFiniteError,
    PartialFC,
    RowOptimizer,
    Softmax,
    check_gradients,
    clip_grad_norm_,
    gather,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.distributed.agreement import on_every_rank
from partial_fc.margins.positives import Positives

D, C, LOCAL = 6, 10, 4
NAN, INF = float("nan"), float("inf")


class Loop:
    """A user's own loop: a backbone that all ranks hold alike and average the gradients of, a head, a center loss on
    the same batch.

    how: what judges a step: "clip", "check", or "step" (the head's optimizer alone).
    """

    def __init__(
        self, rank: int, world: int, how: str, rate: float = 1.0, mesh: Any = None, center: bool = False, **options: Any
    ) -> None:
        self.rank, self.world, self.how = rank, world, how
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, D)
        self.optimizer = torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)
        self.head = PartialFC(D, C, ArcFace(8.0), rate, group=mesh, init_std=1.0, **{"on_nonfinite": "skip", **options})
        self.center = CenterLoss(D, C, group=mesh, init_std=1.0, on_nonfinite="skip") if center else None
        self.head_optimizer = RowOptimizer(torch.optim.AdamW, self.head, lr=0.1)

    def share(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * number + self.rank)
        return torch.randn(LOCAL, D, generator=generator), torch.randint(C, (LOCAL,), generator=generator)

    def losses(self) -> list[Any]:
        return [self.head] if self.center is None else [self.head, self.center]

    def micro(self, number: int, bad: str = "") -> None:
        """Forward and backward; bad: what is broken on the last rank."""
        x, labels = self.share(number)
        last = self.rank == self.world - 1
        if bad == "embedding" and last:
            x[1, 2] = NAN
        embeddings = self.backbone(x)
        if bad == "backbone" and last:
            embeddings.register_hook(lambda grad: grad * INF)
        batch = gather(embeddings, labels, group=self.head.shards.ranks.mesh)
        loss = self.head(batch)
        if self.center is not None:
            loss = loss + 0.1 * self.center(batch)
        if bad == "loss":
            loss = loss * INF
        loss.backward()
        if bad == "rows" and last:
            grads = [local(c.grad) for c in self.head.class_rows.carriers if len(local(c.grad))]
            if grads:
                grads[0][0, 1] = INF

    def step(self, number: int, bad: str = "", micro: int = 1) -> bool:
        """One step of micro-batches, of which the first is bad; whether it was taken."""
        for k in range(micro):
            self.micro(10 * number + k, bad if k == 0 else "")
        if self.world > 1:
            for parameter in self.backbone.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world
        if self.how == "clip":
            clip_grad_norm_(self.backbone.parameters(), *self.losses(), max_norm=5.0)
        elif self.how == "check":
            assert check_gradients(self.backbone.parameters(), *self.losses()) is not self.head.skipped
        self.head_optimizer.step()
        skipped = self.head.skipped
        if (
            not skipped or self.how != "step"
        ):  # where gradients were forgotten, an optimizer that is stepped nevertheless does nothing
            self.optimizer.step()
        if self.center is not None:
            self.center.step()
        self.optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        assert self.head.skipped == skipped
        return not skipped

    def state(self) -> list[Tensor]:
        """All that a step moves, copied."""
        found = [
            p.detach() for p in (*self.backbone.parameters(), *(p for loss in self.losses() for p in loss.parameters()))
        ]
        for optimizer in (self.optimizer, self.head_optimizer):
            found += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return [local(each).clone() for each in found]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------- skipped steps leave no trace

HOWS = {
    "clip": ("embedding", "backbone", "loss", "rows"),
    "check": ("embedding", "backbone", "loss", "rows"),
    "step": ("embedding", "rows"),
}


def skipped_runs(rank: int, world: int, rates: tuple[float, ...], replicas: int, micro: int) -> int:
    """A good step, bad ones, a good one; weights and state stay through every bad one, and end as those of a run that
    never saw them."""
    mesh = init_device_mesh("cpu", (replicas, world // replicas)) if replicas > 1 else None
    bad_steps = 0
    for rate in rates:
        for how, kinds in HOWS.items():
            center = how != "step"  # the head's optimizer tells the centers nothing
            loop, other = (Loop(rank, world, how, rate, mesh, center) for _ in range(2))
            assert loop.step(0, micro=micro) and other.step(0, micro=micro)
            for number, bad in enumerate(kinds, 1):
                before = loop.state()
                assert not loop.step(number, bad, micro), (rate, how, bad)
                assert same(before, loop.state()), (rate, how, bad)
                assert loop.head.skips == number and (not center or loop.center.skips == number)  # type: ignore[union-attr]
                bad_steps += 1
            other.head.forward_count += micro * len(kinds)  # the forwards of skipped steps count
            assert loop.step(9, micro=micro) and other.step(9, micro=micro)
            assert not same(before, loop.state()) and same(loop.state(), other.state()), (rate, how)
            assert loop.head.skips == len(kinds) and not loop.head.skipped
    return bad_steps


@pytest.mark.parametrize(("world", "replicas"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_a_skipped_step_leaves_no_trace(ranks, world, replicas):
    assert ranks(world).run(skipped_runs, (1.0, 0.5), replicas, 1, timeout=120) == [20] * world


def test_one_bad_micro_batch_leaves_the_whole_step_out(ranks):
    assert ranks(2).run(skipped_runs, (1.0, 0.5), 1, 2, timeout=120) == [20, 20]


# ----------------------------------------------------------------------------------------------- errors say what it was


def raised(rank: int, world: int, how: str, bad: str, rate: float) -> tuple[str, bool]:
    loop = Loop(rank, world, how, rate, on_nonfinite="raise")
    assert loop.step(0)
    before = loop.state()
    if bad == "weight":
        rows = local(loop.head.weight.detach())
        if rank == world - 1:
            rows[-1, 0] = NAN
        before = loop.state()
    text = message_of(loop.step, 1, bad)
    same_rows = [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, loop.state(), strict=True)]
    return text, all(same_rows)


def row_name(kind: str, world: int) -> str:
    first = (world - 1) * -(-C // world)
    return {
        "rows": f"the gradient of weight of class {first} is not finite",
        "weight": f"weight of class {C - 1} holds a NaN",
    }[kind]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["clip", "check", "step"])
@pytest.mark.parametrize("bad", ["rows", "weight", "loss", "backbone"])
def test_an_error_names_what_is_not_finite_on_all_ranks_and_nothing_moved(ranks, world, how, bad):
    if (how, bad) == ("step", "backbone"):
        pytest.skip("the head's optimizer knows nothing of the backbone")
    results = ranks(world).run(raised, how, bad, 1.0, timeout=120)
    assert len({text for text, _ in results}) == 1 and all(still for _, still in results), results
    text = results[0][0]
    assert text.startswith("NonFiniteError: rank ")
    if bad in ("rows", "weight"):
        assert f"rank {world - 1}: {row_name(bad, world)}" in text
    if bad == "loss":
        assert "rank 0: the factor of the loss is not finite" in text
    if bad == "weight":
        assert "rank 0: the loss of embeddings[0] (label " in text and ") is nan" in text
    if bad == "backbone":
        assert "rank 0: the gradient of parameter 0 [6, 6] of those given is not finite" in text


def test_a_sampled_row_is_named_by_its_class(ranks):
    results = ranks(2).run(raised, "clip", "rows", 0.3, timeout=120)
    (text,) = {text for text, _ in results}
    assert "rank 1: the gradient of weight of class " in text and int(text.split("of class ")[1].split()[0]) >= 5


# --------------------------------------------------------------------------------------------- who looks, and how often


def reductions_of(rank: int, world: int, **options: Any) -> dict[str, int]:
    """How many all-reduces a step makes, by what judges it."""
    counts = {}
    for how in HOWS:
        loop = Loop(rank, world, how, **options)
        loop.world = 1  # no averaging of the backbone's gradients, which counts not here
        with collectives() as calls:
            loop.step(0)
        counts[how] = [name for name, _ in calls].count("all_reduce")
    return counts


def run_collectives(rank: int, world: int) -> list[dict[str, int]]:
    return [
        reductions_of(rank, world),
        reductions_of(rank, world, on_nonfinite="log"),
        reductions_of(rank, world, validate="never", rate=0.5),
    ]


def test_a_judged_step_makes_one_small_collective_and_clipping_none_more(ranks):
    for skip, log, never in ranks(2).run(run_collectives, timeout=120):
        assert skip == {"clip": 1, "check": 1, "step": 1}
        assert log == never == {"clip": 1, "check": 0, "step": 0}


def test_validate_first_judges_the_first_step_only():
    loop = Loop(0, 1, "step", validate="first")
    assert loop.step(0)
    assert loop.step(1, "rows"), "nobody looks any more"
    assert not loop.head.weight.isfinite().all()


def looked_for(rank: int, world: int) -> None:
    """What a gathered batch was looked at for is judged by every head; what it was not, by none."""
    x, labels = torch.randn(3, D), torch.tensor([0, 1, 2])
    x[0, 0] = NAN if rank == world - 1 else 0.0
    for validate in ("always", "first", "never"):
        head, center = PartialFC(D, C, validate=validate), CenterLoss(D, C, validate=validate)
        batch = gather(x, labels)
        for loss in (head, center):
            assert f"rank {world - 1}: embeddings[0] (label 0)" in message_of(loss, batch)
        unseen = gather(x, labels, validate="never")
        for loss in (head, center):
            assert not loss(unseen).isfinite() and not loss.skipped
    assert 'must be "always" or "never", not \'first\'' in message_of(lambda: gather(x, labels, validate="first"))  # type: ignore[call-overload]


@pytest.mark.parametrize("world", [1, 2])
def test_validate_of_gathered_batches(ranks, world):
    ranks(world).run(looked_for, timeout=120)


# ---------------------------------------------------------------------------------------------------- counts and limits


def count(rank: int, world: int, folder: str) -> tuple[str, int, int]:
    loop = Loop(rank, world, "check", max_skips=2)
    taken = [loop.step(i, bad) for i, bad in enumerate(["rows", "embedding", "", "backbone", "embedding"])]
    assert taken == [False, False, True, False, False] and loop.head.skips == 4
    save_checkpoint(folder, head=loop.head)
    fresh = Loop(rank, world, "check", max_skips=2)
    load_checkpoint(folder, head=fresh.head)
    text = message_of(loop.step, 5, "rows")
    assert not fresh.step(6, "rows") and not fresh.step(7, "rows"), "how many in a row is not a part of checkpoints"
    return text, loop.head.skips, fresh.head.skips


@pytest.mark.parametrize("world", [1, 2])
def test_skips_are_counted_and_too_many_in_a_row_raise(ranks, world, tmp_path):
    results = ranks(world).run(count, str(tmp_path / "checkpoint"), timeout=120)
    assert len(set(results)) == 1
    text, skips, of_fresh = results[0]
    assert text.startswith("NonFiniteError: 3 steps in a row were not finite, and max_skips is 2; the last: rank ")
    assert "the gradient of weight of class" in text and (skips, of_fresh) == (5, 6)


def test_without_a_limit_any_number_is_skipped():
    loop = Loop(0, 1, "step", max_skips=None)
    assert not any(loop.step(i, "embedding") for i in range(25)) and loop.head.skips == 25
    with pytest.raises(NonFiniteError, match="1 steps in a row"):
        Loop(0, 1, "step", max_skips=0).step(0, "embedding")
    with pytest.raises(ValueError, match="max_skips"):
        PartialFC(D, C, max_skips=-1)


def test_what_begins_a_step():
    """Loops that leave backward out, clear gradients late, call twice before backward, or use a plain optimizer."""
    good, labels = torch.randn(2, D), torch.tensor([0, 1])
    bad = good.clone()
    bad[0, 0] = NAN
    head = PartialFC(D, C, Softmax(), on_nonfinite="skip")
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    for x, skipped in ((good, False), (bad, True), (good, False), (good, False)):
        loss = head(x, labels)
        assert head.skipped == skipped
        if head.skipped:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    (head(bad, labels) + head(good, labels)).backward()
    assert head.skipped, "the bad one is a part of the step whose backward it ran in"
    optimizer.step()
    assert head.skipped and head.skips == 2
    head.eval()
    head(good, labels)
    head(bad, labels)
    assert head.skipped and head.skips == 2, "an evaluation says nothing of the training step"
    head.train()
    plain = PartialFC(D, C, Softmax(), on_nonfinite="skip")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)  # type: ignore[assignment]
    seen = []
    for x in (bad, good, good, good):
        plain(x, labels).backward()
        seen.append(plain.skipped)
        if len(seen) % 2 == 0:
            if not plain.skipped:
                optimizer.step()
            optimizer.zero_grad()
    assert seen == [True, True, False, False] and plain.skips == 1


def test_log_looks_at_embeddings_alone(caplog):
    loop = Loop(0, 1, "check", on_nonfinite="log")
    with caplog.at_level(logging.WARNING):
        assert loop.step(0, "embedding")
    assert "embeddings[1] (label " in caplog.text and "skipped" not in caplog.text
    with pytest.raises(ValueError, match="needs the heads"):
        check_gradients(loop.backbone.parameters())


# ---------------------------------------------------------------------------------------------------- a GradScaler


def scaled(rank: int, world: int, policy: str, given: bool) -> list[Any]:
    """An overflow of one rank's rows, then of the backbone's gradient, then a good step, then a bad loss."""
    loop = Loop(rank, world, "clip", on_nonfinite=policy)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    seen: list[Any] = []
    for number, bad in enumerate(["rows", "backbone", "", "weight"]):
        x, labels = loop.share(number)
        if bad == "weight":
            local(loop.head.weight.detach())[:1] = NAN
        before = loop.state()
        embeddings = loop.backbone(x)
        if bad == "backbone":
            embeddings.register_hook(lambda grad: grad * INF)
        scaler.scale(loop.head(embeddings, labels)).backward()
        if bad == "rows" and rank == world - 1:
            local(loop.head.weight.grad)[0, 0] = INF
        if world > 1:
            for parameter in loop.backbone.parameters():
                dist.all_reduce(parameter.grad)
        scaler.unscale_(loop.optimizer)
        scaler.unscale_(loop.head_optimizer)
        try:
            clip_grad_norm_(loop.backbone.parameters(), loop.head, max_norm=1.0, scaler=scaler if given else None)
        except NonFiniteError as error:
            seen.append(str(error).split(":")[0])
            break
        scaler.step(loop.optimizer)
        scaler.step(loop.head_optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        loop.head_optimizer.zero_grad()
        still = all(
            torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(before, loop.state(), strict=False)
        )
        seen.append((still, loop.head.skipped, loop.head.skips, scaler.get_scale()))
    return seen


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_scaled_overflow_is_the_scalers_business_and_a_bad_forward_is_not(ranks, policy, given):
    overflows = [(True, True, 0, 32.0), (True, True, 0, 16.0), (False, False, 0, 16.0)]
    for seen in ranks(2).run(scaled, policy, given, timeout=120):
        assert seen[:3] == overflows
        assert seen[3] == ("rank 0" if policy == "raise" else (True, True, 1, 8.0))


# ------------------------------------------------------------------------------------------ inside backward, reductions


def in_backward(rank: int, world: int, policy: str) -> tuple[str, int]:
    head = PartialFC(D, C, ArcFace(8.0), init_std=1.0, on_nonfinite=policy)  # type: ignore[arg-type]
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, update_in_backward=True)
    x, labels = torch.randn(LOCAL, D).requires_grad_(), torch.arange(LOCAL)
    head(x, labels).backward()
    optimizer.step()
    before = local(head.weight.detach()).clone()
    moments = local(optimizer.state[head.weight]["momentum_buffer"]).clone() if len(before) else before
    factor = INF if rank == world - 1 else 1.0
    loss = head(x, labels) * factor
    text = ""
    if policy == "raise":
        text = message_of(loss.backward)
    else:
        loss.backward()
        optimizer.step()
        assert head.skipped
    assert torch.equal(local(head.weight.detach()), before)
    assert not len(before) or torch.equal(local(optimizer.state[head.weight]["momentum_buffer"]), moments)
    if policy == "skip":
        head(x, labels).backward()
        optimizer.step()
        assert not head.skipped and not (len(before) and torch.equal(local(head.weight.detach()), before))
    return text, head.skips


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_rows_that_move_in_backward_do_not_move_by_a_bad_loss(ranks, policy):
    for text, skips in ranks(2).run(in_backward, policy, timeout=120):
        assert text.startswith("NonFiniteError") == (policy == "raise") and skips == (policy == "skip")


def reductions(rank: int, world: int) -> None:
    for reduction in ("none", "sum"):
        for bad in (False, True):
            head = PartialFC(D, C, Softmax(), reduction=reduction, on_nonfinite="skip")  # type: ignore[arg-type]
            center = CenterLoss(D, C, reduction=reduction, on_nonfinite="skip")  # type: ignore[arg-type]
            optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
            x, labels = torch.randn(2, D), torch.tensor([0, 9])
            if bad and rank == world - 1:
                x[0] = 1e30  # its square leaves float32, in one sample's center loss and its logits' exponentials
            x.requires_grad_()
            before = [local(p.detach()).clone() for p in (head.weight, center.centers)]
            batch = gather(x, labels)
            (head(batch) + center(batch)).sum().backward()
            assert check_gradients([], head, center) is not bad
            optimizer.step()
            center.step()
            assert head.skipped == center.skipped == bad
            still = [
                torch.equal(local(p.detach()), b) for p, b in zip((head.weight, center.centers), before, strict=True)
            ]
            assert all(still) if bad else not any(still)


@pytest.mark.parametrize("world", [1, 2])
def test_other_reductions_agree(ranks, world):
    ranks(world).run(reductions, timeout=120)


def one_rank_fails(rank: int, world: int) -> str:
    """The ranks still work together after an error, and a copy of a head has a record of its own."""
    loop = Loop(rank, world, "clip", on_nonfinite="raise")
    text = message_of(loop.step, 0, "rows")
    loop.optimizer.zero_grad()
    loop.head_optimizer.zero_grad()
    twin = copy.deepcopy(loop.head)
    assert twin.class_rows.record is not loop.head.class_rows.record and twin.skipped == loop.head.skipped
    assert loop.step(1) and not loop.head.skipped
    return on_every_rank(lambda: text)


def test_a_run_can_go_on_after_an_error(ranks):
    (text,) = set(ranks(2).run(one_rank_fails, timeout=120))
    assert "NonFiniteError" in text


class Bins(ArcFace):
    """With running statistics of several numbers, one that is put in the place of the last, and a large table."""

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__(scale)
        self.register_buffer("bins", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("table", torch.zeros(5000))

    def target(self, cosine: Tensor, positives: Positives | None = None) -> Tensor:
        if self.training and positives is not None:
            self.bins[1:3] += positives.mean(positives.norm)
            self.mean = 0.9 * self.mean + 0.1 * positives.mean(positives.norm)
        return super().target(cosine, positives)


@pytest.mark.parametrize("margin", [CurricularFace, AdaFace, Bins])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_running_statistics_of_a_bad_step_are_undone(policy, margin):
    head = PartialFC(D, 20, margin(scale=8.0), on_nonfinite=policy)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)

    def step(factor: float) -> list[float]:
        for weight in (1.0, factor):  # the second of two micro-batches may be bad
            (head(5 * torch.randn(6, D, requires_grad=True), torch.arange(6)) * weight).backward()
        try:
            clip_grad_norm_([], head, max_norm=1.0)
            optimizer.step()
        except NonFiniteError:
            assert policy == "raise"
        optimizer.zero_grad()
        return [buffer.tolist() for buffer in head.margin.buffers() if buffer.numel() < 5000]

    good = step(1.0)
    assert step(float("inf")) == good
    assert step(1.0) != good


@pytest.mark.parametrize("label", [-1, 20, 10**12])
def test_a_bad_label_that_nobody_looks_for_shows_in_the_loss(label):
    head = PartialFC(D, 20, validate="never")
    labels = torch.tensor([3, label, -100])
    assert not head(torch.randn(3, D), labels).isfinite()
    assert head(torch.randn(3, D), labels[[0, 2]].repeat(2)[:3]).isfinite()
