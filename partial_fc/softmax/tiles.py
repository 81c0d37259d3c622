"""The pieces of one step: what it is made of, its class rows given out tile by tile, its targets, and products on a tile.

Step       the batch, the margin and the selected rows
Rows       directions w [T, D] of rows a to b, measured once
Targets    which selected row is the class of which sample, P = N · L of them
logits     s · x wᵀ [N, T] of a tile, the targets left out, or what a margin and a filter make of the cosines

A class may have K centers (rows of its own) one after another; a tile never cuts a class in two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.batch import GlobalBatch
from partial_fc.distributed.ranks import Ranks
from partial_fc.margins.base import Margin
from partial_fc.softmax.workspace import Workspace

TINY = 1e-12  # a vector shorter than this has no direction: its cosines are 0 and it gets no gradient
TILE_BYTES = {"cpu": 4 << 20}  # a tile of logits stays in a core's cache; elsewhere large products matter more
TILE_BYTES_ELSEWHERE = 256 << 20


@dataclass
class Step:
    """Everything about one step besides the tensors that autograd follows."""

    batch: GlobalBatch
    margin: Margin
    rows: Tensor | None  # sorted local classes that take part [S]; None for the whole shard
    lo: int  # first global class id of the shard
    num_classes: int
    targets: Tensor  # [N, L] global class ids, -1 where there is no target
    target_weights: Tensor  # [N, L], 0 where there is no target
    sample_weights: Tensor  # [N]: what each sample's loss counts for in the reduced loss
    label_smoothing: float
    interclass_filter: float | None
    reduction: str
    scale_embedding_grad: bool
    scatter: bool  # backward itself returns the gradient of this rank's embeddings
    kept: bool
    needs_grad: bool  # False under no_grad and in inference mode
    on_row_grad: Callable[[Tensor, list[Tensor]], None]
    workspace: Workspace
    start_update: (
        Callable[[], Callable[[int, int, list[Tensor]], None]] | None
    )  # rows are updated inside backward, tile by tile
    first_sample: int  # place of this replica's first sample among all of the mesh
    draw: int  # key of what a margin draws in this step: seed and number of training forwards
    metrics: bool = False
    bounded: bool = False  # out: exponentials are of the logits themselves, no maximum taken off
    measured: Measured | None = None  # out
    losses: Tensor | None = None  # out: [N], what the reduced loss of this replica is the sum of
    selected: Tensor | None = (
        None  # out, with label smoothing: how many classes take part on all ranks together, or [N] for each sample
    )
    rule: Margin | None = None  # out: the margin as it was in forward, where it has a rule for other classes
    aim: Tensor | None = None  # out: what that rule compares them with [N, 1]: target logits before scaling

    @property
    def ranks(self) -> Ranks:
        return self.batch.ranks

    @property
    def ruled(self) -> bool:
        """Whether logits of other classes are more than scaled cosines."""
        return self.margin.has_rule or self.margin.centers > 1 or self.interclass_filter is not None


@dataclass
class Measured:
    """What a forward found of all samples of the global batch, on every rank alike."""

    cosines: Tensor  # [N, L] of the targets, without the margin; plain logits where nothing is normalised
    targets: Tensor  # [N, L] target logits, with margin and scale
    exists: Tensor  # [N, L]
    norms: Tensor  # [N] lengths of the embeddings
    hardest: Tensor | None  # [N] largest cosine (or plain logit) of another selected class; with metrics only

    def angles(self) -> Tensor:
        """Angles in radians of all targets there are."""
        return torch.acos(self.cosines[self.exists].clamp(-1, 1))

    def summary(self, margin: Margin) -> dict[str, Tensor]:
        """The figures that `PartialFC.metrics` tells of."""
        assert self.hardest is not None
        some = self.exists.any(1)
        best = torch.where(self.exists, self.cosines, -torch.inf).amax(1)[some]
        target = torch.where(self.exists, self.targets, -torch.inf).amax(1)[some]
        hardest, norms = self.hardest[some], self.norms[some]
        found = {
            "accuracy": (best > hardest).to(norms.dtype).mean(),
            "margin_met": (target > (0.0 if margin.binary else hardest * margin.scale)).to(norms.dtype).mean(),
            "embedding_norm": norms.mean(),
        }
        if not margin.normalize:
            return found
        angles = self.angles()
        marks = torch.tensor([0.1, 0.5, 0.9], dtype=angles.dtype, device=angles.device)
        spread = torch.quantile(angles, marks) if len(angles) else torch.full_like(marks, torch.nan)
        percentiles = dict(zip(("target_angle_p10", "target_angle_p50", "target_angle_p90"), spread, strict=True))
        return found | {
            "target_angle": angles.mean(),
            **percentiles,
            "hardest_angle": torch.acos(hardest.clamp(-1, 1)).mean(),
        }


def tile_rows(samples: int, width: int, device_type: str) -> int:
    """T: so many class rows that neither `[N, T]` nor `[T, D]` in float32 is larger than a tile may be."""
    budget = TILE_BYTES.get(device_type, TILE_BYTES_ELSEWHERE)
    return max(64, budget // (4 * max(samples, width, 1)) // 64 * 64)


def inverse_length(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """1/length `[n, 1]` of vectors `[n, D]`, in `dtype`; 0 for a vector without a direction."""
    norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype)
    return torch.where(norm > TINY, norm.reciprocal(), 0.0)


def unit(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(vectors `[n, D]` at unit length, 1/length `[n, 1]`), in `dtype`; both 0 for a vector without a direction."""
    inverse = inverse_length(vectors, dtype)
    return vectors.to(dtype) * inverse, inverse


