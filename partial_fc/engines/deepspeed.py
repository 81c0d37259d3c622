"""Heads beside a DeepSpeed engine: the backbone in the engine (ZeRO 0 to 3), the heads and their optimizers outside.

    embeddings = engine(images)         [n, D]; gradients are averaged across ranks, states are partitioned by ZeRO
    loss = head(embeddings, labels)     with this rank's rows of the head
    engine.backward(loss)               gradients of both, times the loss scale, over the micro-batches
    engine.step()                       after the last micro-batch both step, or neither; then gradients are cleared

`DeepSpeedHead(engine, head_optimizer)` makes engine.step() work like this:

    head gradient / loss scale  ──>  its norm across ranks  ──>  part of the engine's norm;
                                                                 if not finite it is an overflow, and both skip;
                                                                 with joint_clipping both are clipped by this norm
    engine.step (backbone)      ──>  overflow, norm         ──>  head: skips, or is clipped and steps

With ZeRO 1 to 3 the engine computes its norm in one method of its optimizer, which is replaced here. ZeRO-0 in float32
has no such norm; it is checked and clipped here, before its step. Tested with DeepSpeed 0.19.
"""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor

from partial_fc import checkpoint
from partial_fc.checkpoint.named import check_to_load, check_to_save
from partial_fc.distributed.agreement import on_first_rank
from partial_fc.distributed.shards import local_part
from partial_fc.engines.same_save import NAME, Token, begin_save, check_same_save, end_save
from partial_fc.nonfinite.step_check import decide, is_skipped
from partial_fc.nonfinite.wiring import refuse_if
from partial_fc.optim.clipping import clip_grad_norm_, gradient_norms
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.rows import HasClassRows

OLDEST = (0, 19, 8)  # with older engines weights are others, or move although the norm is not finite
AUTOCAST_SCALERS = ("torch_autocast_gradscaler", "torch_autocast_z0_gradscaler")
HEADS = "partial_fc"  # the heads' folder within an engine's checkpoint
INSTALL = "pip install 'partial_fc[deepspeed]'"


def import_deepspeed() -> Any:
    """Return the module `deepspeed`, prepared for this machine. Call it before `deepspeed.initialize` or `Accelerator`.

    On a CPU it disables DeepSpeed's shared-memory collectives, which would be compiled for half a minute at the first
    start.

    Raises ModuleNotFoundError if it is not installed, RuntimeError if it is too old.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ModuleNotFoundError(f"DeepSpeed is not installed: {INSTALL}", name="deepspeed") from None
    check_version(deepspeed.__version__)
    # DeepSpeed 0.19 uses names of collectives that torch 2.13 deprecates, which torch would report at every call
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_version(version: str) -> None:
    """Raise RuntimeError if the version of DeepSpeed is too old."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"DeepSpeed {version} is too old: heads beside an engine require {oldest} or newer; {INSTALL} --upgrade"
        )


