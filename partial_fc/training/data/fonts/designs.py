"""Designs: which faces are one typeface, and which designs are held out.

    faces [F]     ── each draws sample characters of every block of Unicode ──>       correlations of two faces' images
    correlations  ── faces that nearly copy each other, or a part of each other ──>   one design

Fonts copy each other, and a copy among the held-out designs would make "never trained on" untrue. Two faces are one
design if, in any block of Unicode, at least `MIN_COPIED` of the sample characters that both have correlate by `ALIKE`
or more. Among 67 families of Debian's Chinese and Korean fonts, that share is at most 0.04 for independent designs, and
at least 0.45 for copies (BabelStone Han, which took most of its common characters from AR PL UMing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.fonts.draw_face import Images, draw_or_skip
from partial_fc.training.data.fonts.font_files import Face, FoundFaces, Ranges, code_points, opened
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.errors import UserError

Codes = npt.NDArray[np.int64]

SAMPLES_PER_BLOCK = 64  # characters of a block of Unicode that are compared
MIN_COMMON = 16  # characters of a block that two faces must share to be compared there
ALIKE = 0.95  # correlation from which two images are alike
MIN_COPIED = 0.2  # share of alike images from which two faces are one design
# Code points at which a block of many characters begins or ends
BLOCKS = (0x3400, 0x4DC0, 0xA000, 0xAC00, 0xD7B0, 0x20000, 0x2A6E0, 0x2EE60, 0x323B0)


@dataclass
class Design:
    """The faces of one typeface, largest first."""

    faces: list[Face]

    @property
    def name(self) -> str:
        return self.faces[0].family


@dataclass
class SampleImages:
    """What a face draws for the s sample characters."""

    unit: npt.NDArray[np.float32]
    """[s, size²], the images as `unit_images` returns them; 0 where there is none."""
    present: npt.NDArray[np.bool_]
    """[s], which of the characters the face has."""


def group_faces(found: FoundFaces, ranges: Ranges, settings: GlyphSettings, tick: Callable[[], object]) -> list[Design]:
    """Return the designs. A face joins the first design that has a face of which it, or a part of it, is a copy.

    `tick` is called after each face.
    """
    sample = _sample(found.faces, ranges, settings.seed)
    block_of = _block_of(sample)
    blocks = [np.flatnonzero(block_of == block) for block in np.unique(block_of)]
    designs: list[Design] = []
    drawn: list[list[SampleImages]] = []  # of the faces of each design
    for face in found.faces:
        images = _draw_sample(face, sample, ranges, settings, found)
        tick()
        if images is None:
            continue
        for design, others in zip(designs, drawn, strict=True):
            if any(_copies(images, other, blocks) for other in others):
                design.faces.append(face)
                others.append(images)
                break
        else:
            designs.append(Design([face]))
            drawn.append([images])
    return designs


def _block_of(codes: Codes) -> npt.NDArray[np.intp]:
    return np.searchsorted(np.array(BLOCKS), codes, side="right")


def _sample(faces: Sequence[Face], ranges: Ranges, seed: int) -> Codes:
    """Return up to `SAMPLES_PER_BLOCK` characters of each block, drawn from those of at least two faces."""
    maps = [np.empty(0, np.int64)]
    for face in faces:
        with opened(face.path, face.index) as handle:
            maps.append(np.fromiter(code_points(handle, ranges), dtype=np.int64))
    codes, counts = np.unique(np.concatenate(maps), return_counts=True)
    shared = codes[counts > 1]
    block_of = _block_of(shared)
    rng = np.random.default_rng(seed)
    chosen = [np.empty(0, np.int64)]
    for block in np.unique(block_of):
        in_block = shared[block_of == block]
        chosen.append(rng.choice(in_block, min(SAMPLES_PER_BLOCK, len(in_block)), replace=False))
    return np.sort(np.concatenate(chosen))


def _draw_sample(
    face: Face, sample: Codes, ranges: Ranges, settings: GlyphSettings, found: FoundFaces
) -> SampleImages | None:
    """Draw the sample characters; None if the font fails."""
    drawn = draw_or_skip(face, sample.tolist(), ranges, settings, found)
    if drawn is None:
        return None
    places = np.searchsorted(sample, drawn.codes)
    unit = np.zeros((len(sample), settings.size**2), np.float32)
    unit[places] = unit_images(drawn.images)
    present = np.zeros(len(sample), bool)
    present[places] = True
    return SampleImages(unit, present)


def unit_images(images: Images) -> npt.NDArray[np.float32]:
    """Return images minus their mean, at unit length, float32 [n, size²]; their dot products are correlations."""
    flat = images.reshape(len(images), images.shape[1] * images.shape[2]).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6
    return flat


def _copies(one: SampleImages, other: SampleImages, blocks: Sequence[npt.NDArray[np.intp]]) -> bool:
    """Return whether two faces are one design. blocks: indices of the sample characters of each block."""
    for block in blocks:
        common = block[one.present[block] & other.present[block]]
        if len(common) < MIN_COMMON:
            continue
        correlations = (one.unit[common] * other.unit[common]).sum(1)
        if float((correlations >= ALIKE).mean()) >= MIN_COPIED:
            return True
    return False


def held_out_designs(designs: Sequence[Design], settings: GlyphSettings) -> list[int]:
    """Return the indices of the designs to hold out, sorted."""
    requested = settings.holdout_designs
    if not requested:
        return []
    held_out: set[int] = set()
    if len(requested) == 1 and requested[0].isdecimal():
        held_out.update(np.random.default_rng(settings.seed).permutation(len(designs))[: int(requested[0])].tolist())
    else:
        for name in requested:
            matching = [number for number, design in enumerate(designs) if _has_family(design, name)]
            if not matching:
                known = ", ".join(sorted(design.name for design in designs))
                raise UserError(f"--holdout_designs: no family begins with {name!r}; the designs are {known}")
            held_out.update(matching)
    if len(held_out) >= len(designs):
        raise UserError(f"--holdout_designs would hold out all {len(designs)} designs; give fewer")
    return sorted(held_out)


def _has_family(design: Design, beginning: str) -> bool:
    return any(face.family.lower().startswith(beginning.lower()) for face in design.faces)
