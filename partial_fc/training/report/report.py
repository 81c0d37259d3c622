"""The page of one run, `report.html`: a single file without scripts or external resources.

    metrics, config, environment, history    measurements, settings, machine and log of the run
      -> cells of text                       formatted here; the template only places them
    folder/plots/*.png                       those of `CAPTIONS` that exist
      -> data URIs                           embedded in base64
    folder/pictures.json                     the hardest pairs and the nearest classes (hardest.py), if it exists
      -> folder/report.html                  rendered from report.html.j2, with all values escaped

`metrics["evaluations"]` is a list of `Evaluation.to_dict()`, `metrics["protocols"]` a list of
`protocols.Result.to_dict()` (with or without their curves), and `metrics["during_training"]` the result of
`interval.during_training`. Other entries of these evaluations, of `metrics` and of the history are listed by key.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from partial_fc.training.evaluation import FARS, Evaluation, percent
from partial_fc.training.files import bytes_of, write_atomically
from partial_fc.training.report.formatting import DASH, figure_cell, flatten, is_share, leaves
from partial_fc.training.report.hardest import read_pictures
from partial_fc.training.report.page import png_uri, render

CAPTIONS = {  # file in plots/ -> caption
    "roc.png": "Share of genuine pairs accepted over the share of impostor pairs accepted.",
    "histograms.png": "Cosines of genuine and impostor pairs, each as a density.",
    "dir.png": "Share of mated probes that are identified over the share of other probes that are accepted.",
    "cmc.png": "Share of probes or queries with a correct match among the first k.",
    "training.png": "Training, over optimizer steps. Angles are without the margin.",
}
TABLES = ("evaluations", "protocols", "during_training")  # entries of metrics that have tables of their own
EVALUATION_KEYS = frozenset(field.name for field in fields(Evaluation))
HEADLINES = (  # of a protocol's figures, the first one that exists is shown at the top
    "accuracy",
    "tar@1e-4",
    "tar@1e-3",
    "tar@1e-2",
    "tar@1e-1",
    "rank-1",
    "mAP",
)
TABLE_ROWS = 12  # rows shown of a long log, evenly spaced, the last one included
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
    """Write `folder/report.html` and return its path; the module's docstring explains `metrics` and the plots.

    config: the resolved configuration, nested mappings and lists of plain values.
    environment: shown unchanged (versions, world size, wall time, throughput).
    history: the logged rows, angles in radians.
    """
    protocols = metrics.get("protocols", [])
    evaluations = [_evaluation_row(evaluation) for evaluation in metrics.get("evaluations", [])]
    page = render(
        "report.html.j2",
        title=title,
        fars=list(FARS),
        evaluations=evaluations,
        headlines=_headlines(evaluations, protocols),
        protocols=[_protocol_row(result) for result in protocols],
        during=_during_table(metrics.get("during_training")),
        figures=_other_figures(metrics),
        others=_other_history(history),
        galleries=_galleries(folder, {result["name"] for result in protocols}),
        throughput=_throughput(metrics.get("training"), environment),
        plots=_embedded_plots(folder / "plots"),
        history=_history_table(history),
        sections=_config_sections(config),
        environment=environment,
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


# ---------------------------------------------------------------------------------------------- figures of evaluations


def _headlines(evaluations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (text, name) of the figures of the first evaluation, and of one figure of each protocol's result."""
    cards = []
    for first in evaluations[:1]:
        name = first["name"]
        cards += [
            (first["tar"][list(FARS).index("1e-3")], f"TAR @ FAR 1e-3, {name}"),
            (first["eer"], f"equal error rate, {name}"),
            (first["accuracy"], f"accuracy, {name}"),
            (first["rank1"], f"rank-1, {name}"),
        ]
    for result in results:
        known = [key for key in HEADLINES if result["figures"].get(key) is not None]
        cards += [(percent(result["figures"][key]), f"{key}, {result['name']}") for key in known[:1]]
    return cards


