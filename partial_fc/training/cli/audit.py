"""The command `partial-fc audit RUN`: what a trained head shows about its data set.

It runs in one process, or on several ranks started by a launcher.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from partial_fc import load_checkpoint
from partial_fc.training.all_ranks import run_on_all, run_on_main
from partial_fc.training.audit import Thresholds, audit_head
from partial_fc.training.audit_page import DRIFT, DUPLICATES, NEVER_UPDATED, write_audit
from partial_fc.training.cli.parser import CommandParser, add_on_error, add_traceback, add_workers, check_at_least
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.data import IdentityDataset, open_data
from partial_fc.training.errors import UserError
from partial_fc.training.ranks import check_devices
from partial_fc.training.results import describe_environment, load_backbone, output_folder
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.run_data import check_classes, data_of_run
from partial_fc.training.settings_parser import SettingsParser


def audit_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "audit",
        "What a trained head shows about its data set: identities stored twice, classes that were never updated, "
        "classes far from their own images.",
    )
    parser.add_argument("run", help="folder of a run; its newest checkpoint is used")
    parser.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="the training data set, if it has moved (default: the run's folder)",
    )
    for name, what in (("--threshold", "class rows"), ("--mean_threshold", "mean embeddings")):
        parser.add_argument(
            name,
            type=float,
            default=None,
            metavar="COSINE",
            help=f"report pairs of classes whose {what} have at least this cosine (default: outliers among the cosines "
            "of all classes to their nearest class)",
        )
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder for the results, which must not exist (default RUN/audit)"
    )
    add_workers(parser)
    add_on_error(parser)
    add_traceback(parser)
    return parser


def audit_command(arguments: list[str], train_parser: SettingsParser) -> None:
    """`partial-fc audit`: write an audit folder. Raises UserError, the same on every rank, if that is not possible."""
    options = audit_parser().parse_args(arguments)
    for name in ("threshold", "mean_threshold"):
        value = getattr(options, name)
        if value is not None and not -1 <= value <= 1:
            raise UserError(f"--{name} is {value}; it is a cosine, from -1 to 1")
    check_at_least(options, "workers", 0)
    run = RunFolder(options.run)
    run.check_run()
    config = to_config(train_parser, ["--config", str(run.path / CONFIG)])
    config.data.workers = options.workers
    config.data.on_error = options.on_error
    if options.data is not None:
        config.data.folder = options.data
    check_devices(config.train.cpu)
    accelerator = Accelerator(
        cpu=config.train.cpu or not torch.cuda.is_available(), mixed_precision=config.train.mixed_precision
    )
    out = RunFolder(options.output or run.path / "audit")
    with output_folder(out, accelerator):
        thresholds = Thresholds(options.threshold, options.mean_threshold)
        _audit(run, out, config, thresholds, accelerator, given=options.data is not None)
    accelerator.end_training()


def _audit(
    run: RunFolder,
    out: RunFolder,
    config: RunConfig,
    thresholds: Thresholds,
    accelerator: Accelerator,
    *,
    given: bool,
) -> None:
    """Write the audit. given: the data set was named by the user, and may have other images than that of the run."""

    def opened() -> IdentityDataset:
        splits = open_data(config.data, config.seed) if given else data_of_run(run, config, training=True)
        return splits.train

    dataset = run_on_all(opened, accelerator)
    backbone = load_backbone(run, config, dataset.image_shape).to(accelerator.device)
    counts = torch.bincount(dataset.labels, minlength=dataset.num_identities)
    head = config.head.build(config.backbone.embedding_size, counts, config.seed, accelerator.device)
    newest = run.newest_checkpoint()
    assert newest is not None, "load_backbone has read it"
    try:
        load_checkpoint(newest, head=head)
    except ValueError as error:
        raise UserError(
            f"the head of {run.path} does not fit the {dataset.num_identities:,} classes of the data set: {error}"
        ) from error
    run_on_all(lambda: check_classes(run.path, dataset.identity_names, str(config.data.folder)), accelerator)
    audit = audit_head(head, backbone, dataset, accelerator, config, thresholds)

    def write() -> None:
        print(audit.summary())
        title = f"Audit of {run.path.name}: {dataset.num_identities:,} classes"
        report = write_audit(out, audit, dataset, title, {**describe_environment(accelerator), "run": str(run.path)})
        print(f"\nResults are in {out.path} ({DUPLICATES}, {NEVER_UPDATED}, {DRIFT}); look at {report}")

    run_on_main(write, accelerator)
