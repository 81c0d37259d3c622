"""The command `partial-fc`: its table of commands, and the commands train and evaluate.

A user's mistake is reported in one line on the standard error of one rank, and every rank exits with code 2.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_fc.training.evaluation import Evaluation
    from partial_fc.training.protocols.result import Result
    from partial_fc.training.trainer import Trainer

MISSING = "partial-fc needs the application's packages ({name} is missing): pip install 'partial_fc[train]'"

try:
    import jsonargparse
    import torch

    from partial_fc import DivergenceError, NonFiniteError, PreemptionGuard
    from partial_fc.loop.preemption import SIGNALS
    from partial_fc.training.cli.audit import audit_command
    from partial_fc.training.cli.backbone_source import BackboneFile, BackboneOfRun, add_backbone_file, backbone_file
    from partial_fc.training.cli.backbones import backbones_command
    from partial_fc.training.cli.comms import comms_command
    from partial_fc.training.cli.data import add_source_options, data_command, open_from_options
    from partial_fc.training.cli.doctor import doctor_command
    from partial_fc.training.cli.embed import embed_command
    from partial_fc.training.cli.export import export_command
    from partial_fc.training.cli.gallery import gallery_command
    from partial_fc.training.cli.parser import (
        CommandParser,
        add_checkpoint,
        add_on_error,
        add_traceback,
        add_workers,
        check_at_least,
        config_first,
    )
    from partial_fc.training.cli.plan import plan_command
    from partial_fc.training.cli.protocols import protocol_command
    from partial_fc.training.cli.report import report_command
    from partial_fc.training.cli.serve import serve_command
    from partial_fc.training.cli.weights import export_weights_command, import_weights_command
    from partial_fc.training.config import RunConfig, add_config, check_resumes, keep_still_rows, parse, to_config
    from partial_fc.training.data import DataSplits, IdentityDataset, open_data
    from partial_fc.training.data.formats.packed import is_packed, packed_splits
    from partial_fc.training.effects import check_effects
    from partial_fc.training.errors import Preempted, UserError
    from partial_fc.training.interval import check_best, check_metric
    from partial_fc.training.mixing import mixed
    from partial_fc.training.protocols.task_files import open_tasks
    from partial_fc.training.ranks import check_devices, device_line, find_ranks, shows_errors
    from partial_fc.training.run import CONFIG, RunFolder
    from partial_fc.training.run_data import data_of_run, held_out_of_weights
    from partial_fc.training.settings_parser import SettingsParser
except ModuleNotFoundError as error:
    sys.exit(MISSING.format(name=error.name))

UNREAD = 128 + signal.SIGPIPE
"""The exit code of a command whose output nobody reads any more, as of any other program in a shell."""
STOPPING = "partial-fc: stop requested; finishing the step and saving"
LESS_MEMORY = (
    "set --backbone.gradient_checkpointing true, then --train.accumulation 2, 4, ... (the same batch in parts), then a "
    "smaller --data.image_size; docs/gpu.md has what each costs"
)

USAGE = """usage: partial-fc COMMAND ...

commands:
  train [CONFIG.yaml] [--head.sample_rate 0.2 ...]   train and evaluate; write a run folder
  train --resume [RUN]                               resume a run from its newest checkpoint
  evaluate RUN [--data FOLDER]                       verification and identification with a trained backbone
  verify RUN PAIRS.bin ...                           ten-fold accuracy and TAR at FAR on image pairs: LFW, CFP-FP, AgeDB
  templates RUN --images D --templates F --pairs F   TAR at FAR on templates of images and video frames: IJB-B, IJB-C
  identify RUN --gallery D --probes D                1:N identification with distractors: rank-k, DIR at FPIR
  retrieve RUN --query D [--gallery D]               CMC, mAP, Recall@k: products, persons across cameras
  embed RUN --data D --output DIR                    embeddings of a data set, as Parquet or npz files
  gallery build|add|remove|search|... GALLERY        enrol identities, and search for them
  serve RUN --gallery GALLERY                        a web page and HTTP interface: search by an image, compare two
  export-backbone RUN [--output DIR]                 write the trained backbone as safetensors and ONNX, with a card
  report RUN RUN ...                                 compare runs on one page: different settings, figures, curves
  audit RUN                                          find identities stored twice, classes never updated, and classes
                                                     far from their own images
  plan --num_classes C --batch_size N ...            will it fit? memory, operations and traffic of a head, computed
  export CHECKPOINT_OR_RUN FILE.safetensors          write class weights as one file
  import SOURCE ... --output CHECKPOINT              make a checkpoint of class weights in one file, or one per rank
  doctor [CONFIG.yaml] [--head.sample_rate 0.2 ...]  is the run set up correctly? runs two steps and restores
                                                     everything; exit code 1 if something is wrong
  data inspect|convert|glyphs ...                    inspect a data set, convert it, or draw a large one from fonts
  comms [CONFIG.yaml | --num_classes C ...]          measure the share of communication in a step, on the launched ranks
  backbones [--embedding_size 512]                   list the backbones with their parameters and operations

