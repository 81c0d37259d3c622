"""`ChangeableLoss`: a sharded loss that answers queries about its class rows, and whose classes may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.classes import change as changes
from partial_fc.classes import class_means
from partial_fc.classes.class_means import Batches
from partial_fc.classes.interface import Change
from partial_fc.classes.mapping import Mapped
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, Neighbours, nearest_classes, topk
from partial_fc.distributed.given import as_whole
from partial_fc.distributed.operation import operation
from partial_fc.distributed.ranks import local_part
from partial_fc.distributed.shards import ClassShards
from partial_fc.margins.base import Margin
from partial_fc.nonfinite.zero_loss import zero_loss
from partial_fc.optim.stored_rows import agree_to_load, marked, row_problem, taken
from partial_fc.sharded import ShardedLoss


class ChangeableLoss(ShardedLoss):
    """Base of `PartialFC` and `CenterLoss`. Of a training step only the loss of a skipped one."""

    def _zero_loss(self, x: Tensor, batch: GlobalBatch, gradient_of_all_rows: bool) -> Tensor:
        """Return the loss of a skipped step. gradient_of_all_rows: give zeros to the parameters; else no rows."""
        samples = batch.counts[batch.ranks.rank] if self.reduction == "none" else None
        return zero_loss(x, samples, self.class_rows, gradient_of_all_rows)

    # ------------------------------------------------------------------------------------------------ queries

    @operation("topk")
    @torch._disable_dynamo
    def topk(
        self, embeddings: Tensor, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
    ) -> Neighbours:
        """Return the k classes nearest to each of this rank's embeddings: ids and cosines `[N_local, k]`, descending.

        The cosine to a class is that of its row, without bias, scale or margin, for every loss (also for `Softmax`);
        with several centers it is the largest of them. The search is exact, over all classes of all ranks. Every rank
        must call it with the same k; N_local may differ and be 0. Products are float32, or float64 if rows or
        embeddings are. A row shorter than 1e-12 has cosine 0 to everything. Of equal cosines the lower id comes first.
        Nothing is changed, and the result has no gradient.

        Args:
            embeddings: `[N_local, D]`, of this rank.
            k: 1 to C.
            tile_bytes: bytes of cosines in memory at a time on a rank; no other temporary is larger.
            progress: show a tqdm bar on the first rank.

        Raises ValueError, the same on every rank, for embeddings of another width, dtype or device than the head's;
        NonFiniteError if the length of an embedding or a row is not finite. On a 2-D mesh each replica returns the
        results of its own ranks.
        """
        return topk(self.class_rows, embeddings, k, tile_bytes=tile_bytes, progress=progress)

    @operation("nearest_classes")
    @torch._disable_dynamo
    def nearest_classes(self, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False) -> Neighbours:
        """Return the k nearest other classes of each class of this rank's shard: ids and cosines `[C_local, k]`.

        Row i belongs to the i-th class of the shard, in the order of ids; k is 1 to C - 1. Every rank must call it.
        With several centers, the cosine of two classes is the largest over the centers of both. Rows are sent one tile
        at a time, C · D numbers to every rank in all; the work is C_local · C · D products. For the rest see `topk`.
        """
        return nearest_classes(self.class_rows, k, tile_bytes=tile_bytes, progress=progress)

    # ------------------------------------------------------------------------------------------------ saved state

    # whole numbers of the extra state that every state has
    counts: ClassVar[tuple[str, ...]] = ("class_changes",)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict is of another kind of loss; its tensors are not read."""
        if "_extra_state" not in state:
            return
        extra = state["_extra_state"]
        if not isinstance(extra, dict):
            raise ValueError(f"its extra state is {type(extra).__name__}, not a table")
        for name in dict.fromkeys((*self.counts, "class_changes", "skips")):
            number = extra.get(name, None if name in self.counts else 0)
            count = as_whole(number)
            if count is None or count < 0:
                raise ValueError(f"its extra state has {number!r} for {name}, which is a count")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the rows of this rank; a collective in a group, where all ranks load or all raise ValueError."""
        self.class_rows.catch_up()
        self.class_rows.writes += 1
        rows, assign = self.class_rows, bool(local_metadata.get("assign_to_params_buffers"))
        extra = state_dict.get(f"{prefix}_extra_state")
        given = {name: state_dict[prefix + name] for name in rows.parameters if prefix + name in state_dict}
        what, problem = f"this state of a {type(self).__name__}", self._problem_of_state(given, extra, assign)
        absent, more = set[str](), set[str]()
        if rows.shards.ranks.group is not None:
            expected = {prefix + name for name in self.state_dict()}
            absent, more = (
                expected - state_dict.keys(),
                {key for key in state_dict if key.startswith(prefix)} - expected,
            )
        # what one rank lacks or has too much, all do; torch raises on all, or on none, by its `strict`
        absent, more = agree_to_load(rows, what, problem, absent, more)
        loaded = {**state_dict, **{prefix + name: taken(rows, value) for name, value in given.items()}}
        missing_keys += sorted(key for key in absent & loaded.keys() if "." in key[len(prefix) :])
        unexpected_keys += sorted(more - loaded.keys())
        # what was read into the rows themselves is there: a copy onto itself would touch all of them
        there = {prefix + n for n, v in given.items() if not assign and _is_its_memory(v, rows.parameters[n])}
        there -= absent
        loaded = {key: value for key, value in loaded.items() if key not in absent | there}
        super()._load_from_state_dict(loaded, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys[:] = [key for key in missing_keys if key not in there]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.class_rows.check_group()
        self.class_rows.catch_up()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.class_rows.parameters:
            marked(self.class_rows, destination[prefix + name])

    def _problem_of_state(self, given: dict[str, Any], extra: Any, assign: bool) -> str:
        """Return why the stored parameters `given` cannot be loaded; "" if they can."""
        rows = self.class_rows
        if assign:
            return "assign=True would put other tensors in the place of its parameters; load without it"
        try:
            self.check_state({} if extra is None else {"_extra_state": extra})
        except ValueError as error:
            return str(error)
        if rows.shards.ranks.group is None and not any(isinstance(value, DTensor) for value in given.values()):
            return ""  # torch compares the shapes
        found = (row_problem(rows, name, v, rows.parameters[name].shape, extra) for name, v in given.items())
        return next(filter(None, found), "")

    # ------------------------------------------------------------------------------------------------ changes

    @operation("expand")
    def expand(
        self,
        new_classes: int,
        init: str | Tensor | Batches = "fresh",
        *,
        optimizers: changes.Optimizers = (),
        margin: Margin | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Add classes C to C + new_classes − 1. All others keep ids, rows and optimizer state bit for bit.

        Every rank must call it.

        Args:
            new_classes: number of new classes, at least 1.
            init: "fresh": drawn like the initial rows, keyed by seed and class id. Or vectors `[new_classes, D]`
                (`[new_classes, K, D]` with K centers per class), used as they are, the same on every rank. Or batches
                of (embeddings `[n, D]`, labels `[n]`) of this rank with the *new* ids as labels: class means, streamed
                as by `init_from_embeddings`; if rows are normalized, the new ones get the mean length of the existing
                rows; a class without samples is drawn.
            optimizers: plain torch optimizers of the parameters, whose state is changed, too. A `RowOptimizer` is found
                automatically.
            margin: if the margin has one number per class (`AdaptiveMargin`), a new one for all C + new_classes.
            class_weights: `[new_classes]`, of the new classes, if the head has class weights.

        Biases and optimizer state of new rows are those of a row that never had a gradient. Parameters stay the same
        objects, and training can continue at once. Rows are moved in blocks, one tensor at a time: at most one tensor
        exists twice.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with
        nothing changed.
        """
        changes.expand(self, new_classes, init, optimizers, margin, class_weights)

    @operation("remap")
    def remap(
        self,
        mapping: Mapped,
        *,
        merge: changes.Merge = "mean",
        weights: Tensor | None = None,
        optimizers: changes.Optimizers = (),
        margin: Margin | None = None,
    ) -> None:
        """Drop, merge and renumber classes; convert labels with `mapping[labels]`. Every rank must call it.

        Args:
            mapping: new id of each old class, `[C]` ints or a dict, the same on every rank; -1 drops the class. New ids
                are 0 to C' − 1 without gaps; `class_mapping` builds such a mapping. Classes with the same new id are
                merged.
            merge: "mean" of the rows of merged classes, or "first", the row of the lowest old id; optimizer state in
                the same way. "mean" is not possible with K centers per class, which have no common order.
            weights: `[C]`, at least 0, the weight of each class in a mean (such as its number of samples); default:
                equal weights.
            optimizers: as for `expand`.
            margin: as for `expand`, for the C' classes.

        Rows that are not merged keep weight and state bit for bit. Merged rows are summed in float32 or better, in the
        order of old ids, so the result is the same at every world size. Scalar optimizer state, running statistics of
        the margin and the forward count do not change.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with
        nothing changed.
        """
        changes.remap(self, mapping, merge, weights, optimizers, margin)

    @operation("init_from_embeddings")
    def init_from_embeddings(self, batches: Batches) -> None:
        """Set rows to class means. `batches` yields (embeddings `[n, D]`, labels `[n]`) of this rank.

        Classes without samples stay as they are. If rows are normalized, a row takes the *direction* of its mean and
        keeps its own *length*: the length has no effect on the loss, but an optimizer step turns a row by an angle
        proportional to 1/length², so rows as long as embeddings (20, say, while initial rows have 0.01·√D) would learn
        far more slowly. Otherwise the row becomes the mean itself. Of K centers per class the first is the mean, and
        the others are at a tenth of its length from it, in directions keyed by seed and class id. Float32 weights in a
        `RowOptimizer` follow; other state does not change.

        Every rank must call it; ranks may have different numbers of batches. Sums are at least float32, and of this
        rank's classes only: a second copy of the shard during the call. Raises as forward does for a bad batch, and
        nothing has changed then.
        """
        changes.check_reachable(self)
        class_means.init_from_embeddings(self, batches)

    @property
    def normalizes(self) -> bool:
        """Whether only the direction of a row counts."""
        return False

    def pending_work(self) -> str:
        """Return what must be finished before classes change, and how; "" if nothing is pending."""
        rows = self.class_rows
        if rows.live_optimizer is not None and rows.live_optimizer.moved_in_backward:
            return "a backward has updated rows (update_in_backward) but step() was not called: call step() first"
        if rows.grad_rows is not None or any(p.grad is not None for p in rows.everything):
            return "there are gradients: call step() and zero_grad() of the optimizer first"
        return ""

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        """Check class weights and margin for the new classes; call the result after the rows have moved."""
        for name in ("margin", "class_weights"):
            if getattr(change, name) is not None:
                raise ValueError(f"{type(self).__name__} has no {name}")
        return lambda: None

    def adopt(self, parameters: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Hold the parameters of the new classes."""
        self.class_rows.hold(parameters, self._shared_parameters(), shards)
        self.num_classes = shards.num_classes
        self.class_changes += 1
        self.class_rows.changes += 1


def _is_its_memory(value: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a loaded value is the parameter itself, or shares its memory."""
    ours, given = local_part(parameter.detach()), local_part(value.detach())
    return (given.data_ptr(), given.shape, given.dtype) == (ours.data_ptr(), ours.shape, ours.dtype)
