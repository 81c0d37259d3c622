"""What a trained head says of its data: identities stored twice, classes that never moved, classes far from their own images.

    images ── backbone ──> unit embeddings ── summed by the rank that owns the class ──>  mean direction [C_local, D] of each class
    head rows, mean directions     ── nearest_classes ──>        the nearest other classes of each  ──>  pairs beyond a threshold
    head rows, initial draw        ── equal bit for bit? ──>     classes that no step has touched
    head rows, mean directions     ── cosine ──>                 classes whose row is not where their images are
    numbers of every class [C, 6]  ── gather ──>                 the audit folder: audit.json, three CSV files, plots, report.html

Matrices stay on the ranks that hold them; a few numbers of a class travel. Images are taken as they are, without augmentation.

Pairs are looked for twice. Rows of an identity that is stored under two names are near each other, but the loss has pushed them apart as it
does all rows; the means of its images are nearer. A pair is reported if either cosine is beyond its threshold. A threshold that is not
given is taken from the run itself: Q3 + 3 (Q3 − Q1), Tukey's outer fence, of all classes' cosines to their nearest class, in artanh of the
cosine (Fisher's z), in which cosines near 1 spread as others do. A clean set may have no pair beyond it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from partial_fc import CenterLoss, Neighbours, PartialFC, gather
from partial_fc.sharded_module import initial_rows
from partial_fc.shards import local_part, shard_bounds
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, UnreadableImage
from partial_fc.training.errors import UserError
from partial_fc.training.results import once_through, raise_together
from partial_fc.training.run import RunFolder

NEIGHBOURS = (
    10  # of each class that are looked at: an identity stored under more names than that is told in several pairs
)
BLOCK = 1024  # rows that are compared at a time
SHOWN_PAIRS, SHOWN_CLASSES, SHOWN_IMAGES = 20, 12, 4  # on the page
LIMIT = 1 - 1e-12  # of cosines whose artanh is taken
DUPLICATES, UNMOVED, DRIFT = "duplicates.csv", "never_updated.csv", "drift.csv"


@dataclass
class Pair:
    """Two classes (a < b), the cosine of their rows and of the means of their images: NaN for what is not among the nearest."""

    a: int
    b: int
    row: float
    mean: float


@dataclass
class Nearest:
    """By one of the two measures: the nearest other class of each class, its cosine `[C]` (NaN: no image), and where reports begin."""

    cosine: Tensor
    of_class: Tensor
    threshold: float


@dataclass
class Audit:
    """What was found, by class id; the same on every rank.

    rows, means: the nearest class by head rows and by mean directions. to_mean `[C]`: cosine of a class's row to the mean direction of its
    images, NaN where none could be read; images `[C]`: how many could; moved `[C]`: False where the row is the initial draw.
    pairs: the farthest beyond a threshold first; all that are beyond one, and others, so that there are `SHOWN_PAIRS` to look at.
    """

    rows: Nearest
    means: Nearest
    pairs: list[Pair]
    to_mean: Tensor
    images: Tensor
    moved: Tensor

    def beyond(self, pair: Pair) -> float:
        """By how much the pair is beyond the threshold of rows or of means, whichever it is farther beyond; in artanh of the cosine."""
        over = _z(pair.row) - _z(self.rows.threshold), _z(pair.mean) - _z(self.means.threshold)
        return max(each for each in over if not math.isnan(each))

    @property
    def duplicates(self) -> list[Pair]:
        return [pair for pair in self.pairs if self.beyond(pair) >= 0]

    @property
    def never_updated(self) -> list[int]:
        return (~self.moved).nonzero()[:, 0].tolist()

    @property
    def drifted(self) -> list[int]:
        """Classes with a mean direction, the farthest from it first."""
        order = self.to_mean.argsort(stable=True)
        return order[~self.to_mean[order].isnan()].tolist()

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"likely duplicate identities   {len(self.duplicates):,} pairs, of rows nearer than {self.rows.threshold:.3f} "
            f"or means nearer than {self.means.threshold:.3f}",
            f"classes never updated         {len(self.never_updated):,}",
        ]
        known = self.to_mean[~self.to_mean.isnan()]
        if len(known):
            low, middle = _quantiles(known, (0.01, 0.5))
            lines.append(
                f"row to mean of its images     cosine {middle:.3f} in the middle, {low:.3f} at the lowest 1 %"
            )
        return "\n".join(lines)


@dataclass
class Thresholds:
    """Cosines from which pairs are reported; None for what the run itself says."""

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
    """Everything of an `Audit`; every rank must call it. Raises UserError, the same on every rank, for an image that must be readable, and
    for a single class."""
    classes = dataset.num_identities
    if classes < 2:
        raise UserError("the run has one class only, which has nothing to be compared with")
    lo, hi = shard_bounds(classes, accelerator.process_index, accelerator.num_processes)
    centers, images = _class_means(backbone, dataset, accelerator, config)
    rows, means = local_part(head.weight.detach()), local_part(centers.centers.detach())
    has_mean = images[lo:hi] > 0
    to_mean = torch.where(has_mean, _cosines(rows, means), torch.nan)
    moved = _moved(rows, lo, std=config.head.init_std, seed=config.seed)
    k = min(NEIGHBOURS, classes - 1)
    of_rows = head.nearest_classes(k, progress=True)
    of_means = centers.nearest_classes(k, progress=True)
    # a class without images has no mean: it is nobody's neighbour and has none
    known = has_mean[:, None] & (images > 0)[of_means.ids]
    of_means = Neighbours(of_means.ids, torch.where(known, of_means.cosines, torch.nan))
    numbers = [of_rows.cosines[:, 0], of_rows.ids[:, 0], of_means.cosines[:, 0], of_means.ids[:, 0], to_mean, moved]
    together = gather(torch.stack([each.double() for each in numbers], 1), torch.arange(lo, hi, device=rows.device))
    row_cosine, row_class, mean_cosine, mean_class, to_mean, moved = together.embeddings.cpu().unbind(1)
    audit = Audit(
        Nearest(row_cosine, row_class.long(), _outer_fence(row_cosine) if thresholds.rows is None else thresholds.rows),
        Nearest(
            mean_cosine, mean_class.long(), _outer_fence(mean_cosine) if thresholds.means is None else thresholds.means
        ),
        [],
        to_mean,
        images.cpu(),
        moved > 0,
    )
    by_row, by_mean = _near(of_rows, lo, audit.rows), _near(of_means, lo, audit.means)
    pairs = [
        Pair(a, b, by_row.get((a, b), math.nan), by_mean.get((a, b), math.nan))
        for a, b in by_row.keys() | by_mean.keys()
    ]
    audit.pairs = sorted(pairs, key=lambda pair: (-audit.beyond(pair), pair.a, pair.b))
    audit.pairs = audit.pairs[: max(SHOWN_PAIRS, len(audit.duplicates))]
    return audit


def _near(found: Neighbours, lo: int, nearest: Nearest) -> dict[tuple[int, int], float]:
    """Pairs of every rank with their cosine: those beyond the threshold, or beyond what is needed to have some to show."""
    some = nearest.cosine[~nearest.cosine.isnan()]
    least = min(
        [nearest.threshold, *some.topk(min(2 * SHOWN_PAIRS, len(some))).values[-1:].tolist()]
    )  # a pair may be the nearest of both
    row, place = (found.cosines >= least).nonzero(as_tuple=True)
    everyone = gather(torch.stack((found.ids[row, place].double(), found.cosines[row, place].double()), 1), row + lo)
    pairs: dict[tuple[int, int], float] = {}
    for a, (other, cosine) in zip(everyone.labels.tolist(), everyone.embeddings.tolist(), strict=True):
        b = int(other)
        pairs[min(a, b), max(a, b)] = max(cosine, pairs.get((min(a, b), max(a, b)), -1.0))
    return pairs


def _outer_fence(cosines: Tensor) -> float:
    """Q3 + 3 (Q3 − Q1) in artanh; 1 where no class has a nearest."""
    known = cosines[~cosines.isnan()]
    if not len(known):
        return 1.0
    low, high = (_z(each) for each in _quantiles(known, (0.25, 0.75)))
    return math.tanh(high + 3 * (high - low))


def _z(cosine: float) -> float:
    """artanh, in which cosines near 1 spread as others do; finite, and NaN of NaN."""
    return cosine if math.isnan(cosine) else math.atanh(max(-LIMIT, min(cosine, LIMIT)))


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """The nearest ranks of `values [n]`, n above 0; torch.quantile refuses more than 16 million."""
    ordered = values.sort().values
    return [float(ordered[round(share * (len(values) - 1))]) for share in shares]


def _class_means(
    backbone: nn.Module, dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig
) -> tuple[CenterLoss, Tensor]:
    """Mean directions of the classes `[C, D]`, on the ranks as the head's rows are; the readable images of every class `[C]`."""
    loader = once_through(dataset, accelerator, config)
    images = torch.zeros(dataset.num_identities, dtype=torch.int64, device=accelerator.device)
    problem: list[str] = []

    def embedded() -> Iterator[tuple[Tensor, Tensor]]:
        bar = tqdm(loader, desc="embedding", unit="batch", disable=not accelerator.is_main_process, mininterval=0.5)
        try:
            for batch in bar:
                if len(batch.labels):
                    labels = batch.labels.to(accelerator.device)
                    images.add_(torch.bincount(labels, minlength=len(images)))
                    with accelerator.autocast():
                        embeddings = backbone(batch.images.to(accelerator.device))
                    yield F.normalize(embeddings.float()), labels
        except UserError as error:  # the other ranks go on with their images; then all hear of it
            problem.append(str(error))

    centers = CenterLoss(
        config.backbone.embedding_size, dataset.num_identities, init_std=0.0, device=accelerator.device
    )
    backbone.eval()
    with torch.no_grad():
        centers.init_from_embeddings(embedded())
    raise_together(problem[0] if problem else None, accelerator)
    if accelerator.num_processes > 1:
        dist.all_reduce(images)
    return centers, images


