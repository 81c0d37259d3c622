"""What a run is: its settings, read from the defaults, then from a YAML file, then from the command line.

Each part stands beside the code that it is for; RunConfig composes them. `--help` shows every setting with the text
under it. Unknown settings and values of the wrong type are refused by name. The resolved settings are saved as
`config.yaml` in the run folder.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from partial_fc.optim.row_state import SkippedRowsChoice
from partial_fc.training.backbones.settings import BackboneConfig
from partial_fc.training.data import DataConfig
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.errors import UserError, check_at_least
from partial_fc.training.evaluation import EvaluationConfig
from partial_fc.training.files import naming, on_disk, text_of
from partial_fc.training.heads import CenterConfig, HeadConfig, MarginSettings, StorageSettings
from partial_fc.training.optimizers import Optimizers, OptimizerSettings, default_optimizer
from partial_fc.training.run import OutputConfig
from partial_fc.training.schedules import HeadScheduleConfig, ScheduleConfig
from partial_fc.training.settings_file import check_file, use_safe_loader
from partial_fc.training.settings_parser import (
    SettingsParser,
    add_settings,
    as_on_command_line,
    check_tables,
    class_options,
    plain_settings,
    settings_from,
)
from partial_fc.training.train_config import TrainConfig

__all__ = [
    "CLASS_OPTIONS",
    "AugmentConfig",
    "BackboneConfig",
    "CenterConfig",
    "DataConfig",
    "EvaluationConfig",
    "HeadConfig",
    "HeadScheduleConfig",
    "MarginSettings",
    "OptimizerSettings",
    "OutputConfig",
    "RunConfig",
    "ScheduleConfig",
    "StorageSettings",
    "TrainConfig",
    "add_config",
    "check_resumes",
    "flat",
    "keep_still_rows",
    "parse",
    "save_config",
    "to_config",
]

# what may differ in a resumed run: nothing that changes its numbers
FREE_ON_RESUME = (
    "output.",
    "backbone.gradient_checkpointing",
    "head.storage",
    "head.kernels",  # as another card does: the same numbers to rounding
    "data.folder",  # it may have moved; its content is compared (RunFolder.check_data)
    "data.workers",
    "data.prefetch",
    "train.checkpoint_every",
    "train.checkpoint_steps",
    "train.keep_last",
    "train.asynchronous_checkpoints",
    "train.timeout",
    "train.on_nonfinite",
    "train.max_skips",
    "train.watch_every",
    "train.deepspeed",
    "evaluation.batch_size",
    "evaluation.tile",
    "evaluation.verification",
    "evaluation.templates",
    "evaluation.identification",
    "evaluation.retrieval",
    "evaluation.align",
    "evaluation.label_pattern",
    "evaluation.camera_pattern",
    "evaluation.every",
    "evaluation.every_steps",
)


@dataclass
class RunConfig:
    """A training run."""

    seed: int = 0
    """Seed of initial weights, draws, order and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    center: CenterConfig = field(default_factory=CenterConfig)
    optimizer: OptimizerSettings = field(default_factory=default_optimizer)
    """The backbone's optimizer, with its arguments after it: --optimizer AdamW --optimizer.lr 0.001. docs/optimizers.md
    says what each is for, --optimizer.help AdamW what it takes. The default's arguments hold only while the class is
    the default's."""
    head_optimizer: OptimizerSettings | None = None
    """The head's optimizer, one that treats rows apart, with arguments of its own; null for the backbone's with its
    learning rate times head_lr_factor, or for what that is without norms of whole parameters and without Lookahead."""
    head_lr_factor: float = 1.0
    """The head's learning rate over the backbone's, while head_optimizer is null."""
    head_skipped_rows: SkippedRowsChoice | None = None
    """What the head's optimizer does to the rows that a sampled step did not select: dense for what it would do at a
    gradient of zero (momentum, decay), done when the row is selected next; still for nothing; null for its choice."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    head_schedule: HeadScheduleConfig = field(default_factory=HeadScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def micro_batch(self) -> int:
        """Images of a global micro-batch."""
        return self.train.batch_size // self.train.accumulation

    @property
    def optimizers(self) -> Optimizers:
        """The optimizers of backbone and head."""
        return Optimizers(self.optimizer, self.head_optimizer, self.head_lr_factor, self.head_skipped_rows)

    def check(self) -> None:
        """UserError for values that no run can have, alone or together."""
        check_at_least("seed", self.seed, 0)
        if self.seed >= 2**62:
            raise UserError(f"--seed is {self.seed}; give a number below 2**62")
        self.train.check()
        self.output.check()
        self.backbone.check()
        self.head.check()
        self.head.margin_schedule.check_epochs(self.train.epochs)
        self.center.check()
        self.evaluation.check()
        self.optimizers.check()
        self.schedule.check(self.train.epochs)
        self.head_schedule.over(self.schedule).check(self.train.epochs, "head_schedule")
        if self.head.replicas > 1 and self.center.weight:
            raise UserError(
                f"--head.replicas is {self.head.replicas}, but center loss is split over all ranks; "
                "give --center.weight 0 or --head.replicas 1"
            )
        if self.data.mix and (self.center.weight or self.head.replicas > 1 or self.train.deepspeed):
            raise UserError(
                "--data.mix cannot be joined with center loss, --head.replicas or DeepSpeed; leave one of them out"
            )


CLASS_OPTIONS = class_options(RunConfig)
"""Name of a setting that is a class -> of which kind."""


def add_config(parser: SettingsParser) -> None:
    """Add `--config` and every setting of RunConfig."""
    parser.add_argument("--config", action="config", help="YAML file of settings; the command line overrides it")
    add_settings(parser, RunConfig)
    use_safe_loader(parser, RunConfig, CLASS_OPTIONS)


def to_config(parser: SettingsParser, arguments: list[str]) -> RunConfig:
    """Return the settings that `arguments` name, checked."""
    given = parse(parser, arguments, defaults=False)
    try:
        check_tables(RunConfig, given)
        config = settings_from(RunConfig, given)
    except UserError as error:
        raise _naming_the_file(error, parser, arguments) from error
    config.check()
    return config


def parse(parser: SettingsParser, arguments: list[str], *, defaults: bool = True) -> jsonargparse.Namespace:
    """Return what `arguments` say. UserError, or jsonargparse's ArgumentError, for a mistake in them; one in a settings
    file names it."""
    file = _file_of(arguments)
    try:
        if Path(file).is_file():
            check_file(Path(file), RunConfig, CLASS_OPTIONS)
        with naming(Path(file)) if file else nullcontext():
            return parser.parse_args(arguments, defaults=defaults)
    except (jsonargparse.ArgumentError, UserError) as error:
        raise _naming_the_file(error, parser, arguments) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is no file of settings: {error}") from error


def _file_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--config") + 1] if "--config" in arguments[:-1] else ""


def _naming_the_file(error: Exception, parser: SettingsParser, arguments: list[str]) -> Exception:
    """Return the error, with the name of the settings file if that is refused without all else on the command line."""
    file = _file_of(arguments)
    if not file or file in str(error):
        return error
    try:
        settings_from(RunConfig, parser.parse_args(["--config", file], defaults=False))
    except (jsonargparse.ArgumentError, UserError):
        return UserError(f"{file}: {error}")
    return error


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    with on_disk(path) as file:
        file.write(yaml.safe_dump(plain_settings(config), sort_keys=False).encode())


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the settings by their names on the command line; those of a class are its name, then its arguments."""
    return as_on_command_line(plain_settings(config))


def keep_still_rows(saved: Path, *resumed: RunConfig) -> None:
    """Let a run go on as it began if its settings were saved before head_skipped_rows: skipped rows stood still."""
    if "head_skipped_rows" not in yaml.safe_load(text_of(saved)):
        for config in resumed:
            if config.head.sample_rate < 1 and config.head_skipped_rows is None:
                config.head_skipped_rows = "still"


def check_resumes(now: RunConfig, before: RunConfig, folder: str) -> None:
    """UserError if `now` differs from the settings of the run that it would resume."""
    mine, theirs = flat(now), flat(before)
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name) and not name.startswith(FREE_ON_RESUME):
            raise UserError(
                f"{folder} was run with {name} = {theirs.get(name)!r}, and this asks for {mine.get(name)!r}; "
                "leave that out to resume, or start a new run with another --output.folder"
            )
