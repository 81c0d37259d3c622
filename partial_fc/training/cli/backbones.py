"""The command `partial-fc backbones`: every backbone by name, with its parameters and the operations of a forward.

partial-fc backbones --image_size 112 --channels 3 --embedding_size 512
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from partial_fc.training.backbones import BACKBONES
from partial_fc.training.backbones.counts import table
from partial_fc.training.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc backbones --help` explains every setting")


def backbones_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc backbones",
        description="The names that --backbone.name takes, with parameters and the floating-point operations of a forward (a product "
        "and an addition are two), counted here and now. Besides: timm:NAME and hf:FOLDER, see docs/backbones.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--image_size", type=int, default=112, help="side of the images, in pixels (default 112)")
    parser.add_argument("--channels", type=int, default=3, help="1 for grey, 3 for colour (default 3)")
    parser.add_argument("--embedding_size", type=int, default=512, help="width of the embeddings (default 512)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def backbones_command(arguments: list[str]) -> None:
    """`partial-fc backbones`: print the table; UserError for sizes that are none."""
    asked = backbones_parser().parse_args(arguments)
    print(table(BACKBONES, (asked.channels, asked.image_size, asked.image_size), asked.embedding_size))
