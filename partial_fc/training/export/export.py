"""A trained backbone for use elsewhere: one folder, written as a whole or not at all.

run folder      config.yaml, the newest complete checkpoint
  1. load       the backbone in eval mode, on the CPU, in float32
  2. write      into a hidden folder beside the output:
                backbone.safetensors   the state dict; its metadata say how to rebuild the module
                backbone.onnx          images float32 [n, C, H, W] -> embeddings float32 [n, D], any n
                preprocessing.json     from an image file to "images", what to do with "embeddings", which run it was, lines to run it
  3. check      both files on the same real images as the backbone in torch, in batches of 1, 3 and 8
  4. publish    one rename

Whatever goes wrong before the rename leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import partial_fc
from partial_fc.checkpoint.save_load import stored_values
from partial_fc.training.backbones import build_backbone
from partial_fc.training.config import RunConfig, add_config, to_config
from partial_fc.training.data import IdentityDataset, UnreadableImage, open_data, open_source
from partial_fc.training.data.augment import to_float
from partial_fc.training.errors import UserError
from partial_fc.training.export.onnx import run_onnx, write_onnx
from partial_fc.training.export.spec import FORMAT, describe
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.settings_parser import SettingsParser

SAFETENSORS, ONNX, PREPROCESSING = "backbone.safetensors", "backbone.onnx", "preprocessing.json"
FORMATS = {"safetensors": SAFETENSORS, "onnx": ONNX}
NEEDS = {"safetensors": ("safetensors.torch",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
BATCHES = (1, 3, 8)
TOLERANCE = (
    1e-4  # of the largest coordinate: other orders of summation differ by 1e-7 to 1e-5, another function by far more
)


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the backbone in torch."""

    folder: Path
    sizes: dict[str, int]
    """Bytes of each file."""
    differences: dict[str, dict[int, float]]
    """Format -> batch size -> largest difference of a coordinate, over the largest coordinate."""
    checked_on: str
    """The images of the check, in words."""


def export_backbone(
    run: str | Path,
    output: str | Path | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    data: Sequence[str | Path] = (),
) -> Export:
    """Write the backbone of the run folder `run` to the new folder `output` (`run`/exported if None), checked on real images.

    `formats` are among "safetensors" and "onnx". The images are those of the identity folders `data`, or of the run's held-out sets,
    or of its training set. UserError, and nothing written, for what cannot be had, or an export that differs by TOLERANCE or more.
    OSError, and nothing left, for a disk that fails.
    """
    formats = _known(formats)
    folder = RunFolder(run)
    folder.check_run()
    out = Path(output) if output is not None else folder.path / "exported"
    above = _check_free(out)
    _check_installed(formats)
    config = _config(folder)
    shape = _image_shape(config)
    backbone, identity = _load(folder, config, shape)
    images, checked_on = _real_images(config, shape, data)
    with torch.no_grad():
        truth = [backbone(part) for part in images.split(list(BATCHES))]
    name = config.backbone.name
    wanted = [(len(part), config.backbone.embedding_size) for part in images.split(list(BATCHES))]
    if [tuple(part.shape) for part in truth] != wanted or not all(part.isfinite().all() for part in truth):
        raise UserError(
            f"the backbone {name!r} of {folder.path} gives no finite embeddings [n, {wanted[0][1]}]; there is nothing to export"
        )
    with _unfinished(out, above) as work:
        differences = {}
        for each in formats:
            path = work / FORMATS[each]
            if each == "onnx":
                write_onnx(backbone, shape, path, name)
                found = run_onnx(path, images, BATCHES, name)
            else:
                _write_safetensors(backbone, config, shape, identity, path)
                found = _run_safetensors(work, images)
            differences[each] = compare(found, truth, FORMATS[each])
        described = describe(config, shape, identity, differences)
        (work / PREPROCESSING).write_text(json.dumps(described, indent=2) + "\n")
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        _publish(work, out)
    return Export(out, sizes, differences, checked_on)


def load_exported_backbone(folder: str | Path) -> nn.Module:
    """The backbone that `folder`/backbone.safetensors holds, on the CPU and in eval mode: images `[n, C, H, W]` to embeddings `[n, D]`.

    A backbone of your own must be registered first: import its module. Raises UserError for a file that is missing, damaged,
    of another origin or of a newer format.
    """
    _check_installed(["safetensors"])
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / SAFETENSORS
    if not path.is_file():
        raise UserError(f"{folder} has no {SAFETENSORS}; give a folder that `partial-fc export-backbone` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if said.get("partial_fc_format") != str(FORMAT):
        raise UserError(f"{path} has format {said.get('partial_fc_format')}, this version reads {FORMAT}")
    try:
        channels, height, width = json.loads(said["image_shape"])
        backbone = build_backbone(
            said["architecture"], image_shape=(channels, height, width), embedding_size=int(said["embedding_size"])
        )
        backbone.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit its own description: {error}") from error
    return backbone.eval()


# ---------------------------------------------------------------------------------------------------- what is exported


def _known(formats: Sequence[str]) -> list[str]:
    unknown = [each for each in formats if each not in FORMATS]
    if unknown or not formats:
        raise UserError(
            f"unknown format {unknown[0]!r}; choose among {', '.join(FORMATS)}"
            if unknown
            else "no format to write was named"
        )
    return [each for each in FORMATS if each in formats]


def _check_installed(formats: Sequence[str]) -> None:
    for module in itertools.chain.from_iterable(NEEDS[each] for each in formats):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"exporting needs the package {error.name}, which is missing: pip install 'partial_fc[export]'"
            ) from error


