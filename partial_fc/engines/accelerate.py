"""Heads beside an Accelerate loop: they step, are clipped, scheduled and saved together with the prepared backbone.

    model, optimizer, schedule = accelerator.prepare(backbone, optimizer, schedule)              everything but the head
    head_optimizer, head_schedule = prepare_heads(accelerator, head_optimizer, head_schedule)    wrapped, not registered
    save_heads_with(accelerator, head=head, head_optimizer=head_optimizer, head_schedule=head_schedule)

    with accelerator.accumulate(model):
        accelerator.backward(head(model(images), labels))
        clip_grad_norm_(accelerator, model.parameters(), head, max_norm=5.0)    one norm, at the end of an accumulation
        head_optimizer.step(), optimizer.step(), head_schedule.step(), schedule.step(), zero_grad() of both

`accelerator.prepare` lets DDP replicate a module, and saves it from the main process alone. Both are wrong for rows
that are sharded across ranks. With `save_heads_with`, `accelerator.save_state(folder)` writes the heads to
folder/partial_fc, which any number of ranks can read.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc import checkpoint, optim
from partial_fc.checkpoint.named import check_to_save_here
from partial_fc.engines.heads import heads_of
from partial_fc.engines.joint import parameters_of
from partial_fc.engines.needs import need
from partial_fc.engines.same_save import NAME, Token, begin_save, check_same_save, end_save
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.rows import HasClassRows
from partial_fc.sharded import ShardedLoss

need("accelerate", "1.0")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.scheduler import AcceleratedScheduler  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

HEADS = "partial_fc"  # the heads' folder within a folder of save_state
SAVED_WITH = "_partial_fc_saved"  # what save_heads_with was given, as an attribute of an Accelerator
REFUSES_UNNAMED = "_partial_fc_refuses"  # whether save_state refuses heads inside a model that nobody saves

_wrapped: weakref.WeakSet[RowOptimizer] = weakref.WeakSet()  # by prepare_heads
_unscaled: weakref.WeakSet[RowOptimizer] = weakref.WeakSet()  # unscaled by clip_grad_norm_ since their last step


class HeadOptimizer(AcceleratedOptimizer):
    """A `RowOptimizer` that steps and clears its gradients only at the end of an accumulation.

    It skips the step if a GradScaler does. Under a GradScaler call its step() before the prepared optimizer's, which
    updates the scale.
    """

    _accelerate_step_called: bool  # set by the base class if the scaler did not skip the step

    def __init__(self, optimizer: RowOptimizer, **options: Any) -> None:
        super().__init__(optimizer, **options)
        _wrapped.add(optimizer)

    def __getattr__(self, name: str) -> Any:
        # hooks are registered with the RowOptimizer itself, whose step() and state_dict() call them
        if name.startswith("_optimizer_") and "optimizer" in vars(self):
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def step(self, closure: Any = None) -> None:
        if self.scaler is None or not self.gradient_state.sync_gradients:
            super().step(closure)
            return
        if closure is not None:
            raise ValueError("a closure cannot be given to step() under a GradScaler; compute the loss before step()")
        # as the base class does, but without scaler.update(), which the prepared optimizer calls once per step
        if (
            self.optimizer in _unscaled
            and self.scaler._per_optimizer_states[id(self.optimizer)]["stage"].name == "READY"
        ):
            raise RuntimeError(
                "under a GradScaler call the head's step() before the prepared optimizer's, which updates the scale"
            )
        _unscaled.discard(self.optimizer)
        self.optimizer.step = self._optimizer_patched_step_method
        self.scaler.step(self.optimizer)
        self.optimizer.step = self._optimizer_original_step_method
        self._is_overflow = not self._accelerate_step_called
        self._accelerate_step_called = False


def prepare_heads(accelerator: Accelerator, *things: Any) -> Any:
    """Wrap the optimizers and schedules of heads, as `accelerator.prepare` wraps a backbone's. Call it after `prepare`.

    things: `RowOptimizer`s and their learning-rate schedulers. Returns the wrapped ones in the same order; for a single
    thing, that one. Schedules step as prepared ones do: at the end of an accumulation, `num_processes` times per call
    unless split_batches is set.

    Raises TypeError for anything else (the head itself needs no preparation), and ValueError if a head or its optimizer
    was passed to `accelerator.prepare`, or with DeepSpeed, whose engine decides when to step (use
    partial_fc.engines.deepspeed).
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "with DeepSpeed the engine decides when to step: use partial_fc.engines.deepspeed instead of prepare_heads"
        )
    _check_not_prepared(accelerator, {str(index): thing for index, thing in enumerate(things)})
    if not vars(accelerator).setdefault(REFUSES_UNNAMED, False):
        vars(accelerator)[REFUSES_UNNAMED] = True
        accelerator.register_save_state_pre_hook(
            lambda models, *_: None if SAVED_WITH in vars(accelerator) else _check_named(models, {})
        )
    optimizers: dict[int, HeadOptimizer] = {}
    for thing in things:
        if isinstance(thing, RowOptimizer):  # its state is on the head's device; placing it would copy it
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
                "a head needs no preparation, and everything else must be passed to accelerator.prepare"
            )
    return prepared[0] if len(prepared) == 1 else tuple(prepared)


