"""What one forward takes besides the tensors that autograd follows. Nothing writes into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.targets import Targets
from partial_fc.distributed.ranks import Ranks
from partial_fc.kernels.choice import Kernels
from partial_fc.margins.base import Margin
from partial_fc.rows import UpdateRows
from partial_fc.softmax.corrections import Correction
from partial_fc.softmax.draws import Slots
from partial_fc.softmax.tiles import Workspace


@dataclass(frozen=True)
class LossOptions:
    """What the loss is: arguments of `PartialFC`, and what the margin says in this forward."""

    margin: Margin
    num_classes: int
    label_smoothing: float
    interclass_filter: float | None
    reduction: str
    scale_embedding_grad: bool
    metrics: bool
    class_weights: Tensor | None = None  # [C], for label smoothing
    inter_topk: int = 0
    inter_topk_penalty: float = 0.0
    scale: float = 1.0  # the margin's in this forward, known once its target logits are; `binary` alike
    binary: tuple[float, float] | None = None

    @property
    def ruled(self) -> bool:
        """Whether logits of other classes are more than scaled cosines."""
        by_margin = self.margin.has_rule or self.margin.centers > 1
        return by_margin or self.interclass_filter is not None or self.inter_topk > 0


@dataclass(frozen=True)
class Selection:
    """One forward: the global batch, its targets, and the class rows of this rank that take part."""

    batch: GlobalBatch
    rows: Tensor | None  # [S] local rows (classes), sorted but for slots; None for the whole shard
    slots: Slots | None  # behind the window of a sampled forward, elsewhere than on a CPU
    copied: bool  # weight and bias that the loss gets are copies of these rows, not the shard
    lo: int  # first class id of the shard
    hi: int  # behind its last
    targets: Targets
    keep_logits: bool  # their exponentials are kept for backward; else they are computed again
    scatter: bool  # backward returns the gradient of this rank's embeddings, not of the gathered ones
    draw_key: int  # for what a margin draws: differs from forward to forward, the same on every rank
    correction: Correction | None = None  # of a sampled forward
    kernels: Kernels | None = None  # that serve it
    directions: tuple[Tensor, Tensor] | None = None  # of copied rows [S, D], and their 1/length [S, 1], if known

    @property
    def counts_once(self) -> bool:
        """Whether a sample has one label without a weight. Without a target the sample itself counts 0."""
        return self.targets.ids.shape[1] == 1 and self.batch.label_weights is None

    @property
    def ranks(self) -> Ranks:
        return self.batch.ranks

    @property
    def alters_logits(self) -> bool:
        """Whether something besides biases is added to products before their exponentials, or kernels make them."""
        return self.slots is not None or self.correction is not None or self.by_kernels

    @property
    def by_kernels(self) -> bool:
        """Whether kernels may serve its logits."""
        return self.kernels is not None and self.kernels.of_logits


@dataclass(frozen=True)
class RowGradientSink:
    """Where gradients of class rows go: into memory of `workspace`, then to one of the other two or to autograd."""

    workspace: Workspace
    accumulate: Callable[..., None]  # under sampling: local rows, gradients
    begin_update: Callable[[], UpdateRows] | None  # rows are updated inside backward, tile by tile
