"""The pictures of a run, as PNG files: ROC, cosine histograms, CMC and DIR, training curves; and of an audit.

    sets of pairs    -> plot_roc         TAR over log FAR, one curve per evaluation set or list of pairs
    sets of pairs    -> plot_histograms  genuine and impostor cosines, one panel each
    identification   -> plot_dir         DIR over log FPIR, one curve each
      and retrieval  -> plot_cmc         the share found among the first k
    audit            -> plot_cosines     cosines of class rows to the nearest class and to the mean of their images
    histories        -> plot_overlaid    keys of several runs
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

from partial_fc.training.evaluation import CURVE_BINS, MIN_FALSE_ACCEPTS, Evaluation
from partial_fc.training.protocols.pairs import LEAST_FALSE_ACCEPTS
from partial_fc.training.protocols.result import Result

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PALE = ("#56B4E9", "#F0A878")  # under their moving averages, of the first colours
LINES = ("-", "--", "-.", ":")  # with more evaluation sets than colours, the line style tells them apart
GENUINE_COLOUR, IMPOSTOR_COLOUR = COLOURS[0], COLOURS[1]
DPI = 120
SHOWN_FAR, SHOWN_FPIR = "1e-3", "1e-1"  # of the thresholds, TAR and DIR named in the legends
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


@dataclass(frozen=True)
class PairSet:
    """What is drawn of a set of pairs: points (FAR, TAR) and figures by FAR, the histograms in `CURVE_BINS` bins, a threshold.

    least: expected false accepts from which on the curve is drawn, as there are figures (see `tar_at_far`).
    """

    name: str
    roc: Sequence[tuple[float, float]]
    tar: dict[str, float | None]
    threshold: float | None
    genuine: Sequence[int]
    impostor: Sequence[int]
    least: int

    @classmethod
    def of(cls, found: Evaluation | Result) -> "PairSet":
        """Of all pairs of a set, or of the pairs that a protocol lists: a Result of verification or templates."""
        if isinstance(found, Evaluation):
            histograms = (found.genuine_histogram, found.impostor_histogram)
            return cls(found.name, found.roc, found.tar, found.thresholds[SHOWN_FAR], *histograms, MIN_FALSE_ACCEPTS)
        tar = {key.removeprefix("tar@"): share for key, share in found.figures.items() if key.startswith("tar@")}
        histograms = (found.histograms["genuine"], found.histograms["impostor"])
        threshold = found.thresholds.get(f"tar@{SHOWN_FAR}")
        return cls(found.name, found.curves["roc"], tar, threshold, *histograms, LEAST_FALSE_ACCEPTS)


@dataclass(frozen=True)
class _Curve:
    """Points (x, share), those of them that are figures, and a figure to name in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: Sequence[tuple[float, float]]
    figure: float | None


def plot_roc(path: Path | str, sets: Sequence[Evaluation | Result]) -> None:
    """Draw TAR over FAR (log axis) to `path`, with markers where there is a figure; sets: as of `PairSet.of`.

    A curve starts where ten false accepts are expected (one, of listed pairs), for the same reason as the figures (see `tar_at_far`).
    """
    curves = []
    for each in map(PairSet.of, sets):
        points = [p for p in each.roc if p[0] * sum(each.impostor) >= each.least - 1e-6]
        marked = [(float(far), share) for far, share in each.tar.items() if share is not None]
        curves.append(_Curve(each.name, points or each.roc, marked, each.tar.get(SHOWN_FAR)))
    with _shares(path, curves, f"TAR @ FAR {SHOWN_FAR}", steps=True) as axes:
        axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", title="Verification")