def clip_grad_norm_(
    accelerator: Accelerator,
    parameters: Iterable[Tensor],
    *heads: HasClassRows,
    max_norm: float,
    norm_type: float = 2.0,
) -> Tensor | None:
    """At the end of an accumulation, unscale gradients and call `partial_fc.clip_grad_norm_`; before that, return None.

    If the norm is not finite, backbone and heads skip the step together under a GradScaler. Without one the heads'
    on_nonfinite applies.

    Raises ValueError under accumulation if a head's optimizer did not go through `prepare_heads`: it would step in
    every micro-batch.
    """
    _check_wrapped(accelerator, [head.class_rows.live_optimizer for head in heads])
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
    """Make accelerator.save_state also write `named`, and load_state read it. Call it after `prepare`.

    named: heads, their optimizers, their schedules; anything else with a state dict, such as a `Progress`.

    They are saved by `save_checkpoint` to a folder `partial_fc` within Accelerate's, which any number of ranks can
    read; Accelerate's own files are then without heads inside a prepared model. Every rank must call save_state and
    load_state, with the same folder.

    Later calls add to what is saved; a name that was given before is replaced.

    Raises ValueError for a head inside a prepared model that is not named; under accumulation, for a
    `RowOptimizer` that did not go through `prepare_heads`; for heads and optimizers that were prepared, as
    `prepare_heads` does. load_state raises ValueError if heads and Accelerate's files are not of the same save, because
    it was cut short.
    """
    given: dict[str, Any] = {name: _unwrapped(thing) for name, thing in named.items()}
    plain: dict[str, Any] = {**vars(accelerator).get(SAVED_WITH, {}), **given}
    _check_not_prepared(accelerator, plain)
    check_to_save_here(plain)
    _check_wrapped(accelerator, plain.values())
    _check_named(accelerator._models, plain)
    if SAVED_WITH in vars(accelerator):
        vars(accelerator)[SAVED_WITH].update(given)
        return
    vars(accelerator)[SAVED_WITH] = plain
    saving: list[tuple[str, Token]] = []
    save_state = accelerator.save_state

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        _check_not_prepared(accelerator, plain)
        _check_named(models, plain)
        for model, state in zip(models, weights, strict=False):  # there are no weights with FSDP and DeepSpeed
            for name in [name for name in state if name.startswith(_prefixes(model, plain))]:
                del state[name]
        begin_save(folder, HEADS)
        token = Token()
        saving[:] = [(folder, token)]
        checkpoint.save_checkpoint(os.path.join(folder, HEADS), **plain, **{NAME: token})

    def save_and_sign(*args: Any, **options: Any) -> Any:
        saving.clear()
        folder = args[0] if args else options.get("output_dir")
        named_by_accelerate = accelerator.project_configuration.automatic_checkpoint_naming  # a new folder each time
        if folder is not None and not named_by_accelerate and _saves_before_hooks(accelerator):
            begin_save(folder, HEADS, rest_first=True)
        result = save_state(*args, **options)
        for folder, token in saving:
            end_save(folder, token)
        return result

    def load(models: list[Any], folder: str) -> None:
        check_same_save(folder, HEADS)
        checkpoint.load_checkpoint(os.path.join(folder, HEADS), **plain)
        models[:] = [_WithoutHeads(model, own) if (own := _prefixes(model, plain)) else model for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.save_state = save_and_sign


class _WithoutHeads:
    """Stands for a model with heads inside, which were loaded from another folder, while Accelerate loads the rest."""

    def __init__(self, model: nn.Module, prefixes: tuple[str, ...]) -> None:
        self.model = model
        self.prefixes = prefixes

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith(self.prefixes)}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, **options: Any) -> Any:
        found = self.model.load_state_dict(state_dict, strict=False, **options)
        found.missing_keys[:] = [name for name in found.missing_keys if not name.startswith(self.prefixes)]
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(
                f"checkpoint and model do not match: missing keys {found.missing_keys}, unexpected "
                f"{found.unexpected_keys}"
            )
        return found


