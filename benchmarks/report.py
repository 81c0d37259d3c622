"""Rows of `head.py` as a Markdown table, as a plot, and the operations of the cases that miss their mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
OURS, OTHERS, MARK, FIXED = "#1f6f8b", "#9aa5b1", "#c0392b", "#d5dbe1"


def missed(row: Row) -> bool:
    return row["limit"] is not None and row["value"] is not None and row["value"] > row["limit"]


def cell(row: Row) -> str:
    """The figure with its unit."""
    if row["value"] is None:
        return "–"
    return f"{row['value']:.1f} MiB" if row["unit"] == "MiB" else f"{row['value']:.2f} {row['unit']}"


def table(rows: Sequence[Row], quick: bool = False) -> str:
    lines = ["Sizes of --quick: these figures say nothing.", ""] if quick else []
    lines += ["| case | measured | figure | at most | | |", "|---|---|---|---|---|---|"]
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        verdict = "" if not limit or row["value"] is None else "missed" if missed(row) else "reached"
        lines.append(f"| {row['case']} | {row['title']} | {cell(row)} | {limit} | {verdict} | {row['note']} |")
    return "\n".join(lines) + "\n"


def profiles(rows: Sequence[Row], count: int = 5) -> str:
    """The largest operations of the cases that miss their mark, by their own time (memory cases: by what they
    allocate)."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows if missed(row)):
        for name, operations in next(
            (row["profiles"] for row in rows if row["case"] == case and row.get("profiles")), {}
        ).items():
            lines += [
                f"{case}, {name}:",
                "",
                "| operation | ms a step | calls a step | MiB allocated a step |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {op['op']} | {op['ms']:.2f} | {op['calls']:.0f} | {op['bytes'] / 2**20:.1f} |"
                for op in operations[:count]
            ] + [""]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """One panel for the figures with a mark, one for each workload's peers, one for each sweep."""
    from matplotlib.figure import Figure  # here, so that ranks, which import the command, need not load it

    marks = [row for row in rows if row["limit"] is not None and row["value"] is not None and "sweep" not in row]
    workloads = list(dict.fromkeys(row["workload"] for row in rows if "workload" in row))
    sweeps = [row for row in rows if "sweep" in row]
    columns = max(1, bool(marks) + len(workloads), len(sweeps))
    lines = int(bool(marks or workloads)) + int(bool(sweeps)) or 1
    figure = Figure(figsize=(6.2 * columns, 3.9 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, columns)
    if marks:
        _marks(figure.add_subplot(grid[0, 0]), marks)
    for i, workload in enumerate(workloads):
        _peers(
            figure.add_subplot(grid[0, i + bool(marks)]),
            workload,
            [row for row in rows if row.get("workload") == workload],
        )
    for i, row in enumerate(sweeps):
        _sweep(figure.add_subplot(grid[lines - 1, i]), row)
    figure.savefig(path, dpi=110)


def _marks(axes: Axes, rows: Sequence[Row]) -> None:
    """Each figure as a share of its mark."""
    places = range(len(rows))
    shares = [row["value"] / row["limit"] for row in rows]
    axes.barh(places, shares, color=OURS, height=0.6)
    for place, share, row in zip(places, shares, rows, strict=True):
        axes.text(max(share, 1), place, f"  {cell(row)} of {row['limit']:g}", va="center", fontsize=8)
    axes.axvline(1, color=MARK, linewidth=1.5)
    axes.set_xlim(0, 1.35 * max(1, *shares))
    names = [
        row["case"]
        if "/ floor" in row["title"] or row["unit"] == "MiB"
        else f"{row['case']}, bare floor"
        if "/ bare floor" in row["title"]
        else f"{row['case']}, by C"
        for row in rows
    ]
    axes.set_yticks(places, [name.replace("_", " ") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of what is allowed (line)")
    axes.set_title("Against marks", fontsize=10)


def _peers(axes: Axes, workload: str, rows: Sequence[Row]) -> None:
    """Memory a rank as bars, time written beside them."""
    places = range(len(rows))
    held, step = [row["held_mib"] for row in rows], [row["step_mib"] for row in rows]
    axes.barh(places, held, color=FIXED, height=0.6, label="weights and state")
    colors = [OURS if row["peer"].startswith("partial_fc") else OTHERS for row in rows]
    axes.barh(places, step, left=held, color=colors, height=0.6, label="more in a step")
    for place, row in zip(places, rows, strict=True):
        axes.text(
            row["held_mib"] + row["step_mib"],
            place,
            f" {row['seconds'] * 1e3:.0f} ms ({row['value']:.1f} ×)",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(0, 1.35 * max(a + b for a, b in zip(held, step, strict=True)))
    axes.set_yticks(
        places, [row["peer"].replace(" (", "\n(").replace(" ArcFaceLoss", "\nArcFaceLoss") for row in rows], fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xlabel("MiB a rank: weights and state (light), more in a step (dark)")
    axes.set_title(f"Time of a step and memory, {workload}", fontsize=10)


def _sweep(axes: Axes, row: Row) -> None:
    sizes, seconds = row["sizes"], row["seconds"]
    axes.loglog(sizes, seconds, "o-", color=OURS, label=f"slope {row['slope']:.2f} (upper half)")
    linear = [seconds[-1] * size / sizes[-1] for size in sizes]
    if row["sweep"] == "ranks":
        axes.axhline(seconds[0], color=OTHERS, linestyle="--", label="no cost of being many")
        axes.set_ylim(min(seconds) / 3, max(seconds) * 3)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    else:
        axes.loglog(sizes, linear, "--", color=OTHERS, label="linear")
    axes.set_xlabel(row["against"], fontsize=9)
    axes.set_ylabel("seconds × processors" if row["sweep"] == "ranks" else "seconds a step")
    axes.legend(fontsize=8)
