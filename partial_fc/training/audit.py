"""What a trained head shows about its data set.

It finds identities stored twice, classes that were never updated, and classes far from their own images.

    images ── backbone ──> unit embeddings ── summed on the rank of their class ──>  mean directions [C_local, D]
    class rows, mean directions    ── nearest_classes ──>      the nearest other classes  ──>  pairs above a threshold
    class rows, initial values     ── the same direction? ─>   classes that no step has updated
    class rows, mean directions    ── cosine ──>               classes whose row is far from their images
    six numbers per class [C, 6]   ── gather ──>               an Audit on every rank

The matrices stay sharded; only a few numbers per class are gathered. Images are not augmented.

Pairs are searched by two measures. If an identity is stored under two names, its two class rows are similar, but the
loss has pushed them apart like all rows; the means of their images are more similar. A pair is reported if either
cosine reaches its threshold. The default threshold comes from the run itself: Tukey's outer fence Q3 + 3 (Q3 − Q1) of
the cosines of all classes to their nearest class, computed on artanh(cosine) (Fisher's z), whose spread does not
shrink near 1. A clean data set may have no pair above it.

audit_page.py writes the result to a folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from partial_fc import CenterLoss, Neighbours, PartialFC, gather
from partial_fc.distributed.shards import local_part, shard_bounds
from partial_fc.tiers.initial import initial_rows
from partial_fc.training.all_ranks import raise_on_all
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.results import evaluation_loader

# Nearest classes searched per class. An identity stored under more names than that appears as several pairs.
NEIGHBOURS = 10
BLOCK = 1024  # rows compared at a time
TURNED = 1e-5  # radians: more than the rounding of decay
MIN_PAIRS = 20  # pairs to keep for the page even if fewer are above a threshold
LIMIT = 1 - 1e-12  # largest cosine whose artanh is taken


@dataclass
class Pair:
    """Two classes (a < b), with the cosine of their rows and that of their mean directions.

    A cosine is NaN if the two are not among each other's nearest classes by that measure.
    """

    a: int
    b: int
    row: float
    mean: float


@dataclass
class Nearest:
    """Each class's nearest other class by one measure `[C]`, its cosine (NaN: no image), and the threshold."""

    cosine: Tensor
    of_class: Tensor
    threshold: float


@dataclass
class Audit:
    """The findings, indexed by class id; the same on every rank.

    rows, means: the nearest class by class rows and by mean directions.
    pairs: every pair above a threshold, and others to make `MIN_PAIRS`; sorted by `excess`, largest first.
    to_mean: cosine of each class's row to its mean direction `[C]`; NaN where no image could be read.
    images: number of readable images `[C]`.
    updated: False where the row still has its initial value `[C]`.
    """

    rows: Nearest
    means: Nearest
    pairs: list[Pair]
    to_mean: Tensor
    images: Tensor
    updated: Tensor

    def excess(self, pair: Pair) -> float:
        """Return how far the pair is above its threshold, the larger of both measures; in artanh of the cosine."""
        over = _z(pair.row) - _z(self.rows.threshold), _z(pair.mean) - _z(self.means.threshold)
        return max(each for each in over if not math.isnan(each))

    @property
    def duplicates(self) -> list[Pair]:
        """The pairs above a threshold."""
        return [pair for pair in self.pairs if self.excess(pair) >= 0]

    @property
    def never_updated(self) -> list[int]:
        """Classes whose row still has its initial value."""
        return (~self.updated).nonzero()[:, 0].tolist()

    @property
    def drifted(self) -> list[int]:
        """Classes with a mean direction, sorted by the cosine to it, lowest first."""
        order = self.to_mean.argsort(stable=True)
        return order[~self.to_mean[order].isnan()].tolist()

    def summary(self) -> str:
        """Return a few lines for the terminal."""
        lines = [
            f"likely duplicate identities   {len(self.duplicates):,} pairs, cosine of rows from "
            f"{self.rows.threshold:.3f} or of means from {self.means.threshold:.3f}",
            f"classes never updated         {len(self.never_updated):,}",
        ]
        known = self.to_mean[~self.to_mean.isnan()]
        if len(known):
            low, middle = quantiles(known, (0.01, 0.5))
            lines.append(f"row to mean of its images     cosine: median {middle:.3f}, lowest 1 % {low:.3f}")
        return "\n".join(lines)