def _evaluation_row(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells of one `Evaluation.to_dict()` as text."""
    counts = ("images", "identities", "genuine_pairs", "impostor_pairs")
    return {
        **{key: f"{evaluation[key]:,}" for key in counts},
        "name": evaluation["name"],
        "tar": [percent(evaluation["tar"].get(far)) for far in FARS],
        "eer": percent(evaluation["eer"]),
        "accuracy": percent(evaluation["accuracy"]) + _deviation(evaluation["accuracy_std"]),
        "rank1": percent(evaluation["rank1"]),
    }


def _protocol_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return one `protocols.Result.to_dict()` as text: counts, notes, and a list of figures."""
    figures = result["figures"]
    return {
        "protocol": result["protocol"],
        "name": result["name"],
        "counts": ", ".join(f"{count:,} {what}" for what, count in result["counts"].items()),
        "figures": [
            f"{key} {percent(value)}{_deviation(figures.get(f'{key}_std'))}"
            for key, value in figures.items()
            if not key.endswith("_std")
        ],
        "notes": result["notes"],
    }


def _deviation(share: float | None) -> str:
    return "" if share is None else f" ± {100 * share:.2f}"


def _other_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (key, text) of everything without a place of its own, in evaluations and in the rest of the metrics."""
    found = []
    for evaluation in metrics.get("evaluations", []):
        more = {key: value for key, value in evaluation.items() if key not in EVALUATION_KEYS}
        found += [(f"{evaluation['name']}: {key}", figure_cell(key, value)) for key, value in leaves(more) if more]
    rest = {key: value for key, value in metrics.items() if key not in TABLES}
    return found + [(key, figure_cell(key, value)) for key, value in leaves(rest) if rest]


# ---------------------------------------------------------------------------------------------- plots and pictures


def _embedded_plots(folder: Path) -> list[dict[str, str]]:
    """Return the plots that exist, as captions and data URIs."""
    present = [(folder / name, caption) for name, caption in CAPTIONS.items() if (folder / name).is_file()]
    return [{"caption": caption, "uri": png_uri(bytes_of(path))} for path, caption in present]


def _galleries(folder: Path, protocols: Collection[str]) -> list[dict[str, Any]]:
    """Return titles, notes and pairs of pictures: the hardest pairs of each set, and the nearest classes.

    protocols: the names of sets with listed pairs.
    """
    pictures = read_pictures(folder)
    galleries = []
    for name, of_set in pictures["sets"].items():
        listed = name in protocols
        note = "Two images of one identity with a low cosine"
        note += "." if listed else "; one pair per identity."
        galleries.append({"title": f"Hardest genuine pairs: {name}", "note": note, "pairs": of_set["genuine"]})
        note = "Images of two identities with a high cosine"
        note += "." if listed else "; one pair per two identities."
        galleries.append({"title": f"Hardest impostor pairs: {name}", "note": note, "pairs": of_set["impostor"]})
    note = (
        "Classes with the most similar class weights in the head, an image of each. "
        "`partial-fc audit` finds identities that are stored twice."
    )
    galleries.append({"title": "Nearest classes", "note": note, "pairs": pictures["confusions"]})
    for gallery in galleries:
        gallery["pairs"] = [{**pair, "cosine": f"{pair['cosine']:.3f}"} for pair in gallery["pairs"]]
    return [gallery for gallery in galleries if gallery["pairs"]]


# ---------------------------------------------------------------------------------------------- training


def _throughput(training: Mapping[str, Any] | None, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (text, name) of a run's speed; empty without training."""
    if not training:
        return []
    cards = [
        (f"{training['images_per_second']:,}", "images per second"),
        (f"{training['seconds']:,} s", f"of training, {training['steps']:,} steps"),
        (f"{training['seconds'] / max(training['steps'], 1):.3f} s", "per step"),
    ]
    if "data_wait" in training:
        cards.append((f"{100 * training['data_wait']:.1f} %", "of training time spent waiting for data"))
    if "ranks" in environment:
        cards.append((environment["ranks"], "ranks"))
    return cards


def _during_table(during: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the evaluations during training, evenly spaced, including the best one."""
    if not during or not during["rows"]:
        return None
    rows = during["rows"]
    best = during["best"]
    shown = _evenly_spaced(len(rows))
    note = None
    if best is not None:
        shown |= {i for i, row in enumerate(rows) if row["step"] == best["step"]}
        note = f"Best {best['metric']}: {percent(best['value'])} at step {best['step']:,}; its checkpoint is kept."
    keys = list(dict.fromkeys(key for row in rows for key in row if "/" in key))
    return {
        "headings": ["step", *keys],
        "rows": [[f"{rows[i]['step']:,.0f}", *(percent(rows[i].get(key)) for key in keys)] for i in sorted(shown)],
        "best": note,
    }


def _history_table(history: Sequence[Mapping[str, float]]) -> dict[str, list[Any]]:
    """Return headings and up to `TABLE_ROWS` rows of text, including the first and the last row."""
    shown = sorted(_evenly_spaced(len(history)))
    keys = [key for key in HISTORY_COLUMNS if any(key in row for row in history)]
    return {
        "headings": [HISTORY_COLUMNS[key] for key in keys],
        "rows": [[_history_cell(key, history[i].get(key)) for key in keys] for i in shown],
    }


def _history_cell(key: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if key == "step":
        return f"{value:,.0f}"
    if key in ("accuracy", "margin_met"):
        return f"{100 * value:.1f} %"
    return f"{math.degrees(value):.1f}°" if key.endswith("_angle") else f"{value:.4g}"


def _other_history(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return count, first, last, minimum and maximum of the logged numbers that have no column of their own."""
    keys = dict.fromkeys(key for row in history for key in row if key not in HISTORY_COLUMNS)
    found = []
    for key in keys:
        values = [row[key] for row in history if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        if values:
            shown = (values[0], values[-1], min(values), max(values))
            cells = [percent(value) if is_share(key) else f"{value:,.4g}" for value in shown]
            found.append({"key": key, "rows": f"{len(values):,}", "cells": cells})
    return found


def _evenly_spaced(count: int) -> set[int]:
    """Return the indices of at most `TABLE_ROWS` of `count` rows, including the first and the last."""
    return {round(i * (count - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)} if count else set()


# ---------------------------------------------------------------------------------------------- settings


def _config_sections(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a section per nested top-level entry, with dotted keys; plain entries come first, without a name."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    sections = [{"name": key, "rows": list(flatten(value))} for key, value in ({"": plain} | nested).items()]
    return [section for section in sections if section["rows"]]
