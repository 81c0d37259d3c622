"""The command `partial-fc`: train, evaluate, audit, exports of what was trained, plan, doctor, comms, data.

A user's mistake is one line on one rank's standard error, and exit code 2 on all.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_fc.training.evaluation import Evaluation
    from partial_fc.training.trainer import Trainer

MISSING = "partial-fc needs the application's packages ({name} is missing): pip install 'partial_fc[train]'"

try:
    import jsonargparse

    from partial_fc import DivergenceError, NonFiniteError, PreemptionGuard
    from partial_fc.loop.preemption import SIGNALS
    from partial_fc.training.cli.audit import audit_command
    from partial_fc.training.cli.backbones import backbones_command
    from partial_fc.training.cli.comms import comms_command
    from partial_fc.training.cli.data import add_source_options, data_command, open_asked
    from partial_fc.training.cli.doctor import doctor_command
    from partial_fc.training.cli.export import export_command
    from partial_fc.training.cli.plan import plan_command
    from partial_fc.training.cli.protocols import protocol_command
    from partial_fc.training.cli.weights import export_weights_command, import_weights_command
    from partial_fc.training.config import RunConfig, add_config, check_resumes, to_config
    from partial_fc.training.data import IdentityDataset, open_data
    from partial_fc.training.data.packed import is_packed, packed_splits
    from partial_fc.training.errors import Preempted, UserError
    from partial_fc.training.interval import check_metric, direction
    from partial_fc.training.mixing import mixed, sampler_of
    from partial_fc.training.protocols.tasks import image_shape, open_tasks
    from partial_fc.training.ranks import check_devices, find_ranks, speaks
    from partial_fc.training.report.compare import report_command
    from partial_fc.training.run import CONFIG, RunFolder, describe_checkpoint
    from partial_fc.training.settings_parser import SettingsParser
except ModuleNotFoundError as error:
    sys.exit(MISSING.format(name=error.name))

USAGE = """usage: partial-fc COMMAND ...

commands:
  train [CONFIG.yaml] [--head.sample_rate 0.2 ...]   train, evaluate, leave a run folder
  train --resume [RUN]                               go on with a run from its newest checkpoint
  evaluate RUN [--data FOLDER]                       verification and identification with a trained backbone
  verify RUN PAIRS.bin ...                           ten-fold accuracy and TAR at FAR on pairs of images: LFW, CFP-FP, AgeDB
  templates RUN --images D --templates F --pairs F   TAR at FAR on templates of images and video frames: IJB-B, IJB-C
  identify RUN --gallery D --probes D                1:N with distractors: rank-k, DIR at FPIR
  retrieve RUN --query D [--gallery D]               CMC, mAP, Recall@k: products, persons across cameras
  export-backbone RUN [--output DIR]                 the trained backbone as safetensors and ONNX, for use elsewhere
  report RUN RUN ...                                 runs side by side on one page: what differs, figures, curves
  audit RUN                                          identities stored twice, classes never updated, classes far from their images
  plan --num_classes C --batch_size N ...            will it fit? memory, work and traffic of a head, before it is built
  export CHECKPOINT_OR_RUN FILE.safetensors          class weights as one file
  import SOURCE ... --output CHECKPOINT              class weights of one file, or of files of each rank, as a checkpoint
  doctor [CONFIG.yaml] [--head.sample_rate 0.2 ...]  is the run wired right? two steps that leave nothing behind; exit code 1 if not
  data inspect|convert|glyphs ...                    what is in a data set; one format into another; a large set of characters, made
  comms [CONFIG.yaml | --num_classes C ...]          what share of a step is communication, measured on the launched ranks
  backbones [--embedding_size 512]                   the backbones by name, with their parameters and operations

