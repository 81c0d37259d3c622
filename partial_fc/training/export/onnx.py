"""A backbone as an ONNX file, and what onnxruntime makes of images with it.

backbone, in eval mode     ── torch.export, at a batch size that stays free ──>  graph of opset 18
graph, without its traces  ── file ──>  backbone.onnx: "images" float32 [n, C, H, W] -> "embeddings" float32 [n, D]

Weights beyond protobuf's 2 GB go into a second file beside it. The exporter notes at every node which line of which file on this
machine it came from; that is taken out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_fc.training.errors import UserError

OPSET = 18
INPUT, OUTPUT = "images", "embeddings"


def write_onnx(backbone: nn.Module, image_shape: tuple[int, int, int], path: Path, name: str) -> None:
    """Write `backbone`, which is in eval mode on the CPU, to `path`; UserError if ONNX cannot express it. `name` is for the message."""
    from onnx import checker
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                backbone,
                (torch.zeros(2, *image_shape),),  # two: torch.export takes a size of 1 for one that never changes
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
    except Exception as error:  # the exporter runs the backbone's own code, and wraps whatever comes out of it
        raise UserError(
            f"the backbone {name!r} cannot be expressed in ONNX (opset {OPSET}): {_cause(error)}"
        ) from error


def run_onnx(path: Path, images: Tensor, sizes: tuple[int, ...], name: str) -> list[Tensor]:
    """What onnxruntime makes of `images` `[sum(sizes), C, H, W]`, in batches of those sizes; UserError if it refuses one of them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised; it need not be printed as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        takes = session.get_inputs()[0].shape[0]
        if isinstance(takes, int):
            raise UserError(
                f"the backbone {name!r} would be exported for batches of {takes} alone: its code fixes the number of images"
            )
        return [torch.from_numpy(session.run([OUTPUT], {INPUT: part.numpy()})[0]) for part in images.split(list(sizes))]
    except UserError:
        raise
    except Exception as error:  # onnxruntime's errors have no class in common
        raise UserError(
            f"onnxruntime cannot run the exported backbone {name!r} on batches of {sizes}: {_cause(error)}"
        ) from error


def _cause(error: BaseException) -> str:
    """The first line, cut to a readable length, of the error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own chatter: what it logs of packages it does not find, its use of torch's deprecated names, and the
    whole graph, which it prints when it fails; the reason is in the error."""
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
