"""The command `partial-fc data glyphs`: an identity data set from installed fonts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from partial_fc.training.data.fonts.draw_set import build
from partial_fc.training.data.fonts.font_files import SCRIPTS
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.data.formats.packed import IMAGES, LABELS, SOURCES, PackedIdentities, PackedSplit, read_index
from partial_fc.training.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc data glyphs --help` explains every setting")


def glyphs_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc data glyphs",
        description="Draw the characters of installed fonts: a character is an identity, a typeface a sample. "
        "Stopped, it goes on when started again.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fonts",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders with font files, looked through to their depths",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the data set to make; train on it with --data.folder DIR"
    )
    parser.add_argument(
        "--scripts",
        default="han,hangul",
        help=f"of {', '.join(SCRIPTS)} and ranges such as 1F00-1FFF (default han,hangul)",
    )
    parser.add_argument("--size", type=int, default=32, help="side of the pictures, in pixels (default 32)")
    parser.add_argument(
        "--min_designs", type=int, default=4, help="designs a character must have to be an identity (default 4)"
    )
    parser.add_argument(
        "--holdout_identities", type=int, default=0, help="characters never trained on, drawn by the seed (default 0)"
    )
    parser.add_argument(
        "--holdout_designs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="designs never trained on: beginnings of family names, or a number to be drawn by the seed (default none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out (default 0)")
    parser.add_argument(
        "--on_error",
        choices=("skip", "raise"),
        default="skip",
        help="what to do about a font that FreeType refuses (default skip)",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def glyphs_command(arguments: list[str]) -> None:
    """`partial-fc data glyphs`: one process; raises UserError for settings and fonts that make no data set."""
    asked = vars(glyphs_parser().parse_args(arguments))
    asked.pop("traceback")
    settings = GlyphSettings(**asked)

    def progress(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, mininterval=0.5)

    build(settings, lambda line: tqdm.write(line), progress)
    for line in verify(Path(settings.out)):
        print(line)
    print(
        f"Next: partial-fc train configs/quickstart.yaml --data.folder {settings.out} --head.sample_rate 0.1 --output.folder runs/glyphs"
    )


def verify(out: Path) -> list[str]:
    """Count anew what was written, from the files alone; UserError if it is not what a data set must be."""
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
            f"{out} is wrong: {blank} blank pictures, or an identity with two pictures of a design; make it again"
        )
    trained = set(sets["train"].identity_names)
    if any(trained & set(data.identity_names) for split, data in sets.items() if split != "train"):
        raise UserError(f"{out} is wrong: a held-out identity is trained on; make it again")
    if sum(len(data) for data in sets.values()) != len(images):
        raise UserError(f"{out} is wrong: some pictures are in no set; make it again")
    designs = np.bincount(labels)
    lines = [
        f"{out}: {len(index['identities']):,} identities, {len(images):,} pictures of {images.shape[-1]} x {images.shape[-2]}"
    ]
    lines += [
        f"  {split:<6}{data.num_identities:>9,} identities {len(data):>10,} pictures" for split, data in sets.items()
    ]
    lines.append(
        "  designs an identity: " + ", ".join(f"{int((designs >= k).sum()):,} with at least {k}" for k in (4, 6, 8, 12))
    )
    for script, ranges in SCRIPTS.items():
        codes = np.array([int(name[2:], 16) for name in index["identities"]])
        count = sum(int(((codes >= first) & (codes <= last)).sum()) for first, last in ranges)
        if count:
            lines.append(f"  {script}: {count:,}")
    return lines
