"""From font files to pictures of characters, by FreeType; what a font only pretends to have is dropped, and counted by reason.

    font files ── faces that can be drawn ──>  one face a family, the one whose weight is nearest to regular
    a face     ── its Unicode map ──>          code points of the wanted ranges
    code point ── outline, drawn ──>           uint8 [size, size], white on black, the drawing in the middle

Fonts are taken for untrusted: what FreeType refuses is named, and the font left out or the work stopped, as the caller wishes; a drawing
far larger than its square is not drawn. `freetype` (the package freetype-py) carries the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.errors import UserError

SUFFIXES = frozenset({".ttf", ".otf", ".ttc", ".otc", ".pfb"})
SCRIPTS: dict[
    str, tuple[tuple[int, int], ...]
] = {  # Unicode 16, without compatibility ideographs: they are other characters' pictures
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2A6DF), (0x2A700, 0x2EE5D), (0x30000, 0x323AF)),
    "hangul": ((0xAC00, 0xD7A3),),
    "kana": ((0x3041, 0x3096), (0x30A1, 0x30FA)),
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    "greek": ((0x370, 0x3FF),),
    "cyrillic": ((0x400, 0x52F),),
    "yi": ((0xA000, 0xA48C),),
    "ethiopic": ((0x1200, 0x135A),),
}
EM = 0.9  # of the picture's side
LEAST_INK = 0.004  # of a picture that counts as drawn: four full pixels at 32 x 32
BOX_REPEATS = 4  # characters that may share one picture; more, and it is a box that stands for what the font lacks
LARGEST = 4  # sides of a picture beyond which a drawing is not drawn
Pictures = npt.NDArray[np.uint8]


class FontError(Exception):
    """What is wrong with a font, in a few words."""


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: str
    index: int
    family: str
    style: str
    weight: int
    """As OS/2 has it: 400 is regular."""
    covers: int
    """How many of the wanted code points its map has."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.style}"


@dataclass
class Found:
    """The faces to draw, the largest first; what else was there, and why it is left out."""

    faces: list[Face]
    broken: dict[str, str] = field(default_factory=dict)
    """Font file -> what is wrong with it."""
    other_styles: int = 0
    """Faces of a family of which another is drawn."""
    useless: int = 0
    """Faces with none of the wanted characters, or with no outlines."""


def load_freetype() -> Any:
    """The module `freetype`; UserError without it."""
    try:
        import freetype
    except ImportError as error:
        raise UserError(f"drawing glyphs needs freetype-py ({error}): pip install 'partial_fc[glyphs]'") from error
    return freetype


def parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """Code points of `han,hangul,0x1F00-0x1FFF`: scripts of `SCRIPTS` and hexadecimal ranges; rising, none twice."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        first, dash, last = (each.strip().upper().removeprefix("U+").removeprefix("0X") for each in part.partition("-"))
        if part.strip().lower() in SCRIPTS:
            ranges += SCRIPTS[part.strip().lower()]
            continue
        try:
            ranges.append((int(first, 16), int(last if dash else first, 16)))
        except ValueError:
            raise UserError(
                f"--scripts has {part!r}; give {', '.join(SCRIPTS)}, or a range such as 4E00-9FFF"
            ) from None
        if not 0 <= ranges[-1][0] <= ranges[-1][1] <= 0x10FFFF:
            raise UserError(f"--scripts has {part!r}, which is no range of code points; the last is 10FFFF")
    merged: list[tuple[int, int]] = []
    for first_code, last_code in sorted(ranges):
        if merged and first_code <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last_code))
        else:
            merged.append((first_code, last_code))
    return tuple(merged)


def font_files(folders: Iterable[str | Path]) -> list[Path]:
    """All font files under the folders, each once though it is linked twice, sorted by name; UserError if there is none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--fonts {folder} is no folder; give folders with font files, such as /usr/share/fonts")
        for root, _, names in os.walk(folder):
            for name in names:
                if Path(name).suffix.lower() in SUFFIXES:
                    found.setdefault((Path(root) / name).resolve(), Path(root) / name)
    if not found:
        raise UserError(f"there is no font file in {', '.join(map(str, folders))} ({', '.join(sorted(SUFFIXES))})")
    return sorted(found.values())


