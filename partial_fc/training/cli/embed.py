"""The command `partial-fc embed`: the embeddings of a data set, as Parquet or npz files.

partial-fc embed runs/quickstart --data FOLDER --output embeddings

It runs in one process, or on several ranks started by a launcher.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from partial_fc.training.all_ranks import run_on_all
from partial_fc.training.cli.backbone_source import add_backbone_file, backbone_file
from partial_fc.training.cli.data import add_source_options, open_from_options
from partial_fc.training.cli.parser import (
    CommandParser,
    add_checkpoint,
    add_on_error,
    add_traceback,
    add_workers,
    check_at_least,
)
from partial_fc.training.data import IdentityDataset
from partial_fc.training.data.formats.packed import is_packed, packed_splits
from partial_fc.training.data.loader import choose_workers, ranks_of_machine
from partial_fc.training.embed_data import BATCH, PART, Finished, Reading, embed_data
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import UNREADABLE
from partial_fc.training.errors import UserError
from partial_fc.training.export.export import config_of_run
from partial_fc.training.ranks import check_devices
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.run_data import data_of_run
from partial_fc.training.whole_numbers import whole

WEEK = 7 * 24 * 3600.0  # seconds that a rank waits for the slowest


def embed_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "embed",
        "Write the embeddings of all images of a data set, with the id, label, identity, path and norm of each. The "
        "same command goes on after a kill.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a run, or one that export-backbone wrote; or, with --backbone.name, a file of weights",
    )
    add_data(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make, or one in which the same command was stopped"
    )
    parser.add_argument(
        "--files", choices=("parquet", "npz"), default="parquet", help="what to write (default parquet)"
    )
    parser.add_argument(
        "--part",
        type=whole,
        default=None,
        metavar="N",
        help=f"images of a file, rounded up to whole batches (default {PART}, fewer for small data sets)",
    )
    add_backbone_options(parser)
    add_backbone_file(parser)
    add_traceback(parser)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add --data and the options of its format."""
    parser.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="a data set in any format that training takes (default: the run's own; with --split a held-out set of it)",
    )
    add_source_options(parser)


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a backbone is run, and how images are read."""
    parser.add_argument("--flip", action="store_true", help="add the embedding of the mirror image")
    add_checkpoint(parser)
    parser.add_argument(
        "--runtime",
        choices=("auto", "torch", "onnxruntime"),
        default="auto",
        help="what runs an exported backbone (default: torch if there are safetensors, else onnxruntime)",
    )
    parser.add_argument(
        "--batch_size", type=whole, default=None, help=f"images of a forward on each rank (default {BATCH})"
    )
    add_workers(parser)
    add_on_error(parser)


def embed_command(arguments: list[str]) -> None:
    """`partial-fc embed`. Raises UserError, the same on every rank, if that is not possible."""
    options = embed_parser().parse_args(arguments)
    check_reading(options)
    check_at_least(options, "part", 1)
    accelerator = make_accelerator(options.run)
    embedder = run_on_all(lambda: _open(options, accelerator.device), accelerator)
    name, dataset = run_on_all(lambda: open_images(options, embedder), accelerator)
    reading = reading_of(options, dataset, accelerator)
    finished = embed_data(
        embedder, dataset, options.output, accelerator, reading, name=name, kind=options.files, part=options.part
    )
    if accelerator.is_main_process:
        print(_summary(finished, options.output, embedder))
    accelerator.end_training()


def _open(options: argparse.Namespace, device: torch.device) -> Embedder:
    given = backbone_file(options, options.run)
    if given is None:
        return open_embedder(options.run, options, device)
    if options.runtime == "onnxruntime":
        raise UserError("a file of weights is run by torch; leave --runtime out")
    settings = given.config.backbone
    return Embedder.open(
        given.path,
        flip=options.flip,
        device=device,
        backbone=settings.name,
        embedding_size=settings.embedding_size,
        image_shape=given.shape,
    )


def _summary(finished: Finished, output: str, embedder: Embedder) -> str:
    text = f"{output}: embeddings of {finished.images:,} images, {embedder.dimension} numbers each"
    if not finished.made:
        text += "; they were there already"
    else:
        text += f"; {finished.made:,} made now, {finished.made / max(finished.seconds, 1e-9):,.0f} images a second"
    left_out = []
    if unreadable := finished.unreadable - finished.skipped:
        left_out.append(f"{unreadable:,} image{'s' * (unreadable > 1)} could not be read")
    if finished.skipped:
        left_out.append(f"{finished.skipped:,} skipped, such as a folder without an image")
    if left_out:
        text += f"\n{'; '.join(left_out)}: listed in {Path(output) / UNREADABLE}"
    return text


def check_reading(options: argparse.Namespace) -> None:
    for name, least in (("workers", 0), ("batch_size", 1)):
        check_at_least(options, name, least)


def make_accelerator(source: str) -> Accelerator:
    """Return the Accelerator of this rank: on the CPU if there is no GPU, or if the run has said so."""
    cpu = not torch.cuda.is_available()
    if (Path(source) / CONFIG).is_file():
        cpu = cpu or config_of_run(RunFolder(source)).train.cpu
    check_devices(cpu)
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=WEEK))])


def open_embedder(source: str, options: argparse.Namespace, device: torch.device) -> Embedder:
    """Open the backbone as the options say."""
    return Embedder.open(
        source, flip=options.flip, checkpoint=options.checkpoint, runtime=options.runtime, device=device
    )


def reading_of(options: argparse.Namespace, dataset: IdentityDataset, accelerator: Accelerator) -> Reading:
    """Return how images are read, with as many workers as this rank's cores allow."""
    workers = options.workers
    if workers is None:
        workers = choose_workers(
            dataset, ranks_of_machine(accelerator.num_processes), accelerator.device.type == "cuda"
        )
    return Reading(options.batch_size, workers, options.on_error)


