"""The commands `partial-fc data ...`: what is in a data set, and one format into another. One process, no ranks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args

from partial_fc.training.cli.glyphs import glyphs_command
from partial_fc.training.data import EncodedIdentities, Format, IdentityDataset, find_format, open_source
from partial_fc.training.data.convert import FORMATS, PART, convert, is_finished
from partial_fc.training.data.formats.packed import is_packed, packed_splits
from partial_fc.training.data.formats.split_names import choose_split
from partial_fc.training.data.inspection import PLOT_ENDINGS, inspect_data, plot_counts
from partial_fc.training.errors import UserError
from partial_fc.training.run import check_new_file

USAGE = """usage: partial-fc data COMMAND ...

commands:
{commands}

`partial-fc data COMMAND --help` explains every setting.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` explains every setting")


def data_command(arguments: list[str]) -> int:
    """`partial-fc data COMMAND`: one of COMMANDS. Raises UserError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9} {text}" for name, (text, _) in COMMANDS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; choose one of: {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]][1](arguments[1:]) or 0


def inspect_command(arguments: list[str]) -> None:
    """`partial-fc data inspect SOURCE`: counts, sizes, what is unreadable, double or missing; a histogram, if asked for."""
    parser = _source_parser(
        "inspect", "What is in a data set, and what is wrong with it; every picture is read.", ", or a packed set"
    )
    parser.add_argument(
        "--plot",
        default=None,
        metavar="FILE",
        help="where to draw the histogram of images an identity: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--headers", action="store_true", help="read the headers of pictures alone, and decode none: quicker"
    )
    asked = parser.parse_args(arguments)
    plot = None if asked.plot is None else Path(asked.plot)
    if plot is not None:
        check_new_file(plot, "--plot", list(PLOT_ENDINGS))
    packed = is_packed(asked.source)
    sets: dict[str, IdentityDataset] = (
        {**packed_splits(asked.source, asked.split)} if packed else {"": open_asked(asked.source, asked)}
    )
    print(f"format: {'packed (packed.json)' if packed else _format_taken(asked)}")
    for name, dataset in sets.items():
        found = inspect_data(dataset, decode=not asked.headers)
        print((f"{name}\n" if name else "") + found.summary())
        if plot is not None and dataset is next(iter(sets.values())):
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot_counts(plot, found, Path(asked.source).name)
            print(f"\nhistogram of images an identity: {plot}")


def convert_command(arguments: list[str]) -> None:
    """`partial-fc data convert SOURCE DEST --format FORMAT`: copied, not encoded again; goes on with a conversion that was ended."""
    parser = _source_parser(
        "convert", "Copy a data set into another format. The same command goes on with a conversion that was ended."
    )
    parser.add_argument("dest", help="folder to make; it must be new, empty, or hold the same conversion, begun")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--part", type=int, default=PART, metavar="N", help=f"images of a shard, and between two notes (default {PART})"
    )
    asked = parser.parse_args(arguments)
    if asked.part < 1:
        raise UserError(f"--part is {asked.part}; give at least 1")
    if is_packed(asked.source):
        raise UserError(
            f"{asked.source} is a packed set, which has pixels and no encoded pictures to copy; it cannot be converted"
        )
    source = open_asked(asked.source, asked)
    already = is_finished(asked.dest)
    done = convert(source, asked.dest, asked.format, on_error=asked.on_error, part=asked.part)
    if already:
        print(
            f"{asked.dest}: already converted: {done['images']:,} images of {done['identities']:,} identities as {asked.format}"
        )
        return
    lost = (
        f"; {done['left_out']:,} damaged ones are left out (named in {asked.dest}/left_out.txt)"
        if done["left_out"]
        else ""
    )
    print(
        f"{asked.dest}: {done['images']:,} images of {done['identities']:,} identities as {asked.format}, counts and labels verified{lost}"
    )


def _format_taken(asked: argparse.Namespace) -> str:
    """Which format was opened, which split if one was asked for, and the files: `parquet, split test (test-0.parquet and 3 more)`."""
    kind, paths = find_format(Path(asked.source), asked.source_format)
    if kind == "folder":
        return kind
    if asked.split is not None:
        paths, kind = choose_split(Path(asked.source), paths, asked.split), f"{kind}, split {asked.split}"
    return f"{kind} ({paths[0].name}{f' and {len(paths) - 1:,} more' if len(paths) > 1 else ''})"


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "inspect": ("identities, images, sizes; what is unreadable, double or missing", inspect_command),
    "convert": ("one format into another, encoded pictures copied as they are", convert_command),
    "glyphs": ("tens of thousands of identities, drawn from installed fonts", glyphs_command),
}
"""name -> (a line of help, the command)"""


def _source_parser(name: str, description: str, more: str = "") -> _Parser:
    parser = _Parser(prog=f"partial-fc data {name}", description=description, allow_abbrev=False)
    parser.add_argument(
        "source", help=f"a folder of identities, a list file, a folder of RecordIO, tar shards or Parquet files{more}"
    )
    add_source_options(parser)
    parser.add_argument(
        "--on_error",
        choices=("skip", "raise"),
        default="skip",
        help="what to do about unreadable images (default skip)",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """What `open_asked` looks at, beside --on_error."""
    parser.add_argument(
        "--source_format", default="auto", choices=get_args(Format), help="what lies there (default: look)"
    )
    parser.add_argument(
        "--image_column", type=str, default=None, metavar="NAME", help="column of Parquet files that has the images"
    )
    parser.add_argument(
        "--label_column", type=str, default=None, metavar="NAME", help="column of Parquet files that has the identities"
    )
    parser.add_argument(
        "--split", type=str, default=None, metavar="NAME", help="which split, where files are of several by their names"
    )


def open_asked(folder: str, asked: argparse.Namespace, image_size: int = 112, channels: int = 3) -> EncodedIdentities:
    """The data set in `folder`, as the command's options say; UserError in the words of these options."""
    try:
        return open_source(
            folder,
            image_size,
            channels,
            format=asked.source_format,
            on_error=asked.on_error,
            image_column=asked.image_column,
            label_column=asked.label_column,
            split=asked.split,
        )
    except UserError as error:
        text = (
            str(error)
            .replace("; check --data.folder", "")
            .replace("--data.format", "--source_format")
            .replace("--data.", "--")
        )
        raise UserError(text) from error
