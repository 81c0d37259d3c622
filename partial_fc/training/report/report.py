"""One self-contained page for a finished run: `report.html`, to be opened, printed or mailed as a single file.

    metrics, config, environment, history    what the run measured, was told, ran on, and logged
      -> rows of text                        every figure formatted here, so that the template only places it
    folder/plots/*.png                       those of `PLOTS` that exist
      -> data URIs                           embedded in base64
    folder/pictures.json                     the hardest pairs and the nearest classes (hardest.py), if it is there
      -> folder/report.html                  from report.html.j2: no script, no external resource, escaped throughout

`metrics["evaluations"]` is a list of `Evaluation.to_dict()`, `metrics["protocols"]` one of `protocols.Result.to_dict()` (with or
without their curves), `metrics["during_training"]` what `interval.during_training` gives. What else an evaluation has, any other entry of
`metrics`, and any other number of the history, is listed by its key.
"""

import base64
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from partial_fc.training.evaluation import FARS, Evaluation
from partial_fc.training.report.hardest import read_pictures

DASH = "—"
PLOTS = {  # file in plots/ -> caption
    "roc.png": "Share of genuine pairs accepted over the share of impostor pairs accepted.",
    "histograms.png": "Cosines of genuine and impostor pairs, each as a density.",
    "dir.png": "Share of probes found at their own identity, over the share of strangers' probes that find anybody.",
    "cmc.png": "Share of probes or queries of which a right image is among the first k.",
    "training.png": "Training, over optimiser steps. Angles are without the margin.",
}
TABLES = ("evaluations", "protocols", "during_training")  # of metrics, that have tables of their own
EVALUATION_KEYS = frozenset(field.name for field in fields(Evaluation))
HEADLINES = (
    "accuracy",
    "tar@1e-4",
    "tar@1e-3",
    "tar@1e-2",
    "tar@1e-1",
    "rank-1",
    "mAP",
)  # of a protocol's, the first that there is
SHARES = re.compile(
    r"accuracy(_std)?|eer|rank-?\d+|data_wait|(tar|dir|cmc|recall)@.*|mAP(@R)?|R-precision"
)  # names of figures
HISTORY_ROWS = 12  # shown of the logged rows, evenly spread, the last always among them
HISTORY_COLUMNS = {  # key of the row -> heading
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "center_loss": "center loss",
    "target_angle": "target angle",
    "hardest_angle": "nearest other",
    "accuracy": "accuracy",
    "margin_met": "margin met",
    "embedding_norm": "length",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}


def write_report(
    folder: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    history: Sequence[Mapping[str, float]],
) -> Path:
    """Write `folder/report.html` and return its path; see the module's docstring for `metrics` and the plots.

    `config` is the resolved configuration, nested mappings and lists of plain values; `environment` is shown as it is
    (versions, world size, wall time, throughput); `history` holds the logged rows, angles in radians.
    """
    evaluations = [_evaluation_row(evaluation) for evaluation in metrics.get("evaluations", [])]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    page = template.render(
        title=title,
        fars=list(FARS),
        evaluations=evaluations,
        headlines=_headlines(evaluations, metrics.get("protocols", [])),
        protocols=[_protocol_row(result) for result in metrics.get("protocols", [])],
        during=_during_table(metrics.get("during_training")),
        figures=_figures(metrics),
        others=_other_history(history),
        galleries=_galleries(folder, {result["name"] for result in metrics.get("protocols", [])}),
        throughput=_throughput(metrics.get("training"), environment),
        plots=_embedded_plots(folder / "plots"),
        history=_history_table(history),
        sections=_config_sections(config),
        environment=environment,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, text) of what has no place of its own: of each evaluation, after the set's name, and of the rest of the metrics."""
    found = []
    for evaluation in metrics.get("evaluations", []):
        more = {key: value for key, value in evaluation.items() if key not in EVALUATION_KEYS}
        found += [(f"{evaluation['name']}: {key}", figure_cell(key, value)) for key, value in leaves(more) if more]
    rest = {key: value for key, value in metrics.items() if key not in TABLES}
    return found + [(key, figure_cell(key, value)) for key, value in leaves(rest) if rest]


