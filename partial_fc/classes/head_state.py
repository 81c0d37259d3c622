"""`HeadState`: how a `PartialFC` is built, its public state, checkpoints, changes of classes; unusual steps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from partial_fc.batch.building import digest_of_values, together
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.status import HALF
from partial_fc.checkpoint.save_load import PLACEHOLDER
from partial_fc.classes.hard_negatives import UNKNOWN, HardNegatives, Search, check_hard_negatives
from partial_fc.classes.head_arguments import check_head_arguments, checked_block
from partial_fc.classes.interface import Change
from partial_fc.classes.predictions import HeadPredictions
from partial_fc.classes.tables import (
    changed_class_weights,
    changed_margin,
    check_same_structure,
    checked_class_weights,
    prepare_anew,
)
from partial_fc.distributed.ranks import Group, local_part
from partial_fc.errors import log
from partial_fc.kernels.choice import Case, Kernels, KernelsMode, choose, mode_of
from partial_fc.kernels.launch import prepare
from partial_fc.kernels.trial import proven
from partial_fc.margins.base import Margin
from partial_fc.margins.state import load_state, misfit, state_of
from partial_fc.margins.variants import ArcFace
from partial_fc.nonfinite.bad_step import put_back
from partial_fc.optim.protocol import settle
from partial_fc.optim.stored_rows import stated_rows
from partial_fc.sampling import window_size
from partial_fc.sharded_module import Reduction, SharedArguments, check_choice
from partial_fc.softmax.corrections import Correction, log_weights
from partial_fc.softmax.draws import Draws, Slots
from partial_fc.softmax.forward import is_bounded
from partial_fc.softmax.inputs import LossOptions
from partial_fc.softmax.measured import Measured
from partial_fc.softmax.tiles import Workspace, compute_dtypes
from partial_fc.step_record import DEFAULT_MAX_SKIPS, OnNonfinite, Validate
from partial_fc.tiers.kinds import Storage

DEFAULT_LOGITS_BUDGET = 1 << 30
SamplingCorrection = Literal["none", "importance"]
NUMBERS = "label_smoothing", "interclass_filter", "inter_topk", "inter_topk_penalty", "logits_budget"


class HeadState(HeadPredictions):
    """Base of `PartialFC`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    class_weights: Tensor | None
    margin: Margin
    _sample_rate: float
    _sample_block: int
    label_smoothing: float
    interclass_filter: float | None
    inter_topk: int
    inter_topk_penalty: float
    _sampling_correction: SamplingCorrection
    forward_count: int
    logits_budget: int
    logits_mode: str
    kernels_in_use: str
    _kernels: KernelsMode
    selected_rows: Tensor | None
    _last_labels: Tensor | None
    _measured: Measured | None

    counts = ("step",)
    FACTS: ClassVar[dict[str, str]] = {
        **HardNegatives.FACTS,
        **{name: name for name in ("label_smoothing", "interclass_filter", "forward_count")},
        **{name: name for name in ("inter_topk", "inter_topk_penalty")},
        **{name: f"_{name}" for name in ("sample_rate", "sample_block")},
        **{name: f"_{name}" for name in ("hard_negatives", "hard_negatives_every", "hard_negatives_search")},
        "sampling_correction": "_sampling_correction",
        "metrics": "collect_metrics",
        "class_weights, as they were set": "_weights_set",
        "a hash of the margin's values for each class": "margin._given.values",
        "kernels": "_kernels",
    }

    SETTINGS: ClassVar[frozenset[str]] = HeadPredictions.SETTINGS | {*NUMBERS, "margin", "class_weights"}

    @together
    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin | None = None,
        sample_rate: float = 1.0,
        *,
        sample_block: int = 1,
        group: Group = None,
        seed: int = 0,
        init_std: float = 0.01,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_embedding_grad: bool = True,
        logits_budget: int | None = None,
        label_smoothing: float = 0.0,
        interclass_filter: float | None = None,
        inter_topk: int = 0,
        inter_topk_penalty: float = 0.06,
        hard_negatives: int = 0,
        hard_negatives_every: int = 1000,
        hard_negatives_search: Search = "exact",
        sampling_correction: SamplingCorrection = "none",
        class_weights: Tensor | None = None,
        metrics: bool = False,
        validate: Validate = "always",
        on_nonfinite: OnNonfinite = "raise",
        max_skips: int | None = DEFAULT_MAX_SKIPS,
        kernels: KernelsMode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Storage | None = None,
    ) -> None:
        """Build the head, on every rank of its group.

        Args:
            embedding_size: D, width of the embeddings.
            num_classes: C, classes over all ranks; may be smaller than the number of ranks.
            margin: what happens to target logits, and the scale; by default `ArcFace(scale=64.0, margin=0.5)`.
            sample_rate: r, share of classes drawn for a step; 1 for all.
            sample_block: how many consecutive ids are drawn at a time (docs/tiers.md).
            group: a ProcessGroup or 1-D DeviceMesh to split classes over, or a 2-D mesh (replicate, shard); None for
                all ranks, or this process alone without a group. The backbone's gradients must be averaged over the
                same ranks.
            seed: of initial weights and draws; must agree between ranks.
            init_std: standard deviation of initial weights.
            ignore_index: label of samples that take no part.
            reduction: "mean" over the valid samples of the global batch (weighted; 0 without any), "sum", or "none":
                this rank's weighted losses; the objective is the mean over ranks of what each makes of them
                (docs/losses.md).
            scale_embedding_grad: multiply the embeddings' gradient by the number of ranks, by which DDP and FSDP
                divide.
            logits_budget: bytes of kept logits `[N, S]` on a rank (default 1 GiB); beyond it backward computes them
                again.
            label_smoothing: ε in [0, 1), as in `F.cross_entropy`, over the selected classes: all at r = 1.
            interclass_filter: cosine in (-1, 1] beyond which another class is taken for the sample's own under a second
                label and left out of the denominator (arXiv 2203.15565, section 3.4); None for no filter.
            inter_topk: k, how many of the other classes that are nearest to a sample, of those selected, count as
                nearer by `inter_topk_penalty`, an angle in radians in [0, π) (arXiv 2110.05042); 0 for none.
            hard_negatives: K, nearest classes of each class of the batch that take part as well, at r < 1: searched
                every `hard_negatives_every` training forwards, "exact" or by "faiss" (`hard_negatives_search`;
                docs/losses.md).
            sampling_correction: "importance" takes a class that only the window drew for C/w classes (w = r·C), so that
                the denominator has the mean of that over all; "none" as in the papers. For r < 1 (docs/losses.md).
            class_weights: `[C]`, as in `F.cross_entropy(weight=...)`, on every rank; a sample of several classes has
                the mean of their weights, by its label weights. A mean is divided by the sum of the samples' weights.
            metrics: measure `metrics` in every forward; nothing is computed for them otherwise. `head.collect_metrics`
                switches it between forwards, on all ranks alike.
            validate: look for bad labels, NaN and infinities "always", in the "first" batch and its step, or "never".
                Shapes are always checked. For a `GlobalBatch`, `gather` has looked.
            on_nonfinite: what all ranks do about a NaN or infinity in any rank's embeddings, loss or gradients: "raise"
                NonFiniteError, "skip" the step (`skipped` is True), or "log" bad embeddings and look at nothing else.
                See `check_gradients` and docs/nonfinite.md.
            max_skips: how many steps in a row may be skipped before NonFiniteError is raised; None for any number.
            kernels: "auto" for kernels in Triton where they serve, "off", or "interpret" (docs/kernels.md).
            device: of the weights.
            dtype: of the weights; float32 unless the default is another.
            storage: `HostRows()` or `FileRows(folder)` for rows in host memory or in files (docs/tiers.md).
        """
        margin = ArcFace() if margin is None else margin
        numbers = check_head_arguments(
            margin, sample_rate, label_smoothing, interclass_filter, inter_topk, inter_topk_penalty, logits_budget
        )
        hard = check_hard_negatives(hard_negatives, hard_negatives_every, numbers.sample_rate)
        shared = SharedArguments(
            embedding_size, num_classes, group, seed, init_std, ignore_index, reduction, scale_embedding_grad,
            validate, on_nonfinite, max_skips, device, storage,
        )  # fmt: skip
        super().__init__(shared, sampled=numbers.sample_rate < 1)
        self._sample_block = checked_block(sample_block, self.num_classes, numbers.sample_rate)
        self.margin = margin
        self._sample_rate = numbers.sample_rate
        self.label_smoothing = numbers.label_smoothing
        self.interclass_filter = numbers.interclass_filter
        self.inter_topk, self.inter_topk_penalty = numbers.inter_topk, numbers.inter_topk_penalty
        self.sampling_correction = sampling_correction
        self.collect_metrics = metrics
        self.logits_budget = DEFAULT_LOGITS_BUDGET if numbers.logits_budget is None else numbers.logits_budget
        self.logits_mode = ""  # "kept", "tiled" or "streamed": as the last training forward chose
        self.kernels = kernels
        self.forward_count = 0  # training forwards: keys what is drawn
        self.selected_rows = None  # local rows of the last forward
        self._last_labels = None  # of its batch, on all ranks
        self._workspace = Workspace()
        self._windows = Draws()  # of the coming steps
        self._measured = None
        self._weights_set = ""
        checked = checked_class_weights(class_weights, self.num_classes, self._device)
        self.register_buffer("class_weights", checked, persistent=False)
        self._make_table(*hard, hard_negatives_search, margin.centers)
        dtype = dtype or torch.get_default_dtype()
        self._prepare_margin(dtype)
        centers = () if margin.centers == 1 else (margin.centers,)
        self._register("weight", self._new_rows("weight", (*centers, self.embedding_size), dtype))
        self._register("bias", self._new_rows("bias", (), dtype, drawn=False) if margin.bias else None)
        self.reset_parameters()
        self._complete()
        if self.class_rows.store is not None and self.class_rows.sampled:
            self.class_rows.store.upcoming = functools.partial(_rows_ahead, weakref.ref(self))

    def _prepare_margin(self, dtype: torch.dtype) -> None:
        """Fit the margin to the classes and the device; its parameters become parameters that all ranks share."""
        self.margin.prepare(self.num_classes, self._drawn_of(self.num_classes))
        self.margin.to(self._device)
        wide = torch.promote_types(dtype, torch.float32)
        for name, parameter in self.margin.named_parameters():
            local = local_part(parameter.detach()).to(wide)
            setattr(self.margin, name, nn.Parameter(self.shards.wrap_shared(local)))

    def __getstate__(self) -> dict[str, Any]:
        # what a forward leaves is of that forward, and may be as large as its logits
        own = {"_workspace": Workspace(), "_measured": None, "_last_labels": None}
        return {**super().__getstate__(), **own}

    def _checked(self, name: str, value: Any) -> Any:
        if name == "margin":
            return self.fitting(value)
        if name == "class_weights":
            weights = checked_class_weights(value, self.num_classes, self.class_rows.device)
            self._weights_set = "none" if weights is None else "{}, hash {:x}".format(*digest_of_values(weights))
            return weights
        if name == "logits_budget" and value is None:
            return DEFAULT_LOGITS_BUDGET
        if name in NUMBERS:
            now = {each: getattr(self, each) for each in NUMBERS}
            return getattr(check_head_arguments(self.margin, self.sample_rate, **{**now, name: value}), name)
        return super()._checked(name, value)

    def fitting(self, margin: Margin) -> Margin:
        """Return a margin that is to replace this head's, prepared as at construction. Trained parameters stay.

        TypeError or ValueError if the head was built for another kind.
        """
        if margin is self.margin:
            return margin
        check_head_arguments(
            margin, self.sample_rate, self.label_smoothing, self.interclass_filter, self.inter_topk,
            self.inter_topk_penalty, self.logits_budget,
        )  # fmt: skip
        check_same_structure(self.margin, margin)
        margin.prepare(self.num_classes, self._drawn_of(self.num_classes))
        for name, parameter in self.margin.named_parameters():
            setattr(margin, name, parameter)
        return margin.to(self.class_rows.device).train(self.training)

    # ------------------------------------------------------------------------------------------------ public state

    @property
    def sample_rate(self) -> float:
        """r: share of all classes that a step draws."""
        return self._sample_rate

    @property
    def sample_block(self) -> int:
        """How many consecutive class ids are drawn together."""
        return self._sample_block

    @property
    def sampling_correction(self) -> SamplingCorrection:
        """What makes up for classes that a step does not draw."""
        return self._sampling_correction

    @sampling_correction.setter
    def sampling_correction(self, value: SamplingCorrection) -> None:
        check_choice("sampling_correction", value, ("none", "importance"))
        if value == "importance" and self._sample_rate == 1:
            raise ValueError(
                "sampling_correction='importance' is for sample_rate below 1: at 1.0 every class takes part in every "
                "step, and nothing is to be corrected"
            )
        self._sampling_correction = value

    @property
    def selected(self) -> Tensor:
        """Class ids `[S]` that this rank used in the last forward, ascending."""
        lo, hi = self.shards.lo, self.shards.hi
        if self.selected_rows is None:
            return torch.arange(lo, hi, device=self.class_rows.device)
        return self.selected_rows.unique() + lo

    @property
    def selected_counts(self) -> dict[str, Tensor]:
        """How many classes this rank used in the last forward, by what put them there (0-d, counted when asked for).

        rows: all of them. window: those that were drawn, all at r = 1. batch: labels of the batch that the window has
        not. hard: neither.
        """
        ids = self.selected
        drawn = in_batch = torch.ones_like(ids, dtype=torch.bool)
        if self.selected_rows is not None and self._last_labels is not None:
            of_window = self._windows.rows(self.forward_count - 1).to(ids.device)
            drawn = torch.isin(ids - self.shards.lo, of_window)
            labels = self._last_labels
            in_batch = torch.isin(ids, labels.where(labels != self.ignore_index, -1))
        counted = {"window": drawn, "batch": in_batch & ~drawn, "hard": ~(in_batch | drawn)}
        return {"rows": torch.ones_like(ids).sum(), **{name: each.sum() for name, each in counted.items()}}

    @property
    def row_grad(self) -> tuple[Tensor, Tensor] | None:
        """Under sampling: (class ids `[S]`, gradient of their weights `[S, D]`) since `zero_grad`; else None."""
        rows = self.class_rows
        if not rows.sampled or rows.grad_rows is None or rows.carriers[0].grad is None:  # frozen
            return None
        ids, grad = rows.grad_rows + self.shards.lo, local_part(rows.carriers[0].grad)
        if rows.pads is not None:
            real = rows.pads.real()
            ids, order = ids[real].sort()
            grad = grad[real][order]
        return ids, grad

    @property
    def target_angle(self) -> Tensor:
        """Mean angle of embeddings to their target class in the last forward, in radians, without margin (0-d)."""
        if self._measured is None:
            raise RuntimeError("target_angle is known after a forward")
        return self._measured.angles().nanmean()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last forward's global batch (`metrics=True`): 0-d tensors by name, equal on every rank; on a
        2-D mesh, those of the replica's batch, equal on its ranks.

        accuracy: share of samples whose target class is the nearest selected class, without the margin. margin_met:
        share of samples whose target logit with the margin is still the largest (or positive, if every class is a
        binary decision). embedding_norm: mean length of the embeddings. If vectors are normalized, also angles in
        radians: target_angle (mean), target_angle_p10, _p50, _p90 (percentiles), hardest_angle (mean, to the nearest
        other class). NaN without samples.
        """
        if self._measured is None or self._measured.hardest is None:
            raise RuntimeError("metrics are known after a forward of a head that was built with metrics=True")
        return self._measured.summary(self.margin)

    def rows_ahead(self) -> Callable[[], Tensor] | None:
        """Return what draws the local rows of the window of the forward after this one; None in evaluation."""
        return functools.partial(self._windows.rows, self.forward_count + 1) if self.training else None

    def classes_always_taken(self, batch: GlobalBatch, positives: Tensor) -> Tensor:
        """Return the ids of the classes that take part besides a window, in any shape; −1 is none. positives: those of
        the targets of this replica."""
        if batch.ranks.replica_group is not None or batch.label_weights is not None:
            # replicas select the same rows; a label without weight is drawn nevertheless
            positives = torch.where(batch.mesh_labels == self.ignore_index, -1, batch.mesh_labels)
        return self.with_hard_negatives(positives) if self._hard_negatives else positives

    def _correct(
        self,
        rows: Tensor,
        slots: Slots | None,
        always: Tensor,
        options: LossOptions,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> Correction:
        """Return the correction of a forward with these local rows. always: ids of the classes that are always taken.
        dtypes: of the statistics, of the matrix products."""
        block = self._sample_block
        share = window_size(self.num_classes, self._sample_rate, block) / (-(-self.num_classes // block) * block)
        found = log_weights(rows, slots, always, self.shards.lo, share, dtypes[0])
        late = options.ruled or options.metrics or options.margin.binary is not None
        if not late and is_bounded(options, *dtypes):
            found = found.to(dtypes[1])  # of the logits then
        return Correction.of(found, self.margin.centers, late)

    @property
    def kernels(self) -> KernelsMode:
        """Which kernels may serve a forward; may be set between steps, on every rank alike (docs/kernels.md).

        `kernels_in_use` says which served the last one: "rows", "none (why)", or "" where nobody asked.
        """
        return self._kernels

    @kernels.setter
    def kernels(self, mode: KernelsMode) -> None:
        mode = mode_of(mode)
        prepare(mode)
        self._kernels, self.class_rows.kernels, self.kernels_in_use = mode, None, ""

    def kernels_for(self, options: LossOptions, embeddings: Tensor) -> Kernels | None:
        """Return the kernels that serve a forward of embeddings `[N, D]`, None if none does; report what changed."""
        margin, weight = self.margin, local_part(self.weight)
        stats, product = compute_dtypes(embeddings, weight)
        case = Case(
            device=weight.device,
            rows=weight.dtype,
            stats=stats,
            product=product,
            width=self.embedding_size,
            centers=margin.centers,
            normalize=margin.normalize,
            bounded=is_bounded(options, stats, product),
            ruled=options.ruled,
            binary=margin.binary is not None,
            bias=margin.bias,
            smoothing=options.label_smoothing > 0,
            metrics=options.metrics,
            correction=self._sampling_correction != "none" and self._sample_rate < 1,
            sampled=self.training and self._sample_rate < 1,
        )
        found = proven(choose(self._kernels, case), case)
        if str(found) != self.kernels_in_use:
            self.kernels_in_use = str(found)
            log.info("kernels in use: %s%s", found, f" ({found.reason})" if found.rows and found.reason else "")
        return found if found.rows else None  # the others need the rows

    def _report_mode(self, mode: str, size: int) -> None:
        self.logits_mode = mode
        message = "logits are %s: %d bytes of them on this rank, a budget of %d"
        log.info(message, self.logits_mode, size, self.logits_budget)

    def extra_repr(self) -> str:
        corrected = "" if self.sampling_correction == "none" else f", sampling_correction={self.sampling_correction}"
        return f"{super().extra_repr()}, sample_rate={self.sample_rate}{corrected}"

    # ------------------------------------------------------------------------------------------------ saved state

    @torch.no_grad()
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadState:
        weights = self.class_weights
        super()._apply(fn, recurse)
        if weights is not None and self.class_weights is not None and self.class_weights.dtype in HALF:
            self.class_weights = weights.to(self.class_weights.device)  # as when it was built: half would round them
        return self

    def reset_parameters(self) -> None:
        """Draw the weights again as `seed` says; set biases to 0, the margin's state to its start, neighbours to −1.

        Also after `to_empty` on a head that was built on the meta device.
        """
        settle(self.class_rows)
        untouched = self._is_untouched
        self._draw(self.weight)
        if self.bias is not None and not untouched:
            local_part(self.bias.detach()).zero_()
        if self.neighbours is not None:
            self.neighbours.fill_(UNKNOWN)
        self.margin.reset()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the forward count and the number of class changes (both key draws), the margin, skipped steps, and
        whose rows the state has."""
        return {
            "step": self.forward_count,
            "class_changes": self.class_changes,
            **state_of(self.margin),
            "skips": self.skips,
            "rows": stated_rows(self.class_rows),
        }

    def set_extra_state(self, state: Any) -> None:
        state = state if isinstance(state, dict) else {"step": state}  # a 0-d tensor, before classes could change
        self.forward_count = int(state["step"])
        self.class_changes = int(state.get("class_changes", 0))
        self.class_rows.record.skips = int(state.get("skips", 0))
        load_state(self.margin, state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict is that of a head with another margin; its tensors are not read."""
        extra = state.get("_extra_state")
        if isinstance(extra, Tensor) or (isinstance(extra, dict) and PLACEHOLDER in extra):
            return  # the step alone, before classes could change
        if isinstance(extra, dict) and (reason := misfit(self.margin, extra)):
            raise ValueError(reason)
        super().check_state(state)

    def forget_notes(self) -> None:
        put_back(self.class_rows.record)

    # ----------------------------------------------------------------------------------------------- changes of classes

    @property
    def normalizes(self) -> bool:
        return self.margin.normalize

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        drawn = self._drawn_of(change.num_classes)
        checked_block(self._sample_block, change.num_classes, self._sample_rate)
        class_weights = changed_class_weights(self.class_weights, change)
        margin = changed_margin(self.margin, change, drawn, self.class_rows.device)
        take_table = self.changed_table(change)

        def take() -> None:
            # both are checked and prepared already
            self.register_buffer("class_weights", class_weights, persistent=False)
            self.add_module("margin", margin)
            take_table()
            self.selected_rows = self._last_labels = None
            if margin is not change.margin:
                prepare_anew(margin, change.num_classes, drawn)

        return take

    def _drawn_of(self, num_classes: int) -> int:
        """Return for how many classes those of a step count."""
        every = self.sample_rate == 1 or self.sampling_correction == "importance"
        return num_classes if every else window_size(num_classes, self.sample_rate, self._sample_block)


def _rows_ahead(head: weakref.ref[HeadState]) -> Callable[[], Tensor] | None:
    here = head()
    return None if here is None else here.rows_ahead()
