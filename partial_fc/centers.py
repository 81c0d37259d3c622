"""`CenterLoss`: class centers `[C, D]`, split over ranks by rows, that draw the embeddings of their classes together.

    embeddings [N_local, D], labels [N_local]
       gather        counts and status, checked on every host; then the global batch
       own targets   P of the N · L targets, those whose class is on this rank: differences x − c [P, D]; no other row
                     is read
       loss          Σ ½ w ‖x − c‖² of own targets, summed over the ranks: one number of each, [N] for reduction "none"
       backward      dx = w (x − c) on the rank that owns the class, reduce-scattered
       centers       "paper": Σ (c − x) and n of each class in the batch, kept by forward until `step`
                     "gradient": gradients of the rows of these classes, through `RowOptimizer`

Wen, Y. et al.: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc import errors
from partial_fc.batch.building import together
from partial_fc.batch.exchange import GlobalBatch, gradient_of_losses
from partial_fc.batch.row_sums import Pads, add_to_rows
from partial_fc.batch.status import as_matrix
from partial_fc.batch.targets import targets_of
from partial_fc.classes.changeable import ChangeableLoss
from partial_fc.classes.class_means import Batches
from partial_fc.distributed.derivatives import executes, first_derivative
from partial_fc.distributed.given import real
from partial_fc.distributed.ranks import (
    Group,
    all_gather_mesh,
    local_part,
    naming_the_missing,
    start_reduce_scatter,
    sum_over_replicas,
)
from partial_fc.distributed.sums import sum_over_ranks
from partial_fc.nonfinite.check_gradients import check_step
from partial_fc.nonfinite.wiring import follow_in_eval
from partial_fc.optim.protocol import settle
from partial_fc.optim.stored_rows import stated_rows
from partial_fc.sharded_module import Reduction, SharedArguments, check_choice
from partial_fc.softmax.tiles import compute_dtypes
from partial_fc.step_record import DEFAULT_MAX_SKIPS, OnNonfinite, Validate
from partial_fc.tiers.kinds import Storage
from partial_fc.tiers.travel import to_device

if TYPE_CHECKING:
    from partial_fc.head import PartialFC

Update = Literal["paper", "gradient"]


class CenterLoss(ChangeableLoss):
    """½ ‖x − c_y‖² of each embedding and the center of its class. Call it as `loss = center(embeddings, labels)` on
    every rank.

    With a head, on one exchange: `batch = gather(embeddings, labels); loss = head(batch) + 0.1 * center(batch)`.
    Several labels a sample count by their weights, `Σ_l w_l ½ ‖x − c_l‖²`. Embeddings are taken as they are, not
    normalised.

    Args:
        embedding_size: D, width of the embeddings.
        num_classes: C, classes over all ranks.
        alpha: α in (0, 1], how far `step` moves centers, for update="paper".
        update: "paper": every training forward notes Σ_{y_i = j} (c_j − x_i) and n_j over the global batch, and `step`
            moves c_j by −α Σ (c_j − x_i) / (1 + n_j), as eq. 4 of the paper; independent of the weight of the loss and
            of a GradScaler. A sample counts as its sample weight times its label's weight; one that is ignored or of
            weight 0 does not count. "gradient": centers receive the gradient of the loss, for the classes in the batch,
            and a `RowOptimizer` moves them.
        group: a ProcessGroup or 1-D DeviceMesh to split classes over, or a 2-D mesh (replicate, shard); None for all
            ranks, or for this process alone where there is no process group.
        seed: of initial centers; must agree between ranks, as alpha and update must.
        init_std: standard deviation of initial centers.

    The other arguments are those of `PartialFC`.

    Shapes: embeddings `[N_local, D]` float, labels `[N_local]` int64 (or `[N_local, L]` within a `GlobalBatch`);
    N_local may be 0.

    Raises ValueError for bad arguments or bad inputs, with the same message on every rank; RuntimeError if it is wired
    wrongly.
    """

    centers: nn.Parameter

    FACTS: ClassVar[dict[str, str]] = {**ChangeableLoss.FACTS, "alpha": "alpha", "update": "update"}
    SETTINGS: ClassVar[frozenset[str]] = ChangeableLoss.SETTINGS | {"alpha", "update"}

    @together
    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        alpha: float = 0.5,
        update: Update = "paper",
        group: Group = None,
        seed: int = 0,
        init_std: float = 0.01,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_embedding_grad: bool = True,
        validate: Validate = "always",
        on_nonfinite: OnNonfinite = "raise",
        max_skips: int | None = DEFAULT_MAX_SKIPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        storage: Storage | None = None,
    ) -> None:
        alpha = _checked_alpha(alpha)
        check_choice("update", update, ("paper", "gradient"))
        shared = SharedArguments(
            embedding_size, num_classes, group, seed, init_std, ignore_index, reduction, scale_embedding_grad,
            validate, on_nonfinite, max_skips, device, storage,
        )  # fmt: skip
        super().__init__(shared, sampled=update == "gradient")
        self.alpha = alpha
        self.update = update
        # since the last step(): rows of classes seen [S], and for each Σ (c − x) and, in the last column, n: [S, D + 1]
        self._pending: tuple[Tensor, Tensor] | None = None
        self._register("centers", self._new_rows("centers", (self.embedding_size,), dtype))
        self.centers.requires_grad_(update == "gradient")
        self.reset_parameters()
        self._complete()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value) if self._is_built and name in self.SETTINGS else value)

    def _checked(self, name: str, value: Any) -> Any:
        if name == "update" and value != self.update:
            raise ValueError(
                f"update is {self.update!r} since the centers were built; build another loss for {value!r}"
            )
        return _checked_alpha(value) if name == "alpha" else super()._checked(name, value)

    def extra_repr(self) -> str:
        moved = f"alpha={self.alpha}" if self.update == "paper" else f"update={self.update!r}"
        return f"{super().extra_repr()}, {moved}"

    # ------------------------------------------------------------------------------------------------ one step

    @torch._disable_dynamo  # collectives and sizes that depend on data: under torch.compile it runs as it is
    def forward(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: embeddings `[N_local, D]` and labels `[N_local]`, or a `GlobalBatch` from `gather`."""
        with record_function("partial_fc::gather"):
            batch, x = self._checked_batch(embeddings, labels)
        rows = self.class_rows
        if self.training and rows.record.bad_forward:
            return self._zero_loss(x, batch, gradient_of_all_rows=not rows.sampled)
        named = naming_the_missing("the forward of a center loss", batch.ranks.group)
        with record_function("partial_fc::centers"), named:
            targets = self._own_targets(batch, scatter=x is not batch.embeddings)
            differences = self._differences(targets)
            anchor = self._anchor() if self.training and rows.sampled else None
            loss = _CenterDistance.apply(x, anchor, differences, targets)
            if self.training and self.update == "paper":
                self._note(differences, targets)
        if not self.training:
            return follow_in_eval(loss, rows, self.update == "paper" or self.centers.requires_grad)
        return self._follow(loss, loss.detach(), batch)

    @torch.no_grad()
    def step(self) -> None:
        """Move the centers of the classes seen in training forwards since the last step, by all of them together; then
        forget them.

        Does nothing if there were none, or if the step was left out (`skipped`): then it only forgets. Raises
        RuntimeError if update is "gradient", NonFiniteError as `check_gradients` does if that was not called.
        """
        if self.update == "gradient":
            raise RuntimeError(
                'update="gradient": centers are moved by the step() of a RowOptimizer(torch.optim.SGD, center, ...)'
            )
        record = self.class_rows.record
        if record.unchecked:
            check_step([self.class_rows], [])
        pending, self._pending = self._pending, None
        record.end()
        self.class_rows.updates += 1
        if pending is None or self.skipped:
            return
        rows, totals = pending
        sum_over_replicas(totals, self.shards.ranks, "the sum of moves of centers")
        if self._takes_every_target:
            totals = _every_sum(rows, totals)
        centers, home = local_part(self.centers.detach()), self.class_rows.home
        if self.class_rows.store is not None:
            self.class_rows.store.note(rows.to(home))
        rows, moves = rows.to(home), (totals[:, :-1] * (self.alpha / (1 + totals[:, -1:]))).to(home)
        centers.index_copy_(0, rows, (centers.index_select(0, rows) - moves).to(centers.dtype))
        if self.class_rows.store is not None:
            self.class_rows.store.wrote()

    def _own_targets(self, batch: GlobalBatch, scatter: bool) -> _OwnTargets:
        dtype, _ = compute_dtypes(batch.embeddings, self.centers)
        found = targets_of(batch, self.num_classes, self.ignore_index, self.reduction, dtype)
        targets, label_weights = found.ids, found.weights
        counts = label_weights
        if batch.sample_weights is not None:
            counts = label_weights * batch.sample_weights.to(label_weights.dtype)[:, None]
        rows, every = targets - self.shards.lo, self._takes_every_target
        if every:
            inside = rows.remainder(max(self.shards.local, 1))  # those of other ranks are spread, and count nothing
            own = inside == rows
            label_weights, counts, rows = label_weights * own, counts * own, inside
            sample = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
            sample, row, *weights = (
                t.reshape(-1)[: None if self.shards.local else 0] for t in (sample, rows, label_weights, counts)
            )
        else:
            sample, place = ((rows >= 0) & (rows < self.shards.local) & (counts > 0)).nonzero(as_tuple=True)
            row, *weights = (t[sample, place] for t in (rows, label_weights, counts))
        return _OwnTargets(
            batch=batch,
            sample=sample,
            row=row,
            label_weights=weights[0],
            counts=weights[1],
            sample_weights=found.loss_shares,
            mesh_rows=self._mesh_rows(batch),
            every=every,
            reduction=self.reduction,
            scale_embedding_grad=self.scale_embedding_grad,
            scatter=scatter,
            accumulate=functools.partial(self.class_rows.accumulate, changes=self.class_rows.changes),
            row_dtype=self.centers.dtype,
        )

    @property
    def _takes_every_target(self) -> bool:
        """Whether targets of other ranks stay among this rank's and count nothing: how many are its own would have to
        be waited for. Their places are those of other rows, which an optimizer then steps without a gradient, as it
        would later; but not where skipped rows stand still."""
        rows = self.class_rows
        return rows.home.type != "cpu" and (self.update == "paper" or rows.behind is not None)

    def _mesh_rows(self, batch: GlobalBatch) -> Tensor:
        """On a 2-D mesh: own rows that targets of any replica are of, so that all replicas hold sums of the same rows.
        Else none."""
        labels = as_matrix(batch.mesh_labels)
        if batch.ranks.replica_group is None:
            return labels.new_empty(0)
        if self._takes_every_target:
            return (labels.reshape(-1) - self.shards.lo).remainder(max(self.shards.local, 1))[
                : None if self.shards.local else 0
            ]
        targets = labels != self.ignore_index
        if batch.mesh_label_weights is not None:
            targets &= batch.mesh_label_weights > 0
        if batch.mesh_sample_weights is not None:
            targets &= batch.mesh_sample_weights[:, None] > 0
        rows = labels[targets] - self.shards.lo
        return rows[(rows >= 0) & (rows < self.shards.local)].unique()

    @torch.no_grad()
    def _differences(self, own: _OwnTargets) -> Tensor:
        """x − c `[P, D]` of own targets, in the dtype of the statistics."""
        of_class, row = self.class_rows, own.row.to(self.class_rows.home)
        of_class.catch_up(row if of_class.store is None else torch.cat((row, own.mesh_rows.to(row.device))))
        centers = to_device(local_part(self.centers.detach()).index_select(0, row), of_class.device)
        return own.batch.embeddings.index_select(0, own.sample).to(own.label_weights.dtype).sub_(centers)

    @torch.no_grad()
    def _note(self, differences: Tensor, own: _OwnTargets) -> None:
        counts = own.counts[:, None]
        rows, totals = own.by_row(torch.cat((-differences * counts, counts), 1))
        if self._pending is not None:
            rows, totals = torch.cat((self._pending[0], rows)), torch.cat((self._pending[1], totals))
            if not own.every:  # else the sums of one row are added up by `step`
                rows, totals = _sum_rows(rows, totals)
        self._pending = rows, totals

    # ------------------------------------------------------------------------------------------------ what can be wrong

    def _check_wiring(self) -> None:
        super()._check_wiring()
        if self.update == "paper" and self.class_rows.live_optimizer is not None:
            raise RuntimeError(
                'a RowOptimizer moves centers of update="gradient"; those of update="paper" are moved by center.step()'
            )

    # --------------------------------------------------------------------------------------------- parameters and state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the centers again as `seed` says; also after `to_empty` on a loss that was built on the meta device."""
        self._pending = None
        settle(self.class_rows)
        self._draw(self.centers)

    @torch.no_grad()
    def init_from_weights(self, head: PartialFC) -> None:
        """Start from the class weights of a head of the same classes, width and group; each rank copies its own rows.

        Raises ValueError if the head is another's.
        """
        if head.weight.shape != self.centers.shape:
            raise ValueError(
                f"the head's weight is {list(head.weight.shape)}, the centers are {list(self.centers.shape)}"
            )
        if not head.shards.ranks.same_as(self.shards.ranks):
            raise ValueError("the head is split over another group than the centers")
        self.class_rows.catch_up()
        head.class_rows.catch_up()
        local_part(self.centers.detach()).copy_(local_part(head.weight.detach()))
        self.class_rows.writes += 1
        self._pending = None

    def init_from_embeddings(self, batches: Batches) -> None:
        super().init_from_embeddings(batches)
        self._pending = None

    def get_extra_state(self) -> dict[str, Any]:
        """The number of changes of the classes, which says what is drawn next; how many steps were skipped; whose rows
        the state has."""
        return {"class_changes": self.class_changes, "skips": self.skips, "rows": stated_rows(self.class_rows)}

    def set_extra_state(self, state: Any) -> None:
        self.class_changes, self.class_rows.record.skips = int(state["class_changes"]), int(state.get("skips", 0))

    def forget_notes(self) -> None:
        self._pending = None

    def pending_work(self) -> str:
        if self._pending is not None:
            return "forwards have noted moves of the centers: call step() first"
        return super().pending_work()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CenterLoss:
        super()._apply(fn, recurse)
        if self._pending is not None:
            device = self.class_rows.device
            self._pending = self._pending[0].to(device), self._pending[1].to(device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **options: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", {"class_changes": 0})  # written before classes could change
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)
        self._pending = None  # differences from other centers


