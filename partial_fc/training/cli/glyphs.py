"""The command `partial-fc data glyphs`: an identity data set from installed fonts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from partial_fc.training.cli.parser import CommandParser, add_on_error, add_traceback
from partial_fc.training.data.fonts.draw_set import build
from partial_fc.training.data.fonts.font_files import SCRIPTS
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.data.formats.packed import IMAGES, LABELS, SOURCES, PackedIdentities, PackedSplit, read_index
from partial_fc.training.errors import UserError
from partial_fc.training.whole_numbers import whole


def glyphs_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "data glyphs",
        "Draw the characters of installed fonts: each character is an identity, each typeface gives one image of it. "
        "The same command continues an interrupted one.",
    )
    parser.add_argument(
        "--fonts",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders with font files, searched with their sub-folders",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the new data set; train on it with --data.folder DIR"
    )
    parser.add_argument(
        "--scripts",
        default="han,hangul",
        help=f"some of {', '.join(SCRIPTS)}, and ranges such as 1F00-1FFF (default han,hangul)",
    )
    parser.add_argument("--size", type=whole, default=32, help="side of the images, in pixels (default 32)")
    parser.add_argument(
        "--min_designs",
        type=whole,
        default=4,
        help="typefaces with different designs that a character needs to become an identity (default 4)",
    )
    parser.add_argument(
        "--holdout_identities",
        type=whole,
        default=0,
        help="number of characters to hold out from training, chosen by the seed (default 0)",
    )
    parser.add_argument(
        "--holdout_designs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="designs to hold out from training: beginnings of family names, or a number, chosen by the seed (default "
        "none)",
    )
    parser.add_argument("--seed", type=whole, default=0, help="seed of what is held out (default 0)")
    add_on_error(parser, "a font that FreeType cannot read")
    add_traceback(parser)
    return parser


def glyphs_command(arguments: list[str]) -> None:
    """`partial-fc data glyphs`: draw the data set in one process. Raises UserError for unusable settings or fonts."""
    options = vars(glyphs_parser().parse_args(arguments))
    options.pop("traceback")
    settings = GlyphSettings(**options)

    def progress(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, mininterval=0.5)

    build(settings, lambda line: tqdm.write(line), progress)
    for line in verify(Path(settings.out)):
        print(line)
    print(
        f"Next: partial-fc train configs/quickstart.yaml --data.folder {settings.out} --head.sample_rate 0.1 "
        "--output.folder runs/glyphs"
    )


def verify(out: Path) -> list[str]:
    """Return lines that count what is in the files of `out`. Raises UserError if the files are inconsistent."""
    index = read_index(out)
    splits: list[PackedSplit] = ["train"]
    if index["held_out"]["identities"]:
        splits += ["seen", "new"] if index["held_out"]["sources"] else ["seen"]
    sets = {split: PackedIdentities(out, split) for split in splits}
    images, labels, sources = (np.load(out / name, mmap_mode="r") for name in (IMAGES, LABELS, SOURCES))
    blank = sum(
        int((images[start : start + 8192].reshape(len(images[start : start + 8192]), -1).max(1) == 0).sum())
        for start in range(0, len(images), 8192)
    )
    if blank or (np.diff(labels.astype(np.int64) * len(index["sources"]) + sources) <= 0).any():
        raise UserError(
            f"{out} is inconsistent: {blank} blank images, or an identity with two images of one design; draw it again"
        )
    trained = set(sets["train"].identity_names)
    if any(trained & set(data.identity_names) for split, data in sets.items() if split != "train"):
        raise UserError(f"{out} is inconsistent: the training split has a held-out identity; draw it again")
    if sum(len(data) for data in sets.values()) != len(images):
        raise UserError(f"{out} is inconsistent: some images are in no split; draw it again")
    designs = np.bincount(labels)
    size = f"{images.shape[-1]} x {images.shape[-2]}"
    lines = [f"{out}: {len(index['identities']):,} identities, {len(images):,} images of {size} pixels"]
    lines += [
        f"  {split:<6}{data.num_identities:>9,} identities {len(data):>10,} images" for split, data in sets.items()
    ]
    lines.append(
        "  designs per identity: "
        + ", ".join(f"{int((designs >= k).sum()):,} with at least {k}" for k in (4, 6, 8, 12))
    )
    for script, ranges in SCRIPTS.items():
        codes = np.array([int(name[2:], 16) for name in index["identities"]])
        count = sum(int(((codes >= first) & (codes <= last)).sum()) for first, last in ranges)
        if count:
            lines.append(f"  {script}: {count:,}")
    return lines
