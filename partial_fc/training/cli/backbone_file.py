"""A backbone in a file of weights, without a run: `partial-fc verify model.pt lfw.bin --backbone.name iresnet50`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from partial_fc.training.all_ranks import run_on_all
from partial_fc.training.backbones.settings import BackboneConfig
from partial_fc.training.config import RunConfig
from partial_fc.training.data import DataConfig
from partial_fc.training.errors import UserError
from partial_fc.training.run import CONFIG

WIDTH, SIDE, CHANNELS = 512, 112, 3
OPTIONS = (
    ("backbone.embedding_size", WIDTH, "N", "width of its embeddings"),
    ("data.image_size", SIDE, "N", "side of the images that it takes"),
    ("data.channels", CHANNELS, "N", "their channels: 1 for grey, 3 for colour"),
)


@dataclass
class BackboneFile:
    """A file of weights, what builds its backbone, and the images (C, H, W) that it takes."""

    path: Path
    config: RunConfig
    shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The name of the backbone."""
        return self.config.backbone.name

    def load(self, accelerator: Accelerator) -> nn.Module:
        """Return the backbone; UserError, on every rank, for weights that do not fit it."""
        return run_on_all(lambda: self.config.backbone.build(self.shape, str(self.path)), accelerator)

    def output(self, what: str) -> Path:
        """Return where results go unless a folder is given: beside the file."""
        return self.path.with_name(f"{self.path.stem}-{what}")


def add_backbone_file(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which backbone the weights in a file are of."""
    parser.add_argument(
        "--backbone.name",
        default=None,
        metavar="NAME",
        help="take RUN for a file of weights, such as insightface's model.pt, of this backbone (partial-fc backbones)",
    )
    for name, default, metavar, words in OPTIONS:
        text = f"with --backbone.name: {words} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=None, metavar=metavar, help=text)


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
