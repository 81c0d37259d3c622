"""From an encoded picture to pixels in their place in a batch.

    bytes  ── header: kind, width, height ──  too large: refused  ── decode ──  uint8 [H, W, C], in place where the size is right already

JPEG goes through simplejpeg (libjpeg-turbo without a detour through objects), if it is installed; everything else, and a JPEG that
simplejpeg does not take, through Pillow. Both give the same pixels, since neither trades exactness for speed: no fast DCT, no fast
upsampling. Pillow is held to plain raster formats: others of its readers start programs (EPS) or are little used.
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
except ImportError:  # Pillow alone does
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
_TURBO = {"YCbCr", "RGB", "Gray"}  # color spaces that libjpeg-turbo converts as Pillow does

Data = bytes | memoryview
Pixels = npt.NDArray[np.uint8]
Fit = Callable[[Image.Image], Image.Image]


def decode_into(data: Data, out: Pixels, fit: Fit | None = None) -> None:
    """Decode a picture into `out` uint8 [H, W, C], C 1 or 3, resized (bilinear) if it has another size, or by `fit`. Raises for a damaged
    one, and for one of more than PIL.Image.MAX_IMAGE_PIXELS pixels, before anything is decoded."""
    if fit is None and simplejpeg is not None and data[:3] == b"\xff\xd8\xff" and _turbo(data, out):
        return
    with open_picture(data) as image:
        picture = _eight_bits(image).convert("L" if out.shape[2] == 1 else "RGB")
    _fit(picture if fit is None else fit(picture), out)


def read_header(data: Data) -> tuple[str, int, int]:
    """(suffix, width, height) of an encoded picture, from its header; raises for what is none, and for one of too many pixels."""
    if simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # Pillow has the last word
        else:
            _check_pixels(width, height)
            return ".jpg", width, height
    with open_picture(data) as image:
        return _SUFFIX[image.format or ""], image.width, image.height


def open_picture(data: Data) -> Image.Image:
    """A picture of one of FORMATS, its header read; ValueError for what is none, and for one of too many pixels."""
    with (
        warnings.catch_warnings()
    ):  # Pillow only warns of pictures large enough to fill the memory; they are refused here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"cannot identify the {len(data):,} bytes as a picture") from None


def _turbo(data: Data, out: Pixels) -> bool:
    """Whether simplejpeg has decoded it into `out`; what it does not take is left to Pillow: one program says what is damaged."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    _check_pixels(width, height)
    if space not in _TURBO:
        return False
    grey = space == "Gray" and out.shape[2] == 1
    in_place = (height, width) == out.shape[:2] and (grey or out.shape[2] == 3) and out.flags.c_contiguous
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", buffer=out if in_place else None)
    except ValueError:
        return False
    if not in_place:
        picture = Image.fromarray(pixels[:, :, 0] if grey else pixels)
        _fit(picture if grey or out.shape[2] == 3 else picture.convert("L"), out)
    return True


def _check_pixels(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than {limit}, could be a decompression bomb")


def _fit(picture: Image.Image, out: Pixels) -> None:
    height, width, channels = out.shape
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    out[...] = np.asarray(picture).reshape(height, width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image by its high bytes: Pillow's own conversion would cut everything above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
