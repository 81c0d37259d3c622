"""The threshold of a gallery: the cosine that a stranger reaches with an identity in at most the share FAR of cases.

embeddings [n, D] of a data set with identities   ── enrolled as the gallery does: mean, or all ──>
  every image x every other identity of the set   ──>  impostor cosines   ──>  threshold at FAR
  every image x its own identity without it       ──>  genuine cosines    ──>  TAR: the share accepted
  images of identities that are not enrolled      ── search of the gallery ──>  FPIR: the share that finds somebody

FAR counts comparisons of an image with one identity. A search compares with all of the gallery, so a stranger finds
somebody more often: about 1 − (1 − FAR)^N of N identities, if these were independent. FPIR (ISO/IEC 19795-1: false
positive identification rate) is that share, measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import BINS, FOLDS, GENUINE, IMPOSTOR, MIN_FALSE_ACCEPTS, PairHistograms, bins_of

TILE_BYTES = 64 << 20  # of the cosines of some images with all identities, or images, of the set


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it was measured on. Rates are shares in [0, 1]."""

    threshold: float
    """The lowest cosine that is accepted."""
    far: float | None
    """The share of comparisons with another identity that are accepted at most; None if FPIR was asked for."""
    tar: float | None
    """The share of images that their own identity accepts; None if no identity has two images."""
    comparisons: int
    """Comparisons of an image with another identity."""
    images: int
    identities: int
    fpir: float | None
    """The share of searches by strangers that find somebody in the gallery; None if all identities are enrolled."""
    strangers: int
    """Images of identities that are not enrolled, by which FPIR was measured."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """Return a text for the terminal."""
        lines = [
            f"threshold {self.threshold:.4f}, by {self.images:,} images of {self.identities:,} identities "
            f"({self.comparisons:,} comparisons with another identity)"
        ]
        if self.far is not None:
            lines.append(f"  FAR at most {self.far:g}")
        if self.tar is not None:
            lines.append(f"  {self.tar:.2%} of the images are accepted by their own identity (TAR)")
        if self.fpir is not None:
            lines.append(f"  {self.fpir:.2%} of {self.strangers:,} searches by strangers find somebody (FPIR)")
        return "\n".join(lines)


def template_histograms(unit: Tensor, labels: Tensor, *, mean: bool) -> PairHistograms:
    """Return histograms of the cosines of images with identities: genuine ones, and impostors.

    unit: unit embeddings `[n, D]`; labels: int64 `[n]`. mean: an identity's cosine is that of the image with the mean
    of its images, else the largest of those with its images. An image is left out of its own identity. Raises UserError
    if there is only one identity.
    """
    order = labels.argsort(stable=True)
    unit = unit[order]
    _, owners, counts = labels[order].unique_consecutive(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise UserError(
            "all images are of one identity, so that there is no impostor; give images of several identities"
        )
    starts = (counts.cumsum(0) - counts).numpy()
    totals = torch.zeros(len(counts), unit.shape[1]).index_add_(0, owners, unit)
    templates = F.normalize(totals, dim=1) if mean else unit
    histogram = torch.zeros(2, BINS, dtype=torch.int64)
    for here in torch.arange(len(unit)).split(max(1, TILE_BYTES // (4 * len(templates)))):
        cosines = unit[here] @ templates.T
        own = owners[here]
        if mean:
            genuine = (unit[here] * F.normalize(totals[own] - unit[here], dim=1)).sum(1)
        else:
            cosines[torch.arange(len(here)), here] = -torch.inf
            cosines = torch.from_numpy(np.maximum.reduceat(cosines.numpy(), starts, axis=1))
            genuine = cosines.gather(1, own[:, None])[:, 0]
        impostor = torch.ones_like(cosines, dtype=torch.bool)
        impostor[torch.arange(len(here)), own] = False
        histogram[GENUINE] += torch.bincount(bins_of(genuine[counts[own] > 1]), minlength=BINS)
        histogram[IMPOSTOR] += torch.bincount(bins_of(cosines[impostor]), minlength=BINS)
    every = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    every[:, 0] = histogram
    return PairHistograms(every)


def smallest_rate(count: int) -> float | None:
    """Return the smallest share that so many comparisons, or searches, can set a threshold for, rounded up to two
    digits; None if they are too few for any."""
    if count <= MIN_FALSE_ACCEPTS:
        return None
    exact = MIN_FALSE_ACCEPTS / count
    step = 10.0 ** (math.floor(math.log10(exact)) - 1)
    rounded = math.ceil(exact / step - 1e-9) * step
    return float(f"{rounded:.1e}") if rounded < 1 else None


def _or_rate(option: str, count: int) -> str:
    rate = smallest_rate(count)
    return "" if rate is None else f", or ask for a larger share: {option} {rate:g}"


def threshold_for_far(histograms: PairHistograms, far: float) -> float:
    """Return the lowest cosine that at most the share `far` of impostors reaches. UserError if there are too few."""
    if not 0 < far < 1:
        raise UserError(f"the false accept rate is {far}; give a share between 0 and 1, such as 1e-4")
    threshold = histograms.threshold_at_far(far)
    if threshold is None:
        count = histograms.impostor_pairs
        raise UserError(
            f"{count:,} comparisons with another identity are too few for a false accept rate of {far:g}: "
            f"{MIN_FALSE_ACCEPTS} must be accepted; give more images{_or_rate('--far', count)}"
        )
    return threshold


def threshold_for_fpir(best: Tensor, fpir: float) -> float:
    """Return a cosine that at most the share `fpir` of the strangers' `best` cosines `[m]` reaches, at m·fpir ≥ 10."""
    if not 0 < fpir < 1:
        raise UserError(f"the false positive identification rate is {fpir}; give a share between 0 and 1, such as 0.01")
    if len(best) * fpir < MIN_FALSE_ACCEPTS - 1e-6:
        raise UserError(
            f"{len(best):,} images of strangers are too few for a false positive identification rate of {fpir:g}: "
            f"{MIN_FALSE_ACCEPTS} must find somebody; give images of more identities that are not enrolled"
            f"{_or_rate('--fpir', len(best))}"
        )
    first_refused = best.sort(descending=True).values[int(len(best) * fpir + 1e-6)]
    return float(np.nextafter(np.float32(first_refused), np.float32(2)))


def accepted_share(histograms: PairHistograms, threshold: float) -> float | None:
    """Return the share of genuine cosines that reach the threshold; None if there is none."""
    genuine = histograms.counts[GENUINE].sum(0)
    total = int(genuine.sum())
    first = int(np.ceil((threshold + 1) * (BINS / 2) - 1e-6))
    return None if total == 0 else int(genuine[first:].sum()) / total
