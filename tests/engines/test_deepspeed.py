"""A head beside a DeepSpeed engine, ZeRO 0 to 3, on two ranks: weights, overflow, checkpoints, refusals, examples."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_training import Trained
from engines_common import ACCUMULATION, MAX_NORM, SGD, STEPS, C, D, N, backbone, dense, error, my_part, new_head
from forked import succeed
from shards import whole
from torch import Tensor

from partial_fc import PartialFC, RowOptimizer, load_checkpoint, save_checkpoint
from partial_fc.engines.deepspeed import (
    DeepSpeedHead,
    check_version,
    import_deepspeed,
    load_with_engine,
    save_with_engine,
)

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]


def configuration(stage: int, precision: str = "fp32", clip: float | None = MAX_NORM, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": N // 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip or 0.0,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    return {**config, **more}


class Run:
    """Backbone in an engine, head beside it."""

    def __init__(self, config: dict[str, Any], joint_clipping: bool = True, rate: float = 1.0) -> None:
        deepspeed = import_deepspeed()
        deepspeed.utils.logger.setLevel("ERROR")
        # it is slow on a CPU, which DeepSpeed takes for missing
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
        model = backbone()
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.head = new_head(rate)
        self.optimizer = RowOptimizer(torch.optim.SGD, self.head, **SGD)
        self.beside = DeepSpeedHead(self.engine, self.optimizer, joint_clipping=joint_clipping)
        self.dtype = self.engine.get_data_types()[0]

    def train(
        self, rank: int, world: int, steps: int = STEPS, first: int = 0, *, torch_style: bool = False
    ) -> list[float]:
        """The norms of the steps."""
        norms = []
        for index in range(first * ACCUMULATION, (first + steps) * ACCUMULATION):
            inputs, labels = my_part(index, rank, world)
            loss = self.head(self.engine(inputs.to(self.dtype)), labels)
            if torch_style:
                self.engine.scale(loss).backward()
            else:
                self.engine.backward(loss)
            self.engine.step()
            if self.beside.norm is not None and (index + 1) % ACCUMULATION == 0:
                norms.append(float(self.beside.norm))
        return norms

    def weights(self) -> Trained:
        """Of the backbone, as the forward uses them, and the rows of all classes."""
        return Trained(full(self.engine), whole(self.head.weight).clone())


def full(engine: Any) -> dict[str, Tensor]:
    parameters = list(engine.module.parameters())
    with import_deepspeed().zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def compared(
    rank: int, world: int, stage: int, precision: str, joint: bool, torch_style: bool
) -> tuple[float, float, list[float]]:
    clip = MAX_NORM if joint else None
    run = Run(configuration(stage, precision, clip), joint)
    norms = run.train(rank, world, torch_style=torch_style)
    expected = dense(max_norm=clip)
    differences = [found - wanted for found, wanted in zip(norms, expected.norms, strict=False)]
    return *error(run.weights(), expected), differences


@pytest.mark.parametrize("joint", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_weights_are_those_of_one_dense_process(ranks, stage, joint):
    for of_backbone, of_head, norms in ranks(2).run(compared, stage, "fp32", joint, False):
        assert max(of_backbone, of_head) <= 1e-5
        assert len(norms) == (STEPS if joint else 0) and all(abs(n) < 1e-4 for n in norms)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_that_the_engine_only_scaled_is_divided_as_well(ranks, stage):
    for of_backbone, of_head, _ in ranks(2).run(compared, stage, "fp32", True, True):
        assert max(of_backbone, of_head) <= 1e-5


# Weights of about 1 are used to 2⁻⁹ in bfloat16 and 2⁻¹² in float16, as are activations and their gradients, which 5
# steps of learning rate 0.3 add up; unclipped steps are several times as long. With clipping apart the head is off by
# 0.28, with half its learning rate by 0.06.
TOLERANCE = {"bf16": 1e-2, "fp16": 1e-3}
UNCLIPPED = 4


@pytest.mark.parametrize(
    ("stage", "precision", "joint"),
    [
        (0, "bf16", False),
        (1, "bf16", True),
        (2, "bf16", True),
        (3, "bf16", True),
        (1, "fp16", True),
        (2, "fp16", True),
        (3, "fp16", True),
    ],
)
def test_half_precision_is_as_near_as_its_resolution(ranks, stage, precision, joint):
    for of_backbone, of_head, _ in ranks(2).run(compared, stage, precision, joint, False):
        print(f"ZeRO-{stage} {precision}: backbone {of_backbone:.1e}, head {of_head:.1e}")
        assert max(of_backbone, of_head) <= TOLERANCE[precision] * (1 if joint else UNCLIPPED)


# ---------------------------------------------------------------------------------------------- steps that are left out


def poisoned(rank: int, world: int, stage: int, precision: str, where: str, joint: bool) -> dict[str, Any]:
    """Four steps, in the second of which one rank's gradient of the head or of the backbone is infinite."""
    clip = MAX_NORM if joint else None
    run = Run(configuration(stage, precision, clip), joint)
    run.head.on_nonfinite = "skip"
    before = run.beside.loss_scale()
    run.train(rank, world, 1)
    kept = run.weights()
    for k in range(ACCUMULATION):
        inputs, labels = my_part(ACCUMULATION + k, rank, world)
        embeddings = run.engine(inputs.to(run.dtype))
        if where == "backbone" and rank == 1 and k == 0:
            embeddings.register_hook(lambda grad: grad * float("inf"))
        run.engine.backward(run.head(embeddings, labels))
        if where == "head" and rank == 1 and k == 0:
            grad: Any = run.head.weight.grad
            grad.to_local()[0, 0] = float("inf")
        run.engine.step()
    seen: dict[str, Any] = {"skipped": run.beside.skipped, "scale": run.beside.loss_scale() / before}
    after = run.weights()
    seen["still"] = same(after, kept)
    seen["counted"] = run.engine.skipped_steps, run.engine.was_step_applied()
    run.train(rank, world, 2, first=2)
    seen["went on"] = not run.beside.skipped
    seen["skips"] = run.head.skips
    return {**seen, "error": max(error(run.weights(), dense(steps=4, max_norm=clip, skip=1)))}


