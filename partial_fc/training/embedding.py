"""From encoded images to embeddings, by the backbone of a run or by an exported one.

    RUN/config.yaml, checkpoints/                    the backbone of a checkpoint, by torch
    EXPORTED/backbone.safetensors                    an exported one, by torch
    EXPORTED/backbone.onnx, preprocessing.json       the same, by onnxruntime
    model.pt, and the backbone's name                weights from elsewhere, by torch

bytes ── header: kind, pixels ──> refused if too large ── decode, resize ──> uint8 [n, C, H, W] ── x / 127.5 − 1 ──>
images float32 [n, C, H, W] in [−1, 1] ── backbone, with `flip` also of the mirror images ──> embeddings float32 [n, D]

Images are decoded as for training (data/decode.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partial_fc.training.backbones.digest import weights_digest
from partial_fc.training.backbones.mirrored import embeddings_of
from partial_fc.training.backbones.settings import BackboneConfig
from partial_fc.training.data import UnreadableImage, decode_picture
from partial_fc.training.data.augment import to_float
from partial_fc.training.data.decode import read_header
from partial_fc.training.data.safe_files import MAX_IMAGE_BYTES
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import check_finite
from partial_fc.training.export.export import (
    ONNX,
    PREPROCESSING,
    SAFETENSORS,
    config_of_run,
    load_exported_backbone,
)
from partial_fc.training.export.onnx import INPUT, OUTPUT
from partial_fc.training.files import add_to_digest, told
from partial_fc.training.protocols.task_files import image_shape
from partial_fc.training.results import load_backbone
from partial_fc.training.run import CONFIG, RunFolder

Runtime = Literal["auto", "torch", "onnxruntime"]
Shape = tuple[int, int, int]

MAX_PIXELS = 89_478_485
"""Most pixels of an image that is decoded: Pillow's limit, above which it suspects a decompression bomb."""
AT_ONCE = 64  # images of a forward of `embed`