def _unwrapped(thing: Any) -> Any:
    if isinstance(thing, AcceleratedOptimizer):
        return thing.optimizer
    return thing.scheduler if isinstance(thing, AcceleratedScheduler) else thing


def _check_not_prepared(accelerator: Accelerator, named: Mapping[str, Any]) -> None:
    """Raise ValueError for a prepared head, and for a prepared optimizer with rows, be they of what is named or not."""
    of_heads = [thing for thing in named.values() if isinstance(thing, ShardedLoss | RowOptimizer)]
    rows = {id(p) for thing in of_heads for p in thing.class_rows.everything}
    for model in accelerator._models:
        if isinstance(accelerator.unwrap_model(model), ShardedLoss):
            raise ValueError(
                "a head was passed to accelerator.prepare, which is for replicated modules; do not prepare heads"
            )
    # with FSDP2 the backbone's parameters are DTensors, too, and Accelerate saves the state of all ranks
    replicated = accelerator.distributed_type != DistributedType.FSDP
    for optimizer in accelerator._optimizers:
        own = _unwrapped(optimizer)
        if isinstance(own, RowOptimizer):
            raise ValueError(
                "a RowOptimizer was passed to accelerator.prepare, which saves the state of the main process alone; "
                "pass it to partial_fc.engines.accelerate.prepare_heads instead"
            )
        for parameter in parameters_of(own):
            if isinstance(parameter, DTensor) and (replicated or id(parameter) in rows):
                raise ValueError(
                    f"a {type(own).__name__} with rows of a head was passed to accelerator.prepare, which saves the "
                    "state of the main process alone; leave the head's parameters out, and give them a RowOptimizer, "
                    "which goes to partial_fc.engines.accelerate.prepare_heads"
                )


def _check_wrapped(accelerator: Accelerator, things: Iterable[Any]) -> None:
    """Raise ValueError under accumulation for a RowOptimizer that `prepare_heads` did not get."""
    joined = {id(head) for own in map(_unwrapped, accelerator._optimizers) for head in getattr(own, "heads", ())}
    for thing in things if accelerator.gradient_accumulation_steps > 1 else ():
        if isinstance(thing, RowOptimizer) and thing not in _wrapped and id(thing) not in joined:
            raise ValueError(
                "under gradient accumulation a RowOptimizer that did not go through prepare_heads steps in every "
                "micro-batch: head_optimizer = prepare_heads(accelerator, head_optimizer), before this call"
            )


def _check_named(models: Iterable[nn.Module], named: Mapping[str, Any]) -> None:
    """Raise ValueError if a head inside a prepared model would be saved by one rank."""
    known = {id(thing) for thing in named.values()}
    for model in models:
        for name, head in heads_of(model).items():
            if id(head) not in known and any(isinstance(p, DTensor) for p in head.parameters()):
                raise ValueError(
                    f"{name!r} is a head inside a prepared model, of which Accelerate would save the rows of the main "
                    "process alone; name it: save_heads_with(accelerator, head=model.head, ...)"
                )


def _saves_before_hooks(accelerator: Accelerator) -> bool:
    """Return whether save_state writes weights before it calls its hooks, which write the heads."""
    engines = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return accelerator.distributed_type in engines


def _prefixes(model: nn.Module, named: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how the names of the heads in `model` begin that are among what is named."""
    known = {id(thing) for thing in named.values()}
    return tuple(f"{name}." for name, head in heads_of(model).items() if id(head) in known)
