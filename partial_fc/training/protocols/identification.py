"""Identification 1:N: which enrolled identity does a probe show (closed set), and does it show any of them (open set)?

    gallery [g, D], labels [g]     images of the enrolled identities; the score of an identity is that of its best image
    distractors [m, D]             enrolled too, each an identity of its own that no probe has; MegaFace has a million
    probes [p, D], labels [p]      mated (their identity is in the gallery) or not
      -> own [p]                   score with the probe's own identity
      -> better [p]                number of other identities, including distractors, that score as high or higher
      -> best_other [p]            highest score of any other identity
    rank-k                         share of mated probes with better < k                       (closed set, CMC curve)
    DIR at FPIR f                  share of mated probes with better = 0 and own >= t, the lowest threshold at which at
                                   most the share f of the non-mated probes has best_other >= t  (open set)

A tie (a difference below 1e-6) counts against the probe, so that embeddings that are all equal identify nobody.
Blocks of probes are assigned to the ranks, and the gallery is visited in tiles: beside the embeddings, memory is a
block by a tile and three numbers per probe.
DIR, FPIR: Grother and Ngan, NIST Interagency Report 8009. MegaFace: Kemelmacher-Shlizerman et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import cosine_tile
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tiling import (
    TIE,
    Reduce,
    RowValues,
    check_labels,
    check_tile,
    identity_ranges,
    rank_blocks,
    unit_rows,
)

RANKS = (1, 5, 10, 20)
FPIRS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}
CURVE = 100  # the CMC curve is given for k up to this
DIR_POINTS = 500
BELOW_ALL = -2.0  # a threshold below every cosine


class _Gallery:
    """All enrolled images, sorted by identity: the labels in rising order are 0..I-1, the distractors follow."""

    def __init__(self, gallery: Tensor, labels: Tensor, distractors: Tensor) -> None:
        order = labels.argsort(stable=True)
        self.names, counts = labels.unique(return_counts=True)
        self.unit = gallery[order]
        self.distractors = distractors
        self.sizes = torch.cat((counts, counts.new_ones(len(distractors))))  # images of each identity
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.identities = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)

    def images(self, lo: int, hi: int) -> Tensor:
        """Return the embeddings of the images lo to hi, where the distractors follow the gallery."""
        known = len(self.unit)
        if lo >= known:
            return self.distractors[lo - known : hi - known]
        if hi <= known:
            return self.unit[lo:hi]
        return torch.cat((self.unit[lo:], self.distractors[: hi - known]))

    def scores(self, block: Tensor, lo: int, hi: int, tile: int) -> Tensor:
        """Return the best cosine of the probes `block` `[b, D]` with each of the identities lo to hi, `[b, hi - lo]`.

        `tile` images are compared at a time.
        """
        first = int(self.starts[lo])
        last = int(self.starts[hi - 1] + self.sizes[hi - 1])
        if last - first == hi - lo:  # one image per identity
            return cosine_tile(block, self.images(first, last).to(block.device))
        best = block.new_full((len(block), hi - lo), -torch.inf)
        for start in range(first, last, tile):
            stop = min(start + tile, last)
            cosines = cosine_tile(block, self.images(start, stop).to(block.device))
            identity = (self.identities[start:stop] - lo).to(block.device)
            best.scatter_reduce_(1, identity.expand(len(block), -1), cosines, "amax")
        return best


def identify_embeddings(
    gallery: Tensor,
    gallery_labels: Tensor,
    probes: Tensor,
    probe_labels: Tensor,
    *,
    name: str,
    distractors: Tensor | None = None,
    distractor_labels: Tensor | None = None,
    ranks: Sequence[int] = RANKS,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    progress: bool = False,
    device: torch.device | None = None,
) -> Result:
    """Search `probes` `[p, D]` in `gallery` `[g, D]` and `distractors` `[m, D]`; labels are integers.

    Args:
        distractor_labels: only used to check that no distractor is an identity of the probes or of the gallery.
        device: where tiles are computed, by default the device of the embeddings.

    `tile` probes and gallery images are compared at a time. Calls `reduce` three times, with one number per probe.
    Embeddings need not be normalised.

    Figures: "rank-k" for k in `ranks`, of the mated probes; "dir@FPIR", None where the FPIR is less than one non-mated
    probe. Raises UserError for shapes that do not match, embeddings that are not finite, if no probe is mated, or if a
    distractor has the label of a probe or of the gallery.
    """
    check_tile(tile)
    width = gallery.shape[-1]
    identity_count = len(gallery_labels.unique())
    gallery_labels = check_labels(gallery_labels, len(gallery), "gallery")
    probe_labels = check_labels(probe_labels, len(probes), "probe")
    if distractors is None:
        distractors = gallery[:0]
    _check_distractors(distractors, distractor_labels, gallery_labels, probe_labels, name)
    enrolled = _Gallery(
        unit_rows(gallery, "gallery"),
        gallery_labels.cpu(),
        unit_rows(distractors, "distractor", width) if len(distractors) else gallery[:0].float(),
    )
    unit = unit_rows(probes, "probe", width)
    probe_labels = probe_labels.cpu()
    if identity_count:
        own_identity = torch.searchsorted(enrolled.names, probe_labels).clamp_(max=identity_count - 1)
        mated = enrolled.names[own_identity] == probe_labels
    else:
        own_identity = torch.zeros_like(probe_labels)
        mated = torch.zeros_like(probe_labels, dtype=torch.bool)
    if not bool(mated.any()):
        raise UserError(f"{name}: no probe is of an identity in the gallery; check the labels of both")

    own = RowValues(len(unit), dtype=torch.float32)
    better = RowValues(len(unit), dtype=torch.int64)
    best_other = RowValues(len(unit), dtype=torch.float32)
    for rows in rank_blocks(len(unit), tile, rank, world, "probes", progress):
        block = unit[rows].to(device or unit.device)
        identity = torch.where(mated[rows], own_identity[rows], -1)
        own[rows], better[rows], best_other[rows] = _search(block, identity, enrolled, tile)
    return _figures(
        name,
        mated,
        own.sum_over_ranks(reduce),
        better.sum_over_ranks(reduce),
        best_other.sum_over_ranks(reduce),
        ranks,
        identity_count,
        len(distractors),
    )


def _check_distractors(
    distractors: Tensor, labels: Tensor | None, gallery_labels: Tensor, probe_labels: Tensor, name: str
) -> None:
    """Raise UserError for a distractor with the label of a probe or of the gallery."""
    if labels is None:
        return
    labels = check_labels(labels, len(distractors), "distractor")
    for known, what in ((probe_labels, "probes"), (gallery_labels, "gallery")):
        shared = labels[torch.isin(labels, known.to(labels.device))]
        if len(shared):
            raise UserError(
                f"{name}: the distractors have the label {int(shared[0])}, which is among the {what}; "
                "give distractors of other identities"
            )


def _search(block: Tensor, identity: Tensor, enrolled: _Gallery, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (own, better, best_other) of the probes `block` `[b, D]` (see the module's docstring), `[b]` each.

    identity: the probes' own identities `[b]`, -1 for probes that are not mated; the own score of these is 0.
    """
    own = _own_scores(block, identity, enrolled, tile)
    better = torch.zeros(len(block), dtype=torch.int64, device=block.device)
    best_other = block.new_full((len(block),), -1.0)  # the lowest cosine
    identity = identity.to(block.device)
    for lo, hi in identity_ranges(enrolled.sizes, tile):
        scores = enrolled.scores(block, lo, hi, tile)
        own_in_range = ((identity >= lo) & (identity < hi)).nonzero().flatten()
        scores[own_in_range, identity[own_in_range] - lo] = -torch.inf
        better += (scores >= own[:, None] - TIE).sum(1)
        best_other = torch.maximum(best_other, scores.amax(1))
    return own.cpu(), better.cpu(), best_other.cpu()