def same(mine: Trained, theirs: Trained) -> bool:
    names = mine.backbone.keys() | theirs.backbone.keys()
    return torch.equal(mine.rows, theirs.rows) and all(torch.equal(mine.backbone[n], theirs.backbone[n]) for n in names)


@pytest.mark.parametrize("where", ["head", "backbone"])
@pytest.mark.parametrize(
    ("stage", "precision", "joint"),
    [
        *[(0, "fp32", True), (1, "fp32", False), (2, "fp32", True), (3, "fp32", True)],
        *[(0, "bf16", False), (2, "bf16", False), (1, "fp16", True), (2, "fp16", False), (3, "fp16", True)],
    ],
)
def test_an_overflow_on_one_rank_is_skipped_by_all_and_by_both(ranks, stage, precision, where, joint):
    for seen in ranks(2).run(poisoned, stage, precision, where, joint):
        assert seen["skipped"] and seen["still"] and seen["went on"]
        assert seen["counted"] == (1, False)
        assert seen["skips"] == (0 if precision == "fp16" else 1), "a loss scale's overflow is not counted"
        assert seen["scale"] == (0.5 if precision == "fp16" else 1)
        assert seen["error"] <= TOLERANCE.get(precision, 1e-5) * (1 if joint else UNCLIPPED)


# ------------------------------------------------------------------------------------------- sampled heads, checkpoints


def resumed(rank: int, world: int, stage: int, folder: str) -> dict[str, bool]:
    """Three steps, a checkpoint, two steps; then the same two from the checkpoint, in new objects; under sampling."""
    run = Run(configuration(stage), rate=0.5)
    run.train(rank, world, 3)
    save_with_engine(run.engine, folder, head=run.head, head_optimizer=run.optimizer)
    run.train(rank, world, 2, first=3)
    again = Run(configuration(stage), rate=0.5)
    load_with_engine(again.engine, folder, head=again.head, head_optimizer=again.optimizer)
    again.train(rank, world, 2, first=3)
    found = {"the same": same(again.weights(), run.weights())}
    try:
        load_with_engine(again.engine, f"{folder}/nowhere", head=again.head)
    except FileNotFoundError:
        found["nothing found"] = True
    return found


