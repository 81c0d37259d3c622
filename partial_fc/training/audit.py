"""What a trained head says of its data: identities stored twice, classes that never moved, classes far from their own images.

    head rows [C_local, D]         ── nearest_classes ──>        the nearest other classes of each, cosines  ──>  pairs beyond a threshold
    head rows, initial draw        ── equal bit for bit? ──>     classes that no step has touched
    images ── backbone ──> unit embeddings ── summed by the rank that owns the class ──>  mean direction [C_local, D] of each class
    head rows, mean directions     ── cosine ──>                 classes whose row is not where their images are
    numbers of every class [C, 4]  ── gather ──>                 the audit folder: audit.json, three CSV files, plots, report.html

Matrices stay on the ranks that hold them; a few numbers of a class travel. Images are taken as they are, without augmentation.

The threshold, where none is given, is taken from the run itself: Q3 + 3 (Q3 − Q1), Tukey's outer fence, of the cosines of all classes to
their nearest class. Identities that are merely alike lie within it; a clean set may have no pair beyond it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
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

from partial_fc import CenterLoss, PartialFC, gather
from partial_fc.shards import initial_rows, local_part, shard_bounds
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset, UnreadableImage
from partial_fc.training.errors import UserError
from partial_fc.training.loader import BatchLoader
from partial_fc.training.plots import plot_cosines
from partial_fc.training.results import raise_together
from partial_fc.training.run import RunFolder

NEIGHBOURS = 10  # of each class that are looked at: an identity stored under more names than that is told in several pairs
BLOCK = 1024  # rows that are compared at a time
SHOWN_PAIRS, SHOWN_CLASSES, SHOWN_IMAGES = 20, 12, 4  # on the page
DUPLICATES, UNMOVED, DRIFT = "duplicates.csv", "never_updated.csv", "drift.csv"


@dataclass
class Pair:
    """Two classes (a < b) and the cosine of their rows."""

    a: int
    b: int
    cosine: float


@dataclass
class Audit:
    """What was found, by class id; the same on every rank.

    nearest_cosine, nearest_class `[C]`: of each class's row to the nearest other; mean_cosine `[C]`: to the mean direction of its images,
    NaN where none could be read; images `[C]`: how many could; moved `[C]`: False where the row is the initial draw.
    pairs: nearest first; those beyond `threshold`, and the nearest others, so that there are `SHOWN_PAIRS` to look at.
    """

    threshold: float
    threshold_from: str
    pairs: list[Pair]
    nearest_cosine: Tensor
    nearest_class: Tensor
    mean_cosine: Tensor
    images: Tensor
    moved: Tensor

    @property
    def duplicates(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.cosine >= self.threshold]

    @property
    def never_updated(self) -> list[int]:
        return (~self.moved).nonzero()[:, 0].tolist()

    @property
    def drifted(self) -> list[int]:
        """Classes with a mean direction, the farthest from it first."""
        order = self.mean_cosine.argsort(stable=True)
        return order[~self.mean_cosine[order].isnan()].tolist()

    def summary(self) -> str:
        """A few lines for the terminal."""
        mean = self.mean_cosine[~self.mean_cosine.isnan()]
        lines = [
            f"likely duplicate identities   {len(self.duplicates):,} pairs of cosine {self.threshold:.3f} or more ({self.threshold_from})",
            f"classes never updated         {len(self.never_updated):,}",
        ]
        if len(mean):
            low, middle = _quantiles(mean, (0.01, 0.5))
            lines.append(f"row to mean of its images     cosine {middle:.3f} in the middle, {low:.3f} at the lowest 1 %")
        return "\n".join(lines)


def audit_head(
    head: PartialFC, backbone: nn.Module, dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig, threshold: float | None
) -> Audit:
    """Everything of an `Audit`; every rank must call it. Raises UserError, the same on every rank, for an image that must be readable."""
    classes = dataset.num_identities
    lo, hi = shard_bounds(classes, accelerator.process_index, accelerator.num_processes)
    means, images = _class_means(backbone, dataset, accelerator, config)
    rows = local_part(head.weight.detach())
    mean_cosine = torch.where(images[lo:hi] > 0, _cosines(rows, means), torch.nan)
    moved = _moved(rows, lo, std=config.head.init_std, seed=config.seed)
    if classes > 1:
        k = min(NEIGHBOURS, classes - 1)
        ids, cosines = head.nearest_classes(k, progress=True)
    else:
        ids, cosines = torch.zeros(hi - lo, 1, dtype=torch.int64, device=rows.device), rows.new_zeros(hi - lo, 1)
    numbers = torch.stack((cosines[:, 0].double(), ids[:, 0].double(), mean_cosine.double(), moved.double()), 1)
    of_all = gather(numbers, torch.arange(lo, hi, device=rows.device)).embeddings.cpu()
    nearest = of_all[:, 0]
    chosen, source = threshold, "as asked"
    if chosen is None:
        chosen, source = _outer_fence(nearest), "Q3 + 3 (Q3 − Q1) of all classes' nearest"
    pairs = _pairs(ids, cosines, lo, chosen, nearest) if classes > 1 else []
    return Audit(chosen, source, pairs, nearest, of_all[:, 1].long(), of_all[:, 2], images.cpu(), of_all[:, 3] > 0)


def _outer_fence(values: Tensor) -> float:
    low, high = _quantiles(values, (0.25, 0.75))
    return min(high + 3 * (high - low), 0.999)


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """The nearest ranks of `values [n]`, n above 0; torch.quantile refuses more than 16 million."""
    ordered = values.sort().values
    return [float(ordered[round(share * (len(values) - 1))]) for share in shares]


def _pairs(ids: Tensor, cosines: Tensor, lo: int, threshold: float, nearest: Tensor) -> list[Pair]:
    """Pairs of every rank, the nearest first: those beyond the threshold, or beyond what is needed to have some to show."""
    few = min(2 * SHOWN_PAIRS, len(nearest))  # a pair may be the nearest of both
    least = min(threshold, float(nearest.topk(few).values[-1]))
    row, place = (cosines >= least).nonzero(as_tuple=True)
    found = gather(torch.stack((ids[row, place].double(), cosines[row, place].double()), 1), row + lo)
    best: dict[tuple[int, int], float] = {}
    for a, (b, cosine) in zip(found.labels.tolist(), found.embeddings.tolist(), strict=True):
        key = (min(a, int(b)), max(a, int(b)))
        best[key] = max(cosine, best.get(key, -1.0))
    ordered = sorted((Pair(a, b, cosine) for (a, b), cosine in best.items()), key=lambda pair: (-pair.cosine, pair.a, pair.b))
    beyond = sum(pair.cosine >= threshold for pair in ordered)
    return ordered[: max(beyond, SHOWN_PAIRS)]


def _class_means(backbone: nn.Module, dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Mean directions `[C_local, D]` of this rank's classes; the readable images of every class `[C]`."""
    loader = BatchLoader(
        dataset,
        batch_size=config.evaluation.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        shuffle=False,
        drop_last=False,
        workers=config.data.workers,
        on_error=config.data.on_error,
    )
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

    centers = CenterLoss(config.backbone.embedding_size, dataset.num_identities, init_std=0.0, device=accelerator.device)
    backbone.eval()
    with torch.no_grad():
        centers.init_from_embeddings(embedded())
    raise_together(problem[0] if problem else None, accelerator)
    if accelerator.num_processes > 1:
        dist.all_reduce(images)
    return local_part(centers.centers.detach()), images


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