def plot_dir(path: Path | str, results: Sequence[Result]) -> None:
    """Draw DIR over FPIR (log axis) to `path`, with markers where there is a figure, of results of open-set identification."""
    curves = []
    for each in results:
        figures = {key.removeprefix("dir@"): share for key, share in each.figures.items() if key.startswith("dir@")}
        marked = [(float(fpir), share) for fpir, share in figures.items() if share is not None]
        curves.append(_Curve(each.name, each.curves["dir"], marked, figures.get(SHOWN_FPIR)))
    with _shares(path, curves, f"DIR @ FPIR {SHOWN_FPIR}", steps=True) as axes:
        axes.set(xlabel="false positive identification rate (FPIR)", ylabel="detected and identified (DIR)")
        axes.set_title("Identification, open set")


def plot_cmc(path: Path | str, results: Sequence[Result]) -> None:
    """Draw the share of queries (probes) of which a right image is among the first k, over k (log axis), to `path`."""
    curves = [_Curve(each.name, each.curves["cmc"], [], each.curves["cmc"][0][1]) for each in results]
    with _shares(path, curves, "rank-1") as axes:
        axes.set(xlabel="k", ylabel="found among the first k (CMC)", title="Identification and retrieval")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _shares(path: Path | str, curves: Sequence[_Curve], legend: str, *, steps: bool = False) -> Iterator[Axes]:
    """Axes with shares over a log axis, a curve each, named with its figure; they are written to `path` at the end."""
    with _figure(path, 7.2, 4.6) as figure:
        axes = figure.subplots()
        figure.set_figheight(4.6 + 0.25 * math.ceil(len(curves) / 2))
        lowest = 1.0
        for i, curve in enumerate(curves):
            colour, line = COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]
            x, share = np.array(curve.points).T
            lowest = min([lowest, float(share.min()), *(each for _, each in curve.marked)])
            label = f"{curve.name}: {'—' if curve.figure is None else f'{100 * curve.figure:.2f} %'}"
            style = (
                {"drawstyle": "steps-post"}
                if steps
                else {"marker": "o" if len(curve.points) < 40 else None, "markersize": 3}
            )
            axes.semilogx(x, share, line, color=colour, linewidth=1.8, label=label, **style)
            if curve.marked:
                axes.plot(*np.array(curve.marked).T, "o", color=colour, markersize=5, clip_on=False, zorder=3)
        floor = max(0.0, math.floor(lowest * 10 - 0.5) / 10)
        axes.set_ylim(floor, 1 + 0.02 * (1 - floor))
        axes.margins(x=0.02)
        yield axes
        if curves:
            figure.legend(loc="outside lower center", title=legend, ncols=2, frameon=False)
        else:
            _note(axes, "no evaluation")


def plot_histograms(path: Path | str, sets: Sequence[Evaluation | Result]) -> None:
    """Draw the densities of genuine and impostor cosines to `path`, one panel each, over a common axis; sets: as of `PairSet.of`.

    Each density integrates to one over the cosine, so the two are comparable although impostor pairs are far more. The
    dashed line is the threshold at FAR 1e-3, where there is one.
    """
    rows = max(1, len(sets))
    with _figure(path, 7.2, 1.0 + 2.7 * rows) as figure:
        panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        spans = [_draw_densities(axes, PairSet.of(each)) for axes, each in zip(panels, sets, strict=False)]
        if spans:
            panels[-1].set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
        else:
            _note(panels[0], "no evaluation")
        panels[-1].set_xlabel("cosine of a pair")


