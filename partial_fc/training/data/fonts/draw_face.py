"""From the characters of a face to images; those that a font only claims to have are dropped, and counted by reason.

    code point ── outline, drawn by FreeType ──>  uint8 [size, size], white on black, centred

Fonts claim characters that they do not have, and draw nothing or a box for them. A drawing far larger than its image is
not drawn at all.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.fonts.font_files import (
    Face,
    FontError,
    FoundFaces,
    Ranges,
    code_points,
    load_freetype,
    native,
    opened,
)
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.errors import UserError

EM = 0.9  # size of the em, as a fraction of the image's side
MIN_INK = 0.004  # least ink of a drawn character, as a fraction of a white image: four white pixels at 32 x 32
BOX_REPEATS = 4  # if more characters of a font share one image, it is a box for characters that the font lacks
MAX_SIDES = 4  # a drawing larger than this many sides of the image is not drawn
Images = npt.NDArray[np.uint8]


@dataclass
class Drawn:
    """The characters that a face really has."""

    codes: npt.NDArray[np.int64]
    """[n], code points in rising order."""
    images: Images
    """[n, size, size]."""
    dropped: Counter[str]
    """reason -> how many characters were dropped."""
    repeats: Sequence[int] = ()
    """Code points that were dropped because they have the image of another character of the face."""


def draw_face(face: Face, codes: Iterable[int] | None, ranges: Ranges, size: int) -> Drawn:
    """Draw the characters of `ranges` (if given, only those in `codes`); raise FontError if that fails."""
    requested = None if codes is None else set(codes)
    kept: list[int] = []
    images: list[Images] = []
    dropped: Counter[str] = Counter()
    with opened(face.path, face.index) as handle:
        handle.set_char_size(round(64 * _em(handle, ranges, size)))
        missing_glyph = _draw(handle, None, size)
        for code in code_points(handle, ranges):
            if requested is not None and code not in requested:
                continue
            image = _draw(handle, code, size)
            if image is None:
                dropped["refused by FreeType, or far too large"] += 1
            elif image.sum(dtype=np.int64) < MIN_INK * 255 * size * size:
                dropped["blank or nearly so"] += 1
            elif missing_glyph is not None and np.array_equal(image, missing_glyph):
                dropped["the image of the missing glyph (.notdef)"] += 1
            else:
                kept.append(code)
                images.append(image)
    return _without_repeats(kept, images, dropped, size)


def draw_or_skip(
    face: Face, codes: Iterable[int], ranges: Ranges, settings: GlyphSettings, found: FoundFaces
) -> Drawn | None:
    """Call `draw_face`; if the font fails, add it to `found.broken` and return None, or raise UserError."""
    try:
        return draw_face(face, codes, ranges, settings.size)
    except FontError as error:
        if settings.on_error == "raise":
            raise UserError(
                f"the font {face.path} cannot be drawn: {error}; remove it, or pass --on_error skip"
            ) from error
        found.broken[face.path] = str(error)
        return None


def _em(face: Any, ranges: Ranges, size: int) -> float:
    """Return the size of the em, in pixels, at which all but the largest 2 % of the drawings fit into their images.

    Some fonts draw far beyond their em.
    """
    freetype = load_freetype()
    codes = list(code_points(face, ranges))
    face.set_char_size(round(64 * EM * size))
    sides = []
    for code in codes[:: max(1, len(codes) // 256)]:
        if not freetype.FT_Load_Char(native(face), code, freetype.FT_LOAD_NO_BITMAP | freetype.FT_LOAD_NO_HINTING):
            metrics = native(face).contents.glyph.contents.metrics
            sides.append(max(metrics.width, metrics.height) / 64)
    largest = float(np.quantile(sides, 0.98)) if sides else 0.0
    return EM * size * min(1.0, (size - 1) / max(largest, 1.0))


def _without_repeats(kept: list[int], images: list[Images], dropped: Counter[str], size: int) -> Drawn:
    """Drop repeated images: of up to BOX_REPEATS characters with the same image, only the first keeps it."""
    digests = [digest(image) for image in images]
    times = Counter(digests)
    seen = set[bytes]()
    unique = []
    repeats = []
    for index, each in enumerate(digests):
        if times[each] > BOX_REPEATS:
            dropped[f"an image that more than {BOX_REPEATS} characters of the font share"] += 1
        elif each in seen:
            dropped["the image of another character of the font"] += 1
            repeats.append(kept[index])
        else:
            seen.add(each)
            unique.append(index)
    stacked = np.stack([images[index] for index in unique]) if unique else np.empty((0, size, size), np.uint8)
    return Drawn(np.array([kept[index] for index in unique], dtype=np.int64), stacked, dropped, repeats)


def digest(image: Images) -> bytes:
    """Return 16 bytes that identify an image."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _draw(face: Any, code: int | None, size: int) -> Images | None:
    """Draw a glyph (None: .notdef) in the centre of an image, cropped at its edges.

    Returns None for a glyph that FreeType refuses or that is far too large.
    """
    freetype = load_freetype()
    flags = freetype.FT_LOAD_NO_BITMAP | freetype.FT_LOAD_NO_HINTING
    if code is None:
        failed = freetype.FT_Load_Glyph(native(face), 0, flags)
    else:
        failed = freetype.FT_Load_Char(native(face), code, flags)
    slot = native(face).contents.glyph
    metrics = slot.contents.metrics  # in 64ths of a pixel
    if failed or max(abs(metrics.width), abs(metrics.height)) > MAX_SIDES * size * 64:
        return None
    if freetype.FT_Render_Glyph(slot, 0):
        return None
    bitmap = slot.contents.bitmap
    height, width, pitch = int(bitmap.rows), int(bitmap.width), int(bitmap.pitch)
    out: Images = np.zeros((size, size), np.uint8)
    if not height or not width:
        return out
    if pitch < width or max(height, width) > 2 * MAX_SIDES * size:
        return None
    drawn = np.frombuffer(ctypes.string_at(bitmap.buffer, height * pitch), np.uint8).reshape(height, pitch)[:, :width]
    top = (size - height) // 2  # negative if the drawing is larger than the image
    left = (size - width) // 2
    visible = drawn[max(0, -top) : max(0, -top) + size, max(0, -left) : max(0, -left) + size]
    out[max(0, top) : max(0, top) + visible.shape[0], max(0, left) : max(0, left) + visible.shape[1]] = visible
    return out