def head_alone(rank: int, world: int, path: str) -> Tensor:
    head = new_head(0.5)
    optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    load_checkpoint(path, head=head, head_optimizer=optimizer)
    momentum: Any = optimizer.state_dict()["state"][0]["momentum_buffer"]
    return torch.cat([whole(head.weight), whole(momentum)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_exactly_from_the_engines_checkpoint_with_the_head_beside_it(ranks, tmp_path, stage):
    for found in ranks(2).run(resumed, stage, str(tmp_path)):
        assert found == {"the same": True, "nothing found": True}
    assert (tmp_path / "latest").read_text() == "global_step3"
    path = str(tmp_path / "global_step3" / "partial_fc")
    two, three = ranks(2).run(head_alone, path)[0], ranks(3).run(head_alone, path)[2]
    assert torch.equal(two, three) and two.any()


def cut_short(rank: int, world: int, folder: str) -> list[str]:
    """A tag that is written over, and of which the heads alone are written the second time."""
    run, said = Run(configuration(1)), []
    run.train(rank, world, 1)

    def load(tag: Any) -> None:
        try:
            load_with_engine(run.engine, folder, tag, head=run.head, head_optimizer=run.optimizer)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))

    for _ in range(2):
        save_with_engine(run.engine, folder, 5, head=run.head, head_optimizer=run.optimizer)
        load(5)
    engine_saves = run.engine.save_checkpoint
    run.engine.save_checkpoint = lambda *_, **__: sys.exit()
    with contextlib.suppress(SystemExit):
        save_with_engine(run.engine, folder, 5, head=run.head, head_optimizer=run.optimizer)
    load(5)
    load(None)
    run.engine.save_checkpoint = engine_saves
    save_checkpoint(f"{folder}/5/partial_fc", head=run.head, head_optimizer=run.optimizer)  # as earlier versions
    load("5")
    return said


@pytest.mark.filterwarnings("ignore")
def test_a_tag_that_was_half_written_over_is_refused(ranks, tmp_path):
    first, second = ranks(2).run(cut_short, str(tmp_path))
    assert first == second
    assert ["not of the same save" in text for text in first] == [False, False, True, True, False]
    assert [first[0], first[1], first[4]] == ["nothing"] * 3


# ---------------------------------------------------------------------------------------------------- what is refused


def stepped_by_hand(rank: int, world: int) -> list[Any]:
    """step() and zero_grad() of the head's optimizer beside those of the engine, also where schedules wrap them."""
    run, said = Run(configuration(1)), []
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda count: 1.0)
    for call in (run.optimizer.step, run.optimizer.zero_grad):
        try:
            call()
            said.append("nothing")
        except RuntimeError as refused:
            said.append(str(refused))
    run.train(rank, world)
    schedule.step()
    again = PartialFC(D, C)
    other = RowOptimizer(torch.optim.SGD, again, **SGD)
    torch.optim.lr_scheduler.LambdaLR(other, lambda count: 1.0)
    engines = []
    for _ in range(2):  # the last one steps it
        model = backbone()
        own = torch.optim.SGD(model.parameters(), **SGD)
        engines.append(import_deepspeed().initialize(model=model, optimizer=own, config=configuration(1))[0])
        DeepSpeedHead(engines[-1], other)
    before = whole(again.weight).clone()
    for index in range(ACCUMULATION):
        inputs, labels = my_part(index, rank, world)
        engines[1].backward(again(engines[1](inputs), labels))
        engines[1].step()
    return [*said, max(error(run.weights(), dense())), not torch.equal(whole(again.weight), before)]


def test_the_optimizer_of_a_head_is_stepped_by_the_engine_alone(ranks):
    for step, zero_grad, off, moved in ranks(2).run(stepped_by_hand):
        assert step.startswith("step() of the optimizer of a head beside a DeepSpeed engine was called")
        assert zero_grad.startswith("zero_grad() of the optimizer of a head beside")
        assert off <= 1e-5 and moved


