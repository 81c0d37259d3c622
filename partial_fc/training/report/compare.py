"""Several runs on one page: `partial-fc report RUN RUN ...` compares their settings, figures and curves.

RUN/config.yaml                  ── settings by dotted key ──>  the settings that differ
RUN/metrics.json                 ── numbers by set ──>          a table per set, a column per run, the best marked
RUN/curves.json, history.jsonl   ── overlaid ──>                ROC, CMC and DIR of each set, curves of the training
  -> one HTML file, without scripts or external resources

The folder of an evaluation has no settings and no history; its figures and curves are compared.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from partial_fc.training.config import CLASS_OPTIONS
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.files import bytes_of, text_of, write_atomically
from partial_fc.training.interval import split_history
from partial_fc.training.protocols.result import Result
from partial_fc.training.report.formatting import DASH, figure_cell, flatten, is_share, leaves
from partial_fc.training.report.page import png_uri, render
from partial_fc.training.report.report import CAPTIONS, TABLES
from partial_fc.training.run import CONFIG, CURVES, METRICS, RunFolder
from partial_fc.training.settings_file import shown_settings

OVERLAID = {
    "loss": "loss",
    "target_angle": "angle to the own class",
    "accuracy": "accuracy in training",
    "learning_rate": "learning rate",
}


@dataclass
class Run:
    """The content of a run folder."""

    name: str
    settings: dict[str, str]
    """Dotted key -> text."""
    tables: dict[str, dict[str, Any]]
    """Name of an evaluation set or of a protocol's result -> its figures."""
    others: dict[str, Any]
    """All other metrics."""
    curves: list[Evaluation | Result]
    history: list[dict[str, float]]
    """Logged rows of the training."""
    evaluated: list[dict[str, float]]
    """Rows of the evaluations during training."""


def read_run(path: str, name: str) -> Run:
    """Read a folder; a run that is not finished has no figures.

    Raises UserError if the folder is neither of a run nor of an evaluation, or if its files are damaged.
    """
    folder = RunFolder(path)
    if not (folder.path / METRICS).is_file():
        folder.check_run()
    try:
        settings = shown_settings(yaml.safe_load(_text_of(folder.path / CONFIG, "{}")) or {}, CLASS_OPTIONS)
        metrics = json.loads(_text_of(folder.path / METRICS, "{}"))
        curves = json.loads(_text_of(folder.path / CURVES, "[]"))
        tables = {each["name"]: each for each in metrics.get("evaluations", [])}
        tables |= {f"{each['name']} ({each['protocol']})": _result_table(each) for each in metrics.get("protocols", [])}
        others = {key: value for key, value in metrics.items() if key not in TABLES}
        during = metrics.get("during_training") or {"best": None}
        if during["best"] is not None:
            best = during["best"]
            others["best during training"] = {best["metric"]: best["value"], f"step of {best['metric']}": best["step"]}
        history, evaluated = split_history(folder.history())
        return Run(
            name=name,
            settings=dict(flatten(settings)),
            tables=tables,
            others=others,
            curves=[_curve(each) for each in curves],
            history=history,
            evaluated=evaluated or during.get("rows", []),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"the run {path} cannot be read ({type(error).__name__}: {error}); omit it, or evaluate it again"
        ) from error


def _text_of(path: Path, default: str) -> str:
    return text_of(path) if path.is_file() else default


def _result_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of the table of one `protocols.Result.to_dict()`."""
    thresholds = {f"thresholds.{key}": cosine for key, cosine in result["thresholds"].items() if cosine is not None}
    notes = {"notes": " ".join(result["notes"])} if result["notes"] else {}
    return {**result["counts"], **result["figures"], **thresholds, **notes}


def _curve(found: dict[str, Any]) -> Evaluation | Result:
    """Return an entry of curves.json as what it was; keys of other versions are ignored."""
    kind = Result if "protocol" in found else Evaluation
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in found.items() if key in known})


def run_names(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many last parts as make the names unique."""
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("a run is given twice; give each run once")


