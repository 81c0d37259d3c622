"""Export of a trained backbone: one folder, written as a whole or not at all.

run folder      config.yaml, the newest complete checkpoint
  1. load       the backbone in eval mode, on the CPU, in float32
  2. write      into a hidden folder beside the output:
                backbone.safetensors   the state dict, with metadata to rebuild the module
                backbone.onnx          images float32 [n, C, H, W] -> embeddings float32 [n, D], any n
                backbone.int8.onnx     the same in 8 bits, if it is asked for (quantised.py)
                preprocessing.json     from an image file to "images", how to use "embeddings", the run, example code
                config.json            architecture, sizes, thresholds of the run, digests of the files
                README.md              the model card (card.py)
  3. check      the files in float32 against the backbone in torch, on real images, in batches of 1, 3 and 8 (check.py);
                that in 8 bits against the one in float32, by its accuracy on the same images
  4. publish    one rename (output_folder.py)

An error before the rename leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import partial_fc
from partial_fc.checkpoint.save_load import stored_values
from partial_fc.training.backbones import build_backbone
from partial_fc.training.backbones.digest import weights_digest
from partial_fc.training.config import RunConfig, add_config, to_config
from partial_fc.training.errors import UserError
from partial_fc.training.export.card import run_metrics, write_card
from partial_fc.training.export.check import BATCHES, TRAINING, ExportImages, compare, open_images, real_images
from partial_fc.training.export.onnx import run_onnx, write_onnx
from partial_fc.training.export.output_folder import check_free, publish, work_folder
from partial_fc.training.export.quantised import CALIBRATION, Compared, compare_accuracy, write_int8
from partial_fc.training.export.spec import FORMAT, MODEL_CONFIG, describe, model_config
from partial_fc.training.files import bytes_of, read_through
from partial_fc.training.protocols.task_files import image_shape
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.settings_parser import SettingsParser

SAFETENSORS = "backbone.safetensors"
ONNX = "backbone.onnx"
INT8 = "backbone.int8.onnx"
PREPROCESSING, CARD = "preprocessing.json", "README.md"
FORMATS = {"safetensors": SAFETENSORS, "onnx": ONNX, "int8": INT8}
DEFAULT_FORMATS = ("safetensors", "onnx")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NEEDS = {"safetensors": ("safetensors.torch",), "onnx": ONNX_PACKAGES, "int8": ONNX_PACKAGES}


@dataclass(frozen=True)
class Export:
    """The files written, and how much they differ from the backbone in torch."""

    folder: Path
    sizes: dict[str, int]
    """File name -> bytes."""
    differences: dict[str, dict[int, float]]
    """Format -> batch size -> largest difference of a coordinate over the largest coordinate."""
    checked_on: str
    """Number and origin of the images of the check, as text."""
    compared: list[Compared]
    """The accuracy in 8 bits beside that in float32, of each set; empty if "int8" was not asked for."""


def export_backbone(
    run: str | Path,
    output: str | Path | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    data: Sequence[str | Path] = (),
) -> Export:
    """Export the backbone of the run folder `run` to the new folder `output` (`run`/exported if None).

    formats: some of "safetensors", "onnx" and "int8". The files are checked on real images: of the identity folders
    `data`, or of the run's held-out sets, or of its training set. "int8" is calibrated on images of the run's training
    set, or of `data`, and its accuracy is measured on the sets of the check.

    Raises UserError, and writes nothing, if something is missing, if the backbone cannot be exported, or if a file
    in float32 differs by TOLERANCE or more. Raises OSError, and leaves nothing behind, if the disk fails.
    """
    formats = _checked_formats(formats)
    folder = RunFolder(run)
    folder.check_run()
    out = Path(output) if output is not None else folder.path / "exported"
    parent = check_free(out)
    _check_installed(formats)
    config = config_of_run(folder)
    shape = image_shape(config)
    backbone, identity = _load(folder, config, shape)
    sets = open_images(folder, config, shape, data, training="int8" in formats)
    images, different = real_images(sets.sets, sum(BATCHES))
    expected = _embeddings(backbone, images)
    name = config.backbone.name
    size = config.backbone.embedding_size
    if not all(part.shape == (n, size) and part.isfinite().all() for part, n in zip(expected, BATCHES, strict=True)):
        raise UserError(
            f"the backbone {name!r} of {folder.path} does not give finite embeddings [n, {size}]; nothing is exported"
        )
    with work_folder(out, parent) as work:
        differences = {}
        if "safetensors" in formats:
            _write_safetensors(backbone, config, shape, identity, work / SAFETENSORS)
            found = _embeddings(load_exported_backbone(work), images)
            differences["safetensors"] = compare(found, expected, SAFETENSORS)
        if "onnx" in formats or "int8" in formats:
            write_onnx(backbone, shape, work / ONNX, name)
            found = run_onnx(work / ONNX, images, BATCHES, name)
            differences["onnx"] = compare(found, expected, ONNX)
        compared = _write_int8(work, sets, name) if "int8" in formats else []
        if "onnx" not in formats:
            differences.pop("onnx", None)
            for path in work.glob(f"{ONNX}*"):
                path.unlink()
        described = describe(config, shape, identity, differences)
        _write_json(work / PREPROCESSING, described)
        metrics = run_metrics(folder.path, identity)
        _write_json(work / MODEL_CONFIG, model_config(config, shape, identity, work, metrics))
        names = sorted(path.name for path in work.iterdir())
        card = write_card(folder.path, config, shape, identity, formats, compared, names)
        (work / CARD).write_text(card, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        publish(work, out)
    return Export(out, sizes, differences, f"{different} images of {', '.join(sets.sets)}", compared)


def load_exported_backbone(folder: str | Path) -> nn.Module:
    """Return the backbone in `folder`/backbone.safetensors, on the CPU and in eval mode.

    It takes images `[n, C, H, W]` and returns embeddings `[n, D]`. A backbone of your own must be registered first:
    import its module. Raises UserError for a file that is missing, damaged, not written by `export_backbone`, or of a
    newer format.
    """
    _check_installed(["safetensors"])
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / SAFETENSORS
    if not path.is_file():
        raise UserError(f"{folder} has no {SAFETENSORS}; give a folder that `partial-fc export-backbone` wrote")
    try:
        read_through(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if metadata.get("partial_fc_format") != str(FORMAT):
        raise UserError(f"{path} has format {metadata.get('partial_fc_format')}, this version reads {FORMAT}")
    try:
        channels, height, width = json.loads(metadata["image_shape"])
        backbone = build_backbone(
            metadata["architecture"],
            image_shape=(channels, height, width),
            embedding_size=int(metadata["embedding_size"]),
            normalize_input=metadata.get("normalize_input") == "true",
        )
        backbone.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not match its own metadata: {error}") from error
    return backbone.eval()


# ---------------------------------------------------------------------------------------------- the run to export


def _checked_formats(formats: Sequence[str]) -> list[str]:
    """Return `formats` in the order of FORMATS. Raises UserError for unknown formats, or for none."""
    unknown = [each for each in formats if each not in FORMATS]
    if unknown:
        raise UserError(f"unknown format {unknown[0]!r}; choose among {', '.join(FORMATS)}")
    if not formats:
        raise UserError(f"no format is given; choose among {', '.join(FORMATS)}")
    return [each for each in FORMATS if each in formats]


def _check_installed(formats: Sequence[str]) -> None:
    """Raise UserError if a package that one of the formats needs is missing."""
    for module in itertools.chain.from_iterable(NEEDS[each] for each in formats):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"exporting needs the package {error.name}, which is missing: pip install 'partial_fc[export]'"
                + ("" if module in NEEDS["safetensors"] else ", or export without ONNX: --formats safetensors")
            ) from error


def config_of_run(folder: RunFolder) -> RunConfig:
    """Return the run's settings with full precision: a run in fp16 may be exported on a machine without a GPU."""
    parser = SettingsParser(exit_on_error=False)
    add_config(parser)
    return to_config(parser, ["--config", str(folder.path / CONFIG), "--train.mixed_precision", "no"])


