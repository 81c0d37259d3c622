"""From an encoded image to its pixels, in their place in a batch.

    bytes  ── read header: kind, width, height ──>  refused if too large
           ── decode ──>                            uint8 [H, W, C], in place if the size is right, else resized

JPEG is decoded by simplejpeg (libjpeg-turbo, without a Pillow object in between) if it is installed. Everything else,
and JPEGs that simplejpeg refuses, is decoded by Pillow. Both give the same pixels, because neither uses the inexact
fast DCT or fast upsampling. Pillow is restricted to common raster formats: some of its other readers start programs
(EPS), or are rarely used.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # Pillow is enough
    simplejpeg = None

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
_SUFFIX = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "BMP": ".bmp",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "PPM": ".ppm",
}
_JPEG_START = b"\xff\xd8\xff"
_SAME_AS_PILLOW = {"YCbCr", "RGB", "Gray"}  # color spaces that libjpeg-turbo converts as Pillow does

Data = bytes | memoryview
Pixels = npt.NDArray[np.uint8]
Fit = Callable[[Image.Image], Image.Image]
"""Resizes a decoded image to the size of its place."""


def decode_into(data: Data, out: Pixels, fit: Fit | None = None) -> None:
    """Decode an image into `out` uint8 [H, W, C], C 1 or 3; resize it, if needed, by `fit` (default: bilinear).

    Raises an exception for a damaged image and, before it is decoded, for one of more than PIL.Image.MAX_IMAGE_PIXELS
    pixels.
    """
    if fit is None and simplejpeg is not None and data[:3] == _JPEG_START and _decode_jpeg(data, out):
        return
    with open_image(data) as image:
        converted = _eight_bits(image).convert("L" if out.shape[2] == 1 else "RGB")
    _resize_into(converted if fit is None else fit(converted), out)


def read_header(data: Data) -> tuple[str, int, int]:
    """Return (suffix, width, height) from the header of an image; raise if it is not one, or has too many pixels."""
    if simplejpeg is not None and data[:3] == _JPEG_START:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # Pillow decides, below
        else:
            _check_pixels(width, height)
            return ".jpg", width, height
    with open_image(data) as image:
        return _SUFFIX[image.format or ""], image.width, image.height


def open_image(data: Data) -> Image.Image:
    """Open an image of one of FORMATS, reading only its header; raise if it is not one, or has too many pixels."""
    with warnings.catch_warnings():
        # Pillow only warns about images that may fill the memory; here they are refused.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"cannot identify the {len(data):,} bytes as an image") from None


def _decode_jpeg(data: Data, out: Pixels) -> bool:
    """Decode a JPEG into `out` by simplejpeg and return True; return False if Pillow must do it.

    Damaged images are left to Pillow, too, so that one library words all errors.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    _check_pixels(width, height)
    if space not in _SAME_AS_PILLOW:
        return False
    to_grey = out.shape[2] == 1
    grey = space == "Gray" and to_grey
    in_place = (height, width) == out.shape[:2] and (grey or not to_grey) and out.flags.c_contiguous
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", buffer=out if in_place else None)
    except ValueError:
        return False
    if not in_place:
        image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
        if to_grey and not grey:
            image = image.convert("L")
        _resize_into(image, out)
    return True


def _check_pixels(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than {limit}, could be a decompression bomb")


def _resize_into(image: Image.Image, out: Pixels) -> None:
    height, width, channels = out.shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    out[...] = np.asarray(image).reshape(height, width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image to 8 bits by its high bytes; Pillow's conversion would clip everything above 255.

    ValueError for pixels of a type that does not say which value is white, as floats do: clipped, such an image is
    black or white all over.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}, which do not say what is white; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
