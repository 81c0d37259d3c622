"""`ChangeableLoss`: a sharded loss that answers queries about its class rows, and whose classes may change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from partial_fc.classes import change as changes
from partial_fc.classes import class_means
from partial_fc.classes.class_means import Batches
from partial_fc.classes.interface import Change
from partial_fc.classes.moves import Mapped
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, Neighbours, nearest_classes, topk
from partial_fc.margins.base import Margin
from partial_fc.sharded import ShardedLoss
from partial_fc.shards import ClassShards


class ChangeableLoss(ShardedLoss):
    """Base of `PartialFC` and `CenterLoss`. Nothing here takes part in a training step."""

    # ------------------------------------------------------------------------------------------------ queries

    @torch._disable_dynamo
    def topk(
        self, embeddings: Tensor, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
    ) -> Neighbours:
        """Return the k classes nearest to each of this rank's embeddings `[N_local, D]`: ids and cosines `[N_local, k]`.

        Cosines are descending. The cosine to a class is that of its row, without bias, scale or margin, whatever the loss
        (of `Softmax` too); with several centers it is the largest of them. Exact, over all classes of all ranks. Every
        rank must call it, with the same k; N_local may differ and be 0. Products are float32, or float64 if the rows or
        the embeddings are. A row shorter than 1e-12 has cosine 0 to everything. Of equal cosines the lower id comes
        first. Nothing here changes, and nothing has a gradient.

        Args:
            k: 1 to C.
            tile_bytes: bytes of cosines that exist at a time on a rank; no other temporary is larger.
            progress: show a tqdm bar on the first rank.

        Raises ValueError, the same on every rank, for embeddings of another width, dtype or device than the head's;
        NonFiniteError where an embedding or a row has no finite length. On a 2-D mesh every replica serves its own ranks.
        """
        return topk(self.class_rows, embeddings, k, tile_bytes=tile_bytes, progress=progress)

    @torch._disable_dynamo
    def nearest_classes(self, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False) -> Neighbours:
        """Return the k nearest other classes of each class of this rank's shard: ids and cosines `[C_local, k]`, descending.

        Row i belongs to the i-th class of the shard, in the order of ids; k is 1 to C - 1. Every rank must call it. With
        several centers, the cosine of two classes is the largest over the centers of both. Rows travel a tile at a time,
        C · D numbers to every rank in all; the work is C_local · C · D products. All else as for `topk`.
        """
        return nearest_classes(self.class_rows, k, tile_bytes=tile_bytes, progress=progress)

    # ------------------------------------------------------------------------------------------------ changes

    def expand(
        self,
        new_classes: int,
        init: str | Tensor | Batches = "fresh",
        *,
        optimizers: changes.Optimizers = (),
        margin: Margin | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Add classes C to C + new_classes − 1; all others keep ids, rows and optimizer state bit for bit.

        Every rank must call it.

        Args:
            new_classes: how many; at least 1.
            init: "fresh": drawn like the first ones, keyed by seed and class id. Vectors `[new_classes, D]`
                (`[new_classes, K, D]` with K centers a class), taken as they are, the same on every rank. Or batches of
                (embeddings `[n, D]`, labels `[n]`) of this rank with the *new* ids as labels: class means, streamed as by
                `init_from_embeddings`; where vectors are normalised the rows get the mean length of the existing rows, and
                a class without samples is drawn.
            optimizers: plain torch optimizers that hold the parameters; their state follows. A `RowOptimizer` is found by
                itself.
            margin: for a margin that holds a number for each class (`AdaptiveMargin`): one for all C + new_classes.
            class_weights: `[new_classes]`, of the new classes, if the old ones have some.

        Biases and optimizer state of new rows begin as those of a row that never had a gradient. Parameters stay the same
        objects; training can continue at once. Rows travel in blocks, one tensor at a time: for a moment one of them
        exists twice, nothing more.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with nothing
        changed.
        """
        changes.expand(self, new_classes, init, optimizers, margin, class_weights)

    def remap(
        self,
        mapping: Mapped,
        *,
        merge: changes.Merge = "mean",
        weights: Tensor | None = None,
        optimizers: changes.Optimizers = (),
        margin: Margin | None = None,
    ) -> None:
        """Drop, merge and renumber classes; labels follow by `mapping[labels]`. Every rank must call it.

        Args:
            mapping: new id of each old class, `[C]` whole numbers or a dict, the same on every rank; -1 drops the class.
                New ids are 0 to C' − 1 without gaps: `class_mapping` makes such a mapping. Classes with one new id are
                merged.
            merge: "mean" of the rows of merged classes, "first" the row of the lowest old id; optimizer state alike. K
                centers a class have no common order, so there "mean" is refused.
            weights: `[C]`, at least 0, the weight of each class in a mean (numbers of samples); equal weights without.
            optimizers, margin: as of `expand`; the margin for the C' classes.

        Rows that are not merged keep weight and state bit for bit; sums of merged ones are float32 or better, in the order
        of old ids, so the same at every world size. Scalar optimizer state, the margin's running statistics and the
        forward count stay.

        Raises ValueError for bad arguments, RuntimeError while gradients are pending; the same on every rank, with nothing
        changed.
        """
        changes.remap(self, mapping, merge, weights, optimizers, margin)

    def init_from_embeddings(self, batches: Batches) -> None:
        """Start from class means. `batches` yields (embeddings `[n, D]`, labels `[n]`) of this rank.

        Classes without samples stay as they are. Where vectors are normalised a row takes the *direction* of its mean and
        keeps the *length* it had: the length has no effect on the loss, but the update of a row goes with 1/length², so
        that rows as long as embeddings (20, say, where drawn ones have 0.01·√D) move far less. Else it is the mean itself.
        Of K centers a class the first is the mean, the others are a tenth of its length away from it, in directions keyed
        by seed and class id. Float32 weights in a `RowOptimizer` follow; other state stays.

        Every rank must call it; they may bring different numbers of batches. Sums are at least float32 and of this rank's
        classes only: a second copy of the shard while it runs. Raises as forward does for a bad batch, and then nothing
        has changed.
        """
        changes.check_reachable(self)
        class_means.init_from_embeddings(self, batches)

    @property
    def normalizes(self) -> bool:
        """Whether only the direction of a row counts."""
        return False

    def pending_work(self) -> str:
        """Return what must be finished before classes change, and how; "" if nothing."""
        rows = self.class_rows
        if rows.live_optimizer is not None and rows.live_optimizer.moved_in_backward:
            return "a backward has moved rows (update_in_backward) and step() was not called: call step() first"
        if rows.grad_rows is not None or any(p.grad is not None for p in rows.everything):
            return "there are gradients: call step() and zero_grad() of the optimizer first"
        return ""

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        """Check what else is per class for the new classes; call the result when the rows have moved."""
        for name in ("margin", "class_weights"):
            if getattr(change, name) is not None:
                raise ValueError(f"{type(self).__name__} has no {name}")
        return lambda: None

    def adopt(self, parameters: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Take the parameters of the new classes."""
        self.num_classes = shards.num_classes
        self.class_rows.hold(parameters, self._shared_parameters(), shards)
        self.class_changes += 1
