"""`PartialFC`, the classification head: class weights `[C, D]` split over ranks, a margin, the exact or sampled softmax.

    embeddings [N_local, D], labels [N_local]
       gather         counts and status, checked on every host; then the global batch           batch/
       targets        class ids [N, L] and what each sample counts for                           targets.py
       select         this rank's rows of the forward: its positives and its share of a window   sampling.py
       cross-entropy  tiles of logits, one combination over ranks; backward by the same tiles    softmax/
       follow         the loss becomes part of the training step when its backward runs          step_record.py

Gradients of all rows are `weight.grad`; those of selected rows are `row_grad`, which a `RowOptimizer` takes (`rows.py`).

An, X. et al.: Partial FC, arXiv 2010.05222 and 2203.15565.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.classes.interface import Change
from partial_fc.classes.loss import ChangeableLoss
from partial_fc.classes.tables import changed_class_weights, changed_margin, checked_class_weights, prepare_anew
from partial_fc.distributed.ranks import Group
from partial_fc.errors import log
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import ArcFace
from partial_fc.rows import UpdateRows
from partial_fc.sampling import draw_window, mix, select_rows, window_size
from partial_fc.sharded import Reduction, SharedArguments
from partial_fc.shards import local_part
from partial_fc.softmax.cross_entropy import sharded_cross_entropy
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.tiles import compute_dtypes, logits_bytes
from partial_fc.softmax.workspace import Workspace
from partial_fc.step_record import DEFAULT_MAX_SKIPS, OnNonfinite, Validate
from partial_fc.targets import sample_weights_of, stats_dtype, targets_of

DEFAULT_LOGITS_BUDGET = 1 << 30


class PartialFC(ChangeableLoss):
    """A sharded classification head with its loss. Call it as `loss = head(embeddings, labels)` on every rank of its group.

    Args:
        embedding_size: D, width of the embeddings.
        num_classes: C, classes over all ranks; may be smaller than the number of ranks.
        margin: what happens to target logits, and the scale; by default `ArcFace(scale=64.0, margin=0.5)`.
        sample_rate: r in (0, 1]: share of the classes drawn as negatives for a step; 1 is the exact softmax.
        group: a ProcessGroup or 1-D DeviceMesh to split classes over, or a 2-D mesh (replicate, shard); None for all ranks,
            or for this process alone without a process group. The backbone's gradients must be averaged over the same ranks.
        seed: of initial weights and draws; must agree between ranks.
        init_std: standard deviation of initial weights.
        ignore_index: label of samples that take no part.
        reduction: "mean" over the valid samples of the global batch (weighted by sample_weights), "sum" over them, or
            "none": `[N_local]`.
        scale_embedding_grad: multiply the embeddings' gradient by the number of ranks, because DDP, DeepSpeed and FSDP
            divide by it.
        logits_budget: bytes that kept logits `[N, S]` may take on a rank (default 1 GiB); beyond it they are computed again
            in backward.
        label_smoothing: ε in [0, 1), as in `torch.nn.functional.cross_entropy`, over the selected classes: all at r = 1.
        interclass_filter: cosine in (-1, 1] beyond which another class is taken for the sample's own under a second label
            and left out of the denominator (arXiv 2203.15565, section 3.4); None for no filter.
        class_weights: `[C]`, the weight of each class's samples, on every rank; for a sample of several classes their
            weighted mean. A mean is divided by the sum of the weights, as in `F.cross_entropy(weight=...)`.
        metrics: measure `metrics` in every forward; nothing is computed for them otherwise.
        validate: look for bad labels, NaN and infinities "always", in the "first" batch and its step, or "never". Shapes
            are always checked. For a `GlobalBatch`, `gather` has looked.
        on_nonfinite: what to do on all ranks about a NaN or infinity in any rank's embeddings, in the loss, or in a
            gradient: "raise" NonFiniteError, "skip" the step (`skipped` is True), or "log" bad embeddings and continue
            without looking at the rest. See `check_gradients` and docs/nonfinite.md.
        max_skips: how many steps in a row may be skipped before NonFiniteError is raised after all; None for any number.
        device, dtype: of the weights; float32 unless the default dtype is another.

    Shapes: embeddings `[N_local, D]` float, labels `[N_local]` int64 (or `[N_local, L]` within a `GlobalBatch`); N_local may
    be 0.

    Raises ValueError for bad arguments or inputs, the same on every rank; RuntimeError for a head that is wired wrongly.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    class_weights: Tensor | None

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
        interclass_filter: float | None = None,
        class_weights: Tensor | None = None,
        metrics: bool = False,
        validate: Validate = "always",
        on_nonfinite: OnNonfinite = "raise",
        max_skips: int | None = DEFAULT_MAX_SKIPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        margin = ArcFace() if margin is None else margin
        _check_arguments(margin, sample_rate, label_smoothing, interclass_filter, logits_budget)
        shared = SharedArguments(
            embedding_size, num_classes, group, seed, init_std, ignore_index, reduction, scale_embedding_grad,
            validate, on_nonfinite, max_skips, device,
        )  # fmt: skip
        super().__init__(shared, sampled=sample_rate < 1)
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.interclass_filter = interclass_filter
        self.collect_metrics = metrics
        self.logits_budget = DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget
        self.logits_mode = ""  # "kept" or "tiled", as the last training forward chose by logits_budget
        self.forward_count = 0  # training forwards: keys what is drawn
        self._sample_rate = sample_rate
        self._workspace = Workspace()
        self.selected_rows: Tensor | None = None
        self._measured: Measured | None = None
        checked = checked_class_weights(class_weights, num_classes, self._device)
        self.register_buffer("class_weights", checked, persistent=False)
        dtype = dtype or torch.get_default_dtype()
        self._prepare_margin(dtype)
        row = (embedding_size,) if margin.centers == 1 else (margin.centers, embedding_size)
        local = self.shards.local
        self._register("weight", torch.empty(local, *row, device=self._device, dtype=dtype))
        self._register("bias", torch.empty(local, device=self._device, dtype=dtype) if margin.bias else None)
        self.reset_parameters()
        self._complete()

    def _prepare_margin(self, dtype: torch.dtype) -> None:
        self.margin.prepare(self.num_classes, self._drawn_of(self.num_classes))
        self.margin.to(self._device)
        wide = torch.promote_types(dtype, torch.float32)
        for name, parameter in self.margin.named_parameters():
            setattr(self.margin, name, nn.Parameter(self.shards.wrap_shared(local_part(parameter.detach()).to(wide))))

    # ------------------------------------------------------------------------------------------------ one forward

    @torch._disable_dynamo  # collectives and sizes that depend on data: under torch.compile the head runs as it is
    def forward(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch: embeddings `[N_local, D]` and labels `[N_local]`, or a `GlobalBatch` of `gather`."""
        self._check_wiring()
        with record_function("partial_fc::gather"):
            batch, x = self._take(embeddings, labels)
        with record_function("partial_fc::select"):
            options = self._options()
            selection = self._select(batch, options, scatter=x is not batch.embeddings)
            begin_update = self._update_in_backward()
        if self.training:
            self.forward_count += 1
        self.selected_rows = selection.rows
        all_rows = selection.rows is None and begin_update is None  # autograd takes the gradient of all rows
        if self.training and self.class_rows.record.bad_forward:
            return self._zero_loss(x, batch, gradient_of_all_rows=all_rows)
        weight = local_part(self.weight)
        bias = None if self.bias is None else local_part(self.bias)
        anchor = None
        if not all_rows:
            weight, bias, anchor = weight.detach(), None if bias is None else bias.detach(), self._anchor()
        offset = local_part(self.margin.get_parameter("offset")) if self.margin.binary else None
        sink = RowGradientSink(self._workspace, self.class_rows.accumulate, begin_update)
        loss, losses, self._measured = sharded_cross_entropy(x, weight, bias, offset, anchor, selection, options, sink)
        return self._follow(loss, losses, batch)

    def _options(self) -> LossOptions:
        return LossOptions(
            margin=self.margin,
            num_classes=self.num_classes,
            label_smoothing=self.label_smoothing,
            interclass_filter=self.interclass_filter,
            reduction=self.reduction,
            scale_embedding_grad=self.scale_embedding_grad,
            metrics=self.collect_metrics,
        )

    def _select(self, batch: GlobalBatch, options: LossOptions, scatter: bool) -> Selection:
        """Return the targets, and this rank's rows that take part."""
        shards, ranks = self.shards, batch.ranks
        dtype = stats_dtype(batch.embeddings, self.weight)
        targets, target_weights = targets_of(batch, self.ignore_index, dtype)
        rows = None
        if self.training and self.sample_rate < 1:
            device = batch.embeddings.device
            window = draw_window(
                self.num_classes, self.sample_rate, seed=self.seed, step=self.forward_count, device=device
            )
            positives = torch.where(batch.mesh_labels == self.ignore_index, -1, batch.mesh_labels)
            rows = select_rows(window, positives, shards.lo, shards.hi)
        return Selection(
            batch=batch,
            rows=rows,
            lo=shards.lo,
            targets=targets,
            target_weights=target_weights,
            sample_weights=sample_weights_of(batch, self.ignore_index, self.reduction, dtype, self.class_weights),
            keep_logits=self._keeps_logits(batch, shards.local if rows is None else len(rows), options),
            scatter=scatter,
            first_sample=sum(row.samples for row in batch.status[: ranks.replica * ranks.world]),
            draw_key=mix(self.seed, self.forward_count),
        )

    def _keeps_logits(self, batch: GlobalBatch, classes: int, options: LossOptions) -> bool:
        """Return whether logits are kept for backward; label smoothing of ruled logits needs them anew."""
        product = compute_dtypes(batch.embeddings, self.weight)[1]
        size = logits_bytes(len(batch.embeddings), classes * self.margin.centers, product)
        keep = size <= self.logits_budget and not (options.ruled and self.label_smoothing)
        mode = "kept" if keep else "tiled"
        if self.training and mode != self.logits_mode:
            log.info("logits are %s: %d bytes of them on this rank, a budget of %d", mode, size, self.logits_budget)
            self.logits_mode = mode
        return keep

    def _update_in_backward(self) -> Callable[[], UpdateRows] | None:
        optimizer = self.class_rows.live_optimizer
        if optimizer is None or not optimizer.update_in_backward or not (self.training and torch.is_grad_enabled()):
            return None
        kind = self.class_rows.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise RuntimeError(
                "update_in_backward cannot be joined with float16, which needs a GradScaler; use bfloat16"
            )
        begin: Callable[[], UpdateRows] = optimizer.begin_update_in_backward
        return begin

    # ------------------------------------------------------------------------------------------------ public state

    @property
    def sample_rate(self) -> float:
        """r: share of all classes that a step draws."""
        return self._sample_rate

    @property
    def selected(self) -> Tensor:
        """Class ids `[S]` that this rank used in the last forward, ascending."""
        lo, hi = self.shards.lo, self.shards.hi
        if self.selected_rows is None:
            return torch.arange(lo, hi, device=self.class_rows.device)
        return self.selected_rows + lo

    @property
    def row_grad(self) -> tuple[Tensor, Tensor] | None:
        """Under sampling: (class ids `[S]`, gradient of their weights `[S, D]`) since `zero_grad`; else None."""
        rows = self.class_rows
        if not rows.sampled or rows.grad_rows is None:
            return None
        return rows.grad_rows + self.shards.lo, rows.gradients()[0]

    @property
    def target_angle(self) -> Tensor:
        """Mean angle in radians of embeddings to their own class in the last forward, without the margin (0-d; NaN if none)."""
        if self._measured is None:
            raise RuntimeError("target_angle is known after a forward")
        return self._measured.angles().mean()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Figures of the last forward's global batch (`metrics=True`): 0-d tensors by name, equal on every rank.

        accuracy: share of samples whose own class is the nearest of those selected, without the margin. margin_met: share
        whose target logit with the margin is still the largest (or positive, where every class is a binary decision).
        embedding_norm: mean length of the embeddings. Where vectors are normalised also angles in radians: target_angle
        (mean), target_angle_p10, _p50, _p90 (percentiles), hardest_angle (mean, to the nearest other class). NaN where
        there are no samples.
        """
        if self._measured is None or self._measured.hardest is None:
            raise RuntimeError("metrics are known after a forward of a head that was built with metrics=True")
        return self._measured.summary(self.margin)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sample_rate={self.sample_rate}"

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        tables = [float(b.double().sum()) for b in self.buffers()]
        own = self.init_std, self.sample_rate, self.interclass_filter, tables
        digest = settings["a digest of the settings"], self.margin.describe(), own
        return {**settings, "a digest of the settings": digest}

    # ------------------------------------------------------------------------------------------------ saved state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights again as `seed` says; set biases to 0 and the margin's state to its start.

        Also after `to_empty` on a head that was built on the meta device.
        """
        self._draw(self.weight)
        if self.bias is not None:
            local_part(self.bias.detach()).zero_()
        self.margin.reset()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the numbers of training forwards and of changes of classes, which key draws; the margin; skipped steps."""
        return {
            "step": self.forward_count,
            "class_changes": self.class_changes,
            "margin": self.margin.describe(),
            "skips": self.skips,
        }

    def set_extra_state(self, state: Any) -> None:
        state = state if isinstance(state, dict) else {"step": state}  # a 0-d tensor, before classes could change
        self.forward_count = int(state["step"])
        self.class_changes = int(state.get("class_changes", 0))
        self.class_rows.record.skips = int(state.get("skips", 0))

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict is that of a head with another margin; its tensors are not looked at."""
        extra = state.get("_extra_state")
        theirs = extra.get("margin") if isinstance(extra, dict) else None
        if theirs is not None and theirs != self.margin.describe():
            raise ValueError(
                f"it is of a head with {theirs}, this one has {self.margin.describe()}; build the head with that margin, "
                "or start a new run from the class weights alone (export_weights, import_weights)"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # before a weight has changed
        self.check_state({"_extra_state": state_dict.get(f"{prefix}_extra_state")})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    # ------------------------------------------------------------------------------------------------ changes of classes

    @property
    def normalizes(self) -> bool:
        return self.margin.normalize

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        drawn = self._drawn_of(change.num_classes)
        class_weights = changed_class_weights(self.class_weights, change)
        margin = changed_margin(self.margin, change, drawn, self.class_rows.device)

        def take() -> None:
            self.class_weights = class_weights
            self.margin = margin
            self.selected_rows = None
            if margin is not change.margin:
                prepare_anew(margin, change.num_classes, drawn)

        return take

    def _drawn_of(self, num_classes: int) -> int:
        return num_classes if self.sample_rate == 1 else window_size(num_classes, self.sample_rate)


def _check_arguments(
    margin: Margin,
    sample_rate: float,
    label_smoothing: float,
    interclass_filter: float | None,
    logits_budget: int | None,
) -> None:
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is a share of the classes in (0, 1], not {sample_rate}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if logits_budget is not None and logits_budget < 0:
        raise ValueError(f"logits_budget is a number of bytes, at least 0, not {logits_budget}")
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be an instance such as ArcFace(scale=64.0), not {margin!r}")
    name = type(margin).__name__
    if [key for key, _ in margin.named_parameters()] != (["offset"] if margin.binary else []):
        raise ValueError(f"{name} has parameters; a margin may have buffers, but nothing would train parameters")
    if margin.binary and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with {name}, whose classes are not one distribution")
    if interclass_filter is not None and not (margin.normalize and -1 < interclass_filter <= 1):
        raise ValueError(
            f"interclass_filter is a cosine in (-1, 1], for margins that normalise, not {interclass_filter}"
        )
