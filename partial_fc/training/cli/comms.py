"""The command `partial-fc comms`: how long the ranks of a head talk in a step, on the machines that are there.

accelerate launch --config_file configs/accelerate/cpu2.yaml -m partial_fc comms configs/quickstart.yaml
torchrun --nproc_per_node 8 -m partial_fc comms --num_classes 2000000 --batch_size 1024 --embedding_size 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from partial_fc.planning.measure_comms import comms
from partial_fc.training.backbones import build_backbone
from partial_fc.training.cli.plan import _Parser
from partial_fc.training.config import RunConfig, add_config, to_config
from partial_fc.training.data import open_data
from partial_fc.training.errors import UserError
from partial_fc.training.settings_parser import SettingsParser

MOST_IMAGES = 16  # in the measurement of the backbone


def comms_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc comms",
        description="Time, bytes and bandwidth of the collectives of a head's step, measured on the launched ranks. "
        "With a CONFIG.yaml and settings in their place, of that run.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_classes", type=int, required=True, metavar="C", help="classes over all ranks")
    parser.add_argument(
        "--batch_size", type=int, required=True, metavar="N", help="samples of the global batch, over all ranks"
    )
    parser.add_argument(
        "--embedding_size", type=int, default=512, metavar="D", help="width of the embeddings (default 512)"
    )
    parser.add_argument(
        "--sample_rate",
        type=float,
        default=1.0,
        metavar="r",
        help="share of the classes drawn for a step (default 1.0)",
    )
    parser.add_argument(
        "--backbone_parameters",
        type=int,
        default=0,
        metavar="P",
        help="numbers of the backbone's gradient (default: none)",
    )
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU though there is another device")
    _add_common(parser)
    return parser


def config_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc comms", description="The collectives of a run, measured.", exit_on_error=False
    )
    add_config(parser)
    _add_common(parser)
    return parser


def _add_common(parser: Any) -> None:
    parser.add_argument(
        "--repeats", type=int, default=7, help="calls of each collective; the median counts (default 7)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def comms_command(arguments: list[str]) -> None:
    """`partial-fc comms`: print what was measured on the first rank; UserError for bad arguments."""
    if arguments and not arguments[0].startswith("-"):
        parser = config_parser()
        config = to_config(parser, ["--config", *arguments])
        _measure(config.train.cpu, parser.parse_args(["--config", *arguments]), config)
    else:
        asked = comms_parser().parse_args(arguments)
        _measure(asked.cpu, asked, None)


def _measure(cpu: bool, asked: Any, config: RunConfig | None) -> None:
    from accelerate import PartialState

    what = _plain(asked) if config is None else None
    state = PartialState(cpu=cpu or not torch.cuda.is_available())
    try:
        given = what or _of_run(config, state.device)  # type: ignore[arg-type]
        try:
            measured = comms(**given, device=state.device, repeats=asked.repeats)
        except ValueError as error:
            raise UserError(str(error)) from error
        if state.is_main_process:
            print(json.dumps(measured.to_dict(), indent=2) if asked.json else measured)
        state.wait_for_everyone()
    finally:
        state.destroy_process_group()


def _plain(asked: Any) -> dict[str, Any]:
    names = ("num_classes", "embedding_size", "batch_size", "sample_rate", "backbone_parameters")
    return {name: getattr(asked, name) for name in names}


def _of_run(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What a micro-batch of the run exchanges, and the time of its backbone."""
    from accelerate import PartialState

    data = open_data(config.data, config.seed).train
    backbone = build_backbone(
        config.backbone.name, image_shape=data.image_shape, embedding_size=config.backbone.embedding_size
    )
    batch = config.train.batch_size // config.train.accumulation
    here = -(-batch // PartialState().num_processes)
    return {
        "num_classes": data.num_identities,
        "embedding_size": config.backbone.embedding_size,
        "batch_size": batch,
        "sample_rate": config.head.sample_rate,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
        "backbone_seconds": _backbone_seconds(backbone.to(device), data.image_shape, here, device),
    }


def _backbone_seconds(backbone: torch.nn.Module, shape: tuple[int, ...], images: int, device: torch.device) -> float:
    """Of its forward and backward on a rank's images, measured with a few and scaled."""
    count = max(2, min(images, MOST_IMAGES))
    x, times = torch.randn(count, *shape, device=device), []
    for _ in range(4):
        begin = time.perf_counter()
        backbone(x).sum().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) * images / count
