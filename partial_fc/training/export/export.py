"""Export of a trained backbone: one folder, written as a whole or not at all.

run folder      config.yaml, the newest complete checkpoint
  1. load       the backbone in eval mode, on the CPU, in float32
  2. write      into a hidden folder beside the output:
                backbone.safetensors   the state dict, with metadata to rebuild the module
                backbone.onnx          images float32 [n, C, H, W] -> embeddings float32 [n, D], any n
                preprocessing.json     from an image file to "images", how to use "embeddings", the run, example code
  3. check      both files against the backbone in torch, on real images, in batches of 1, 3 and 8 (check.py)
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
from partial_fc.training.export.check import BATCHES, compare, real_images
from partial_fc.training.export.onnx import run_onnx, write_onnx
from partial_fc.training.export.output_folder import check_free, publish, work_folder
from partial_fc.training.export.spec import FORMAT, describe
from partial_fc.training.protocols.task_files import image_shape
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.settings_parser import SettingsParser

SAFETENSORS = "backbone.safetensors"
ONNX = "backbone.onnx"
PREPROCESSING = "preprocessing.json"
FORMATS = {"safetensors": SAFETENSORS, "onnx": ONNX}
NEEDS = {"safetensors": ("safetensors.torch",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


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


def export_backbone(
    run: str | Path,
    output: str | Path | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    data: Sequence[str | Path] = (),
) -> Export:
    """Export the backbone of the run folder `run` to the new folder `output` (`run`/exported if None).

    formats: "safetensors", "onnx" or both. The files are checked on real images: of the identity folders `data`, or
    of the run's held-out sets, or of its training set.

    Raises UserError, and writes nothing, if something is missing, if the backbone cannot be exported, or if a file
    differs by TOLERANCE or more. Raises OSError, and leaves nothing behind, if the disk fails.
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
    images, checked_on = real_images(config, shape, data)
    expected = _embeddings(backbone, images)
    name = config.backbone.name
    size = config.backbone.embedding_size
    if not all(part.shape == (n, size) and part.isfinite().all() for part, n in zip(expected, BATCHES, strict=True)):
        raise UserError(
            f"the backbone {name!r} of {folder.path} does not give finite embeddings [n, {size}]; nothing is exported"
        )
    with work_folder(out, parent) as work:
        differences = {}
        for each in formats:
            path = work / FORMATS[each]
            if each == "onnx":
                write_onnx(backbone, shape, path, name)
                found = run_onnx(path, images, BATCHES, name)
            else:
                _write_safetensors(backbone, config, shape, identity, path)
                found = _embeddings(load_exported_backbone(work), images)
            differences[each] = compare(found, expected, FORMATS[each])
        described = describe(config, shape, identity, differences)
        (work / PREPROCESSING).write_text(json.dumps(described, indent=2) + "\n")
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        publish(work, out)
    return Export(out, sizes, differences, checked_on)


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
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if metadata.get("partial_fc_format") != str(FORMAT):
        raise UserError(f"{path} has format {metadata.get('partial_fc_format')}, this version reads {FORMAT}")
    try:
        channels, height, width = json.loads(metadata["image_shape"])
        backbone = build_backbone(
            metadata["architecture"],
            image_shape=(channels, height, width),
            embedding_size=int(metadata["embedding_size"]),
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
        "config_sha256": hashlib.sha256((folder.path / CONFIG).read_bytes()).hexdigest(),
        "step": int(progress["step"]),
        "epoch": int(progress["epoch"]),
        "weights": weights_digest(backbone.state_dict()),
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
    }
    return backbone, identity


# ---------------------------------------------------------------------------------------------- backbone.safetensors


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
        "config_sha256": identity["config_sha256"],
        "step": str(identity["step"]),
    }
    # copies, because the format refuses tensors that share memory, such as tied weights
    copies = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:  # also for a full disk
        raise UserError(f"{SAFETENSORS} cannot be written: {error}") from error


def _embeddings(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the embeddings of each of BATCHES."""
    with torch.no_grad():
        return [backbone(part) for part in images.split(list(BATCHES))]
