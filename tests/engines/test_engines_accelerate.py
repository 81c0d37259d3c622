"""Heads beside Accelerate's prepared backbone: accumulation, autocast, clipping, schedules, saving; against one dense
process."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from engines_common import (
    ACCUMULATION,
    MAX_NORM,
    STEPS,
    Joint,
    Result,
    backbone,
    compare,
    compare_resumed,
    finish,
    my_part,
    new_head,
    optimizers,
)
from torch import nn

from partial_fc import RowOptimizer, save_checkpoint
from partial_fc.engines import accelerate as adapter
from partial_fc.engines.accelerate import HeadOptimizer, clip_grad_norm_, prepare_heads, save_heads_with
from partial_fc.engines.ddp import ignore_heads

DECAY = 0.9


def accelerator(precision: str = "no", *, split_batches: bool = True) -> Accelerator:
    """A new one in processes that had others before. "fp16", which Accelerate passes over on a CPU, gets what it has on
    a GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    engine = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATION,
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    if precision == "fp16":
        engine.scaler, engine.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), True
    return engine


class Run:
    """Everything of one run, built as a user would."""

    def __init__(self, rank: int, world: int, inside: bool = False, rate: float = 1.0, **options: Any) -> None:
        self.rank, self.world, self.inside = rank, world, inside
        self.accelerator = accelerator(**options)
        self.joint = Joint(rate)
        self.head = self.joint.head
        both = optimizers(self.joint.backbone.parameters(), self.head)
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda count: DECAY**count) for o in both]
        if inside:
            ignore_heads(self.joint)
        wrapped = self.joint if inside else self.joint.backbone
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(wrapped, both[0], schedules[0])
        self.head_optimizer, self.head_schedule = prepare_heads(self.accelerator, both[1], schedules[1])
        save_heads_with(self.accelerator, head=self.head, optimizer=self.head_optimizer, schedule=self.head_schedule)
        self.norms: list[Any] = []
        self.selected: list[Any] = []

    def steps(self, first: int, last: int) -> Run:
        for index in range(first * ACCUMULATION, last * ACCUMULATION):
            images, labels = my_part(index, self.rank, self.world)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = self.model(images, labels) if self.inside else self.head(self.model(images), labels)
                self.accelerator.backward(loss)
                self.selected.append(self.head.selected)
                norm = clip_grad_norm_(self.accelerator, self.joint.parameters(), self.head, max_norm=MAX_NORM)
                assert (norm is None) == (index % ACCUMULATION != ACCUMULATION - 1)
                self.norms += [] if norm is None else [norm]
                self.head_optimizer.step()
                self.optimizer.step()
                for thing in (self.schedule, self.head_schedule):
                    thing.step()
                for thing in (self.optimizer, self.head_optimizer):
                    thing.zero_grad()
        assert self.schedule.get_last_lr() == self.head_schedule.get_last_lr()
        return self

    def result(self) -> Result:
        return finish(self.joint.backbone, self.head, self.norms, self.selected)


def train(rank: int, world: int, options: dict[str, Any]) -> Result:
    return Run(rank, world, **options).steps(0, STEPS).result()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_accelerate_equals_one_dense_process(ranks, rate, inside):
    compare(ranks(2).run(train, {"rate": rate, "inside": inside}), rates=[DECAY**step for step in range(STEPS)])


def test_schedules_stay_aligned_where_accelerate_steps_them_once_a_process(ranks):
    compare(ranks(2).run(train, {"split_batches": False}), rates=[DECAY ** (2 * step) for step in range(STEPS)])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(ranks, precision):
    """Within the rounding of the products' inputs, 2^-8 of each (2^-11 in fp16), in weights that move by half a
    unit."""
    tolerance = 1e-2 if precision == "bf16" else 2e-3
    error = compare(
        ranks(2).run(train, {"precision": precision}), tolerance, rates=[DECAY**step for step in range(STEPS)]
    )
    assert error > 1e-5, "autocast took part"


def overflow(rank: int, world: int, where: str) -> tuple[list[bool], list[float]]:
    """One gradient of one rank's head, or of its backbone, is infinite: nobody steps; the scale is halved; then all
    step."""
    run = Run(rank, world, precision="fp16")
    before = {k: v.clone() for k, v in run.joint.state_dict().items() if not k.endswith("_extra_state")}

    def spoil(*_: Any) -> None:
        if rank == 1:
            target = run.head.weight if where == "head" else run.joint.backbone[0].weight
            grad = target.grad.to_local() if where == "head" else target.grad
            grad.view(-1)[0] = float("inf")

    original, spoiled = run.accelerator.backward, iter([False, True, False, False])

    def backward(loss: Any) -> None:
        original(loss)
        if next(spoiled):
            spoil()

    run.accelerator.backward = backward
    run.steps(0, 1)
    scales = [run.accelerator.scaler.get_scale()]
    state = run.joint.state_dict()
    stayed = [
        all(torch.equal(state[k], v) for k, v in before.items()),
        run.head_optimizer.step_was_skipped,
        run.optimizer.step_was_skipped,
    ]
    run.steps(1, 2)
    scales.append(run.accelerator.scaler.get_scale())
    return [*stayed, not torch.equal(run.joint.state_dict()["head.weight"], before["head.weight"])], scales


