"""Plots of evaluations and audits, as PNG files.

    sets of pairs    -> plot_roc         TAR over FAR (log axis), one curve per evaluation set or list of pairs
    sets of pairs    -> plot_histograms  genuine and impostor cosines, one panel per set
    identification   -> plot_dir         DIR over FPIR (log axis), one curve per result
      and retrieval  -> plot_cmc         share with a correct match among the first k
    audit            -> plot_cosines     cosines of class rows to the nearest class and to the mean of their images

Plots over training steps are in training_plots.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from partial_fc.training.evaluation import CURVE_BINS, MIN_FALSE_ACCEPTS, Evaluation, percent
from partial_fc.training.protocols.pairs import LEAST_FALSE_ACCEPTS
from partial_fc.training.protocols.result import Result
from partial_fc.training.report.canvas import COLOURS, colour_and_line, figure, note, plain_log_ticks

GENUINE_COLOUR = COLOURS[0]
IMPOSTOR_COLOUR = COLOURS[1]
SHOWN_FAR = "1e-3"  # the legends give TAR and the threshold at this FAR,
SHOWN_FPIR = "1e-1"  # and DIR at this FPIR


@dataclass(frozen=True)
class PairSet:
    """What is drawn of a set of pairs: points (FAR, TAR), TAR by the name of the FAR, a threshold, histograms.

    The histograms have `CURVE_BINS` bins. least: the curve starts at the FAR with this many expected false accepts,
    as the figures do (see `tar_at_far`).
    """

    name: str
    roc: Sequence[tuple[float, float]]
    tar: Mapping[str, float | None]
    threshold: float | None
    genuine: Sequence[int]
    impostor: Sequence[int]
    least: int

    @classmethod
    def of(cls, found: Evaluation | Result) -> "PairSet":
        """Convert an evaluation of all pairs, or a result on listed pairs (verification or templates)."""
        if isinstance(found, Evaluation):
            return cls(
                name=found.name,
                roc=found.roc,
                tar=found.tar,
                threshold=found.thresholds[SHOWN_FAR],
                genuine=found.genuine_histogram,
                impostor=found.impostor_histogram,
                least=MIN_FALSE_ACCEPTS,
            )
        return cls(
            name=found.name,
            roc=found.curves["roc"],
            tar=_figures_at(found, "tar"),
            threshold=found.thresholds.get(f"tar@{SHOWN_FAR}"),
            genuine=found.histograms["genuine"],
            impostor=found.histograms["impostor"],
            least=LEAST_FALSE_ACCEPTS,
        )


@dataclass(frozen=True)
class _Curve:
    """Points (x, share), those of them with a marker, and a figure for the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: Sequence[tuple[float, float]]
    figure: float | None


def plot_roc(path: Path | str, sets: Sequence[Evaluation | Result]) -> None:
    """Draw TAR over FAR (log axis) to `path`, with markers at the figures; `sets` as in `PairSet.of`.

    A curve starts where ten false accepts are expected (one for listed pairs), for the same reason as the figures (see
    `tar_at_far`).
    """
    curves = []
    for each in map(PairSet.of, sets):
        points = [point for point in each.roc if point[0] * sum(each.impostor) >= each.least - 1e-6]
        curves.append(_Curve(each.name, points or each.roc, _marked(each.tar), each.tar.get(SHOWN_FAR)))
    with _share_axes(path, curves, f"TAR @ FAR {SHOWN_FAR}", steps=True) as axes:
        axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", title="Verification")


def plot_dir(path: Path | str, results: Sequence[Result]) -> None:
    """Draw DIR over FPIR (log axis) to `path`, with markers at the figures, of results of open-set identification."""
    curves = []
    for each in results:
        figures = _figures_at(each, "dir")
        curves.append(_Curve(each.name, each.curves["dir"], _marked(figures), figures.get(SHOWN_FPIR)))
    with _share_axes(path, curves, f"DIR @ FPIR {SHOWN_FPIR}", steps=True) as axes:
        axes.set(xlabel="false positive identification rate (FPIR)", ylabel="detected and identified (DIR)")
        axes.set_title("Identification, open set")


def plot_cmc(path: Path | str, results: Sequence[Result]) -> None:
    """Draw the share of probes or queries with a correct match among the first k, over k (log axis), to `path`."""
    curves = [_Curve(each.name, each.curves["cmc"], [], each.curves["cmc"][0][1]) for each in results]
    with _share_axes(path, curves, "rank-1") as axes:
        axes.set(xlabel="k", ylabel="found among the first k (CMC)", title="Identification and retrieval")
        plain_log_ticks(axes.xaxis)