def write_comparison(runs: Sequence[Run], path: Path) -> None:
    """Write the page to `path`."""
    page = render(
        "compare.html.j2",
        title=f"Comparison of {len(runs)} runs" if len(runs) > 1 else runs[0].name,
        names=[run.name for run in runs],
        tables=list(_tables(runs)),
        differing=_differing_settings(runs),
        plots=_plots(runs),
    )
    write_atomically(path, page)


def _tables(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield a table per evaluation set and protocol's result, then one of all other metrics."""
    for name in dict.fromkeys(name for run in runs for name in run.tables):
        yield {"name": name, "rows": list(_rows([run.tables.get(name, {}) for run in runs], skip=("name",)))}
    rows = list(_rows([run.others for run in runs]))
    if rows:
        yield {"name": "Other figures", "rows": rows}


def _rows(columns: Sequence[Mapping[str, Any]], skip: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield a row per dotted key that any column has: its cells as text, with the best one marked."""
    found = [dict(leaves({key: value for key, value in column.items() if key not in skip})) for column in columns]
    for key in dict.fromkeys(key for column in found for key in column if key):
        values = [column.get(key) for column in found]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        texts = [DASH if value is None else figure_cell(key, value) for value in values]
        best = _best(key, numbers) if len(numbers) > 1 else None
        all_equal = len(set(texts) - {DASH}) == 1  # as displayed
        marked = None if best is None or all_equal else figure_cell(key, best)
        yield {"key": key, "cells": [{"text": text, "best": text == marked} for text in texts]}


def _best(key: str, numbers: Sequence[float]) -> float | None:
    """Return the largest of figures, the smallest of error rates, and None for numbers of which neither is better."""
    figure = key.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
    if figure == "eer":
        return min(numbers)
    better = figure == "images_per_second" or (is_share(key) and figure != "data_wait" and not figure.endswith("_std"))
    return max(numbers) if better else None


def _differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the settings that differ between runs; folders of evaluations have no settings, hence dashes."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        if len({run.settings.get(key, DASH) for run in runs if run.settings}) > 1:
            rows.append({"key": key, "cells": [run.settings.get(key, DASH) for run in runs]})
    return rows


def _plots(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return captions and data URIs of the curves of all runs, overlaid."""
    from partial_fc.training.report.plots import plot_cmc, plot_dir, plot_roc  # importing matplotlib is slow
    from partial_fc.training.report.training_plots import plot_overlaid

    plots = {"roc": plot_roc, "dir": plot_dir, "cmc": plot_cmc}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "plot.png"

        def add(caption: str) -> None:
            found.append({"caption": caption, "uri": png_uri(bytes_of(picture))})

        for kind, name in dict.fromkeys((type(each), each.name) for run in runs for each in run.curves):
            of_set = [
                replace(each, name=run.name)
                for run in runs
                for each in run.curves
                if (type(each), each.name) == (kind, name)
            ]
            for curve, plot in plots.items():
                drawn: list[Any] = [each for each in of_set if _has_curve(each, curve)]
                if drawn:
                    plot(picture, drawn)
                    caption = CAPTIONS[f"{curve}.png"]
                    add(f"{name}: {caption[:1].lower()}{caption[1:]}")
        for key, title in OVERLAID.items():
            rows = {run.name: run.history for run in runs if any(key in row for row in run.history)}
            if rows:
                plot_overlaid(picture, rows, {key: title})
                add(f"{title}, over optimizer steps.")
        for name, figures in _evaluated_figures(runs).items():
            rows = {
                run.name: run.evaluated for run in runs if any(key in row for row in run.evaluated for key in figures)
            }
            plot_overlaid(picture, rows, figures)
            add(f"{name}, evaluated during training, over optimizer steps.")
    return found


def _has_curve(found: Evaluation | Result, curve: str) -> bool:
    return curve == "roc" if isinstance(found, Evaluation) else curve in found.curves


def _evaluated_figures(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Return set -> {"set/figure": "figure"} of the evaluations during training."""
    found: dict[str, dict[str, str]] = {}
    keys = dict.fromkeys(key for run in runs for row in run.evaluated for key in row)
    for key in keys:
        if "/" not in key or key.endswith("_std"):
            continue
        name, figure = key.rsplit("/", 1)
        found.setdefault(name, {})[key] = figure
    return found
