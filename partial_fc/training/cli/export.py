"""The command `partial-fc export-backbone`: a run's backbone for use elsewhere, checked before it is there.

partial-fc export-backbone runs/quickstart --output exported
"""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from partial_fc.training.errors import UserError
from partial_fc.training.export.check import BATCHES, TOLERANCE
from partial_fc.training.export.export import FORMATS, Export, export_backbone


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc export-backbone --help` explains every setting")


def export_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc export-backbone",
        description="Write a run's backbone, of its newest complete checkpoint, as safetensors and ONNX, with all that is needed to feed "
        "it images. The files are compared with the backbone in torch on real images first; if they differ, nothing is written.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder to make (RUN/exported if not given); must not exist"
    )
    parser.add_argument(
        "--formats", nargs="+", default=list(FORMATS), metavar="FORMAT", help="safetensors, onnx, or both (the default)"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of identity/image files to compare on; may be given again; without it, the run's held-out or training images",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def export_command(arguments: list[str]) -> None:
    """`partial-fc export-backbone RUN`: export, then tell what is there; UserError for what cannot be done."""
    asked = export_parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("export-backbone is the work of one process; start it without a launcher")
    print(f"exporting the backbone of {asked.run} as {' and '.join(asked.formats)}", flush=True)
    print(told(export_backbone(asked.run, asked.output, asked.formats, asked.data)))


def told(export: Export) -> str:
    """What was written and how it compares, in lines."""
    lines = [
        f"compared with the backbone in torch on {export.checked_on} (largest difference, over the largest coordinate):"
    ]
    for name, found in export.differences.items():
        figures = ", ".join(f"{found[n]:.1e} in a batch of {n}" for n in BATCHES)
        lines.append(f"  {FORMATS[name]}: {figures}; allowed is {TOLERANCE:.0e}")
    lines.append(f"written to {export.folder}:")
    lines += [f"  {name}: {size:,} bytes" for name, size in export.sizes.items()]
    return "\n".join(lines)