def _load(folder: RunFolder, config: RunConfig, shape: tuple[int, int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the backbone in eval mode, and the run and step that it is of."""
    from partial_fc.training.results import load_backbone

    newest = folder.newest_checkpoint()
    backbone = load_backbone(folder, config, shape).float().eval()
    if newest is None or folder.newest_checkpoint() != newest:
        raise UserError(f"{folder.path} got a new checkpoint while it was being read; run the export again")
    progress = stored_values(newest, "progress")
    identity = {
        "name": folder.path.resolve().name,
        "config_sha256": hashlib.sha256(bytes_of(folder.path / CONFIG)).hexdigest(),
        "step": int(progress["step"]),
        "epoch": int(progress["epoch"]),
        "weights": weights_digest(backbone.state_dict()),
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
    }
    return backbone, identity


# ---------------------------------------------------------------------------------------------- the files


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_int8(work: Path, sets: ExportImages, name: str) -> list[Compared]:
    """Write backbone.int8.onnx beside backbone.onnx; return its accuracy."""
    calibration = sets.sets if sets.training is None else {TRAINING: sets.training}
    images, _ = real_images(calibration, CALIBRATION)
    write_int8(work / ONNX, images, work / INT8, name)
    return compare_accuracy(work / ONNX, work / INT8, sets.sets, name)


def _write_safetensors(
    backbone: nn.Module, config: RunConfig, shape: tuple[int, int, int], identity: dict[str, Any], path: Path
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = backbone.state_dict()
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise UserError(
            f"the state {other[0]} of the backbone {config.backbone.name!r} is not a tensor; "
            "safetensors can only hold tensors"
        )
    metadata = {
        "format": "pt",
        "partial_fc_format": str(FORMAT),
        "architecture": config.backbone.name,
        "embedding_size": str(config.backbone.embedding_size),
        "image_shape": json.dumps(shape),
        "normalize_input": json.dumps(config.backbone.normalize_input),
        "config_sha256": identity["config_sha256"],
        "step": str(identity["step"]),
    }
    # copies, because the format refuses tensors that share memory, such as tied weights
    copies = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:  # also for a full disk
        raise UserError(f"{path} cannot be written: {error}") from error


def _embeddings(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the embeddings of each of BATCHES."""
    with torch.no_grad():
        return [backbone(part) for part in images.split(list(BATCHES))]