def refusals(rank: int, world: int) -> list[str]:
    deepspeed = import_deepspeed()
    said = []
    float_accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
    for config, joint in (
        (configuration(0, "fp16"), False),
        (configuration(2, clip=None), True),
        (configuration(0, "bf16"), True),
        (configuration(1, "bf16", **float_accumulation), True),
        (configuration(2, managed_gradient_accumulation=False), True),
        (configuration(2, torch_autocast={"enabled": True, "dtype": "float16"}), True),
    ):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            Run(config, joint)
        said.append(str(refused.value))
    said.append(_after_float16_autocast())
    engine, *_ = deepspeed.initialize(model=backbone(), config={"train_micro_batch_size_per_gpu": 4})
    head = PartialFC(D, C)
    with pytest.raises(ValueError, match="no optimizer") as refused:
        DeepSpeedHead(engine, RowOptimizer(torch.optim.SGD, head, **SGD))
    said.append(str(refused.value))
    run = Run(configuration(1))
    with pytest.raises(ValueError, match="update_in_backward") as refused:
        DeepSpeedHead(run.engine, RowOptimizer(torch.optim.SGD, head, update_in_backward=True, **SGD))
    said.append(str(refused.value))
    with pytest.raises(ValueError, match="in one call") as refused:
        DeepSpeedHead(run.engine, RowOptimizer(torch.optim.SGD, PartialFC(D, C), **SGD), joint_clipping=True)
    said.append(str(refused.value))
    model, head = backbone(), PartialFC(D, C)
    both = torch.optim.SGD([*model.parameters(), *head.parameters()], foreach=False, **SGD)
    engine, *_ = deepspeed.initialize(model=model, optimizer=both, config=configuration(0))
    with pytest.raises(ValueError, match="engine's optimizer") as refused:
        DeepSpeedHead(engine, RowOptimizer(torch.optim.SGD, head, **SGD))
    return [*said, str(refused.value)]


def _after_float16_autocast() -> str:
    from deepspeed.runtime import torch_autocast

    try:
        with pytest.raises(ValueError, match="torch_autocast") as refused:
            Run(configuration(2))
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None
    return str(refused.value)


def test_what_cannot_be_right_is_refused_in_words(ranks):
    for said in ranks(2).run(refusals):
        for words, expected in zip(
            said,
            [
                *[
                    "fp16 with ZeRO-0",
                    "gradient_clipping",
                    "bf16 with ZeRO-0",
                    "grad_accum_dtype",
                    "boundary",
                    "torch_autocast",
                ],
                *["torch_autocast", "no optimizer", "update_in_backward"],
                *["this engine has a DeepSpeedHead", "the engine's optimizer has parameters of a head"],
            ],
            strict=True,
        ):
            assert expected in words


def test_an_old_deepspeed_and_none_are_said(monkeypatch):
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.16\.9 is too old: .* 0\.19\.8 or newer"):
        check_version("0.16.9")
    with pytest.raises(RuntimeError, match=r"DeepSpeed 0\.19\.4 is too old"):
        check_version("0.19.4")
    check_version("0.19.8+cuda")
    check_version("1.0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'partial_fc\[deepspeed\]'"):
        import_deepspeed()


# ----------------------------------------------------------------------------------------- through Accelerate, examples


def through_accelerate(rank: int, world: int, stage: int) -> tuple[float, float]:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import_deepspeed()
    before = dict(os.environ)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=configuration(stage))
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        module, head = backbone(), new_head()
        model, _ = accelerator.prepare(module, torch.optim.SGD(module.parameters(), **SGD))
        beside = DeepSpeedHead(model, RowOptimizer(torch.optim.SGD, head, **SGD), joint_clipping=True)
        for index in range(STEPS * ACCUMULATION):
            with accelerator.accumulate(model):
                inputs, labels = my_part(index, rank, world)
                accelerator.backward(head(model(inputs), labels))
        assert not beside.skipped and accelerator.sync_gradients
        return error(Trained(full(model), whole(head.weight)), dense())
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_through_accelerate_the_weights_are_the_same(ranks, stage):
    for of_backbone, of_head in ranks(2).run(through_accelerate, stage):
        assert max(of_backbone, of_head) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("example", ["deepspeed_zero.py 3", "accelerate_deepspeed.py 2"])
def test_the_examples_learn(example):
    name, stage = example.split()
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 60
    out = succeed(f"examples/{name}", stage, "6", "60", timeout=150)
    first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", out))
    assert last < 0.9 * first, out
