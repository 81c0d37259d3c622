"""A run or a checkpoint of this project as a source of weights: `--head.weights RUN`, `--backbone.weights RUN`.

RUN/                                config.yaml and checkpoints/           ─┐
RUN/checkpoints/                    step-000001000/ ..., of `Checkpointer` ─┼─>  the newest complete checkpoint
RUN/checkpoints/step-000001000/     manifest.json and data                 ─┘    or this one
  backbone/NAME                     tensors of the backbone, whole, whatever number of ranks wrote them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from partial_fc import Checkpointer
from partial_fc.checkpoint.layout import read
from partial_fc.checkpoint.manifest import MANIFEST, read_manifest
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.checkpoint.save_load import stored_tensors
from partial_fc.training.errors import UserError

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
BACKBONES = ("backbone", "model", "net")  # the first is the application's name, the others are those of own loops


def checkpoint_in(path: str | Path) -> Path | None:
    """Return the checkpoint at `path`, or the newest complete one of the run or folder; None if it is none of these.

    Raises UserError for a run, or a folder of checkpoints, without a complete one. Reads the folder: while another
    process writes to it, ranks may find different ones.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    is_run = (path / CONFIG).is_file()
    checkpointer = Checkpointer(path / CHECKPOINTS if is_run else path)
    if not is_run and not any(checkpointer.folder.glob("step-*")):
        return None
    found = checkpointer.latest()
    if found is None:
        kind = "run" if is_run else "folder"
        raise UserError(f"the {kind} {path} has no complete checkpoint yet; train it first, or name another")
    return found


def backbone_in(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone in a checkpoint, by their names in it. Not a collective.

    Raises UserError if there is no backbone, or if it cannot be read.
    """
    try:
        stored = stored_tensors(checkpoint)
        names = sorted({key.split("/")[0] for key in stored})
        name = next((name for name in BACKBONES if name in names), None)
        if name is None:
            raise UserError(
                f"the checkpoint {checkpoint} has no backbone; it has {', '.join(names) or 'nothing'}: save it by that "
                "name, save_checkpoint(path, backbone=...)"
            )
        tensors: dict[str, Any] = {
            key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored.items() if key.startswith(f"{name}/")
        }
        read(tensors, SafeReader(checkpoint / read_manifest(checkpoint)["data"]), alone=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the backbone in {checkpoint} cannot be read: {error}") from error
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items()}


def describe_backbone(checkpoint: Path) -> str:
    """Return words for the backbone of the run that a checkpoint belongs to; empty if it is of no run."""
    try:
        settings = yaml.safe_load((checkpoint.parent.parent / CONFIG).read_text(encoding="utf-8"))["backbone"]
        return f"the run's backbone is {settings['name']} with embeddings of {settings['embedding_size']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return ""


def heads_in(checkpoint: Path) -> list[str]:
    """Return the names of the heads in a checkpoint; UserError if it cannot be read."""
    try:
        stored = stored_tensors(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"the class weights in {checkpoint} cannot be read: {error}") from error
    names = {key.split("/")[0] for key in stored if key.count("/") == 1 and key.endswith("/weight")}
    return sorted(names - set(BACKBONES))