def _draw_densities(axes: Axes, pairs: PairSet) -> tuple[float, float]:
    """Fill one panel; return the range of cosines that holds all but a negligible share of the pairs."""
    counts = np.array([pairs.genuine, pairs.impostor], dtype=float)
    # A few genuine pairs over 256 bins are a comb: widen the bins until the occupied ones hold five pairs on average.
    merged, histograms = 1, counts
    while merged < 16 and min(h.sum() / max(1, np.count_nonzero(h)) for h in histograms) < 5:
        merged *= 2
        histograms = histograms.reshape(2, -1, 2).sum(-1)
    width = 2 * merged / CURVE_BINS
    edges = np.linspace(-1, 1, CURVE_BINS // merged + 1)
    shares = histograms / histograms.sum(1, keepdims=True)
    for share, colour, name, count in zip(
        shares, (GENUINE_COLOUR, IMPOSTOR_COLOUR), ("genuine", "impostor"), counts.sum(1), strict=True
    ):
        axes.stairs(share / width, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(share / width, edges, color=colour, linewidth=1.4, label=f"{name} ({count:,.0f} pairs)")
    if pairs.threshold is not None:
        label = f"threshold {pairs.threshold:.3f} (FAR {SHOWN_FAR})"
        axes.axvline(pairs.threshold, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set(ylabel="density", ylim=(0, 1.08 * float((shares / width).max())))
    axes.set_title(pairs.name)
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
        axes.plot(
            steps, shown, color=colour, linewidth=1.8, marker="o" if len(rows) < 40 else None, markersize=3, label=name
        )
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


def plot_overlaid(path: Path | str, runs: Mapping[str, History], titles: Mapping[str, str]) -> None:
    """Draw keys of several runs' histories (angles in degrees) over the step, a panel a key, a curve a run; log axes as in `plot_training`.

    titles: of each key. Rows may lack a key, as of two data sets that are not evaluated at the same steps.
    """
    columns = min(2, len(titles))
    rows = math.ceil(len(titles) / columns)
    height = 4.2 if len(titles) == 1 else 2.4 * rows
    with _figure(path, 7.2, height) as figure:
        figure.set_figheight(height + 0.25 * math.ceil(len(runs) / 2))
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels[len(titles) :]:
            axes.remove()
        for axes, (key, title) in zip(panels, titles.items(), strict=False):
            for i, (name, history) in enumerate(runs.items()):
                _draw_overlaid(
                    axes, [row for row in history if key in row], key, i, name if axes is panels[0] else None
                )
            axes.set(xlabel="step", ylabel=f"{title} (°)" if key.endswith("_angle") else title)
            axes.xaxis.set_major_locator(MaxNLocator(8 if columns == 1 else 4, integer=True))
        figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _draw_overlaid(axes: Axes, history: History, key: str, number: int, label: str | None) -> None:
    """The curve of run `number`. A point a row where they are few, so that a single one is seen."""
    rows = sorted(history, key=lambda row: row["step"])
    values = _column(rows, key, 180 / math.pi if key.endswith("_angle") else 1.0)
    shown = _moving_average(values, max(5, len(rows) // 30) if len(rows) >= SMOOTHED_FROM else 1)
    line, colour = LINES[number // len(COLOURS) % len(LINES)], COLOURS[number % len(COLOURS)]
    marker = "o" if len(rows) < 40 else None
    axes.plot(
        [row["step"] for row in rows],
        shown,
        line,
        color=colour,
        linewidth=1.6,
        marker=marker,
        markersize=3,
        label=label,
    )
    if np.isfinite(shown).any() and key != "learning_rate":
        _spread_out(axes, shown[np.isfinite(shown)], shown)


def plot_cosines(path: Path | str, panels: Sequence[tuple[str, np.ndarray, float | None]]) -> None:
    """Draw how many classes have which cosine, one panel each: its title, a cosine of every class (NaN: none), a threshold to mark."""
    with _figure(path, 4.0 * len(panels), 3.6) as figure:
        for axes, (title, values, threshold), colour in zip(
            figure.subplots(1, len(panels)), panels, COLOURS, strict=False
        ):
            known = values[np.isfinite(values)]
            axes.set(title=title, xlabel="cosine", ylabel="classes")
            if not len(known):
                _note(axes, "no class has any")
                continue
            low, high = float(known.min()), float(known.max())
            axes.hist(known, bins=np.linspace(low, max(high, low + 1e-3), 61), color=colour)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if threshold is not None:
                axes.axvline(
                    threshold, color="0.2", linestyle="--", linewidth=1, label=f"reported from {threshold:.3f}"
                )
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