def _cosines(rows: Tensor, means: Tensor) -> Tensor:
    """`[C_local]`: of each row `[D]`, or the best of its centers `[K, D]`, to its mean direction; 0 where either has none."""
    parts = [torch.empty(0, dtype=torch.float32, device=rows.device)]
    for block, of_images in zip(rows.split(BLOCK), means.split(BLOCK), strict=True):
        several = block if block.ndim == 3 else block[:, None]
        parts.append(F.cosine_similarity(several.float(), of_images[:, None].float(), dim=2).amax(1))
    return torch.cat(parts)


def _moved(rows: Tensor, lo: int, *, std: float, seed: int) -> Tensor:
    """`[C_local]`: whether the row, of class `lo` and following, differs in any bit from what `seed` drew for it."""
    parts = [torch.empty(0, dtype=torch.bool, device=rows.device)]
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK]
        drawn = initial_rows(lo + first, lo + first + len(block), tuple(block.shape[1:]), std=std, seed=seed)
        parts.append((block != drawn.to(block)).flatten(1).any(1))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------- the folder


def write_audit(
    folder: RunFolder, audit: Audit, dataset: IdentityDataset, title: str, environment: dict[str, str]
) -> Path:
    """audit.json, the CSV files, plots/ and report.html in `folder`, by one process; the path of the last."""
    names, path = dataset.identity_names, folder.path
    (path / "plots").mkdir(parents=True, exist_ok=True)
    _write_csv(
        path / DUPLICATES,
        ("row_cosine", "mean_cosine", "class_a", "identity_a", "images_a", "class_b", "identity_b", "images_b"),
        (
            (*_pair_cells(p), *_class_cells(p.a, audit, names), *_class_cells(p.b, audit, names))
            for p in audit.duplicates
        ),
    )
    _write_csv(
        path / UNMOVED, ("class", "identity", "images"), (_class_cells(c, audit, names) for c in audit.never_updated)
    )
    _write_csv(
        path / DRIFT,
        ("cosine", "class", "identity", "images", "nearest_class", "nearest_identity", "nearest_cosine"),
        (
            (f"{audit.to_mean[c]:.6f}", *_class_cells(c, audit, names), *_nearest_cells(c, audit, names))
            for c in audit.drifted
        ),
    )
    without = int((audit.images == 0).sum())
    figures = {
        "classes": len(names),
        "images": int(audit.images.sum()),
        "row_threshold": audit.rows.threshold,
        "mean_threshold": audit.means.threshold,
        "duplicate_pairs": len(audit.duplicates),
        "never_updated": len(audit.never_updated),
        "without_readable_images": without,
        "nearest_row": _told(audit.rows.cosine),
        "nearest_mean": _told(audit.means.cosine),
        "row_to_mean": _told(audit.to_mean),
    }
    (path / "audit.json").write_text(json.dumps({**figures, "environment": environment}, indent=2) + "\n")
    panels = (
        ("rows: to the nearest other class", audit.rows.cosine.numpy(), audit.rows.threshold),
        ("means: to the nearest other class", audit.means.cosine.numpy(), audit.means.threshold),
        ("row to the mean of its own images", audit.to_mean.numpy(), None),
    )
    from partial_fc.training.report.plots import plot_cosines

    plot_cosines(path / "plots" / "cosines.png", panels)
    return _write_page(path, audit, dataset, title, environment)


