"""The command `partial-fc plan`: what a head will need on each rank, before anything is allocated.

partial-fc plan --num_classes 29000000 --world_size 8 --batch_size 1024 --sample_rate 0.1 --memory 80GB
"""

from __future__ import annotations

import argparse
import json
import re
from typing import NoReturn

import torch

from partial_fc.planning.costs import OPTIMIZERS
from partial_fc.planning.plan import plan
from partial_fc.training.errors import UserError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)},
    **{f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc plan --help` explains every setting")


def byte_count(text: str) -> int:
    """The bytes that "80GB" (10⁹ each), "1.5GiB" (2³⁰ each) or "1000000" mean."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bytes; write it as 80GB (10⁹ bytes each), 80GiB (2³⁰ each) or 80000000000"
        )
    return (
        int(float(found[1]) * UNITS[found[2].upper()]) if "." in found[1] else int(found[1]) * UNITS[found[2].upper()]
    )


def plan_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc plan",
        description="Memory, work and traffic of a sharded head on each rank, before anything is allocated. Computed, not measured.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_classes", type=int, required=True, metavar="C", help="classes over all ranks")
    parser.add_argument(
        "--embedding_size", type=int, default=512, metavar="D", help="width of the embeddings (default 512)"
    )
    parser.add_argument(
        "--world_size", type=int, default=1, metavar="RANKS", help="ranks that the classes are split over (default 1)"
    )
    parser.add_argument(
        "--batch_size", type=int, required=True, metavar="N", help="samples of the global batch, over all ranks"
    )
    parser.add_argument(
        "--sample_rate",
        type=float,
        default=1.0,
        metavar="r",
        help="share of the classes drawn for a step (default 1.0)",
    )
    parser.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), default="sgd-momentum", help="of the head (default sgd-momentum)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights (default float32)")
    parser.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        default=None,
        help="dtype of the matrix products (default: as dtype)",
    )
    parser.add_argument(
        "--low_precision", choices=("master", "stochastic"), default=None, help="how 16-bit weights take small steps"
    )
    parser.add_argument(
        "--update_in_backward", action="store_true", help="move rows inside backward; no gradient of the whole weight"
    )
    parser.add_argument(
        "--logits_budget",
        type=byte_count,
        default=None,
        metavar="BYTES",
        help="kept logits take no more (default 1GiB)",
    )
    parser.add_argument(
        "--memory",
        type=byte_count,
        default=None,
        metavar="BYTES",
        help="what a rank may use for the head, as 80GB or 80GiB",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the head is (default cuda)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and operations as integers")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def plan_command(arguments: list[str]) -> None:
    """`partial-fc plan`: print the plan; UserError for bad arguments."""
    dashed = (
        re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument) for argument in arguments
    )
    asked = plan_parser().parse_args(list(dashed))
    try:
        made = plan(
            asked.num_classes,
            asked.embedding_size,
            asked.world_size,
            asked.batch_size,
            asked.sample_rate,
            asked.optimizer,
            DTYPES[asked.dtype],
            memory=asked.memory,
            logits_budget=asked.logits_budget,
            autocast=None if asked.autocast is None else DTYPES[asked.autocast],
            update_in_backward=asked.update_in_backward,
            low_precision=asked.low_precision,
            device=asked.device,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(json.dumps(made.to_dict(), indent=2) if asked.json else made)