class DeepSpeedHead:
    """Makes `engine.step()` also step the `RowOptimizer`s of heads outside the engine.

    Call engine.backward(loss) and engine.step() for every micro-batch, as without a head. step() and zero_grad() of the
    optimizers are then errors: after the last micro-batch they step, or skip together with the backbone, and their
    gradients are cleared. Under Accelerate, accelerator.backward(loss) calls engine.step().

    Args:
        engine: the engine of the backbone, from `deepspeed.initialize` with an optimizer, or from accelerator.prepare.
        optimizers: those of the heads; not built with update_in_backward.
        joint_clipping: clip backbone and heads by one norm, to the engine's "gradient_clipping". If False the engine
            clips the backbone by the backbone's norm, and the heads are not clipped. DeepSpeed clips to 1.0 if its
            configuration has no value; set 0 to disable clipping.

    Attributes:
        skipped: whether backbone and heads skipped the last step on all ranks, because a gradient was not finite. Heads
            count the step as skipped or raise NonFiniteError, depending on their on_nonfinite. Under fp16 an overflow
            of the scaled gradient is neither counted nor an error.
        norm: the norm of the last gradient before clipping (0-d) with joint_clipping, else None.
        is_stepping: whether engine.step() is at the heads' step.

    Raises ValueError for unsupported combinations: fp16 with ZeRO-0 (DeepSpeed scales the loss and does not undo it),
    autocast in float16, "compute_grad_norm": false, "managed_gradient_accumulation": false, a head inside the engine
    or its optimizer, a second DeepSpeedHead of one engine, and joint_clipping if the engine has no clipping or no
    single norm (bf16 with ZeRO-0; bf16 with ZeRO-1 and float32 accumulation).
    """

    def __init__(self, engine: Any, *optimizers: RowOptimizer, joint_clipping: bool = False) -> None:
        import_deepspeed()
        self.engine = engine
        self.optimizers = optimizers
        self.joint_clipping = joint_clipping
        self.heads = [optimizer.class_rows for optimizer in optimizers]
        self.skipped = False
        self.norm: Tensor | None = None
        self._scaled_norm = torch.zeros(())  # norm of the heads' gradient, times the engine's loss scale
        self._flags: Tensor | None = None  # of the heads, the same on all ranks: non-finite gradient, non-finite loss
        self._used_engine_backward = False  # engine.backward divides the loss by the accumulation steps
        _check_engine(engine, joint_clipping)
        self._check_heads()
        if isinstance(getattr(engine.step, "__self__", None), DeepSpeedHead):
            raise ValueError(
                "this engine has a DeepSpeedHead, and two would clip by two norms; pass the optimizers of all heads in "
                "one call, DeepSpeedHead(engine, first, second)"
            )
        self._has_own_norm = self._join_norm()
        for optimizer in optimizers:
            _guard(optimizer, self)
        self.is_stepping = False
        self._engine_step = engine.step
        self._engine_backward = engine.backward
        engine.step = self._step
        engine.backward = self._backward

    def _check_heads(self) -> None:
        within = {id(p) for p in self.engine.module.parameters()}
        stepped = {id(p) for p in _stepped(self.engine.optimizer)}
        for optimizer in self.optimizers:
            if optimizer.update_in_backward:
                raise ValueError(
                    "update_in_backward is incompatible with DeepSpeed: "
                    "rows would be updated before the engine can skip the step"
                )
            if any(id(p) in within for p in optimizer.class_rows.everything):
                raise ValueError("a head is inside the DeepSpeed engine; pass deepspeed.initialize the backbone alone")
            if any(id(p) in stepped for p in (*optimizer.class_rows.everything, *optimizer.class_rows.trainable)):
                raise ValueError(
                    "the engine's optimizer has parameters of a head, which its RowOptimizer steps; give "
                    "deepspeed.initialize an optimizer of the backbone alone"
                )

    def _join_norm(self) -> bool:
        """Make the engine's optimizer include the heads' norm in its own; return False if it has no such norm."""
        zero = self.engine.optimizer
        if hasattr(zero, "scaled_global_norm"):  # ZeRO 1, 2
            backbone_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda norm_type=2: self._with_heads([backbone_norm(norm_type)])
            zero.check_grad_overflow = True  # in bfloat16 too, which would otherwise step with a non-finite norm
            return True
        if hasattr(zero, "_get_norm_groups"):  # ZeRO 3
            groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: [self._with_heads(groups())]
            return True
        stage = int(self.engine.zero_optimization_stage())
        if stage > 1:
            raise RuntimeError(
                f"with this version of DeepSpeed the norm of ZeRO-{stage} cannot be joined with that of heads, so one "
                "could skip a step that the other takes; use a version that docs/versions.md lists"
            )
        return False

    def _with_heads(self, norms: list[Tensor]) -> Tensor:
        """Return the norm of the backbone (with joint_clipping also of the heads); infinity if any is not finite.

        DeepSpeed represents a non-finite norm of a group by -1.
        """
        groups = torch.stack([norm.float() for norm in norms])
        heads = self._scaled_norm.to(groups)
        total = torch.linalg.vector_norm(torch.cat((groups, heads.view(1))) if self.joint_clipping else groups)
        finite = (groups >= 0).all() & total.isfinite() & heads.isfinite()
        return torch.where(finite, total, torch.inf)

    # ------------------------------------------------------------------------------------------------ a step

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces engine.backward."""
        self._used_engine_backward = True
        return self._engine_backward(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces engine.step: between accumulation boundaries the engine's, at a boundary the step of both."""
        if not self.engine.is_gradient_accumulation_boundary():
            return self._engine_step(*args, **kwargs)
        self._unscale()
        heads_norm = self._heads_norm()
        scale = self.loss_scale()
        self._scaled_norm = heads_norm * scale
        if not self._has_own_norm:
            result = self._step_without_norm(heads_norm, *args, **kwargs)
        else:
            result = self._engine_step(*args, **kwargs)
            self.skipped = bool(self.engine.optimizer.overflow)
            if self.joint_clipping:
                self.norm = norm = torch.as_tensor(self.engine.get_global_grad_norm())
                if not self.skipped:
                    self._scale_heads((self.engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0))
        self._conclude()
        self.is_stepping = True
        try:
            if not self.skipped:
                for optimizer in self.optimizers:
                    optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        finally:
            self.is_stepping = False
        self._used_engine_backward = False
        return result

    def _heads_norm(self) -> Tensor:
        """Return the norm of the heads' gradient; infinity on all ranks if a head skips or a loss is not finite."""
        norms, flags = gradient_norms([], self.heads, 2.0, any(head.record.watches for head in self.heads))
        refuse_if(self.heads, flags)
        norm = torch.zeros(())
        if norms:
            norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
        if is_skipped(self.heads):
            norm = torch.full_like(norm, torch.inf)
        self._flags = flags
        return norm if flags is None else torch.where(flags.isfinite().all().to(norm.device), norm, torch.inf)

    def _conclude(self) -> None:
        """Report to the heads whether the step was skipped, as `check_gradients` does.

        They count it, raise an error, or leave it to the loss scale.
        """
        if self._flags is None:
            return
        scaler = _EngineScaler() if self._has_loss_scale() else None
        decide(self.heads, [math.inf if self.skipped else 0.0, *self._flags[1:].tolist()], [], scaler)

    def tell(self, losses: Iterable[HasClassRows]) -> None:
        """Make losses without an optimizer here (a `CenterLoss`, before its step()) skip the step if it was skipped."""
        for loss in losses:
            record = loss.class_rows.record
            record.mark_checked()
            record.bad_step |= self.skipped

    def _has_loss_scale(self) -> bool:
        """Return whether the engine adapts a loss scale, in which case an overflow is not an error."""
        return bool(self.engine.fp16_enabled())

    def loss_scale(self) -> float:
        """Return the engine's current loss scale: 1 except in float16."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def _unscale(self) -> None:
        """Divide the heads' gradient so that it is that of the mean over micro-batches, without the loss scale."""
        divisor = self.loss_scale()
        if not self._used_engine_backward:  # engine.scale(loss).backward(), which only divides the backbone's gradient
            divisor *= self.engine.gradient_accumulation_steps()
        if divisor != 1:
            self._scale_heads(torch.tensor(1 / divisor))

    @torch.no_grad()
    def _scale_heads(self, factor: Tensor) -> None:
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                if parameter.grad is not None:
                    grad = local_part(parameter.grad)
                    grad.mul_(factor.to(grad.device))

    def _step_without_norm(self, heads_norm: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Step an engine without a norm of its own, which averages gradients and steps an ordinary torch optimizer."""
        engine = self.engine
        backbone = list(engine.module.parameters())
        if self.joint_clipping:  # afterwards the backbone's norm is within the limit, so the engine does not clip again
            norms = [*gradient_norms(backbone, [], 2.0, False)[0], heads_norm]
            self.norm = norm = torch.linalg.vector_norm(torch.stack([each.to(heads_norm) for each in norms]))
            factor = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
            for parameter in backbone:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad))
            self._scale_heads(factor)
        else:
            norm = clip_grad_norm_(backbone, max_norm=torch.inf) + heads_norm
        self.skipped = not bool(norm.isfinite())
        if not self.skipped:
            result = self._engine_step(*args, **kwargs)
            self.skipped = bool(getattr(engine.optimizer, "overflow", False))
            return result
        step, clip = engine.optimizer.step, engine.clip_fp32_gradients
        engine.optimizer.step = engine.clip_fp32_gradients = lambda *_, **__: None
        try:
            result = self._engine_step(*args, **kwargs)  # only counts the step and clears the gradients
        finally:
            engine.optimizer.step, engine.clip_fp32_gradients = step, clip
        engine.skipped_steps += 1
        engine._step_applied = False
        return result


# the DeepSpeedHead that steps an optimizer: the last one, if it was beside other engines before
_beside: weakref.WeakKeyDictionary[RowOptimizer, weakref.ref[DeepSpeedHead]] = weakref.WeakKeyDictionary()


def _guard(optimizer: RowOptimizer, head: DeepSpeedHead) -> None:
    """Make step() and zero_grad() of the optimizer raise RuntimeError unless `head` calls them."""
    known = optimizer in _beside
    _beside[optimizer] = weakref.ref(head)
    if known:
        return
    for name in ("step", "zero_grad"):
        _guard_method(optimizer, name)


def _guard_method(optimizer: RowOptimizer, name: str) -> None:
    there: Any = getattr(optimizer, name)
    method = getattr(there, "__func__", None)  # a bound one would keep the optimizer alive
    wrapper: Any = there if method is None else None  # what a schedule has put in the place of a method

    @functools.wraps(method or there)
    def guarded(self: RowOptimizer, *args: Any, **kwargs: Any) -> Any:
        head = _beside[self]() if self in _beside else None
        if head is not None and not head.is_stepping:
            raise RuntimeError(
                f"{name}() of the optimizer of a head beside a DeepSpeed engine was called: engine.step() steps it "
                "after the last micro-batch, and clears its gradients; leave the call out"
            )
        return wrapper(*args, **kwargs) if method is None else method(self, *args, **kwargs)

    setattr(optimizer, name, MethodType(guarded, optimizer))


def _stepped(zero: Any) -> Iterator[Tensor]:
    """Yield the parameters that an engine's optimizer was given, also those that ZeRO has made flat."""
    for group in getattr(zero, "param_groups", ()):
        yield from group["params"]
    for name in ("bit16_groups", "fp16_groups"):
        for parameters in getattr(zero, name, ()):
            yield from parameters


class _EngineScaler:
    """Stands in for a GradScaler, whose work DeepSpeed does itself."""

    _per_optimizer_states: ClassVar[dict[int, Any]] = {}

    def is_enabled(self) -> bool:
        return True


def _check_engine(engine: Any, joint_clipping: bool) -> None:
    """Raise ValueError if heads cannot step together with this engine."""
    optimizer = getattr(engine, "optimizer", None)
    stage = engine.zero_optimization_stage()
    if not hasattr(optimizer, "step"):
        raise ValueError(
            "the DeepSpeed engine has no optimizer; pass one to deepspeed.initialize, or name one in its configuration"
        )
    if stage == 0 and engine.fp16_enabled():
        raise ValueError(
            "fp16 with ZeRO-0 gives wrong gradients in DeepSpeed; use ZeRO-1, which differs only in partitioned states"
        )
    # also if an earlier engine of this process used it, because DeepSpeed then enables it for all later ones
    if any(getattr(holder, name, None) for holder in (engine, optimizer) for name in AUTOCAST_SCALERS):
        raise ValueError(
            "torch_autocast in float16 uses a loss scale that heads cannot read; use bfloat16, or fp16.enabled"
        )
    if not engine.managed_gradient_accumulation():
        raise ValueError('"managed_gradient_accumulation": false has no boundary at which heads could step; remove it')
    if not getattr(optimizer, "compute_grad_norm", True):
        raise ValueError('"compute_grad_norm": false is not supported: skipping a step needs the norm; remove it')
    if joint_clipping and not engine.gradient_clipping() > 0:
        raise ValueError('joint_clipping requires "gradient_clipping" above 0 in the DeepSpeed configuration')
    own_norm = type(optimizer).__name__ in ("BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer")
    if joint_clipping and own_norm:
        raise ValueError(
            f"joint_clipping cannot change the norm of {type(optimizer).__name__} (bf16 with ZeRO-{int(stage)}); "
            "use ZeRO-2 or 3, or remove data_types.grad_accum_dtype with ZeRO-1"
        )


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_with_engine(engine: Any, folder: str | os.PathLike[str], tag: str | int | None = None, **named: Any) -> None:
    """Call engine.save_checkpoint(folder, tag), and save `named` to folder/tag/partial_fc.

    named: heads, their optimizers, schedules, a `Progress`.

    Every rank must call it. The heads are written first, so that `latest`, which the engine writes last, names a
    complete checkpoint. Where a tag is written over, a kill can leave a part of each save, which `load_with_engine`
    refuses. Raises the errors of `partial_fc.save_checkpoint`.
    """
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    check_to_save(named)
    begin_save(Path(folder) / tag, HEADS)
    token = Token()
    checkpoint.save_checkpoint(Path(folder) / tag / HEADS, **named, **{NAME: token})
    engine.save_checkpoint(str(folder), tag=tag)
    end_save(Path(folder) / tag, token)


def load_with_engine(engine: Any, folder: str | os.PathLike[str], tag: str | int | None = None, **named: Any) -> None:
    """Call engine.load_checkpoint(folder, tag), and load `named` from beside it. Without a tag it loads the newest.

    Every rank must call it. The engine's part needs the number of ranks that saved it; the heads' part does not. On
    another number of ranks load the heads alone, by `partial_fc.load_checkpoint(folder/tag/partial_fc, ...)`, or save
    the backbone as `BackboneState`, which loads on any number.

    Raises FileNotFoundError if there is no checkpoint, and the ValueErrors of `partial_fc.load_checkpoint`; ValueError
    if heads and engine are not of the same save, because one over an earlier one was cut short.
    """
    check_to_load(named)  # before the engine has changed
    tag = None if tag is None else str(tag)
    named_by = tag or on_first_rank(lambda: _newest(Path(folder)))
    if named_by is not None and on_first_rank(lambda: (Path(folder) / named_by).is_dir()):
        # not `whole`: a new tag has a token only after `latest` names it
        check_same_save(Path(folder) / named_by, HEADS, whole=False)
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        with_tag = "" if tag is None else f" with the tag {tag}"
        raise FileNotFoundError(f"no checkpoint of a DeepSpeed engine in {folder}{with_tag}")
    checkpoint.load_checkpoint(Path(path).parent / HEADS, **named)


def _newest(folder: Path) -> str | None:
    latest = folder / "latest"
    return latest.read_text().strip() if latest.is_file() else None
