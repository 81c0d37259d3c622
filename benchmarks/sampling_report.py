"""Rows of `sampling.py` as Markdown tables and as plots.

row     {"data", "name", "method", "rate", "seeds": {seed: figures}}
figures {"sets": {"seen": {"TAR @ FAR 1e-3": 0.9, ...}, ...}, "seconds_per_step", "rows", "shares", "identities", ...}
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
TITLES = {"glyphs": "characters", "large": "characters, large", "places": "names of places"}
LINES = {  # method -> colour, and whether it is one of the two that are compared
    "dense": ("#0072B2", True),
    "still": ("#D55E00", True),
    "dense, importance": ("#009E73", False),
    "dense, importance, 4 hard negatives": ("#CC79A7", False),
    "still, importance": ("#E69F00", False),
}


def values(row: Row, split: str, figure: str) -> list[float]:
    """A figure of every seed that has it."""
    found = (seed["sets"][split][figure] for seed in row["seeds"].values())
    return [value for value in found if value is not None]


def tables(rows: Sequence[Row]) -> str:
    """A table for each data set: mean and range over the seeds."""
    return "\n".join(_table([row for row in rows if row["data"] == data]) for data in TITLES if _has(rows, data))


def _has(rows: Sequence[Row], data: str) -> bool:
    return any(row["data"] == data for row in rows)


def _columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    sets = next(iter(rows[0]["seeds"].values()))["sets"]
    return [(split, figure) for split, figures in sets.items() for figure in figures]


def _table(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    names = ["r", "skipped rows", *(", ".join(column) for column in columns)]
    names += ["seconds a step", "rows a step", "window / batch / hard", "seeds"]
    any_run = next(iter(rows[0]["seeds"].values()))
    lines = [
        f"{TITLES[rows[0]['data']].capitalize()}: {any_run['identities']:,} classes, {any_run['samples']:,} samples, "
        f"{any_run['steps']:,} steps of {any_run['batch_size']:,}, 2 ranks.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for row in rows:
        runs = row["seeds"].values()
        seconds, count = ([run[name] for run in runs] for name in ("seconds_per_step", "rows"))
        shares = [statistics.fmean(run["shares"][i] for run in runs) for i in range(3)]
        cells = [f"{row['rate']:g}", row["method"], *(_mean_and_range(values(row, *column)) for column in columns)]
        cells += [f"{statistics.fmean(seconds):.3f}", f"{statistics.fmean(count):,.0f}"]
        cells += [" / ".join(f"{100 * share:.0f} %" for share in shares), str(len(runs))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_range(found: Sequence[float]) -> str:
    return f"{statistics.fmean(found):.3f} ({min(found):.3f}–{max(found):.3f})" if found else "—"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against the sample rate, a panel a figure: lines by method with the range of the seeds; r = 1 a band."""
    from matplotlib.figure import Figure

    columns = [(split, figure) for split, figure in _columns(rows) if _drawn(rows, split, figure)]
    wide = max(1, len({split for split, _ in columns}))
    high = -(-len(columns) // wide)
    figure = Figure(figsize=(5.4 * wide, 0.9 + 3.3 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False)
    order = sorted(range(len(columns)), key=lambda i: columns[i][1])  # a line of panels has one figure of all sets
    for place, axes in enumerate(panels.flat):
        if place < len(columns):
            _panel(axes, rows, *columns[order[place]])
        else:
            axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        labels = list(handles)
        figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _drawn(rows: Sequence[Row], split: str, figure: str) -> bool:
    """Return whether there is a panel: of TAR, and of rank-1 where a set has nothing else."""
    others = [each for of, each in _columns(rows) if of == split]
    return (figure.startswith("TAR") or len(others) == 1) and any(values(row, split, figure) for row in rows)


def _panel(axes: Axes, rows: Sequence[Row], split: str, figure: str) -> None:
    for row in rows:
        found = values(row, split, figure)
        if row["method"] == "all classes" and found:
            axes.axhspan(min(found), max(found), color="0.85", label="r = 1: mean and range", zorder=0)
            axes.axhline(statistics.fmean(found), color="0.45", linewidth=1, zorder=1)
    for method, (color, compared) in LINES.items():
        of_method = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["rate"]))
        points = [(row["rate"], found) for row in of_method if (found := values(row, split, figure))]
        if not points:
            continue
        rates, means = [rate for rate, _ in points], [statistics.fmean(found) for _, found in points]
        style = {"linewidth": 2.0, "markersize": 6} if compared else {"linewidth": 1.0, "markersize": 4}
        axes.plot(rates, means, "o-" if compared else "s--", color=color, label=method, **style)
        if compared:
            axes.fill_between(
                rates, [min(f) for _, f in points], [max(f) for _, f in points], color=color, alpha=0.18, linewidth=0
            )
            for rate, found in points:
                axes.plot([rate, rate], [min(found), max(found)], color=color, linewidth=1.2)
    rates = sorted({row["rate"] for row in rows if row["method"] in LINES})
    axes.set(title=f"{split}: {figure}", xlabel="sample rate r", xscale="log")
    if rates:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlim(rates[0] / 1.4, rates[-1] * 1.4)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
