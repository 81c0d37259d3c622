"""Runs side by side: `partial-fc report RUN RUN ...` makes one page of what differs and how they did.

RUN/config.yaml                  ── settings by their dotted names ──>  those in which the runs differ
RUN/metrics.json                 ── every number, by set ──>            a table, a column a run, the best marked where it is known which is
RUN/curves.json, history.jsonl   ── overlaid ──>                        ROC of each set, training curves
  -> one HTML file, without script and external resources
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.report import DASH, figure_cell, flatten
from partial_fc.training.run import CONFIG, CURVES, METRICS, RunFolder

HIGHER = ("accuracy", "rank1", "images_per_second")  # of these the largest is the best
LOWER = ("eer",)
OVERLAID = {"loss": "loss", "target_angle": "angle to the own class", "accuracy": "accuracy in training", "learning_rate": "learning rate"}


@dataclass
class Run:
    """What a run folder says."""

    name: str
    settings: dict[str, str]
    evaluations: dict[str, dict[str, Any]]
    others: dict[str, Any]
    curves: list[Evaluation]
    history: list[dict[str, float]]


def read_run(path: str, name: str) -> Run:
    """UserError for a folder that is no run, or whose files are damaged. A run that is not finished has no figures."""
    folder = RunFolder(path)
    folder.check_run()
    try:
        settings = dict(flatten(yaml.safe_load((folder.path / CONFIG).read_text()) or {}))
        metrics = json.loads((folder.path / METRICS).read_text()) if (folder.path / METRICS).is_file() else {}
        curves = json.loads((folder.path / CURVES).read_text()) if (folder.path / CURVES).is_file() else []
        evaluations = {each["name"]: each for each in metrics.get("evaluations", [])}
        known = {field.name for field in fields(Evaluation)}
        of_sets = [Evaluation(**{key: value for key, value in each.items() if key in known}) for each in curves]
        others = {key: value for key, value in metrics.items() if key != "evaluations"}
        return Run(name, settings, evaluations, others, of_sets, folder.history())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the run {path} cannot be read ({type(error).__name__}: {error}); leave it out, or evaluate it again") from error


def run_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a run is named twice; name each once")


def write_comparison(runs: Sequence[Run], path: Path) -> None:
    """The page."""
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("compare.html.j2")
    page = template.render(
        title=f"{len(runs)} runs side by side" if len(runs) > 1 else runs[0].name,
        names=[run.name for run in runs],
        tables=list(_tables(runs)),
        differing=_differing(runs),
        plots=_plots(runs),
    )
    path.write_text(page, encoding="utf-8")


def _tables(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A table an evaluation set, then one of everything else that was measured."""
    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    for name in sets:
        yield {"name": name, "rows": list(_rows([run.evaluations.get(name, {}) for run in runs], skip=("name",)))}
    rows = list(_rows([run.others for run in runs]))
    if rows:
        yield {"name": "everything else", "rows": rows}


def _rows(columns: Sequence[Mapping[str, Any]], skip: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row a dotted key that any column has: its cells as text, and which of them is the best."""
    leaves = [dict(_leaves({key: value for key, value in column.items() if key not in skip})) for column in columns]
    for key in dict.fromkeys(key for column in leaves for key in column):
        values = [column.get(key) for column in leaves]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        short = key.rsplit(".", 1)[-1]
        best = None
        if len(set(numbers)) > 1 and len(numbers) > 1:
            best = max(numbers) if key.startswith("tar.") or short in HIGHER else min(numbers) if short in LOWER else None
        cells = [
            {"text": DASH if value is None else figure_cell(key, value), "best": value is not None and value == best} for value in values
        ]
        yield {"key": key, "cells": cells}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [{"key": key, "cells": [run.settings.get(key, DASH) for run in runs]} for key in keys]
    return [row for row in rows if len(set(row["cells"])) > 1]


def _plots(runs: Sequence[Run]) -> list[dict[str, str]]:
    from partial_fc.training.plots import plot_overlaid, plot_roc

    found = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "plot.png"
        for name in dict.fromkeys(each.name for run in runs for each in run.curves):
            curves = [replace(each, name=run.name) for run in runs for each in run.curves if each.name == name]
            plot_roc(picture, curves)
            found.append(
                {"caption": f"{name}: share of genuine pairs accepted over the share of impostor pairs accepted.", "uri": _uri(picture)}
            )
        for key, title in OVERLAID.items():
            rows = {run.name: run.history for run in runs if any(key in row for row in run.history)}
            if rows:
                plot_overlaid(picture, rows, key, title)
                found.append({"caption": f"{title}, over optimiser steps.", "uri": _uri(picture)})
    return found


def _uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc report --help` explains every setting")


def report_command(arguments: list[str]) -> None:
    """`partial-fc report RUN RUN ...`: the page, in one process."""

    parser = _Parser(prog="partial-fc report", description="Lay runs side by side on one page.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or of evaluations that a run folder holds")
    parser.add_argument("--output", default="comparison.html", metavar="FILE", help="the page to write (default comparison.html)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    asked = parser.parse_args(arguments)
    output = Path(asked.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file, such as {output / 'comparison.html'}")
    runs = [read_run(path, name) for path, name in zip(asked.runs, run_names(asked.runs), strict=True)]
    write_comparison(runs, output)
    print(f"{len(runs)} runs are on {output}")
