"""An image from a stranger: its bytes, type and size are checked before anything is decoded.

bytes ── at most `Limits.bytes` ── header: one of FORMATS, at most `Limits.pixels` ──>  may be decoded
      ── thumbnail_of ──>  a small PNG without what else the file says: place, camera, comments

Types are known by the content of the file, not by what the sender calls it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from partial_fc.training.data.decode import FORMATS, read_header

THUMBNAIL = 128  # longest side, in pixels


@dataclass(frozen=True)
class Limits:
    """What one image may have."""

    bytes: int = 16 * 2**20
    pixels: int = 50_000_000


class Refused(Exception):
    """A request that is answered with an HTTP status and a sentence for the person who sent it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def check_image(data: bytes, limits: Limits) -> None:
    """Raise Refused for what is no image, or is above the limits. Reads the header only."""
    if not data:
        raise Refused(422, "the file is empty; send an image")
    if len(data) > limits.bytes:
        raise Refused(413, f"the image has {len(data):,} bytes; at most {limits.bytes:,} are taken")
    try:
        _, width, height = read_header(data)
    except Exception as error:  # decoders raise almost anything for a damaged file
        if "decompression bomb" in str(error):
            raise Refused(413, _too_many(limits)) from None
        raise Refused(415, f"the file is not an image that can be read; send one of {', '.join(FORMATS)}") from None
    if width * height > limits.pixels:
        raise Refused(413, _too_many(limits))


def _too_many(limits: Limits) -> str:
    return f"the image has more than {limits.pixels:,} pixels; send a smaller one"


def thumbnail_of(data: bytes) -> bytes:
    """Return a checked image as a PNG of at most THUMBNAIL pixels a side. Raises Refused if it is damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            if image.mode.startswith("I"):  # 16-bit grey: converting to 8 bits would clip it
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                small = image.point(lambda value: value / 256).convert("L")
            else:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
        return as_png(small)
    except Exception:  # decoders raise almost anything for a damaged file
        raise Refused(422, "the image is damaged and cannot be decoded; send another") from None


def as_png(image: Image.Image) -> bytes:
    """Return the image as the bytes of a PNG file, without what else its file said."""
    buffer = io.BytesIO()
    image.copy().save(buffer, "PNG")
    return buffer.getvalue()
