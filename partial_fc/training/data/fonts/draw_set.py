"""An identity data set from installed fonts: a character is an identity, a typeface's design an independent, human-made sample of it.

    faces [F]                 ── sample characters, drawn by each ──>  cosines of every two faces' pictures of the same character
      -> designs              faces that nearly copy each other, or a part of each other, are one design
    design ── its faces, the largest first ──>   .work/pictures-DDD.npy uint8 [characters, size, size]; resumed here after a stop
    all designs               ── characters with at least `min_designs` pictures ──>  identities, some of them held out
      -> images.npy, labels.npy, sources.npy, packed.json      (packed.py; a design is a source)
      -> counted anew from what was written

Two traps of fonts. They cover characters that they do not have, with blanks or one box (glyph_fonts.py drops these). And they copy each
other: a copy among the held-out designs would make "never trained on" a lie. Two faces are one design where at least `COPIED` of the sample
characters that both have correlate by `ALIKE` or more, in any block of Unicode. Among 67 families of Debian's Chinese and Korean fonts
nothing lies between 0.04 (independent designs) and 0.45 (BabelStone Han, which took most of its common characters from AR PL UMing).
Beyond that, a held-out design's picture that correlates by `LEAKED` with the same character in a training design is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.fonts.font_files import (
    Drawn,
    Face,
    FontError,
    Found,
    code_points,
    digest,
    draw_face,
    find_faces,
    font_files,
    opened,
    parse_ranges,
)
from partial_fc.training.data.formats.packed import IMAGES, LABELS, SOURCES, is_packed, read_index, write_index
from partial_fc.training.errors import UserError

SAMPLED = 64  # characters of a block of Unicode that are compared
FEWEST_COMMON = 16  # of a block that two faces must share to be compared there
ALIKE, COPIED, LEAKED = 0.95, 0.2, 0.97
BLOCKS = (
    0x3400,
    0x4DC0,
    0xA000,
    0xAC00,
    0xD7B0,
    0x20000,
    0x2A6E0,
    0x2EE60,
    0x323B0,
)  # where a block of many characters begins or ends
CHUNK = 4096  # pictures compared at a time
Progress = Callable[[str, int], Any]
"""`progress(what, total)` makes a bar with `update()` and `close()`."""


@dataclass
class GlyphSettings:
    """What to make."""

    fonts: list[str]
    out: str
    scripts: str = "han,hangul"
    size: int = 32
    min_designs: int = 4
    holdout_identities: int = 0
    holdout_designs: list[str] = field(default_factory=list)
    """Families by the beginning of their names, or one number: so many designs, drawn by the seed."""
    seed: int = 0
    on_error: str = "skip"

    def check(self) -> None:
        at_least = {"size": 8, "min_designs": 2, "holdout_identities": 0, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; give at least {least}")
        if self.size > 256:
            raise UserError(f"--size is {self.size}; give at most 256 pixels")
        if self.holdout_identities == 1:
            raise UserError("--holdout_identities is 1, so there would be no pair to reject; give at least 2, or 0")
        if self.holdout_designs and not self.holdout_identities:
            raise UserError("--holdout_designs has an effect with --holdout_identities only; give both")


@dataclass
class Design:
    """Faces that are one typeface, the largest first."""

    faces: list[Face]

    @property
    def name(self) -> str:
        return self.faces[0].family


def build(settings: GlyphSettings, say: Callable[[str], None], progress: Progress) -> None:
    """Make the data set in `settings.out`, or go on making it. Raises UserError for settings and fonts that make none."""
    settings.check()
    ranges = parse_ranges(settings.scripts)
    out = Path(settings.out)
    files = font_files(settings.fonts)
    stamp = {
        **asdict(settings),
        "out": "",
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    if is_packed(out):
        _same(read_index(out)["about"].get("made_from"), stamp, out)
        say(f"{out} is complete already")
        return
    work = _claim(out, stamp)
    found = _watched(progress, "fonts", len(files), lambda tick: find_faces(files, ranges, settings.on_error, tick))
    _tell_found(found, say)
    designs = _watched(progress, "comparing fonts", len(found.faces), lambda tick: group(found, ranges, settings, tick))
    say(f"{len(found.faces)} families are {len(designs)} designs:")
    for design in designs:
        others = [face.family for face in design.faces[1:]]
        say(f"  {design.name}" + (f"   (the same: {', '.join(others)})" if others else ""))
    held = held_designs(designs, settings)
    _watched(
        progress, "drawing", len(designs), lambda tick: _draw_designs(designs, ranges, settings, work, found, tick)
    )
    _tell_dropped(work, len(designs), say)
    about = {"made_from": stamp, "fonts": {design.name: [face.path for face in design.faces] for design in designs}}
    _watched(
        progress, "writing", len(designs), lambda tick: assemble(out, work, designs, held, settings, about, say, tick)
    )
    shutil.rmtree(work)


def _watched(progress: Progress, what: str, total: int, work: Callable[[Callable[[], object]], Any]) -> Any:
    bar = progress(what, total)
    try:
        return work(lambda: bar.update())
    finally:
        bar.close()


def _claim(out: Path, stamp: dict[str, Any]) -> Path:
    """The folder of what is half done; UserError if `out` holds something else."""
    work = out / ".work"
    note = work / "made_from.json"
    try:
        if note.is_file():
            _same(json.loads(note.read_text()), stamp, out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is in use; choose another --out")
        else:
            work.mkdir(parents=True)
            note.write_text(json.dumps(stamp))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{out} cannot be used ({error}); remove it or choose another --out") from error
    return work


def _same(before: Any, stamp: dict[str, Any], out: Path) -> None:
    if before != json.loads(json.dumps(stamp)):
        changed = [
            key
            for key in stamp
            if not isinstance(before, dict) or before.get(key) != json.loads(json.dumps(stamp[key]))
        ]
        raise UserError(
            f"{out} was begun with other settings or fonts ({', '.join(changed)}); remove it or choose another --out"
        )


def _tell_found(found: Found, say: Callable[[str], None]) -> None:
    for path, reason in found.broken.items():
        say(f"left out: {path}: {reason}")
    say(
        f"left out: {found.other_styles} other weights and styles of a family, {found.useless} faces with none of the characters"
    )


# ------------------------------------------------------------------------------------------------ designs


def group(
    found: Found, ranges: Sequence[tuple[int, int]], settings: GlyphSettings, tick: Callable[[], object]
) -> list[Design]:
    """Faces that copy each other put together; each joins the first design of which it, or a part of it, copies a face."""
    sample = _sample(found.faces, ranges, settings.seed)
    block_of = np.searchsorted(np.array(BLOCKS), sample, side="right")
    blocks = [np.flatnonzero(block_of == block) for block in np.unique(block_of)]
    designs: list[Design] = []
    drawn: list[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]] = []
    for face in found.faces:
        mine = _directions(_drawn(face, sample.tolist(), ranges, settings, found), sample, settings.size)
        tick()
        if mine is None:
            continue
        for design, others in zip(designs, drawn, strict=True):
            if any(_copies(mine, other, blocks) for other in others):
                design.faces.append(face)
                others.append(mine)
                break
        else:
            designs.append(Design([face]))
            drawn.append([mine])
    return designs


def _sample(faces: Sequence[Face], ranges: Sequence[tuple[int, int]], seed: int) -> npt.NDArray[np.int64]:
    """Up to `SAMPLED` characters of each block, drawn by the seed among those that two faces have; rising."""
    maps = []
    for face in faces:
        with opened(face.path, face.index) as handle:
            maps.append(np.fromiter(code_points(handle, ranges), dtype=np.int64))
    codes, counts = np.unique(np.concatenate([np.empty(0, np.int64), *maps]), return_counts=True)
    shared = codes[counts > 1]
    block_of = np.searchsorted(np.array(BLOCKS), shared, side="right")
    rng = np.random.default_rng(seed)
    chosen = [np.empty(0, np.int64)]
    for block in np.unique(block_of):
        of_block = shared[block_of == block]
        chosen.append(rng.choice(of_block, min(SAMPLED, len(of_block)), replace=False))
    return np.sort(np.concatenate(chosen))


def _directions(drawn: Drawn | None, sample: npt.NDArray[np.int64], size: int) -> Any:
    """(pictures less their mean at unit length, float32 [sample, size²]; which of the sample there are); None without a picture to draw."""
    if drawn is None:
        return None
    there = np.zeros(len(sample), bool)
    unit = np.zeros((len(sample), size * size), np.float32)
    rows = np.searchsorted(sample, drawn.codes)
    there[rows] = True
    unit[rows] = _unit(drawn.pictures)
    return unit, there


def _unit(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Such that the product of two is their correlation: float32 [n, size²]."""
    flat = pictures.reshape(len(pictures), pictures.shape[1] * pictures.shape[2]).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6
    return flat


