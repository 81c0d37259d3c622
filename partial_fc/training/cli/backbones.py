"""The command `partial-fc backbones`: every backbone by name, with its parameters and the operations of a forward.

partial-fc backbones --image_size 112 --channels 3 --embedding_size 512
"""

from __future__ import annotations

import argparse

from partial_fc.training.backbones import BACKBONES
from partial_fc.training.backbones.counts import table
from partial_fc.training.cli.parser import CommandParser, add_traceback
from partial_fc.training.whole_numbers import whole


def backbones_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "backbones",
        "The names that --backbone.name takes, with their parameters and the floating-point operations of a forward "
        "(a multiplication and an addition count as two), both counted when the command runs. "
        "--backbone.name also takes timm:NAME and hf:FOLDER, see docs/backbones.md.",
    )
    parser.add_argument("--image_size", type=whole, default=112, help="side of the images, in pixels (default 112)")
    parser.add_argument("--channels", type=whole, default=3, help="1 for grey, 3 for colour (default 3)")
    parser.add_argument("--embedding_size", type=whole, default=512, help="width of the embeddings (default 512)")
    add_traceback(parser)
    return parser


def backbones_command(arguments: list[str]) -> None:
    """`partial-fc backbones`: print the table. Raises UserError for invalid sizes."""
    options = backbones_parser().parse_args(arguments)
    print(table(BACKBONES, (options.channels, options.image_size, options.image_size), options.embedding_size))
