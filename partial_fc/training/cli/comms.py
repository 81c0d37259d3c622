"""The command `partial-fc comms`: how much time the ranks of a head spend on communication in a step, on this machine.

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
from partial_fc.training.cli.parser import CommandParser, add_traceback, config_first
from partial_fc.training.cli.plan import add_head_sizes
from partial_fc.training.config import RunConfig, add_config, to_config
from partial_fc.training.data import open_data
from partial_fc.training.errors import UserError
from partial_fc.training.ranks import check_devices
from partial_fc.training.settings_parser import SettingsParser
from partial_fc.training.whole_numbers import whole

MAX_IMAGES = 16  # in the measurement of the backbone


def comms_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "comms",
        "Time, bytes and bandwidth of the collectives of a head's step, measured on the launched ranks. "
        "Give sizes, or CONFIG.yaml and settings of a run.",
    )
    add_head_sizes(parser)
    parser.add_argument(
        "--backbone_parameters",
        type=whole,
        default=0,
        metavar="P",
        help="elements of the backbone's gradient (default: no backbone)",
    )
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU even if there is another device")
    _add_common(parser)
    return parser


def config_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc comms", description="Measure the collectives of a run.", exit_on_error=False
    )
    add_config(parser)
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=whole, default=7, help="calls of each collective; the median is reported (default 7)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_traceback(parser)


def comms_command(arguments: list[str]) -> None:
    """`partial-fc comms`: print the measurements on the first rank. Raises UserError for invalid arguments."""
    if arguments and not arguments[0].startswith("-"):
        parser = config_parser()
        arguments = config_first(arguments)
        config = to_config(parser, arguments)
        _measure(config.train.cpu, parser.parse_args(arguments), config)
    else:
        options = comms_parser().parse_args(arguments)
        _measure(options.cpu, options, None)


def _measure(cpu: bool, options: Any, config: RunConfig | None) -> None:
    check_devices(cpu)
    from accelerate import PartialState

    state = PartialState(cpu=cpu or not torch.cuda.is_available())
    try:
        sizes = _sizes_of_options(options) if config is None else _sizes_of_run(config, state.device)
        try:
            measured = comms(**sizes, device=state.device, repeats=options.repeats)
        except ValueError as error:
            raise UserError(str(error)) from error
        if state.is_main_process:
            print(json.dumps(measured.to_dict(), indent=2) if options.json else measured)
        state.wait_for_everyone()
    finally:
        state.destroy_process_group()


def _sizes_of_options(options: Any) -> dict[str, Any]:
    names = ("num_classes", "embedding_size", "batch_size", "sample_rate", "backbone_parameters")
    return {name: getattr(options, name) for name in names}


def _sizes_of_run(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return the sizes of a micro-batch of the run, and the measured time of its backbone."""
    from accelerate import PartialState

    data = open_data(config.data, config.seed).train
    backbone = build_backbone(
        config.backbone.name, image_shape=data.image_shape, embedding_size=config.backbone.embedding_size
    )
    batch = config.train.batch_size // config.train.accumulation
    local_batch = -(-batch // PartialState().num_processes)
    return {
        "num_classes": data.num_identities,
        "embedding_size": config.backbone.embedding_size,
        "batch_size": batch,
        "sample_rate": config.head.sample_rate,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
        "backbone_seconds": _backbone_seconds(backbone.to(device), data.image_shape, local_batch, device),
    }


def _backbone_seconds(backbone: torch.nn.Module, shape: tuple[int, ...], images: int, device: torch.device) -> float:
    """Return the time of a forward and backward on `images` images: measured on a few, then scaled."""
    count = max(2, min(images, MAX_IMAGES))
    x = torch.randn(count, *shape, device=device)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        backbone(x).sum().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) * images / count  # the first call warms up
