"""The commands `partial-fc verify`, `templates`, `identify` and `retrieve`: protocols of the field with a trained backbone.

partial-fc verify    RUN lfw.bin cfp_fp.bin agedb_30.bin
partial-fc templates RUN --images loose_crop --templates ijbc_face_tid_mid.txt --pairs ijbc_template_pair_label.txt --scores ijbc.npy
partial-fc identify  RUN --gallery GALLERY --probes PROBES --distractors DISTRACTORS
partial-fc retrieve  RUN --query query --gallery bounding_box_test --label '^(-?\\d+)' --camera 'c(\\d+)'

In place of RUN, a file of embeddings: .npy or .safetensors, a row for each image, in the order in which the command reads them.
In one process, or started on several ranks by a launcher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from partial_fc.training.config import to_config
from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.interval import direction
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import (
    Shape,
    Task,
    TemplatePairs,
    first_twice,
    image_shape,
    open_identification,
    open_retrieval,
    open_templates,
    open_verification,
)
from partial_fc.training.ranks import check_devices
from partial_fc.training.results import (
    claim_output,
    describe_environment,
    load_backbone,
    run_tasks,
    sharing,
    together,
    write_results,
)
from partial_fc.training.run import CONFIG, RunFolder, describe_checkpoint
from partial_fc.training.settings_parser import SettingsParser

WORDS = {
    "verify": "Verification on files of image pairs (lfw.bin, cfp_fp.bin, agedb_30.bin): ten-fold accuracy, TAR at FAR.",
    "templates": "Template verification as of IJB-B and IJB-C: TAR at FAR from 1e-6, and a file of scores.",
    "identify": "Identification 1:N of probes in a gallery with distractors: rank-k, DIR at FPIR.",
    "retrieve": "Retrieval, as of products or persons: CMC, mAP, Recall@k.",
}
ANY_SHAPE = (3, 112, 112)  # of images that are not decoded


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` explains every setting")


def protocol_parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"partial-fc {command}", description=WORDS[command], allow_abbrev=False)
    parser.add_argument(
        "run", help="folder of a run; or a file of embeddings (.npy, .safetensors), a row for each image in order"
    )
    add = parser.add_argument
    if command == "verify":
        add("files", nargs="+", metavar="PAIRS.bin", help="pickled pairs; nothing in them is run")
    elif command == "templates":
        add("--images", required=True, metavar="DIR", help="folder of the images: aligned, unless --points is given")
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
            help="lines: image name ... score, which each image is weighed with",
        )
        add(
            "--points",
            default=None,
            metavar="FILE",
            help="lines: image name, x and y of five points, score: align the faces by them",
        )
        add(
            "--normalize_images", action="store_true", help="bring each image's embedding to unit length before pooling"
        )
        add("--scores", default=None, metavar="OUT", help="write the score of each pair, .npy or .txt; must not exist")
    elif command == "identify":
        add("--gallery", required=True, metavar="DIR", help="identity/image files of the enrolled")
        add(
            "--probes",
            required=True,
            metavar="DIR",
            help="identity/image files to search; identities are matched by folder name",
        )
        add(
            "--distractors",
            default=None,
            metavar="DIR",
            help="folder/image files enrolled too, each an identity of its own",
        )
    else:
        add("--query", required=True, metavar="DIR", help="identity/image files to search; or files, with --label")
        add("--gallery", default=None, metavar="DIR", help="what to search in (the other queries if not given)")
        add(
            "--label",
            default=None,
            metavar="REGEX",
            help="finds the identity in the names of files that lie in no sub-folders",
        )
        add(
            "--camera",
            default=None,
            metavar="REGEX",
            help="finds the camera; images of one's identity and camera are passed over",
        )
    if command != "verify":
        add(
            "--name",
            default=None,
            help="what to call the data set (the name of the file of pairs, or of the folder of probes or queries)",
        )
    if command in ("verify", "templates"):
        add("--no_flip", action="store_true", help="embed the image alone, not it and its mirror image")
    else:
        add("--flip", action="store_true", help="add the embedding of the mirror image")
    add(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest (default), best (by the run's evaluation.best), or a step",
    )
    add(
        "--output",
        default=None,
        metavar="DIR",
        help="new folder for metrics.json, report.html (RUN/COMMAND-NAME, or beside the file)",
    )
    add("--batch_size", type=int, default=512, help="images a forward over all ranks (default 512)")
    add("--tile", type=int, default=2048, help="images a side that are compared at a time (default 2048)")
    add("--workers", type=int, default=None, help="processes a rank starts to load images (default: by the cores)")
    add(
        "--on_error",
        choices=("skip", "raise"),
        default="skip",
        help="what to do about an image that cannot be read (default skip)",
    )
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def open_asked(command: str, asked: argparse.Namespace, shape: Shape) -> list[Task]:
    """The tasks of a command. UserError for files that cannot be had."""
    if command == "verify":
        twice = first_twice([Path(path).stem for path in asked.files])
        if twice is not None:
            raise UserError(
                f"two files of pairs are called {twice!r}, and figures go by that name; rename one, or give one at a time"
            )
        return [open_verification(path, shape, not asked.no_flip) for path in asked.files]
    if command == "templates":
        one = open_templates(
            asked.name or Path(asked.pairs).stem,
            shape,
            images=asked.images,
            listed=asked.templates,
            pairs=asked.pairs,
            detector_scores=asked.detector_scores,
            points=asked.points,
            normalize_images=asked.normalize_images,
            flip=not asked.no_flip,
        )
        return [one]
    if command == "identify":
        return [
            open_identification(
                asked.name or Path(asked.probes).name, shape, asked.gallery, asked.probes, asked.distractors, asked.flip
            )
        ]
    name = asked.name or Path(asked.query).name
    try:
        return [open_retrieval(name, shape, asked.query, asked.gallery, asked.label, asked.camera, asked.flip)]
    except UserError as error:
        if "has no sub-folders" not in str(error):
            raise
        raise UserError(f"{error}, or give --label REGEX, which finds the identity in the file name") from error


def protocol_command(command: str, parser: Callable[[], SettingsParser], arguments: list[str]) -> None:
    """One of the commands; parser: of a run's settings. UserError, the same on every rank, for what cannot be evaluated."""
    asked = protocol_parser(command).parse_args(arguments)
    for name, least in (("workers", 0), ("tile", 1), ("batch_size", 1)):
        if getattr(asked, name) is not None and getattr(asked, name) < least:
            raise UserError(f"--{name} is {getattr(asked, name)}; give at least {least}")
    scores = getattr(asked, "scores", None)
    if scores is not None and (Path(scores).suffix not in (".npy", ".txt") or Path(scores).exists()):
        raise UserError(f"--scores {scores}: give the name of a new file that ends with .npy or .txt")
    if Path(asked.run).suffix in (".npy", ".safetensors"):
        _from_file(command, asked)
        return
    run = RunFolder(asked.run)
    run.check_run()
    config = to_config(parser(), ["--config", str(run.path / CONFIG)])
    config.data.workers, config.data.on_error = asked.workers, asked.on_error
    config.evaluation.batch_size, config.evaluation.tile = asked.batch_size, asked.tile
    check_devices(config.train.cpu)
    accelerator = Accelerator(cpu=config.train.cpu or not torch.cuda.is_available())
    shape = image_shape(config)
    tasks = together(lambda: open_asked(command, asked, shape), accelerator)
    checkpoint = together(lambda: run.find_checkpoint(asked.checkpoint, direction(config.evaluation.best)), accelerator)
    backbone = together(lambda: load_backbone(run, config, shape, checkpoint), accelerator).to(accelerator.device)
    out = RunFolder(asked.output or run.path / _folder_name(command, tasks))
    results = _measured(out, lambda: run_tasks(backbone, tasks, accelerator, config, out), accelerator)
    if accelerator.is_main_process:
        _tell(results, tasks, scores)
        title = f"{config.backbone.name} of {run.path.name} on {', '.join(task.name for task in tasks)}"
        figures = {"unreadable_images": len(out.unreadable()), "run": str(run.path)}
        figures["checkpoint"] = describe_checkpoint(asked.checkpoint, checkpoint)
        report = write_results(out, title, [], figures, config, describe_environment(accelerator), [], results)
        print(f"\nResults are in {out.path}; look at {report}")
    accelerator.end_training()


