"""The rows of `gpu.py` as a Markdown table and as a plot (SVG, written here, so that no package is needed)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

PASS, FAIL, ERROR, SKIPPED, NO_TIME = "PASS", "FAIL", "error", "skipped", "no time"
JUDGED = ("proof", "waits", "two")  # parts that pass or fail; the others are measured
REST = "the rest of the part"  # the case that stands for what a part did not come to

Row = dict[str, Any]
BF16, FP32, LINE = "#1f6f8b", "#9aa5b1", "#c0392b"
BAR, NAMES, BARS = 20, 330, 420  # pixels: height of a bar with its gap, widths of the names and of the bars


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """PASS, FAIL or "not run" of each part that is judged. A case without time is no pass."""
    found = {}
    for part in JUDGED:
        these = [row["verdict"] for row in rows if row["part"] == part]
        found[part] = FAIL if FAIL in these else NO_TIME if NO_TIME in these else PASS if PASS in these else "not run"
    return found


def table(rows: Sequence[Row], about: dict[str, Any], quick: bool) -> str:
    lines = ["Sizes of --quick: these figures say nothing.", ""] if quick else []
    lines += [f"{name}: {value}  " for name, value in about.items()]
    for part in JUDGED:
        these = [row for row in rows if row["part"] == part]
        if these:
            lines += ["", f"## {part}: {verdicts(rows)[part]}", "", *_judged(part, these)]
    for part in ("speed", "peers", "kernels"):
        these = [row for row in rows if row["part"] == part]
        if these:
            lines += ["", f"## {part}", "", "| case | |", "|---|---|"]
            lines += [f"| {row['case']} | {' '.join(filter(None, (row['verdict'], row['text'])))} |" for row in these]
    for row in rows:
        if row["part"] == "profile":
            lines += ["", f"## profile: {row['case']}", "", " ".join(filter(None, (row["verdict"], row["text"]))), ""]
            lines += _profile(row)
    broken = {name: why for row in rows for name, why in row.get("failed", {}).items()}
    if broken:
        lines += ["", "## Kernels that failed", "", "Plain PyTorch took their place, so no number above shows it.", ""]
        lines += [f"- {name}: {why}" for name, why in broken.items()]
    left = [row for row in rows if row["verdict"] in (NO_TIME, ERROR)]
    if left:
        lines += ["", "## Not measured", "", *(f"- {row['part']}, {row['case']}: {row['verdict']}" for row in left)]
    return "\n".join(lines) + "\n"


def _judged(part: str, rows: Sequence[Row]) -> list[str]:
    """Cases that pass a proof are counted; everything else has a line."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row):
        these = [row for row in rows if row.get("dtype") == dtype]
        passed = sum(row["verdict"] == PASS for row in these)
        worst = max(these, key=lambda row: row["largest"])
        lines.append(f"- {dtype}: {passed} of {len(these)} pass; the largest error {worst['text']}, {worst['case']}")
    rest = [row for row in rows if "dtype" not in row or row["verdict"] != PASS]
    return lines + [f"- {row['verdict']}: {row['case']}: {row['text']}" for row in rest]


def _profile(row: Row) -> list[str]:
    if "kernels" not in row:
        return []
    lines = ["| kernel | ms a step | calls a step |", "|---|---|---|"]
    lines += [f"| `{each['kernel'][:90]}` | {each['ms']:.3f} | {each['calls']:.1f} |" for each in row["kernels"]]
    lines += ["", "| range | ms on the host | ms on the device |", "|---|---|---|"]
    return lines + [f"| {r['range']} | {r['host_ms']:.3f} | {r['device_ms']:.3f} |" for r in row["ranges"]]


# ---------------------------------------------------------------------------------------------------- plot


def plot(rows: Sequence[Row]) -> str:
    """Steps over their floors; peaks over the plan, where memory was measured."""
    speed = [row for row in rows if row["part"] == "speed" and row.get("ratio")]
    peaks = [{**row, "ratio": row["peak"] / row["planned"]} for row in speed if row.get("peak")]
    panels = [("time of a step over its floor (line: 1)", speed), ("peak memory over the plan (line: 1)", peaks)]
    parts, y = [], 10
    for title, these in panels:
        if these:
            drawn, y = _panel(title, these, y)
            parts += drawn
    width = NAMES + BARS + 90
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _panel(title: str, rows: Sequence[Row], y: int) -> tuple[list[str], int]:
    """The shapes of a panel of bars, and where the next one begins."""
    per_unit = BARS / max(1.0, *(row["ratio"] for row in rows))
    parts = [f'<text x="10" y="{y + 14}" font-weight="bold">{escape(title)}</text>']
    top = y + 24
    for i, row in enumerate(rows):
        at, length = top + i * BAR, row["ratio"] * per_unit
        colour = BF16 if row["bf16"] else FP32
        parts += [
            f'<text x="{NAMES - 6}" y="{at + 13}" text-anchor="end">{escape(row["case"])}</text>',
            f'<rect x="{NAMES}" y="{at + 2}" width="{length:.1f}" height="{BAR - 5}" fill="{colour}"/>',
            f'<text x="{NAMES + length + 5:.1f}" y="{at + 13}">{row["ratio"]:.2f}</text>',
        ]
    bottom, one = top + len(rows) * BAR, NAMES + per_unit
    parts.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{bottom}" stroke="{LINE}"/>')
    return parts, bottom + 20