def _pair_cells(pair: Pair, digits: int = 6) -> tuple[str, str]:
    row, mean = ("" if math.isnan(each) else f"{each:.{digits}f}" for each in (pair.row, pair.mean))
    return row, mean


def _class_cells(c: int, audit: Audit, names: Sequence[str]) -> tuple[int, str, int]:
    return c, names[c], int(audit.images[c])


def _nearest_cells(c: int, audit: Audit, names: Sequence[str]) -> tuple[int, str, str]:
    nearest = int(audit.rows.of_class[c])
    return nearest, names[nearest], f"{audit.rows.cosine[c]:.6f}"


def _write_csv(path: Path, heading: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heading)
        writer.writerows(rows)


def _told(values: Tensor) -> dict[str, float]:
    known = values[~values.isnan()]
    shares = {"lowest": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "highest": 1.0}
    return dict(zip(shares, _quantiles(known, list(shares.values())), strict=True)) if len(known) else {}


def _write_page(folder: Path, audit: Audit, dataset: IdentityDataset, title: str, environment: dict[str, str]) -> Path:
    """report.html: one file, its pictures within it."""
    examples = _Examples(dataset)
    names = dataset.identity_names

    def shown(c: int) -> dict[str, Any]:
        return {"class": c, "name": names[c], "images": int(audit.images[c]), "examples": examples.of(c)}

    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("audit.html.j2")
    cosines = base64.b64encode((folder / "plots" / "cosines.png").read_bytes()).decode("ascii")
    page = template.render(
        title=title,
        classes=f"{len(names):,}",
        duplicates=f"{len(audit.duplicates):,}",
        never_updated=f"{len(audit.never_updated):,}",
        row_threshold=f"{audit.rows.threshold:.3f}",
        mean_threshold=f"{audit.means.threshold:.3f}",
        pairs=[
            {"cosines": _pair_cells(p, digits=3), "beyond": audit.beyond(p) >= 0, "a": shown(p.a), "b": shown(p.b)}
            for p in audit.pairs[:SHOWN_PAIRS]
        ],
        unmoved=[shown(c) for c in audit.never_updated[:SHOWN_CLASSES]],
        drifted=[
            {**shown(c), "cosine": f"{audit.to_mean[c]:.3f}", "nearest": f"{_nearest_cells(c, audit, names)[1]}"}
            for c in audit.drifted[:SHOWN_CLASSES]
        ],
        cosines="data:image/png;base64," + cosines,
        environment=environment,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


class _Examples:
    """The first images of a class as data URIs of PNG files."""

    def __init__(self, dataset: IdentityDataset) -> None:
        self.dataset, self.order = dataset, dataset.labels.argsort(stable=True)
        self.sorted = dataset.labels[self.order]

    def of(self, c: int) -> list[str]:
        start, end = torch.searchsorted(self.sorted, torch.tensor([c, c + 1])).tolist()
        found: list[str] = []
        for index in self.order[start:end].tolist():
            if len(found) == SHOWN_IMAGES:
                break
            try:
                pixels = self.dataset.load(index)
            except UnreadableImage:
                continue
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
        return found
