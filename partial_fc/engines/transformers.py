"""`transformers.Trainer` for models with heads inside: `HeadTrainer`, a Trainer in which DDP ignores the heads.

args = TrainingArguments(...)                           creates the process group; build the model after it
model(**inputs) -> {"loss": head(backbone(...), labels)}
HeadTrainer(model=model, args=args, head_optimizers=[RowOptimizer(torch.optim.SGD, model.head, lr=0.1)], ...).train()

what a Trainer does                          what HeadTrainer changes
wraps the model in DDP                       DDP ignores the heads' parameters and buffers
create_optimizer                             the Trainer's optimizer for everything else is joined with the heads': one
                                             step, and one schedule, which changes every learning rate by the same
                                             factor (joint.py)
clips by max_grad_norm                       one norm of backbone and heads
writes checkpoint-N from the main process    without the heads; all ranks write them to checkpoint-N/partial_fc and
                                             their optimizers to partial_fc_optimizer, which any number of ranks can
                                             read
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc import checkpoint, optim
from partial_fc.engines.ddp import ignore_heads
from partial_fc.engines.heads import heads_of, without_heads
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.needs import need, need_methods
from partial_fc.engines.same_save import NAME, Token, begin_save, check_same_save, end_save
from partial_fc.optim.row_optimizer import RowOptimizer

need("transformers", "5.24")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

HEADS, OPTIMIZERS = "partial_fc", "partial_fc_optimizer"  # folders within a checkpoint of the Trainer


class _ClearRows(TrainerCallback):
    """Clears row gradients: the Trainer calls model.zero_grad(), which does not clear those of sampled heads."""

    def __init__(self, optimizers: Sequence[RowOptimizer]) -> None:
        self.optimizers = optimizers

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class HeadTrainer(Trainer):
    """A `transformers.Trainer` for a model that contains heads; head_optimizers: a `RowOptimizer` for each of them.

    Every rank must call train(), evaluate() and save_model(), because all write and read the heads. Accumulation,
    clipping, bf16, schedules and resuming on another number of ranks work as with any Trainer. The learning rates of
    heads follow the Trainer's schedule, each from its own initial value.

    The loss is the mean over the global batch, also if `forward(**kwargs)` would take `num_items_in_batch`: the Trainer
    divides it by the accumulation steps, and by nothing else.

    Raises ValueError for a model without heads, for a head without an optimizer, for `optimizers` with parameters of a
    head, for `model_init` (the optimizers of heads are those of one model), for `compute_loss_func`, for fp16 (a
    GradScaler cannot handle plain and sharded gradients in one optimizer; use bf16), and for DeepSpeed or FSDP, to
    which the Trainer would pass the whole model.
    """

    def __init__(self, model: nn.Module, args: Any, *, head_optimizers: Sequence[RowOptimizer], **options: Any) -> None:
        heads = heads_of(model)
        if not heads:
            raise ValueError(
                f"there is no PartialFC or CenterLoss in this {type(model).__name__}; use transformers.Trainer"
            )
        if args.fp16:
            raise ValueError("fp16 is not supported by HeadTrainer; use bf16=True")
        if args.deepspeed or args.fsdp:
            raise ValueError(
                "HeadTrainer supports DDP only; for DeepSpeed or FSDP write the loop yourself (docs/engines.md)"
            )
        trained = {id(optimizer.class_rows) for optimizer in head_optimizers}
        for name, head in heads.items():
            if id(head.class_rows) not in trained and any(p.requires_grad for p in head.parameters()):
                raise ValueError(
                    f"head_optimizers has no RowOptimizer for {name or 'the model'}, which would never be trained"
                )
        if options.get("model_init") is not None:
            raise ValueError(
                "model_init builds another model at each train(), whose heads head_optimizers would not step; pass the "
                "model, and build a HeadTrainer for each trial"
            )
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func is for losses that are sums over num_items_in_batch, which the Trainer multiplies "
                'by the ranks; return {"loss": head(embeddings, labels)} from the model'
            )
        own = (options.get("optimizers") or (None,))[0]
        if own is not None:
            _check_own(own, head_optimizers)
        ignore_heads(model)
        self._module = model
        self._token: dict[str, Token] = {}
        self.head_optimizers = list(head_optimizers)
        self._heads: dict[str, Any] = {name or "model": head for name, head in heads.items()}
        super().__init__(model, args, **options)
        # else the Trainer multiplies the loss by the ranks, and does not divide it by the accumulation steps, for a
        # model that divides by num_items_in_batch
        self.model_accepts_loss_kwargs = False
        self.add_callback(_ClearRows(self.head_optimizers))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer for everything but the heads, joined with theirs."""
        # after a train() Accelerate has wrapped it; a second one, or one with a smaller batch after running out of
        # memory, goes on with the same, as with any Trainer
        made: Any = self.optimizer
        prepared = made.optimizer if isinstance(made, AcceleratedOptimizer) else made
        if not isinstance(prepared, JointOptimizer):
            with _frozen(self._heads.values()):
                made = self.optimizer = JointOptimizer(super().create_optimizer(model), *self.head_optimizers)
        return made  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------ one norm

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> float:
        return float(self._norm(float("inf")) if grad_norm is None else grad_norm)

    def _norm(self, max_norm: float) -> Tensor:
        heads = self._heads.values()
        theirs = {id(p) for head in heads for p in head.parameters()}
        return optim.clip_grad_norm_(
            [p for p in self._module.parameters() if id(p) not in theirs], *heads, max_norm=max_norm
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, without_heads(self._module) if state_dict is None else state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, and the heads to its folder `partial_fc`. Every rank must call it."""
        folder = output_dir or str(self.args.output_dir)
        token = {}
        if _internal_call and output_dir is not None:  # a checkpoint
            begin_save(folder, HEADS)
            token = self._token = {NAME: Token()}
        checkpoint.save_checkpoint(os.path.join(folder, HEADS), **self._heads, **token)
        super().save_model(output_dir, _internal_call)
        if token and self.args.save_only_model:
            end_save(folder, token[NAME])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoint.save_checkpoint(os.path.join(output_dir, OPTIMIZERS), **self._named_optimizers())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        end_save(output_dir, self._token[NAME])  # what follows is the Trainer's count of steps, and older ones removed

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_same_save(resume_from_checkpoint, HEADS)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint.load_checkpoint(os.path.join(resume_from_checkpoint, HEADS), **self._heads)

    def _load_best_model(self) -> None:
        check_same_save(str(self.state.best_model_checkpoint), HEADS)
        super()._load_best_model()
        checkpoint.load_checkpoint(os.path.join(str(self.state.best_model_checkpoint), HEADS), **self._heads)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is not None and os.path.isdir(os.path.join(checkpoint_folder, OPTIMIZERS)):
            checkpoint.load_checkpoint(os.path.join(checkpoint_folder, OPTIMIZERS), **self._named_optimizers())

    def _named_optimizers(self) -> dict[str, Any]:
        return {f"optimizer_{index}": optimizer for index, optimizer in enumerate(self.head_optimizers)}

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        names = tuple(f"{name}." for name in self._heads)  # these are loaded from another folder
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if not key.startswith(names)]
        super()._issue_warnings_after_load(load_result)


need_methods("transformers", Trainer, HeadTrainer, "_norm", "_named_optimizers")


def _check_own(optimizer: torch.optim.Optimizer, heads: Sequence[RowOptimizer]) -> None:
    """Raise ValueError or TypeError if a user's optimizer would step rows that `heads` step."""
    own = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if isinstance(own, JointOptimizer):
        raise ValueError("optimizers has a JointOptimizer; pass the backbone's alone, which HeadTrainer joins itself")
    JointOptimizer(own, *heads)


@contextmanager
def _frozen(heads: Any) -> Iterator[None]:
    """Freeze the parameters of heads, so that the Trainer's optimizer does not include them."""
    parameters = [p for head in heads for p in head.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