@dataclass
class Thresholds:
    """Cosines from which pairs are reported; None for thresholds computed from the run."""

    rows: float | None = None
    means: float | None = None


def audit_head(
    head: PartialFC,
    backbone: nn.Module,
    dataset: IdentityDataset,
    accelerator: Accelerator,
    config: RunConfig,
    thresholds: Thresholds,
) -> Audit:
    """Return the `Audit` of a head; every rank must call it.

    Raises UserError, the same on every rank, for an unreadable image with on_error="raise", and if there is only one
    class.
    """
    classes = dataset.num_identities
    if classes < 2:
        raise UserError("the run has only one class; an audit compares at least two")
    lo, hi = shard_bounds(classes, accelerator.process_index, accelerator.num_processes)
    centers, images = _class_means(backbone, dataset, accelerator, config)
    rows = local_part(head.weight.detach())
    means = local_part(centers.centers.detach())
    has_mean = images[lo:hi] > 0
    to_mean = torch.where(has_mean, _cosines(rows, means), torch.nan)
    updated = _updated(rows, lo, std=config.head.init_std, seed=config.seed)
    k = min(NEIGHBOURS, classes - 1)
    by_rows = head.nearest_classes(k, progress=True)
    by_means = centers.nearest_classes(k, progress=True)
    # a class without images has no mean direction, so it is no neighbour and has no neighbours
    known = has_mean[:, None] & (images > 0)[by_means.ids]
    by_means = Neighbours(by_means.ids, torch.where(known, by_means.cosines, torch.nan))
    # gather() takes one matrix with a label per line: the six numbers of a class travel as its "embedding"
    local = [by_rows.cosines[:, 0], by_rows.ids[:, 0], by_means.cosines[:, 0], by_means.ids[:, 0], to_mean, updated]
    gathered = gather(torch.stack([each.double() for each in local], 1), torch.arange(lo, hi, device=rows.device))
    row_cosine, row_class, mean_cosine, mean_class, to_mean, updated = gathered.embeddings.cpu().unbind(1)
    audit = Audit(
        rows=_nearest(row_cosine, row_class, thresholds.rows),
        means=_nearest(mean_cosine, mean_class, thresholds.means),
        pairs=[],
        to_mean=to_mean,
        images=images.cpu(),
        updated=updated > 0,
    )
    row_pairs = _close_pairs(by_rows, lo, audit.rows)
    mean_pairs = _close_pairs(by_means, lo, audit.means)
    pairs = [
        Pair(a, b, row_pairs.get((a, b), math.nan), mean_pairs.get((a, b), math.nan))
        for a, b in row_pairs.keys() | mean_pairs.keys()
    ]
    audit.pairs = sorted(pairs, key=lambda pair: (-audit.excess(pair), pair.a, pair.b))
    audit.pairs = audit.pairs[: max(MIN_PAIRS, len(audit.duplicates))]
    return audit


def _nearest(cosines: Tensor, classes: Tensor, threshold: float | None) -> Nearest:
    return Nearest(cosines, classes.long(), _outer_fence(cosines) if threshold is None else threshold)


def _close_pairs(found: Neighbours, lo: int, nearest: Nearest) -> dict[tuple[int, int], float]:
    """Return the cosines of close pairs (a, b), a < b, of all ranks: above the threshold, or to make `MIN_PAIRS`."""
    known = nearest.cosine[~nearest.cosine.isnan()]
    # the nearest cosines of 2 n classes cover at least n pairs: two classes may be the nearest of each other
    largest = known.topk(min(2 * MIN_PAIRS, len(known))).values
    least = min([nearest.threshold, *largest[-1:].tolist()])
    row, place = (found.cosines >= least).nonzero(as_tuple=True)
    gathered = gather(torch.stack((found.ids[row, place].double(), found.cosines[row, place].double()), 1), row + lo)
    pairs: dict[tuple[int, int], float] = {}
    for a, (other, cosine) in zip(gathered.labels.tolist(), gathered.embeddings.tolist(), strict=True):
        b = int(other)
        pairs[min(a, b), max(a, b)] = max(cosine, pairs.get((min(a, b), max(a, b)), -1.0))
    return pairs


