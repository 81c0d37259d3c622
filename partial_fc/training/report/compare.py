"""Runs side by side: `partial-fc report RUN RUN ...` makes one page of what differs and how they did.

RUN/config.yaml                  ── settings by their dotted names ──>  those in which the runs differ
RUN/metrics.json                 ── every number, by set ──>            a table a set or protocol's result, a column a run, the best marked
RUN/curves.json, history.jsonl   ── overlaid ──>                        ROC, CMC and DIR of each set, training, evaluations during it
  -> one HTML file, without script and external resources

A folder of an evaluation has no settings and no history: the rest is laid side by side.
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

from partial_fc.training.config import CLASS_OPTIONS
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.interval import split_history
from partial_fc.training.protocols.result import Result
from partial_fc.training.report.report import DASH, PLOTS, figure_cell, flatten, is_share, leaves
from partial_fc.training.run import CONFIG, CURVES, METRICS, RunFolder, check_new_file
from partial_fc.training.settings_file import shown_settings

OVERLAID = {
    "loss": "loss",
    "target_angle": "angle to the own class",
    "accuracy": "accuracy in training",
    "learning_rate": "learning rate",
}


@dataclass
class Run:
    """What a run folder says. tables: figures of each evaluation set and protocol's result; evaluated: rows of evaluations in training."""

    name: str
    settings: dict[str, str]
    tables: dict[str, dict[str, Any]]
    others: dict[str, Any]
    curves: list[Evaluation | Result]
    history: list[dict[str, float]]
    evaluated: list[dict[str, float]]


def read_run(path: str, name: str) -> Run:
    """UserError for a folder of neither run nor evaluation, or whose files are damaged. A run that is not finished has no figures."""
    folder = RunFolder(path)
    if not (folder.path / METRICS).is_file():
        folder.check_run()
    try:
        settings = (
            dict(flatten(shown_settings(yaml.safe_load((folder.path / CONFIG).read_text()) or {}, CLASS_OPTIONS)))
            if (folder.path / CONFIG).is_file()
            else {}
        )
        metrics = json.loads((folder.path / METRICS).read_text()) if (folder.path / METRICS).is_file() else {}
        curves = json.loads((folder.path / CURVES).read_text()) if (folder.path / CURVES).is_file() else []
        tables = {each["name"]: each for each in metrics.get("evaluations", [])}
        tables |= {f"{each['name']} ({each['protocol']})": _result_table(each) for each in metrics.get("protocols", [])}
        others = {
            key: value for key, value in metrics.items() if key not in ("evaluations", "protocols", "during_training")
        }
        during = metrics.get("during_training") or {"best": None}
        if during["best"] is not None:
            best = during["best"]
            others["best during training"] = {best["metric"]: best["value"], f"step of {best['metric']}": best["step"]}
        history, evaluated = split_history(folder.history())
        return Run(
            name,
            settings,
            tables,
            others,
            [_curve(each) for each in curves],
            history,
            evaluated or during.get("rows", []),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"the run {path} cannot be read ({type(error).__name__}: {error}); leave it out, or evaluate it again"
        ) from error


def _result_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of one `protocols.Result.to_dict()`."""
    thresholds = {f"thresholds.{key}": cosine for key, cosine in result["thresholds"].items() if cosine is not None}
    notes = {"notes": " ".join(result["notes"])} if result["notes"] else {}
    return {**result["counts"], **result["figures"], **thresholds, **notes}


def _curve(found: dict[str, Any]) -> Evaluation | Result:
    kind = Result if "protocol" in found else Evaluation
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in found.items() if key in known})


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
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
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
    """A table an evaluation set and protocol's result, then one of everything else that was measured."""
    for name in dict.fromkeys(name for run in runs for name in run.tables):
        yield {"name": name, "rows": list(_rows([run.tables.get(name, {}) for run in runs], skip=("name",)))}
    rows = list(_rows([run.others for run in runs]))
    if rows:
        yield {"name": "everything else", "rows": rows}


