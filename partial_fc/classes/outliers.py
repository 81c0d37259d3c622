"""Samples that their class has put aside: they are nearer to a sub-center that is not its dominant one.

    embeddings, labels of all ranks, 1,024 samples at a time  ── all-gather ──>  every rank
    cosines [q, K] to the centers of a sample's own class, by the rank that owns it  ── sum ──>  the sample's rank
    the owner counts the samples nearest to each center  [C_local, K]  ──>  the dominant center of each class
    labels once more  ──>  the dominant center of each sample's class

Deng et al., "Sub-center ArcFace", ECCV 2020, section 3.4: of the centers of a class, the one to which most of its
samples are nearest is dominant; samples far from it (75 degrees there) are taken for noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.batch.exchange import exchange_payload
from partial_fc.classes import queries
from partial_fc.classes.best_classes import largest
from partial_fc.classes.interface import Changeable, check_loss
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, UnitRows
from partial_fc.classes.query_arguments import check_query, unit_factors
from partial_fc.distributed.given import real
from partial_fc.distributed.operation import operation
from partial_fc.distributed.ranks import sum_over_replicas
from partial_fc.distributed.sums import sum_over_ranks

WHAT = "outliers"


class Outliers(NamedTuple):
    """What `outliers` finds.

    found: `[N_local]` bool, whether a sample is an outlier of its class. angles: `[N_local]` to the dominant center of
    its class, in radians; NaN without a label. nearest, dominant: `[N_local]` int64, the center of its class that is
    nearest to it, and the dominant one, 0 to K − 1; −1 without a label. centers: `[C_local]` int64, the dominant center
    of each class of this rank's shard, −1 for a class without samples.
    """

    found: Tensor
    angles: Tensor
    nearest: Tensor
    dominant: Tensor
    centers: Tensor


@operation(WHAT)
@torch.no_grad()
def outliers(head: Changeable, embeddings: Tensor, labels: Tensor, *, threshold: float | None = None) -> Outliers:
    """Return which samples are outliers of their class, by a head with sub-centers; a collective.

    The dominant center of a class is the one to which most of the samples given here, on all ranks, are nearest; of
    equal ones the first. Without a threshold, a sample is an outlier if another center of its class is nearer to it
    than the dominant one. With one, if the angle to the dominant center is larger.

    Args:
        head: a `PartialFC` with a margin of several centers, `SubCenterArcFace`.
        embeddings: `[N_local, D]` of this rank, as the head gets them; N_local may differ between ranks and be 0.
        labels: `[N_local]` int64, on the same device; the head's `ignore_index` for a sample without a class.
        threshold: an angle in radians in (0, π]; `math.radians(75)` is that of insightface's `drop.py` and of
            pytorch-metric-learning's `get_outliers`.

    Give all samples at once: what is dominant is counted over them. Nothing is changed. Raises ValueError, the same on
    every rank, for a head without sub-centers, a label that is no class, and what `topk` refuses; NonFiniteError if the
    length of an embedding, or of a center of a class that has samples, is not finite.
    """
    check_loss(head, "outliers(head, embeddings, labels)")
    rows = UnitRows(head.class_rows, embeddings.dtype if isinstance(embeddings, Tensor) else None)
    ranks, device = rows.ranks, rows.device
    problem = _problem(rows, embeddings, labels, threshold, head.ignore_index)
    everyone = check_query(head.class_rows, 1, rows.num_classes, DEFAULT_TILE_BYTES, embeddings, problem)
    counts = everyone[ranks.replica * ranks.world : (ranks.replica + 1) * ranks.world]
    labels = torch.where(labels == head.ignore_index, -1, labels)

    votes = torch.zeros(len(rows.weight), rows.centers, dtype=torch.int64, device=device)
    cosines = [torch.empty(0, rows.centers, dtype=rows.dtype, device=device)]
    for part, now in _rounds(counts, ranks.rank):
        x = embeddings[part].to(rows.dtype)
        x, ids = exchange_payload([x * unit_factors(x), labels[part]], now, max(now), ranks.group)
        place = _own(ids, rows)
        found = x.new_zeros(len(x), rows.centers)
        found[place] = _to_centers(x[place], ids[place], rows)
        votes.view(-1).index_add_(
            0, (ids[place] - rows.lo) * rows.centers + largest(found[place], 1)[:, 0], torch.ones_like(place)
        )
        cosines.append(_back(found, now, rows))
    rows.raise_nonfinite()
    sum_over_replicas(votes, ranks, WHAT)
    centers = torch.where(votes.any(1), largest(votes.double(), 1)[:, 0], -1)

    dominant = [torch.empty(0, dtype=torch.int64, device=device)]
    for part, now in _rounds(counts, ranks.rank):
        (ids,) = exchange_payload([labels[part]], now, max(now), ranks.group)
        place = _own(ids, rows)
        of_samples = torch.zeros_like(ids)
        of_samples[place] = centers[ids[place] - rows.lo]
        dominant.append(_back(of_samples, now, rows))
    return _outliers(torch.cat(cosines).clamp_(-1, 1), torch.cat(dominant), labels, centers, threshold)


def _outliers(cosines: Tensor, dominant: Tensor, labels: Tensor, centers: Tensor, threshold: float | None) -> Outliers:
    """cosines `[N_local, K]` to the centers of each sample's class."""
    exists = labels >= 0
    nearest = largest(cosines, 1)[:, 0]
    angles = torch.acos(cosines.gather(1, dominant[:, None])[:, 0])
    found = nearest != dominant if threshold is None else angles > real("threshold", threshold)
    nearest, dominant = (torch.where(exists, each, -1) for each in (nearest, dominant))
    return Outliers(found & exists, torch.where(exists, angles, torch.nan), nearest, dominant, centers)


