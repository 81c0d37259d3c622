"""Listed pairs: histograms of their cosines, and accuracy on the threshold grid of the literature.

    unit rows [n, D], pairs (first, second) [P]   each rank takes a contiguous share of the pairs, in blocks
      -> cosines [block]                          counted in PairHistograms: (genuine | impostor) x fold x bin
      -> squared distances [block]                counted between the thresholds 0, 0.01, ..., 3.99: GridCounts
    sum over ranks                                TAR at FAR, EER and accuracy, from the counts alone

The folds are consecutive tenths of the list; if it does not divide by ten, the first folds have one pair more.
scikit-learn's KFold without shuffling gives the same folds, and LFW lists its ten splits in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import BINS, FOLDS, GENUINE, IMPOSTOR, PairHistograms, bins_of
from partial_fc.training.protocols.tiling import Reduce

THRESHOLDS = 400  # 0, 0.01, ..., 3.99: squared distances of unit embeddings, 2 - 2 cos
BLOCK = 8192  # pairs scored at a time
LEAST_FALSE_ACCEPTS = 1  # the lists are fixed, and the published tables go down to one expected false accept


@dataclass
class Pairs:
    """P pairs: row indices `first` and `second`, `same` (bool: one identity or two) and `fold`, all `[P]`."""

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def check(self, name: str) -> None:
        """Raise UserError unless there are pairs of both kinds."""
        genuine = int(self.same.sum())
        for count, kind in ((genuine, "of one identity"), (len(self.same) - genuine, "of two identities")):
            if not count:
                raise UserError(f"{name} has no pair {kind}; both kinds are needed, check its labels and images")


def folds_of(count: int) -> Tensor:
    """Return the fold of each of `count` pairs, `[count]`."""
    sizes = torch.full((FOLDS,), count // FOLDS) + (torch.arange(FOLDS) < count % FOLDS)
    return torch.arange(FOLDS).repeat_interleave(sizes)


@dataclass
class GridCounts:
    """Pairs by kind, fold and squared distance: int64 `[2, FOLDS, THRESHOLDS + 1]`.

    The last index is the number of thresholds that are less than or equal to the squared distance.
    """

    counts: Tensor

    def accuracy(self) -> tuple[float, float] | None:
        """Return mean and (population) standard deviation of the accuracy over folds, or None if a fold has no pair.

        A pair is accepted if its distance is below the threshold. The threshold of a fold is the best one on the other
        nine folds, the smallest if several are equally good, as in the code behind the published figures.
        """
        accepted = self.counts.cumsum(-1)[..., :THRESHOLDS]  # [2, FOLDS, THRESHOLDS]
        totals = self.counts.sum(-1)  # [2, FOLDS]
        if not int(totals.sum(0).min()):
            return None
        correct = accepted[GENUINE] + totals[IMPOSTOR, :, None] - accepted[IMPOSTOR]  # [FOLDS, THRESHOLDS]
        scores = []
        for fold in range(FOLDS):
            best = int((correct.sum(0) - correct[fold]).argmax())  # argmax returns the first of equal maxima
            scores.append(float(correct[fold, best]) / float(totals[:, fold].sum()))
        values = torch.tensor(scores, dtype=torch.float64)
        return float(values.mean()), float(values.std(correction=0))


@dataclass
class Scored:
    """Counts of `score_pairs` over all ranks, and the scores `[P]` float32 in list order, if they were requested."""

    histograms: PairHistograms
    grid: GridCounts
    scores: Tensor | None


def score_pairs(
    unit: Tensor,
    pairs: Pairs,
    *,
    keep_scores: bool = False,
    block: int = BLOCK,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    device: torch.device | None = None,
) -> Scored:
    """Count the cosines of all `pairs` of the unit rows `unit` `[n, D]`.

    Calls `reduce` twice, three times with `keep_scores`. Temporary memory: three tensors `[block, D]`. device: where
    cosines are computed, by default the device of the rows, which are copied there.
    """
    unit = unit if device is None else unit.to(device)
    count = len(pairs.same)
    histogram = torch.zeros(2 * FOLDS * BINS, dtype=torch.int64)
    grid = torch.zeros(2 * FOLDS * (THRESHOLDS + 1), dtype=torch.int64)
    thresholds = torch.arange(THRESHOLDS, dtype=torch.float64) * 0.01
    scores = torch.zeros(count if keep_scores else 0)
    stop = count * (rank + 1) // world
    for start in range(count * rank // world, stop, block):
        part = slice(start, min(start + block, stop))
        first, second = (unit.index_select(0, each[part].to(unit.device)) for each in (pairs.first, pairs.second))
        cosines = torch.linalg.vecdot(first, second).cpu()
        distances = first.sub_(second).square_().sum(1).double().cpu()
        kind_and_fold = torch.where(pairs.same[part], GENUINE, IMPOSTOR) * FOLDS + pairs.fold[part]
        cell = torch.bucketize(distances, thresholds, right=True)
        ones = torch.ones_like(kind_and_fold)
        histogram.scatter_add_(0, kind_and_fold * BINS + bins_of(cosines), ones)
        grid.scatter_add_(0, kind_and_fold * (THRESHOLDS + 1) + cell, ones)
        if keep_scores:
            scores[part] = cosines.float()
    if reduce is not None:
        histogram = reduce(histogram)
        grid = reduce(grid)
        scores = reduce(scores) if keep_scores else scores
    return Scored(
        PairHistograms(histogram.view(2, FOLDS, BINS)),
        GridCounts(grid.view(2, FOLDS, -1)),
        scores if keep_scores else None,
    )


def hardest_of(scored: Scored, pairs: Pairs, count: int) -> dict[str, list[tuple[float, int, int]]]:
    """Return the `count` hardest pairs of each kind as (cosine, first row, second row), hardest first.

    "genuine" pairs are hard at low cosines, "impostor" pairs at high ones. The scores must have been kept.
    """
    assert scored.scores is not None
    hardest = {}
    for kind, sign, chosen in (("genuine", -1, pairs.same), ("impostor", 1, ~pairs.same)):
        indices = chosen.nonzero().flatten()
        indices = indices[(sign * scored.scores[indices]).argsort(descending=True, stable=True)[:count]]
        columns = (scored.scores[indices].tolist(), pairs.first[indices].tolist(), pairs.second[indices].tolist())
        hardest[kind] = list(zip(*columns, strict=True))
    return hardest
