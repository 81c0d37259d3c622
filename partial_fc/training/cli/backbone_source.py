"""The backbone that a command is about: of a run, or in a file of weights, whose backbone its options name.

partial-fc verify runs/mine lfw.bin
partial-fc verify model.pt lfw.bin --backbone.name iresnet50
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from partial_fc.training.all_ranks import run_on_all
from partial_fc.training.backbones.settings import BackboneConfig
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.data import DataConfig
from partial_fc.training.errors import UserError
from partial_fc.training.interval import direction
from partial_fc.training.protocols.task_files import image_shape
from partial_fc.training.results import load_backbone
from partial_fc.training.run import CONFIG, RunFolder, describe_checkpoint
from partial_fc.training.settings_parser import SettingsParser
from partial_fc.training.whole_numbers import whole

OPTIONS = (
    ("backbone.embedding_size", 512, "width of its embeddings"),
    ("data.image_size", 112, "side of the images that it takes"),
    ("data.channels", 3, "their channels: 1 for grey, 3 for colour"),
)


@dataclass
class BackboneFile:
    """A file of weights, what builds its backbone, and the images (C, H, W) that it takes."""

    path: Path
    config: RunConfig
    shape: tuple[int, int, int]

    @property
    def settings(self) -> RunConfig | None:
        """The settings for a report: it was trained by others, of which nobody knows."""
        return None

    def load(self, accelerator: Accelerator) -> nn.Module:
        """Return the backbone; UserError, on every rank, for weights that do not fit it."""
        return run_on_all(lambda: self.config.backbone.build(self.shape, str(self.path)), accelerator)

    def output(self, what: str) -> Path:
        """Return where results go unless a folder is given: beside the file."""
        return self.path.with_name(f"{self.path.stem}-{what}")

    def figures(self) -> dict[str, str]:
        """Return where the weights are from, for a report."""
        return {"run": str(self.path)}


class BackboneOfRun:
    """The same of a run. which: the checkpoint that is asked for.

    Raises UserError if the folder holds no run.
    """

    def __init__(self, path: str, parser: SettingsParser, which: str) -> None:
        self.run = RunFolder(path)
        self.run.check_run()
        self.path = self.run.path
        self.config = to_config(parser, ["--config", str(self.path / CONFIG)])
        self.shape = image_shape(self.config)
        self.which = which
        self.checkpoint: Path | None = None

    @property
    def settings(self) -> RunConfig | None:
        return self.config

    def load(self, accelerator: Accelerator) -> nn.Module:
        """Return the backbone; UserError, on every rank, if there is no such checkpoint, or it does not fit."""
        better = direction(self.config.evaluation.best)
        self.checkpoint = run_on_all(lambda: self.run.find_checkpoint(self.which, better), accelerator)
        return run_on_all(lambda: load_backbone(self.run, self.config, self.shape, self.checkpoint), accelerator)

    def output(self, what: str) -> Path:
        return self.path / what

    def figures(self) -> dict[str, str]:
        assert self.checkpoint is not None, "not loaded yet"
        return {"run": str(self.path), "checkpoint": describe_checkpoint(self.which, self.checkpoint)}


def add_backbone_file(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which backbone the weights in a file are of."""
    parser.add_argument(
        "--backbone.name",
        default=None,
        metavar="NAME",
        help="take RUN for a file of weights, such as insightface's model.pt, of this backbone (partial-fc backbones)",
    )
    for name, default, words in OPTIONS:
        text = f"with --backbone.name: {words} (default {default})"
        parser.add_argument(f"--{name}", type=whole, default=None, metavar="N", help=text)


def backbone_file(options: argparse.Namespace, path: str) -> BackboneFile | None:
    """Return the file that the options describe; None without --backbone.name, for a run.

    Raises UserError if `path` is not what the options say.
    """
    name, *numbers = (vars(options)[each] for each in ("backbone.name", *(option[0] for option in OPTIONS)))
    given = [option[0] for option, number in zip(OPTIONS, numbers, strict=True) if number is not None]
    if name is None:
        if given:
            raise UserError(f"--{given[0]} is for a file of weights; give --backbone.name, or leave it out")
        if Path(path).is_file() and Path(path).suffix in (".pt", ".pth", ".bin"):
            raise UserError(
                f"{path} is a file of weights: say which backbone they are of, --backbone.name iresnet50 (partial-fc "
                "backbones lists them), or give the folder of a run"
            )
        return None
    if (Path(path) / CONFIG).is_file():
        raise UserError(f"{path} is a run, which has its backbone's name in its settings; leave --backbone.name out")
    if options.checkpoint != "newest":
        raise UserError("a file of weights has no checkpoints; leave --checkpoint out")
    width, side, channels = (n or option[1] for option, n in zip(OPTIONS, numbers, strict=True))
    config = RunConfig(
        backbone=BackboneConfig(name=name, embedding_size=width, weights=path),
        data=DataConfig(image_size=side, channels=channels),  # type: ignore[arg-type]  # it checks them
    )
    config.backbone.check()
    if not Path(path).exists():
        raise UserError(f"there is no file of weights {path}")
    return BackboneFile(Path(path), config, (channels, side, side))