class Embedder:
    """A backbone that embeds images. `Embedder.open` makes one; its methods may be called by several threads."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        *,
        digest: str,
        dimension: int,
        image_shape: Shape,
        flip: bool,
        source: str,
        checkpoint: Path | None = None,
        device: torch.device | str = "cpu",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._forward = forward
        self.digest = digest
        """Names the weights, and equal for a run and what is exported of it."""
        self.dimension = dimension
        """Numbers of an embedding."""
        self.image_shape = image_shape
        """(C, H, W) of the images that the backbone takes; others are converted and resized."""
        self.flip = flip
        """Whether the embedding of the mirror image is added."""
        self.source = source
        """Where the backbone was read from."""
        self.checkpoint = checkpoint
        """The checkpoint of the run; None for an exported backbone."""
        self.device = torch.device(device)
        self.max_pixels = max_pixels

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        flip: bool = False,
        checkpoint: str = "newest",
        runtime: Runtime = "auto",
        device: torch.device | str = "cpu",
        max_pixels: int = MAX_PIXELS,
        backbone: str | None = None,
        embedding_size: int = 512,
        image_shape: Shape = (3, 112, 112),
    ) -> Embedder:
        """Open the backbone of a run folder, or of a folder that export-backbone wrote; or one of its files.

        With `backbone`, open a file of weights from elsewhere, such as insightface's model.pt.

        Args:
            flip: add the embedding of the mirror image, as in evaluation.
            checkpoint: of a run: newest, best, or a step.
            runtime: what runs an exported backbone; auto takes the safetensors by torch if they are there, else the
                ONNX file by onnxruntime, on the CPU.
            max_pixels: images of more are refused before they are decoded.
            backbone: the name of the backbone that the weights in `source` are of, such as iresnet50.
            embedding_size: the width of its embeddings; with `backbone` only.
            image_shape: (C, H, W) of the images that it takes; with `backbone` only.

        Raises UserError if there is no backbone, if it is damaged, or if a package is missing.
        """
        path = Path(source)
        rest: dict[str, Any] = {"flip": flip, "source": str(path.absolute()), "max_pixels": max_pixels}
        if backbone is not None:
            settings = BackboneConfig(name=backbone, embedding_size=embedding_size)
            return _open_weights(cls, path, settings, image_shape, torch.device(device), rest)
        kind = _kind_of(path, runtime)
        if kind != "run" and checkpoint != "newest":
            raise UserError(f"{source} is an exported backbone, which has no checkpoints; leave --checkpoint out")
        if kind == "onnx":
            return _open_onnx(cls, path if path.is_file() else path / ONNX, rest)
        if kind == "run":
            return _open_run(cls, RunFolder(path), checkpoint, torch.device(device), rest)
        return _open_safetensors(cls, path.parent if path.is_file() else path, torch.device(device), rest)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What embeddings depend on beside the weights."""
        return {"image_shape": list(self.image_shape), "flip": self.flip}

    def decode(self, image: bytes, name: str = "the image") -> Tensor:
        """Return an encoded image as uint8 `[C, H, W]`; UnreadableImage if it is damaged, too large, or none."""
        try:
            if len(image) > MAX_IMAGE_BYTES:
                raise ValueError(f"{len(image):,} bytes are too many; the limit is {MAX_IMAGE_BYTES:,}")
            _, width, height = read_header(image)
            if width * height > self.max_pixels:
                raise ValueError(f"{width} x {height} pixels are too many; the limit is {self.max_pixels:,}")
        except Exception as error:  # decoders raise almost anything for a damaged file
            raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error
        return decode_picture(image, self.image_shape, name)

    def embed(self, images: Sequence[bytes], names: Sequence[str] | None = None) -> npt.NDArray[np.float32]:
        """Return the embeddings `[n, D]` of encoded images, as the backbone gives them, not of unit length.

        names: of the images, for messages. Raises UnreadableImage for the first that cannot be read, and UserError if
        embeddings are not finite.
        """
        called = [f"image {place}" for place in range(len(images))] if names is None else names
        parts = [torch.empty(0, self.dimension)]
        for start in range(0, len(images), AT_ONCE):
            some = [self.decode(images[place], called[place]) for place in range(start, len(images))[:AT_ONCE]]
            parts.append(self.embed_batch(to_float(torch.stack(some))))
        return torch.cat(parts).numpy()

    def embed_batch(self, images: Tensor) -> Tensor:
        """Return the embeddings `[n, D]`, float32 on the CPU, of images float32 `[n, C, H, W]` in [−1, 1].

        Raises UserError if they are not finite, or not of the width that they should have.
        """
        images = images.to(self.device, non_blocking=images.is_pinned())
        with torch.inference_mode():
            embeddings = embeddings_of(self._forward, images, self.flip).cpu()
        if embeddings.shape != (len(images), self.dimension):
            raise UserError(
                f"the backbone of {self.source} gives {list(embeddings.shape)} for {len(images)} images, and should "
                f"give {[len(images), self.dimension]}"
            )
        check_finite(embeddings)
        return embeddings.clone()