def test_an_overflow_in_one_shard_skips_the_step_of_all(ranks):
    for checks, scales in ranks(2).run(overflow, "head"):
        assert checks == [True] * 4
        assert scales == [2.0**7, 2.0**7]


def wrong_order(rank: int, world: int) -> str:
    run = Run(rank, world, precision="fp16")
    run.head_optimizer, run.optimizer = run.optimizer, run.head_optimizer
    with contextlib.suppress(AssertionError):
        try:
            run.steps(0, 1)
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_the_heads_optimizer_comes_first_under_a_scaler(ranks):
    for text in ranks(2).run(wrong_order):
        assert "before the prepared optimizer's" in text


SAVED_AFTER = 2


def save(rank: int, world: int, folder: str, inside: bool, safe: bool) -> Result:
    run = Run(rank, world, inside).steps(0, SAVED_AFTER)
    run.accelerator.save_state(folder, safe_serialization=safe)
    return run.steps(SAVED_AFTER, STEPS).result()


def resume(rank: int, world: int, folder: str, inside: bool) -> Result:
    run = Run(rank, world, inside)
    with torch.no_grad():
        for parameter in run.joint.parameters():
            parameter.zero_()
    run.accelerator.load_state(folder)
    return run.steps(SAVED_AFTER, STEPS).result()


@pytest.mark.parametrize(
    ("inside", "safe"), [(False, True), (True, True), (True, False)], ids=["outside", "inside", "inside-torch"]
)
def test_a_saved_state_is_resumed_at_any_world_size(ranks, tmp_path, inside, safe):
    straight = ranks(2).run(save, str(tmp_path), inside, safe)
    for world in (2, 3, 1):
        compare_resumed(straight, ranks(world).run(resume, str(tmp_path), inside))


def cut_short(rank: int, world: int, folder: str) -> list[Any]:
    """What loading says after a save that wrote the heads alone, first over a checkpoint of an earlier version."""
    run, said = Run(rank, world).steps(0, 1), []

    def load() -> None:
        try:
            run.accelerator.load_state(folder)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))

    def save_heads_alone() -> None:
        for hook in run.accelerator._save_model_state_pre_hook.values():
            hook(run.accelerator._models, [], folder)

    run.accelerator.save_state(folder)
    save_checkpoint(
        f"{folder}/partial_fc",
        head=run.head,
        optimizer=run.head_optimizer.optimizer,
        schedule=run.head_schedule.scheduler,
    )
    if rank == 0:
        Path(folder, "partial_fc.token").unlink()
    load()
    save_heads_alone()
    load()
    run.accelerator.save_state(folder)
    load()
    run.steps(1, 2)
    save_heads_alone()
    load()
    run.accelerator.save_state(folder + "-new")
    run.accelerator.wait_for_everyone()
    if rank == 0:
        Path(folder + "-new", "partial_fc.token").unlink()
    folder += "-new"
    run.accelerator.wait_for_everyone()
    load()
    return said


def test_a_save_that_was_cut_short_is_refused(ranks, tmp_path):
    first, second = ranks(2).run(cut_short, str(tmp_path / "state"))
    assert first == second
    words = "partial_fc and the other files of"
    assert [words in text and "not of the same save" in text for text in first] == [False, True, False, True, True]
    assert first[0] == first[2] == "nothing"


def wrong_wiring(rank: int, world: int, folder: str) -> list[str]:
    engine, head = accelerator(), new_head()
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)

    def prepared_optimizer() -> None:
        another = accelerator()
        another.prepare(backbone(), optimizer)
        save_heads_with(another, head=head)

    def prepared_rows(*, late: bool = False) -> None:
        another, joint = accelerator(), Joint()
        own = torch.optim.SGD(joint.parameters(), lr=0.1)
        if late:
            save_heads_with(another, head=joint.head)
        another.prepare(joint.backbone, own)
        another.save_state(folder) if late else save_heads_with(another, head=joint.head)

    def not_wrapped() -> None:
        save_heads_with(accelerator(), head=head, optimizer=optimizer)

    def clipped_and_not_wrapped() -> None:
        clip_grad_norm_(accelerator(), [], head, max_norm=1.0)

    def inside(*, named: bool) -> None:
        another, joint = accelerator(), Joint()
        ignore_heads(joint)
        another.prepare(joint)
        prepare_heads(another, RowOptimizer(torch.optim.SGD, joint.head, lr=0.1))
        save_heads_with(another, other=head) if named else another.save_state(folder)

    said = []
    attempts = [
        lambda: prepare_heads(engine, head),
        lambda: engine.prepare(head),
        lambda: engine.prepare(Joint()),
        prepared_optimizer,
        prepared_rows,
        lambda: prepared_rows(late=True),
        not_wrapped,
        clipped_and_not_wrapped,
        lambda: inside(named=True),
        lambda: inside(named=False),
    ]
    for attempt in attempts:
        try:
            attempt()
            said.append("nothing")
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_is_not_for_prepare_is_refused(ranks, tmp_path):
    first, second = ranks(2).run(wrong_wiring, str(tmp_path))
    assert first == second
    for text, words in zip(
        first,
        [
            "TypeError: prepare_heads takes RowOptimizers and their learning-rate schedulers, not PartialFC",
            "RuntimeError: DistributedDataParallel was given a PartialFC (weight)",
            "RuntimeError: DistributedDataParallel was given a PartialFC (head.weight)",
            "ValueError: a RowOptimizer was passed to accelerator.prepare",
            "ValueError: a SGD with rows of a head was passed to accelerator.prepare",
            "ValueError: a SGD with rows of a head was passed to accelerator.prepare",
            "ValueError: under gradient accumulation a RowOptimizer that did not go through prepare_heads",
            "ValueError: under gradient accumulation a RowOptimizer that did not go through prepare_heads",
            "ValueError: 'head' is a head inside a prepared model",
            "ValueError: 'head' is a head inside a prepared model",
        ],
        strict=True,
    ):
        assert text.startswith(words)


