"""Pairs that a protocol lists: their cosines, counted as `evaluation.PairHistograms`, and accuracy on the threshold grid of the literature.

    unit rows [n, D], pairs (first, second) [P]   a contiguous share of the pairs for each rank, in blocks
      -> cosines [block]                          bins of PairHistograms: (genuine | impostor) x fold x bin
      -> squared distances [block]                among the thresholds 0, 0.01, ..., 3.99: GridCounts
    sum over ranks                                TAR at FAR, EER, accuracy: from the counts alone

Folds are consecutive tenths of the list, the first ones a pair longer where it does not divide: those of scikit-learn's KFold without
shuffling, and of LFW's ten splits, which lie in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import BINS, FOLDS, GENUINE, IMPOSTOR, PairHistograms, bins_of
from partial_fc.training.protocols.tiling import Reduce

THRESHOLDS = 400  # 0, 0.01, ..., 3.99: squared distances of unit embeddings, 2 - 2 cos
BLOCK = 8192  # pairs that are scored at a time
LEAST_FALSE_ACCEPTS = 1  # the lists are fixed, and their published tables go as far as this


@dataclass
class Pairs:
    """P pairs: rows `first` and `second` `[P]`, whether they are of one identity `same` `[P]`, and the `fold` `[P]` of each."""

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def check(self, name: str) -> None:
        """UserError unless there is a pair of either kind."""
        genuine = int(self.same.sum())
        for count, kind in ((genuine, "of one identity"), (len(self.same) - genuine, "of two identities")):
            if not count:
                raise UserError(
                    f"{name} has no pair {kind}, so there is nothing to tell apart; check its labels and images"
                )


def folds_of(count: int) -> Tensor:
    """The fold of each of `count` pairs, `[count]`."""
    sizes = torch.full((FOLDS,), count // FOLDS) + (torch.arange(FOLDS) < count % FOLDS)
    return torch.arange(FOLDS).repeat_interleave(sizes)


@dataclass
class GridCounts:
    """int64 `[2, FOLDS, THRESHOLDS + 1]`: genuine or impostor, fold, how many thresholds a squared distance is not below."""

    counts: Tensor

    def accuracy(self) -> tuple[float, float] | None:
        """Mean and standard deviation (population) over folds of the share of pairs that are told right; None if a fold has no pair.

        The threshold (accepted: distance below it) is the best on the other nine folds, of equally good ones the smallest: the rule of
        the code that published figures come from.
        """
        below = self.counts.cumsum(-1)[..., :THRESHOLDS]  # [2, FOLDS, THRESHOLDS] accepted
        totals = self.counts.sum(-1)  # [2, FOLDS]
        if not int(totals.sum(0).min()):
            return None
        right = below[GENUINE] + totals[IMPOSTOR, :, None] - below[IMPOSTOR]  # [FOLDS, THRESHOLDS]
        scores = []
        for fold in range(FOLDS):
            best = int((right.sum(0) - right[fold]).argmax())  # of equal ones the first
            scores.append(float(right[fold, best]) / float(totals[:, fold].sum()))
        values = torch.tensor(scores, dtype=torch.float64)
        return float(values.mean()), float(values.std(correction=0))


@dataclass
class Scored:
    """What `score_pairs` counted, of all ranks; scores `[P]` float32 in the order of the list, if they were asked for."""

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
) -> Scored:
    """Cosines of all pairs of the rows `unit` `[n, D]`, counted; two calls of `reduce`, three with `keep_scores`.

    Temporaries are three copies of `[block, D]`.
    """
    count = len(pairs.same)
    histogram = torch.zeros(2 * FOLDS * BINS, dtype=torch.int64)
    grid = torch.zeros(2 * FOLDS * (THRESHOLDS + 1), dtype=torch.int64)
    thresholds = torch.arange(THRESHOLDS, dtype=torch.float64) * 0.01
    scores = torch.zeros(count if keep_scores else 0)
    stop = count * (rank + 1) // world
    for start in range(count * rank // world, stop, block):
        part = slice(start, min(start + block, stop))
        first, second = unit[pairs.first[part]], unit[pairs.second[part]]
        cosines = torch.linalg.vecdot(first, second).cpu()
        distances = first.sub_(second).square_().sum(1).double().cpu()
        kind = torch.where(pairs.same[part], GENUINE, IMPOSTOR) * FOLDS + pairs.fold[part]
        ones = torch.ones_like(kind)
        histogram.scatter_add_(0, kind * BINS + bins_of(cosines), ones)
        grid.scatter_add_(0, kind * (THRESHOLDS + 1) + torch.bucketize(distances, thresholds, right=True), ones)
        if keep_scores:
            scores[part] = cosines.float()
    if reduce is not None:
        histogram, grid = reduce(histogram), reduce(grid)
        scores = reduce(scores) if keep_scores else scores
    return Scored(
        PairHistograms(histogram.view(2, FOLDS, BINS)),
        GridCounts(grid.view(2, FOLDS, -1)),
        scores if keep_scores else None,
    )


def hardest_of(scored: Scored, pairs: Pairs, count: int) -> dict[str, list[tuple[float, int, int]]]:
    """Of pairs whose scores were kept, "genuine" ones of the lowest cosine and "impostor" ones of the highest: (cosine, row, row)."""
    assert scored.scores is not None
    found = {}
    for kind, sign, chosen in (("genuine", -1, pairs.same), ("impostor", 1, ~pairs.same)):
        places = chosen.nonzero().flatten()
        places = places[(sign * scored.scores[places]).argsort(descending=True, stable=True)[:count]]
        columns = (scored.scores[places].tolist(), pairs.first[places].tolist(), pairs.second[places].tolist())
        found[kind] = list(zip(*columns, strict=True))
    return found
