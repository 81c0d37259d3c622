"""A head beside a DeepSpeed engine, ZeRO 0 to 3, on two ranks: weights as of one dense process, overflow, checkpoints, refusals, examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_reference import ACCUMULATION, CLASSES, CLIP, MARGIN, SCALE, SGD, STEPS, D, dense_run, error, make_backbone, share
from torch import Tensor, nn

from partial_fc import ArcFace, PartialFC, RowOptimizer, load_checkpoint
from partial_fc.engines.deepspeed import DeepSpeedHead, check_version, import_deepspeed, load_with_engine, save_with_engine

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parent.parent
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def configuration(stage: int, precision: str = "fp32", clip: float | None = CLIP, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
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
        deepspeed.get_accelerator().is_fp16_supported = lambda: True  # it is slow on a CPU, which DeepSpeed takes for missing
        backbone = make_backbone()
        optimizer = torch.optim.SGD(backbone.parameters(), **SGD)
        self.engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=config)
        self.head = PartialFC(D, CLASSES, ArcFace(SCALE, MARGIN), rate, seed=1, init_std=0.5)
        self.optimizer = RowOptimizer(torch.optim.SGD, self.head, **SGD)
        self.beside = DeepSpeedHead(self.engine, self.optimizer, joint_clipping=joint_clipping)
        self.dtype = self.engine.get_data_types()[0]

    def train(self, rank: int, world: int, steps: int = STEPS, first: int = 0, *, torch_style: bool = False) -> list[float]:
        """The norms of the steps."""
        norms = []
        for index in range(first * ACCUMULATION, (first + steps) * ACCUMULATION):
            inputs, labels = share(index, rank, world)
            loss = self.head(self.engine(inputs.to(self.dtype)), labels)
            if torch_style:
                self.engine.scale(loss).backward()
            else:
                self.engine.backward(loss)
            self.engine.step()
            if self.beside.norm is not None and (index + 1) % ACCUMULATION == 0:
                norms.append(float(self.beside.norm))
        return norms

    def weights(self) -> tuple[dict[str, Tensor], Tensor]:
        """Of the backbone, as the forward uses them, and the rows of all classes."""
        return full(self.engine), self.head.weight.full_tensor().detach().clone()


def full(engine: Any) -> dict[str, Tensor]:
    parameters = list(engine.module.parameters())
    with import_deepspeed().zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def initial() -> tuple[nn.Module, Tensor]:
    head = PartialFC(D, CLASSES, ArcFace(SCALE, MARGIN), seed=1, init_std=0.5)
    return make_backbone(), head.weight.detach()


def compared(rank: int, world: int, stage: int, precision: str, joint: bool, torch_style: bool) -> tuple[float, float, list[float]]:
    run = Run(configuration(stage, precision, CLIP if joint else None), joint)
    start = run.head.weight.full_tensor().detach().clone()
    norms = run.train(rank, world, torch_style=torch_style)
    expected = dense_run(make_backbone(), start, clip=CLIP if joint else None)
    assert not joint or min(expected[2]) > CLIP, "every step must be clipped"
    return *error(*run.weights(), *expected[:2]), [found - wanted for found, wanted in zip(norms, expected[2], strict=False)]


@pytest.mark.parametrize("joint", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_weights_are_those_of_one_dense_process(ranks, stage, joint):
    for backbone, head, norms in ranks(2).run(compared, stage, "fp32", joint, False):
        assert max(backbone, head) <= 1e-5
        assert len(norms) == (STEPS if joint else 0) and all(abs(n) < 1e-4 for n in norms)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_that_the_engine_only_scaled_is_divided_as_well(ranks, stage):
    for backbone, head, _ in ranks(2).run(compared, stage, "fp32", True, True):
        assert max(backbone, head) <= 1e-5


# weights of about 1 are stored to 2⁻⁹ in bfloat16 and 2⁻¹² in float16, and so are activations and their gradients, which 5 steps of
# learning rate 0.2 add up; without the loss scale undone, or the clipping joint, the head is off by more than 0.3
TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3}


@pytest.mark.parametrize(
    ("stage", "precision", "joint"),
    [(0, "bf16", False), (1, "bf16", True), (2, "bf16", True), (3, "bf16", True), (1, "fp16", True), (2, "fp16", True), (3, "fp16", True)],
)
def test_half_precision_is_as_near_as_its_resolution(ranks, stage, precision, joint):
    for backbone, head, _ in ranks(2).run(compared, stage, precision, joint, False):
        print(f"ZeRO-{stage} {precision}: backbone {backbone:.1e}, head {head:.1e}")
        assert max(backbone, head) <= TOLERANCE[precision]
