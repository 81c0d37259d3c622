"""The classification head: class weights `[C, D]` split over ranks, a margin, the exact or sampled softmax cross-entropy.

    embeddings [N_local, D], labels [N_local]
       exchange (collectives)   counts and status, judged on every host; then the global batch
       select (sampling)        this rank's rows of the step: its positives and its share of the drawn window
       loss (softmax)           tiles of logits, one combination over ranks; backward by the same tiles
       gradients                of all rows: `weight.grad`; of the selected rows: `row_grad`, through `RowOptimizer`

An, X. et al.: Partial FC, arXiv 2010.05222 and 2203.15565.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc.batch import GlobalBatch
from partial_fc.batch_status import as_matrix
from partial_fc.classes.change import Change
from partial_fc.distributed.ranks import Group
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import ArcFace
from partial_fc.nonfinite.step_record import DEFAULT_MAX_SKIPS
from partial_fc.sampling import draw_window, mix, select_rows, window_size
from partial_fc.sharded import OnNonfinite, Reduction, ShardedLoss, Validate, log
from partial_fc.shards import local_part
from partial_fc.softmax.cross_entropy import ShardedCrossEntropy
from partial_fc.softmax.tiles import Measured, Step, compute_dtypes, logits_bytes
from partial_fc.softmax.workspace import Workspace

DEFAULT_LOGITS_BUDGET = 1 << 30


class PartialFC(ShardedLoss):
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
        label_smoothing: ε in [0, 1), as in `torch.nn.functional.cross_entropy`, over the classes selected for the step: at r = 1 all.
        interclass_filter: cosine in (-1, 1] beyond which another class is taken for the sample's own under a second label: it is left out
            of the denominator (`Partial FC`, arXiv 2203.15565, section 3.4); None for no filter.
        class_weights: `[C]`, what a sample of each class counts for, on every rank; a sample of several classes counts for their weighted
            mean. A mean is divided by the sum of what its samples count for, as in `torch.nn.functional.cross_entropy(weight=...)`.
        metrics: measure `metrics` in every forward; nothing is computed for them otherwise.
        validate: look for bad labels, and for NaN and infinities, "always", in the "first" batch and the step it is in, or "never". Shapes
            are always checked. A `GlobalBatch` is judged by what `gather` has looked for.
        on_nonfinite: what to do on all ranks about a NaN or infinity in any rank's embeddings, in the loss, or in a gradient: "raise"
            NonFiniteError, "skip" the step (`skipped` is True), or "log" that embeddings are bad and go on, with no look at the rest.
            How losses and gradients are looked at, and what a loop does: `check_gradients`, docs/nonfinite.md.
        max_skips: how many steps in a row may be skipped before NonFiniteError is raised after all; None for any number.
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
        interclass_filter: float | None = None,
        class_weights: Tensor | None = None,
        metrics: bool = False,
        validate: Validate = "always",
        on_nonfinite: OnNonfinite = "raise",
        max_skips: int | None = DEFAULT_MAX_SKIPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_arguments(sample_rate, label_smoothing, logits_budget)
        super().__init__(
            embedding_size,
            num_classes,
            sampled=sample_rate < 1,
            group=group,
            seed=seed,
            init_std=init_std,
            ignore_index=ignore_index,
            reduction=reduction,
            scale_embedding_grad=scale_embedding_grad,
            validate=validate,
            on_nonfinite=on_nonfinite,
            max_skips=max_skips,
            device=device,
        )
        self.margin = ArcFace() if margin is None else margin
        if not isinstance(self.margin, Margin):
            raise TypeError(f"margin must be an instance such as ArcFace(scale=64.0), not {margin!r}")
        trained = ["offset"] if self.margin.binary else []
        if [name for name, _ in self.margin.named_parameters()] != trained:
            raise ValueError(
                f"{type(self.margin).__name__} has parameters; a margin may have buffers, but nothing would train parameters"
            )
        if self.margin.binary and label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0 with {type(self.margin).__name__}, whose classes are not one distribution"
            )
        self._sample_rate, self._step = sample_rate, 0
        self.margin.prepare(num_classes, self._drawn_of(num_classes))
        self.margin.to(self._device)
        for name, parameter in self.margin.named_parameters():
            wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            setattr(self.margin, name, nn.Parameter(self._shards.wrap_shared(local_part(parameter.detach()).to(wide))))
        if interclass_filter is not None and not (self.margin.normalize and -1 < interclass_filter <= 1):
            raise ValueError(
                f"interclass_filter is a cosine in (-1, 1], for margins that normalise, not {interclass_filter}"
            )
        self.label_smoothing, self.interclass_filter, self.collect_metrics = label_smoothing, interclass_filter, metrics
        self.class_weights: Tensor | None
        self.register_buffer(
            "class_weights", _class_weights(class_weights, num_classes, self._device), persistent=False
        )
        self.logits_budget = DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget
        self._workspace = Workspace()
        self.logits_mode = ""  # "kept" or "tiled", as the last training forward chose by logits_budget
        self._selected_rows: Tensor | None = None
        self._measured: Measured | None = None
        row = (embedding_size,) if self.margin.centers == 1 else (self.margin.centers, embedding_size)
        empty = torch.empty(self._shards.local, *row, device=self._device, dtype=dtype or torch.get_default_dtype())
        self._register("weight", empty)
        self._register("bias", empty.new_empty(self._shards.local) if self.margin.bias else None)
        self.reset_parameters()
        self._complete()

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
        if self._measured is None:
            raise RuntimeError("target_angle is known after a forward")
        return self._measured.angles().mean()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the last forward measured of the global batch (`metrics=True`): 0-d tensors by name, the same on every rank of the group.

        accuracy: share of samples whose own class is the nearest of those selected, without the margin; margin_met: whose target logit
        with the margin is still the largest (or decides for it, where every class is a decision); embedding_norm: mean length of the
        embeddings. Where vectors are normalised also angles in radians: target_angle (mean), target_angle_p10, _p50, _p90 (percentiles),
        hardest_angle (mean, to the nearest other class).
        NaN where there are no samples.
        """
        if self._measured is None or self._measured.hardest is None:
            raise RuntimeError("metrics are known after a forward of a head that was built with metrics=True")
        return self._measured.summary(self.margin)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sample_rate={self.sample_rate}"

    # ------------------------------------------------------------------------------------------------ one step

    @torch._disable_dynamo  # collectives and sizes that depend on data: under torch.compile the head runs as it is
    def forward(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: embeddings `[N_local, D]` and labels `[N_local]`, or a `GlobalBatch` from `gather`."""
        self._check_wiring()
        with record_function("partial_fc::gather"):
            batch, x = self._take(embeddings, labels)
        with record_function("partial_fc::select"):
            step = self._plan(batch, scatter=x is not batch.embeddings)
        if self.training:
            self._step += 1
        self._selected_rows = step.rows
        if self._record.bad_forward and self.training:
            return self._zero_loss(x, batch, rows_of_all=step.rows is None and step.start_update is None)
        weight, bias = local_part(self.weight), None if self.bias is None else local_part(self.bias)
        anchor = None
        if step.rows is not None or step.start_update is not None:
            weight, bias, anchor = weight.detach(), None if bias is None else bias.detach(), self._anchor()
        offset = local_part(self.margin.get_parameter("offset")) if self.margin.binary else None
        loss = ShardedCrossEntropy.apply(x, weight, bias, offset, anchor, step)
        self._measured = step.measured
        assert step.losses is not None
        return self._follow(loss, step.losses, batch)

    def _plan(self, batch: GlobalBatch, scatter: bool) -> Step:
        shards, device = self._shards, batch.embeddings.device
        targets, target_weights = self._targets(batch)
        rows = None
        if self.training and self.sample_rate < 1:
            window = draw_window(self.num_classes, self.sample_rate, seed=self.seed, step=self._step, device=device)
            labels = torch.where(batch.mesh_labels == self.ignore_index, -1, batch.mesh_labels)
            rows = select_rows(window, labels, shards.lo, shards.hi)
        selected = (shards.local if rows is None else len(rows)) * self.margin.centers
        logits = logits_bytes(len(batch.embeddings), selected, compute_dtypes(batch.embeddings, self.weight)[1])
        step = Step(
            batch=batch,
            margin=self.margin,
            rows=rows,
            lo=shards.lo,
            num_classes=self.num_classes,
            targets=targets,
            target_weights=target_weights,
            sample_weights=self._sample_weights(batch),
            label_smoothing=self.label_smoothing,
            interclass_filter=self.interclass_filter,
            reduction=self.reduction,
            scale_embedding_grad=self.scale_embedding_grad,
            scatter=scatter,
            kept=logits <= self.logits_budget,
            needs_grad=torch.is_grad_enabled(),
            on_row_grad=self._rows.accumulate,
            workspace=self._workspace,
            start_update=self._update_in_backward(),
            first_sample=sum(row.samples for row in batch.status[: batch.ranks.replica * batch.ranks.world]),
            draw=mix(self.seed, self._step),
            metrics=self.collect_metrics,
        )
        step.kept = step.kept and not (step.ruled and step.label_smoothing)
        self._report_mode(step.kept, logits)
        return step

    def _worth(
        self, labels: Tensor, label_weights: Tensor | None, sample_weights: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        worth = super()._worth(labels, label_weights, sample_weights, dtype)
        if self.class_weights is None:
            return worth
        labels = as_matrix(labels)
        shares = (labels != self.ignore_index).to(dtype) * (1.0 if label_weights is None else label_weights.to(dtype))
        of_class = self.class_weights.to(dtype)[torch.where(shares > 0, labels, 0)]
        total = shares.sum(1)
        return worth * (of_class * shares).sum(1) / torch.where(total > 0, total, 1.0)

    def _update_in_backward(self) -> Callable[[], Callable[[int, int, list[Tensor]], None]] | None:
        optimizer = self._rows.live_optimizer
        if optimizer is None or not optimizer.update_in_backward or not (self.training and torch.is_grad_enabled()):
            return None
        kind = local_part(self.weight).device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise RuntimeError(
                "update_in_backward cannot be joined with float16, which needs a GradScaler; use bfloat16"
            )
        return optimizer.in_backward

    def _report_mode(self, kept: bool, size: int) -> None:
        mode = "kept" if kept else "tiled"
        if self.training and mode != self.logits_mode:
            log.info("logits are %s: %d bytes of them on this rank, a budget of %d", mode, size, self.logits_budget)
            self.logits_mode = mode

    # ------------------------------------------------------------------------------------------------ what can be wrong

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        tables = [float(b.double().sum()) for b in self.buffers()]
        own = self._init_std, self.sample_rate, self.interclass_filter, tables
        digest = settings["a digest of the settings"], self.margin.describe(), own
        return {**settings, "a digest of the settings": digest}

    # ------------------------------------------------------------------------------------------------ parameters and state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights again as `seed` says, biases 0, the margin's state as at the start.

        Also after `to_empty` on a head that was built on the meta device.
        """
        self._draw(self.weight)
        if self.bias is not None:
            local_part(self.bias.detach()).zero_()
        self.margin.reset()

    def get_extra_state(self) -> dict[str, Any]:
        """The numbers of training forwards and of changes of the classes, which say what is drawn next; the margin that weights are for;
        how many steps were skipped."""
        return {
            "step": self._step,
            "class_changes": self._class_changes,
            "margin": self.margin.describe(),
            "skips": self.skips,
        }

    def set_extra_state(self, state: Any) -> None:
        state = state if isinstance(state, dict) else {"step": state}  # a 0-d tensor, before classes could change
        self._step, self._class_changes = int(state["step"]), int(state.get("class_changes", 0))
        self._record.skips = int(state.get("skips", 0))

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict is that of a head of another margin; tensors in it are not looked at."""
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

    # ------------------------------------------------------------------------------------------------ classes that come and go

    @property
    def _normalizes(self) -> bool:
        return self.margin.normalize

    def _change_tables(self, change: Change) -> Callable[[], None]:
        class_weights, margin = self._changed_class_weights(change), self._changed_margin(change)

        def take() -> None:
            self.class_weights, self.margin, self._selected_rows = class_weights, margin, None
            if margin is change.margin:
                return
            # the start that depends on the number of classes is another now, the state is not
            state = {
                name: local_part(t.detach()).clone()
                for name, t in (*margin.named_buffers(), *margin.named_parameters())
            }
            margin.prepare(change.num_classes, self._drawn_of(change.num_classes))
            for name, tensor in (*margin.named_buffers(), *margin.named_parameters()):
                local_part(tensor.detach()).copy_(state[name])

        return take

    def _drawn_of(self, num_classes: int) -> int:
        return num_classes if self.sample_rate == 1 else window_size(num_classes, self.sample_rate)

    def _changed_class_weights(self, change: Change) -> Tensor | None:
        given, old = change.class_weights, self.class_weights
        if old is None:
            if given is not None:
                raise ValueError("class_weights are for heads that were built with class_weights; this one has none")
            return None
        if not change.added:
            return change.moves.of_all(old).to(old)
        if given is None:
            raise ValueError(f"this head has class_weights: give class_weights for the {change.added} new classes")
        new = _class_weights(given, change.added, old.device)
        assert new is not None
        return torch.cat((old, new.to(old.dtype)))

    def _changed_margin(self, change: Change) -> Margin:
        """The margin for the classes that there will be; ValueError if there is none."""
        margin, name, number = self.margin, type(self.margin).__name__, change.num_classes
        if not margin.by_class:
            if change.margin is not None:
                raise ValueError(
                    f"margin is for margins that hold a number for each class (AdaptiveMargin); this head's {name} stays"
                )
            trial = margin.frozen()
            trial.prepare(number, self._drawn_of(number))
            for (buffer, before), after in zip(margin.named_buffers(), trial.buffers(), strict=True):
                if before.shape != after.shape:
                    raise ValueError(
                        f"{name}.{buffer} changes its shape with the number of classes: {name} must say by_class = True"
                    )
            return margin
        if change.margin is None:
            raise ValueError(
                f"{name} holds a number for each class: give margin={name}(...) for the {number} classes that there will be"
            )
        if type(change.margin) is not type(margin) or change.margin.centers != margin.centers:
            raise ValueError(f"margin must be a {name} with as many centers as before, not {change.margin!r}")
        change.margin.prepare(number, self._drawn_of(number))
        for parameter, value in margin.named_parameters():
            setattr(change.margin, parameter, value)
        return change.margin.to(local_part(self.weight).device).train(margin.training)


def _check_arguments(sample_rate: float, label_smoothing: float, logits_budget: int | None) -> None:
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is a share of the classes in (0, 1], not {sample_rate}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if logits_budget is not None and logits_budget < 0:
        raise ValueError(f"logits_budget is a number of bytes, at least 0, not {logits_budget}")


def _class_weights(weights: Tensor | None, num_classes: int, device: torch.device) -> Tensor | None:
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must be one number for each of {num_classes} classes, not {list(weights.shape)}"
        )
    bad = (~weights.double().isfinite() | (weights < 0)).nonzero()
    if len(bad):
        raise ValueError(
            f"class_weights[{int(bad[0])}] is {weights[int(bad[0])].item()}; a weight is a number of at least 0"
        )
    return weights.to(device, torch.promote_types(weights.dtype, torch.float32))
