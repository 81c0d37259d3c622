"""What every loss over class rows has in common, whatever it does with them: shards, the exchange of a batch, and what can be wrong.

rows [C_local, ...]        parameters that are split by class over the ranks of a group (`shards`), their gradients (`rows`)
batch                      gathered here or by `gather`; wiring, inputs and settings are judged alike on every rank
targets, sample weights    what each label and each sample counts for in the reduced loss
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.batch import GlobalBatch, exchange, joining
from partial_fc.batch_status import NO_LABEL, as_matrix
from partial_fc.classes import change as classes
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, Neighbours, nearest_classes, topk
from partial_fc.distributed.ranks import Group, Ranks, all_gather_mesh
from partial_fc.errors import NonFiniteError
from partial_fc.margins.base import Margin
from partial_fc.nonfinite.step_record import StepRecord
from partial_fc.rows import ShardedRows
from partial_fc.shards import ClassShards, initial_rows, local_part
from partial_fc.wrapping import DDP, FSDP2, refuse

log = logging.getLogger("partial_fc")

Reduction = Literal["mean", "sum", "none"]
Validate = Literal["always", "first", "never"]
OnNonfinite = Literal["raise", "skip", "log"]
Self = TypeVar("Self", bound="ShardedLoss")


class ShardedLoss(nn.Module):
    """Base of `PartialFC` and `CenterLoss`; what the arguments mean is said there.

    A subclass registers its sharded parameters with `_register` and then calls `_complete`.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        sampled: bool,
        group: Group,
        seed: int,
        init_std: float,
        ignore_index: int,
        reduction: Reduction,
        scale_embedding_grad: bool,
        validate: Validate,
        on_nonfinite: OnNonfinite,
        max_skips: int | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        for name, value in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not (math.isfinite(init_std) and init_std >= 0):
            raise ValueError(f"init_std must be at least 0, not {init_std}")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("validate", validate, ("always", "first", "never"))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "skip", "log"))
        self.embedding_size, self.num_classes, self.seed, self._init_std = embedding_size, num_classes, seed, init_std
        self.ignore_index, self.reduction, self.scale_embedding_grad = ignore_index, reduction, scale_embedding_grad
        if max_skips is not None and max_skips < 0:
            raise ValueError(
                f"max_skips is how many steps in a row may be skipped, at least 0, or None for any number, not {max_skips}"
            )
        self.validate, self.on_nonfinite = validate, on_nonfinite
        self._record = StepRecord(max_skips)
        self._seen_batch = False
        self._class_changes = 0  # how often classes came or went, so that rows drawn for new ones are never drawn again
        ranks = Ranks.of(group)
        self._device = torch.device(device) if device is not None else _default_device(ranks)
        self._shards = ClassShards.split(num_classes, ranks, self._device)
        self._rows = ShardedRows(self._shards, sampled=sampled)

    def _register(self, name: str, local: Tensor | None) -> None:
        self.register_parameter(name, None if local is None else nn.Parameter(self._shards.wrap(local)))

    def _draw(self, parameter: nn.Parameter) -> None:
        """Fill it with the initial rows that `seed` and `init_std` say; nothing on the meta device."""
        local = local_part(parameter.detach())
        if local.device.type != "meta":
            local.copy_(
                initial_rows(self._shards.lo, self._shards.hi, local.shape[1:], std=self._init_std, seed=self.seed)
            )

    def extra_repr(self) -> str:
        s = self._shards
        share = f"classes {s.lo}..{s.hi} of {s.num_classes}" if s.mesh is not None else f"{s.num_classes} classes"
        return f"embedding_size={self.embedding_size}, {share}"

    def _complete(self) -> None:
        """To be called when all parameters are registered: take them, and see that all ranks built the same."""
        own = {name: p for name, p in self._parameters.items() if p is not None}
        self._rows.hold(own, self._shared_parameters(), self._shards)
        if self._shards.ranks.group is not None and self._device.type != "meta":
            self._check_agreement()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights, or of their rows."""
        super().zero_grad(set_to_none=set_to_none)
        self._rows.clear()
        self._record.end()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
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
        device = next(iter(after.values())).device
        if self._shards.mesh is not None and device.type != self._shards.mesh.device_type:
            self._shards = ClassShards.split(self.num_classes, self._shards.ranks, device)
        for name, parameter in own.items():
            moved = nn.Parameter(self._shards.wrap(after[name]), requires_grad=parameter.requires_grad)
            parameter.grad = None
            torch.utils.swap_tensors(parameter, moved)
        self._rows.hold(own, self._shared_parameters(), self._shards)
        return self

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """As of any module; RuntimeError if DistributedDataParallel asks, which would wrap the rows."""
        refuse(DDP, self, prefix)
        return super().named_modules(memo, prefix, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; RuntimeError if FSDP2 asks, which would wrap the rows."""
        if not recurse:
            refuse(FSDP2, self, prefix)
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _shared_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of parts of this module: all ranks hold them alike."""
        return {name: p for name, p in self.named_parameters() if "." in name}

    # ------------------------------------------------------------------------------------------------ steps that are left out

    @property
    def skipped(self) -> bool:
        """Whether the step that is being made, or was made last, is to be left out: under on_nonfinite="skip"; the same on every rank.

        True from the forward on where embeddings are bad, and where a loss or gradient is, from `clip_grad_norm_`, `check_gradients`, or
        the step() of the `RowOptimizer` or of the center loss on, whichever comes first; over all micro-batches of a step, until a
        training forward begins the next one. A step ends when it was judged, or its gradients were used or cleared. An evaluation in
        between changes nothing.
        """
        return self._record.skipped

    @property
    def skips(self) -> int:
        """How many steps were left out in all; a part of checkpoints. Steps that a GradScaler leaves out for its scale do not count."""
        return self._record.skips

    @property
    def max_skips(self) -> int | None:
        """How many steps in a row may be left out before NonFiniteError is raised after all; None for any number."""
        return self._record.max_skips

    @property
    def _watches(self) -> bool:
        """Whether losses and gradients of this step are looked at."""
        seen = self._record.looked
        return self.on_nonfinite != "log" and (self.validate == "always" or (self.validate == "first" and not seen))

    def _follow(self, loss: Tensor, losses: Tensor, batch: GlobalBatch) -> Tensor:
        """The loss of a training forward, with what is to happen when its backward runs. losses: what it is the sum of."""
        if self.training and loss.requires_grad and self._watches:
            loss.register_hook(self._record.note(losses, batch))
        return loss

    def _begin(self) -> None:
        """A training forward begins."""
        rows, trained = self._rows, any(p.requires_grad for p in self._rows.everything)
        # without a RowOptimizer nobody says that gradients were cleared
        nothing = rows.rows is None and all(p.grad is None for p in rows.everything)
        if self._record.begin(over=trained and nothing and rows.live_optimizer is None):
            self._forget_notes()

    def _forget_notes(self) -> None:
        """A step was left out, and a new one begins: drop what its forwards have noted."""

    # ------------------------------------------------------------------------------------------------ classes that come and go

    def expand(
        self,
        new_classes: int,
        init: str | Tensor | classes.Batches = "fresh",
        *,
        optimizers: classes.Optimizers = (),
        margin: Margin | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Add classes C to C + new_classes − 1; all others keep ids, rows and optimizer state bit for bit. Every rank must call it.

        Args:
            new_classes: how many; at least 1.
            init: "fresh": drawn like the first ones, keyed by seed and class id. Vectors `[new_classes, D]` (`[new_classes, K, D]` with K
                centers a class), taken as they are, the same on every rank. Or batches, (embeddings `[n, D]`, labels `[n]`) of this rank
                with the *new* ids as labels: class means, streamed as by `init_from_embeddings`; where vectors are normalised the rows
                are as long as the rows there are on average, and a class without samples is drawn.
            optimizers: plain torch optimizers that hold the parameters; their state follows. A `RowOptimizer` is found by itself.
            margin: for a margin that holds a number for each class (`AdaptiveMargin`): one for all C + new_classes.
            class_weights: `[new_classes]`, of the new classes, if there are weights of the old ones.

        Biases and optimizer state of new rows begin as those of a row that never had a gradient. Parameters stay the same objects; the
        loss trains on at once. Rows travel in blocks, one tensor at a time: for a moment one of them exists twice, nothing more.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with nothing changed.
        """
        classes.expand(self, new_classes, init, optimizers, margin, class_weights)

    def remap(
        self,
        mapping: classes.Mapped,
        *,
        merge: classes.Merge = "mean",
        weights: Tensor | None = None,
        optimizers: classes.Optimizers = (),
        margin: Margin | None = None,
    ) -> None:
        """Drop, merge and renumber classes; labels follow by `mapping[labels]`. Every rank must call it.

        Args:
            mapping: new id of each old class, `[C]` whole numbers or a dict, the same on every rank; -1 drops the class. New ids are 0 to
                C' − 1 without gaps: `class_mapping` makes such a mapping. Classes with one new id are merged.
            merge: "mean" of the rows of merged classes, "first" the row of the lowest old id; optimizer state alike. K centers a class
                have no common order, so there "mean" is refused.
            weights: `[C]`, at least 0, what each class counts for in a mean (numbers of samples); equally without.
            optimizers, margin: as of `expand`; the margin for the C' classes.

        Rows that are not merged keep weight and state bit for bit; sums of merged ones are float32 or better, in the order of old ids, so
        the same at every world size. Scalar optimizer state, the margin's running statistics and the number of steps stay.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with nothing changed.
        """
        classes.remap(self, mapping, merge, weights, optimizers, margin)

    def init_from_embeddings(self, batches: classes.Batches) -> None:
        """Start from class means: `batches` yields (embeddings `[n, D]`, labels `[n]`) of this rank; classes without any stay as they are.

        Where vectors are normalised a row takes the *direction* of its mean and keeps the *length* it had: the length has no effect on
        the loss, but the step of a row goes with 1/length², so that rows as long as embeddings (20, say, where drawn ones have 0.01·√D)
        move far less. Else it is the mean itself. Of K centers a class the first is the mean, the others are a tenth of its length
        away from it, in directions keyed by seed and class id. Float32 weights in a `RowOptimizer` follow; other state stays.

        Every rank must call it; they may bring different numbers of batches. Sums are at least float32 and of this rank's classes only:
        a second copy of the shard while it runs. Raises as forward does for a bad batch, and then nothing has changed.
        """
        classes.init_from_embeddings(self, batches)

    @property
    def _normalizes(self) -> bool:
        """Whether only the direction of a row counts."""
        return False

    def _pending_work(self) -> str:
        """What must be finished before classes change, and how; "" if nothing."""
        optimizer = self._rows.live_optimizer
        if optimizer is not None and optimizer._applied:
            return "a backward has moved rows (update_in_backward) and step() was not called: call step() first"
        if self._rows.rows is not None or any(p.grad is not None for p in self._rows.everything):
            return "there are gradients: call step() and zero_grad() of the optimizer first"
        return ""

    def _change_tables(self, change: classes.Change) -> Callable[[], None]:
        """Judge what else is by class for the classes there will be; call the result when rows have moved."""
        for name in ("margin", "class_weights"):
            if getattr(change, name) is not None:
                raise ValueError(f"{type(self).__name__} has no {name}")
        return lambda: None

    # ------------------------------------------------------------------------------------------------ a batch

    def _take(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None) -> tuple[GlobalBatch, Tensor]:
        """The global batch, judged, and what autograd follows: this rank's embeddings, or the gathered ones of a `GlobalBatch`."""
        if self.training:
            self._begin()
        joint = isinstance(embeddings, GlobalBatch)
        batch = embeddings if isinstance(embeddings, GlobalBatch) else self._exchange(embeddings, labels)
        if not batch.ranks.same_as(self._shards.ranks):
            raise RuntimeError("the batch was gathered over another group than the head's")
        bad = self._judge(batch)
        if bad and self.training:
            self._record.bad_forward = True
            self._record.leave_out(bad)
        return batch, batch.embeddings if joint else joining(embeddings, batch.status)  # type: ignore[arg-type]

    def _exchange(self, embeddings: Tensor, labels: Tensor | None) -> GlobalBatch:
        if labels is None and self._shards.ranks.group is None:  # else the other ranks are to hear of it
            raise TypeError(
                f"{type(self).__name__}(embeddings, labels) needs labels; only a GlobalBatch brings its own"
            )
        inspect = self.validate == "always" or (self.validate == "first" and not self._seen_batch)
        self._seen_batch = True
        device = local_part(next(iter(self._rows.parameters.values()))).device
        return exchange(embeddings, labels, None, None, self._shards.ranks, inspect=inspect, device=device)  # type: ignore[arg-type]

    def _anchor(self) -> Tensor:
        """A scalar through which backward reaches the loss although the weights are detached and embeddings may be."""
        parameters = list(self._rows.parameters.values())
        return torch.zeros(
            (), device=local_part(parameters[0]).device, requires_grad=any(p.requires_grad for p in parameters)
        )

    def _zero_loss(self, x: Tensor, batch: GlobalBatch, rows_of_all: bool) -> Tensor:
        """The loss of a skipped step. rows_of_all: the parameters themselves have a gradient, else their rows do."""
        samples = batch.counts[batch.ranks.rank] if self.reduction == "none" else None
        parameters = [local_part(p) for p in self._rows.parameters.values()]
        if rows_of_all:
            loss: Tensor = _ZeroLoss.apply(x, samples, None, *parameters)
        else:
            x = x if x.requires_grad else x.detach().requires_grad_(self._anchor().requires_grad)
            sink = self._rows.accumulate if self._rows.sampled else None
            loss = _ZeroLoss.apply(x, samples, sink, *(p.detach() for p in parameters))
        if loss.requires_grad:
            loss.register_hook(self._record.note_bad())
        return loss

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
        """`[N]`: what each sample's loss counts for, divided by the sum over all ranks for a mean."""
        dtype = self._stats_dtype(batch)
        weights = self._worth(batch.labels, batch.label_weights, batch.sample_weights, dtype)
        if self.reduction != "mean":
            return weights
        everywhere = weights
        if batch.ranks.replica_group is not None:
            everywhere = self._worth(batch.mesh_labels, batch.mesh_label_weights, batch.mesh_sample_weights, dtype)
        total = everywhere.sum()
        return weights / torch.where(total > 0, total, 1.0)

    def _worth(
        self, labels: Tensor, label_weights: Tensor | None, sample_weights: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """`[n]`: 1 or a sample's weight, 0 where it is ignored."""
        worth = (as_matrix(labels) != self.ignore_index).any(1).to(dtype)
        return worth if sample_weights is None else worth * sample_weights.to(dtype)

    def _stats_dtype(self, batch: GlobalBatch) -> torch.dtype:
        dtypes = batch.embeddings.dtype, next(iter(self._rows.parameters.values())).dtype
        return torch.float64 if torch.float64 in dtypes else torch.float32

    # ------------------------------------------------------------------------------------------------ questions

    @torch._disable_dynamo
    def topk(
        self, embeddings: Tensor, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
    ) -> Neighbours:
        """The k classes nearest to each of this rank's embeddings `[N_local, D]`: ids `[N_local, k]`, cosines `[N_local, k]`, descending.

        The cosine to a class is that of its row, without bias, scale or margin, whatever the loss (of `Softmax` too); with several
        centers it is the largest of them. Exact, over all classes of all ranks: every rank must call it, with the same k; N_local may
        differ and be 0. Products are float32, or float64 if the rows or the embeddings are. A row shorter than 1e-12 has cosine 0 to
        everything. Of equal cosines the lower id is the first. Nothing here changes, and nothing has a gradient.

        Args:
            k: 1 to C.
            tile_bytes: what the cosines that exist at a time may take on a rank; no other temporary is larger (`classes.queries`).
            progress: show a tqdm bar on the first rank.

        Raises ValueError, the same on every rank, for embeddings of another width, kind or device than the head's, NonFiniteError where
        an embedding or a row has no finite length. On a 2-D mesh every replica answers its own ranks.
        """
        return topk(self, embeddings, k, tile_bytes=tile_bytes, progress=progress)

    @torch._disable_dynamo
    def nearest_classes(self, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False) -> Neighbours:
        """The k nearest other classes of each class of this rank's shard: ids `[C_local, k]`, cosines `[C_local, k]`, descending.

        Row i is of the i-th class of the shard, in the order of ids; k is 1 to C - 1. Every rank must call it. With several centers, the
        cosine of two classes is the largest over the centers of both. Rows travel a tile at a time, C · D numbers to every rank in all;
        the work is C_local · C · D products. All else as for `topk`.
        """
        return nearest_classes(self, k, tile_bytes=tile_bytes, progress=progress)

    # ------------------------------------------------------------------------------------------------ what can be wrong

    def _check_group(self) -> None:
        if self._shards.ranks.group is None and dist.is_initialized():
            raise RuntimeError(
                "this head was built before the process group: every rank would train a copy of its own. "
                "Build it after torch.distributed.init_process_group (or Accelerator(), deepspeed.init_distributed())"
            )

    def _check_wiring(self) -> None:
        """Raise if this was built before its process group, if its parameters were replaced, or if no optimizer takes its row gradients."""
        self._check_group()
        for key, parameter in self._rows.parameters.items():
            now = self._parameters.get(key)  # torch.func.functional_call puts plain tensors there, for one call
            if now is not parameter and isinstance(now, nn.Parameter):
                raise RuntimeError(
                    f"another tensor was put in the place of this {type(self).__name__}'s {key}, which its optimizer does not know: "
                    "keep it out of fully_shard, and copy values into it (torch.no_grad(), or load_state_dict without assign=True)"
                )
        if (
            not (self.training and torch.is_grad_enabled() and self._rows.sampled)
            or self._rows.live_optimizer is not None
        ):
            return
        if self._rows.rows is not None or self._rows.lost > 1:
            name = type(self).__name__
            raise RuntimeError(
                f"no RowOptimizer takes the row gradients of this {name}, so it would never train: "
                "build RowOptimizer(torch.optim.SGD, it, ...) instead of passing its parameters() to an optimizer"
            )

    def _judge(self, batch: GlobalBatch, valid: range | None = None) -> str:
        """Raise, on every rank alike, what the status of the batch says about this head's inputs. valid: labels; of all classes if None.

        Returns why the batch is to be left out, or "".
        """
        valid = range(self.num_classes) if valid is None else valid
        width = batch.status[0].width
        if width != self.embedding_size:
            raise ValueError(f"embeddings have width {width}, the head has embedding_size {self.embedding_size}")
        for flat, row in enumerate(batch.status):
            for label, at in row.extremes():
                if label != self.ignore_index and label not in valid:
                    where = at if row.labels_each == 0 else f"{at // row.labels_each}, {at % row.labels_each}"
                    hint = "; labels are counted from 0" if label == valid.stop and not valid.start else ""
                    raise ValueError(
                        f"{batch.origin(flat)}: labels[{where}] is {label}; valid are {valid.start} to {valid.stop - 1} "
                        f"and ignore_index {self.ignore_index}{hint}"
                    )
        for flat, row in enumerate(batch.status):
            if row.nonfinite_at >= 0:
                of_class = "" if row.nonfinite_label == NO_LABEL else f" (label {row.nonfinite_label})"
                message = f"{batch.origin(flat)}: embeddings[{row.nonfinite_at}]{of_class} holds a NaN or infinity"
                if self.on_nonfinite == "raise":
                    raise NonFiniteError(message)
                skip = self.on_nonfinite == "skip"
                log.warning("%s%s", message, "; the step is skipped" if skip else "")
                return message if skip else ""
        return ""

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all ranks, by the name that a message gives it."""
        names = (
            "label_smoothing",
            "reduction",
            "ignore_index",
            "on_nonfinite",
            "validate",
            "max_skips",
            "scale_embedding_grad",
        )
        settings = [getattr(self, name, None) for name in names], [p.dtype for p in self._rows.parameters.values()]
        return {
            "num_classes": self.num_classes,
            "embedding_size": self.embedding_size,
            "seed": self.seed,
            "a digest of the settings": settings,
        }

    def _check_agreement(self) -> None:
        """Raise on every rank if ranks built different heads."""
        mine = {k: v if isinstance(v, int) else zlib.crc32(repr(v).encode()) for k, v in self._settings().items()}
        numbers = torch.tensor(list(mine.values()), device=self._device)
        table = all_gather_mesh(numbers, self._shards.ranks, f"the building of a {type(self).__name__}").tolist()
        for flat, values in enumerate(table):
            for name, expected, value in zip(mine, table[0], values, strict=True):
                if expected != value:
                    here, there = self._shards.ranks.name(0), self._shards.ranks.name(flat)
                    raise ValueError(
                        f"ranks disagree: {name} is {expected} on {here} and {value} on {there}; all ranks must build the same head"
                    )


class _ZeroLoss(torch.autograd.Function):
    """A skipped step: a loss of zero whose gradients are zero, so that backward and a GradScaler run on every rank as they would have.

    Under sampling `sink` gets gradients of no rows. A NaN in the backbone's activations still makes NaN of its gradients.
    """

    @staticmethod
    def forward(ctx, embeddings, samples, sink, *parameters):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(embeddings, *parameters)
        ctx.sink = sink
        return embeddings.new_zeros(
            () if samples is None else (samples,), dtype=torch.promote_types(embeddings.dtype, torch.float32)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        embeddings, *parameters = ctx.saved_tensors
        nothing = torch.zeros_like(embeddings)
        if ctx.sink is None:
            zeros = (
                torch.zeros_like(p) if needed else None
                for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True)
            )
            return nothing, None, None, *zeros
        no_rows = torch.empty(0, dtype=torch.int64, device=embeddings.device)
        ctx.sink(no_rows, [torch.empty_like(p[:0]) for p in parameters])
        return nothing, None, None, *[None] * len(parameters)


def check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {choice!r}")


def _default_device(ranks: Ranks) -> torch.device:
    """torch's default device, or the current GPU where the group cannot exchange tensors of the CPU (NCCL)."""
    default = torch.get_default_device()
    if ranks.group is not None and default.type == "cpu" and dist.get_backend(ranks.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return default
