"""What the backbone of a run trains in: DDP, FSDP2 or DeepSpeed, as Accelerate's launcher or the settings say; the head is outside of all.

    make_accelerator(config)     the processes, the device, and which engine
    make_engine(...)             the backbone and its optimizer in it; one face for the trainer:

    with engine.accumulate():    backward(loss) of every micro-batch; at the last one of a step
        norm = engine.step()     one gradient norm over backbone and head, both optimizers, or neither when a step is skipped
    engine.named()               weights and optimizer state in the form of the plain module, for the run's checkpoints
    engine.whole_backbone()      the module to evaluate, whole on every rank

DeepSpeed steps within backward, by its own loss scale and norm; `DeepSpeedHead` makes the head a part of that.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.state import PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc import CenterLoss, PartialFC, RowOptimizer, check_gradients, clip_grad_norm_, naming_the_missing
from partial_fc.engines.deepspeed import DeepSpeedHead, import_deepspeed
from partial_fc.engines.state import BackboneState, OptimizerState, whole_state
from partial_fc.training.config import RunConfig, TrainConfig
from partial_fc.training.errors import UserError


def make_accelerator(config: RunConfig) -> Accelerator:
    """The run's Accelerator. UserError for an engine that is not installed or cannot do what the settings ask."""
    train = config.train
    cpu = train.cpu or not torch.cuda.is_available()
    deepspeed = train.deepspeed is not None or _asked("ACCELERATE_USE_DEEPSPEED")
    group = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=train.timeout))
    options: dict[str, Any] = {
        "cpu": cpu,
        "mixed_precision": train.mixed_precision,
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=train.accumulation),
        "step_scheduler_with_optimizer": False,
        "log_with": config.output.trackers,
        "project_dir": config.output.folder,
        "kwargs_handlers": [group],
    }
    if deepspeed:
        _check_deepspeed(train)
        group.backend = "gloo" if cpu else "nccl"
        options.update(cpu=False, mixed_precision="no")
        if not _asked("ACCELERATE_USE_DEEPSPEED"):  # else Accelerate makes it of what its launcher said
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=train.deepspeed)
    accelerator = Accelerator(**options)
    if deepspeed:
        _set_deepspeed(accelerator, train)
    elif _asked("ACCELERATE_USE_FSDP"):
        _set_fsdp(accelerator, train)
    return accelerator


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_deepspeed(train: TrainConfig) -> None:
    if "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs its processes started: use accelerate launch, torchrun or deepspeed")
    if train.cpu and torch.cuda.is_available():
        raise UserError(
            "--train.cpu cannot make DeepSpeed leave the GPUs alone; hide them with CUDA_VISIBLE_DEVICES= in the environment"
        )
    if train.mixed_precision == "fp16":
        raise UserError("--train.mixed_precision fp16 is not for DeepSpeed here; use bf16")
    try:
        import_deepspeed()
        import transformers  # noqa: F401, Accelerate reads DeepSpeed's configuration with it
    except (ModuleNotFoundError, RuntimeError) as error:
        raise UserError(f"DeepSpeed was asked for: {error}; pip install 'partial_fc[deepspeed]'") from error