def _own_scores(block: Tensor, identity: Tensor, enrolled: _Gallery, tile: int) -> Tensor:
    """Return the best cosine of each probe with an image of its own identity, `[b]`; 0 for non-mated probes."""
    own = block.new_zeros(len(block))
    mated = (identity >= 0).nonzero().flatten()
    for wanted in identity[mated].unique().tolist():
        probes = mated[identity[mated] == wanted].to(block.device)
        own[probes] = enrolled.scores(block[probes], wanted, wanted + 1, tile)[:, 0]
    return own


def _figures(
    name: str,
    mated: Tensor,
    own: Tensor,
    better: Tensor,
    best_other: Tensor,
    ranks: Sequence[int],
    identity_count: int,
    distractor_count: int,
) -> Result:
    """Return the figures from the values of all probes `[p]`."""
    own = own[mated]
    better = better[mated]
    first = better == 0
    nonmated_scores = best_other[~mated].sort(descending=True).values  # of the probes that are not mated
    figures: dict[str, float | None] = {f"rank-{k}": float((better < k).double().mean()) for k in ranks}
    thresholds: dict[str, float | None] = {}
    highest_k = min(CURVE, identity_count + distractor_count)
    curves = {"cmc": [(float(k), float((better < k).double().mean())) for k in range(1, highest_k + 1)]}
    if len(nonmated_scores):
        curves["dir"] = _open_set_curve(nonmated_scores, own[first].double(), len(better))
    for key, fpir in FPIRS.items():
        allowed = int(fpir * len(nonmated_scores) + 1e-6)
        figures[f"dir@{key}"] = thresholds[f"dir@{key}"] = None
        if allowed:
            # the highest score that must be rejected; probes with an equal score are rejected too
            rejected = nonmated_scores[allowed] if allowed < len(nonmated_scores) else torch.tensor(BELOW_ALL)
            figures[f"dir@{key}"] = float((first & (own > rejected)).double().mean())
            thresholds[f"dir@{key}"] = float(torch.nextafter(rejected, torch.tensor(2.0)))
    counts = {
        "mated probes": len(better),
        "other probes": len(nonmated_scores),
        "identities": identity_count,
        "distractors": distractor_count,
    }
    return Result("identification", name, counts, figures, thresholds, curves=curves)


def _open_set_curve(nonmated_scores: Tensor, own: Tensor, mated_count: int) -> list[tuple[float, float]]:
    """Return at most `DIR_POINTS` points (FPIR, DIR), FPIR > 0 rising, evenly spaced in log FPIR; the last accepts all.

    nonmated_scores: the highest score of each probe that is not mated, in falling order.
    own: the own scores of the mated probes with better = 0.
    """
    scores = nonmated_scores.double()
    count = len(scores)
    allowed = torch.logspace(0, math.log10(count), DIR_POINTS, dtype=torch.float64).round().long()
    allowed = allowed.clamp_(1, count).unique()
    rejected = torch.cat((scores, scores.new_tensor([BELOW_ALL])))[allowed]  # as in `_figures`
    false_positives = torch.searchsorted(-scores, -rejected)  # number of non-mated scores above `rejected`
    hits = len(own) - torch.searchsorted(own.sort().values, rejected, right=True)
    hits_at = dict(zip(false_positives.tolist(), hits.tolist(), strict=True))  # equal FPIRs become one point
    return [(positives / count, hit / mated_count) for positives, hit in hits_at.items() if positives]
