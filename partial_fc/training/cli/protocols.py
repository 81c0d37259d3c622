"""The commands `partial-fc verify`, `templates`, `identify` and `retrieve`: standard protocols for a trained backbone.

partial-fc verify    RUN lfw.bin cfp_fp.bin agedb_30.bin
partial-fc templates RUN --images loose_crop --templates ijbc_face_tid_mid.txt \\
                         --pairs ijbc_template_pair_label.txt --scores ijbc.npy
partial-fc identify  RUN --gallery GALLERY --probes PROBES --distractors DISTRACTORS
partial-fc retrieve  RUN --query query --gallery bounding_box_test --label '^(-?\\d+)' --camera 'c(\\d+)'

Instead of RUN, a file of embeddings may be given: .npy or .safetensors, one row per image, in the order in which the
command reads the images. The commands run in one process, or on several ranks started by a launcher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from partial_fc.training.all_ranks import run_on_all, run_on_main
from partial_fc.training.cli.backbone_source import BackboneOfRun, add_backbone_file, backbone_file
from partial_fc.training.cli.parser import (
    CommandParser,
    add_checkpoint,
    add_on_error,
    add_traceback,
    add_workers,
    check_at_least,
)
from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.files import replacing, write_array
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.task_files import (
    Shape,
    open_identification,
    open_retrieval,
    open_templates,
    open_verification,
)
from partial_fc.training.protocols.tasks import Task, TemplatePairs, first_twice
from partial_fc.training.ranks import check_devices
from partial_fc.training.results import (
    describe_environment,
    output_folder,
    run_tasks,
    split_work,
    write_results,
)
from partial_fc.training.run import RunFolder
from partial_fc.training.settings_parser import SettingsParser
from partial_fc.training.whole_numbers import whole

DESCRIPTIONS = {
    "verify": "Verification on files of image pairs (lfw.bin, cfp_fp.bin, ...): ten-fold accuracy, TAR at FAR.",
    "templates": "Template verification as in IJB-B and IJB-C: TAR at FAR from 1e-6, and a file of scores.",
    "identify": "1:N identification of probes in a gallery with distractors: rank-k, DIR at FPIR.",
    "retrieve": "Retrieval, for example of products or persons: CMC, mAP, Recall@k.",
}
ANY_SHAPE = (3, 112, 112)  # where images are not decoded and their shape does not matter


def protocol_parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(command, DESCRIPTIONS[command])
    parser.add_argument(
        "run",
        help="folder of a run; or a file of embeddings (.npy, .safetensors), one row per image in order; or, with "
        "--backbone.name, a file of weights",
    )
    _ADD_FILES[command](parser)
    if command != "verify":
        parser.add_argument(
            "--name",
            default=None,
            help="name of the data set in the results (default: the name of the file of pairs, or of the folder of "
            "probes or queries)",
        )
    if command in ("verify", "templates"):
        parser.add_argument("--no_flip", action="store_true", help="do not add the embedding of the mirror image")
    else:
        parser.add_argument("--flip", action="store_true", help="add the embedding of the mirror image")
    add_checkpoint(parser)
    add_backbone_file(parser)
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="new folder for metrics.json, report.html, ... (default RUN/COMMAND-NAME, or a folder beside the file)",
    )
    parser.add_argument(
        "--batch_size", type=whole, default=512, help="images per forward, over all ranks (default 512)"
    )
    parser.add_argument(
        "--tile",
        type=whole,
        default=2048,
        help="side of the tiles in which the matrix of cosines is computed, in images (default 2048)",
    )
    add_workers(parser)
    add_on_error(parser)
    add_traceback(parser)
    return parser


def _add_verify_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="PAIRS.bin", help="files of pickled pairs; they are read without running their code"
    )


def _add_template_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="folder of the images; aligned faces, unless --points is given")
    add(
        "--templates",
        required=True,
        metavar="FILE",
        help="lines: image name, template id, media id (face_tid_mid.txt)",
    )
    add(
        "--pairs",
        required=True,
        metavar="FILE",
        help="lines: template id, template id, 1 or 0 (template_pair_label.txt)",
    )
    add(
        "--detector_scores",
        default=None,
        metavar="FILE",
        help="lines: image name ... score; each image is weighted by its score",
    )
    add(
        "--points",
        default=None,
        metavar="FILE",
        help="lines: image name, x and y of five points, score; faces are aligned by them",
    )
    add(
        "--normalize_images", action="store_true", help="normalize each image's embedding to unit length before pooling"
    )
    add(
        "--scores",
        default=None,
        metavar="OUT",
        help="new file for the score of each pair, .npy or .txt",
    )


def _add_identification_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--gallery", required=True, metavar="DIR", help="identity/image files of the enrolled identities")
    add(
        "--probes",
        required=True,
        metavar="DIR",
        help="identity/image files to search for; identities are matched by folder name",
    )
    add(
        "--distractors",
        default=None,
        metavar="DIR",
        help="folder/image files that are also enrolled, each as an identity of its own",
    )


def _add_retrieval_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--query", required=True, metavar="DIR", help="identity/image files to search for; or image files, with --label"
    )
    add("--gallery", default=None, metavar="DIR", help="images to search in (default: the other queries)")
    add(
        "--label",
        default=None,
        metavar="REGEX",
        help="finds the identity in the file name, for a folder without sub-folders",
    )
    add(
        "--camera",
        default=None,
        metavar="REGEX",
        help="finds the camera in the file name; images of the query's identity and camera are ignored",
    )


_ADD_FILES = {
    "verify": _add_verify_files,
    "templates": _add_template_files,
    "identify": _add_identification_files,
    "retrieve": _add_retrieval_files,
}


def open_command_tasks(command: str, options: argparse.Namespace, shape: Shape) -> list[Task]:
    """Open the tasks of a command. Raises UserError for files that cannot be read."""
    if command == "verify":
        twice = first_twice([Path(path).stem for path in options.files])
        if twice is not None:
            raise UserError(
                f"two files of pairs are called {twice!r}, but each needs its own name in the results; rename one, or "
                "give one at a time"
            )
        return [open_verification(path, shape, not options.no_flip) for path in options.files]
    if command == "templates":
        task: Task = open_templates(
            options.name or Path(options.pairs).stem,
            shape,
            images=options.images,
            listed=options.templates,
            pairs=options.pairs,
            detector_scores=options.detector_scores,
            points=options.points,
            normalize_images=options.normalize_images,
            flip=not options.no_flip,
        )
    elif command == "identify":
        task = open_identification(
            options.name or Path(options.probes).name,
            shape,
            options.gallery,
            options.probes,
            options.distractors,
            options.flip,
            options.on_error,
        )
    else:
        try:
            task = open_retrieval(
                options.name or Path(options.query).name,
                shape,
                options.query,
                options.gallery,
                options.label,
                options.camera,
                options.flip,
                options.on_error,
            )
        except UserError as error:
            if "has no sub-folders" not in str(error):
                raise
            raise UserError(f"{error}, or give --label REGEX, which finds the identity in the file name") from error
    return [task]


def protocol_command(command: str, parser: Callable[[], SettingsParser], arguments: list[str]) -> None:
    """Run one of the commands; `parser` returns the parser of a run's settings.

    Raises UserError, the same on every rank, if the evaluation is not possible.
    """
    options = protocol_parser(command).parse_args(arguments)
    for name, least in (("workers", 0), ("tile", 1), ("batch_size", 1)):
        check_at_least(options, name, least)
    scores = getattr(options, "scores", None)
    if scores is not None and (Path(scores).suffix not in (".npy", ".txt") or Path(scores).exists()):
        raise UserError(f"--scores {scores}: give the name of a new file that ends with .npy or .txt")
    given = backbone_file(options, options.run)
    if given is None and Path(options.run).suffix in (".npy", ".safetensors"):
        _evaluate_embeddings_file(command, options)
        return
    source = BackboneOfRun(options.run, parser(), options.checkpoint) if given is None else given
    config = source.config
    config.data.workers = options.workers
    config.data.on_error = options.on_error
    config.evaluation.batch_size = options.batch_size
    config.evaluation.tile = options.tile
    check_devices(config.train.cpu)
    accelerator = Accelerator(cpu=config.train.cpu or not torch.cuda.is_available())
    tasks = run_on_all(lambda: open_command_tasks(command, options, source.shape), accelerator)
    backbone = source.load(accelerator).to(accelerator.device)
    out = RunFolder(options.output or source.output(_folder_name(command, tasks)))

    def write(results: list[Result]) -> None:
        _print_results(results, tasks, scores)
        title = f"{config.backbone.name} of {source.path.name} on {', '.join(task.name for task in tasks)}"
        figures = {"unreadable_images": len(out.unreadable()), **source.figures()}
        environment = describe_environment(accelerator)
        report = write_results(out, title, [], figures, source.settings, environment, [], results)
        out.print_unreadable()
        print(f"\nResults are in {out.path}; look at {report}")

    with output_folder(out, accelerator):
        results = run_tasks(backbone, tasks, accelerator, config, out)
        run_on_main(lambda: write(results), accelerator)
    accelerator.end_training()


def _folder_name(command: str, tasks: list[Task]) -> str:
    return f"{command}-{'-'.join(task.name for task in tasks)}"


def _print_results(results: list[Result], tasks: list[Task], scores: str | None) -> None:
    """Print the figures, and write the scores of template pairs to the file `scores`."""
    for result in results:
        print(result.summary())
    if scores is not None:
        assert isinstance(tasks[0], TemplatePairs) and tasks[0].scores is not None
        values = tasks[0].scores.numpy()
        with replacing(Path(scores)) as file:
            if scores.endswith(".npy"):
                write_array(file, values)
            else:
                np.savetxt(file, values, fmt="%.9g")
        print(f"scores of {len(values):,} pairs, in their order, are in {scores}")


# ------------------------------------------------------------------------------------------------ a file of embeddings


def _evaluate_embeddings_file(command: str, options: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    embeddings = run_on_all(lambda: read_embeddings(options.run), accelerator)
    tasks = run_on_all(lambda: open_command_tasks(command, options, ANY_SHAPE), accelerator)
    file = Path(options.run)
    out = RunFolder(options.output or file.with_name(f"{file.stem}-{_folder_name(command, tasks)}"))
    used = 0

    def embed(dataset: IdentityDataset, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        """Return the next embeddings of the file, and the positions of their images."""
        nonlocal used
        used += len(dataset)
        if used > len(embeddings):
            raise UserError(
                f"{options.run} has {len(embeddings)} rows, but the images up to {name} need {used}; "
                "give one row per image, in order"
            )
        return embeddings[used - len(dataset) : used], torch.arange(len(dataset))

    def measure() -> list[Result]:
        work = split_work(accelerator, options.tile)
        results = [task.measure(embed, **work, device=accelerator.device) for task in tasks]
        if used != len(embeddings):
            raise UserError(
                f"{options.run} has {len(embeddings)} rows, but there are {used} images; give one row per image, in "
                "order"
            )
        return results

    def write(results: list[Result]) -> None:
        _print_results(results, tasks, getattr(options, "scores", None))
        title = f"{file.name} on {', '.join(task.name for task in tasks)}"
        figures = {"run": options.run}
        report = write_results(out, title, [], figures, None, describe_environment(accelerator), [], results)
        print(f"\nResults are in {out.path}; look at {report}")

    with output_folder(out, accelerator):
        results = measure()
        run_on_main(lambda: write(results), accelerator)
    accelerator.end_training()


def read_embeddings(path: str | Path) -> Tensor:
    """Return the embeddings, float32 `[n, D]`, in a .npy file, or in a .safetensors file with a single tensor.

    Raises UserError for anything else.
    """
    try:
        if Path(path).suffix == ".npy":
            array: Any = np.load(path, allow_pickle=False)
            if array.dtype.kind != "f":
                raise UserError(f"{path} holds {array.dtype}; give floating-point numbers")
            embeddings = torch.from_numpy(array.astype(np.float32))
        else:
            from safetensors.torch import load_file

            found = list(load_file(path).values())
            if len(found) != 1:
                raise UserError(f"{path} holds {len(found)} tensors; give a single one, with one row per image")
            embeddings = found[0].float()
    except ModuleNotFoundError as error:
        raise UserError(
            "reading a .safetensors file needs the package safetensors: pip install 'partial_fc[export]'"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the readers raise almost anything
        raise UserError(f"the embeddings {path} cannot be read: {' '.join(str(error).split())}") from error
    if embeddings.ndim != 2:
        raise UserError(f"{path} holds a tensor of shape {list(embeddings.shape)}; give [n, D], with one row per image")
    return embeddings
