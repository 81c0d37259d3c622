"""The command `partial-fc plan`: what a head needs on each rank, computed before anything is allocated.

partial-fc plan --num_classes 29000000 --world_size 8 --batch_size 1024 --sample_rate 0.1 --memory 80GB
"""

from __future__ import annotations

import argparse
import json
import re

import torch

from partial_fc.planning.costs import OPTIMIZERS
from partial_fc.planning.plan import plan
from partial_fc.training.cli.parser import CommandParser, add_traceback
from partial_fc.training.errors import UserError
from partial_fc.training.whole_numbers import whole

UNITS = {
    "": 1,
    "B": 1,
    **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def byte_count(text: str) -> int:
    """Return the number of bytes in "80GB" (10⁹ each), "1.5GiB" (2³⁰ each) or "1000000"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes; write it as 80GB (10⁹ bytes each), 80GiB (2³⁰ each) or 80000000000"
        )
    unit = UNITS[found[2].upper()]
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit  # integers stay exact


def add_head_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large a head is."""
    parser.add_argument("--num_classes", type=whole, required=True, metavar="C", help="classes over all ranks")
    parser.add_argument(
        "--embedding_size", type=whole, default=512, metavar="D", help="width of the embeddings (default 512)"
    )
    parser.add_argument(
        "--batch_size", type=whole, required=True, metavar="N", help="samples of the global batch, over all ranks"
    )
    parser.add_argument(
        "--sample_rate",
        type=float,
        default=1.0,
        metavar="r",
        help="share of the classes drawn in each step (default 1.0)",
    )


def plan_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "plan",
        "Memory, operations and traffic of a sharded head on each rank. They are computed, not measured; nothing is "
        "allocated.",
    )
    add_head_sizes(parser)
    parser.add_argument(
        "--world_size", type=whole, default=1, metavar="RANKS", help="ranks that the classes are split over (default 1)"
    )
    parser.add_argument(
        "--hard_negatives",
        type=whole,
        default=0,
        metavar="K",
        help="nearest classes of each class of the batch that take part in each step (default 0)",
    )
    parser.add_argument(
        "--centers",
        type=whole,
        default=1,
        metavar="K",
        help="sub-centers of each class, which has a row for each (default 1)",
    )
    parser.add_argument(
        "--optimizer",
        type=str.lower,
        choices=tuple(OPTIMIZERS),
        default="sgd-momentum",
        help="optimizer of the head (default sgd-momentum)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the weights (default float32)"
    )
    parser.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        default=None,
        help="dtype of the matrix products (default: that of the weights)",
    )
    parser.add_argument(
        "--low_precision",
        choices=("master", "stochastic"),
        default=None,
        help="how 16-bit weights keep small updates: float32 master weights, or stochastic rounding",
    )
    parser.add_argument(
        "--update_in_backward",
        action="store_true",
        help="update rows inside backward; the whole weight has no gradient then",
    )
    parser.add_argument(
        "--skipped_rows",
        choices=("dense", "still"),
        default=None,
        help="rows that a sampled step does not select make the optimizer's steps later, or stand still (default: "
        "dense where the optimizer allows it)",
    )
    parser.add_argument(
        "--logits_budget",
        type=byte_count,
        default=None,
        metavar="BYTES",
        help="upper limit for logits kept in memory (default 1GiB)",
    )
    parser.add_argument(
        "--memory",
        type=byte_count,
        default=None,
        metavar="BYTES",
        help="memory of a rank that the head may use, such as 80GB or 80GiB",
    )
    parser.add_argument(
        "--storage",
        choices=("host", "files"),
        default=None,
        help="where rows and optimizer state are: as HostRows or FileRows (default: in the memory of the device)",
    )
    parser.add_argument(
        "--sample_block",
        type=whole,
        default=1,
        metavar="B",
        help="consecutive classes that are drawn together (default 1)",
    )
    parser.add_argument(
        "--disk",
        type=byte_count,
        default=None,
        metavar="BYTES",
        help="bytes per second that the disk of the files reads and writes, such as 600MB",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the head (default cuda)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and operations as integers")
    add_traceback(parser)
    return parser


def plan_command(arguments: list[str]) -> None:
    """`partial-fc plan`: print the plan. Raises UserError for invalid arguments."""
    # --num-classes is accepted for --num_classes
    underscored = [
        re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument) for argument in arguments
    ]
    options = plan_parser().parse_args(underscored)
    try:
        result = plan(
            options.num_classes,
            options.embedding_size,
            options.world_size,
            options.batch_size,
            options.sample_rate,
            options.optimizer,
            DTYPES[options.dtype],
            memory=options.memory,
            logits_budget=options.logits_budget,
            autocast=None if options.autocast is None else DTYPES[options.autocast],
            update_in_backward=options.update_in_backward,
            low_precision=options.low_precision,
            device=options.device,
            hard_negatives=options.hard_negatives,
            skipped_rows=options.skipped_rows,
            storage=options.storage,
            sample_block=options.sample_block,
            disk=options.disk,
            centers=options.centers,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
