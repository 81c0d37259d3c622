"""Heads beside a DeepSpeed engine: the backbone in the engine (ZeRO 0, 1, 2 or 3), the heads and their optimizers outside.

    embeddings = engine(images)             backbone [n, D]; its gradients are averaged over the ranks, its states split by ZeRO
    loss = head(embeddings, labels)         the head's rows are this rank's
    engine.backward(loss)                   gradient of both, times the loss scale, over the accumulation steps
    engine.step()                           at the boundary of accumulation both step, or neither; then both gradients are cleared

`DeepSpeedHead(engine, head_optimizer)` makes engine.step() do so:

    head gradient / loss scale  ──>  its norm over all ranks  ──>  the engine's norm: not finite ──> overflow, which skips both
                                                                                      joint_clipping ──> one norm for both
    engine.step (backbone)      ──>  overflow, norm           ──>  head: skipped, or clipped by that norm and stepped

With ZeRO 1 to 3 the engine takes its norm from one method of its optimizer, on which this rests; ZeRO-0 in float32 has no such norm and is
judged and clipped here, before its step. Checked with DeepSpeed 0.19.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from partial_fc import checkpoint
from partial_fc.nonfinite.step_check import decide
from partial_fc.optim.clipping import clip_grad_norm_, gradient_norms
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.rows import HasClassRows
from partial_fc.shards import local_part

OLDEST = (0, 19)  # before it an engine went on with a norm that is not finite
AUTOCAST_SCALERS = ("torch_autocast_gradscaler", "torch_autocast_z0_gradscaler")
HEADS = "partial_fc"  # the heads' folder within an engine's checkpoint
INSTALL = "pip install 'partial_fc[deepspeed]'"


def import_deepspeed() -> Any:
    """The module `deepspeed`, made ready for this machine; to be called before `deepspeed.initialize` or an `Accelerator` that uses it.

    On a CPU its shared-memory collectives are left out: they would be compiled for half a minute at the first start.

    Raises ModuleNotFoundError if it is not installed, RuntimeError if it is older than what the adapter was checked with.
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
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed, and torch says so at each of them
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if deepspeed.get_accelerator().device_name() == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_version(version: str) -> None:
    """RuntimeError for a version of DeepSpeed that is too old."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(
            f"DeepSpeed {version} is too old: heads beside an engine need {oldest} or newer; {INSTALL} --upgrade"
        )


class DeepSpeedHead:
    """Makes `engine.step()` also the step of `optimizers`, the `RowOptimizer`s of heads outside the engine.

    Call engine.backward(loss) and engine.step() for every micro-batch, as without a head, and neither step() nor zero_grad() of the
    optimizers: at the boundary of accumulation they are stepped, or skipped with the backbone, and their gradients cleared. Under
    Accelerate, accelerator.backward(loss) calls engine.step().

    Args:
        engine: what `deepspeed.initialize` returned for the backbone, with an optimizer; accelerator.prepare's model under Accelerate.
        optimizers: of the heads; not built with update_in_backward.
        joint_clipping: clip backbone and heads by one norm, to the engine's "gradient_clipping". Without it the engine clips the backbone
            by the backbone's norm, and the heads are not clipped. DeepSpeed clips to 1.0 where its
            configuration says nothing; say 0 for none.

    skipped: whether the last step at a boundary was left out, by backbone and heads on all ranks alike: the gradient of either was not
    finite. Heads count it, or raise NonFiniteError at the engine's step, as their on_nonfinite says; under fp16 an overflow of the
    scaled gradient is neither counted nor an error. norm: with joint_clipping, that of the last gradient before clipping (0-d), else None.

    Raises ValueError for what cannot be made right: fp16 with ZeRO-0 (DeepSpeed scales the loss there and does not undo it), autocast in
    float16, "compute_grad_norm": false, "managed_gradient_accumulation": false, a head within the engine, and joint_clipping
    where the engine has no clipping or no single norm (bf16 with ZeRO-0; bf16 with ZeRO-1 and float32 accumulation).
    """

    def __init__(self, engine: Any, *optimizers: RowOptimizer, joint_clipping: bool = False) -> None:
        import_deepspeed()
        self.engine, self.optimizers, self.joint_clipping = engine, optimizers, joint_clipping
        self.heads = [optimizer.class_rows for optimizer in optimizers]
        self.skipped = False
        self.norm: Tensor | None = None
        self._scaled_norm = torch.zeros(())  # of the heads' gradient, in the engine's loss scale
        self._flags: Tensor | None = None  # of the heads, agreed: gradient, loss
        self._by_engine = (
            False  # whether the loss went through engine.backward, which divides it by the accumulation steps
        )
        _check_engine(engine, joint_clipping)
        self._check_heads()
        self._plain = not self._join_norm()
        self._step_alone, self._backward = engine.step, engine.backward
        engine.step, engine.backward = self._step, self._note_backward

    def _check_heads(self) -> None:
        within = {id(p) for p in self.engine.module.parameters()}
        for optimizer in self.optimizers:
            if optimizer.update_in_backward:
                raise ValueError(
                    "update_in_backward cannot be joined with DeepSpeed: rows would move before the engine may skip the step"
                )
            if any(id(p) in within for p in optimizer.class_rows.everything):
                raise ValueError("a head is within the DeepSpeed engine; give deepspeed.initialize the backbone alone")

    def _join_norm(self) -> bool:
        """Let the engine's optimizer see the heads' norm where it takes its own; False if it has no such place."""
        zero = self.engine.optimizer
        if hasattr(zero, "scaled_global_norm"):  # ZeRO 1, 2
            backbone_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda norm_type=2: self._with_heads([backbone_norm(norm_type)])
            zero.check_grad_overflow = True  # in bfloat16, too: else a norm that is not finite would be stepped with
            return True
        if hasattr(zero, "_get_norm_groups"):  # ZeRO 3
            groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: [self._with_heads(groups())]
            return True
        return False

    def _with_heads(self, norms: list[Tensor]) -> Tensor:
        """One norm of the backbone's groups, and of the heads with joint_clipping; infinite if any of them is not finite.

        DeepSpeed says -1 for a group's norm that is not.
        """
        groups = torch.stack([norm.float() for norm in norms])
        heads = self._scaled_norm.to(groups)
        total = torch.linalg.vector_norm(torch.cat((groups, heads.view(1))) if self.joint_clipping else groups)
        fine = (groups >= 0).all() & total.isfinite() & heads.isfinite()
        return torch.where(fine, total, torch.inf)

    # ------------------------------------------------------------------------------------------------ a step

    def _note_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._by_engine = True
        return self._backward(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """engine.step: as it was between boundaries, both steps at one."""
        if not self.engine.is_gradient_accumulation_boundary():
            return self._step_alone(*args, **kwargs)
        self._unscale()
        heads_norm = self._heads_norm()
        scale = self.loss_scale()
        self._scaled_norm = heads_norm * scale
        if self._plain:
            result = self._step_plain(heads_norm, *args, **kwargs)
        else:
            result = self._step_alone(*args, **kwargs)
            self.skipped = bool(self.engine.optimizer.overflow)
            if self.joint_clipping:
                self.norm = norm = torch.as_tensor(self.engine.get_global_grad_norm())
                if not self.skipped:
                    self._scale_heads((self.engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0))
        self._conclude()
        if not self.skipped:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._by_engine = False
        return result

    def _heads_norm(self) -> Tensor:
        """The norm of the heads' gradient; infinite on all ranks if a head is to leave the step out, or a loss is not finite."""
        norms, flags = gradient_norms([], self.heads, 2.0, any(head.record.watches for head in self.heads))
        norm = (
            torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
            if norms
            else torch.zeros(())
        )
        if any(head.record.skipped for head in self.heads):
            norm = torch.full_like(norm, torch.inf)
        self._flags = flags
        return norm if flags is None else torch.where((flags > 0).any().to(norm.device), torch.inf, norm)

    def _conclude(self) -> None:
        """Tell the heads what came of the step: counted, an error, or the loss scale's business, as `check_gradients` says it."""
        if self._flags is None:
            return
        bad_gradient = torch.tensor(float(self.skipped)).to(self._flags)
        decide(self.heads, torch.stack((bad_gradient, self._flags[1])), [], _Scale() if self._scales() else None)

    def tell(self, losses: Iterable[HasClassRows]) -> None:
        """Let losses without an optimizer here (a `CenterLoss`, before its step()) leave out the step that was left out."""
        for loss in losses:
            record = loss.class_rows.record
            record.mark_checked()
            record.bad_step |= self.skipped

    def _scales(self) -> bool:
        """Whether the engine moves a loss scale, so that an overflow is nothing but a sign to lower it."""
        return bool(self.engine.fp16_enabled())

    def loss_scale(self) -> float:
        """What the engine multiplies the loss with now: 1 but in float16."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def _unscale(self) -> None:
        """Make the heads' gradient that of the mean over micro-batches, without the loss scale."""
        divisor = self.loss_scale()
        if not self._by_engine:  # engine.scale(loss).backward(), which divides the backbone's part alone
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

    def _step_plain(self, heads_norm: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The step of an engine without a norm of its own: it has averaged the gradients, and a torch optimizer steps by them."""
        engine, backbone = self.engine, list(self.engine.module.parameters())
        if (
            self.joint_clipping
        ):  # after it the backbone's own norm is within the limit, so that the engine's clipping changes nothing
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
            result = self._step_alone(*args, **kwargs)
            self.skipped = bool(getattr(engine.optimizer, "overflow", False))
            return result
        step, clip = engine.optimizer.step, engine.clip_fp32_gradients
        engine.optimizer.step = engine.clip_fp32_gradients = lambda *_, **__: None
        try:
            result = self._step_alone(*args, **kwargs)  # counts, and clears the gradients
        finally:
            engine.optimizer.step, engine.clip_fp32_gradients = step, clip
        engine.skipped_steps, engine._step_applied = engine.skipped_steps + 1, False
        return result


class _Scale:
    """Stands for a GradScaler where DeepSpeed does what one would do."""

    _per_optimizer_states: ClassVar[dict[int, Any]] = {}

    def is_enabled(self) -> bool:
        return True


def _check_engine(engine: Any, joint_clipping: bool) -> None:
    """ValueError for an engine that heads cannot be stepped with."""
    optimizer, stage = getattr(engine, "optimizer", None), engine.zero_optimization_stage()
    if not hasattr(optimizer, "step"):
        raise ValueError(
            "the DeepSpeed engine has no optimizer; give deepspeed.initialize one, or name one in its configuration"
        )
    if stage == 0 and engine.fp16_enabled():
        raise ValueError(
            "fp16 with ZeRO-0 gives wrong gradients in DeepSpeed; use ZeRO-1 (its states are split, nothing else changes)"
        )
    # also where an engine with it was made in this process before, which DeepSpeed remembers for all that follow
    if any(getattr(holder, name, None) for holder in (engine, optimizer) for name in AUTOCAST_SCALERS):
        raise ValueError(
            "torch_autocast in float16 scales the loss out of reach of the heads; use bfloat16, or fp16.enabled"
        )
    if not engine.managed_gradient_accumulation():
        raise ValueError('"managed_gradient_accumulation": false leaves no boundary to step the heads at; leave it out')
    if not getattr(optimizer, "compute_grad_norm", True):
        raise ValueError('"compute_grad_norm": false leaves no norm by which a step could be skipped; leave it out')
    if joint_clipping and not engine.gradient_clipping() > 0:
        raise ValueError('joint_clipping needs "gradient_clipping" above 0 in the DeepSpeed configuration')
    own_norm = type(optimizer).__name__ in ("BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer")
    if joint_clipping and own_norm:
        raise ValueError(
            f"joint_clipping cannot reach the norm of {type(optimizer).__name__} (bf16 with ZeRO-{int(stage)}); use ZeRO-2 or 3, or "
            "leave data_types.grad_accum_dtype out with ZeRO-1"
        )


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_with_engine(engine: Any, folder: str | os.PathLike[str], tag: str | None = None, **named: Any) -> None:
    """engine.save_checkpoint(folder, tag), and `named` (heads, their optimizers, schedules) beside it in folder/tag/partial_fc.

    Every rank must call it. The heads are written first, so that `latest`, which the engine writes last, names a complete checkpoint.
    Raises as `partial_fc.save_checkpoint` does.
    """
    tag = f"global_step{engine.global_steps}" if tag is None else tag
    checkpoint.save_checkpoint(Path(folder) / tag / HEADS, **named)
    engine.save_checkpoint(str(folder), tag=tag)


def load_with_engine(engine: Any, folder: str | os.PathLike[str], tag: str | None = None, **named: Any) -> None:
    """engine.load_checkpoint(folder, tag), the newest without a tag, and `named` from beside it. Every rank must call it.

    The engine's part needs as many ranks as saved it. The heads' does not: on another number of ranks load it alone, by
    `partial_fc.load_checkpoint(folder/tag/partial_fc, ...)`, or save the backbone as `BackboneState`, which has no such limit.

    Raises FileNotFoundError if there is none; ValueError as `partial_fc.load_checkpoint` does.
    """
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise FileNotFoundError(
            f"no checkpoint of a DeepSpeed engine in {folder}" + ("" if tag is None else f" with the tag {tag}")
        )
    checkpoint.load_checkpoint(Path(path).parent / HEADS, **named)
