"""Random changes of training images, like those of a camera: affine, blur, light, erasing, noise.

    images  uint8 [n, C, H, W] 0..255, or float [n, C, H, W] in [-1, 1];  indices int64 [n] (position in the data set)
      1. draw      16 uniform numbers and C*H*W noise bytes per sample; Philox stream keyed by (seed, epoch, index)
      2. affine    flip, shear, rotation, scale and shift as one inverse map per sample; bilinear; border repeated
      3. blur      separable Gaussian, one sigma per sample
      4. light     x * contrast + brightness
      5. erase     one grey rectangle
      6. noise     white Gaussian; then clamp
    float32 [n, C, H, W] in [-1, 1]

The result for a sample depends only on (seed, epoch, index), bit for bit: not on the other samples of the batch, their
order, the number of ranks or workers, or the global random state. So every operation on the batch is elementwise or
independent between samples, and products are rounded before they are added: the vectorised part of a loop may use fused
multiply-adds where its tail does not, and then the result would depend on a sample's place in memory.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from partial_fc.training.errors import UserError

_UNIFORMS = 16  # uniform numbers per sample; each parameter has its own, so that switching one off changes no other
_ROTATION, _SHIFT_X, _SHIFT_Y, _SCALE, _SHEAR, _FLIP, _BLUR, _SIGMA, _CONTRAST, _BRIGHTNESS = range(10)
_ERASE, _ERASE_W, _ERASE_H, _ERASE_X, _ERASE_Y = range(10, 15)

FloatArray = npt.NDArray[np.float64]


@dataclass
class AugmentConfig:
    """How strongly training images are changed; the defaults suit small images of characters."""

    enabled: bool = True
    """Change training images at all."""
    rotation: float = 8.0
    """Largest rotation, in degrees, either way."""
    translation: float = 0.06
    """Largest shift, as a fraction of the image's width and height, either way."""
    scale_min: float = 0.9
    """Smallest magnification, as a factor."""
    scale_max: float = 1.1
    """Largest magnification, as a factor."""
    shear: float = 4.0
    """Largest slant of vertical lines, in degrees, either way."""
    flip_probability: float = 0.0
    """Share of images that are mirrored left to right (0 to 1): 0 for characters, 0.5 for faces."""
    blur_probability: float = 0.3
    """Share of images that are blurred (0 to 1)."""
    blur_sigma: float = 0.8
    """Largest standard deviation of the blur, in pixels; drawn for each blurred image."""
    contrast: float = 0.2
    """Largest relative change of contrast, either way."""
    brightness: float = 0.1
    """Largest change of brightness, either way, where black is -1 and white is 1."""
    erase_probability: float = 0.3
    """Share of images in which a rectangle is erased to mid-grey (0 to 1)."""
    erase_size: float = 0.4
    """Longest side of the erased rectangle, as a fraction of the image's side; the shortest is a quarter of that."""
    noise_std: float = 0.05
    """Standard deviation of the noise of each pixel, where black is -1 and white is 1."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "blur_probability", "erase_probability", "erase_size"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"augment.{name} is {value}; give a number from 0 to 1")
        for name in ("rotation", "translation", "shear", "blur_sigma", "contrast", "brightness", "noise_std"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise UserError(f"augment.{name} is {value}; give a number of at least 0")
        if self.shear >= 80:
            raise UserError(f"augment.shear is {self.shear}; give less than 80 degrees")
        low, high = self.scale_min, self.scale_max
        if not 0 < low <= high < math.inf:
            raise UserError(f"augment.scale_min is {low} and scale_max is {high}; give 0 < scale_min <= scale_max")

    def __str__(self) -> str:
        """What is done, in one line: `rotation 8, translation 0.06, ...`; of what is off, nothing."""
        if not self.enabled:
            return "none"
        parts = [(f"mirrored {self.flip_probability:g}", self.flip_probability)]
        parts += [(f"{name} {(value := getattr(self, name)):g}", value) for name in ("rotation", "translation")]
        scaled = (self.scale_min, self.scale_max) != (1, 1)
        parts.append((f"scale {self.scale_min:g} to {self.scale_max:g}", float(scaled)))
        parts.append((f"shear {self.shear:g}", self.shear))
        parts.append((f"blur {self.blur_probability:g}", self.blur_probability * self.blur_sigma))
        parts += [(f"{name} {(value := getattr(self, name)):g}", value) for name in ("contrast", "brightness")]
        parts.append((f"erasing {self.erase_probability:g}", self.erase_probability * self.erase_size))
        parts.append((f"noise {self.noise_std:g}", self.noise_std))
        return ", ".join(text for text, strength in parts if strength) or "none"

    def keeps_pixels(self) -> bool:
        """Return whether images are at most mirrored, so that no pixel is interpolated."""
        return self.rotation == self.translation == self.shear == 0 and self.scale_min == self.scale_max == 1

    def keeps_values(self) -> bool:
        """Return whether no operation but the affine one changes a pixel's value."""
        blurs = self.blur_probability > 0 and self.blur_sigma > 0
        erases = self.erase_probability > 0 and self.erase_size > 0
        return not (blurs or erases or self.contrast > 0 or self.brightness > 0 or self.noise_std > 0)