def _set_deepspeed(accelerator: Accelerator, train: TrainConfig) -> None:
    """What the settings say of batches, accumulation, clipping and precision goes before what DeepSpeed's configuration says."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise UserError(
                f"DeepSpeed's configuration names a {name}, and so do the run's settings; take it out of the former"
            )
    micro_batch = train.batch_size // train.accumulation // accelerator.num_processes
    settings.update(
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=train.accumulation,
        train_batch_size=micro_batch * train.accumulation * accelerator.num_processes,
        gradient_clipping=train.clip_norm or 0.0,
    )
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    half = next((name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled") is True), "no")
    if half not in ("no", train.mixed_precision):
        raise UserError(
            f"DeepSpeed's configuration enables {half}, and --train.mixed_precision is {train.mixed_precision}; give the latter bf16, "
            "or take the former out"
        )
    if train.mixed_precision == "bf16":
        # DeepSpeed's own bf16 makes the weights bfloat16, and batch normalisation then fails; autocast is what bf16 means in DDP
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _set_fsdp(accelerator: Accelerator, train: TrainConfig) -> None:
    """Accelerate knows FSDP on GPUs alone; on a CPU its state is told here."""
    if accelerator.num_processes == 1:
        return
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()
        if train.mixed_precision != "no":
            plugin.set_mixed_precision(train.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        for state in (
            accelerator.state,
            PartialState(),
        ):  # what each later look at the first takes over from the second
            state.distributed_type = DistributedType.FSDP
    # every rank has built the module; and Accelerate's loading from rank 0 fails where a module has buffers
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if not accelerator.is_fsdp2:
        raise UserError(
            "FSDP 1 flattens parameters beyond the checkpoints' reach; set fsdp_version: 2 in Accelerate's configuration"
        )


def make_engine(
    accelerator: Accelerator,
    build: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    head: PartialFC,
    head_optimizer: RowOptimizer,
    train: TrainConfig,
) -> Engine:
    """The engine that Accelerate was told of; build and optimizer: of the backbone, on any device."""
    kind = _DeepSpeed if accelerator.distributed_type == DistributedType.DEEPSPEED else Engine
    try:
        return kind(accelerator, build, optimizer, head, head_optimizer, train)
    except ValueError as error:
        raise UserError(str(error)) from error


class Engine:
    """The backbone in DDP, in FSDP2, or alone in one process.

    model: what to call with images `[n, C, H, W]`. optimizer: of the backbone, for schedules; the engine steps it, as `prepared`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        build: Callable[[], nn.Module],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        head: PartialFC,
        head_optimizer: RowOptimizer,
        train: TrainConfig,
    ) -> None:
        self.accelerator, self.head, self.head_optimizer, self._build, self._train = (
            accelerator,
            head,
            head_optimizer,
            build,
            train,
        )
        self.beside: list[
            CenterLoss
        ] = []  # losses that have no optimizer, but leave out the steps that the others leave out
        backbone = build().to(accelerator.device)
        self.optimizer = optimizer(backbone)
        # the head, its optimizer and the schedules stay as they are: nothing of them is to be replicated or averaged
        self.model, self.prepared = accelerator.prepare(backbone, self.optimizer)
        self._heads, self._head_optimizers = [head], [head_optimizer]

    def add_heads(self, heads: Iterable[PartialFC], optimizers: Iterable[RowOptimizer]) -> None:
        """Heads beside the first, clipped and stepped with it; UserError for an engine that steps by itself."""
        if type(self) is not Engine:
            raise UserError("DeepSpeed takes one head; leave --data.mix out, or train in DDP or FSDP2")
        self._heads += heads
        self._head_optimizers += optimizers

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return "FSDP2" if self.accelerator.is_fsdp2 else "DDP" if self.accelerator.num_processes > 1 else "none"

    def accumulate(self) -> AbstractContextManager[Any]:
        """Around each micro-batch."""
        context: AbstractContextManager[Any] = self.accelerator.accumulate(self.model)
        return context

    def autocast(self) -> AbstractContextManager[Any]:
        """Around each forward."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> bool:
        """Whether this was the last micro-batch of a step."""
        self.accelerator.backward(loss)
        return bool(self.accelerator.sync_gradients)

    def step(self) -> Tensor | None:
        """One optimizer step of backbone and head, then no gradients; the norm of their gradient if it is clipped."""
        scaler, norm = self.accelerator.scaler, None
        if scaler is not None:
            self.accelerator.unscale_gradients()
            for each in self._head_optimizers:
                scaler.unscale_(each)
        losses = (*self._heads, *self.beside)
        if self._train.clip_norm is not None:
            norm = clip_grad_norm_(self.model.parameters(), *losses, max_norm=self._train.clip_norm, scaler=scaler)
        else:
            check_gradients(self.model.parameters(), *losses, scaler=scaler)
        for each in self._head_optimizers:
            if scaler is not None:
                scaler.step(each)  # before the prepared optimizer, whose step also updates the scale
            else:
                each.step()
        self.prepared.step()
        self.prepared.zero_grad()
        for each in self._head_optimizers:
            each.zero_grad()
        return norm

    @property
    def skipped(self) -> bool:
        """Whether the last step was left out, by backbone and head alike."""
        return bool(self.accelerator.optimizer_step_was_skipped) or self.head.skipped

    # ------------------------------------------------------------------------------------------------ weights and state

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = getattr(self.model, "module", self.model)
        return module

    def named(self) -> dict[str, Any]:
        """For the run's checkpoints, in the form of the plain module: another engine can go on from them."""
        named = {"backbone": BackboneState(self.model), "optimizer": OptimizerState(self.model, self.optimizer)}
        return named if self.accelerator.scaler is None else {**named, "scaler": self.accelerator.scaler}

    def agree_on_buffers(self) -> None:
        """Give all ranks rank 0's batch statistics, as DDP does before the next forward."""
        if self.accelerator.num_processes > 1:
            with naming_the_missing("the exchange of batch statistics"):
                for buffer in self._module.buffers():
                    dist.broadcast(buffer, src=0)

    def whole_backbone(self) -> nn.Module:
        """The trained module: itself where it is whole, else a copy in float32 with the weights of all ranks; every rank must call it."""
        self.agree_on_buffers()
        if not any(isinstance(p, DTensor) for p in self._module.parameters()) and type(self) is Engine:
            return self._module
        backbone = self._build().to(self.accelerator.device)
        backbone.load_state_dict(whole_state(self.model))
        return backbone

    def close(self) -> None:
        """Let go of what holds the process group."""
        del self.model, self.prepared
        self.accelerator.free_memory()
        gc.collect()


class _DeepSpeed(Engine):
    """The backbone in a DeepSpeed engine, which steps within backward, and the head with it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._head = DeepSpeedHead(self.model, self.head_optimizer, joint_clipping=self._train.clip_norm is not None)

    @property
    def name(self) -> str:
        return f"DeepSpeed ZeRO-{int(self.model.zero_optimization_stage())}"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.model.torch_autocast_enabled())

    def step(self) -> Tensor | None:
        self._head.tell(self.beside)
        return self._head.norm

    @property
    def skipped(self) -> bool:
        return self._head.skipped

    def close(self) -> None:
        del self._head
        super().close()
