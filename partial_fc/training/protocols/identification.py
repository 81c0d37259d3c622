"""Identification 1:N: which of the enrolled identities is it (closed set), and is it any of them (open set)?

    gallery [g, D], labels [g]     images of the enrolled identities; an identity's score is that of its best image
    distractors [m, D]             enrolled too, each an identity of its own that no probe has: a million of them is MegaFace's test
    probes [p, D], labels [p]      of an identity in the gallery (mated), or not
      -> own [p]                   the probe's score with its own identity
      -> better [p]                how many other identities, distractors among them, score as high or higher
      -> top [p]                   the highest score of any other identity
    rank-k                         share of mated probes with better < k                                    (closed set, the CMC curve)
    DIR at FPIR f                  share of mated probes with better = 0 and own >= t; t is the lowest threshold at which at most the
                                   share f of the probes that are not mated has a top >= t                  (open set)

A tie (a difference of less than 1e-6) counts against the probe, so that embeddings that are all alike identify nobody. Blocks of probes are
dealt to the ranks, the gallery is walked through in tiles: beside the embeddings, memory is a block by a tile, and three numbers a probe.
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
    Together,
    check_labels,
    check_tile,
    dealt,
    groups,
    unit_rows,
)

RANKS = (1, 5, 10, 20)
FPIRS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}
CURVE = 100  # k up to which the CMC curve is given
DIR_POINTS = 500


class _Gallery:
    """Unit rows sorted by identity; identities 0..I-1 are the labels in rising order, then each distractor."""

    def __init__(self, gallery: Tensor, labels: Tensor, distractors: Tensor) -> None:
        order = labels.argsort(stable=True)
        self.names, counts = labels.unique(return_counts=True)
        self.unit, self.distractors = gallery[order], distractors
        self.sizes = torch.cat((counts, counts.new_ones(len(distractors))))
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.identities = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Unit rows of images lo to hi, gallery and distractors being one list."""
        known = len(self.unit)
        if lo >= known:
            return self.distractors[lo - known : hi - known]
        return self.unit[lo:hi] if hi <= known else torch.cat((self.unit[lo:], self.distractors[: hi - known]))

    def scores(self, block: Tensor, lo: int, hi: int, tile: int) -> Tensor:
        """The best cosine of the probes `block` `[b, D]` with each of the identities lo to hi: `[b, hi - lo]`."""
        first, last = int(self.starts[lo]), int(self.starts[hi - 1] + self.sizes[hi - 1])
        if last - first == hi - lo:
            return cosine_tile(block, self.rows(first, last).to(block.device))
        best = block.new_full((len(block), hi - lo), -torch.inf)
        for start in range(first, last, tile):
            stop = min(start + tile, last)
            identity = (self.identities[start:stop] - lo).to(block.device)
            best.scatter_reduce_(
                1, identity.expand(len(block), -1), cosine_tile(block, self.rows(start, stop).to(block.device)), "amax"
            )
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
    """Figures of `probes` `[p, D]` searched in `gallery` `[g, D]` and `distractors` `[m, D]`, labels being integers.

    distractor_labels: only to see that none of them is a probe's or the gallery's. `tile` probes and gallery images are compared at a time;
    three calls of `reduce`, with one number a probe. Embeddings need not be normalised. device: where tiles are compared, if not where the
    embeddings are.

    Figures: "rank-k" for k in `ranks`, of mated probes; "dir@FPIR", None where that share of the other probes is less than one.
    Raises UserError for shapes that do not match, embeddings that are not finite, no mated probe, or a distractor that is somebody.
    """
    check_tile(tile)
    wide, enrolled = gallery.shape[-1], len(gallery_labels.unique())
    labels, wanted = (
        check_labels(gallery_labels, len(gallery), "gallery"),
        check_labels(probe_labels, len(probes), "probe"),
    )
    others = gallery[:0] if distractors is None else distractors
    _check_distractors(others, distractor_labels, labels, wanted, name)
    enrolment = _Gallery(
        unit_rows(gallery, "gallery"),
        labels.cpu(),
        unit_rows(others, "distractor", wide) if len(others) else gallery[:0].float(),
    )
    unit, wanted = unit_rows(probes, "probe", wide), wanted.cpu()
    own_identity = (
        torch.searchsorted(enrolment.names, wanted).clamp_(max=enrolled - 1) if enrolled else torch.zeros_like(wanted)
    )
    mated = enrolment.names[own_identity] == wanted if enrolled else torch.zeros_like(wanted, dtype=torch.bool)
    if not bool(mated.any()):
        raise UserError(
            f"{name}: no probe is of an identity in the gallery, so there is nothing to find; check the labels of both"
        )
    own, better, top = (Together(len(unit), dtype=kind) for kind in (torch.float32, torch.int64, torch.float32))
    for rows in dealt(len(unit), tile, rank, world, "probes", progress):
        own[rows], better[rows], top[rows] = _search(
            unit[rows].to(device or unit.device), torch.where(mated[rows], own_identity[rows], -1), enrolment, tile
        )
    return _figures(
        name, mated, own.everyone(reduce), better.everyone(reduce), top.everyone(reduce), ranks, enrolled, len(others)
    )