def _folder_name(command: str, tasks: list[Task]) -> str:
    return f"{command}-{'-'.join(task.name for task in tasks)}"


def _measured(out: RunFolder, measure: Callable[[], list[Result]], accelerator: Accelerator) -> list[Result]:
    """What `measure` returns, `out` being made for it; a mistake leaves no folder behind."""
    claim_output(out, accelerator)
    try:
        results = measure()
    except BaseException:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not any(out.path.iterdir()):
            out.path.rmdir()
        raise
    accelerator.wait_for_everyone()
    return results


def _tell(results: list[Result], tasks: list[Task], scores: str | None) -> None:
    for result in results:
        print(result.summary())
    if scores is not None:
        assert isinstance(tasks[0], TemplatePairs) and tasks[0].scores is not None
        values = tasks[0].scores.numpy()
        if scores.endswith(".npy"):
            np.save(scores, values)
        else:
            np.savetxt(scores, values, fmt="%.9g")
        print(f"scores of {len(values):,} pairs, in their order, are in {scores}")


# ---------------------------------------------------------------------------------------------------- embeddings from elsewhere


def _from_file(command: str, asked: argparse.Namespace) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rows = together(lambda: read_embeddings(asked.run), accelerator)
    tasks = together(lambda: open_asked(command, asked, ANY_SHAPE), accelerator)
    file = Path(asked.run)
    out = RunFolder(asked.output or file.with_name(f"{file.stem}-{_folder_name(command, tasks)}"))
    used = 0

    def embed(dataset: IdentityDataset, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        nonlocal used
        used += len(dataset)
        if used > len(rows):
            raise UserError(
                f"{asked.run} has {len(rows)} rows, and {name} needs those up to {used}; give one for each image in order"
            )
        return rows[used - len(dataset) : used], torch.arange(len(dataset))

    def measure() -> list[Result]:
        results = [task.measure(embed, **sharing(accelerator, asked.tile), device=accelerator.device) for task in tasks]
        if used != len(rows):
            raise UserError(
                f"{asked.run} has {len(rows)} rows, and there are {used} images; give one for each image in order"
            )
        return results

    results = _measured(out, measure, accelerator)
    if accelerator.is_main_process:
        _tell(results, tasks, getattr(asked, "scores", None))
        title = f"{file.name} on {', '.join(task.name for task in tasks)}"
        report = write_results(out, title, [], {"run": asked.run}, None, describe_environment(accelerator), [], results)
        print(f"\nResults are in {out.path}; look at {report}")
    accelerator.end_training()


def read_embeddings(path: str | Path) -> Tensor:
    """float32 `[n, D]` of a .npy file, or of a .safetensors file that holds one tensor. UserError for anything else."""
    try:
        if Path(path).suffix == ".npy":
            array: Any = np.load(path, allow_pickle=False)
            if array.dtype.kind != "f":
                raise UserError(f"{path} holds {array.dtype}, not floating-point numbers")
            rows = torch.from_numpy(array.astype(np.float32))
        else:
            from safetensors.torch import load_file

            found = list(load_file(path).values())
            if len(found) != 1:
                raise UserError(f"{path} holds {len(found)} tensors; give one, a row for each image")
            rows = found[0].float()
    except ModuleNotFoundError as error:
        raise UserError(
            "reading a .safetensors file needs the package safetensors: pip install 'partial_fc[export]'"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file makes readers raise almost anything
        raise UserError(f"the embeddings {path} cannot be read: {' '.join(str(error).split())}") from error
    if rows.ndim != 2:
        raise UserError(f"{path} holds {list(rows.shape)}; give [n, D], a row for each image")
    return rows
