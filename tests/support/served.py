"""The service of a gallery on a port of this machine, asked over HTTP; no backbone is trained for it.

    with serving(make_app(recogniser)) as address: answer = ask(address, "POST", "/api/search", image=png(0))

The backbone shows an image to 4 x 4 pixels; identities are patterns of 4 x 4 pixels, drawn larger and with noise.
"""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from partial_fc.training.embedding import Embedder
from partial_fc.training.gallery import Gallery
from partial_fc.training.serve.duplicates import AuditedClass, DuplicatePair
from partial_fc.training.serve.recogniser import Recogniser
from partial_fc.training.serve.server import bind, make_server
from partial_fc.training.serve.uploads import Limits

SIDE = 4
DIMENSION = 3 * SIDE * SIDE
NAMES = ("Ada", "Grace <b>", "Emmy & co", "Sophie", "Lise", "Chien-Shiung")


def forward(images: Tensor) -> Tensor:
    """images [n, 3, H, W] -> embeddings [n, 48]."""
    return F.adaptive_avg_pool2d(images, SIDE).flatten(1)


def embedder(digest: str = "weights of patterns", **changes: Any) -> Embedder:
    settings: dict[str, Any] = {"dimension": DIMENSION, "image_shape": (3, 16, 16), "flip": False, "source": "nowhere"}
    return Embedder(forward, digest=digest, **settings | changes)


def picture(identity: int, sample: int = 0, size: int = 64) -> Image.Image:
    """A picture of a pattern; samples of one differ a little. Identities from len(NAMES) on are in no gallery."""
    pattern = np.random.default_rng(identity).integers(0, 256, (SIDE, SIDE, 3))
    noise = np.random.default_rng((identity, sample)).normal(0, 12, pattern.shape)
    pixels = np.clip(pattern + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(identity: int, sample: int = 0) -> bytes:
    return encoded(picture(identity, sample))


def make_gallery(folder: Path, threshold: float | None = 0.8, count: int = len(NAMES)) -> Gallery:
    """Three images of each of the first identities, with thumbnails."""
    each = [(identity, sample) for identity in range(count) for sample in range(3)]
    images = [png(*one) for one in each]
    made = embedder()
    gallery = Gallery.build(
        folder,
        made.embed(images),
        [NAMES[identity] for identity, _ in each],
        pictures=[str(folder / f"{identity}-{sample}.png") for identity, sample in each],
        thumbnails=images,
        backbone=made.digest,
        preprocessing=made.preprocessing,
    )
    gallery.set_threshold(threshold)
    return gallery


def recogniser(gallery: Gallery, *, writable: bool = False, **limits: int) -> Recogniser:
    return Recogniser(embedder(), gallery, limits=Limits(**limits), writable=writable)


class Pairs:
    """Duplicates of an audit, without a run: two pictures of each class."""

    pairs = [
        DuplicatePair(AuditedClass(0, "Ada", 9), AuditedClass(1, "Ada L. <i>", 2), 0.71, 0.93),
        DuplicatePair(AuditedClass(2, "Emmy", 4), AuditedClass(3, "Lise", 1), None, 0.88),
    ] * 6

    def picture(self, number: int, place: int) -> bytes | None:
        return png(number, place) if place < 2 else None


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Yield the address of the application on a free port, such as http://127.0.0.1:4711."""
    with bind("127.0.0.1", 0) as listener:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of an error; an error has nothing else."""
        said = self.json
        assert list(said) == ["error"], said
        text: str = said["error"]
        return text


def form(**parts: bytes | str) -> tuple[bytes, str]:
    """A body of multipart/form-data, and its type; bytes are files."""
    lines = []
    for name, value in parts.items():
        file = '; filename="upload"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        lines.append(
            f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return b"".join(lines) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def ask(address: str, method: str, path: str, headers: dict[str, str] | None = None, **parts: bytes | str) -> Answer:
    """The answer to a request, with a form if there are parts."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=100)
    sent = dict(headers or {})
    body = None
    if parts:
        body, sent["Content-Type"] = form(**parts)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()