def write_audit(folder: RunFolder, audit: Audit, dataset: IdentityDataset, title: str, environment: dict[str, str]) -> Path:
    """audit.json, the CSV files, plots/ and report.html in `folder`, by one process; the path of the last."""
    names, path = dataset.identity_names, folder.path
    (path / "plots").mkdir(parents=True, exist_ok=True)
    _write_csv(
        path / DUPLICATES,
        ("cosine", "class_a", "identity_a", "images_a", "class_b", "identity_b", "images_b"),
        ((f"{p.cosine:.6f}", *_class_cells(p.a, audit, names), *_class_cells(p.b, audit, names)) for p in audit.duplicates),
    )
    _write_csv(path / UNMOVED, ("class", "identity", "images"), (_class_cells(c, audit, names) for c in audit.never_updated))
    _write_csv(
        path / DRIFT,
        ("cosine", "class", "identity", "images", "nearest_class", "nearest_identity", "nearest_cosine"),
        ((f"{audit.mean_cosine[c]:.6f}", *_class_cells(c, audit, names), *_nearest_cells(c, audit, names)) for c in audit.drifted),
    )
    without = int((audit.images == 0).sum())
    figures = {
        "classes": len(names),
        "images": int(audit.images.sum()),
        "threshold": audit.threshold,
        "threshold_from": audit.threshold_from,
        "duplicate_pairs": len(audit.duplicates),
        "never_updated": len(audit.never_updated),
        "without_readable_images": without,
        "nearest_cosine": _told(audit.nearest_cosine),
        "mean_cosine": _told(audit.mean_cosine),
    }
    (path / "audit.json").write_text(json.dumps({**figures, "environment": environment}, indent=2) + "\n")
    plot_cosines(path / "plots" / "cosines.png", audit.nearest_cosine.numpy(), audit.mean_cosine.numpy(), audit.threshold)
    return _write_page(path, audit, dataset, title, environment)


def _class_cells(c: int, audit: Audit, names: Sequence[str]) -> tuple[int, str, int]:
    return c, names[c], int(audit.images[c])


def _nearest_cells(c: int, audit: Audit, names: Sequence[str]) -> tuple[int, str, str]:
    nearest = int(audit.nearest_class[c])
    return nearest, names[nearest], f"{audit.nearest_cosine[c]:.6f}"


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
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("audit.html.j2")
    cosines = base64.b64encode((folder / "plots" / "cosines.png").read_bytes()).decode("ascii")
    page = template.render(
        title=title,
        classes=f"{len(names):,}",
        duplicates=f"{len(audit.duplicates):,}",
        never_updated=f"{len(audit.never_updated):,}",
        threshold=f"{audit.threshold:.3f}",
        threshold_from=audit.threshold_from,
        pairs=[
            {"cosine": f"{p.cosine:.3f}", "beyond": p.cosine >= audit.threshold, "a": shown(p.a), "b": shown(p.b)}
            for p in audit.pairs[:SHOWN_PAIRS]
        ],
        unmoved=[shown(c) for c in audit.never_updated[:SHOWN_CLASSES]],
        drifted=[
            {**shown(c), "cosine": f"{audit.mean_cosine[c]:.3f}", "nearest": f"{_nearest_cells(c, audit, names)[1]}"}
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
