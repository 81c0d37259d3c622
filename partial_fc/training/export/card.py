"""The model card: README.md of an exported folder, for a person who was not there when the backbone was trained.

config.yaml, data.json, metrics.json of the run, figures of the export  ──>  Markdown with a YAML heading, as model hubs
read it. Figures stand beside the command that measures them. What nobody but the owner knows, the licence above all, is
marked TO FILL IN. Of the places of data and run only the last part of the name is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from partial_fc.training.config import RunConfig
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.export.check import TRAINING
from partial_fc.training.export.quantised import Compared
from partial_fc.training.export.spec import USAGE
from partial_fc.training.files import naming
from partial_fc.training.run import DATA, METRICS

TO_FILL_IN = "**TO FILL IN**"
EXPLAINED = (
    "TAR @ FAR: the share of pairs of one identity that are accepted at the cosine at which that share of pairs of two "
    "identities is accepted. A dash where the set has too few pairs to tell."
)
CONTENT = {
    "backbone.safetensors": "the weights, with what is needed to rebuild the module",
    "backbone.onnx": "the same as ONNX: `images` float32 [n, C, H, W] to `embeddings` float32 [n, D], any n",
    "backbone.int8.onnx": "the same with 8-bit weights and activations; its accuracy is below",
    "config.json": "architecture, sizes, thresholds, digests of the files",
    "preprocessing.json": "from an image file to `images`, how to use `embeddings`, example code",
}


def write_card(
    run: Path, config: RunConfig, shape: tuple[int, int, int], identity: Mapping[str, Any], formats: Sequence[str],
    compared: Sequence[Compared], files: Iterable[str],
) -> str:  # fmt: skip
    """Return the text of the model card of an export from the run folder `run`.

    identity: the run and step, as in preprocessing.json. compared: the accuracy in 8 bits, if that was exported. files:
    the names of the files in the folder.
    """
    metrics = run_metrics(run, identity)
    parts = [
        _heading(config, identity),
        _usage(formats, files),
        _data(run, config),
        _training(config, identity, metrics),
        _figures(metrics, identity),
        _int8(compared, formats),
        _intended_use(),
        _limits(shape),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_metrics(run: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return metrics.json of the run folder; None if there is none, or if it is not of the step of `identity`."""
    found = _read_json(run / METRICS)
    training = found.get("training") if isinstance(found, dict) else None
    return found if isinstance(training, dict) and training.get("steps") == identity["step"] else None