def _headlines(evaluations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(text, what it is): figures of the first evaluation, and one of each protocol's result."""
    cards = []
    for first in evaluations[:1]:
        name = first["name"]
        cards.append((first["tar"][list(FARS).index("1e-3")], f"TAR @ FAR 1e-3, {name}"))
        cards += [
            (first["eer"], f"equal error rate, {name}"),
            (first["accuracy"], f"accuracy, {name}"),
            (first["rank1"], f"rank-1, {name}"),
        ]
    for result in results:
        known = [key for key in HEADLINES if result["figures"].get(key) is not None]
        cards += [(_percent(result["figures"][key]), f"{key}, {result['name']}") for key in known[:1]]
    return cards


def _other_history(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Of numbers that the log has and its table has not: the first, the last and the range of each, and how often it was logged."""
    keys = dict.fromkeys(key for row in history for key in row if key not in HISTORY_COLUMNS)
    found = []
    for key in keys:
        values = [row[key] for row in history if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        if values:
            shown = (values[0], values[-1], min(values), max(values))
            found.append(
                {
                    "key": key,
                    "times": f"{len(values):,}",
                    "cells": [_percent(value) if is_share(key) else f"{value:,.4g}" for value in shown],
                }
            )
    return found


def _galleries(folder: Path, protocols: Collection[str]) -> list[dict[str, Any]]:
    """Titles, notes and pairs of pictures: the hardest of each set, and the nearest classes. protocols: sets whose pairs are listed."""
    pictures = read_pictures(folder)
    found = []
    for name, of_set in pictures["sets"].items():
        listed = name in protocols
        note = "Two images of one identity that look least alike to the backbone"
        note += "." if listed else "; the worst pair of each identity."
        found.append({"title": f"Hardest genuine pairs: {name}", "note": note, "pairs": of_set["genuine"]})
        note = "Images of two identities that look most alike to the backbone"
        note += "." if listed else "; the worst pair of each two."
        found.append({"title": f"Hardest impostor pairs: {name}", "note": note, "pairs": of_set["impostor"]})
    note = "Classes whose rows of the head are nearest to each other, by an image of each. `partial-fc audit` tells which are stored twice."
    found.append({"title": "Nearest classes", "note": note, "pairs": pictures["confusions"]})
    return [{**gallery, "pairs": [_pair(pair) for pair in gallery["pairs"]]} for gallery in found if gallery["pairs"]]


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    return {"cosine": f"{pair['cosine']:.3f}", "images": pair["images"]}


def _throughput(training: Mapping[str, Any] | None, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text, what it is) of a run's speed, from what was measured; empty without training."""
    if not training:
        return []
    cards = [
        (f"{training['images_per_second']:,}", "images a second"),
        (f"{training['seconds']:,} s", f"of training, {training['steps']:,} steps"),
        (f"{training['seconds'] / max(training['steps'], 1):.3f} s", "a step"),
    ]
    if "data_wait" in training:
        cards.append((f"{100 * training['data_wait']:.1f} %", "of that waiting for data"))
    return cards + ([(environment["ranks"], "ranks")] if "ranks" in environment else [])


def _evaluation_row(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of one `Evaluation.to_dict()`, as text."""
    accuracy = _percent(evaluation["accuracy"])
    if evaluation["accuracy_std"] is not None:
        accuracy += f" ± {100 * evaluation['accuracy_std']:.2f}"
    counts = ("images", "identities", "genuine_pairs", "impostor_pairs")
    return {key: f"{evaluation[key]:,}" for key in counts} | {
        "name": evaluation["name"],
        "tar": [_percent(evaluation["tar"].get(far)) for far in FARS],
        "eer": _percent(evaluation["eer"]),
        "accuracy": accuracy,
        "rank1": _percent(evaluation["rank1"]),
    }


def _protocol_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """One `protocols.Result.to_dict()`, as text: what it is of, and a line of figures."""
    figures = result["figures"]
    shown = []
    for key, value in figures.items():
        if key.endswith("_std"):
            continue
        deviation = figures.get(f"{key}_std")
        shown.append(f"{key} {_percent(value)}" + ("" if deviation is None else f" ± {100 * deviation:.2f}"))
    return {
        "protocol": result["protocol"],
        "name": result["name"],
        "counts": ", ".join(f"{count:,} {what}" for what, count in result["counts"].items()),
        "figures": shown,
        "notes": result["notes"],
    }


def _during_table(during: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The evaluations during training, evenly spread, the best of the chosen figure among them and marked."""
    if not during or not during["rows"]:
        return None
    rows, best = during["rows"], during["best"]
    spread = {round(i * (len(rows) - 1) / (HISTORY_ROWS - 1)) for i in range(HISTORY_ROWS)}
    spread |= {i for i, row in enumerate(rows) if best and row["step"] == best["step"]}
    keys = list(dict.fromkeys(key for row in rows for key in row if "/" in key))
    return {
        "headings": ["step", *keys],
        "rows": [[f"{rows[i]['step']:,.0f}", *(_percent(rows[i].get(key)) for key in keys)] for i in sorted(spread)],
        "best": None
        if best is None
        else f"Best {best['metric']}: {_percent(best['value'])} at step {best['step']:,}; its checkpoint is kept.",
    }


def _embedded_plots(folder: Path) -> list[dict[str, str]]:
    """The plots that exist, as captions and data URIs."""
    present = [(folder / name, caption) for name, caption in PLOTS.items() if (folder / name).is_file()]
    return [
        {"caption": caption, "uri": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")}
        for path, caption in present
    ]


def _history_table(history: Sequence[Mapping[str, float]]) -> dict[str, list[Any]]:
    """Headings and up to `HISTORY_ROWS` rows of text, the first and the last included."""
    last = len(history) - 1
    spread = sorted({round(i * last / (HISTORY_ROWS - 1)) for i in range(HISTORY_ROWS)}) if history else []
    keys = [key for key in HISTORY_COLUMNS if any(key in row for row in history)]
    return {
        "headings": [HISTORY_COLUMNS[key] for key in keys],
        "rows": [[_history_cell(key, history[i].get(key)) for key in keys] for i in spread],
    }


def _history_cell(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if key == "step":
        return f"{value:,.0f}"
    if key in ("accuracy", "margin_met"):
        return f"{100 * value:.1f} %"
    return f"{math.degrees(value):.1f}°" if key.endswith("_angle") else f"{value:.4g}"


def _config_sections(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One section per nested top-level entry, its keys dotted; the plain entries come first, without a name."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    sections = [{"name": key, "rows": list(flatten(value))} for key, value in ({"": plain} | nested).items()]
    return [section for section in sections if section["rows"]]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of each of `leaves`."""
    return ((key, _text(leaf)) for key, leaf in leaves(value, prefix))


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each leaf of nested mappings and lists; a list of plain values is one leaf."""
    if isinstance(value, Mapping) and (value or not prefix):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(child, Mapping | list | tuple) for child in value):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, child in children:
        yield from leaves(child, f"{prefix}.{key}" if prefix else key)


def _text(value: Any) -> str:
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or DASH
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_share(key: str) -> bool:
    """Whether a measured value is a share, by its dotted key: "tar.1e-3", "training.data_wait", "lfw/accuracy"; no threshold is one."""
    path = key.split(".")
    return "thresholds" not in path and (path[0] == "tar" or SHARES.fullmatch(path[-1].rsplit("/", 1)[-1]) is not None)


def figure_cell(key: str, value: Any) -> str:
    """A measured value as text: shares in per cent, numbers with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(value)
    if isinstance(value, int):
        return f"{value:,}"
    return _percent(value) if is_share(key) else f"{value:,.6g}"


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.2f} %"
