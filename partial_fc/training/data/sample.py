"""A folder of images to try the application with: embedded glyphs as PNG files, as a user's own images would lie.

training/U+4E00/0.png ...   identities to train on, ten pictures each
people/U+4E11/0.png ...     other identities to enrol in a gallery, seven pictures each
visitors/U+4E11/7.png ...   three more pictures of each of those, and one of each of some who are not enrolled
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.files import on_disk

PEOPLE = 50
STRANGERS = 250
ENROLLED = 7  # pictures of each of the people


def write_sample(folder: Path, identities: int) -> dict[str, int]:
    """Write the three folders into `folder`; return the number of images in each.

    identities: how many to train on. Raises UserError if there are fewer, and OSError if the disk fails.
    """
    training = GlyphIdentities("train", identities)
    others = GlyphIdentities("seen", PEOPLE + STRANGERS)
    each = len(others) // others.num_identities
    places = range(len(others))
    people = [place for place in places if place // each < PEOPLE and place % each < ENROLLED]
    visitors = [place for place in places if place // each < PEOPLE and place % each >= ENROLLED]
    visitors += [place for place in places if place // each >= PEOPLE and place % each == 0]
    parts = (
        ("training", training, range(len(training))),
        ("people", others, people),
        ("visitors", others, visitors),
    )
    return {name: _write(folder / name, dataset, chosen) for name, dataset, chosen in parts}


def _write(folder: Path, dataset: GlyphIdentities, places: Iterable[int]) -> int:
    count = 0
    each = len(dataset) // dataset.num_identities
    for place in places:
        path = folder / dataset.identity_names[int(dataset.labels[place])] / f"{place % each}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with on_disk(path) as file:
            Image.fromarray(dataset.load(place)[0].numpy()).save(file, "PNG")
        count += 1
    return count
