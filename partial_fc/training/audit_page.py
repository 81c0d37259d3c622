"""The folder of an audit: numbers, tables and a page.

Audit, data set  ──>  audit.json                    counts, thresholds, quantiles of the cosines
                      duplicates.csv                pairs of classes above a threshold
                      never_updated.csv, drift.csv  a line per class
                      plots/cosines.png
                      report.html                   one file, with the plot and example images in it
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from partial_fc.training.audit import MIN_PAIRS, Audit, Pair, quantiles
from partial_fc.training.data import IdentityDataset, UnreadableImage
from partial_fc.training.files import bytes_of, write_atomically
from partial_fc.training.report.page import png_uri, render
from partial_fc.training.run import RunFolder

MAX_CLASSES, MAX_IMAGES = 12, 4  # shown on the page: classes per table, images per class
DUPLICATES, NEVER_UPDATED, DRIFT = "duplicates.csv", "never_updated.csv", "drift.csv"


def write_audit(
    folder: RunFolder, audit: Audit, dataset: IdentityDataset, title: str, environment: dict[str, str]
) -> Path:
    """Write the files of an audit into `folder`, in one process; return the path of report.html."""
    names = dataset.identity_names
    path = folder.path
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
        path / NEVER_UPDATED,
        ("class", "identity", "images"),
        (_class_cells(c, audit, names) for c in audit.never_updated),
    )
    _write_csv(
        path / DRIFT,
        ("cosine", "class", "identity", "images", "nearest_class", "nearest_identity", "nearest_cosine"),
        (
            (f"{audit.to_mean[c]:.6f}", *_class_cells(c, audit, names), *_nearest_cells(c, audit, names))
            for c in audit.drifted
        ),
    )
    figures = {
        "classes": len(names),
        "images": int(audit.images.sum()),
        "row_threshold": audit.rows.threshold,
        "mean_threshold": audit.means.threshold,
        "duplicate_pairs": len(audit.duplicates),
        "never_updated": len(audit.never_updated),
        "without_readable_images": int((audit.images == 0).sum()),
        "nearest_row": _distribution(audit.rows.cosine),
        "nearest_mean": _distribution(audit.means.cosine),
        "row_to_mean": _distribution(audit.to_mean),
    }
    write_atomically(path / "audit.json", json.dumps({**figures, "environment": environment}, indent=2) + "\n")
    panels = (
        ("rows: to the nearest other class", audit.rows.cosine.numpy(), audit.rows.threshold),
        ("means: to the nearest other class", audit.means.cosine.numpy(), audit.means.threshold),
        ("row to the mean of its own images", audit.to_mean.numpy(), None),
    )
    from partial_fc.training.report.plots import plot_cosines  # matplotlib takes half a second to import

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
    with io.StringIO(newline="") as text:
        writer = csv.writer(text)
        writer.writerow(heading)
        writer.writerows(rows)
        write_atomically(path, text.getvalue())


def _distribution(values: Tensor) -> dict[str, float]:
    """Return a few quantiles of the values that are not NaN."""
    known = values[~values.isnan()]
    shares = {"lowest": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "highest": 1.0}
    return dict(zip(shares, quantiles(known, list(shares.values())), strict=True)) if len(known) else {}


def _write_page(folder: Path, audit: Audit, dataset: IdentityDataset, title: str, environment: dict[str, str]) -> Path:
    """Write report.html, with its images embedded; return its path."""
    examples = _Examples(dataset)
    names = dataset.identity_names

    def class_entry(c: int) -> dict[str, Any]:
        return {"class": c, "name": names[c], "images": int(audit.images[c]), "examples": examples.of(c)}

    page = render(
        "audit.html.j2",
        title=title,
        classes=f"{len(names):,}",
        duplicates=f"{len(audit.duplicates):,}",
        never_updated=f"{len(audit.never_updated):,}",
        row_threshold=f"{audit.rows.threshold:.3f}",
        mean_threshold=f"{audit.means.threshold:.3f}",
        pairs=[
            {
                "cosines": _pair_cells(pair, digits=3),
                "reported": audit.excess(pair) >= 0,
                "a": class_entry(pair.a),
                "b": class_entry(pair.b),
            }
            for pair in audit.pairs[:MIN_PAIRS]
        ],
        not_updated=[class_entry(c) for c in audit.never_updated[:MAX_CLASSES]],
        drifted=[
            {**class_entry(c), "cosine": f"{audit.to_mean[c]:.3f}", "nearest": f"{_nearest_cells(c, audit, names)[1]}"}
            for c in audit.drifted[:MAX_CLASSES]
        ],
        cosines=png_uri(bytes_of(folder / "plots" / "cosines.png")),
        environment=environment,
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


class _Examples:
    """Example images of classes, as data URIs of PNG files."""

    def __init__(self, dataset: IdentityDataset) -> None:
        self.dataset = dataset
        self.order = dataset.labels.argsort(stable=True)
        self.sorted = dataset.labels[self.order]

    def of(self, c: int) -> list[str]:
        """Return the first readable images of class `c`."""
        start, end = torch.searchsorted(self.sorted, torch.tensor([c, c + 1])).tolist()
        found: list[str] = []
        for index in self.order[start:end].tolist():
            if len(found) == MAX_IMAGES:
                break
            try:
                pixels = self.dataset.load(index)
            except UnreadableImage:
                continue
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            found.append(png_uri(buffer.getvalue()))
        return found
