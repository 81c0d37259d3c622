"""Open-set evaluation of a recogniser: verification over all pairs, identification at rank 1.

The evaluated identities were not trained on, so the classification head is not used: only the cosine between two
embeddings counts. For `n` images with `D`-dimensional embeddings:

    embeddings [n, D], labels [n]    normalised to unit length in float32; labels renumbered 0..identities-1
      -> tiles [tile, tile]          cosines of every unordered pair i < j, one tile of the upper triangle at a time
      -> counts [2, FOLDS, BINS]     int64 histograms: (genuine | impostor) x fold of the pair x bin of the cosine
      -> figures                     TAR at FAR, EER, accuracy over 10 folds, ROC points: from the histograms alone
      -> hits, probes                rank 1: nearest gallery image of each probe, tiled in the same way

Memory is O(n D + tile^2 + BINS), never n^2: 100,000 images have 5e9 pairs, but the counts take 21 MB as for any other
n. Tiles are assigned to ranks round-robin, and every rank holds all embeddings. The counts of the ranks are integers,
so their sum is exact.

Resolution. `BINS` equal bins over [-1, 1] give thresholds a resolution of 2 / BINS = 1.5e-5 in cosine. A threshold is
the lower edge of a bin, so the pairs of one bin are either all accepted or all rejected. If accepting a bin would raise
the FAR above the requested one, the bin is rejected: the FAR reached is never above the one requested. Cosines are
float32 products; if the caller has enabled TF32, its error (about 1e-3) is larger than that of the bins.

Folds. A pair belongs to the fold of its lower-numbered identity, modulo 10. Two folds never share the identity of a
genuine pair. An impostor pair may contain an identity of another fold; no split of *all* pairs can avoid this.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations_with_replacement, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from partial_fc.training.errors import UserError, check_at_least

BINS = 2**17  # of the cosine over [-1, 1]
FOLDS = 10
FARS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}  # printed name -> false accept rate
MIN_FALSE_ACCEPTS = 10  # a TAR is not reported if fewer false accepts are expected
CURVE_BINS = 256  # of the histograms kept for plotting; a divisor of BINS
ROC_POINTS = 500
GENUINE, IMPOSTOR = 0, 1  # first index of the counts


@dataclass
class PairHistograms:
    """Histograms of the cosines of all pairs, and the figures computed from them.

    `counts` is int64 `[2, FOLDS, BINS]`: genuine (0) or impostor (1), fold of the pair, bin of the cosine. The sum of
    the ranks' counts (`+`, or an all-reduce of `counts`) is the histogram of all pairs.
    """

    counts: Tensor

    def __add__(self, other: "PairHistograms") -> "PairHistograms":
        return PairHistograms(self.counts + other.counts)

    @property
    def genuine_pairs(self) -> int:
        return int(self.counts[GENUINE].sum())

    @property
    def impostor_pairs(self) -> int:
        return int(self.counts[IMPOSTOR].sum())

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Return TAR and FAR, float64 `[BINS + 1]` each, with every bin edge from -1 to 1 as the threshold."""
        genuine, impostor = accepted(self.counts.sum(1)).double()
        return genuine / genuine[0], impostor / impostor[0]

    def _bin_at_far(self, far: float, least: int) -> int | None:
        """Return the lowest bin edge that accepts at most the share `far` of impostors; None as in `tar_at_far`."""
        impostor = accepted(self.counts[IMPOSTOR].sum(0))
        allowed = far * float(impostor[0]) + 1e-6  # 1e-5 * 1e6 must count as 10 in spite of rounding
        return int((impostor > int(allowed)).sum()) if allowed >= least else None

    def threshold_at_far(self, far: float, least: int = MIN_FALSE_ACCEPTS) -> float | None:
        """Return the lowest cosine that accepts at most the share `far` of impostors; None as in `tar_at_far`."""
        edge = self._bin_at_far(far, least)
        return None if edge is None else -1 + 2 * edge / BINS

    def tar_at_far(self, far: float, least: int = MIN_FALSE_ACCEPTS) -> float | None:
        """Return the share of accepted genuine pairs where at most the share `far` of impostors is accepted.

        Return None if that share of the impostor pairs is fewer than `least` pairs: a threshold set by a handful of
        pairs is not a reliable estimate. FAR 1e-5 thus needs a million impostor pairs. Published protocols with fixed
        pairs (protocols/pairs.py) pass a smaller `least`.
        """
        edge = self._bin_at_far(far, least)
        return None if edge is None else float(self._rates()[0][edge])

    def eer(self) -> float:
        """Return the equal error rate: FAR where it equals 1 - TAR, interpolated linearly between bin edges."""
        tar, far = self._rates()
        gap = far - (1 - tar)  # falls from 1 (all accepted) to -1 (none accepted)
        after = int((gap > 0).sum())
        before = after - 1
        weight = gap[before] / (gap[before] - gap[after])
        return float(far[before] + weight * (far[after] - far[before]))

    def min_dcf(self, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
        """Return the least detection cost over all bin edges, as in NIST's speaker recognition evaluations.

        The cost is c_miss · p_target · (1 - TAR) + c_fa · (1 - p_target) · FAR, over that of the better of accepting
        all and rejecting all, so it is at most 1. All pairs are trials.
        """
        if not 0 < p_target < 1 or not (c_miss > 0 and c_fa > 0):
            raise ValueError(f"p_target must be in (0, 1) and costs above 0, not {p_target!r}, {c_miss!r}, {c_fa!r}")
        tar, far = self._rates()
        miss, false_accept = c_miss * p_target, c_fa * (1 - p_target)
        return float((miss * (1 - tar) + false_accept * far).min()) / min(miss, false_accept)

    def accuracy(self) -> tuple[float, float] | None:
        """Return mean and standard deviation (population) over 10 folds of the accuracy at the best threshold.

        The threshold of a fold is the best one on the other nine; if several are equally good, the middle one of them.
        Genuine and impostor pairs have equal weight: accuracy = (TAR + 1 - FAR) / 2, as in the balanced protocol of LFW
        (3,000 pairs of each; Huang et al., 2007). Otherwise "reject all" would score above 99 % here. A fold without
        genuine or without impostor pairs, as happens with fewer than ten identities, is skipped; None if all are.
        """
        counts = accepted(self.counts).double()
        total = counts.sum(1)
        scores = []
        for fold in range(FOLDS):
            tested = counts[:, fold]
            others = total - tested
            if tested[:, 0].min() == 0 or others[:, 0].min() == 0:
                continue
            objective = others[GENUINE] / others[GENUINE, 0] - others[IMPOSTOR] / others[IMPOSTOR, 0]  # TAR - FAR
            best = (objective >= objective.max() - 1e-12).nonzero().flatten()
            edge = int(best[len(best) // 2])
            tar, far = (tested[:, edge] / tested[:, 0]).tolist()
            scores.append((tar + 1 - far) / 2)
        if not scores:
            return None
        values = torch.tensor(scores, dtype=torch.float64)
        return float(values.mean()), float(values.std(correction=0))

    def roc(self) -> list[tuple[float, float]]:
        """Return at most `ROC_POINTS` points (FAR, TAR) with rising FAR > 0, evenly spaced in log FAR, up to (1, 1)."""
        tar, far = self._rates()
        wanted = torch.logspace(0, -float(torch.tensor(self.impostor_pairs).log10()), ROC_POINTS, dtype=torch.float64)
        # The first edge whose FAR is at most the wanted one. FAR falls with the edge, so search in -FAR, which rises.
        edges = torch.searchsorted(-far, -wanted * (1 + 1e-9)).unique()
        return [(float(far[edge]), float(tar[edge])) for edge in edges.flip(0) if far[edge] > 0]

    def curves(self) -> dict[str, list[int]]:
        """Return the counts of "genuine" and "impostor" pairs in `CURVE_BINS` equal bins over [-1, 1]."""
        genuine, impostor = self.counts.sum(1).view(2, CURVE_BINS, -1).sum(-1).tolist()
        return {"genuine": genuine, "impostor": impostor}


@dataclass
class Evaluation:
    """All figures of one evaluation set. Rates are shares in [0, 1]; None if the data set is too small for a figure.

    `tar` and `thresholds` (cosines) have the keys of `FARS`; `accuracy_std` is the deviation over folds; `roc` holds
    points (FAR, TAR); the two histograms hold pair counts in `CURVE_BINS` equal bins of the cosine over [-1, 1].
    """

    name: str
    images: int
    identities: int
    genuine_pairs: int
    impostor_pairs: int
    tar: dict[str, float | None]
    thresholds: dict[str, float | None]
    eer: float
    accuracy: float | None
    accuracy_std: float | None
    rank1: float
    probes: int
    roc: list[tuple[float, float]]
    genuine_histogram: list[int]
    impostor_histogram: list[int]

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """Return the fields as JSON-ready values, with `roc` and the histograms if `curves`."""
        fields = asdict(self) | {"roc": [list(point) for point in self.roc]}
        return {key: value for key, value in fields.items() if curves or key not in _CURVES}

    def summary(self) -> str:
        """Return a text table for the terminal, with "—" for None."""
        deviation = "" if self.accuracy_std is None else f" ± {100 * self.accuracy_std:.2f}"
        rows = [(f"TAR @ FAR {name}", percent(tar)) for name, tar in self.tar.items()]
        rows += [
            ("EER", percent(self.eer)),
            ("accuracy (10 folds)", percent(self.accuracy) + deviation),
            ("rank-1", percent(self.rank1) + f"   of {self.probes:,} probes, gallery {self.identities:,}"),
        ]
        head = (
            f"{self.name}: {self.images:,} images of {self.identities:,} identities, "
            f"{self.genuine_pairs:,} genuine and {self.impostor_pairs:,} impostor pairs"
        )
        return "\n".join([head, *(f"  {key:<20}{value}" for key, value in rows)])


_CURVES = ("roc", "genuine_histogram", "impostor_histogram")


def evaluate_embeddings(
    embeddings: Tensor,
    labels: Tensor,
    *,
    name: str,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    device: torch.device | None = None,
) -> Evaluation:
    """Return all figures for `embeddings` `[n, D]` of the identities `labels` `[n]`, under the display name `name`.

    With several ranks, each calls with the same embeddings and its own `rank`; `reduce` returns the sum of an int64
    tensor over ranks (two calls: 21 MB of counts, and two numbers), and every rank returns the same Evaluation.
    Embeddings need not be normalised; one of zero length has cosine 0 with all others. A tile of `tile` x `tile` pairs
    is compared at a time and takes about 60 bytes per pair. device: where tiles are computed, by default the device of
    the embeddings; only what a tile needs is copied there.

    Raises UserError for non-finite embeddings, different lengths, or labels without a genuine or without an impostor
    pair.
    """
    share: dict[str, Any] = {"tile": tile, "rank": rank, "world": world, "device": device}
    pairs = pair_histograms(embeddings, labels, progress=progress, **share)
    hits_probes = torch.tensor(rank1(embeddings, labels, **share), device=pairs.counts.device)
    if reduce is not None:
        pairs = PairHistograms(reduce(pairs.counts))
        hits_probes = reduce(hits_probes)
    hits, probes = hits_probes.tolist()
    accuracy, deviation = pairs.accuracy() or (None, None)
    histograms = pairs.curves()
    return Evaluation(
        name=name,
        images=len(labels),
        identities=len(labels.unique()),
        genuine_pairs=pairs.genuine_pairs,
        impostor_pairs=pairs.impostor_pairs,
        tar={key: pairs.tar_at_far(far) for key, far in FARS.items()},
        thresholds={key: pairs.threshold_at_far(far) for key, far in FARS.items()},
        eer=pairs.eer(),
        accuracy=accuracy,
        accuracy_std=deviation,
        rank1=hits / probes,
        probes=probes,
        roc=pairs.roc(),
        genuine_histogram=histograms["genuine"],
        impostor_histogram=histograms["impostor"],
    )


def pair_histograms(
    embeddings: Tensor,
    labels: Tensor,
    *,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
    device: torch.device | None = None,
) -> PairHistograms:
    """Return histograms of this rank's share of all pairs i < j of `embeddings` `[n, D]`, identities `labels` `[n]`.

    Tile t of the upper triangle belongs to rank t mod `world`. `progress` shows a bar over this rank's tiles. device
    and errors are those of `evaluate_embeddings`.
    """
    unit, identities = _prepare(embeddings, labels, tile)
    blocks = list(zip(unit.split(tile), identities.split(tile), strict=True))
    own_tiles = list(islice(combinations_with_replacement(range(len(blocks)), 2), rank, None, world))
    device = unit.device if device is None else device
    counts = torch.zeros(2 * FOLDS * BINS, dtype=torch.int64, device=device)
    for i, j in tqdm(own_tiles, desc="pairs", unit="tile", disable=not progress, leave=False):
        rows, row_ids, columns, column_ids = (part.to(device) for part in (*blocks[i], *blocks[j]))
        bins = bins_of(cosine_tile(rows, columns))
        different = row_ids[:, None] != column_ids
        fold = torch.minimum(row_ids[:, None], column_ids) % FOLDS
        index = (different * FOLDS + fold) * BINS + bins  # GENUINE = 0, IMPOSTOR = 1
        if i == j:  # on the diagonal, only the pairs i < j
            index = index[torch.ones_like(different).triu(1)]
        index = index.flatten()
        counts.scatter_add_(0, index, torch.ones_like(index))
    return PairHistograms(counts.view(2, FOLDS, BINS))


def rank1(
    embeddings: Tensor,
    labels: Tensor,
    *,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
) -> tuple[int, int]:
    """Closed-set identification: return `(hits, probes)` of this rank's share of the probes.

    The rank-1 rate is the sum of hits over ranks divided by that of probes. The gallery is the first image of each
    identity in the order of `embeddings` `[n, D]`; the probes are all other images. A probe is a hit if its nearest
    gallery embedding (the first, if several are equally near) is of its own identity. An identity with a single image
    is only a distractor in the gallery. device and errors are those of `evaluate_embeddings`.
    """
    unit, identities = _prepare(embeddings, labels, tile)
    count = int(identities.max()) + 1
    positions = torch.arange(len(unit), device=unit.device)
    first = positions.new_full((count,), len(unit)).scatter_reduce_(0, identities, positions, "amin")
    gallery = unit[first]  # [identities, D]
    probes = (positions != first[identities]).nonzero().flatten()
    hits = total = 0
    for chosen in probes.split(tile)[rank::world]:
        searched = unit[chosen].to(unit.device if device is None else device)
        best = searched.new_full((len(chosen),), -torch.inf)
        nearest = torch.zeros_like(best, dtype=torch.int64)
        for start in range(0, count, tile):
            value, index = cosine_tile(searched, gallery[start : start + tile].to(searched.device)).max(1)
            nearest = torch.where(value > best, index + start, nearest)
            best = torch.maximum(value, best)
        hits += int((nearest == identities[chosen].to(nearest.device)).sum())
        total += len(chosen)
    return hits, total


def bins_of(cosines: Tensor) -> Tensor:
    """Return the bin of each cosine, 0..BINS-1: int64, of the same shape."""
    return ((cosines + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)


def accepted(counts: Tensor) -> Tensor:
    """Return how many pairs of `counts` `[..., BINS]` lie at or above each bin edge: `[..., BINS + 1]`, on the CPU."""
    return F.pad(counts.cpu().flip(-1).cumsum(-1).flip(-1), (0, 1))


def cosine_tile(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the cosines `[rows, columns]` of unit embeddings."""
    return rows @ columns.T


def _prepare(embeddings: Tensor, labels: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Return unit float32 embeddings `[n, D]` and identities `[n]` numbered from 0. Raises UserError if invalid."""
    if embeddings.ndim != 2 or labels.ndim != 1 or len(embeddings) != len(labels):
        raise UserError(
            f"embeddings {list(embeddings.shape)} and labels {list(labels.shape)} do not match: "
            "give embeddings [n, D] and one label per image [n]"
        )
    if tile < 1:
        raise UserError(f"the evaluation tile is {tile}; give at least 1 image per side (2048 is usual)")
    if len(labels) < 2:
        raise UserError(
            f"{len(labels)} image(s) make no pair; evaluate on at least two identities, one of them with two images"
        )
    check_finite(embeddings)
    names, identities = labels.to(embeddings.device).unique(return_inverse=True)
    if len(names) == 1:
        raise UserError("all images are of one identity, so there is no impostor pair; add images of other identities")
    if len(names) == len(labels):
        raise UserError("no identity has two images, so there is no genuine pair; add images or check the labels")
    return F.normalize(embeddings.detach().float(), dim=1), identities


def check_finite(embeddings: Tensor) -> None:
    """Raise UserError if some of the `embeddings` `[n, D]` hold NaN or infinity."""
    bad = int((~embeddings.isfinite().all(1)).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(embeddings)} embeddings are not finite: the model has diverged, or its values overflow; "
            "evaluate an earlier checkpoint, or lower the learning rate and train again"
        )


def percent(share: float | None) -> str:
    """Return a share as a percentage, or "—" for None."""
    return "—" if share is None else f"{100 * share:.2f} %"


@dataclass
class EvaluationConfig:
    """Verification, identification and retrieval, after training and during it."""

    batch_size: int = 512
    """Images of a forward, over all ranks."""
    tile: int = 2048
    """Side of the tiles in which pairs are compared, in images."""
    verification: list[str] = field(default_factory=list)
    """Files of image pairs (`lfw.bin`, `cfp_fp.bin`, ...) to verify, each under its name without the ending."""
    templates: str | None = None
    """Folder of a template protocol (IJB-C): images/, *face_tid_mid.txt, *template_pair_label.txt; null for none."""
    align: bool = True
    """Align the faces of `templates` by the points of *name_5pts_score.txt, if it exists; false for aligned images."""
    identification: str | None = None
    """Folder with gallery/, probes/, optionally distractors/, each with identity sub-folders; null for none."""
    retrieval: str | None = None
    """Folder with query/, and gallery/ or bounding_box_test/: with identity sub-folders, or files that `label_pattern`
    matches; null for none."""
    label_pattern: str | None = None
    """Regular expression that finds the identity in a file's name, for a retrieval folder without sub-folders."""
    camera_pattern: str | None = None
    """Regular expression that finds the camera in a file's name; retrieval then skips the query's own camera."""
    flip: bool = True
    """Verify with the sum of the embeddings of an image and of its mirror image, as is usual for faces."""
    every: int | None = None
    """Epochs between two evaluations during training; null for only the one at the end."""
    every_steps: int | None = None
    """Optimizer steps between two evaluations during training, within epochs too; null for none."""
    best: str | None = None
    """Figure whose best checkpoint is kept beside the newest: lfw/accuracy, holdout/tar@1e-3, ...; null for none."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        check_at_least("evaluation.batch_size", self.batch_size, 1)
        check_at_least("evaluation.tile", self.tile, 1)
        for name in ("every", "every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--evaluation.{name} is {value}; give at least 1, or null for none")
        if self.best is not None and self.every is None and self.every_steps is None:
            raise UserError(
                f"--evaluation.best {self.best} needs evaluations during training; give --evaluation.every as well"
            )
