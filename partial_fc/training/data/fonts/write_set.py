"""From the drawn designs to a packed data set (formats/packed.py): characters are its identities, designs its sources.

    work/codes-DDD.npy    int64 [n], characters of design DDD, sorted     (written by draw_set.py)
    work/pictures-DDD.npy uint8 [n, size, size], their images
      -> images that copy another design's are dropped
      -> characters with at least `min_designs` images are identities; some of them are held out
      -> images.npy, labels.npy, sources.npy, packed.json

An image of a held-out design that correlates by `LEAKED` or more with the same character in a training design is
dropped, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.fonts.designs import Codes, Design, unit_images
from partial_fc.training.data.fonts.draw_face import digest
from partial_fc.training.data.fonts.settings import GlyphSettings
from partial_fc.training.data.formats.packed import IMAGES, LABELS, SOURCES, write_index
from partial_fc.training.errors import UserError
from partial_fc.training.files import naming, read_through, reserve, save_array

Mask = npt.NDArray[np.bool_]

LEAKED = 0.97
CHUNK = 4096  # images compared or copied at a time


def write_set(
    out: Path,
    work: Path,
    designs: Sequence[Design],
    held_out: Sequence[int],
    settings: GlyphSettings,
    about: dict[str, Any],
    say: Callable[[str], None],
    tick: Callable[[], object],
) -> None:
    """Write the data set to `out` from the drawn designs in `work`; `held_out` are indices of designs."""
    codes = [np.load(work / f"codes-{number:03d}.npy") for number in range(len(designs))]
    training = [number for number in range(len(designs)) if number not in held_out]
    usable = _usable(work, codes, training, held_out, say)
    identities, held_codes = _choose_identities(codes, usable, training, held_out, settings)
    in_set = []  # for each design, which of its images are in the data set
    for number, of_design in enumerate(codes):
        mask = usable[number] & np.isin(of_design, identities)
        if number in held_out:  # its other images could be used neither for training nor for evaluation
            mask &= np.isin(of_design, held_codes)
        in_set.append(mask)
    sources = np.concatenate([np.full(int(mask.sum()), number, np.int32) for number, mask in enumerate(in_set)])
    chosen_codes = np.concatenate([of_design[mask] for of_design, mask in zip(codes, in_set, strict=True)])
    labels = np.searchsorted(identities, chosen_codes).astype(np.int32)
    order = np.lexsort((sources, labels))
    place = np.empty(len(order), np.int64)  # row of images.npy for each image, by design
    place[order] = np.arange(len(order))
    images = np.lib.format.open_memmap(
        out / IMAGES, mode="w+", dtype=np.uint8, shape=(len(order), 1, settings.size, settings.size)
    )
    reserve(out / IMAGES, (out / IMAGES).stat().st_size)
    begin = 0
    for number, mask in enumerate(in_set):
        drawn = _pictures(work, number)
        chosen = np.flatnonzero(mask)
        for start in range(0, len(chosen), CHUNK):
            some = chosen[start : start + CHUNK]
            images[place[begin + start : begin + start + len(some)], 0] = drawn[some]
        begin += len(chosen)
        tick()
    with naming(out / IMAGES):
        images.flush()
    save_array(out / LABELS, labels[order])
    save_array(out / SOURCES, sources[order])
    write_index(
        out,
        [f"U+{code:04X}" for code in identities.tolist()],
        [design.name for design in designs],
        {"identities": np.flatnonzero(np.isin(identities, held_codes)).tolist(), "sources": list(held_out)},
        about,
    )


def _choose_identities(
    codes: Sequence[Codes],
    usable: Sequence[Mask],
    training: Sequence[int],
    held_out: Sequence[int],
    settings: GlyphSettings,
) -> tuple[Codes, Codes]:
    """Return (all identities, those held out) as sorted code points; raise UserError if too few are left."""
    characters = np.unique(np.concatenate([np.empty(0, np.int64), *codes]))
    in_training = np.zeros(len(characters), np.int64)  # usable images of each character in training designs
    in_held_out = np.zeros(len(characters), np.int64)  # ... and in held-out designs
    for numbers, count in ((training, in_training), (held_out, in_held_out)):
        for number in numbers:
            count[np.searchsorted(characters, codes[number][usable[number]])] += 1
    kept = in_training + in_held_out >= settings.min_designs
    if not kept.any():
        raise UserError(f"no character has {settings.min_designs} designs; add fonts or lower --min_designs")
    # Characters to hold out need two images in each set that they are for.
    possible = characters[kept & (in_training >= 2) & ((in_held_out >= 2) | (not settings.holdout_designs))]
    count_held = settings.holdout_identities
    if count_held > len(possible):
        also = " and two in held-out designs" if settings.holdout_designs else ""
        raise UserError(
            f"--holdout_identities is {count_held}, but {len(possible)} characters have two images in training "
            f"designs{also}; ask for fewer, or hold out designs that share more characters"
        )
    held_codes = np.sort(np.random.default_rng([settings.seed, 1]).permutation(possible)[:count_held])
    kept &= (in_training > 0) | np.isin(characters, held_codes)
    identities = characters[kept]
    left = len(identities) - len(held_codes)
    if left < 2:
        raise UserError(f"only {left} characters are left to train on; lower --holdout_identities")
    return identities, held_codes


def _usable(
    work: Path,
    codes: Sequence[Codes],
    training: Sequence[int],
    held_out: Sequence[int],
    say: Callable[[str], None],
) -> list[Mask]:
    """Return, for each design, which images are not copies of another design's image of the same character.

    Of equal images a training design keeps its own.
    """
    usable = [np.ones(len(of_design), bool) for of_design in codes]
    images = [_pictures(work, number) for number in range(len(codes))]
    seen: set[tuple[int, bytes]] = set()
    repeated = 0
    for number in [*training, *held_out]:
        for row, code in enumerate(codes[number].tolist()):
            key = code, digest(images[number][row])
            usable[number][row] = key not in seen
            seen.add(key)
        repeated += int((~usable[number]).sum())
    say(f"dropped {repeated:>9,} images: equal to another design's image of the character")
    leaked = 0
    for number in held_out:
        for other in training:
            for rows, other_rows in _common(codes[number], codes[other]):
                correlations = (unit_images(images[number][rows]) * unit_images(images[other][other_rows])).sum(1)
                alike = rows[correlations >= LEAKED]
                leaked += int(usable[number][alike].sum())
                usable[number][alike] = False
    if held_out:
        say(
            f"dropped {leaked:>9,} images of held-out designs: nearly equal to a training design's image of the "
            "character"
        )
    return usable


def _common(one: Codes, other: Codes) -> Iterator[tuple[Codes, Codes]]:
    """Yield, in chunks, the (places in `one`, places in `other`) of the characters that both have."""
    _, rows, other_rows = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK], other_rows[start : start + CHUNK]


def _pictures(work: Path, number: int) -> npt.NDArray[np.uint8]:
    """Map the images of a design."""
    path = work / f"pictures-{number:03d}.npy"
    read_through(path)
    drawn: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return drawn
