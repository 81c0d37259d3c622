"""The ONNX file with weights and activations of 8 bits, and its accuracy beside that of float32.

backbone.onnx, images [n, C, H, W]   ── ranges of the activations ──>  backbone.int8.onnx, by onnxruntime
held-out images                      ── both files ──>  embeddings ── evaluate_embeddings ──>  figures of both

Convolutions and matrix products take int8 weights, with a scale for each output channel, and int8 activations, with a
scale for each tensor; everything else stays float32. The file has the inputs and outputs of the one that it is made of.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from partial_fc.training.data import IdentityDataset, UnreadableImage
from partial_fc.training.data.augment import to_float
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation, evaluate_embeddings
from partial_fc.training.export.onnx import INPUT, OUTPUT, cause, open_session

CALIBRATION = 256  # images from which the ranges of the activations are taken
MOST_IMAGES = 4096  # of a set that both files embed; whole identities
BATCH = 64


@dataclass(frozen=True)
class Compared:
    """One set of images by both files. Figures are None where the set has no genuine or no impostor pair."""

    name: str
    images: int
    identities: int
    float32: Evaluation | None
    int8: Evaluation | None
    mean_cosine: float
    """Of the two embeddings of an image, over all images."""
    lowest_cosine: float


def write_int8(float32: Path, images: Tensor, path: Path, name: str) -> None:
    """Write the file `float32` in 8 bits to `path`, calibrated on `images` `[n, C, H, W]`.

    Raises UserError if onnxruntime cannot; `name` is the name of the backbone for the message.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = float32.with_name(f"{float32.name}.data").exists()  # weights of more than 2 GB stand beside the graph
    try:
        with _quiet(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(float32), str(prepared), save_as_external_data=large)
            quantize_static(
                str(prepared),
                str(path),
                _Batches(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=False,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=large,
            )
    except OSError:
        raise
    except Exception as error:  # the errors of onnxruntime have no common class
        raise UserError(f"onnxruntime cannot write the backbone {name!r} in 8 bits: {cause(error)}") from error


def compare_accuracy(float32: Path, int8: Path, sets: dict[str, IdentityDataset], name: str) -> list[Compared]:
    """Return what both files give for at most MOST_IMAGES images of each set; unreadable images are left out.

    Raises UserError if a file cannot be run, or gives what is not finite.
    """
    sessions = [open_session(path, name) for path in (float32, int8)]
    found = []
    for each, dataset in sets.items():
        embeddings, labels = _embed(sessions, dataset, each, name)
        if not len(labels):
            continue
        if not all(part.isfinite().all() for part in embeddings):
            raise UserError(f"the backbone {name!r} in 8 bits does not give finite embeddings of {each}")
        figures: list[Evaluation | None] = []
        for part in embeddings:
            try:
                figures.append(evaluate_embeddings(part, labels, name=each))
            except UserError:  # no pair of one identity, or of two
                figures.append(None)
        cosines = F.cosine_similarity(embeddings[0].double(), embeddings[1].double())
        identities = len(labels.unique())
        found.append(
            Compared(each, len(labels), identities, figures[0], figures[1], float(cosines.mean()), float(cosines.min()))
        )
    return found


def _embed(sessions: list[Any], dataset: IdentityDataset, title: str, name: str) -> tuple[list[Tensor], Tensor]:
    """Return the embeddings by each session, and the labels, of the first identities of a set."""
    counts = torch.bincount(dataset.labels, minlength=dataset.num_identities).cumsum(0)
    last = int((counts <= max(MOST_IMAGES, int(counts[0]))).sum())
    indices = (dataset.labels < last).nonzero()[:, 0]
    parts: list[list[Tensor]] = [[] for _ in sessions]
    labels: list[int] = []
    for some in tqdm(indices.split(BATCH), desc=f"embedding {title} in float32 and int8", unit="batch", leave=False):
        images = []
        for index in some.tolist():
            try:
                images.append(dataset.load(index))
            except UnreadableImage:
                continue
            labels.append(int(dataset.labels[index]))
        if images:
            batch = to_float(torch.stack(images)).numpy()
            for part, session in zip(parts, sessions, strict=True):
                try:
                    part.append(torch.from_numpy(session.run([OUTPUT], {INPUT: batch})[0]))
                except Exception as error:  # the errors of onnxruntime have no common class
                    raise UserError(f"onnxruntime cannot run the backbone {name!r}: {cause(error)}") from error
    return [torch.cat(part) if part else torch.empty(0, 1) for part in parts], torch.tensor(labels, dtype=torch.int64)


class _Batches:
    """The images of the calibration, as onnxruntime asks for them: a batch, the next one, None."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter(images.split(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's advice to prepare the model, which is done, and what it says about single operations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
