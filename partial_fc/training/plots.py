"""The pictures of a run, as PNG files: ROC, cosine histograms, training curves; and of an audit.

    list[Evaluation] -> plot_roc         TAR over log FAR, one curve per evaluation set
    list[Evaluation] -> plot_histograms  genuine and impostor cosines, one panel per evaluation set
    audit            -> plot_cosines     cosines of class rows to the nearest class and to the mean of their images
    histories        -> plot_overlaid    one key of several runs
    history          -> plot_training    loss, angles, shares, lengths, learning rate (what of `TRAINING_PANELS` there is) over steps

`history` is the list of logged rows, with keys `step`, `epoch`, `loss` and others of `TRAINING_PANELS` (angles in radians, drawn in
degrees); rows may lack a key or hold a value that is not finite, which leaves a gap.

Everything is drawn on `Figure` objects with the Agg canvas, never through pyplot: no display is needed, and neither the
caller's figures nor its backend are touched. Matplotlib's default style is set for the time of drawing, so a user's
matplotlibrc does not change the pictures. The colours, of Okabe and Ito (2008), are safe for colour-blind readers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from partial_fc.training.evaluation import CURVE_BINS, FARS, MIN_FALSE_ACCEPTS, Evaluation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PALE = ("#56B4E9", "#F0A878")  # under their moving averages, of the first colours
LINES = ("-", "--", "-.", ":")  # with more evaluation sets than colours, the line style tells them apart
GENUINE_COLOUR, IMPOSTOR_COLOUR = COLOURS[0], COLOURS[1]
DPI = 120
SHOWN_FAR = "1e-3"  # of the threshold and the TAR named in the legends
SMOOTHED_FROM = 60  # points from which a curve is drawn with its moving average


@dataclass(frozen=True)
class Panel:
    """Some keys of the rows over the step. curves: (key, name in the legend); band: keys of its lower and upper edge, and its name."""

    title: str
    curves: tuple[tuple[str, str], ...]
    band: tuple[str, str, str] | None = None
    factor: float = 1.0
    smooth: bool = True

    def within(self, rows: "History") -> "Panel | None":
        """The panel of those curves that the rows have; None if there is none."""
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
History = Sequence[dict[str, float]]


def plot_roc(path: Path | str, evaluations: Sequence[Evaluation]) -> None:
    """Draw TAR over FAR (log axis) to `path`, with markers where `Evaluation.tar` has a figure.

    A curve starts where ten false accepts are expected, for the same reason as the figures (see `tar_at_far`).
    """
    with _figure(path, 7.2, 4.6) as figure:
        axes = figure.subplots()
        lowest = 1.0
        figure.set_figheight(4.6 + 0.25 * math.ceil(len(evaluations) / 2))
        for i, evaluation in enumerate(evaluations):
            colour, line = COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]
            points = [p for p in evaluation.roc if p[0] * evaluation.impostor_pairs >= MIN_FALSE_ACCEPTS - 1e-6]
            far, tar = np.array(points or evaluation.roc).T
            marked = [(FARS[key], share) for key, share in evaluation.tar.items() if share is not None]
            lowest = min([lowest, float(tar.min()), *(share for _, share in marked)])
            shown = evaluation.tar[SHOWN_FAR]
            figures = "—" if shown is None else f"{100 * shown:.2f} %"
            label = f"{evaluation.name}: {figures}"
            axes.semilogx(far, tar, line, color=colour, linewidth=1.8, label=label, drawstyle="steps-post")
            if marked:
                axes.plot(*np.array(marked).T, "o", color=colour, markersize=5, clip_on=False, zorder=3)
        floor = max(0.0, math.floor(lowest * 10 - 0.5) / 10)
        margin = 0.02 * (1 - floor)
        axes.set(ylim=(floor, 1 + margin), xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)")
        axes.set_title("Verification: all pairs of images")
        axes.margins(x=0.02)
        if evaluations:
            figure.legend(loc="outside lower center", title=f"TAR @ FAR {SHOWN_FAR}", ncols=2, frameon=False)
        else:
            _note(axes, "no evaluation")


def plot_histograms(path: Path | str, evaluations: Sequence[Evaluation]) -> None:
    """Draw the densities of genuine and impostor cosines to `path`, one panel per evaluation, over a common axis.

    Each density integrates to one over the cosine, so the two are comparable although impostor pairs are far more. The
    dashed line is the threshold at FAR 1e-3, where there is one.
    """
    rows = max(1, len(evaluations))
    with _figure(path, 7.2, 1.0 + 2.7 * rows) as figure:
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        spans = [_draw_densities(axes, evaluation) for axes, evaluation in zip(panels, evaluations, strict=False)]
        if spans:
            panels[-1].set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
        else:
            _note(panels[0], "no evaluation")
        panels[-1].set_xlabel("cosine of a pair")


def _draw_densities(axes: Axes, evaluation: Evaluation) -> tuple[float, float]:
    """Fill one panel; return the range of cosines that holds all but a negligible share of the pairs."""
    histograms = np.array([evaluation.genuine_histogram, evaluation.impostor_histogram], dtype=float)
    # A few genuine pairs over 256 bins are a comb: widen the bins until the occupied ones hold five pairs on average.
    merged = 1
    while merged < 16 and min(h.sum() / max(1, np.count_nonzero(h)) for h in histograms) < 5:
        merged *= 2
        histograms = histograms.reshape(2, -1, 2).sum(-1)
    width = 2 * merged / CURVE_BINS
    edges = np.linspace(-1, 1, CURVE_BINS // merged + 1)
    shares = histograms / histograms.sum(1, keepdims=True)
    for share, colour, name in zip(shares, (GENUINE_COLOUR, IMPOSTOR_COLOUR), ("genuine", "impostor"), strict=True):
        pairs = evaluation.genuine_pairs if name == "genuine" else evaluation.impostor_pairs
        label = f"{name} ({pairs:,} pairs)"
        axes.stairs(share / width, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(share / width, edges, color=colour, linewidth=1.4, label=label)
    threshold = evaluation.thresholds[SHOWN_FAR]
    if threshold is not None:
        label = f"threshold {threshold:.3f} (FAR {SHOWN_FAR})"
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set(ylabel="density", ylim=(0, 1.08 * float((shares / width).max())))
    axes.set_title(evaluation.name)
    axes.legend(loc="best", fontsize=8.5, framealpha=0.9)
    held = np.flatnonzero((shares > 1e-4).any(0))
    return max(-1.0, float(edges[held[0]]) - 0.05), min(1.0, float(edges[held[-1] + 1]) + 0.05)


def plot_training(path: Path | str, history: History) -> None:
    """Draw those of `TRAINING_PANELS` that `history` has keys for, over the step, to `path`; see the module's docstring.

    Noisy curves of many points are drawn pale under their moving average, on a log axis where that ranges over more
    than a factor of 30; thin vertical lines are epochs.
    """
    rows = sorted(history, key=lambda row: row["step"])
    panels = [panel for panel in (each.within(rows) for each in TRAINING_PANELS) if panel is not None]
    with _figure(path, 7.2, 0.8 + 2.3 * max(1, len(panels))) as figure:
        drawn = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
        if not panels:
            _note(drawn[0], "no training step was logged")
            return
        for axes, panel in zip(drawn, panels, strict=False):
            _draw_panel(axes, rows, panel)
        steps = [row["step"] for row in rows]
        if steps[0] == steps[-1]:
            drawn[-1].set_xlim(steps[0] - 1, steps[0] + 1)
        drawn[-1].set_xlabel("step")
        drawn[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        drawn[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.align_ylabels(drawn)


def _draw_panel(axes: Axes, rows: History, panel: Panel) -> None:
    steps = np.array([row["step"] for row in rows])
    window = max(5, len(rows) // 30) if panel.smooth and len(rows) >= SMOOTHED_FROM else 1
    if panel.band is not None:
        low, high = (_moving_average(_column(rows, key, panel.factor), window) for key in panel.band[:2])
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label=panel.band[2])
    for (key, name), colour, pale in zip(panel.curves, COLOURS, PALE, strict=False):
        values = _column(rows, key, panel.factor)
        shown = _moving_average(values, window)
        if window > 1 and panel.band is None:  # a band tells of the spread already
            axes.plot(steps, values, color=pale, linewidth=0.8, alpha=0.7)
        axes.plot(steps, shown, color=colour, linewidth=1.8, marker="o" if len(rows) < 40 else None, markersize=3, label=name)
        if len(panel.curves) == 1 and panel.smooth:
            _spread_out(axes, values, shown)
    if len(panel.curves) > 1 or panel.band is not None:
        axes.legend(loc="best", fontsize=8.5, framealpha=0.9)
    if window > 1:
        axes.set_title(f"bold: mean of {window} rows", loc="right", fontsize=8.5, color="0.4")
    axes.set_ylabel(panel.title)
    axes.grid(visible=False, axis="x")  # vertical lines are epochs here
    axes.margins(x=0.01)
    _draw_epochs(axes, rows)


def plot_overlaid(path: Path | str, runs: Mapping[str, History], key: str, title: str) -> None:
    """Draw one key of several runs' histories (angles in degrees) over the step, a curve a run; a log axis as in `plot_training`."""
    with _figure(path, 7.2, 4.2) as figure:
        figure.set_figheight(4.2 + 0.25 * math.ceil(len(runs) / 2))
        axes = figure.subplots()
        factor = 180 / math.pi if key.endswith("_angle") else 1.0
        for i, (name, history) in enumerate(runs.items()):
            rows = sorted(history, key=lambda row: row["step"])
            shown = _moving_average(_column(rows, key, factor), max(5, len(rows) // 30) if len(rows) >= SMOOTHED_FROM else 1)
            line = LINES[i // len(COLOURS) % len(LINES)]
            axes.plot([row["step"] for row in rows], shown, line, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
            if np.isfinite(shown).any() and key != "learning_rate":
                _spread_out(axes, shown[np.isfinite(shown)], shown)
        axes.set(xlabel="step", ylabel=f"{title} (°)" if key.endswith("_angle") else title)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)


def plot_cosines(path: Path | str, panels: Sequence[tuple[str, np.ndarray, float | None]]) -> None:
    """Draw how many classes have which cosine, one panel each: its title, a cosine of every class (NaN: none), a threshold to mark."""
    with _figure(path, 4.0 * len(panels), 3.6) as figure:
        for axes, (title, values, threshold), colour in zip(figure.subplots(1, len(panels)), panels, COLOURS, strict=False):
            known = values[np.isfinite(values)]
            axes.set(title=title, xlabel="cosine", ylabel="classes")
            if not len(known):
                _note(axes, "no class has any")
                continue
            low, high = float(known.min()), float(known.max())
            axes.hist(known, bins=np.linspace(low, max(high, low + 1e-3), 61), color=colour)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if threshold is not None:
                axes.axvline(threshold, color="0.2", linestyle="--", linewidth=1, label=f"reported from {threshold:.3f}")
                axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
                axes.legend(loc="upper left", frameon=False)


def _column(rows: History, key: str, factor: float) -> np.ndarray:
    """The values of a key, NaN for gaps."""
    values: np.ndarray = factor * np.array([row.get(key, math.nan) for row in rows], dtype=float)
    values[~np.isfinite(values)] = math.nan
    return values


def _spread_out(axes: Axes, values: np.ndarray, shown: np.ndarray) -> None:
    """A log axis for a curve that ranges over more than a factor of 30."""
    if np.nanmin(values) > 0 and np.nanmax(shown) > 30 * np.nanmin(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends; NaN are left out, and stay NaN where all are."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    mean: np.ndarray = np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
    return mean


def _draw_epochs(axes: Axes, rows: History) -> None:
    """A thin line at the first step of each epoch but the first, where they are few enough to tell apart."""
    starts = {int(row["epoch"]): row["step"] for row in reversed(rows) if "epoch" in row}
    if len(starts) <= 40:
        for step in sorted(starts.values())[1:]:
            axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)


def _note(axes: Axes, text: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


@contextmanager
def _figure(path: Path | str, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` x `height` inches to draw on, in the common style; written to `path` as PNG at the end."""
    style = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "axes.axisbelow": True,
        "grid.color": "0.9",
        "grid.linewidth": 0.8,
        "font.size": 10,
    }
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        canvas = FigureCanvasAgg(figure)
        yield figure
        # Without the version in the metadata, equal data give equal files.
        canvas.print_png(Path(path), metadata={"Software": None})
