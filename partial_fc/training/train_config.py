"""Settings of the training loop: how long, in which batches and precision, how it is saved, what stops it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from partial_fc.training.errors import UserError, check_at_least

LONGEST_TIMEOUT = 1_000_000_000  # seconds; clocks in C++ overflow at 292 years


@dataclass
class TrainConfig:
    """The run itself."""

    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 256
    """Images of an optimizer step, over all ranks and micro-batches together."""
    accumulation: int = 1
    """Micro-batches that a step's batch is computed in, to save memory."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient of backbone and head together; null for no clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of matrix products; fp16 needs CUDA."""
    cpu: bool = False
    """Train on the CPU even if there is another device."""
    deepspeed: str | None = None
    """JSON file of a DeepSpeed configuration (ZeRO stage, offload), unless the launcher names an engine; null for
    DDP."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; the last epoch always leaves one."""
    checkpoint_steps: int | None = None
    """Optimizer steps between two checkpoints within an epoch, besides those at the ends of epochs; null for none."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints while training continues; takes CPU memory of the size of a rank's weights and optimizer
    state."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    on_nonfinite: Literal["raise", "skip", "log"] = "raise"
    """What a NaN or infinity in embeddings, loss or gradient does: raise ends the run, skip skips the step, log only
    reports it."""
    max_skips: int | None = 20
    """Steps in a row that may be skipped before the run ends after all; null for any number."""
    watch_every: int = 0
    """Steps between two checks that all ranks still hold the same backbone, optimizer and margin; 0 for none."""
    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""

    @property
    def policy(self) -> dict[str, Any]:
        """What losses do about non-finite numbers, as their arguments."""
        return {"on_nonfinite": self.on_nonfinite, "max_skips": self.max_skips}

    def check(self) -> None:
        """UserError for values that no run can have."""
        for name in ("epochs", "batch_size", "accumulation", "checkpoint_every", "keep_last"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        check_at_least("train.watch_every", self.watch_every, 0)
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise UserError(f"--train.timeout is {self.timeout}; give seconds above 0, at most {LONGEST_TIMEOUT:,}")
        if self.max_skips is not None and self.max_skips < 0:
            raise UserError(f"--train.max_skips is {self.max_skips}; give at least 0, or null for any number")
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise UserError(f"--train.checkpoint_steps is {self.checkpoint_steps}; give at least 1, or null for none")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"--train.clip_norm is {self.clip_norm}; give a norm above 0, or null for no clipping")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"--train.batch_size {self.batch_size} is not a multiple of --train.accumulation {self.accumulation}; "
                "micro-batches must be of one size"
            )
        if self.deepspeed is not None and not Path(self.deepspeed).is_file():
            raise UserError(
                f"--train.deepspeed {self.deepspeed} does not exist; give a JSON file of a DeepSpeed configuration"
            )
        if self.mixed_precision == "fp16" and (self.cpu or not torch.cuda.is_available()):
            raise UserError("--train.mixed_precision fp16 needs CUDA; use bf16 on a CPU")