def _copies(mine: Any, other: Any, blocks: Sequence[npt.NDArray[np.int64]]) -> bool:
    for block in blocks:
        both = block[mine[1][block] & other[1][block]]
        if len(both) >= FEWEST_COMMON and float(((mine[0][both] * other[0][both]).sum(1) >= ALIKE).mean()) >= COPIED:
            return True
    return False


def _drawn(
    face: Face, codes: Any, ranges: Sequence[tuple[int, int]], settings: GlyphSettings, found: Found
) -> Drawn | None:
    """What the face draws; a font that fails now is named, or a UserError, as the settings say."""
    try:
        return draw_face(face, codes, ranges, settings.size)
    except FontError as error:
        if settings.on_error == "raise":
            raise UserError(
                f"the font {face.path} cannot be drawn: {error}; remove it, or pass --on_error skip"
            ) from error
        found.broken[face.path] = str(error)
        return None


def held_designs(designs: Sequence[Design], settings: GlyphSettings) -> list[int]:
    """The numbers of the designs to hold out, rising."""
    wanted = settings.holdout_designs
    if not wanted:
        return []
    if len(wanted) == 1 and wanted[0].isdecimal():
        count = int(wanted[0])
        held = set(np.random.default_rng(settings.seed).permutation(len(designs))[:count].tolist())
    else:
        held = set()
        for name in wanted:
            of_name = [
                i
                for i, design in enumerate(designs)
                if any(f.family.lower().startswith(name.lower()) for f in design.faces)
            ]
            if not of_name:
                known = ", ".join(sorted(design.name for design in designs))
                raise UserError(f"--holdout_designs: no family begins with {name!r}; there are {known}")
            held.update(of_name)
    if len(held) >= len(designs):
        raise UserError(f"--holdout_designs would hold out all {len(designs)} designs; name fewer")
    return sorted(held)


