"""Weights and optimizer state of one engine's backbone go on in another engine, on another number of ranks, or without
any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import message_of
from engines_common import IMAGE, D, backbone
from shards import whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from partial_fc import PartialFC, RowOptimizer, load_checkpoint, save_checkpoint
from partial_fc.engines.deepspeed import import_deepspeed
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.state import BackboneState, OptimizerState, state_of_a_step, whole_state

pytest.importorskip("deepspeed")

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}


def module() -> nn.Module:
    """With running statistics, a parameter without gradient, and sizes that do not divide."""
    found = nn.Sequential(backbone(), nn.BatchNorm1d(D))
    found[0][2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Training:
    """The same data on every rank, so that each number of ranks, and one plain process, has the same gradient."""

    def __init__(self, engine: str, optimizer: str) -> None:
        self.backbone = module()
        kind, options = OPTIMIZERS[optimizer]
        self.optimizer = kind(trainable(self.backbone), **options)
        self.model: Any = self.backbone
        if engine.startswith("zero"):
            config = {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_clipping": 0.0,  # DeepSpeed clips to 1.0 where nothing is said
                "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            }
            self.model, *_ = import_deepspeed().initialize(model=self.backbone, optimizer=self.optimizer, config=config)
        if engine == "fsdp2":
            fully_shard(self.backbone)
            self.optimizer = kind(trainable(self.backbone), **options)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            inputs, wanted = torch.randn(16, IMAGE, generator=generator), torch.randn(16, D, generator=generator)
            loss = (self.model(inputs) - wanted).square().mean()
            if hasattr(self.model, "step"):
                self.model.backward(loss)
                self.model.step()
            else:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def named(self) -> dict[str, Any]:
        return {"backbone": BackboneState(self.model), "optimizer": OptimizerState(self.model, self.optimizer)}

    def state(self) -> dict[str, Tensor]:
        """Everything, whole."""
        found = whole_state(self.model)
        for i, state in OptimizerState(self.model, self.optimizer).state_dict()["state"].items():
            for key, value in state.items():
                found[f"{i}.{key}"] = whole(value).clone()
        return found


def saved(rank: int, world: int, engine: str, optimizer: str, path: str) -> dict[str, Tensor]:
    """Three steps, a checkpoint, two more: what there is at the end."""
    training = Training(engine, optimizer)
    training.train(0, 3)
    save_checkpoint(path, **training.named())
    training.train(3, 5)
    return training.state()


def loaded(rank: int, world: int, engine: str, optimizer: str, path: str) -> dict[str, Tensor]:
    training = Training(engine, optimizer)
    load_checkpoint(path, **training.named())
    training.train(3, 5)
    return training.state()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("engine", "another"),
    [("zero1", "zero3"), ("zero2", "plain"), ("zero3", "fsdp2"), ("fsdp2", "zero1"), ("plain", "zero2")],
)
def test_training_goes_on_in_another_engine_on_another_number_of_ranks(ranks, tmp_path, engine, another, optimizer):
    path = str(tmp_path / "checkpoint")
    expected = ranks(2).run(saved, engine, optimizer, path)[0]
    dense = Training("plain", optimizer)
    dense.train(0, 5)
    torch.testing.assert_close(expected, dense.state(), rtol=1e-5, atol=1e-6)
    same = ranks(2).run(loaded, engine, optimizer, path)[1]
    assert all(torch.equal(same[name], value) for name, value in expected.items()) and same.keys() == expected.keys()
    for found in ranks(3).run(loaded, another, optimizer, path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    alone = loaded(0, 1, "plain", optimizer, path)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)


def refused(rank: int, world: int) -> str:
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True}
    model = backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    with pytest.raises(ValueError, match="ZeRO-0") as error:
        BackboneState(engine)
    return str(error.value)


def heads_optimizer(rank: int, world: int) -> list[str]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = backbone()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=plain, config=config)
    own = RowOptimizer(torch.optim.SGD, PartialFC(4, 5), lr=0.1)
    return [message_of(OptimizerState, engine, each) for each in (own, JointOptimizer(plain, own))]


def test_the_optimizer_of_a_head_is_not_that_of_the_engine(ranks):
    first, second = ranks(2).run(heads_optimizer)
    assert first == second
    assert all("is not the optimizer of the DeepSpeed engine; save it by a name of its own" in text for text in first)


def test_half_precision_without_zero_is_refused(ranks):
    assert "use ZeRO-1" in ranks(2).run(refused)[0]


def test_state_is_tried_where_the_parameters_are():
    """The meta device stands for a GPU, without which some classes and options do not work."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.empty(5))], lr=0.1, momentum=0.9)
    state = state_of_a_step(optimizer, torch.device("meta"))
    assert {name: each.device.type for name, each in state.items()} == {"momentum_buffer": "meta"}