def _read_json(path: Path) -> Any:
    try:
        with naming(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def _heading(config: RunConfig, identity: Mapping[str, Any]) -> str:
    heading = {
        "library_name": "partial_fc",
        "pipeline_tag": "image-feature-extraction",
        "license": "other",
        "license_name": "to-fill-in",
        "tags": ["recognition", "metric-learning", "embeddings", config.backbone.name],
    }
    return f"""---
{yaml.safe_dump(heading, sort_keys=False).strip()}
---

# {_text(identity["name"])}: {_text(config.backbone.name)}, embeddings of {config.backbone.embedding_size} numbers

A backbone that turns an image into an embedding; two images show the same identity if the cosine of their embeddings
is above a threshold. Trained and exported with partial_fc {identity["partial_fc"]}.

Licence: {TO_FILL_IN} (and `license` in the heading of this file). The licence of the weights is the choice of whoever
trained them, within what the data allow."""


def _usage(formats: Sequence[str], files: Iterable[str]) -> str:
    lines = ["## Use"]
    if "safetensors" in formats:
        lines += ["", "With partial_fc:", "", f"```python\n{USAGE['safetensors'].strip()}\n```"]
    if "onnx" in formats:
        lines += ["", "Without it, by onnxruntime:", "", f"```python\n{USAGE['onnx'].strip()}\n```"]
    if "int8" in formats:
        lines += ["", "`backbone.int8.onnx` is used in the same way as `backbone.onnx`."]
    rows = [(f"`{name}`", CONTENT[name]) for name in CONTENT if name in set(files)]
    return "\n".join([*lines, "", *_table(("file", "content"), rows)])


def _data(run: Path, config: RunConfig) -> str:
    name = "the characters that come with partial_fc (ATTRIBUTION.md of its assets has their licences)"
    if config.data.folder is not None:
        name = f"`{_text(Path(config.data.folder).name)}`"
    sets = _read_json(run / DATA)
    rows = []
    for each, said in sets.items() if isinstance(sets, dict) else ():
        if isinstance(said, dict) and {"images", "identities"} <= said.keys():
            rows.append((_text(each), f"{said['identities']:,}", f"{said['images']:,}"))
    shown = _table(("set", "identities", "images"), rows) if rows else ["The run folder has no counts of its data."]
    return "\n".join(
        [
            "## Data",
            "",
            f"Trained on {name}. The identities of the other sets were held out.",
            "",
            *shown,
            "",
            f"Where the images are from, who is in them, and whether they agreed: {TO_FILL_IN}.",
        ]
    )


def _training(config: RunConfig, identity: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    head = config.head
    sampled = f", a share of {head.sample_rate:g} of the classes in every step" if head.sample_rate < 1 else ""
    parts = [
        f"Loss {head.margin.name}{sampled}; batches of {config.train.batch_size}; seed {config.seed}; "
        f"step {identity['step']:,}, epoch {identity['epoch']:,}.",
    ]
    if metrics is not None:
        training = metrics["training"]
        parts.append(
            f"The backbone has {training.get('backbone_parameters', 0):,} parameters and takes "
            f"{training.get('backbone_operations_an_image', 0):,} operations an image."
        )
    parts.append(f"All settings: `config.yaml` of the run, sha256 `{identity['config_sha256']}`.")
    return "## Training\n\n" + " ".join(parts)


def _figures(metrics: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> str:
    command = f"partial-fc evaluate {_text(identity['name'])}"
    lines = ["## Figures", ""]
    evaluations = [] if metrics is None else metrics.get("evaluations", [])
    protocols = [] if metrics is None else metrics.get("protocols", [])
    if not evaluations and not protocols:
        reason = "its run has no figures of this step" if metrics is None else "its run held out no identities"
        return "\n".join([*lines, f"None: {reason}. `{command} --data FOLDER` measures them on any data set."])
    lines += [f"On images of identities that were not trained on, in float32, by `{command}`:", ""]
    rows = []
    for each in evaluations:
        for far, tar in each["tar"].items():
            threshold = each["thresholds"].get(far)
            rows.append((_text(each["name"]), f"TAR @ FAR {far}", _share(tar), _number(threshold)))
        rows.append((_text(each["name"]), "EER", _share(each["eer"]), ""))
        rows.append((_text(each["name"]), "rank-1", _share(each["rank1"]), ""))
    for each in protocols:
        rows += [
            (_text(each["name"]), _text(str(key)), _number(value), "")
            for key, value in each.get("figures", {}).items()
            if isinstance(value, int | float)
        ]
    lines += _table(("set", "figure", "value", "threshold (cosine)"), rows)
    if evaluations:
        lines += ["", EXPLAINED]
    return "\n".join(lines)


def _int8(compared: Sequence[Compared], formats: Sequence[str]) -> str:
    if "int8" not in formats:
        return ""
    command = f"partial-fc export-backbone RUN --formats {' '.join(formats)}"
    lines = ["## int8 beside float32", ""]
    lines += [f"`backbone.onnx` and `backbone.int8.onnx` by onnxruntime on the same images, by `{command}`:", ""]
    rows: list[Sequence[str]] = []
    for each in compared:
        name = f"{_text(Path(each.name).name)} ({each.identities:,} identities, {each.images:,} images)"
        if each.float32 is not None and each.int8 is not None:
            rows += [(name, *row) for row in _both(each.float32, each.int8)]
        cosines = f"{each.mean_cosine:.4f}, {each.lowest_cosine:.4f}"
        rows.append((name, "cosine of the two embeddings of an image: mean, lowest", "", cosines))
    lines += _table(("set", "figure", "float32", "int8"), rows)
    if any(each.name == TRAINING for each in compared):
        lines += ["", "These are images of training, because the run held out none: other identities do worse."]
    if any(each.float32 is None for each in compared):
        lines += ["", "A set without pairs of one identity, or of two, has no other figures."]
    lines += ["", "Thresholds of one file are not those of the other: calibrate them with the file that is used."]
    return "\n".join(lines)


def _both(float32: Evaluation, int8: Evaluation) -> Iterable[tuple[str, str, str]]:
    for far in float32.tar:
        if float32.tar[far] is not None:
            yield f"TAR @ FAR {far}", _share(float32.tar[far]), _share(int8.tar[far])
            yield f"threshold at FAR {far}", _number(float32.thresholds[far]), _number(int8.thresholds[far])
    yield "EER", _share(float32.eer), _share(int8.eer)
    yield "rank-1", _share(float32.rank1), _share(int8.rank1)


def _intended_use() -> str:
    return f"""## Intended use

Verification (is this the same identity?), search in a gallery with an answer "nobody", retrieval and clustering, for
images like those of training, cropped and aligned in the same way. Identities need not be those of training.

Uses that the owner allows, and those that are ruled out: {TO_FILL_IN}."""


def _limits(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    kind = "grey" if channels == 1 else "RGB"
    return f"""## Limits

- Images are resized to {height} x {width} pixels, {kind}; what smaller pixels would show is not seen.
- The figures hold for the sets that they name. Other cameras, other groups of identities or another crop change them:
  calibrate the threshold on images of the place of use.
- Every image gets an embedding, one that shows nothing known as well. There is no detection, no measure of quality and
  no check that an image is of a live subject.
- Differences between groups of identities were not measured here: {TO_FILL_IN} where they matter.
- Embeddings of persons are biometric data; the law of the place of use applies to storing them."""


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _text(value: str) -> str:
    """Return a name from a file or folder in one line of a table, without signs that Markdown or HTML act on."""
    kept = "".join(each if each.isprintable() and each not in "\\`|<>[]*" else " " for each in str(value))
    return " ".join(kept.split()) or "unnamed"
