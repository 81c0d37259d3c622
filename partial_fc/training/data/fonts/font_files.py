"""Font files, and the faces in them, read by FreeType (the package freetype-py).

    font files ── faces that can be drawn ──>  one face per family: the one whose weight is nearest to regular
    a face     ── its Unicode map ──>          code points of the requested ranges

Fonts are untrusted. A font that FreeType refuses is reported, and skipped or the work stopped, as the caller chooses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partial_fc.training.errors import UserError

SUFFIXES = frozenset({".ttf", ".otf", ".ttc", ".otc", ".pfb"})
Ranges = Sequence[tuple[int, int]]
"""Ranges of code points, first and last included."""
# Unicode 16, without compatibility ideographs: they look like other characters
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2A6DF), (0x2A700, 0x2EE5D), (0x30000, 0x323AF)),
    "hangul": ((0xAC00, 0xD7A3),),
    "kana": ((0x3041, 0x3096), (0x30A1, 0x30FA)),
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    "greek": ((0x370, 0x3FF),),
    "cyrillic": ((0x400, 0x52F),),
    "yi": ((0xA000, 0xA48C),),
    "ethiopic": ((0x1200, 0x135A),),
}
_MAX_FACES = 64  # of one file
_OS2_TABLE = 0x4F532F32  # "OS/2"
_REGULAR = 400
_BOLD = 700


class FontError(Exception):
    """A short description of what is wrong with a font."""


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: str
    index: int
    family: str
    style: str
    weight: int
    """usWeightClass of the OS/2 table: 400 is regular."""
    covers: int
    """How many of the requested code points its Unicode map has."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.style}"


@dataclass
class FoundFaces:
    """The faces to draw, largest first, and what was skipped."""

    faces: list[Face]
    broken: dict[str, str] = field(default_factory=dict)
    """Font file -> what is wrong with it."""
    other_styles: int = 0
    """Other faces of a family that is drawn."""
    useless: int = 0
    """Faces with none of the requested characters, or without outlines."""


def load_freetype() -> Any:
    """Return the module `freetype`; raise UserError if it is not installed."""
    try:
        import freetype
    except ImportError as error:
        raise UserError(f"drawing glyphs needs freetype-py ({error}): pip install 'partial_fc[glyphs]'") from error
    return freetype


def native(face: Any) -> Any:
    """Return FreeType's own handle of a face, which freetype-py keeps in a private attribute, for its C functions."""
    return face._FT_Face


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a text such as `han,hangul,0x1F00-0x1FFF`, sorted and merged; names are those of SCRIPTS."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        if part.strip().lower() in SCRIPTS:
            ranges += SCRIPTS[part.strip().lower()]
            continue
        first, dash, last = (each.strip().upper().removeprefix("U+").removeprefix("0X") for each in part.partition("-"))
        try:
            ranges.append((int(first, 16), int(last if dash else first, 16)))
        except ValueError:
            raise UserError(
                f"--scripts has {part!r}; give {', '.join(SCRIPTS)}, or a range such as 4E00-9FFF"
            ) from None
        if not 0 <= ranges[-1][0] <= ranges[-1][1] <= 0x10FFFF:
            raise UserError(
                f"--scripts has {part!r}, which is not a range of code points; give two in rising order, up to 10FFFF"
            )
    merged: list[tuple[int, int]] = []
    for first_code, last_code in sorted(ranges):
        if merged and first_code <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last_code))
        else:
            merged.append((first_code, last_code))
    return tuple(merged)


