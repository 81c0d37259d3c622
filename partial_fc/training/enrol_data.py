"""What a gallery enrols, searches for, or is calibrated by: data sets and files of embeddings, as Enrolments.

data set           ── Embedder ──>  embeddings, names, where each picture is, thumbnails   ┐
EmbeddingFiles     ── read ──>      embeddings, names, where each picture is               ┴─>  Enrolments, in turn
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from partial_fc.training.data import IdentityDataset
from partial_fc.training.embed_data import Reading, embed_images_of
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import EmbeddingFiles, valid_text
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Enrolment

CALIBRATED_BY = 20_000  # images, at most, of whole identities


def names_of(dataset: IdentityDataset) -> list[str]:
    """Return the names of the identities of a data set; UserError if two of them have one name."""
    names = [valid_text(name) for name in dataset.identity_names]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"two identities of the data set have the name {twice!r}; give each its own")
    return names


def enrol_data(
    embedder: Embedder,
    dataset: IdentityDataset,
    reading: Reading,
    *,
    unreadable: list[str],
    chosen: npt.NDArray[np.int64] | None = None,
    thumbnails: Callable[[str], bool] = lambda name: False,
    progress: bool = True,
) -> Iterator[Enrolment]:
    """Yield the images of a data set, embedded, in their order.

    unreadable: a list to which the names of unreadable images are added. chosen: images `[m]`; all if None.
    thumbnails: whether an image of this identity gets a thumbnail.
    """
    names = names_of(dataset)
    chosen = np.arange(len(dataset)) if chosen is None else chosen
    bar = tqdm(total=len(chosen), desc="embedding", unit="image", mininterval=0.5, disable=not progress)
    with bar, closing(embed_images_of(embedder, dataset, chosen, reading)) as batches:
        for batch in batches:
            bar.update(batch.asked)
            unreadable += batch.unreadable
            places = batch.places.tolist()
            identities = [names[label] for label in dataset.labels[batch.places].tolist()]
            yield Enrolment(
                batch.embeddings.numpy(),
                identities,
                [picture_of(dataset, place) for place in places],
                [
                    thumbnail_of(image) if thumbnails(name) else None
                    for name, image in zip(identities, batch.images, strict=True)
                ],
            )


def enrol_files(files: EmbeddingFiles, chosen: npt.NDArray[np.bool_] | None = None) -> Iterator[Enrolment]:
    """Yield the embeddings of files; chosen: which of all rows `[n]`; all if None."""
    start = 0
    for rows in files.parts():
        here = np.ones(len(rows), dtype=bool) if chosen is None else chosen[start : start + len(rows)]
        start += len(rows)
        places = np.flatnonzero(here).tolist()
        if places:
            yield Enrolment(
                rows.embeddings[here],
                [rows.identities[place] for place in places],
                [rows.paths[place] or None for place in places],
            )


def picture_of(dataset: IdentityDataset, place: int) -> str:
    """Return where the picture of an image is: its file, or how the data set names it."""
    path = dataset.path_of(place)
    return valid_text(dataset.name_of(place) if path is None else str(path.absolute()))


def thumbnail_of(image: Tensor) -> bytes:
    """Return an image float32 `[C, H, W]` in [−1, 1], as the backbone sees it, as PNG (grey) or JPEG (colour)."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    grey = pixels.shape[2] == 1
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(out, "PNG" if grey else "JPEG", quality=90)
    return out.getvalue()


def first_of_each() -> Callable[[str], bool]:
    """Return a function that says of each name whether it comes for the first time."""
    seen: set[str] = set()

    def is_first(name: str) -> bool:
        before = len(seen)
        seen.add(name)
        return len(seen) > before

    return is_first


def some_identities(labels: npt.NDArray[np.int64], most: int = CALIBRATED_BY) -> npt.NDArray[np.bool_]:
    """Return which of the images with these labels `[n]` are of identities that were drawn, up to `most` images.

    At least two identities are drawn; the draw depends on the labels alone.
    """
    counts = np.bincount(labels)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(counts))
    drawn = order[: max(2, int(np.searchsorted(counts[order].cumsum(), most, side="right")))]
    return np.isin(labels, drawn)


def labels_of(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return a number for each name `[n]`, the same for the same name, in the order of their first appearance."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


def joined(enrolments: Iterator[Enrolment], dimension: int) -> Enrolment:
    """Return enrolments as one; without thumbnails."""
    parts = list(enrolments)
    return Enrolment(
        np.concatenate([np.empty((0, dimension), np.float32), *(part.embeddings for part in parts)]),
        [name for part in parts for name in part.identities],
        [picture for part in parts for picture in part.pictures or [None] * len(part.identities)],
    )