def _check_distractors(others: Tensor, given: Tensor | None, labels: Tensor, wanted: Tensor, name: str) -> None:
    if given is None:
        return
    given = check_labels(given, len(others), "distractor")
    for known, what in ((wanted, "probes"), (labels, "gallery")):
        found = given[torch.isin(given, known.to(given.device))]
        if len(found):
            raise UserError(
                f"{name}: the distractors have the label {int(found[0])}, which is among the {what}; they must be of nobody else"
            )


def _search(block: Tensor, identity: Tensor, enrolment: _Gallery, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """(own score, how many others score as high, highest score of others) of the probes `block` `[b, D]`, on the CPU, `[b]` each.

    identity: the probes' own, -1 for none, whose own score is 0.
    """
    own = _own_scores(block, identity, enrolment, tile)
    better = torch.zeros(len(block), dtype=torch.int64, device=block.device)
    top = block.new_full((len(block),), -1.0)  # no cosine is lower
    mine = identity.to(block.device)
    for lo, hi in groups(enrolment.sizes, tile):
        scores = enrolment.scores(block, lo, hi, tile)
        here = ((mine >= lo) & (mine < hi)).nonzero().flatten()
        scores[here, mine[here] - lo] = -torch.inf
        better += (scores >= own[:, None] - TIE).sum(1)
        top = torch.maximum(top, scores.amax(1))
    return own.cpu(), better.cpu(), top.cpu()


def _own_scores(block: Tensor, identity: Tensor, enrolment: _Gallery, tile: int) -> Tensor:
    """The best cosine of each probe with an image of its own identity, `[b]`; 0 where there is none."""
    own = block.new_zeros(len(block))
    known = (identity >= 0).nonzero().flatten()
    for wanted in identity[known].unique().tolist():
        probes = known[identity[known] == wanted].to(block.device)
        own[probes] = enrolment.scores(block[probes], wanted, wanted + 1, tile)[:, 0]
    return own


def _figures(
    name: str,
    mated: Tensor,
    own: Tensor,
    better: Tensor,
    top: Tensor,
    ranks: Sequence[int],
    enrolled: int,
    distractors: int,
) -> Result:
    found, first = better[mated], (better[mated] == 0)
    strangers = torch.where(mated, torch.nan, top)[~mated].sort(descending=True).values
    figures: dict[str, float | None] = {f"rank-{k}": float((found < k).double().mean()) for k in ranks}
    thresholds: dict[str, float | None] = {}
    curves = {
        "cmc": [
            (float(k), float((found < k).double().mean())) for k in range(1, min(CURVE, enrolled + distractors) + 1)
        ]
    }
    if len(strangers):
        curves["dir"] = _open_set_curve(strangers, own[mated][first].double(), len(found))
    for key, fpir in FPIRS.items():
        allowed = int(fpir * len(strangers) + 1e-6)
        figures[f"dir@{key}"] = thresholds[f"dir@{key}"] = None
        if allowed:
            # strictly above the highest score that must not pass: at a tie with it none passes
            barred = strangers[allowed] if allowed < len(strangers) else torch.tensor(-2.0)
            figures[f"dir@{key}"] = float((first & (own[mated] > barred)).double().mean())
            thresholds[f"dir@{key}"] = float(torch.nextafter(barred, torch.tensor(2.0)))
    counts = {
        "mated probes": len(found),
        "other probes": len(strangers),
        "identities": enrolled,
        "distractors": distractors,
    }
    return Result("identification", name, counts, figures, thresholds, curves=curves)


def _open_set_curve(strangers: Tensor, own: Tensor, mated: int) -> list[tuple[float, float]]:
    """Points (FPIR, DIR) of rising FPIR > 0, at most `DIR_POINTS`, evenly thinned in log FPIR; the last accepts everything.

    strangers: the highest scores of the other probes, falling; own: those of the mated probes that come first.
    """
    scores, count = strangers.double(), len(strangers)
    allowed = (
        torch.logspace(0, math.log10(count), DIR_POINTS, dtype=torch.float64).round().long().clamp_(1, count).unique()
    )
    barred = torch.cat((scores, scores.new_tensor([-2.0])))[allowed]  # as of the figures: only what is above it passes
    passed = torch.searchsorted(-scores, -barred)  # how many of the strangers are above it
    hits = len(own) - torch.searchsorted(own.sort().values, barred, right=True)
    return [(p / count, h / mated) for p, h in dict(zip(passed.tolist(), hits.tolist(), strict=True)).items() if p]