def _figures_at(result: Result, kind: str) -> dict[str, float | None]:
    """Return the figures "kind@x" of a result, by x."""
    prefix = f"{kind}@"
    return {key.removeprefix(prefix): share for key, share in result.figures.items() if key.startswith(prefix)}


def _marked(figures: Mapping[str, float | None]) -> list[tuple[float, float]]:
    """Return the points (x, share) of the figures that exist; the keys are numbers as text."""
    return [(float(x), share) for x, share in figures.items() if share is not None]


@contextmanager
def _share_axes(path: Path | str, curves: Sequence[_Curve], legend: str, *, steps: bool = False) -> Iterator[Axes]:
    """Draw the curves over a log axis, each with its figure in the legend; yield the axes, then write to `path`."""
    with figure(path, 7.2, 4.6) as drawn:
        axes = drawn.subplots()
        drawn.set_figheight(4.6 + 0.25 * math.ceil(len(curves) / 2))
        lowest = 1.0
        for i, curve in enumerate(curves):
            colour, line = colour_and_line(i)
            x, share = np.array(curve.points).T
            lowest = min([lowest, float(share.min()), *(each for _, each in curve.marked)])
            style = (
                {"drawstyle": "steps-post"}
                if steps
                else {"marker": "o" if len(curve.points) < 40 else None, "markersize": 3}
            )
            label = f"{curve.name}: {percent(curve.figure)}"
            axes.semilogx(x, share, line, color=colour, linewidth=1.8, label=label, **style)
            if curve.marked:
                axes.plot(*np.array(curve.marked).T, "o", color=colour, markersize=5, clip_on=False, zorder=3)
        floor = max(0.0, math.floor(lowest * 10 - 0.5) / 10)
        axes.set_ylim(floor, 1 + 0.02 * (1 - floor))
        axes.margins(x=0.02)
        yield axes
        if curves:
            drawn.legend(loc="outside lower center", title=legend, ncols=2, frameon=False)
        else:
            note(axes, "no evaluation")


def plot_histograms(path: Path | str, sets: Sequence[Evaluation | Result]) -> None:
    """Draw the densities of genuine and impostor cosines to `path`, a panel per set, over a common axis.

    `sets` as in `PairSet.of`. Each density integrates to one over the cosine, so the two can be compared although
    there are many more impostor pairs. The dashed line is the threshold at FAR 1e-3, if there is one.
    """
    rows = max(1, len(sets))
    with figure(path, 7.2, 1.0 + 2.7 * rows) as drawn:
        panels = drawn.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        spans = [_draw_densities(axes, PairSet.of(each)) for axes, each in zip(panels, sets, strict=False)]
        if spans:
            panels[-1].set_xlim(min(low for low, _ in spans), max(high for _, high in spans))
        else:
            note(panels[0], "no evaluation")
        panels[-1].set_xlabel("cosine of a pair")


def _draw_densities(axes: Axes, pairs: PairSet) -> tuple[float, float]:
    """Fill one panel; return the range of cosines with nearly all of the pairs."""
    counts = np.array([pairs.genuine, pairs.impostor], dtype=float)
    # Few genuine pairs in 256 bins look like a comb: merge bins until the occupied ones have five pairs on average.
    merged = 1
    histograms = counts
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
    occupied = np.flatnonzero((shares > 1e-4).any(0))
    return max(-1.0, float(edges[occupied[0]]) - 0.05), min(1.0, float(edges[occupied[-1] + 1]) + 0.05)


def plot_cosines(path: Path | str, panels: Sequence[tuple[str, np.ndarray, float | None]]) -> None:
    """Draw histograms of one cosine per class to `path`.

    Each panel has a title, the cosines of all classes (NaN where a class has none), and a threshold to mark, or None.
    """
    with figure(path, 4.0 * len(panels), 3.6) as drawn:
        all_axes = drawn.subplots(1, len(panels))
        for axes, (title, values, threshold), colour in zip(all_axes, panels, COLOURS, strict=False):
            known = values[np.isfinite(values)]
            axes.set(title=title, xlabel="cosine", ylabel="classes")
            if not len(known):
                note(axes, "no class has one")
                continue
            low = float(known.min())
            high = float(known.max())
            axes.hist(known, bins=np.linspace(low, max(high, low + 1e-3), 61), color=colour)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if threshold is not None:
                label = f"reported from {threshold:.3f}"
                axes.axvline(threshold, color="0.2", linestyle="--", linewidth=1, label=label)
                axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
                axes.legend(loc="upper left", frameon=False)