def tangent(grad: Tensor, direction: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """Gradient by v/‖v‖ -> gradient by v, `(g − (g·u) u) / ‖v‖`, for rows `[n, D]`; `out` may be the memory of either input."""
    along = torch.linalg.vecdot(grad, direction).unsqueeze(1)
    return torch.addcmul(grad, direction, along, value=-1, out=out).mul_(inverse)


class Rows:
    """The selected class rows of this rank, given out tile by tile, in the dtype of the statistics.

    Rows that are picked out of the shard are gathered once a step and held in the memory that their gradient will take in backward.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, step: Step, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.step, self.dtype = weight.reshape(-1, weight.shape[-1]), bias, step, dtype
        self.index = None if step.rows is None else centers_of(step.rows, step.margin.centers)
        self.count = len(self.weight) if self.index is None else len(self.index)
        self.inverse = weight.new_empty(self.count, 1, dtype=dtype) if step.margin.normalize else None
        self.measured = False  # all tiles were given out once
        self.held: Tensor | None = None
        if self.index is not None and step.needs_grad and weight.dtype == dtype:
            self.held = self.gradient_memory(self.count)

    def gradient_memory(self, length: int) -> Tensor:
        """`[length, D]` for the gradient of the rows: that of the held directions if there are any."""
        if self.held is not None:
            return self.held
        name = "rows" if self.index is None else "selected rows"
        return self.step.workspace.take(name, (length, self.weight.shape[1]), self.weight.dtype, self.weight.device)

    def tile(self, a: int, b: int) -> Tensor:
        """Directions `[b − a, D]` of rows a to b; lengths are measured on the first pass and remembered."""
        held = None if self.held is None else self.held[a:b]
        if held is not None and self.measured:
            return held
        part = self._vectors(a, b, held)
        if self.inverse is None:
            return part.to(self.dtype)
        if not self.measured:
            self.inverse[a:b] = inverse_length(part, self.dtype)
        return torch.mul(part.to(self.dtype), self.inverse[a:b], out=held)

    def _vectors(self, a: int, b: int, out: Tensor | None) -> Tensor:
        return self.weight[a:b] if self.index is None else torch.index_select(self.weight, 0, self.index[a:b], out=out)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(directions `[P, D]`, 1/length `[P, 1]`; 1 where nothing is normalised) of single rows."""
        part = self.weight.index_select(0, self._local(positions))
        if self.inverse is not None:
            return unit(part, self.dtype)
        return part.to(self.dtype), part.new_ones(len(part), 1, dtype=self.dtype)

    def bias_at(self, positions: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias.index_select(0, self._local(positions)).to(self.dtype)

    def _local(self, positions: Tensor) -> Tensor:
        return positions if self.index is None else self.index[positions]

    def tile_bias(self, a: int, b: int) -> Tensor | None:
        if self.bias is None:
            return None
        return (self.bias[a:b] if self.index is None else self.bias.index_select(0, self.index[a:b])).to(self.dtype)

    def tiles(self, size: int) -> Iterator[tuple[int, int]]:
        for a in range(0, self.count, size):
            yield a, min(a + size, self.count)


@dataclass
class Targets:
    """The targets of all samples, as the rank sees them: `P = N · L` of them, in the order of the samples."""

    sample: Tensor  # [P] which sample
    first: (
        Tensor  # [P] position of the class's first center among the selected rows; 0 where another rank owns the class
    )
    row: Tensor  # [P] position of the center that is nearest to the sample
    own: Tensor  # [P] whether this rank owns it
    exists: Tensor  # [N, L]

    @classmethod
    def locate(cls, step: Step, local_classes: int, selected: int) -> Targets:
        """`row` is `first` until the nearest centers are known."""
        n, each = step.targets.shape
        flat = step.targets.reshape(-1)
        local = flat - step.lo
        own = (local >= 0) & (local < local_classes) & (flat >= 0)
        if step.rows is not None and selected:
            local = torch.searchsorted(step.rows, local)
        first = torch.where(own, local, 0) * step.margin.centers
        sample = (
            torch.arange(n, device=flat.device).repeat_interleave(each)
            if each > 1
            else torch.arange(n, device=flat.device)
        )
        return cls(sample, first, first, own, step.targets >= 0)


def centers_of(classes: Tensor, centers: int) -> Tensor:
    """Rows `[n · K]` of the K centers of each class `[n]`."""
    return (
        classes
        if centers == 1
        else (classes[:, None] * centers + torch.arange(centers, device=classes.device)).reshape(-1)
    )


def compute_dtypes(embeddings: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of statistics, dtype of matrix products): float32 at least for the first, autocast's choice for the second."""
    if torch.float64 in (embeddings.dtype, weight.dtype):
        return torch.float64, torch.float64
    if torch.is_autocast_enabled(embeddings.device.type):
        return torch.float32, torch.get_autocast_dtype(embeddings.device.type)
    low = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.float32, weight.dtype if low else torch.float32


def logits_bytes(samples: int, rows: int, product: torch.dtype) -> int:
    """What the logits `[N, S]` take where they are kept: exponentials in the dtype of the matrix products."""
    return samples * rows * product.itemsize


def tile_logits(scaled: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`scaled wᵀ + bias` `[N, T]`, written into `out` where the product has its dtype."""
    if scaled.dtype == out.dtype:
        torch.mm(scaled, w.to(scaled.dtype).t(), out=out)
    else:
        out.copy_(torch.mm(scaled, w.to(scaled.dtype).t()))
    return out if bias is None else out.add_(bias)


def leave_out(logits: Tensor, targets: Targets, samples: int, a: int, centers: int = 1) -> None:
    """In place: −inf where a row of this tile is a target of the sample; targets are counted with their margin elsewhere."""
    width = logits.shape[1]
    if not logits.numel():
        return
    first = (targets.first - a).view(samples, -1)
    own = targets.own.view(samples, -1)
    # a sample whose targets are elsewhere writes back what it reads; several targets a sample go one by one, so that none undoes another
    for each in range(first.shape[1]):
        for center in range(centers):
            at = first[:, each : each + 1] + center
            here = own[:, each : each + 1] & (at >= 0) & (at < width)
            at = at.clamp(0, width - 1)
            logits.scatter_(1, at, torch.where(here, -torch.inf, logits.gather(1, at)))


def ruled_logits(step: Step, cosines: Tensor, targets: Targets, a: int) -> tuple[Tensor, Tensor | None]:
    """(logits `[N, T]` of other classes, −inf where one takes no part; their derivative by the scaled cosines, None where it is 1).

    Of the centers of a class only the nearest takes part. Beyond `interclass_filter` a class is taken for the sample's own under another
    label, and takes no part either.
    """
    margin, slope = step.margin, None
    if step.rule is not None:
        assert step.aim is not None
        with torch.enable_grad():  # on one tile; the rule is elementwise, so the derivative of the sum is that of each
            leaf = cosines.detach().requires_grad_()
            ruled = step.rule.negative(leaf, step.aim)
            slope = torch.autograd.grad(ruled.sum(), leaf)[0]
        logits = ruled.detach() * margin.scale
    else:
        logits = cosines * margin.scale
    if step.interclass_filter is not None:
        logits.masked_fill_(cosines > step.interclass_filter, -torch.inf)
    if margin.centers > 1 and logits.numel():
        by_class = cosines.view(len(cosines), -1, margin.centers)
        nearest = by_class.argmax(2, keepdim=True)
        logits.view_as(by_class).masked_fill_(
            torch.ones_like(by_class, dtype=torch.bool).scatter_(2, nearest, False), -torch.inf
        )
    leave_out(logits, targets, len(cosines), a, margin.centers)
    return logits, slope


def low_precision_product(e: Tensor, weighted: Tensor, dtype: torch.dtype) -> Tensor:
    """`eᵀ weighted` with both in `dtype`. float16 has little range: the second is brought to a largest value of 1 and back."""
    if dtype is not torch.float16:
        return torch.mm(e.t(), weighted.to(dtype))
    largest = (
        weighted.abs().amax().clamp_(min=torch.finfo(weighted.dtype).tiny)
        if weighted.numel()
        else weighted.new_ones(())
    )
    return torch.mm(e.t(), (weighted / largest).to(dtype)).to(weighted.dtype) * largest
