"""Plots over training steps, as PNG files.

    history of a run        -> plot_training   the panels of `TRAINING_PANELS` for which it has keys: loss, angles, ...
    histories of runs       -> plot_overlaid   given keys, one curve per run

A history is the list of logged rows, with keys `step`, `epoch`, `loss` and others of `TRAINING_PANELS` (angles in
radians, drawn in degrees). A row may lack a key or have a non-finite value; the curve then has a gap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from partial_fc.training.report.canvas import COLOURS, colour_and_line, figure, note, plain_log_ticks

PALE = ("#56B4E9", "#F0A878")  # for the values under their moving averages, which have the first of COLOURS
SMOOTHED_FROM = 60  # curves with at least this many points are drawn with their moving average
MARKED_BELOW = 40  # curves with fewer points have a marker at each, so that a single point is visible

History = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Panel:
    """Some keys of the rows over the step.

    curves: (key, name in the legend); band: key of the lower edge, key of the upper edge, name in the legend; factor:
    multiplies all values; smooth: draw long curves with their moving average.
    """

    title: str
    curves: tuple[tuple[str, str], ...]
    band: tuple[str, str, str] | None = None
    factor: float = 1.0
    smooth: bool = True

    def within(self, rows: History) -> "Panel | None":
        """Return the panel with only the curves that the rows have, or None if they have none."""
        present = {key for row in rows for key, value in row.items() if math.isfinite(value)}
        curves = tuple(curve for curve in self.curves if curve[0] in present)
        band = self.band if self.band is not None and present >= set(self.band[:2]) else None
        return replace(self, curves=curves, band=band) if curves else None


TRAINING_PANELS = (
    Panel("loss", (("loss", ""),)),
    Panel("center loss\n(before its weight)", (("center_loss", ""),)),
    Panel(
        "angle (°)",
        (("target_angle", "to the own class"), ("hardest_angle", "to the nearest other class")),
        band=("target_angle_p10", "target_angle_p90", "10 to 90 % of samples"),
        factor=180 / math.pi,
    ),
    Panel("share of samples", (("accuracy", "own class is nearest"), ("margin_met", "also with the margin"))),
    Panel("embedding length", (("embedding_norm", "mean of the batch"), ("adaface_mean", "running mean of AdaFace"))),
    Panel("t of CurricularFace", (("curricular_t", ""),), smooth=False),
    Panel("learning rate", (("learning_rate", ""),), smooth=False),
    Panel("gradient norm", (("grad_norm", ""),)),
)


def plot_training(path: Path | str, history: History) -> None:
    """Draw the panels of `TRAINING_PANELS` for which `history` has keys, over the step, to `path`.

    Noisy curves with many points are drawn pale under their moving average; the axis is logarithmic if that spans
    more than a factor of 30. Thin vertical lines are epochs.
    """
    rows = sorted(history, key=lambda row: row["step"])
    panels = [panel for panel in (each.within(rows) for each in TRAINING_PANELS) if panel is not None]
    with figure(path, 7.2, 0.8 + 2.3 * max(1, len(panels))) as drawn:
        all_axes = drawn.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
        if not panels:
            note(all_axes[0], "no training step was logged")
            return
        for axes, panel in zip(all_axes, panels, strict=False):
            _draw_panel(axes, rows, panel)
        steps = [row["step"] for row in rows]
        if steps[0] == steps[-1]:
            all_axes[-1].set_xlim(steps[0] - 1, steps[0] + 1)
        all_axes[-1].set_xlabel("step")
        all_axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        drawn.align_ylabels(all_axes)


def _draw_panel(axes: Axes, rows: History, panel: Panel) -> None:
    steps = np.array([row["step"] for row in rows])
    window = _window(rows) if panel.smooth else 1
    if panel.band is not None:
        low, high = (_moving_average(_column(rows, key, panel.factor), window) for key in panel.band[:2])
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label=panel.band[2])
    marker = "o" if len(rows) < MARKED_BELOW else None
    for (key, name), colour, pale in zip(panel.curves, COLOURS, PALE, strict=False):
        values = _column(rows, key, panel.factor)
        smoothed = _moving_average(values, window)
        if window > 1 and panel.band is None:  # a band already shows the spread
            axes.plot(steps, values, color=pale, linewidth=0.8, alpha=0.7)
        axes.plot(steps, smoothed, color=colour, linewidth=1.8, marker=marker, markersize=3, label=name)
        if len(panel.curves) == 1 and panel.smooth:
            _log_axis_if_wide(axes, values, smoothed)
    if len(panel.curves) > 1 or panel.band is not None:
        axes.legend(loc="best", fontsize=8.5, framealpha=0.9)
    if window > 1:
        axes.set_title(f"bold: mean of {window} rows", loc="right", fontsize=8.5, color="0.4")
    axes.set_ylabel(panel.title)
    axes.grid(visible=False, axis="x")  # here, vertical lines are epochs
    axes.margins(x=0.01)
    _draw_epochs(axes, rows)


def plot_overlaid(path: Path | str, runs: Mapping[str, History], titles: Mapping[str, str]) -> None:
    """Draw keys of several runs' histories over the step, one panel per key and one curve per run.

    runs: name -> history; titles: key -> title of its panel. Angles are in degrees, and axes logarithmic as in
    `plot_training`. Rows may lack a key, for instance if two data sets are evaluated at different steps.
    """
    columns = min(2, len(titles))
    rows = math.ceil(len(titles) / columns)
    height = 4.2 if len(titles) == 1 else 2.4 * rows
    with figure(path, 7.2, height) as drawn:
        drawn.set_figheight(height + 0.25 * math.ceil(len(runs) / 2))
        panels = list(drawn.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(titles) :]:
            axes.remove()
        for axes, (key, title) in zip(panels, titles.items(), strict=False):
            for i, (name, history) in enumerate(runs.items()):
                label = name if axes is panels[0] else None  # the legend is common to all panels
                _draw_run(axes, [row for row in history if key in row], key, i, label)
            axes.set(xlabel="step", ylabel=f"{title} (°)" if key.endswith("_angle") else title)
            axes.xaxis.set_major_locator(MaxNLocator(8 if columns == 1 else 4, integer=True))
        drawn.legend(loc="outside lower center", ncols=2, frameon=False)


def _draw_run(axes: Axes, history: History, key: str, number: int, label: str | None) -> None:
    """Draw the curve of run `number`."""
    rows = sorted(history, key=lambda row: row["step"])
    steps = [row["step"] for row in rows]
    values = _column(rows, key, 180 / math.pi if key.endswith("_angle") else 1.0)
    smoothed = _moving_average(values, _window(rows))
    colour, line = colour_and_line(number)
    marker = "o" if len(rows) < MARKED_BELOW else None
    axes.plot(steps, smoothed, line, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
    if np.isfinite(smoothed).any() and key != "learning_rate":
        _log_axis_if_wide(axes, smoothed[np.isfinite(smoothed)], smoothed)


def _column(rows: History, key: str, factor: float) -> np.ndarray:
    """Return the values of a key, NaN for gaps."""
    values: np.ndarray = factor * np.array([row.get(key, math.nan) for row in rows], dtype=float)
    values[~np.isfinite(values)] = math.nan
    return values


def _log_axis_if_wide(axes: Axes, values: np.ndarray, smoothed: np.ndarray) -> None:
    """Use a logarithmic axis for a positive curve that spans more than a factor of 30."""
    if np.nanmin(values) > 0 and np.nanmax(smoothed) > 30 * np.nanmin(smoothed):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)


def _window(rows: History) -> int:
    """Return the width of the moving average for this many rows; 1 for none."""
    return max(5, len(rows) // 30) if len(rows) >= SMOOTHED_FROM else 1


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean over `window` values, fewer at the ends; NaN only where all of these are NaN."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    mean: np.ndarray = np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
    return mean


def _draw_epochs(axes: Axes, rows: History) -> None:
    """Draw a thin line at the first step of each epoch but the first, unless there are more than 40 epochs."""
    starts = {int(row["epoch"]): row["step"] for row in reversed(rows) if "epoch" in row}
    if len(starts) <= 40:
        for step in sorted(starts.values())[1:]:
            axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
