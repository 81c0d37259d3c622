"""What all plots share: colours, style, logarithmic axes, and writing the file.

Plots are drawn on `Figure` objects with the Agg canvas, not through pyplot: this needs no display and changes neither
the caller's figures nor its backend. Matplotlib's default style is active while drawing, so a user's matplotlibrc has
no influence. The colours, of Okabe and Ito (2008), are distinguishable for colour-blind readers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from partial_fc.training.files import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")  # with more curves than colours, the line style distinguishes them
DPI = 120
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.8,
    "font.size": 10,
}


@contextmanager
def figure(path: Path | str, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of `width` x `height` inches in the common style, and write it to `path` as PNG at the end."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        canvas = FigureCanvasAgg(drawn)
        yield drawn
        # Without matplotlib's version in the metadata, equal data give equal files.
        with replacing(Path(path)) as file:
            canvas.print_png(file, metadata={"Software": None})


def colour_and_line(number: int) -> tuple[str, str]:
    """Return colour and line style of the curve `number`."""
    return COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]


def note(axes: Axes, text: str) -> None:
    """Leave the panel empty but for a text that says why."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