def _problem(rows: UnitRows, embeddings: Any, labels: Any, threshold: Any, ignored: int) -> str:
    """Return what is wrong with the head, the labels or the threshold on this rank; "" if nothing is."""
    if rows.centers == 1:
        return "outliers are found by sub-centers: the head needs a margin with several, SubCenterArcFace(centers=3)"
    if threshold is not None:
        try:
            threshold = real("threshold", threshold)
        except TypeError as error:
            return str(error)
        if not 0 < threshold <= math.pi:
            return f"threshold is an angle in radians in (0, pi], not {threshold}"
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        return f"labels must be an int64 tensor [N], not {given}"
    if isinstance(embeddings, Tensor) and len(labels) != len(embeddings):
        return f"there are {len(embeddings)} embeddings and {len(labels)} labels"
    if labels.device != rows.device:
        return f"the head is on {rows.device}, labels on {labels.device}"
    bad = ((labels != ignored) & ((labels < 0) | (labels >= rows.num_classes))).nonzero()
    if len(bad):
        at = int(bad[0, 0])
        return f"labels[{at}] is {int(labels[at])}; valid are 0 to {rows.num_classes - 1}, and {ignored} for none"
    return ""


def _rounds(counts: list[int], rank: int) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield (this rank's samples of a round, the number of them on every rank)."""
    step = max(1, queries.QUERIES // len(counts))
    for start in range(0, max(counts), step):
        yield slice(start, start + step), tuple(max(0, min(count - start, step)) for count in counts)


def _own(ids: Tensor, rows: UnitRows) -> Tensor:
    """Return the places of the samples whose class this rank owns."""
    return ((ids >= rows.lo) & (ids < rows.hi)).nonzero()[:, 0]


def _to_centers(x: Tensor, ids: Tensor, rows: UnitRows) -> Tensor:
    """Return the cosines `[q, K]` of unit vectors `[q, D]` to the centers of their classes `[q]`."""
    centers = rows.unit_of(ids)
    return torch.linalg.vecdot(x[:, None], centers)


def _back(values: Tensor, now: tuple[int, ...], rows: UnitRows) -> Tensor:
    """Return, for this rank's samples of a round, what their owners know; it is 0 on all others."""
    start = sum(now[: rows.ranks.rank])
    return sum_over_ranks(values, rows.ranks.group, WHAT)[start : start + now[rows.ranks.rank]]