def _rows(columns: Sequence[Mapping[str, Any]], skip: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row a dotted key that any column has: its cells as text, and which of them is the best."""
    found = [dict(leaves({key: value for key, value in column.items() if key not in skip})) for column in columns]
    for key in dict.fromkeys(key for column in found for key in column if key):
        values = [column.get(key) for column in found]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        texts = [DASH if value is None else figure_cell(key, value) for value in values]
        best = _best(key, numbers) if len(numbers) > 1 else None
        marked = (
            None if best is None or len(set(texts) - {DASH}) == 1 else figure_cell(key, best)
        )  # equal as far as it is told
        yield {"key": key, "cells": [{"text": text, "best": text == marked} for text in texts]}


def _best(key: str, numbers: Sequence[float]) -> float | None:
    """Of figures the largest, of error rates the smallest; None where it is not known which is better."""
    figure = key.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
    if figure == "eer":
        return min(numbers)
    better = figure == "images_per_second" or (is_share(key) and figure != "data_wait" and not figure.endswith("_std"))
    return max(numbers) if better else None


def _differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that not all runs have alike; folders of evaluations, which have none, have dashes."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [{"key": key, "cells": [run.settings.get(key, DASH) for run in runs]} for key in keys]
    return [
        row for row in rows if len({cell for cell, run in zip(row["cells"], runs, strict=True) if run.settings}) > 1
    ]


def _plots(runs: Sequence[Run]) -> list[dict[str, str]]:
    from partial_fc.training.report.plots import plot_cmc, plot_dir, plot_overlaid, plot_roc

    found = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "plot.png"

        def add(caption: str) -> None:
            found.append({"caption": caption, "uri": _uri(picture)})

        for kind, name in dict.fromkeys((type(each), each.name) for run in runs for each in run.curves):
            of_set = [
                replace(each, name=run.name)
                for run in runs
                for each in run.curves
                if (type(each), each.name) == (kind, name)
            ]
            for curve, plot in (("roc", plot_roc), ("dir", plot_dir), ("cmc", plot_cmc)):
                drawn: list[Any] = [
                    each for each in of_set if curve in (("roc",) if isinstance(each, Evaluation) else each.curves)
                ]
                if drawn:
                    plot(picture, drawn)
                    add(f"{name}: {_lowered(PLOTS[f'{curve}.png'])}")
        for key, title in OVERLAID.items():
            rows = {run.name: run.history for run in runs if any(key in row for row in run.history)}
            if rows:
                plot_overlaid(picture, rows, {key: title})
                add(f"{title}, over optimiser steps.")
        for name, figures in _evaluated_figures(runs).items():
            rows = {
                run.name: run.evaluated for run in runs if any(key in row for row in run.evaluated for key in figures)
            }
            plot_overlaid(picture, rows, figures)
            add(f"{name}, evaluated during training, over optimiser steps.")
    return found


def _lowered(sentence: str) -> str:
    """To stand after a colon."""
    return sentence[:1].lower() + sentence[1:]


def _evaluated_figures(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """set -> {"set/figure": "figure"}, of all that was evaluated during training."""
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(
        key for run in runs for row in run.evaluated for key in row if "/" in key and not key.endswith("_std")
    ):
        name, figure = key.rsplit("/", 1)
        found.setdefault(name, {})[key] = figure
    return found


def _uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc report --help` explains every setting")


def report_command(arguments: list[str]) -> None:
    """`partial-fc report RUN RUN ...`: the page, in one process."""

    parser = _Parser(prog="partial-fc report", description="Lay runs side by side on one page.", allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs, or of evaluations that a run folder holds"
    )
    parser.add_argument(
        "--output", default="comparison.html", metavar="FILE", help="the page to write (default comparison.html)"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    asked = parser.parse_args(arguments)
    output = Path(asked.output)
    check_new_file(output, "--output")
    runs = [read_run(path, name) for path, name in zip(asked.runs, run_names(asked.runs), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(runs, output)
    print(f"{len(runs)} runs are on {output}")
