"""The engine that trains the backbone: DDP, FSDP2 or DeepSpeed, chosen by Accelerate's launcher or the settings.

    make_accelerator(config)     processes, device and kind of engine
    make_engine(...)             wraps the backbone and its optimizer; the trainer uses every engine in the same way:

    with engine.accumulate():    around each micro-batch: engine.backward(loss), and after the last one of a step
        norm = engine.step()     clips backbone and head by one gradient norm, then steps (or skips) both optimizers
    engine.named()               weights and optimizer state, in the form of the unwrapped module, for checkpoints
    engine.whole_backbone()      the complete module on every rank, for evaluation

The head is not wrapped by an engine. DeepSpeed steps inside backward, with its own loss scale and norm; `DeepSpeedHead`
makes the head part of that.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
    """Return the run's Accelerator. Raises UserError for an engine that is missing or does not support the settings."""
    train = config.train
    cpu = train.cpu or not torch.cuda.is_available()
    deepspeed = train.deepspeed is not None or _is_true("ACCELERATE_USE_DEEPSPEED")
    group = group_options(train.timeout)
    if config.head.storage is not None and not cpu:
        group.backend = "cpu:gloo,cuda:nccl"  # rows on the host travel between ranks, too
    options: dict[str, Any] = {
        "cpu": cpu,
        "mixed_precision": train.mixed_precision,
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=train.accumulation),
        "step_scheduler_with_optimizer": False,
        "kwargs_handlers": [group],
    }
    if deepspeed:
        _check_deepspeed(train)
        group.backend = "gloo" if cpu else group.backend or "nccl"
        options.update(cpu=False, mixed_precision="no")
        if not _is_true(
            "ACCELERATE_USE_DEEPSPEED"
        ):  # otherwise Accelerate makes the plugin from its launcher's settings
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=train.deepspeed)
    accelerator = Accelerator(**options)
    if deepspeed:
        _set_deepspeed(accelerator, train)
    elif _is_true("ACCELERATE_USE_FSDP"):
        _set_fsdp(accelerator, train)
    return accelerator


def group_options(timeout: float) -> InitProcessGroupKwargs:
    """Return what the process group is to have. timeout: in seconds.

    Accelerate leaves out what equals its own default, 600 s, although torch's default for gloo is 1,800 s: so the
    number has a microsecond more than any that is set.
    """
    return InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout, microseconds=1))


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_deepspeed(train: TrainConfig) -> None:
    if "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs a launcher; use accelerate launch, torchrun or deepspeed")
    if train.cpu and torch.cuda.is_available():
        raise UserError(
            "--train.cpu does not keep DeepSpeed from using the GPUs; hide them with CUDA_VISIBLE_DEVICES= in the "
            "environment"
        )
    if train.mixed_precision == "fp16":
        raise UserError("--train.mixed_precision fp16 is not supported with DeepSpeed; use bf16")
    try:
        import_deepspeed()
        import transformers  # noqa: F401, Accelerate reads DeepSpeed's configuration with it
    except (ModuleNotFoundError, RuntimeError) as error:
        raise UserError(f"DeepSpeed cannot be used: {error}; pip install 'partial_fc[deepspeed]'") from error


def _set_deepspeed(accelerator: Accelerator, train: TrainConfig) -> None:
    """Overwrite sizes, accumulation, clipping and precision in DeepSpeed's configuration with the run's settings."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in settings:
            article = "an" if name == "optimizer" else "a"
            raise UserError(
                f"DeepSpeed's configuration has {article} {name}, but the run's settings define it; remove it from "
                "DeepSpeed's configuration"
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
            f"DeepSpeed's configuration enables {half}, but --train.mixed_precision is {train.mixed_precision}; set "
            f"--train.mixed_precision bf16, or remove {half} from DeepSpeed's configuration"
        )
    if train.mixed_precision == "bf16":
        # DeepSpeed's own bf16 converts the weights to bfloat16, and batch normalisation then fails. With the other
        # engines, bf16 means autocast, and so it does here.
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _set_fsdp(accelerator: Accelerator, train: TrainConfig) -> None:
    """Set FSDP2 up on a CPU, where Accelerate ignores it, and check its version."""
    if accelerator.num_processes == 1:
        return
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()
        if train.mixed_precision != "no":
            plugin.set_mixed_precision(train.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):  # the first copies its values from the second when it is read
            state.distributed_type = DistributedType.FSDP
    # Every rank has built the module. Accelerate's loading from rank 0 is not needed, and fails for modules with
    # buffers.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    if not accelerator.is_fsdp2:
        raise UserError(
            "FSDP 1 flattens parameters, so that checkpoints cannot be saved; set fsdp_version: 2 in Accelerate's "
            "configuration"
        )


@dataclass
class Trained:
    """The modules and optimizers that an engine trains.

    build returns the backbone and optimizer its optimizer; the backbone may be on any device. head and head_optimizer
    are not wrapped.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    head: PartialFC
    head_optimizer: RowOptimizer


def make_engine(accelerator: Accelerator, trained: Trained, train: TrainConfig) -> Engine:
    """Return the engine that `accelerator` is set up for."""
    kind = _DeepSpeed if accelerator.distributed_type == DistributedType.DEEPSPEED else Engine
    try:
        return kind(accelerator, trained, train)
    except ValueError as error:
        raise UserError(str(error)) from error