`partial-fc COMMAND --help` explains every setting. Start several ranks with a launcher:
  accelerate launch --config_file configs/accelerate/cpu2.yaml -m partial_fc train configs/quickstart.yaml
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    The code is 0, or 1 if doctor finds something wrong, 2 for a user's mistake, 75 if the run was asked to stop (as by
    SIGTERM), 130 if interrupted, 141 if nobody reads what it prints. docs/crashes.md says how each launcher reacts to
    it.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where it can be told that the reader has gone: `partial-fc plan ... | head`
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        return UNREAD


def _reader_has_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in output.poll(0))
    except (OSError, ValueError):  # no file at all
        return False


def _run(arguments: list[str] | None) -> int:
    """`main`, but for a standard output that nobody reads."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8; Python does the same for stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": train,
        "evaluate": evaluate,
        **{
            name: partial(protocol_command, name, train_parser)
            for name in ("verify", "templates", "identify", "retrieve")
        },
        "embed": embed_command,
        "gallery": gallery_command,
        "audit": audit,
        "export-backbone": export_command,
        "export": export_weights_command,
        "import": import_weights_command,
        "plan": plan_command,
        "data": data_command,
        "doctor": doctor_command,
        "comms": comms_command,
        "report": report_command,
        "serve": serve_command,
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
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        if "--traceback" in arguments:
            traceback.print_exc()
        elif shows_errors():
            print(f"partial-fc: error: {_one_line(error, arguments[0])}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:  # on the rank that has it; the others name it
        traceback.print_exc()
        smaller = LESS_MEMORY if arguments[0] in ("train", "doctor") else "set a smaller --batch_size, if it has one"
        print(f"partial-fc: error: {arguments[0]} ran out of GPU memory: {smaller}", file=sys.stderr)
        return 1
    except Preempted as stop:
        for each in SIGNALS:  # a launcher that sees that another rank has exited sends a signal to this one
            signal.signal(each, signal.SIG_IGN)
        if shows_errors():
            print(f"partial-fc: {stop}", file=sys.stderr)
        return PreemptionGuard.EXIT_CODE
    except KeyboardInterrupt:
        return 130


def _one_line(error: Exception, command: str) -> str:
    text = " ".join(str(error).split())
    if command not in ("train", "doctor", "comms"):  # other commands have these settings of a run as options
        for option in ("on_error", "workers"):
            text = text.replace(f"--data.{option}", f"--{option}")
    return f"training diverged, {text}; lower --optimizer.lr" if isinstance(error, NonFiniteError) else text


def train_parser() -> SettingsParser:
    parser = SettingsParser(
        prog="partial-fc train",
        description="Train a recogniser with a sharded head; configs/ has examples of CONFIG.yaml.",
        exit_on_error=False,
    )
    add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        metavar="RUN",
        help="resume the run in RUN, or in --output.folder",
    )
    parser.add_argument(
        "--start_or_resume",
        action="store_true",
        help="resume the run in --output.folder, or start it if there is none: for launchers that restart",
    )
    parser.add_argument("--check", action="store_true", help="check settings, data and folders, then stop")
    add_traceback(parser)
    return parser


def train(arguments: list[str]) -> None:
    """`partial-fc train`: train, then write the results."""
    arguments = config_first(arguments)
    parser = train_parser()
    config, resume, check = _resolve(parser, arguments)
    if check:
        config.output.check_trackers()
        folder = RunFolder(config.output.folder)
        if resume:
            folder.check_run()
        else:
            folder.check_free()
            config.backbone.check_weights()
        data = open_data(config.data, config.seed)
        train = mixed(config, data.train)
        if resume and folder.newest_checkpoint() is not None:
            folder.check_data(DataSplits(train, data.evaluation).fingerprint(), record=False)
        data.check_evaluation()
        tasks = open_tasks(config.evaluation, data.train.image_shape, config.data.on_error)
        check_metric(config.evaluation, list(data.evaluation), tasks)
        config.backbone.build(data.train.image_shape, None if resume else config.backbone.weights, print)
        from partial_fc.training.run_parts import check_sizes, checked_weights, head_without_memory

        device = torch.device("cpu" if config.train.cpu or not torch.cuda.is_available() else "cuda")
        check_sizes(config, data.train, train, int(os.environ.get("WORLD_SIZE", "1")), device)
        if not resume:
            check_best(config.evaluation, data.evaluation)
            checked_weights(config, head_without_memory(config, data.train), data.train.identity_names)
        identities = data.train.num_identities
        print(device_line(config.train.cpu))
        print(f"settings, data and folder are fine: {len(data.train):,} images of {identities:,} identities")
        print(f"augmentation: {config.augment}")
        for note in train.notes:
            print(f"note: {note}")
        warning = None if resume else held_out_of_weights(config, data)
        if warning is not None:
            print(warning)
        return
    check_devices(config.train.cpu)
    from partial_fc.training.trainer import Trainer

    with PreemptionGuard(notice=STOPPING if shows_errors() else None) as guard:
        trainer = Trainer(config, resume, guard)
        try:
            trainer.train()
            evaluations = trainer.evaluate()
        except Preempted:
            trainer.close(stopped=True)
            raise
        except BaseException:
            trainer.log.trackers.close("FAILED")
            raise
        _finish(trainer, evaluations)


def _finish(trainer: Trainer, evaluations: list[Evaluation]) -> None:
    report = trainer.write_results(evaluations)
    if report is not None:
        for text in [each.summary() for each in evaluations] + [each.summary() for each in trainer.results]:
            print(text)
        trainer.folder.print_unreadable()
        print(f"\nResults are in {trainer.folder.path}; look at {report}")
        print(
            f"Next: partial-fc evaluate {trainer.folder.path} --data FOLDER (identities in sub-folders, .rec, tar, "
            f"Parquet), or partial-fc export-backbone {trainer.folder.path}"
        )
    trainer.close()


def _resolve(parser: SettingsParser, arguments: list[str]) -> tuple[RunConfig, bool, bool]:
    """Return (settings, whether to resume, whether only to check); a resumed run has its settings in its folder."""
    asked = parse(parser, arguments)
    if asked.resume is None and asked.start_or_resume and (RunFolder(asked.output.folder).path / CONFIG).is_file():
        # every rank decides the same: none makes the folder before the trainer's first collective, which all must reach
        asked.resume = ""
    if asked.resume is None:
        config = to_config(parser, arguments)
        check_effects(config)
        return config, False, asked.check
    folder = RunFolder(asked.resume or asked.output.folder)
    folder.check_run()
    saved = ["--config", str(folder.path / CONFIG)]
    before = to_config(parser, saved)
    now = to_config(parser, arguments if asked.config else [*saved, *arguments])
    now.output.folder = str(folder.path)
    keep_still_rows(folder.path / CONFIG, now, before)
    check_resumes(now, before, str(folder.path))
    check_effects(now, before)
    return now, True, asked.check


def evaluate(arguments: list[str]) -> None:
    """`partial-fc evaluate RUN`: write figures, plots and a report of a trained backbone."""
    parser = CommandParser("evaluate", "Verification and identification with the backbone of a run.")
    parser.add_argument("run", help="folder of a run; or, with --backbone.name, a file of weights")
    parser.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="a data set in any format; of a packed one the held-out splits, or --split (default: the run's held-out "
        "sets)",
    )
    add_source_options(parser)
    add_checkpoint(parser)
    add_backbone_file(parser)
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="folder for the results, which must not exist (default RUN/evaluation-NAME)",
    )
    add_workers(parser)
    add_on_error(parser)
    add_traceback(parser)
    asked = parser.parse_args(arguments)
    check_at_least(asked, "workers", 0)
    given = backbone_file(asked, asked.run)
    if given is not None and asked.data is None:
        raise UserError("a file of weights has no data set of its own; give one with --data")
    source = BackboneOfRun(asked.run, train_parser(), asked.checkpoint) if given is None else given
    config = source.config
    config.data.workers, config.data.on_error = asked.workers, asked.on_error
    sets = _sets(config, asked, source)
    check_devices(config.train.cpu)
    from accelerate import Accelerator

    from partial_fc.training.all_ranks import run_on_all, run_on_main
    from partial_fc.training.results import (
        describe_environment,
        evaluate_sets,
        output_folder,
        run_tasks,
        write_results,
    )

    accelerator = Accelerator(cpu=config.train.cpu or not torch.cuda.is_available())
    tasks = []
    if asked.data is None:
        tasks = run_on_all(lambda: open_tasks(config.evaluation, source.shape, asked.on_error), accelerator)
    backbone = source.load(accelerator).to(accelerator.device)
    name = Path(asked.data).name if asked.data else "heldout"
    out = RunFolder(asked.output or source.output(f"evaluation-{name}"))

    def write(evaluations: list[Evaluation], results: list[Result]) -> None:
        for text in [each.summary() for each in evaluations] + [each.summary() for each in results]:
            print(text)
        figures = {"unreadable_images": len(out.unreadable()), **source.figures()}
        title = f"{config.backbone.name} of {source.path.name} on {', '.join((*sets, *(task.name for task in tasks)))}"
        environment = describe_environment(accelerator)
        report = write_results(out, title, evaluations, figures, source.settings, environment, [], results)
        out.print_unreadable()
        print(f"\nResults are in {out.path}; look at {report}")

    with output_folder(out, accelerator):
        left_out = [name for each in sets.values() for name in each.skipped]
        run_on_main(lambda: out.record_unreadable(left_out), accelerator)
        evaluations = evaluate_sets(backbone, sets, accelerator, config, out)
        results = run_tasks(backbone, tasks, accelerator, config, out)
        run_on_main(lambda: write(evaluations, results), accelerator)
    accelerator.end_training()


def audit(arguments: list[str]) -> None:
    """`partial-fc audit RUN`: what a trained head shows about its data set."""
    audit_command(arguments, train_parser())


def _sets(
    config: RunConfig, asked: argparse.Namespace, source: BackboneOfRun | BackboneFile
) -> dict[str, IdentityDataset]:
    """Return the data sets to evaluate on, by name."""
    if asked.data is not None or isinstance(source, BackboneFile):
        return _named_sets(asked, source.shape)
    for name, default in (("source_format", "auto"), ("image_column", None), ("label_column", None), ("split", None)):
        if getattr(asked, name) != default:
            raise UserError(f"--{name} applies to the data set of --data; give --data, or leave --{name} out")
    sets = data_of_run(source.run, config, training=False).evaluation
    settings = config.evaluation
    if not (sets or settings.verification or settings.templates or settings.identification or settings.retrieval):
        raise UserError("this run has no held-out identities; give a data set with --data")
    return sets


def _named_sets(asked: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, IdentityDataset]:
    """Return the data set of --data: of a packed one its held-out splits, or all of it if it has none."""
    if not is_packed(asked.data):
        return {Path(asked.data).name: open_from_options(asked.data, asked, shape[1], shape[0])}
    sets = packed_splits(asked.data, asked.split)
    if len(sets) > 1:
        del sets["train"]
    for each in sets.values():
        if each.image_shape != shape:
            raise UserError(
                f"the images of {asked.data} have the shape {each.image_shape}, but the backbone takes {shape} "
                "(channels, height, width); give a data set with images of that shape"
            )
    return {**sets}


if __name__ == "__main__":
    sys.exit(main())
