"""A backbone as an ONNX file, and its embeddings by onnxruntime.

backbone in eval mode       ── torch.export with a variable batch size ──>  graph of opset 18
graph without stack traces  ── file ──>  backbone.onnx: "images" float32 [n, C, H, W] -> "embeddings" float32 [n, D]

Weights of more than 2 GB, the limit of protobuf, go into a second file beside it. The exporter adds the source file
and line to every node; these are removed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.training.errors import UserError

OPSET = 18
INPUT = "images"
OUTPUT = "embeddings"


def write_onnx(backbone: nn.Module, image_shape: tuple[int, int, int], path: Path, name: str) -> None:
    """Write `backbone`, in eval mode on the CPU, to `path`.

    Raises UserError if ONNX cannot express it; `name` is the name of the backbone for the message.
    """
    from onnx import checker
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                backbone,
                (torch.zeros(2, *image_shape),),  # not 1: torch.export would treat this size as constant
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            ClearMetadataAndDocStringPass()(program.model)
            program.save(path)
            checker.check_model(path, full_check=True)
    except OSError:
        raise
    except Exception as error:  # the exporter runs the backbone's code and wraps whatever that raises
        raise UserError(f"the backbone {name!r} cannot be expressed in ONNX (opset {OPSET}): {cause(error)}") from error


def run_onnx(path: Path, images: Tensor, sizes: tuple[int, ...], name: str) -> list[Tensor]:
    """Return the embeddings of `images` `[sum(sizes), C, H, W]` by onnxruntime, in batches of these sizes.

    Raises UserError if it cannot run one of them.
    """
    try:
        session = open_session(path, name)
        batch_size = session.get_inputs()[0].shape[0]
        if isinstance(batch_size, int):
            raise UserError(
                f"the backbone {name!r} can be exported only for batches of {batch_size}: "
                "its code fixes the number of images"
            )
        return [torch.from_numpy(session.run([OUTPUT], {INPUT: part.numpy()})[0]) for part in images.split(list(sizes))]
    except UserError:
        raise
    except Exception as error:  # the errors of onnxruntime have no common class
        raise UserError(
            f"onnxruntime cannot run the exported backbone {name!r} on batches of {sizes}: {cause(error)}"
        ) from error


def open_session(path: Path, name: str) -> Any:
    """Return a session of onnxruntime for an exported file. Raises UserError if it cannot read it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, so they are not logged
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of onnxruntime have no common class
        raise UserError(f"onnxruntime cannot read the exported backbone {name!r}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return the first line of the error that the others were raised from, shortened to 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter.

    It logs missing optional packages, warns about its own use of deprecated names, and prints the whole graph on
    failure; the reason is in the error.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.filterwarnings(
                "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
            )
            yield
    finally:
        logging.disable(before)