def open_images(options: argparse.Namespace, embedder: Embedder) -> tuple[str, IdentityDataset]:
    """Return (name, the data set of --data, or of the run). UserError if its images do not fit the backbone."""
    if options.data is None:
        name, dataset = _images_of_run(options, Path(embedder.source))
    elif is_packed(options.data):
        splits = packed_splits(options.data, options.split)
        if len(splits) > 1:
            raise UserError(f"{options.data} has the splits {', '.join(splits)}; choose one with --split")
        name, dataset = next(iter(splits.items()))
    else:
        name = Path(options.data).name
        channels, height, width = embedder.image_shape
        if height != width:
            raise UserError(f"the backbone takes images of {width} x {height} pixels, and data sets are square")
        dataset = open_from_options(options.data, options, height, channels)
    if dataset.image_shape != embedder.image_shape:
        raise UserError(
            f"the images of {options.data or 'the run'} have the shape {dataset.image_shape}, but the backbone takes "
            f"{embedder.image_shape} (channels, height, width)"
        )
    return name, dataset


def _images_of_run(options: argparse.Namespace, run: Path) -> tuple[str, IdentityDataset]:
    """Return (name, one of the run's own sets)."""
    if not (run / CONFIG).is_file():
        raise UserError("an exported backbone, or a file of weights, has no data set of its own; give one with --data")
    for name, default in (("source_format", "auto"), ("image_column", None), ("label_column", None)):
        if getattr(options, name) != default:
            raise UserError(f"--{name} applies to the data set of --data; give --data, or leave --{name} out")
    config = config_of_run(RunFolder(run))
    config.data.on_error = options.on_error
    chosen = options.split or "train"
    splits = data_of_run(RunFolder(run), config, training=chosen == "train")
    sets = {"train": splits.train, **splits.evaluation}
    if chosen not in sets:
        raise UserError(f"the run {run} has no set {chosen!r}, only {', '.join(sets)}; give another --split")
    return chosen, sets[chosen]
