"""The classification head: class weights `[C, D]` split over ranks, a margin, the exact or sampled softmax cross-entropy.

    embeddings [N_local, D], labels [N_local]
       exchange (collectives)   counts and status, judged on every host; then the global batch
       select (sampling)        this rank's rows of the step: its positives and its share of the drawn window
       loss (softmax)           tiles of logits, one combination over ranks; backward by the same tiles
       gradients                of all rows: `weight.grad`; of the selected rows: `row_grad`, through `RowOptimizer`

An, X. et al.: Partial FC, arXiv 2010.05222 and 2203.15565.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc.collectives import NO_LABEL, GlobalBatch, Group, NonFiniteError, Ranks, all_gather_mesh, as_matrix, exchange, joining
from partial_fc.margins import ArcFace, Margin
from partial_fc.rows import ShardedRows
from partial_fc.sampling import draw_window, select_rows
from partial_fc.shards import ClassShards, initial_rows, local_part
from partial_fc.softmax import ShardedCrossEntropy
from partial_fc.tiles import Step
from partial_fc.workspace import Workspace

log = logging.getLogger("partial_fc")

Reduction = Literal["mean", "sum", "none"]
Validate = Literal["always", "first", "never"]
OnNonfinite = Literal["raise", "skip", "log"]
DEFAULT_LOGITS_BUDGET = 1 << 30


class PartialFC(nn.Module):
    """A sharded classification head with its loss. Call it as `loss = head(embeddings, labels)` on every rank of its group.

    Args:
        embedding_size: D, width of the embeddings.
        num_classes: C, classes over all ranks; may be smaller than the number of ranks.
        margin: what happens to target logits, and the scale; by default `ArcFace(scale=64.0, margin=0.5)`.
        sample_rate: r in (0, 1]: share of the classes drawn as negatives for a step; 1 is the exact softmax.
        group: a ProcessGroup or 1-D DeviceMesh to split classes over, or a 2-D mesh (replicate, shard); None for all ranks, or for this
            process alone where there is no process group. The backbone's gradients must be averaged over the same ranks.
        seed: of initial weights and draws; must agree between ranks.
        init_std: standard deviation of initial weights.
        ignore_index: label of samples that take no part.
        reduction: "mean" over the valid samples of the global batch (weighted by sample_weights), "sum" over them, or "none": `[N_local]`.
        scale_embedding_grad: multiply the embeddings' gradient by the number of ranks, which DDP, DeepSpeed and FSDP divide by again.
        logits_budget: bytes that kept logits `[N, S]` may take on a rank (default 1 GiB); beyond it they are computed again in backward.
        label_smoothing: ε in [0, 1), as in `torch.nn.functional.cross_entropy`, over the classes selected for the step.
        validate: look for bad labels and non-finite embeddings in every batch, the "first" one, or "never". Shapes are always checked.
        on_nonfinite: what to do on all ranks about a NaN or infinity in any rank's embeddings: "raise" NonFiniteError, "skip" the step
            (a zero loss; `skipped` is True), or "log" it and go on.
        device, dtype: of the weights; float32 unless the default dtype is another.

    Shapes: embeddings `[N_local, D]` float, labels `[N_local]` int64 (or `[N_local, L]` within a `GlobalBatch`); N_local may be 0.

    Raises ValueError for bad arguments or bad inputs, with the same message on every rank; RuntimeError for a head that is wired wrongly.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin | None = None,
        sample_rate: float = 1.0,
        *,
        group: Group = None,
        seed: int = 0,
        init_std: float = 0.01,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_embedding_grad: bool = True,
        logits_budget: int | None = None,
        label_smoothing: float = 0.0,
        validate: Validate = "always",
        on_nonfinite: OnNonfinite = "raise",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(
            embedding_size,
            num_classes,
            sample_rate,
            init_std,
            label_smoothing,
            reduction,
            validate,
            on_nonfinite,
            logits_budget,
        )
        self.embedding_size, self.num_classes, self.seed = embedding_size, num_classes, seed
        self.margin = ArcFace() if margin is None else margin
        if not isinstance(self.margin, Margin):
            raise TypeError(f"margin must be an instance such as ArcFace(scale=64.0), not {margin!r}")
        if next(self.margin.parameters(), None) is not None:
            raise ValueError(f"{type(self.margin).__name__} has parameters; a margin may have buffers, but nothing would train parameters")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.scale_embedding_grad, self.validate, self.on_nonfinite = scale_embedding_grad, validate, on_nonfinite
        self.logits_budget = DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget
        self._sample_rate, self._init_std = sample_rate, init_std
        self._step, self._seen_batch = 0, False
        self._workspace = Workspace()
        self.logits_mode = ""  # "kept" or "tiled", as the last training forward chose by logits_budget
        self.skipped = False
        self._selected_rows: Tensor | None = None
        self._target_cosines: tuple[Tensor, Tensor] | None = None

        ranks = Ranks.of(group)
        device = torch.device(device) if device is not None else _default_device(ranks)
        self._shards = ClassShards.split(num_classes, ranks, device)
        self._rows = ShardedRows(self._shards, sampled=sample_rate < 1)
        empty = torch.empty(self._shards.local, embedding_size, device=device, dtype=dtype or torch.get_default_dtype())
        self._register("weight", empty)
        self._register("bias", empty.new_empty(self._shards.local) if self.margin.bias else None)
        self.reset_parameters()
        self._rows.hold(dict(self.named_parameters(recurse=False)), self._shards)
        if ranks.group is not None:
            self._check_agreement(device)

    # ------------------------------------------------------------------------------------------------ public state

    @property
    def sample_rate(self) -> float:
        """r: share of all classes that a step draws."""
        return self._sample_rate

    @property
    def selected(self) -> Tensor:
        """Global class ids `[S]` that this rank used in the last forward, ascending."""
        lo, hi = self._shards.lo, self._shards.hi
        if self._selected_rows is None:
            return torch.arange(lo, hi, device=local_part(self.weight).device)
        return self._selected_rows + lo

    @property
    def row_grad(self) -> tuple[Tensor, Tensor] | None:
        """(global class ids `[S]`, gradient of their weights `[S, D]`) of the backwards since `zero_grad`, under sampling; else None."""
        if not self._rows.sampled or self._rows.rows is None:
            return None
        return self._rows.rows + self._shards.lo, self._rows.values()[0]

    @property
    def target_angle(self) -> Tensor:
        """Mean angle in radians of embeddings to their own class in the last forward, without the margin (0-d; NaN if none)."""
        if self._target_cosines is None:
            raise RuntimeError("target_angle is known after a forward")
        cosines, exists = self._target_cosines
        return torch.acos(cosines.clamp(-1, 1)[exists]).mean()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights, or of their rows."""
        super().zero_grad(set_to_none=set_to_none)
        self._rows.clear()

    def extra_repr(self) -> str:
        s = self._shards
        share = f"classes {s.lo}..{s.hi} of {s.num_classes}" if s.mesh is not None else f"{s.num_classes} classes"
        return f"embedding_size={self.embedding_size}, {share}, sample_rate={self.sample_rate}"

    # ------------------------------------------------------------------------------------------------ one step

    @torch._disable_dynamo  # collectives and sizes that depend on data: under torch.compile the head runs as it is
    def forward(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: embeddings `[N_local, D]` and labels `[N_local]`, or a `GlobalBatch` from `gather`."""
        self._check_wiring()
        self.skipped = self.skipped and not self.training  # an evaluation in between says nothing of the training step
        weight = local_part(self.weight)
        joint = isinstance(embeddings, GlobalBatch)
        with record_function("partial_fc::gather"):
            batch = embeddings if isinstance(embeddings, GlobalBatch) else self._exchange(embeddings, labels, weight.device)
        if not batch.ranks.same_as(self._shards.ranks):
            raise RuntimeError("the batch was gathered over another group than the head's")
        self._judge(batch)
        x = embeddings.embeddings if isinstance(embeddings, GlobalBatch) else joining(embeddings, batch.status)
        with record_function("partial_fc::select"):
            step = self._plan(batch, scatter=not joint)
        if self.training:
            self._step += 1
        self._selected_rows = step.rows
        bias = None if self.bias is None else local_part(self.bias)
        anchor = None
        if self.skipped and self.training:
            samples = batch.counts[batch.ranks.rank] if self.reduction == "none" else None
            if step.rows is None and step.start_update is None:
                return _ZeroLoss.apply(x, weight, bias, samples, None)
            x = x if x.requires_grad else x.detach().requires_grad_(self._anchor(weight).requires_grad)
            return _ZeroLoss.apply(
                x,
                weight.detach(),
                None if bias is None else bias.detach(),
                samples,
                self._rows.accumulate if step.rows is not None else None,
            )
        if step.rows is not None or step.start_update is not None:
            weight, bias, anchor = weight.detach(), None if bias is None else bias.detach(), self._anchor(weight)
        loss = ShardedCrossEntropy.apply(x, weight, bias, anchor, step)
        assert step.cosines is not None
        self._target_cosines = (step.cosines, step.targets >= 0)
        return loss

    def _exchange(self, embeddings: Tensor, labels: Tensor | None, device: torch.device) -> GlobalBatch:
        if labels is None:
            raise TypeError("head(embeddings, labels) needs labels; only a GlobalBatch brings its own")
        inspect = self.validate == "always" or (self.validate == "first" and not self._seen_batch)
        self._seen_batch = True
        return exchange(embeddings, labels, None, None, self._shards.ranks, inspect=inspect, device=device)

    def _anchor(self, weight: Tensor) -> Tensor:
        """A scalar through which backward reaches the loss although the weights are detached and embeddings may be."""
        return torch.zeros((), device=weight.device, requires_grad=any(p.requires_grad for p in self._rows.parameters.values()))

    def _plan(self, batch: GlobalBatch, scatter: bool) -> Step:
        shards, device = self._shards, batch.embeddings.device
        targets, target_weights = self._targets(batch)
        rows = None
        if self.training and self.sample_rate < 1:
            window = draw_window(self.num_classes, self.sample_rate, seed=self.seed, step=self._step, device=device)
            labels = torch.where(batch.mesh_labels == self.ignore_index, -1, batch.mesh_labels)
            rows = select_rows(window, labels, shards.lo, shards.hi)
        selected = shards.local if rows is None else len(rows)
        item = 2 if torch.is_autocast_enabled(device.type) else self._stats_dtype(batch).itemsize
        kept = len(batch.embeddings) * selected * item <= self.logits_budget
        self._report_mode(kept, len(batch.embeddings) * selected * item)
        return Step(
            batch=batch,
            margin=self.margin,
            rows=rows,
            lo=shards.lo,
            num_classes=self.num_classes,
            targets=targets,
            target_weights=target_weights,
            sample_weights=self._sample_weights(batch),
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            scale_embedding_grad=self.scale_embedding_grad,
            scatter=scatter,
            kept=kept,
            needs_grad=torch.is_grad_enabled(),
            on_row_grad=self._rows.accumulate,
            workspace=self._workspace,
            start_update=self._update_in_backward(),
        )

    def _update_in_backward(self) -> Callable[[], Callable[[int, int, list[Tensor]], None]] | None:
        optimizer = self._rows.live_optimizer
        if optimizer is None or not optimizer.update_in_backward or not (self.training and torch.is_grad_enabled()):
            return None
        kind = local_part(self.weight).device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise RuntimeError("update_in_backward cannot be joined with float16, which needs a GradScaler; use bfloat16")
        return optimizer.in_backward

    def _report_mode(self, kept: bool, size: int) -> None:
        mode = "kept" if kept else "tiled"
        if self.training and mode != self.logits_mode:
            log.info("logits are %s: %d bytes of them on this rank, a budget of %d", mode, size, self.logits_budget)
            self.logits_mode = mode

    def _targets(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Class ids `[N, L]`, -1 where there is none, and their weights in the sample, 0 where there is none."""
        labels = as_matrix(batch.labels)
        exists = labels != self.ignore_index
        weights = exists.to(self._stats_dtype(batch))
        if batch.label_weights is not None:
            weights = weights * batch.label_weights.to(weights.dtype)
            # one class named twice in a sample (mixup of two of its images): the first takes the weight of both
            same = (labels[:, :, None] == labels[:, None, :]) & exists[:, :, None] & exists[:, None, :]
            weights = (same * weights[:, None, :]).sum(2) * ~same.tril(-1).any(2)
            exists = exists & (weights > 0)
        return torch.where(exists, labels, -1), weights * exists

    def _sample_weights(self, batch: GlobalBatch) -> Tensor:
        """`[N]`: what each sample's loss counts for: 1 or its weight, 0 where ignored, divided by the sum over all ranks for a mean."""
        dtype = self._stats_dtype(batch)
        weights = (as_matrix(batch.labels) != self.ignore_index).any(1).to(dtype)
        everywhere = (as_matrix(batch.mesh_labels) != self.ignore_index).any(1).to(dtype)
        if batch.sample_weights is not None and batch.mesh_sample_weights is not None:
            weights = weights * batch.sample_weights.to(dtype)
            everywhere = everywhere * batch.mesh_sample_weights.to(dtype)
        if self.reduction != "mean":
            return weights
        total = everywhere.sum()
        return weights / torch.where(total > 0, total, 1.0)

    def _stats_dtype(self, batch: GlobalBatch) -> torch.dtype:
        return torch.float64 if torch.float64 in (batch.embeddings.dtype, self.weight.dtype) else torch.float32

    # ------------------------------------------------------------------------------------------------ what can be wrong

    def _check_wiring(self) -> None:
        ranks = self._shards.ranks
        if ranks.group is None and dist.is_initialized():
            raise RuntimeError(
                "this head was built before the process group: every rank would train a copy of its own. "
                "Build it after torch.distributed.init_process_group (or Accelerator(), deepspeed.init_distributed())"
            )
        if not (self.training and torch.is_grad_enabled() and self._rows.sampled) or self._rows.live_optimizer is not None:
            return
        if self._rows.rows is not None or self._rows.lost > 1:
            raise RuntimeError(
                "no RowOptimizer takes this sampled head's row gradients, so it would never train: "
                "build RowOptimizer(torch.optim.SGD, head, ...) instead of passing head.parameters() to an optimizer"
            )

    def _judge(self, batch: GlobalBatch) -> None:
        """Raise, on every rank alike, what the status of the batch says about this head's inputs."""
        width = batch.status[0].width
        if width != self.embedding_size:
            raise ValueError(f"embeddings have width {width}, the head has embedding_size {self.embedding_size}")
        ranks = batch.ranks
        for flat, row in enumerate(batch.status):
            for label, at in row.extremes():
                if label != self.ignore_index and not 0 <= label < self.num_classes:
                    where = at if row.labels_each == 0 else f"{at // row.labels_each}, {at % row.labels_each}"
                    hint = "; labels are counted from 0" if label == self.num_classes else ""
                    raise ValueError(
                        f"{ranks.name(flat)}: labels[{where}] is {label}; valid are 0 to {self.num_classes - 1} "
                        f"and ignore_index {self.ignore_index}{hint}"
                    )
        for flat, row in enumerate(batch.status):
            if row.nonfinite_at >= 0:
                of_class = "" if row.nonfinite_label == NO_LABEL else f" (label {row.nonfinite_label})"
                message = f"{ranks.name(flat)}: embeddings[{row.nonfinite_at}]{of_class} holds a NaN or infinity"
                if self.on_nonfinite == "raise":
                    raise NonFiniteError(message)
                log.warning("%s%s", message, "; the step is skipped" if self.on_nonfinite == "skip" else "")
                self.skipped = self.on_nonfinite == "skip"
                return

    def _check_agreement(self, device: torch.device) -> None:
        """Raise on every rank if ranks built different heads."""
        if device.type == "meta":
            return
        names = (
            "label_smoothing",
            "reduction",
            "ignore_index",
            "on_nonfinite",
            "validate",
            "scale_embedding_grad",
            "_init_std",
            "sample_rate",
        )
        margin = type(self.margin).__name__, {k: v for k, v in vars(self.margin).items() if not k.startswith("_")}
        settings = margin, [getattr(self, name) for name in names], self.weight.dtype
        digest = zlib.crc32(repr(settings).encode())
        mine = {
            "num_classes": self.num_classes,
            "embedding_size": self.embedding_size,
            "seed": self.seed,
            "a digest of the settings": digest,
        }
        table = all_gather_mesh(torch.tensor(list(mine.values()), device=device), self._shards.ranks).tolist()
        for flat, values in enumerate(table):
            for name, expected, value in zip(mine, table[0], values, strict=True):
                if expected != value:
                    here, there = self._shards.ranks.name(0), self._shards.ranks.name(flat)
                    raise ValueError(
                        f"ranks disagree: {name} is {expected} on {here} and {value} on {there}; all ranks must build the same head"
                    )

    # ------------------------------------------------------------------------------------------------ parameters and state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights again as `seed` says, biases 0; also after `to_empty` on a head that was built on the meta device."""
        weight = local_part(self.weight.detach())
        if weight.device.type != "meta":
            weight.copy_(initial_rows(self._shards.lo, self._shards.hi, weight.shape[1:], std=self._init_std, seed=self.seed))
        if self.bias is not None:
            local_part(self.bias.detach()).zero_()

    def _register(self, name: str, local: Tensor | None) -> None:
        self.register_parameter(name, None if local is None else nn.Parameter(self._shards.wrap(local)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialFC:
        """Moves and casts act on the local rows, and keep the parameters' identity, as torch's own do."""
        own = {name: p for name, p in self._parameters.items() if p is not None}
        before = {name: local_part(p.detach()) for name, p in own.items()}
        after = {name: fn(local) for name, local in before.items()}
        everything, self._parameters = self._parameters, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = everything
        if all(after[name] is before[name] for name in own):
            return self
        device = after["weight"].device
        if self._shards.mesh is not None and device.type != self._shards.mesh.device_type:
            self._shards = ClassShards.split(self.num_classes, self._shards.ranks, device)
        for name, parameter in own.items():
            moved = nn.Parameter(self._shards.wrap(after[name]), requires_grad=parameter.requires_grad)
            parameter.grad = None
            torch.utils.swap_tensors(parameter, moved)
        self._rows.hold(own, self._shards)
        return self

    def get_extra_state(self) -> Tensor:
        """The number of training forwards, which says what is drawn next."""
        return torch.tensor(self._step)

    def set_extra_state(self, state: Any) -> None:
        self._step = int(state)


class _ZeroLoss(torch.autograd.Function):
    """A skipped step: a loss of zero whose gradients are zero, so that backward and a GradScaler run on every rank as they would have.

    Under sampling `sink` gets gradients of no rows. A NaN in the backbone's activations still makes NaN of its gradients.
    """

    @staticmethod
    def forward(ctx, embeddings, weight, bias, samples, sink):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(embeddings, weight, bias)
        ctx.sink = sink
        return embeddings.new_zeros(() if samples is None else (samples,), dtype=torch.promote_types(embeddings.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        embeddings, weight, bias = ctx.saved_tensors
        nothing = torch.zeros_like(embeddings)
        if ctx.sink is None:
            zeros = (torch.zeros_like(p) if needed else None for p, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True))
            return nothing, *zeros, None, None
        no_rows = torch.empty(0, dtype=torch.int64, device=embeddings.device)
        ctx.sink(no_rows, [torch.empty_like(p[:0]) for p in (weight, bias) if p is not None])
        return nothing, None, None, None, None


def _default_device(ranks: Ranks) -> torch.device:
    """torch's default device, or the current GPU where the group cannot exchange tensors of the CPU (NCCL)."""
    default = torch.get_default_device()
    if ranks.group is not None and default.type == "cpu" and dist.get_backend(ranks.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return default


def _check_arguments(
    embedding_size: int,
    num_classes: int,
    sample_rate: float,
    init_std: float,
    label_smoothing: float,
    reduction: str,
    validate: str,
    on_nonfinite: str,
    logits_budget: int | None,
) -> None:
    for name, value in (("embedding_size", embedding_size), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is a share of the classes in (0, 1], not {sample_rate}")
    if not (math.isfinite(init_std) and init_std >= 0):
        raise ValueError(f"init_std must be at least 0, not {init_std}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if logits_budget is not None and logits_budget < 0:
        raise ValueError(f"logits_budget is a number of bytes, at least 0, not {logits_budget}")
    for name, choice, choices in (
        ("reduction", reduction, ("mean", "sum", "none")),
        ("validate", validate, ("always", "first", "never")),
        ("on_nonfinite", on_nonfinite, ("raise", "skip", "log")),
    ):
        if choice not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {choice!r}")