class Engine:
    """The backbone in DDP, in FSDP2, or unwrapped in a single process.

    model: the wrapped backbone, to call with images `[n, C, H, W]`. optimizer: that of the backbone, for schedules;
    the engine steps `prepared`, which wraps it.
    """

    def __init__(self, accelerator: Accelerator, trained: Trained, train: TrainConfig) -> None:
        self.accelerator = accelerator
        self.head = trained.head
        self.head_optimizer = trained.head_optimizer
        self.center_losses: list[CenterLoss] = []  # they have no optimizer, but skip the same steps
        self._build = trained.build
        self._train = train
        backbone = trained.build().to(accelerator.device)
        self.optimizer = trained.optimizer(backbone)
        # the head, its optimizer and the schedules are not prepared: they must be neither replicated nor averaged
        self.model, self.prepared = accelerator.prepare(backbone, self.optimizer)
        self._heads = [trained.head]
        self._head_optimizers = [trained.head_optimizer]

    def add_heads(self, heads: Iterable[PartialFC], optimizers: Iterable[RowOptimizer]) -> None:
        """Add further heads, clipped and stepped with the first. Raises UserError for DeepSpeed, which supports one."""
        if type(self) is not Engine:
            raise UserError("DeepSpeed supports a single head; train without --data.mix, or in DDP or FSDP2")
        self._heads += heads
        self._head_optimizers += optimizers

    @property
    def name(self) -> str:
        """The name of the engine in reports."""
        return "FSDP2" if self.accelerator.is_fsdp2 else "DDP" if self.accelerator.num_processes > 1 else "none"

    def accumulate(self) -> AbstractContextManager[Any]:
        """Return the context for each micro-batch."""
        context: AbstractContextManager[Any] = self.accelerator.accumulate(self.model)
        return context

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for each forward."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> bool:
        """Run the backward of a micro-batch; return whether it was the last one of a step."""
        self.accelerator.backward(loss)
        return bool(self.accelerator.sync_gradients)

    def step(self) -> Tensor | None:
        """Step the optimizers of backbone and head, then clear gradients. Return the gradient norm if it is clipped."""
        scaler = self.accelerator.scaler
        norm = None
        if scaler is not None:
            self.accelerator.unscale_gradients()
            for each in self._head_optimizers:
                scaler.unscale_(each)
        losses = (*self._heads, *self.center_losses)
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
        """Whether the last step was skipped, which backbone and head do together."""
        return bool(self.accelerator.optimizer_step_was_skipped) or self.head.skipped

    # ------------------------------------------------------------------------------------------------ weights and state

    @property
    def _module(self) -> nn.Module:
        module: nn.Module = getattr(self.model, "module", self.model)
        return module

    def named(self) -> dict[str, Any]:
        """Return the parts of a checkpoint, in the form of the unwrapped module, so that any engine can load them."""
        named = {"backbone": BackboneState(self.model), "optimizer": OptimizerState(self.model, self.optimizer)}
        return named if self.accelerator.scaler is None else {**named, "scaler": self.accelerator.scaler}

    def rebuild_buckets(self, image_shape: tuple[int, int, int]) -> None:
        """Let DDP put gradients into the buckets that it has after the first step. Before a checkpoint is loaded.

        DDP orders its buckets anew after the first backward, by the order in which gradients came. Where an element is
        in a bucket says in which order three ranks or more add it up: so a resumed run, whose DDP is new, would have
        other last digits in its first step. The gradients, batch statistics and random numbers of this backward are
        cleared, or loaded over.
        """
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.train()
            images = torch.zeros(2, *image_shape, device=self.accelerator.device)  # batch normalisation needs two
            with naming_the_missing("a backward before the checkpoint is loaded"):
                with self.autocast():
                    embeddings = self.model(images)
                embeddings.sum().backward()
            self.optimizer.zero_grad()

    def broadcast_buffers(self) -> None:
        """Broadcast rank 0's batch statistics to all ranks, as DDP does before a forward."""
        if self.accelerator.num_processes > 1:
            with naming_the_missing("the exchange of batch statistics"):
                for buffer in self._module.buffers():
                    dist.broadcast(buffer, src=0)

    def whole_backbone(self) -> nn.Module:
        """Return the trained module, or a complete float32 copy if its weights are sharded. Every rank must call it."""
        self.broadcast_buffers()
        if not any(isinstance(p, DTensor) for p in self._module.parameters()) and type(self) is Engine:
            return self._module
        backbone = self._build().to(self.accelerator.device)
        backbone.load_state_dict(whole_state(self.model))
        return backbone

    def close(self) -> None:
        """Release the objects that refer to the process group."""
        del self.model, self.prepared
        self.accelerator.free_memory()
        gc.collect()


class _DeepSpeed(Engine):
    """The backbone in a DeepSpeed engine, which steps backbone and head inside backward."""

    def __init__(self, accelerator: Accelerator, trained: Trained, train: TrainConfig) -> None:
        super().__init__(accelerator, trained, train)
        self._head = DeepSpeedHead(self.model, self.head_optimizer, joint_clipping=self._train.clip_norm is not None)

    @property
    def name(self) -> str:
        return f"DeepSpeed ZeRO-{int(self.model.zero_optimization_stage())}"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.model.torch_autocast_enabled())

    def step(self) -> Tensor | None:
        self._head.tell(self.center_losses)
        return self._head.norm

    @property
    def skipped(self) -> bool:
        return self._head.skipped

    def close(self) -> None:
        del self._head
        super().close()