# ------------------------------------------------------------------------------------------------ drawing


def _draw_designs(
    designs: Sequence[Design],
    ranges: Sequence[tuple[int, int]],
    settings: GlyphSettings,
    work: Path,
    found: Found,
    tick: Callable[[], object],
) -> None:
    """The files of each design in `work` that are not there yet."""
    for number, design in enumerate(designs):
        done = work / f"dropped-{number:03d}.json"
        if not done.is_file():
            codes, pictures, dropped = (
                np.empty(0, np.int64),
                np.empty((0, settings.size, settings.size), np.uint8),
                Counter[str](),
            )
            seen, repeats = set[bytes](), set[int]()  # pictures there are, and characters that had one of another
            for face in design.faces:  # a later face adds what the earlier ones lack
                with opened(face.path, face.index) as handle:
                    lacking = sorted(set(code_points(handle, ranges)) - set(codes.tolist()) - repeats)
                drawn = _drawn(face, lacking, ranges, settings, found) if lacking else None
                if drawn is not None:
                    digests = [digest(picture) for picture in drawn.pictures]
                    new = np.array([each not in seen for each in digests], bool)
                    codes, pictures = (
                        np.concatenate((codes, drawn.codes[new])),
                        np.concatenate((pictures, drawn.pictures[new])),
                    )
                    repeats.update(drawn.repeats, drawn.codes[~new].tolist())
                    seen.update(digests)
                    dropped += drawn.dropped
                    dropped["the picture of another character of the font"] += int((~new).sum())
            order = codes.argsort()
            np.save(work / f"codes-{number:03d}.npy", codes[order])
            np.save(work / f"pictures-{number:03d}.npy", pictures[order])
            partly = done.with_suffix(".partly")
            partly.write_text(json.dumps({"faces": asdict(design)["faces"], "dropped": dropped}))
            os.replace(partly, done)
        tick()


def _tell_dropped(work: Path, designs: int, say: Callable[[str], None]) -> None:
    total: Counter[str] = Counter()
    for number in range(designs):
        total.update(json.loads((work / f"dropped-{number:03d}.json").read_text())["dropped"])
    for reason, count in total.most_common():
        say(f"dropped {count:>9,} glyphs: {reason}")


# ------------------------------------------------------------------------------------------------ the data set


