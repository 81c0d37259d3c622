"""What a protocol found, in one form for all of them: the terminal, metrics.json, the report and the history of a run.

counts       "pairs", "probes", ...: integers, what the figures are of
figures      "accuracy", "tar@1e-3", "rank-1", "mAP", ...: shares in [0, 1]; None where the data do not allow the figure
thresholds   the cosines that figures at an operating point were taken at, under the figure's name
notes        sentences: what was left out, and why
curves       points (x, y) to draw: "roc" FAR and TAR, "dir" FPIR and DIR, "cmc" k and CMC
histograms   "genuine" and "impostor" pairs in `evaluation.CURVE_BINS` equal bins of the cosine over [-1, 1]
hardest      "genuine" pairs of the lowest and "impostor" pairs of the highest cosine, the hardest first: (cosine, position, position)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from partial_fc.training.evaluation import percent


@dataclass
class Result:
    """The figures of one protocol on one data set; see the module's docstring."""

    protocol: str
    """"verification", "templates", "identification" or "retrieval"."""
    name: str
    """Of the data set."""
    counts: dict[str, int]
    figures: dict[str, float | None]
    thresholds: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    hardest: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """The fields as JSON-ready values, but for `hardest`; without `curves` and `histograms` unless `curves`."""
        fields = asdict(self) | {
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()}
        }
        left_out = ("hardest",) if curves else ("hardest", "curves", "histograms")
        return {key: value for key, value in fields.items() if key not in left_out}

    def metrics(self) -> dict[str, float]:
        """The figures that there are, as "name/figure"."""
        return {f"{self.name}/{key}": value for key, value in self.figures.items() if value is not None}

    def summary(self) -> str:
        """A text table for the terminal; "—" where a figure is None."""
        head = f"{self.name} ({self.protocol}): " + ", ".join(
            f"{count:,} {what}" for what, count in self.counts.items()
        )
        rows = []
        for key, value in self.figures.items():
            if key.endswith("_std"):
                continue
            text, deviation, threshold = percent(value), self.figures.get(f"{key}_std"), self.thresholds.get(key)
            text += "" if deviation is None else f" ± {100 * deviation:.2f}"
            text += "" if threshold is None else f"   at cosine {threshold:.4f}"
            rows.append(f"  {key:<20}{text}")
        return "\n".join([head, *rows, *(f"  {note}" for note in self.notes)])