def test_a_prepared_optimizer_keeps_the_protocol():
    """Hooks are those of the RowOptimizer; what cannot be saved is refused when it is named."""
    engine, head = accelerator(), new_head()
    own = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    prepared = prepare_heads(engine, own)
    seen: list[Any] = []
    prepared.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    prepared.register_state_dict_post_hook(lambda optimizer, state: {**state, "version": 1})
    prepared.step()
    assert seen == [own] and prepared.state_dict()["version"] == 1
    for use, words in (
        (lambda: prepared.add_param_group({"params": []}), "another RowOptimizer for another head"),
        (lambda: save_heads_with(engine, head=head, epoch=3), "epoch=3 is a plain value"),
        (lambda: pickle.dumps(prepared), "cannot be pickled"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            use()
    scaled = HeadOptimizer(own, device_placement=False, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="a closure cannot be given"):
        scaled.step(lambda: 0.0)


def test_a_second_call_adds_to_what_is_saved(tmp_path):
    """As after free_memory(), where a smaller batch is tried with a new head."""
    engine, heads = accelerator(), [new_head() for _ in range(3)]
    save_heads_with(engine, head=heads[0])
    save_heads_with(engine, head=heads[1], other=heads[2])
    with torch.no_grad():
        heads[1].weight += 1
    expected = heads[1].weight.detach().clone()
    engine.save_state(str(tmp_path))
    for head in heads:
        torch.nn.init.zeros_(head.weight)
    engine.load_state(str(tmp_path))
    assert torch.equal(heads[1].weight, expected)
    assert not heads[0].weight.any() and heads[2].weight.any()


@pytest.mark.parametrize("earlier_version", [False, True])
def test_heads_that_are_written_last_are_refused_if_they_were_not(tmp_path, monkeypatch, earlier_version):
    """As with FSDP and DeepSpeed, of which Accelerate writes the weights before it calls hooks."""
    monkeypatch.setattr(adapter, "_saves_before_hooks", lambda accelerator: True)
    engine, head, killed = accelerator(), new_head(), [False]

    def kill(*_: Any) -> None:
        if killed[0]:
            raise InterruptedError

    engine.register_save_state_pre_hook(kill)
    save_heads_with(engine, head=head)
    engine.save_state(str(tmp_path))
    if earlier_version:
        save_checkpoint(tmp_path / "partial_fc", head=head)
        (tmp_path / "partial_fc.token").unlink()
    engine.load_state(str(tmp_path))
    killed[0] = True
    with pytest.raises(InterruptedError):
        engine.save_state(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="not of the same save"):
        engine.load_state(str(tmp_path))
    killed[0] = False
    engine.save_state(str(tmp_path))
    engine.load_state(str(tmp_path))


def test_one_process_may_keep_a_head_in_the_file_of_its_model(tmp_path):
    """As before heads were taken out: its rows are all there, and nobody names it."""
    engine, joint = accelerator(), Joint()
    model = engine.prepare(joint)
    prepare_heads(engine, RowOptimizer(torch.optim.SGD, joint.head, lr=0.1))
    engine.save_state(str(tmp_path), safe_serialization=False)
    expected = joint.head.weight.detach().clone()
    torch.nn.init.zeros_(joint.head.weight)
    engine.load_state(str(tmp_path))
    assert torch.equal(joint.head.weight, expected) and model is joint


def test_one_process_without_a_group():
    compare([Run(0, 1).steps(0, STEPS).result()], rates=[DECAY**step for step in range(STEPS)])
    engine = accelerator()
    engine.prepare(nn.Sequential(backbone()), new_head())
    with pytest.raises(ValueError, match="a head was passed"):
        prepare_heads(engine)
