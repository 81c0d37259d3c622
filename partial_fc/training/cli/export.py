"""The command `partial-fc export-backbone`: write a run's backbone for use elsewhere, after checking the files.

partial-fc export-backbone runs/quickstart --output exported
"""

from __future__ import annotations

import argparse
import os

from partial_fc.training.cli.parser import CommandParser, add_traceback
from partial_fc.training.errors import UserError
from partial_fc.training.export.check import BATCHES, TOLERANCE
from partial_fc.training.export.export import DEFAULT_FORMATS, FORMATS, Export, export_backbone


def export_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "export-backbone",
        "Write the backbone of a run's newest complete checkpoint as safetensors and ONNX, with the description that "
        "is needed to feed it images, and a model card. The files are first compared with the backbone in torch on "
        "real images; if they differ, nothing is written.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder to make, which must not exist (default RUN/exported)"
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(DEFAULT_FORMATS),
        metavar="FORMAT",
        help="of safetensors, onnx and int8 (default: safetensors onnx). int8 is the ONNX file in 8 bits: smaller and "
        "less exact; its accuracy is measured beside that in float32",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of identity/image files to compare and measure on; may be repeated (default: the run's held-out "
        "images, or else its training images)",
    )
    add_traceback(parser)
    return parser


def export_command(arguments: list[str]) -> None:
    """`partial-fc export-backbone RUN`: export, and print what was written. Raises UserError if that is impossible."""
    options = export_parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("export-backbone runs in one process; start it without a launcher")
    print(f"exporting the backbone of {options.run} as {' and '.join(options.formats)}", flush=True)
    print(summary(export_backbone(options.run, options.output, options.formats, options.data)))


def summary(export: Export) -> str:
    """Return lines that say what was written, and how much it differs from the backbone in torch."""
    lines = [
        f"compared with the backbone in torch on {export.checked_on} (largest difference, over the largest coordinate):"
    ]
    for name, found in export.differences.items():
        figures = ", ".join(f"{found[n]:.1e} in a batch of {n}" for n in BATCHES)
        lines.append(f"  {FORMATS[name]}: {figures}; allowed is {TOLERANCE:.0e}")
    for each in export.compared:
        lines.append(f"int8 beside float32 on {each.images:,} images of {each.name}:")
        if each.float32 is not None and each.int8 is not None:
            for far, before in each.float32.tar.items():
                after = each.int8.tar[far]
                if before is not None and after is not None:
                    lines.append(f"  TAR @ FAR {far}: {after:.4f}, float32 {before:.4f}")
        cosines = f"mean {each.mean_cosine:.4f}, lowest {each.lowest_cosine:.4f}"
        lines.append(f"  cosine of the two embeddings of an image: {cosines}")
    lines.append(f"written to {export.folder}:")
    lines += [f"  {name}: {size:,} bytes" for name, size in export.sizes.items()]
    return "\n".join(lines)
