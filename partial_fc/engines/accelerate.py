"""Heads beside what `accelerator.prepare` wraps: stepped, clipped, scheduled and saved together with it.

    model, optimizer, schedule = accelerator.prepare(backbone, optimizer, schedule)              everything but the head
    head_optimizer, head_schedule = prepare_heads(accelerator, head_optimizer, head_schedule)    wrapped alike, registered nowhere
    save_heads_with(accelerator, head=head, head_optimizer=head_optimizer, head_schedule=head_schedule)

    with accelerator.accumulate(model):
        accelerator.backward(head(model(images), labels))
        clip_grad_norm_(accelerator, model.parameters(), head, max_norm=5.0)     one norm, at the end of an accumulation
        head_optimizer.step(), optimizer.step(), head_schedule.step(), schedule.step(), zero_grad() of both

What is prepared is replicated by DDP, and saved from the main process alone; neither is right for rows that lie on all ranks.
`accelerator.save_state(folder)` then writes them to folder/partial_fc, for any number of ranks to read.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from partial_fc import checkpoint, optim
from partial_fc.engines.needs import need
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.rows import HasClassRows
from partial_fc.sharded import ShardedLoss

need("accelerate", "1.0")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.scheduler import AcceleratedScheduler  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

HEADS = "partial_fc"  # the heads' folder within one of save_state

_unscaled: weakref.WeakSet[RowOptimizer] = weakref.WeakSet()  # by clip_grad_norm_, since their last step


class HeadOptimizer(AcceleratedOptimizer):
    """A `RowOptimizer` that steps and clears its gradients only at the end of an accumulation, and not where a GradScaler skips the step.

    Under a GradScaler call its step() before that of the prepared optimizer, which moves the scale on.
    """

    _accelerate_step_called: bool  # the base's note that the scaler did not skip the step

    def step(self, closure: Any = None) -> None:
        if self.scaler is None or not self.gradient_state.sync_gradients:
            super().step(closure)
            return
        # as the base does, but for scaler.update(): that is the prepared optimizer's, once a step
        if (
            self.optimizer in _unscaled
            and self.scaler._per_optimizer_states[id(self.optimizer)]["stage"].name == "READY"
        ):
            raise RuntimeError(
                "under a GradScaler the head's optimizer steps before the prepared one, which forgets what was unscaled"
            )
        _unscaled.discard(self.optimizer)
        self.optimizer.step = self._optimizer_patched_step_method
        self.scaler.step(self.optimizer)
        self.optimizer.step = self._optimizer_original_step_method
        self._is_overflow = not self._accelerate_step_called
        self._accelerate_step_called = False


def prepare_heads(accelerator: Accelerator, *things: Any) -> Any:
    """What accelerator.prepare is for a backbone's optimizer and schedule, for those of heads; call it after `accelerator.prepare`.

    things: `RowOptimizer`s and learning-rate schedulers on them, returned wrapped, in the same order (one alone: itself). Schedules step
    as prepared ones do: at the end of an accumulation, `num_processes` times a call unless split_batches.

    Raises TypeError for other things (the head itself stays as it is), ValueError if a head or its optimizer was given to
    `accelerator.prepare`, or with DeepSpeed, whose engine steps by its own rules (partial_fc.engines.deepspeed).
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "with DeepSpeed the engine decides when to step: use partial_fc.engines.deepspeed instead of prepare_heads"
        )
    _check_not_prepared(accelerator)
    optimizers: dict[int, HeadOptimizer] = {}
    for thing in things:
        if isinstance(thing, RowOptimizer):  # its state is where its head is; placing it would go through a state dict
            optimizers[id(thing)] = HeadOptimizer(thing, device_placement=False, scaler=accelerator.scaler)
    prepared = []
    for thing in things:
        if id(thing) in optimizers:
            prepared.append(optimizers[id(thing)])
        elif isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
            own = [optimizers[id(thing.optimizer)]] if id(thing.optimizer) in optimizers else list(optimizers.values())
            prepared.append(
                AcceleratedScheduler(thing, own, accelerator.step_scheduler_with_optimizer, accelerator.split_batches)
            )
        else:
            raise TypeError(
                f"prepare_heads takes RowOptimizers and their learning-rate schedulers, not {type(thing).__name__}; "
                "a head needs no preparation, everything else is for accelerator.prepare"
            )
    return prepared[0] if len(prepared) == 1 else tuple(prepared)


def clip_grad_norm_(
    accelerator: Accelerator,
    parameters: Iterable[Tensor],
    *heads: HasClassRows,
    max_norm: float,
    norm_type: float = 2.0,
) -> Tensor | None:
    """`partial_fc.clip_grad_norm_` at the end of an accumulation, of gradients without their loss scale; None in between.

    If it is not finite, backbone and heads skip the step together under a GradScaler; without one it goes by the heads' on_nonfinite.
    """
    if not accelerator.sync_gradients:
        return None
    scaler = accelerator.scaler
    if scaler is not None:
        accelerator.unscale_gradients()
        for head in heads:
            optimizer = head.class_rows.live_optimizer
            if optimizer is not None:
                scaler.unscale_(optimizer)
                _unscaled.add(optimizer)
    return optim.clip_grad_norm_(parameters, *heads, max_norm=max_norm, norm_type=norm_type, scaler=scaler)


def save_heads_with(accelerator: Accelerator, **named: checkpoint.Stateful) -> None:
    """From now on accelerator.save_state also writes `named`, and load_state reads them: heads, their optimizers, their schedules.

    They go through `save_checkpoint` into a folder `partial_fc` within Accelerate's, which any number of ranks reads. Every rank must
    call save_state and load_state, with the same folder.
    """
    _check_not_prepared(accelerator)
    plain: dict[str, Any] = {name: _unwrapped(thing) for name, thing in named.items()}

    def save(models: Any, weights: Any, folder: str) -> None:
        _check_not_prepared(accelerator)
        checkpoint.save_checkpoint(os.path.join(folder, HEADS), **plain)

    def load(models: Any, folder: str) -> None:
        checkpoint.load_checkpoint(os.path.join(folder, HEADS), **plain)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _unwrapped(thing: Any) -> Any:
    if isinstance(thing, AcceleratedOptimizer):
        return thing.optimizer
    return thing.scheduler if isinstance(thing, AcceleratedScheduler) else thing


def _check_not_prepared(accelerator: Accelerator) -> None:
    for model in accelerator._models:
        if isinstance(accelerator.unwrap_model(model), ShardedLoss):
            raise ValueError(
                "a head was given to accelerator.prepare, which is for what all ranks hold alike; leave it as it is"
            )
    for optimizer in accelerator._optimizers:
        if isinstance(_unwrapped(optimizer), RowOptimizer):
            raise ValueError(
                "a RowOptimizer was given to accelerator.prepare, which saves it from the main process alone, and reads it on all ranks; "
                "give it to partial_fc.engines.accelerate.prepare_heads instead"
            )