`partial-fc COMMAND --help` explains every setting. Start several ranks with a launcher:
  accelerate launch --config_file configs/accelerate/cpu2.yaml -m partial_fc train configs/quickstart.yaml
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code: 0; 1 if doctor finds something wrong, 2 for a user's mistake, 75 if asked to stop,
    130 if interrupted.

    docs/crashes.md says what each launcher makes of it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": train,
        "evaluate": evaluate,
        **{
            name: partial(protocol_command, name, train_parser)
            for name in ("verify", "templates", "identify", "retrieve")
        },
        "audit": audit,
        "export-backbone": export_command,
        "export": export_weights_command,
        "import": import_weights_command,
        "plan": plan_command,
        "data": data_command,
        "doctor": doctor_command,
        "comms": comms_command,
        "report": report_command,
        "backbones": backbones_command,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise UserError(f"unknown command {arguments[0]!r}; choose one of: {', '.join(commands)}")
        if arguments[0] not in ("plan", "backbones", "data"):
            find_ranks()
        return commands[arguments[0]](arguments[1:]) or 0
    except (
        UserError,
        NonFiniteError,
        DivergenceError,
        UnicodeDecodeError,
        jsonargparse.ArgumentError,
        OSError,
    ) as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        elif speaks():
            print(f"partial-fc: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Preempted as stop:
        for each in SIGNALS:  # on the way out: a launcher that sees another rank gone signals this one
            signal.signal(each, signal.SIG_IGN)
        if speaks():
            print(f"partial-fc: {stop}", file=sys.stderr)
        return PreemptionGuard.EXIT_CODE
    except KeyboardInterrupt:
        return 130


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"training diverged, {text}; lower --optimizer.lr" if isinstance(error, NonFiniteError) else text


def train_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc train",
        description="Train a recogniser with a sharded head; see configs/ for runs.",
        exit_on_error=False,
    )
    add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="go on with the run in RUN, or in --output.folder",
    )
    parser.add_argument(
        "--start_or_resume",
        action="store_true",
        help="start the run, or go on with it if --output.folder has it: for launchers that restart",
    )
    parser.add_argument(
        "--check", action="store_true", help="look for mistakes in settings, data and folders, then stop"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def train(arguments: list[str]) -> None:
    """`partial-fc train`: the run, then its results."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", arguments[0], *arguments[1:]]
    parser = train_parser()
    config, resume, check = _resolve(parser, arguments)
    if check:
        folder = RunFolder(config.output.folder)
        if resume:
            folder.check_run()
        else:
            folder.check_free()
            config.head.check_weights()
            config.backbone.check_weights()
        data = open_data(config.data, config.seed)
        data.check_evaluation()
        check_metric(config.evaluation, list(data.evaluation), open_tasks(config.evaluation, data.train.image_shape))
        config.backbone.build(data.train.image_shape, None if resume else config.backbone.weights)
        if sampler_of(config, mixed(config, data.train)).length < config.train.batch_size:
            raise UserError(
                f"{len(data.train)} training images make no batch of {config.train.batch_size}; lower --train.batch_size"
            )
        print(
            f"settings, data and folder are fine: {len(data.train):,} images of {data.train.num_identities:,} identities"
        )
        return
    check_devices(config.train.cpu)
    from partial_fc.training.trainer import Trainer

    with PreemptionGuard() as guard:
        trainer = Trainer(config, resume, guard)
        try:
            trainer.train()
            evaluations = trainer.evaluate()
        except Preempted:
            trainer.close()
            raise
        _finish(trainer, evaluations)


def _finish(trainer: Trainer, evaluations: list[Evaluation]) -> None:
    report = trainer.write_results(evaluations)
    if report is not None:
        for text in [each.summary() for each in evaluations] + [each.summary() for each in trainer.results]:
            print(text)
        trainer.folder.tell_unreadable()
        print(f"\nResults are in {trainer.folder.path}; look at {report}")
        print(
            f"Next: partial-fc evaluate {trainer.folder.path} --data FOLDER, with images of your own in any format of docs/data.md"
        )
    trainer.close()


def _resolve(parser: SettingsParser, arguments: list[str]) -> tuple[RunConfig, bool, bool]:
    """(settings, whether to resume, whether only to check); a resumed run takes its settings from its folder."""
    try:
        asked = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        if "parsing config" in str(error):  # a file that is no YAML; the message does not say which
            raise UserError(f"{arguments[1]}: {error}") from error
        raise
    if asked.resume is None and asked.start_or_resume and (RunFolder(asked.output.folder).path / CONFIG).is_file():
        asked.resume = ""  # the same on all ranks: none makes the folder before all have come as far as the first exchange of the trainer
    if asked.resume is None:
        return to_config(parser, arguments), False, asked.check
    folder = RunFolder(asked.resume or asked.output.folder)
    folder.check_run()
    saved = ["--config", str(folder.path / CONFIG)]
    before = to_config(parser, saved)
    now = to_config(parser, arguments if asked.config else [*saved, *arguments])
    now.output.folder = str(folder.path)
    check_resumes(now, before, str(folder.path))
    return now, True, asked.check


def evaluate(arguments: list[str]) -> None:
    """`partial-fc evaluate RUN`: figures, plots and a report of a trained backbone."""
    parser = jsonargparse.ArgumentParser(
        prog="partial-fc evaluate",
        description="Verification and identification with the backbone of a run.",
        exit_on_error=False,
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="a data set in any format, or a packed set: the splits it holds out, or --split; without it, the run's held-out sets",
    )
    add_source_options(parser)
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest (default), best (by the run's evaluation.best), or a step",
    )
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="where to write (RUN/evaluation-NAME if not given); must not exist",
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="processes that load images; chosen by the cores if not given"
    )
    parser.add_argument(
        "--on_error", choices=("skip", "raise"), default="skip", help="what to do about an image that cannot be read"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    asked = parser.parse_args(arguments)
    if asked.workers is not None and asked.workers < 0:
        raise UserError(f"--workers is {asked.workers}; give at least 0")
    run = RunFolder(asked.run)
    run.check_run()
    config = to_config(train_parser(), ["--config", str(run.path / CONFIG)])
    config.data.workers, config.data.on_error = asked.workers, asked.on_error
    sets = _sets(config, asked)
    check_devices(config.train.cpu)
    from accelerate import Accelerator

    from partial_fc.training.results import (
        claim_output,
        describe_environment,
        evaluate_sets,
        load_backbone,
        run_tasks,
        together,
        write_results,
    )

    accelerator = Accelerator(cpu=config.train.cpu)
    shape = image_shape(config)
    tasks = [] if asked.data is not None else together(lambda: open_tasks(config.evaluation, shape), accelerator)
    checkpoint = together(lambda: run.find_checkpoint(asked.checkpoint, direction(config.evaluation.best)), accelerator)
    backbone = load_backbone(run, config, shape, checkpoint).to(accelerator.device)
    out = RunFolder(asked.output or run.path / f"evaluation-{Path(asked.data).name if asked.data else 'heldout'}")
    claim_output(out, accelerator)
    if accelerator.is_main_process:
        out.note_unreadable([name for each in sets.values() for name in each.left_out])
    evaluations = evaluate_sets(backbone, sets, accelerator, config, out)
    results = run_tasks(backbone, tasks, accelerator, config, out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for text in [each.summary() for each in evaluations] + [each.summary() for each in results]:
            print(text)
        figures = {"unreadable_images": len(out.unreadable()), "run": str(run.path)}
        figures["checkpoint"] = describe_checkpoint(asked.checkpoint, checkpoint)
        title = f"{config.backbone.name} of {run.path.name} on {', '.join((*sets, *(task.name for task in tasks)))}"
        report = write_results(out, title, evaluations, figures, config, describe_environment(accelerator), [], results)
        out.tell_unreadable()
        print(f"\nResults are in {out.path}; look at {report}")
    accelerator.end_training()


def audit(arguments: list[str]) -> None:
    """`partial-fc audit RUN`: what a trained head says of its data."""
    audit_command(arguments, train_parser())


def _sets(config: RunConfig, asked: jsonargparse.Namespace) -> dict[str, IdentityDataset]:
    """What to evaluate on, by name."""
    if asked.data is not None:
        return _named_sets(config, asked)
    for name, default in (("source_format", "auto"), ("image_column", None), ("label_column", None), ("split", None)):
        if getattr(asked, name) != default:
            raise UserError(f"--{name} is about the data set of --data; the run's own is opened as it was trained on")
    sets = open_data(config.data, config.seed).evaluation
    settings = config.evaluation
    if not (sets or settings.verification or settings.templates or settings.identification or settings.retrieval):
        raise UserError("this run held no identities out; name a data set with --data")
    return sets


def _named_sets(config: RunConfig, asked: jsonargparse.Namespace) -> dict[str, IdentityDataset]:
    """The data set of --data; of a packed one the splits that it holds out, or all of it if it has none."""
    shape = image_shape(config)
    if not is_packed(asked.data):
        return {Path(asked.data).name: open_asked(asked.data, asked, shape[1], shape[0])}
    sets = packed_splits(asked.data, asked.split)
    if len(sets) > 1:
        del sets["train"]
    for each in sets.values():
        if each.image_shape != shape:
            raise UserError(
                f"the images of {asked.data} are {each.image_shape}, and those of the run {shape} (channels, height, width)"
            )
    return {**sets}


if __name__ == "__main__":
    sys.exit(main())