def find_faces(
    files: Sequence[Path],
    ranges: Sequence[tuple[int, int]],
    on_error: str = "skip",
    tick: Callable[[], object] = lambda: None,
) -> Found:
    """One face a family that has some of the characters of `ranges`; a broken file is named, or with `on_error` "raise" a UserError."""
    found, families = Found([]), dict[str, Face]()
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
    slanted = any(word in face.style.lower() for word in ("italic", "oblique"))
    return slanted, abs(face.weight - 400), -face.covers, face.path, face.index


def _faces_of(path: Path, ranges: Sequence[tuple[int, int]]) -> Iterator[Face]:
    count, index = 1, 0
    while index < count:
        with opened(path, index) as face:
            count = min(face.num_faces, 64)
            os2 = _os2_weight(face)
            family = (face.family_name or b"").decode("utf-8", "replace").strip() or path.stem
            style = (face.style_name or b"").decode("utf-8", "replace").strip() or "Regular"
            weight = os2 or (700 if "bold" in style.lower() else 400)
            covers = sum(1 for _ in code_points(face, ranges)) if face.is_scalable else 0
            yield Face(str(path), index, family, style, weight, covers)
        index += 1


def _os2_weight(face: Any) -> int:
    """usWeightClass, bytes 4 and 5 of the table OS/2; 0 without one."""
    value, length = (ctypes.c_ubyte * 2)(), ctypes.c_ulong(2)
    failed = load_freetype().FT_Load_Sfnt_Table(face._FT_Face, 0x4F532F32, 4, ctypes.byref(value), ctypes.byref(length))
    return 0 if failed else value[0] << 8 | value[1]


class opened:  # noqa: N801  a context manager that is used as a function
    """`with opened(path, index) as face`: a face with its Unicode map chosen; FontError for what FreeType refuses, then and inside."""

    def __init__(self, path: str | Path, index: int) -> None:
        self.path, self.index = path, index

    def __enter__(self) -> Any:
        self.freetype = load_freetype()
        try:
            face = self.freetype.Face(str(self.path), self.index)
            if self.freetype.FT_Select_Charmap(face._FT_Face, self.freetype.FT_ENCODING_UNICODE):
                raise FontError("it has no Unicode map")
        except (self.freetype.FT_Exception, OSError) as error:
            raise FontError(_reason(error)) from error
        return face

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, self.freetype.FT_Exception):
            raise FontError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("FT_Exception:").strip() or type(error).__name__