def _checked_alpha(value: Any) -> float:
    alpha = real("alpha", value)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], not {alpha}")
    return alpha


@dataclass
class _OwnTargets:
    """One forward besides the tensors that autograd follows: the P targets whose class this rank owns."""

    batch: GlobalBatch
    sample: Tensor  # [P] which sample
    row: Tensor  # [P] local row of its class
    label_weights: Tensor  # [P] of the class in the sample
    counts: Tensor  # [P] label weight times sample weight, above 0
    sample_weights: Tensor  # [N]: what each sample's loss counts for in the reduced loss
    mesh_rows: Tensor  # [M]: on a 2-D mesh, own rows of the targets of all replicas
    every: bool  # targets of other ranks are among them, with weights of 0
    reduction: Reduction
    scale_embedding_grad: bool
    scatter: bool  # backward itself returns the gradient of this rank's embeddings
    accumulate: Callable[..., None]  # takes row gradients
    row_dtype: torch.dtype

    def by_row(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(sorted rows `[S]` of own targets and of `mesh_rows`, for each the sum of the `values [P, K]` of its
        targets)."""
        if self.every:  # a row for each target; the first of those of one class has the sum of all
            rows = (self.row if self.batch.ranks.replica_group is None else self.mesh_rows).sort().values
            sums = values.new_zeros(len(rows), values.shape[1])
            place = torch.searchsorted(rows, self.row).clamp_(max=max(len(rows) - 1, 0))  # some count 0 and are no row
            return rows, add_to_rows(sums, place, values)
        nothing = values.new_zeros(len(self.mesh_rows), values.shape[1])
        return _sum_rows(torch.cat((self.row, self.mesh_rows)), torch.cat((values, nothing)))


def _sum_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct rows `[S]`, sorted; the sum of the `values [P, ...]` of each)."""
    distinct, place = torch.unique(rows, return_inverse=True)
    return distinct, add_to_rows(values.new_zeros(len(distinct), *values.shape[1:]), place, values)


def _every_sum(rows: Tensor, values: Tensor) -> Tensor:
    """Return `[P, ...]`: for each of `rows [P]` the sum of the values of all that are the same row."""
    place = torch.searchsorted(rows.sort().values, rows)
    return add_to_rows(torch.zeros_like(values), place, values).index_select(0, place)


class _CenterDistance(torch.autograd.Function):
    """(embeddings, anchor, differences, own targets) -> loss.

    embeddings: [N_local, D] of this rank if own.scatter, else the global [N, D], whose gradient is then this rank's
    share of it.
    anchor: the parameter whose rows' gradients are to go to own.accumulate, or None. differences: x − c
    [P, D]. The loss is a scalar that is the same on every rank, or [N_local] for reduction "none".
    """

    @staticmethod
    def forward(ctx, embeddings, anchor, differences, own):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(differences)
        ctx.own = own
        ctx.embeddings = embeddings
        batch = own.batch
        losses = differences.square().sum(1).div_(2).mul_(own.label_weights)
        if own.reduction != "none":
            return all_gather_mesh((losses * own.sample_weights[own.sample]).sum(), batch.ranks).sum()
        of_all = add_to_rows(torch.zeros_like(own.sample_weights), own.sample, losses).mul_(own.sample_weights)
        return sum_over_ranks(of_all, batch.ranks.group)[batch.local].clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative("CenterLoss", _CenterDistance.backward, ctx, grad, ctx.embeddings)
        (differences,), own = ctx.saved_tensors, ctx.own
        d_loss = gradient_of_losses(grad.to(differences.dtype), own.batch, own.sample_weights, own.reduction)
        coefficients = d_loss[own.sample] * own.label_weights
        grad_own = differences * coefficients[:, None]  # ∂L/∂x of each own target; ∂L/∂c is minus that
        try:
            wanted = ctx.needs_input_grad[1] and executes()(ctx.next_functions[1][0])
        except RuntimeError as error:
            raise errors.grad_of_rows("CenterLoss") from error
        finish = _send(grad_own, own) if ctx.needs_input_grad[0] else None
        if wanted:  # while the other gradient travels
            _hand_over(grad_own, own)
        return None if finish is None else finish().to(ctx.embeddings.dtype), None, None, None


def _send(grad: Tensor, own: _OwnTargets) -> Callable[[], Tensor]:
    """Begin to return the gradient by embeddings, from that of own targets `[P, D]`."""
    batch = own.batch
    dx = add_to_rows(grad.new_zeros(len(batch.embeddings), grad.shape[1]), own.sample, grad)
    if own.scale_embedding_grad:
        dx.mul_(batch.ranks.total)
    if not own.scatter:
        return lambda: dx
    with record_function("partial_fc::scatter"):
        return start_reduce_scatter(dx, batch.ranks, batch.counts)


def _hand_over(grad: Tensor, own: _OwnTargets) -> None:
    """Give the rows' gradients, summed over samples and replicas, to whoever keeps them for the optimizer."""
    rows, grads = own.by_row(-grad)
    sum_over_replicas(grads, own.batch.ranks, "the sum of class gradients")
    own.accumulate(rows, [grads.to(own.row_dtype)], Pads.of_sorted(rows) if own.every else None)