def font_files(folders: Iterable[str | Path]) -> list[Path]:
    """Return all font files below the folders, sorted by name, each once even if it is linked twice.

    Raises UserError if there are none.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--fonts {folder} is not a folder; give folders with font files, such as /usr/share/fonts")
        for root, _, names in os.walk(folder):
            for name in names:
                if Path(name).suffix.lower() in SUFFIXES:
                    found.setdefault((Path(root) / name).resolve(), Path(root) / name)
    if not found:
        raise UserError(f"there is no font file in {', '.join(map(str, folders))} ({', '.join(sorted(SUFFIXES))})")
    return sorted(found.values())


def find_faces(
    files: Sequence[Path], ranges: Ranges, on_error: str = "skip", tick: Callable[[], object] = lambda: None
) -> FoundFaces:
    """Return one face of each family that has characters of `ranges`.

    A broken file is reported in the result, or with `on_error` "raise" raises UserError. `tick` is called after each
    file.
    """
    found = FoundFaces([])
    families: dict[str, Face] = {}
    for path in files:
        try:
            for face in _faces_of(path, ranges):
                if not face.covers:
                    found.useless += 1
                    continue
                before = families.get(face.family)
                found.other_styles += before is not None
                if before is None or _preference(face) < _preference(before):
                    families[face.family] = face
        except FontError as error:
            if on_error == "raise":
                raise UserError(
                    f"the font {path} cannot be used: {error}; remove it, or pass --on_error skip"
                ) from error
            found.broken[str(path)] = str(error)
        tick()
    found.faces = sorted(families.values(), key=lambda face: (-face.covers, face.family, face.path, face.index))
    return found


def _preference(face: Face) -> tuple[bool, int, int, str, int]:
    """Return a sort key for the faces of a family: upright, near regular, and with many characters come first."""
    slanted = any(word in face.style.lower() for word in ("italic", "oblique"))
    return slanted, abs(face.weight - _REGULAR), -face.covers, face.path, face.index


def _faces_of(path: Path, ranges: Ranges) -> Iterator[Face]:
    count = 1  # known once the first face is open
    index = 0
    while index < count:
        with opened(path, index) as face:
            count = min(face.num_faces, _MAX_FACES)
            family = (face.family_name or b"").decode("utf-8", "replace").strip() or path.stem
            style = (face.style_name or b"").decode("utf-8", "replace").strip() or "Regular"
            weight = _os2_weight(face) or (_BOLD if "bold" in style.lower() else _REGULAR)
            covers = sum(1 for _ in code_points(face, ranges)) if face.is_scalable else 0
            yield Face(str(path), index, family, style, weight, covers)
        index += 1


def _os2_weight(face: Any) -> int:
    """Return usWeightClass, bytes 4 and 5 of the table OS/2; 0 if there is no such table."""
    value = (ctypes.c_ubyte * 2)()
    length = ctypes.c_ulong(2)
    failed = load_freetype().FT_Load_Sfnt_Table(native(face), _OS2_TABLE, 4, ctypes.byref(value), ctypes.byref(length))
    return 0 if failed else value[0] << 8 | value[1]


@contextlib.contextmanager
def opened(path: str | Path, index: int) -> Iterator[Any]:
    """Open a face and select its Unicode map. What FreeType refuses, here or inside the block, raises FontError."""
    freetype = load_freetype()
    try:
        face = freetype.Face(str(path), index)
        if freetype.FT_Select_Charmap(native(face), freetype.FT_ENCODING_UNICODE):
            raise FontError("it has no Unicode map")
    except (freetype.FT_Exception, OSError) as error:
        raise FontError(_reason(error)) from error
    try:
        yield face
    except freetype.FT_Exception as error:
        raise FontError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("FT_Exception:").strip() or type(error).__name__


def code_points(face: Any, ranges: Ranges) -> Iterator[int]:
    """Yield the code points of `ranges` for which the face's Unicode map has a glyph, in rising order."""
    freetype = load_freetype()
    glyph = ctypes.c_uint()
    for first, last in ranges:
        code = first if freetype.FT_Get_Char_Index(native(face), first) else _next(freetype, face, first, glyph)
        while code and code <= last:
            yield code
            code = _next(freetype, face, code, glyph)


def _next(freetype: Any, face: Any, code: int, glyph: Any) -> int:
    """Return the next code point of the map, 0 after the last; raise FontError if the map is not in rising order."""
    following = int(freetype.FT_Get_Next_Char(native(face), code, ctypes.byref(glyph)))
    if following and following <= code:
        raise FontError("its character map is not in rising order")
    return following
