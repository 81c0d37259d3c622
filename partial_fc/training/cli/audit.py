"""The command `partial-fc audit RUN`: what a trained head says of its data. In one process, or started on several ranks by a launcher."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch
from accelerate import Accelerator

from partial_fc import load_checkpoint
from partial_fc.training.audit import DRIFT, DUPLICATES, UNMOVED, Thresholds, audit_head, write_audit
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.data import open_data
from partial_fc.training.errors import UserError
from partial_fc.training.results import claim_output, describe_environment, load_backbone, together
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.settings_parser import SettingsParser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `partial-fc audit --help` explains every setting")


def audit_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="partial-fc audit",
        description="Identities stored twice, classes that never moved, classes far from their own images: what a trained head says of "
        "its data.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a run; its newest checkpoint is taken")
    parser.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="the folder trained on, if it is elsewhere now (default: the run's)",
    )
    for name, what in (("--threshold", "rows of the head"), ("--mean_threshold", "means of their images' embeddings")):
        text = f"report pairs of classes of which the {what} have at least this cosine (default: outliers among all classes' nearest)"
        parser.add_argument(name, type=float, default=None, metavar="COSINE", help=text)
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="where to write (default RUN/audit); must not exist"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="processes a rank starts to load images (default: by the cores)"
    )
    parser.add_argument(
        "--on_error",
        choices=("skip", "raise"),
        default="skip",
        help="what to do about an image that cannot be read (default skip)",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def audit_command(arguments: list[str], train_parser: SettingsParser) -> None:
    """`partial-fc audit`: an audit folder. Raises UserError, the same on every rank, for what cannot be audited."""
    asked = audit_parser().parse_args(arguments)
    for name in ("threshold", "mean_threshold"):
        value = getattr(asked, name)
        if value is not None and not -1 <= value <= 1:
            raise UserError(f"--{name} is {value}; it is a cosine, from -1 to 1")
    if asked.workers is not None and asked.workers < 0:
        raise UserError(f"--workers is {asked.workers}; give at least 0")
    run = RunFolder(asked.run)
    run.check_run()
    config = to_config(train_parser, ["--config", str(run.path / CONFIG)])
    config.data.workers, config.data.on_error = asked.workers, asked.on_error
    if asked.data is not None:
        config.data.folder = asked.data
    accelerator = Accelerator(
        cpu=config.train.cpu or not torch.cuda.is_available(), mixed_precision=config.train.mixed_precision
    )
    out = RunFolder(asked.output or run.path / "audit")
    claim_output(out, accelerator)
    try:
        _audit(run, out, config, Thresholds(asked.threshold, asked.mean_threshold), accelerator)
    except BaseException:
        if accelerator.is_main_process and not any(out.path.iterdir()):
            out.path.rmdir()  # a mistake leaves no folder behind
        raise
    accelerator.end_training()


def _audit(run: RunFolder, out: RunFolder, config: RunConfig, thresholds: Thresholds, accelerator: Accelerator) -> None:
    dataset = together(lambda: open_data(config.data, config.seed).train, accelerator)
    backbone = load_backbone(run, config, dataset.image_shape).to(accelerator.device)
    counts = torch.bincount(dataset.labels, minlength=dataset.num_identities)
    head = config.head.build(config.backbone.embedding_size, counts, config.seed, accelerator.device)
    newest = run.newest_checkpoint()
    assert newest is not None, "the backbone came from it"
    try:
        load_checkpoint(newest, head=head)
    except ValueError as error:
        raise UserError(
            f"the head of {run.path} is not of the {dataset.num_identities:,} classes of the data: {error}"
        ) from error
    audit = audit_head(head, backbone, dataset, accelerator, config, thresholds)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(audit.summary())
        title = f"Audit of {run.path.name}: {dataset.num_identities:,} classes"
        report = write_audit(out, audit, dataset, title, {**describe_environment(accelerator), "run": str(run.path)})
        print(f"\nResults are in {out.path} ({DUPLICATES}, {UNMOVED}, {DRIFT}); look at {report}")
