"""The commands `partial-fc data ...`: inspect a data set, convert it, draw one from fonts. They run in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from partial_fc.training.cli.glyphs import glyphs_command
from partial_fc.training.cli.parser import CommandParser, add_on_error, add_traceback, check_at_least
from partial_fc.training.data import EncodedIdentities, Format, IdentityDataset, find_format, open_source
from partial_fc.training.data.convert import FORMATS, PART, convert, is_finished
from partial_fc.training.data.formats.packed import is_packed, packed_splits
from partial_fc.training.data.formats.split_names import choose_split
from partial_fc.training.data.inspection import PLOT_ENDINGS, inspect_data, plot_counts
from partial_fc.training.data.sample import write_sample
from partial_fc.training.errors import UserError
from partial_fc.training.export.output_folder import check_free, publish, work_folder
from partial_fc.training.ranks import shows_errors
from partial_fc.training.run import check_new_file
from partial_fc.training.whole_numbers import whole

USAGE = """usage: partial-fc data COMMAND ...

commands:
{commands}

`partial-fc data COMMAND --help` explains every setting.
"""


def data_command(arguments: list[str]) -> int:
    """`partial-fc data COMMAND`: run one of COMMANDS; return its exit code. Raises UserError for mistakes."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9} {text}" for name, (text, _) in COMMANDS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; choose one of: {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]][1](arguments[1:]) or 0


def inspect_command(arguments: list[str]) -> None:
    """`partial-fc data inspect SOURCE`: print counts, sizes, and what is unreadable, duplicated or missing."""
    parser = _source_parser(
        "inspect", "What is in a data set, and what is wrong with it; every image is read.", ", or a packed data set"
    )
    parser.add_argument(
        "--plot",
        default=None,
        metavar="FILE",
        help="file for a histogram of the images per identity: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--headers", action="store_true", help="read only the headers of images, without decoding them: faster"
    )
    options = parser.parse_args(arguments)
    plot = None if options.plot is None else Path(options.plot)
    if plot is not None:
        check_new_file(plot, "--plot", list(PLOT_ENDINGS))
    packed = is_packed(options.source)
    sets: dict[str, IdentityDataset] = (
        {**packed_splits(options.source, options.split)}
        if packed
        else {"": open_from_options(options.source, options, tell_notes=False)}
    )
    print(f"format: {'packed (packed.json)' if packed else _describe_format(options)}")
    for name, dataset in sets.items():
        found = inspect_data(dataset, decode=not options.headers)
        print((f"{name}\n" if name else "") + found.summary())
        if plot is not None and dataset is next(iter(sets.values())):
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot_counts(plot, found, Path(options.source).name)
            print(f"\nhistogram of images per identity: {plot}")


def convert_command(arguments: list[str]) -> None:
    """`partial-fc data convert SOURCE DEST --format FORMAT`: copy encoded images; resume an interrupted copy."""
    parser = _source_parser(
        "convert", "Copy a data set into another format. The same command continues a conversion that was interrupted."
    )
    parser.add_argument(
        "dest", help="folder to make; it must be new, empty, or hold the same conversion, interrupted earlier"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="format to write")
    parser.add_argument(
        "--part",
        type=whole,
        default=PART,
        metavar="N",
        help=f"images per tar or Parquet file, and between two saves of the progress (default {PART})",
    )
    options = parser.parse_args(arguments)
    check_at_least(options, "part", 1)
    if is_packed(options.source):
        raise UserError(
            f"{options.source} is a packed data set, which holds pixels; only data sets of encoded images can be "
            "converted"
        )
    source = open_from_options(options.source, options)
    already = is_finished(options.dest)
    done = convert(source, options.dest, options.format, on_error=options.on_error, part=options.part)
    counts = f"{done['images']:,} images of {done['identities']:,} identities as {options.format}"
    if already:
        print(f"{options.dest}: already converted: {counts}")
        return
    skipped = ""
    if done["left_out"]:
        skipped = f"; {done['left_out']:,} damaged images were skipped (listed in {options.dest}/left_out.txt)"
    print(f"{options.dest}: {counts}, counts and labels verified{skipped}")


def sample_command(arguments: list[str]) -> None:
    """`partial-fc data sample DEST`: write a folder of images to try the application with (docs/tutorial.md)."""
    parser = CommandParser("data sample", "Write a folder of images to try the application with: drawn characters.")
    parser.add_argument("dest", help="folder to make; it must not exist")
    parser.add_argument(
        "--identities", type=whole, default=400, metavar="N", help="identities to train on, at most 1000 (default 400)"
    )
    add_traceback(parser)
    options = parser.parse_args(arguments)
    dest = Path(options.dest)
    try:
        with work_folder(dest, check_free(dest)) as work:
            counts = write_sample(work, options.identities)
            publish(work, dest)
    except UserError as error:
        text = str(error).replace("--data.identities", "--identities").replace(" with --output", "")
        raise UserError(text) from error
    for name, count in counts.items():
        print(f"{dest / name}: {count:,} images")


def _describe_format(options: argparse.Namespace) -> str:
    """Return the format, the split if given, and the files: `parquet, split test (test-0.parquet and 3 more)`."""
    kind, paths = find_format(Path(options.source), options.source_format)
    if kind == "folder":
        return kind
    if options.split is not None:
        paths = choose_split(Path(options.source), paths, options.split)
        kind = f"{kind}, split {options.split}"
    more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    return f"{kind} ({paths[0].name}{more})"


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int | None]]] = {
    "inspect": ("identities, images, sizes; what is unreadable, duplicated or missing", inspect_command),
    "convert": ("copy a data set into another format, without encoding images again", convert_command),
    "sample": ("write a folder of images to try the application with", sample_command),
    "glyphs": ("draw tens of thousands of identities from installed fonts", glyphs_command),
}
"""name -> (line of help, function)"""


def _source_parser(name: str, description: str, more: str = "") -> CommandParser:
    parser = CommandParser(f"data {name}", description)
    parser.add_argument(
        "source", help=f"a folder of identities, a list file, a folder of RecordIO, tar or Parquet files{more}"
    )
    add_source_options(parser)
    add_on_error(parser)
    add_traceback(parser)
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_from_options` reads, except --on_error."""
    parser.add_argument(
        "--source_format", default="auto", choices=get_args(Format), help="format of the data set (default: detected)"
    )
    parser.add_argument(
        "--image_column", type=str, default=None, metavar="NAME", help="column of the images in Parquet files"
    )
    parser.add_argument(
        "--label_column", type=str, default=None, metavar="NAME", help="column of the identities in Parquet files"
    )
    parser.add_argument(
        "--split", type=str, default=None, metavar="NAME", help="split to read, if the file names show several splits"
    )


def open_from_options(
    folder: str, options: argparse.Namespace, image_size: int = 112, channels: int = 3, *, tell_notes: bool = True
) -> EncodedIdentities:
    """Open the data set in `folder` as the command's options say, and print its notes on one rank. Raises UserError
    that names these options."""
    try:
        opened = open_source(
            folder,
            image_size,
            channels,
            format=options.source_format,
            on_error=options.on_error,
            image_column=options.image_column,
            label_column=options.label_column,
            split=options.split,
        )
    except UserError as error:
        # open_source names the settings of a run, which have other names here
        text = str(error).replace("; check --data.folder", "")
        text = text.replace("--data.format", "--source_format").replace("--data.", "--")
        raise UserError(text) from error
    for note in opened.notes if tell_notes and shows_errors() else ():
        print(f"note: {note}", file=sys.stderr)
    return opened
