"""The content of preprocessing.json, and of config.json.

file ── decode ──> grey or RGB, 8 bits ── resize ──> [H, W, C] ── x / 127.5 - 1, transpose ──> float32 [n, C, H, W]
embeddings float32 [n, D] ── divide by length ──> their dot products are cosines

It describes what the data sets and `augment.to_float` do; a test follows it with only Pillow and numpy and compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partial_fc.training.config import RunConfig
from partial_fc.training.export.onnx import INPUT, OPSET, OUTPUT
from partial_fc.training.files import add_to_digest

FORMAT = 1
MODEL_CONFIG = "config.json"

USAGE = {
    "onnx": """\
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder = Path("exported")  # what export-backbone wrote
spec = json.loads((folder / "preprocessing.json").read_text())
session = onnxruntime.InferenceSession(folder / "backbone.onnx", providers=["CPUExecutionProvider"])


def prepare(path):
    image = Image.open(path)
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image.convert(spec["pillow_mode"]).resize((spec["width"], spec["height"]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32).reshape(spec["height"], spec["width"], spec["channels"])
    return pixels.transpose(2, 0, 1) / np.float32(spec["divide_by"]) - np.float32(spec["then_subtract"])


def embed(paths):
    embeddings = session.run(["embeddings"], {"images": np.stack([prepare(path) for path in paths])})[0]
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)  # their dot products are cosines
""",
    "safetensors": """\
from pathlib import Path
from partial_fc.training.embedding import Embedder

embedder = Embedder.open("exported")  # also for the folder of a run
embeddings = embedder.embed([Path(path).read_bytes() for path in paths])  # [n, D]; scale them to unit length
""",
}


def describe(
    config: RunConfig, shape: tuple[int, int, int], identity: dict[str, Any], differences: dict[str, dict[int, float]]
) -> dict[str, Any]:
    """Return the content of preprocessing.json: the steps from an image file to the similarity of embeddings."""
    channels, height, width = shape
    grey = channels == 1
    return {
        "format": FORMAT,
        "architecture": config.backbone.name,
        "decoding": "first frame; EXIF orientation is not applied; 16-bit grey: clip to 0..65535, keep the high byte",
        "channels": channels,
        "color_order": "grey" if grey else "RGB",
        "pillow_mode": "L" if grey else "RGB",
        "alpha": "dropped",
        "height": height,
        "width": width,
        "resize": "to width x height, without keeping the aspect ratio: Pillow's Image.resize with BILINEAR "
        "(a triangle filter, wider when shrinking)",
        "crop": "none; crop and align images in the same way as the training images",
        "divide_by": 127.5,
        "then_subtract": 1.0,
        "value_range": [-1.0, 1.0],
        "layout": "NCHW",
        "trained_on": "the embedded glyphs: white strokes on black"
        if config.data.folder is None
        else "images of a folder",
        "input": {"name": INPUT, "dtype": "float32", "shape": ["n", *shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["n", config.backbone.embedding_size]},
        "embedding_size": config.backbone.embedding_size,
        "output_is_normalised": False,
        "normalise": "divide each embedding by its Euclidean length; the similarity of two images is then their dot "
        "product, the cosine",
        "opset": OPSET if "onnx" in differences else None,
        "largest_difference_from_torch": {
            each: {str(n): v for n, v in found.items()} for each, found in differences.items()
        },
        "run": identity,
        "usage": {each: USAGE[each].splitlines() for each in differences},
    }


def model_config(
    config: RunConfig,
    shape: tuple[int, int, int],
    identity: Mapping[str, Any],
    folder: Path,
    metrics: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of config.json: what to build, the run's thresholds by set, and a digest of every file so far.

    metrics: metrics.json of the run and step, or None.
    """
    evaluations = [] if metrics is None else metrics.get("evaluations", [])
    return {
        "library_name": "partial_fc",
        "format": FORMAT,
        "architecture": config.backbone.name,
        "image_shape": list(shape),
        "embedding_size": config.backbone.embedding_size,
        "similarity": "cosine",
        "thresholds_at_far": {each["name"]: each["thresholds"] for each in evaluations},
        "run": dict(identity),
        "sha256": {path.name: _digest(path) for path in sorted(folder.iterdir())},
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    add_to_digest(digest, path)
    return digest.hexdigest()
