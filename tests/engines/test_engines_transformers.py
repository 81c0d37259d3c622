"""transformers.Trainer with a head inside its model, against one dense process: accumulation, clipping, saving,
resuming."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from engines_common import (
    ACCUMULATION,
    IMPORTING,
    MAX_NORM,
    SGD,
    STEPS,
    Joint,
    N,
    Result,
    compare,
    compare_resumed,
    finish,
    micro_batch,
)
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from partial_fc import RowOptimizer
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.transformers import HeadTrainer

SAVED_AFTER = 2


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """All micro-batches, sample after sample."""

    def __init__(self) -> None:
        batches = [micro_batch(index) for index in range(STEPS * ACCUMULATION)]
        self.images, self.labels = (torch.cat(part) for part in zip(*batches, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


class WithLoss(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        joint = Joint(rate)
        self.backbone, self.head = joint.backbone, joint.head
        self.selected: list[Tensor] = []

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = self.head(self.backbone(images), labels)
        self.selected.append(self.head.selected)
        return {"loss": loss}


class WithOptions(WithLoss):
    """A forward that takes what it does not know, for which the Trainer counts the items of a batch."""

    def forward(self, images: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        assert not kwargs
        return super().forward(images, labels)


class InOrder(HeadTrainer):
    """Samples in the order of the dense run, and the same optimizer as there."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.norms += [logs["grad_norm"]] if logs and "grad_norm" in logs else []


def trainer(
    world: int, folder: str, rate: float = 1.0, kind: type[WithLoss] = WithLoss, **options: Any
) -> tuple[InOrder, WithLoss, Norms]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": N // world,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "learning_rate": SGD["lr"],
        "weight_decay": SGD["weight_decay"],
        "max_grad_norm": MAX_NORM,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": SAVED_AFTER,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(**{**settings, **options})
    model, norms = kind(rate), Norms()
    made = InOrder(
        model,
        args,
        head_optimizers=[RowOptimizer(torch.optim.SGD, model.head, **SGD)],
        train_dataset=Samples(),
        callbacks=[norms],
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": SGD["lr"], "momentum": SGD["momentum"]}),
    )
    made.get_decay_parameter_names = lambda model: [
        name for name, _ in model.named_parameters()
    ]  # as the dense run: biases, too
    return made, model, norms


def train(rank: int, world: int, folder: str, rate: float, options: dict[str, Any]) -> Result:
    made, model, norms = trainer(world, folder, rate, **options)
    made.train()
    assert made.state.global_step == STEPS
    return finish(model.backbone, model.head, norms.norms, model.selected)


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_a_trainer_equals_one_dense_process(ranks, tmp_path, rate):
    compare(ranks(2).run(train, str(tmp_path), rate, {}, timeout=IMPORTING))


def test_a_schedule_moves_backbone_and_head(ranks, tmp_path):
    options = {"lr_scheduler_type": "linear", "save_strategy": "no"}
    compare(
        ranks(2).run(train, str(tmp_path), 1.0, options, timeout=IMPORTING),
        rates=[1 - step / STEPS for step in range(STEPS)],
    )


def test_bf16(ranks, tmp_path):
    """Within the rounding of the products' inputs, 2^-8 of each, in weights that move by half a unit."""
    error = compare(
        ranks(2).run(train, str(tmp_path), 1.0, {"bf16": True, "save_strategy": "no"}, timeout=IMPORTING), 1e-2
    )
    assert error > 1e-5, "autocast took part"


def test_a_forward_that_takes_any_option_trains_alike(ranks, tmp_path):
    """The head's loss is a mean already: nothing multiplies it by the ranks and the accumulation steps."""
    options = {"kind": WithOptions, "save_strategy": "no"}
    compare(ranks(2).run(train, str(tmp_path), 1.0, options, timeout=IMPORTING))


def train_twice(rank: int, world: int, folder: str) -> list[int]:
    made, _, _ = trainer(world, folder, save_strategy="no", max_steps=2)
    stepped = [0]
    made.head_optimizers[0].register_step_post_hook(lambda *_: stepped.append(stepped.pop() + 1))
    counts = []
    for _ in range(3):
        made.train()
        counts.append(stepped[0])
    return counts


def test_a_second_train_steps_the_head_once_a_step(ranks, tmp_path):
    assert ranks(2).run(train_twice, str(tmp_path), timeout=IMPORTING) == [[2, 4, 6]] * 2


def resume(rank: int, world: int, folder: str) -> Result:
    made, model, norms = trainer(world, folder)
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED_AFTER}")
    return finish(model.backbone, model.head, norms.norms, model.selected)


@pytest.mark.filterwarnings("ignore:.*world size.*:UserWarning")
def test_a_trainer_resumes_at_any_world_size(ranks, tmp_path):
    straight = ranks(2).run(train, str(tmp_path), 1.0, {}, timeout=IMPORTING)
    saved = tmp_path / f"checkpoint-{SAVED_AFTER}"
    assert {"model.safetensors", "optimizer.pt", "partial_fc", "partial_fc_optimizer"} <= {
        path.name for path in saved.iterdir()
    }
    for world in (2, 1):
        compare_resumed(straight, ranks(world).run(resume, str(tmp_path), timeout=IMPORTING))


def cut_short(rank: int, world: int, folder: str) -> list[str]:
    """A checkpoint that another run writes over, and of which it writes the heads alone, or all but the end."""
    said = []

    def run(method: str = "", **options: Any) -> None:
        made, _, _ = trainer(world, folder, max_steps=SAVED_AFTER)
        if method:
            setattr(made, method, lambda *_, **__: sys.exit())
        try:
            made.train(**options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
        except SystemExit:
            said.append("killed")

    path = f"{folder}/checkpoint-{SAVED_AFTER}"
    run()
    run(resume_from_checkpoint=path)
    for method in ("_save", "_save_scaler"):
        run(method)
        run(resume_from_checkpoint=path)
    return said


def test_a_checkpoint_that_was_cut_short_is_refused(ranks, tmp_path):
    for said in ranks(2).run(cut_short, str(tmp_path), timeout=IMPORTING):
        assert [*said[:3], said[4]] == ["nothing", "nothing", "killed", "killed"]
        assert all("partial_fc and the other files of" in text for text in (said[3], said[5]))


def test_what_a_trainer_cannot_do_is_refused(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model = WithLoss(1.0)
    with pytest.raises(ValueError, match="no PartialFC or CenterLoss in this Linear"):
        HeadTrainer(nn.Linear(2, 2), args, head_optimizers=[])
    with pytest.raises(ValueError, match="no RowOptimizer for head"):
        HeadTrainer(model, args, head_optimizers=[])
    rows = RowOptimizer(torch.optim.SGD, model.head, lr=0.1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    backbones = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    for options, words in (
        ({"optimizers": (own, None)}, "the backbone's optimizer has parameters of a head"),
        ({"optimizers": (JointOptimizer(backbones, rows), None)}, "pass the backbone's alone"),
        ({"model_init": lambda: model}, "model_init builds another model"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func is for losses that are sums"),
    ):
        with pytest.raises(ValueError, match=words):
            HeadTrainer(model, args, head_optimizers=[rows], **options)
    args.fp16 = True
    with pytest.raises(ValueError, match="bf16=True"):
        HeadTrainer(model, args, head_optimizers=[rows])