def _outer_fence(cosines: Tensor) -> float:
    """Return Q3 + 3 (Q3 − Q1), computed in artanh; 1 if no class has a nearest class."""
    known = cosines[~cosines.isnan()]
    if not len(known):
        return 1.0
    low, high = (_z(each) for each in quantiles(known, (0.25, 0.75)))
    return math.tanh(high + 3 * (high - low))


def _z(cosine: float) -> float:
    """Return the artanh of a cosine (Fisher's z), limited to finite values; NaN for NaN."""
    return cosine if math.isnan(cosine) else math.atanh(max(-LIMIT, min(cosine, LIMIT)))


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the values `[n]`, n > 0, at these shares, by nearest rank; torch.quantile takes at most 16 million."""
    ordered = values.sort().values
    return [float(ordered[round(share * (len(values) - 1))]) for share in shares]


def _class_means(
    backbone: nn.Module, dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig
) -> tuple[CenterLoss, Tensor]:
    """Return the mean directions of the classes, sharded like the head, and the readable images per class `[C]`."""
    loader = evaluation_loader(dataset, accelerator, config)
    images = torch.zeros(dataset.num_identities, dtype=torch.int64, device=accelerator.device)
    problem: list[str] = []

    def embeddings_and_labels() -> Iterator[tuple[Tensor, Tensor]]:
        bar = tqdm(loader, desc="embedding", unit="batch", disable=not accelerator.is_main_process, mininterval=0.5)
        try:
            for batch in bar:
                if len(batch.labels):
                    labels = batch.labels.to(accelerator.device)
                    images.add_(torch.bincount(labels, minlength=len(images)))
                    with accelerator.autocast():
                        embeddings = backbone(batch.images.to(accelerator.device))
                    yield F.normalize(embeddings.float()), labels
        except UserError as error:  # raised on all ranks below, once the others have embedded their images
            problem.append(str(error))

    centers = CenterLoss(
        config.backbone.embedding_size, dataset.num_identities, init_std=0.0, device=accelerator.device
    )
    backbone.eval()
    with torch.no_grad():
        centers.init_from_embeddings(embeddings_and_labels())
    raise_on_all(problem[0] if problem else None, accelerator)
    if accelerator.num_processes > 1:
        dist.all_reduce(images)
    return centers, images


def _cosines(rows: Tensor, means: Tensor) -> Tensor:
    """Return the cosine `[C_local]` of each class's row to its mean direction.

    rows `[C_local, D]`, or `[C_local, K, D]` with K sub-centers, of which the best counts. means `[C_local, D]`. The
    cosine is 0 if either vector is zero.
    """
    parts = [torch.empty(0, dtype=torch.float32, device=rows.device)]
    for block, mean in zip(rows.split(BLOCK), means.split(BLOCK), strict=True):
        sub_centers = block if block.ndim == 3 else block[:, None]
        parts.append(F.cosine_similarity(sub_centers.float(), mean[:, None].float(), dim=2).amax(1))
    return torch.cat(parts)


def _updated(rows: Tensor, lo: int, *, std: float, seed: int) -> Tensor:
    """Return bool `[C_local]`: whether the row of class `lo + i` was turned from its initial direction. Decay, which
    reaches rows that no step has selected as well, only makes it shorter."""
    parts = [torch.empty(0, dtype=torch.bool, device=rows.device)]
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK]
        initial = initial_rows(lo + first, lo + first + len(block), tuple(block.shape[1:]), std=std, seed=seed)
        start, now = initial.to(block).double().flatten(1), block.double().flatten(1)
        share = (now * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True)
        parts.append((now - share * start).norm(dim=1) > TURNED * now.norm(dim=1))
    return torch.cat(parts)