def _kind_of(path: Path, runtime: Runtime) -> Literal["run", "safetensors", "onnx"]:
    """Return what a path leads to; UserError if it is no backbone, or none for the runtime."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder of a run, or one that export-backbone wrote")
    if path.is_file():
        kinds: dict[str, Literal["safetensors", "onnx"]] = {".safetensors": "safetensors", ".onnx": "onnx"}
        if path.suffix not in kinds or (path.suffix == ".safetensors" and path.name != SAFETENSORS):
            raise UserError(
                f"{path} is no backbone; give the folder of a run, a folder that export-backbone wrote, or its "
                f"{SAFETENSORS} or {ONNX}; a file of weights from elsewhere needs the name of its backbone "
                "(Embedder.open(..., backbone=), --backbone.name)"
            )
        if {"safetensors": "onnxruntime", "onnx": "torch"}[kinds[path.suffix]] == runtime:
            raise UserError(f"{path} is not run by {runtime}; leave --runtime out")
        return kinds[path.suffix]
    if (path / CONFIG).is_file():
        if runtime == "onnxruntime":
            raise UserError(f"{path} is a run, which torch runs; export it first: partial-fc export-backbone {path}")
        return "run"
    if runtime != "onnxruntime" and (path / SAFETENSORS).is_file():
        return "safetensors"
    if runtime != "torch" and (path / ONNX).is_file():
        return "onnx"
    looked_for = [*([SAFETENSORS] * (runtime != "onnxruntime")), *([ONNX] * (runtime != "torch"))]
    raise UserError(
        f"{path} is neither a run (it has no {CONFIG}) nor an exported backbone (no {' or '.join(looked_for)}); give "
        "the folder of a run, or one that export-backbone wrote"
    )


def _open_run(
    make: type[Embedder], run: RunFolder, checkpoint: str, device: torch.device, rest: dict[str, Any]
) -> Embedder:
    from partial_fc.training.interval import direction

    run.check_run()
    config = config_of_run(run)
    shape = image_shape(config)
    found = run.find_checkpoint(checkpoint, direction(config.evaluation.best))
    backbone = load_backbone(run, config, shape, found).float().eval()
    digest = weights_digest(backbone.state_dict())
    return make(
        backbone.to(device),
        digest=digest,
        dimension=config.backbone.embedding_size,
        image_shape=shape,
        checkpoint=found,
        device=device,
        **rest,
    )


def _open_weights(
    make: type[Embedder],
    path: Path,
    settings: BackboneConfig,
    shape: Shape,
    device: torch.device,
    rest: dict[str, Any],
) -> Embedder:
    settings.check()
    backbone = settings.build(shape, str(path)).float().eval()
    digest = weights_digest(backbone.state_dict())
    return make(
        backbone.to(device),
        digest=digest,
        dimension=settings.embedding_size,
        image_shape=shape,
        device=device,
        **rest,
    )


def _open_safetensors(make: type[Embedder], folder: Path, device: torch.device, rest: dict[str, Any]) -> Embedder:
    from safetensors import safe_open

    backbone = load_exported_backbone(folder)
    with safe_open(folder / SAFETENSORS, framework="pt") as file:
        metadata = file.metadata()  # `load_exported_backbone` has checked it
    channels, height, width = json.loads(metadata["image_shape"])
    return make(
        backbone.to(device),
        digest=weights_digest(backbone.state_dict()),
        dimension=int(metadata["embedding_size"]),
        image_shape=(channels, height, width),
        device=device,
        **rest,
    )


def _open_onnx(make: type[Embedder], path: Path, rest: dict[str, Any]) -> Embedder:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise UserError("running an ONNX file needs onnxruntime: pip install 'partial_fc[export]'") from error
    spec = read_spec(path.with_name(PREPROCESSING))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, so they are not logged
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of onnxruntime have no common class
        raise UserError(f"{path} cannot be run: {' '.join(str(error).split())[:300]}") from error

    def forward(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])
        except Exception as error:
            raise UserError(f"{path} cannot embed these images: {' '.join(str(error).split())[:300]}") from error

    weights = spec["run"].get("weights") if path.name == ONNX else None
    _, channels, height, width = spec["input"]["shape"]
    return make(
        forward,
        digest=weights or f"onnx-{_digest_of_files(path)}",
        dimension=int(spec["embedding_size"]),
        image_shape=(channels, height, width),
        **rest,
    )


def read_spec(path: Path) -> dict[str, Any]:
    """Return the content of preprocessing.json; UserError if it is missing, damaged, or asks for what is not done."""
    missing = f"{path} is missing, which says how images are prepared; give a folder that export-backbone wrote"
    with told(path, again="export the backbone again", missing=missing):
        spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _, channels, height, width = spec["input"]["shape"]
        sizes = [channels, height, width, spec["embedding_size"]]
        if not all(type(size) is int and size > 0 for size in sizes) or channels not in (1, 3):
            raise ValueError("its shapes are no sizes of images and embeddings")
        if not isinstance(spec["run"], dict):
            raise ValueError("it does not say of which run it is")
        if (spec["divide_by"], spec["then_subtract"], spec["layout"]) != (127.5, 1.0, "NCHW"):
            raise UserError(f"{path} asks for pixels in another range or order than this version makes")
    return spec


def _digest_of_files(path: Path) -> str:
    """Return a digest of an ONNX file and of the weights beside it, if there are any."""
    digest = hashlib.blake2b(digest_size=16)
    for each in (path, path.with_name(f"{path.name}.data")):
        if each.is_file():
            add_to_digest(digest, each)
    return digest.hexdigest()
