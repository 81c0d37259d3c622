"""A packed data set drawn from installed fonts (`partial-fc data glyphs`).

A character is an identity; each typeface's design of it is an independent sample, made by another person.

    fonts           ── font_files.py ──>   faces
    faces           ── designs.py ──>      designs: faces that copy each other are one design
    design          ── draw_face.py ──>    .work/codes-DDD.npy, .work/pictures-DDD.npy; an interrupted run resumes here
    all designs     ── write_set.py ──>    images.npy, labels.npy, sources.npy, packed.json (formats/packed.py)
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from partial_fc.training.data.fonts.designs import Design, group_faces, held_out_designs
from partial_fc.training.data.fonts.draw_face import digest, draw_or_skip
from partial_fc.training.data.fonts.font_files import (
    FoundFaces,
    Ranges,
    code_points,
    find_faces,
    font_files,
    opened,
    parse_ranges,
)
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.data.fonts.write_set import write_set
from partial_fc.training.data.formats.packed import is_packed, read_index
from partial_fc.training.errors import UserError, words
from partial_fc.training.files import save_array, text_of, write_atomically

Progress = Callable[[str, int], Any]
"""`progress(what, total)` returns a progress bar with `update()` and `close()`."""


def build(settings: GlyphSettings, say: Callable[[str], None], progress: Progress) -> None:
    """Draw the data set to `settings.out`, or resume an interrupted run. `say` prints a line.

    Raises UserError for settings and fonts from which no data set can be made.
    """
    settings.check()
    ranges = parse_ranges(settings.scripts)
    out = Path(settings.out)
    files = font_files(settings.fonts)
    made_from = {
        **asdict(settings),
        "out": "",
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    if is_packed(out):
        _check_same(read_index(out)["about"].get("made_from"), made_from, out)
        say(f"{out} is complete already")
        return
    work = _claim(out, made_from)

    def with_bar(what: str, total: int, action: Callable[[Callable[[], object]], Any]) -> Any:
        bar = progress(what, total)
        try:
            return action(lambda: bar.update())
        finally:
            bar.close()

    found: FoundFaces = with_bar("fonts", len(files), lambda tick: find_faces(files, ranges, settings.on_error, tick))
    for path, reason in found.broken.items():
        say(f"skipped: {path}: {reason}")
    say(
        f"skipped: {found.other_styles} other weights and styles of a family, "
        f"{found.useless} faces with none of the characters"
    )
    designs: list[Design] = with_bar(
        "comparing fonts", len(found.faces), lambda tick: group_faces(found, ranges, settings, tick)
    )
    say(f"{len(found.faces)} families are {len(designs)} designs:")
    for design in designs:
        others = [face.family for face in design.faces[1:]]
        say(f"  {design.name}" + (f"   (the same: {', '.join(others)})" if others else ""))
    held_out = held_out_designs(designs, settings)
    with_bar("drawing", len(designs), lambda tick: _draw_designs(designs, ranges, settings, work, found, tick))
    _report_dropped(work, len(designs), say)
    about = {"made_from": made_from, "fonts": {design.name: [face.path for face in design.faces] for design in designs}}
    with_bar("writing", len(designs), lambda tick: write_set(out, work, designs, held_out, settings, about, say, tick))
    shutil.rmtree(work)


def _claim(out: Path, made_from: dict[str, Any]) -> Path:
    """Return the folder of unfinished work in `out`, new or to resume; raise UserError if `out` holds anything else."""
    work = out / ".work"
    note = work / "made_from.json"
    try:
        if note.is_file():
            _check_same(json.loads(text_of(note)), made_from, out)
        elif out.exists() and (not out.is_dir() or any(each != work for each in out.iterdir())):
            raise UserError(f"{out} is in use; choose another --out")
        else:
            work.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(made_from))
    except OSError as error:
        raise UserError(f"{out} cannot be used ({words(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{out} cannot be used ({error}); remove it or choose another --out") from error
    return work


def _check_same(before: Any, made_from: dict[str, Any], out: Path) -> None:
    """Raise UserError if an earlier run had other settings or fonts."""
    now = json.loads(json.dumps(made_from))
    if before != now:
        changed = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
        raise UserError(
            f"{out} was begun with other settings or fonts ({', '.join(changed)}); remove it or choose another --out"
        )


def _draw_designs(
    designs: Sequence[Design],
    ranges: Ranges,
    settings: GlyphSettings,
    work: Path,
    found: FoundFaces,
    tick: Callable[[], object],
) -> None:
    """Draw the designs whose files are not in `work` yet. `tick` is called after each design."""
    for number, design in enumerate(designs):
        if not _note_of(work, number).is_file():
            _draw_design(design, number, ranges, settings, work, found)
        tick()


def _draw_design(
    design: Design, number: int, ranges: Ranges, settings: GlyphSettings, work: Path, found: FoundFaces
) -> None:
    """Draw a design: the characters of its first face, then those that later faces add. The note is written last."""
    codes = np.empty(0, np.int64)
    images = np.empty((0, settings.size, settings.size), np.uint8)
    dropped = Counter[str]()
    seen = set[bytes]()  # digests of the images so far
    repeats = set[int]()  # characters whose image was that of another character
    for face in design.faces:
        with opened(face.path, face.index) as handle:
            lacking = sorted(set(code_points(handle, ranges)) - set(codes.tolist()) - repeats)
        drawn = draw_or_skip(face, lacking, ranges, settings, found) if lacking else None
        if drawn is None:
            continue
        digests = [digest(image) for image in drawn.images]
        new = np.array([each not in seen for each in digests], bool)
        codes = np.concatenate((codes, drawn.codes[new]))
        images = np.concatenate((images, drawn.images[new]))
        repeats.update(drawn.repeats, drawn.codes[~new].tolist())
        seen.update(digests)
        dropped += drawn.dropped
        dropped["the image of another character of the font"] += int((~new).sum())
    order = codes.argsort()
    save_array(work / f"codes-{number:03d}.npy", codes[order])
    save_array(work / f"pictures-{number:03d}.npy", images[order])
    write_atomically(_note_of(work, number), json.dumps({"faces": asdict(design)["faces"], "dropped": dropped}))


def _note_of(work: Path, number: int) -> Path:
    """Return the file that says that a design is drawn, and what was dropped."""
    return work / f"dropped-{number:03d}.json"


def _report_dropped(work: Path, designs: int, say: Callable[[str], None]) -> None:
    total: Counter[str] = Counter()
    for number in range(designs):
        total.update(json.loads(text_of(_note_of(work, number)))["dropped"])
    for reason, count in total.most_common():
        say(f"dropped {count:>9,} glyphs: {reason}")
