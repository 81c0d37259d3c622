"""The figures of a protocol in one form, for the terminal, metrics.json, the report and the history of a run.

counts       "pairs", "probes", ...: integers, the size of the data that the figures are of
figures      "accuracy", "tar@1e-3", "rank-1", "mAP", ...: shares in [0, 1]; None where there are too few data
thresholds   the cosine at which a figure was measured, by the name of the figure
notes        sentences on what was skipped, and why
curves       points (x, y) for plots: "roc" FAR and TAR, "dir" FPIR and DIR, "cmc" k and CMC
histograms   counts of "genuine" and "impostor" pairs in `evaluation.CURVE_BINS` equal bins of the cosine over [-1, 1]
hardest      "genuine" pairs of the lowest and "impostor" pairs of the highest cosine, hardest first:
             (cosine, image index, image index)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from partial_fc.training.evaluation import percent


@dataclass
class Result:
    """The figures of one protocol on one data set; the module's docstring explains the fields."""

    protocol: str
    """"verification", "templates", "identification" or "retrieval"."""
    name: str
    """Name of the data set."""
    counts: dict[str, int]
    figures: dict[str, float | None]
    thresholds: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    hardest: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """Return the fields except `hardest` as JSON-ready values; `curves=False` omits `curves` and `histograms`."""
        fields = asdict(self)
        fields["curves"] = {name: [list(point) for point in points] for name, points in self.curves.items()}
        omitted = ("hardest",) if curves else ("hardest", "curves", "histograms")
        return {key: value for key, value in fields.items() if key not in omitted}

    def metrics(self) -> dict[str, float]:
        """Return the figures that are not None, keyed by "name/figure"."""
        return {f"{self.name}/{key}": value for key, value in self.figures.items() if value is not None}

    def summary(self) -> str:
        """Return a text table for the terminal, with "—" for figures that are None."""
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        lines = [f"{self.name} ({self.protocol}): {counts}"]
        for key, value in self.figures.items():
            if key.endswith("_std"):
                continue
            text = percent(value)
            deviation = self.figures.get(f"{key}_std")
            if deviation is not None:
                text += f" ± {100 * deviation:.2f}"
            threshold = self.thresholds.get(key)
            if threshold is not None:
                text += f"   at cosine {threshold:.4f}"
            lines.append(f"  {key:<20}{text}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