def code_points(face: Any, ranges: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The code points of `ranges` that the face's map gives a glyph, rising."""
    freetype = load_freetype()
    glyph = ctypes.c_uint()
    for first, last in ranges:
        code = first if freetype.FT_Get_Char_Index(face._FT_Face, first) else _next(freetype, face, first, glyph)
        while code and code <= last:
            yield code
            code = _next(freetype, face, code, glyph)


def _next(freetype: Any, face: Any, code: int, glyph: Any) -> int:
    """The next code point of the map, 0 after the last; a map that does not rise is broken."""
    following = int(freetype.FT_Get_Next_Char(face._FT_Face, code, ctypes.byref(glyph)))
    if following and following <= code:
        raise FontError("its character map does not rise")
    return following


@dataclass
class Drawn:
    """What a face has: its code points int64 `[n]`, rising, pictures uint8 `[n, size, size]`; how many were dropped, by reason; and which
    of them had the picture of another."""

    codes: npt.NDArray[np.int64]
    pictures: Pictures
    dropped: Counter[str]
    repeats: Sequence[int] = ()


def draw_face(face: Face, codes: Iterable[int] | None, ranges: Sequence[tuple[int, int]], size: int) -> Drawn:
    """The characters of `ranges` (or of them those in `codes`) that the face really has. Raises FontError if it cannot be drawn."""
    wanted = None if codes is None else set(codes)
    kept: list[int] = []
    pictures: list[Pictures] = []
    dropped: Counter[str] = Counter()
    with opened(face.path, face.index) as handle:
        handle.set_char_size(round(64 * _em(handle, ranges, size)))
        box = _draw(handle, None, size)
        for code in code_points(handle, ranges):
            if wanted is not None and code not in wanted:
                continue
            picture = _draw(handle, code, size)
            if picture is None:
                dropped["refused by FreeType or far too large"] += 1
            elif picture.sum(dtype=np.int64) < LEAST_INK * 255 * size * size:
                dropped["blank or nearly so"] += 1
            elif box is not None and np.array_equal(picture, box):
                dropped["the picture of a missing glyph (.notdef)"] += 1
            else:
                kept.append(code)
                pictures.append(picture)
    return _without_repeats(kept, pictures, dropped, size)


def _em(face: Any, ranges: Sequence[tuple[int, int]], size: int) -> float:
    """Pixels an em at which the face's drawings fit into their square, but for the largest 2 %; some fonts draw far beyond their em."""
    freetype = load_freetype()
    codes = list(code_points(face, ranges))
    face.set_char_size(round(64 * EM * size))
    sides = []
    for code in codes[:: max(1, len(codes) // 256)]:
        if not freetype.FT_Load_Char(face._FT_Face, code, freetype.FT_LOAD_NO_BITMAP | freetype.FT_LOAD_NO_HINTING):
            metrics = face._FT_Face.contents.glyph.contents.metrics
            sides.append(max(metrics.width, metrics.height) / 64)
    largest = float(np.quantile(sides, 0.98)) if sides else 0.0
    return EM * size * min(1.0, (size - 1) / max(largest, 1.0))


def _without_repeats(kept: list[int], pictures: list[Pictures], dropped: Counter[str], size: int) -> Drawn:
    """A picture that a few characters share stays with the first of them; one that many share is a box."""
    digests = [digest(picture) for picture in pictures]
    times, seen = Counter(digests), set[bytes]()
    rows, repeats = [], []
    for row, each in enumerate(digests):
        if times[each] > BOX_REPEATS:
            dropped[f"a picture that more than {BOX_REPEATS} characters of the font share"] += 1
        elif each in seen:
            dropped["the picture of another character of the font"] += 1
            repeats.append(kept[row])
        else:
            seen.add(each)
            rows.append(row)
    stacked = np.stack([pictures[row] for row in rows]) if rows else np.empty((0, size, size), np.uint8)
    return Drawn(np.array([kept[row] for row in rows], dtype=np.int64), stacked, dropped, repeats)


def digest(picture: Pictures) -> bytes:
    """16 bytes that stand for a picture."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()


def _draw(face: Any, code: int | None, size: int) -> Pictures | None:
    """A glyph (None: .notdef) in the middle of its square, cut at the edges; None for what FreeType refuses and what is far too large."""
    freetype = load_freetype()
    flags = freetype.FT_LOAD_NO_BITMAP | freetype.FT_LOAD_NO_HINTING
    load = (
        freetype.FT_Load_Glyph(face._FT_Face, 0, flags)
        if code is None
        else freetype.FT_Load_Char(face._FT_Face, code, flags)
    )
    slot = face._FT_Face.contents.glyph
    metrics = slot.contents.metrics
    if load or max(abs(metrics.width), abs(metrics.height)) > LARGEST * size * 64 or freetype.FT_Render_Glyph(slot, 0):
        return None
    bitmap = slot.contents.bitmap
    height, width, pitch = int(bitmap.rows), int(bitmap.width), int(bitmap.pitch)
    out: Pictures = np.zeros((size, size), np.uint8)
    if not height or not width:
        return out
    if pitch < width or max(height, width) > 2 * LARGEST * size:
        return None
    drawn = np.frombuffer(ctypes.string_at(bitmap.buffer, height * pitch), np.uint8).reshape(height, pitch)[:, :width]
    top, left = (size - height) // 2, (size - width) // 2
    visible = drawn[max(0, -top) : max(0, -top) + size, max(0, -left) : max(0, -left) + size]
    out[max(0, top) : max(0, top) + visible.shape[0], max(0, left) : max(0, left) + visible.shape[1]] = visible
    return out