def assemble(
    out: Path,
    work: Path,
    designs: Sequence[Design],
    held: Sequence[int],
    settings: GlyphSettings,
    about: dict[str, Any],
    say: Callable[[str], None],
    tick: Callable[[], object],
) -> None:
    """images.npy, labels.npy, sources.npy and packed.json from the drawn designs."""
    all_codes = [np.load(work / f"codes-{number:03d}.npy") for number in range(len(designs))]
    training = [number for number in range(len(designs)) if number not in held]
    usable = _usable(work, all_codes, training, held, say)
    every = np.unique(np.concatenate([np.empty(0, np.int64), *all_codes]))
    in_training, in_held = np.zeros(len(every), np.int64), np.zeros(len(every), np.int64)
    for numbers, count in ((training, in_training), (held, in_held)):
        for number in numbers:
            count[np.searchsorted(every, all_codes[number][usable[number]])] += 1
    kept = in_training + in_held >= settings.min_designs
    if not kept.any():
        raise UserError(f"no character has {settings.min_designs} designs; add fonts or lower --min_designs")
    held_codes = _held_identities(every, kept, in_training, in_held, settings)
    kept &= (in_training > 0) | np.isin(every, held_codes)
    identities = every[kept]
    if len(identities) - len(held_codes) < 2:
        raise UserError(
            f"{len(identities) - len(held_codes)} characters are left to train on; lower --holdout_identities"
        )
    in_data = [
        usable[n] & np.isin(all_codes[n], identities) & _allowed(all_codes[n], held_codes, n in held)
        for n in range(len(designs))
    ]
    sources = np.concatenate([np.full(int(mask.sum()), number, np.int32) for number, mask in enumerate(in_data)])
    labels = np.searchsorted(
        identities, np.concatenate([codes[mask] for codes, mask in zip(all_codes, in_data, strict=True)])
    ).astype(np.int32)
    order = np.lexsort((sources, labels))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    images = np.lib.format.open_memmap(
        out / IMAGES, mode="w+", dtype=np.uint8, shape=(len(order), 1, settings.size, settings.size)
    )
    at = 0
    for number, mask in enumerate(in_data):
        pictures = np.load(work / f"pictures-{number:03d}.npy", mmap_mode="r")
        rows = np.flatnonzero(mask)
        for chunk in range(0, len(rows), CHUNK):
            images[place[at + chunk : at + min(chunk + CHUNK, len(rows))], 0] = pictures[rows[chunk : chunk + CHUNK]]
        at += len(rows)
        tick()
    images.flush()
    np.save(out / LABELS, labels[order])
    np.save(out / SOURCES, sources[order])
    held_out = {"identities": np.flatnonzero(np.isin(identities, held_codes)).tolist(), "sources": list(held)}
    write_index(
        out, [f"U+{code:04X}" for code in identities.tolist()], [design.name for design in designs], held_out, about
    )


def _allowed(codes: npt.NDArray[np.int64], held_codes: npt.NDArray[np.int64], held: bool) -> npt.NDArray[np.bool_]:
    """A held-out design is used for held-out characters only: the others' pictures in it serve nothing."""
    return np.isin(codes, held_codes) if held else np.ones(len(codes), bool)


def _usable(
    work: Path,
    all_codes: Sequence[npt.NDArray[np.int64]],
    training: Sequence[int],
    held: Sequence[int],
    say: Callable[[str], None],
) -> list[npt.NDArray[np.bool_]]:
    """By design, which pictures are no copy of another design's picture of the same character; training designs go first."""
    usable = [np.ones(len(codes), bool) for codes in all_codes]
    pictures = [np.load(work / f"pictures-{number:03d}.npy", mmap_mode="r") for number in range(len(all_codes))]
    seen: set[tuple[int, bytes]] = set()
    repeated = 0
    for number in [*training, *held]:
        for row, code in enumerate(all_codes[number].tolist()):
            key = code, digest(pictures[number][row])
            usable[number][row] = key not in seen
            seen.add(key)
        repeated += int((~usable[number]).sum())
    say(f"dropped {repeated:>9,} pictures: the same, to the last bit, as another design's of the character")
    leaked = 0
    for mine in held:
        for other in training:
            for rows, others in _common(all_codes[mine], all_codes[other]):
                alike = (_unit(pictures[mine][rows]) * _unit(pictures[other][others])).sum(1) >= LEAKED
                leaked += int(usable[mine][rows[alike]].sum())
                usable[mine][rows[alike]] = False
    if held:
        say(f"dropped {leaked:>9,} pictures of held-out designs: nearly a training design's of the character")
    return usable


def _common(
    mine: npt.NDArray[np.int64], other: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    _, rows, others = np.intersect1d(mine, other, assume_unique=True, return_indices=True)
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK], others[start : start + CHUNK]


def _held_identities(
    every: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    in_training: npt.NDArray[np.int64],
    in_held: npt.NDArray[np.int64],
    settings: GlyphSettings,
) -> npt.NDArray[np.int64]:
    """Characters to hold out, drawn by the seed among those with two pictures in each set that they are for."""
    possible = every[kept & (in_training >= 2) & ((in_held >= 2) | (not settings.holdout_designs))]
    count = settings.holdout_identities
    if count > len(possible):
        raise UserError(
            f"--holdout_identities is {count}, but {len(possible)} characters have two pictures in training designs"
            f"{' and two in held-out designs' if settings.holdout_designs else ''}; ask for fewer, or hold out designs that share more"
        )
    return np.sort(np.random.default_rng([settings.seed, 1]).permutation(possible)[:count])