def _config(folder: RunFolder) -> RunConfig:
    """The run's settings; in full precision, because a run of fp16 on a GPU may be exported where there is none."""
    parser = SettingsParser(exit_on_error=False)
    add_config(parser)
    return to_config(parser, ["--config", str(folder.path / CONFIG), "--train.mixed_precision", "no"])


def _image_shape(config: RunConfig) -> tuple[int, int, int]:
    """(C, H, W) of the run's images, also where those of a folder are gone by now."""
    if config.data.folder is None:
        return open_data(config.data, config.seed).train.image_shape
    size = config.data.image_size or 112
    return (config.data.channels or 3, size, size)


def _load(folder: RunFolder, config: RunConfig, shape: tuple[int, int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """(the backbone in eval mode, which run and step it is of)."""
    from partial_fc.training.results import load_backbone

    newest = folder.newest_checkpoint()
    backbone = load_backbone(folder, config, shape).float().eval()
    if newest is None or folder.newest_checkpoint() != newest:
        raise UserError(f"{folder.path} got a new checkpoint while it was read; export it again")
    progress = stored_values(newest, "progress")
    identity = {
        "name": folder.path.resolve().name,
        "config_sha256": hashlib.sha256((folder.path / CONFIG).read_bytes()).hexdigest(),
        "step": int(progress["step"]),
        "epoch": int(progress["epoch"]),
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
    }
    return backbone, identity


# ---------------------------------------------------------------------------------------------------- the files and their check


def _write_safetensors(
    backbone: nn.Module, config: RunConfig, shape: tuple[int, int, int], identity: dict[str, Any], path: Path
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = backbone.state_dict()
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise UserError(
            f"the backbone {config.backbone.name!r} has a state that is no tensor, {other[0]}; safetensors holds tensors alone"
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
    # copies: the format refuses tensors that share their memory, as tied weights do
    copies = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:  # a full disk too
        raise UserError(f"{SAFETENSORS} cannot be written: {error}") from error


def _run_safetensors(folder: Path, images: Tensor) -> list[Tensor]:
    backbone = load_exported_backbone(folder)
    with torch.no_grad():
        return [backbone(part) for part in images.split(list(BATCHES))]


def compare(found: Sequence[Tensor], truth: Sequence[Tensor], file: str) -> dict[int, float]:
    """Batch size -> largest difference of a coordinate over the largest coordinate; UserError where it is not below TOLERANCE."""
    differences = {}
    for here, there in zip(found, truth, strict=True):
        if here.shape != there.shape:
            raise UserError(
                f"{file} gives {list(here.shape)} where the backbone gives {list(there.shape)}; it is not exported"
            )
        scale = float(there.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        differences[len(there)] = float((here.double() - there.double()).abs().max()) / scale
        if not differences[len(there)] < TOLERANCE:
            raise UserError(
                f"{file} differs from the backbone in torch by {differences[len(there)]:.1e} of the largest coordinate on a batch of "
                f"{len(there)}, allowed is {TOLERANCE:.0e}; it is not exported"
            )
    return differences


def _real_images(config: RunConfig, shape: tuple[int, int, int], data: Sequence[str | Path]) -> tuple[Tensor, str]:
    """(float32 `[sum(BATCHES), C, H, W]` in [-1, 1], the data sets they are from), spread over the sets; those that can be read."""
    try:
        if data:
            sets: dict[str, IdentityDataset] = {str(each): open_source(each, shape[1], shape[0]) for each in data}
        else:
            splits = open_data(config.data, config.seed)
            sets = splits.evaluation or {"training": splits.train}
    except UserError as error:
        hint = "" if data else "; or name a folder of identity/image files to check the export with: --data"
        text = str(error).replace("--data.folder", "--data" if data else "data.folder")
        raise UserError(
            (text.replace("choose one with --data.split", "name one of its files") if data else text) + hint
        ) from error
    wanted = sum(BATCHES)
    images: list[Tensor] = []
    for some in zip(
        *(itertools.chain(_readable(each), itertools.repeat(None)) for each in sets.values()), strict=False
    ):
        if len(images) >= wanted or all(image is None for image in some):
            break
        images += [image for image in some if image is not None]
    if not images:
        raise UserError(f"no image of {', '.join(sets)} can be read; name a folder of identity/image files with --data")
    several = list(itertools.islice(itertools.cycle(images), wanted))  # fewer than wanted are taken again
    return to_float(torch.stack(several)), f"{min(len(images), wanted)} images of {', '.join(sets)}"


def _readable(dataset: IdentityDataset) -> Iterator[Tensor]:
    """The images of a data set, uint8 [C, H, W] each: in strides first, so that a few are of many identities."""
    stride = max(1, len(dataset) // sum(BATCHES))
    for index in itertools.chain.from_iterable(range(first, len(dataset), stride) for first in range(stride)):
        try:
            yield dataset.load(index)
        except UnreadableImage:
            continue


# ---------------------------------------------------------------------------------------------------- all or nothing


def _check_free(out: Path) -> Path:
    """The nearest folder above `out` that exists; UserError unless `out` is free and can be made."""
    try:
        if os.path.lexists(out):
            raise UserError(f"{out} exists already; name another folder with --output, or remove it")
        above = next(path for path in out.absolute().parents if path.exists())
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be used: {error.strerror}") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"the output folder {out} cannot be made: {above} is not a folder that can be written to")
    return above


@contextmanager
def _unfinished(out: Path, above: Path) -> Iterator[Path]:
    """A hidden folder on the disk of `out`, gone afterwards unless it was renamed."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=above))
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be made: {error.strerror}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, out: Path) -> None:
    """Make `work` the folder `out`, with the rights that a new folder has; UserError if another came first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    _check_free(out)
    os.rename(work, out)
