"""What the service does with images, without HTTP.

image (bytes) ── checked ── Embedder ──> embedding [D] ── Gallery.search ──>  up to k identities, the answer
two images    ── both embedded ──>  their cosine, compared with the gallery's threshold

Each call reads the gallery as its folder has it at that moment, whoever changed it. What the sender can mend is
`Refused`, in words that name no file of this machine; a gallery that cannot be read is a UserError, for the log.
"""

from __future__ import annotations

import logging
import threading
from typing import get_args

import numpy as np
import numpy.typing as npt

from partial_fc.training.data import UnreadableImage
from partial_fc.training.embedding import Embedder
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Answer, Gallery
from partial_fc.training.gallery.gallery import Existing
from partial_fc.training.serve.uploads import Limits, Refused, check_image, thumbnail_of

log = logging.getLogger("partial_fc.serve")

AT_ONCE = 2  # images that are decoded at a time: bounds the memory of many large ones
LONGEST_NAME = 200


class Recogniser:
    """A backbone and its gallery. Raises UserError unless they belong together. Safe for several threads.

    writable: whether identities may be added and removed.
    """

    def __init__(self, embedder: Embedder, gallery: Gallery, *, limits: Limits, writable: bool) -> None:
        gallery.check_backbone(embedder.digest, embedder.dimension, embedder.preprocessing)
        self.embedder = embedder
        self.gallery = gallery
        self.limits = limits
        self.writable = writable
        self._decoding = threading.BoundedSemaphore(AT_ONCE)

    def embed(self, *images: bytes) -> npt.NDArray[np.float32]:
        """Return the embeddings `[n, D]` of uploaded images."""
        for image in images:
            check_image(image, self.limits)
        with self._decoding:
            try:
                return self.embedder.embed(images)
            except UnreadableImage:
                raise Refused(422, "the image is damaged and cannot be decoded; send another") from None
            except UserError as error:
                log.error("an image cannot be embedded: %s", error)
                raise Refused(422, "the backbone gives no finite embedding of this image; send another") from None

    def search(self, image: bytes, k: int) -> Answer:
        """Return the nearest identities of an uploaded image."""
        embedding = self.embed(image)
        return self.gallery.search(embedding, k)[0]

    def compare(self, first: bytes, second: bytes) -> float:
        """Return the cosine of two uploaded images."""
        a, b = self.embed(first, second).astype(np.float64)
        lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(np.clip(a @ b / lengths, -1, 1)) if lengths > 0 else 0.0

    @property
    def threshold(self) -> float | None:
        """The gallery's threshold now."""
        return self.gallery.threshold

    def identities(self) -> list[str]:
        """Return the names of the enrolled identities, sorted."""
        return sorted(self.gallery.identities)

    def has_picture(self, row: int) -> bool:
        """Return whether a row of the gallery has a picture."""
        return self.gallery.thumbnail(row) is not None

    def picture(self, row: int) -> bytes | None:
        """Return the picture of a row of the gallery as PNG; None if there is none."""
        found = self.gallery.thumbnail(row)
        if found is None:
            return None
        try:
            return thumbnail_of(found)  # the gallery's file may be from elsewhere: nothing in it is passed on as it is
        except Refused:
            return None

    def add(self, identity: str, image: bytes, existing: str) -> None:
        """Enrol an uploaded image of an identity. Refused if it is enrolled already and `existing` is "refuse"."""
        self._check_writable()
        name = identity.strip()
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise Refused(422, f"the identity is no name; give 1 to {LONGEST_NAME} printable characters")
        kind: Existing | None = next((each for each in get_args(Existing) if each == existing), None)
        if kind is None:
            raise Refused(422, f"existing is one of {', '.join(get_args(Existing))}")
        embedding = self.embed(image)
        with self._decoding:
            small = thumbnail_of(image)
        try:
            self.gallery.add(embedding, [name], thumbnails=[small], existing=kind)
        except UserError:
            if kind == "refuse" and name in self.gallery:
                raise Refused(
                    409, "an identity of that name is enrolled already; send existing=extend or existing=replace"
                ) from None
            raise

    def remove(self, identity: str) -> None:
        """Remove an identity. Refused if it is not enrolled."""
        self._check_writable()
        try:
            self.gallery.remove([identity])
        except UserError:
            if identity not in self.gallery:
                raise Refused(404, "no identity of that name is enrolled") from None
            raise

    def _check_writable(self) -> None:
        if not self.writable:
            raise Refused(403, "this service does not change the gallery; start it with --writable")