def to_float(images: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return images as float32 in [-1, 1], in a new tensor or in `out`.

    uint8 images are scaled from 0..255; floating images must be in [-1, 1] already.
    """
    floats = torch.empty(images.shape, dtype=torch.float32) if out is None else out
    floats.copy_(images)
    return floats.div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else floats


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    config: AugmentConfig,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return changed copies of `images` uint8 or float [n, C, H, W] as float32 [n, C, H, W] in [-1, 1].

    `indices` int64 [n] are the positions of the samples in their data set; they, `seed` and `epoch` decide all random
    draws. The input is not changed. `out` float32 [n, C, H, W], if given, is overwritten; it may be what is returned.
    """
    if not config.enabled or images.numel() == 0:
        return to_float(images, out)
    uniform, noise = _draw(indices, seed, epoch, images[0].numel() if config.noise_std > 0 else 0)
    if config.keeps_pixels():
        out = to_float(_flip(images, uniform, config), out)
        if config.keeps_values():
            return out
    else:
        out = _affine(to_float(images, out), uniform, config)
    if config.blur_probability > 0 and config.blur_sigma > 0:
        _blur_(out, uniform, config)
    if config.contrast > 0:
        out.mul_(_per_sample(1 + config.contrast * _signed(uniform, _CONTRAST)))
    if config.brightness > 0:
        out.add_(_per_sample(config.brightness * _signed(uniform, _BRIGHTNESS)))
    if config.erase_probability > 0 and config.erase_size > 0:
        _erase_(out, uniform, config)
    if config.noise_std > 0:
        out.add_(torch.index_select(_normal_quantiles() * config.noise_std, 0, noise).view_as(out))
    return out.clamp_(-1.0, 1.0)


def stream_key(*parts: int) -> int:
    """Return a 64-bit key of a random stream for any integers; neighbouring seeds and epochs give unrelated streams."""
    entropy = [part % 2**64 for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _draw(indices: torch.Tensor, seed: int, epoch: int, noise_bytes: int) -> tuple[FloatArray, torch.Tensor]:
    """Return uniform numbers in [0, 1) float64 [n, 16], and uniform bytes as int32 [n * noise_bytes].

    Every sample has its own random stream.
    """
    words = _UNIFORMS + (noise_bytes + 7) // 8
    raw = np.empty((len(indices), words), dtype=np.uint64)
    key = np.array([stream_key(seed, epoch), 0], dtype=np.uint64)
    # Setting the state is equal to constructing Philox(key=key), in a tenth of the time.
    bits = np.random.Philox(key=key)
    state = bits.state
    for row, index in enumerate(indices.tolist()):
        key[1] = index % 2**64
        state["state"]["key"] = key
        bits.state = state
        raw[row] = bits.random_raw(words)
    uniform: FloatArray = (raw[:, :_UNIFORMS] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    octets = raw[:, _UNIFORMS:].astype("<u8", copy=False).view(np.uint8)[:, :noise_bytes]
    return uniform, torch.from_numpy(octets.astype(np.int32).reshape(-1))


def _signed(uniform: FloatArray, column: int) -> FloatArray:
    """Return column `column` of the uniform numbers, scaled to [-1, 1): float64 [n]."""
    return 2.0 * uniform[:, column] - 1.0


def _per_sample(values: FloatArray) -> torch.Tensor:
    """Return float64 [n] as float32 [n, 1, 1, 1], to broadcast over the pixels."""
    return torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1, 1)


def _normal_quantiles() -> torch.Tensor:
    """Return the value of each byte of noise: the 256 mid-quantiles of the normal distribution, at unit variance."""
    table: torch.Tensor = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    table /= table.square().mean().sqrt()
    return table.to(torch.float32)


def _flip(images: torch.Tensor, uniform: FloatArray, config: AugmentConfig) -> torch.Tensor:
    """Mirror the images that drew it left to right; return a new tensor unless there are none."""
    chosen = torch.from_numpy(np.flatnonzero(uniform[:, _FLIP] < config.flip_probability))
    if not len(chosen):
        return images
    out = images.clone()
    mirrored = images.index_select(0, chosen).flip(3)
    for row, image in zip(chosen.tolist(), mirrored, strict=True):  # index_copy copies bytes one by one: 4 times slower
        out[row] = image
    return out


def _affine(images: torch.Tensor, uniform: FloatArray, config: AugmentConfig) -> torch.Tensor:
    """Flip, shear, rotate and scale about the centre, and shift; outside the image, its border is repeated."""
    n, _, height, width = images.shape
    angle = np.deg2rad(config.rotation) * _signed(uniform, _ROTATION)
    slant = np.tan(np.deg2rad(config.shear) * _signed(uniform, _SHEAR))
    scale = config.scale_min + (config.scale_max - config.scale_min) * uniform[:, _SCALE]
    mirror = np.where(uniform[:, _FLIP] < config.flip_probability, -1.0, 1.0)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    # Forward, in pixels from the centre: out = scale * R(angle) * [[1, slant], [0, 1]] * diag(mirror, 1) * in + shift.
    # Its inverse, in = M (out - shift), gives the place where each output pixel is read.
    m00, m01 = mirror * (cos + slant * sin), mirror * (sin - slant * cos)
    m10, m11 = -sin, cos
    shift_x = config.translation * width * _signed(uniform, _SHIFT_X)
    shift_y = config.translation * height * _signed(uniform, _SHIFT_Y)
    xs = np.arange(width) - (width - 1) / 2
    ys = np.arange(height) - (height - 1) / 2
    grid = torch.empty(n, height, width, 2)
    for axis, (along_x, along_y, size) in enumerate(((m00, m01, width), (m10, m11, height))):
        from_x = along_x[:, None] * (xs - shift_x[:, None]) * (2 / size)
        from_y = along_y[:, None] * (ys - shift_y[:, None]) * (2 / size)
        column = torch.from_numpy(from_x.astype(np.float32)).view(n, 1, width)
        row = torch.from_numpy(from_y.astype(np.float32)).view(n, height, 1)
        torch.add(column, row, out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur_(images: torch.Tensor, uniform: FloatArray, config: AugmentConfig) -> None:
    """Blur the images that drew it, in place. The kernel's width depends on the settings, not on the batch."""
    chosen = np.flatnonzero(uniform[:, _BLUR] < config.blur_probability)
    if len(chosen) == 0:
        return
    radius = max(1, math.ceil(2.5 * config.blur_sigma))
    sigma = np.maximum(config.blur_sigma * uniform[chosen, _SIGMA], 1e-3)
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma[:, None]) ** 2)
    taps /= taps[:, :1] + 2 * taps[:, 1:].sum(axis=1, keepdims=True)
    rows = torch.from_numpy(chosen)
    out = images[rows]
    for dim in (2, 3):
        size = out.shape[dim]
        pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(out, pad, mode="replicate")
        out = out * _per_sample(taps[:, 0])
        for distance in range(1, radius + 1):
            pair = padded.narrow(dim, radius - distance, size) + padded.narrow(dim, radius + distance, size)
            out.add_(pair.mul_(_per_sample(taps[:, distance])))
    images[rows] = out


def _erase_(images: torch.Tensor, uniform: FloatArray, config: AugmentConfig) -> None:
    """Set one rectangle to mid-grey in the images that drew it, in place."""
    inside: list[torch.Tensor] = []
    for size, length_column, start_column in (
        (images.shape[2], _ERASE_H, _ERASE_Y),
        (images.shape[3], _ERASE_W, _ERASE_X),
    ):
        length = np.maximum(1, np.rint(size * config.erase_size * (0.25 + 0.75 * uniform[:, length_column])))
        start = np.floor((size - length + 1) * uniform[:, start_column])
        at = np.arange(size)
        inside.append(torch.from_numpy((at >= start[:, None]) & (at < (start + length)[:, None])))
    chosen = torch.from_numpy(uniform[:, _ERASE] < config.erase_probability)
    rows, columns = inside
    mask = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
    images.masked_fill_(mask[:, None], 0.0)
