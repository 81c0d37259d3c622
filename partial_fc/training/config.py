"""What a run is: typed settings with units, read from defaults, then a YAML file, then the command line.

Settings of data and augmentation live beside the code that they steer; the rest is here. `--help` shows every field with the text under
it. Unknown keys and wrong types are refused by name. The resolved settings are saved as `config.yaml` in the run folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from accelerate.utils import LoggerType

from partial_fc import ArcFace, CombinedMargin, CosFace, Margin, NormFace, PartialFC, Softmax
from partial_fc.training.augment import AugmentConfig
from partial_fc.training.data import DataConfig
from partial_fc.training.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# what a resumed run may have otherwise than the run that it goes on with: nothing that changes its numbers
FREE_ON_RESUME = ("output.", "data.workers", "train.checkpoint_every", "train.keep_last", "train.timeout", "evaluation.")


@dataclass
class OutputConfig:
    """Where results go."""

    folder: str = "runs/run"
    """Run folder to make; it must not be in use."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Experiment trackers of Accelerate to log to, by name."""
    log_every: int = 10
    """Optimizer steps between two logged points."""


@dataclass
class BackboneConfig:
    """The network that makes embeddings."""

    name: str = "small"
    """Its name among partial_fc/training/backbones."""
    embedding_size: int = 128
    """Width of the embeddings, in numbers."""


@dataclass
class HeadConfig:
    """The sharded classification head."""

    margin: Literal["arcface", "cosface", "combined", "normface", "softmax"] = "arcface"
    """Which margin: arcface adds it to the target angle, cosface takes it from the target cosine, combined does both, normface has none."""
    m: float | None = None
    """The margin of arcface (radians) or cosface (cosine); the paper's 0.5 or 0.35 if not given."""
    m1: float = 1.0
    """Factor of the target angle; combined only."""
    m2: float = 0.5
    """Added to the target angle, in radians; combined only."""
    m3: float = 0.0
    """Taken from the target cosine; combined only."""
    scale: float = 64.0
    """Factor s of the cosines; not used by softmax."""
    sample_rate: float = 1.0
    """Share of all classes drawn as negatives each step (0 to 1); 1 is the exact softmax."""
    init_std: float = 0.01
    """Standard deviation of the initial class weights."""
    label_smoothing: float = 0.0
    """Share of the target spread over all selected classes (0 to 1)."""
    logits_budget: int | None = None
    """Bytes of logits a rank may keep for backward; beyond, they are computed again. 1 GiB if not given."""

    def build_margin(self) -> Margin:
        """The margin that these settings name; ValueError for values out of range."""
        if self.margin == "arcface":
            return ArcFace(self.scale) if self.m is None else ArcFace(self.scale, self.m)
        if self.margin == "cosface":
            return CosFace(self.scale) if self.m is None else CosFace(self.scale, self.m)
        if self.margin == "combined":
            return CombinedMargin(self.scale, self.m1, self.m2, self.m3)
        return NormFace(self.scale) if self.margin == "normface" else Softmax()

    def build(self, embedding_size: int, num_classes: int, seed: int, device: torch.device) -> PartialFC:
        """The head; ValueError for values out of range."""
        return PartialFC(
            embedding_size,
            num_classes,
            self.build_margin(),
            self.sample_rate,
            seed=seed,
            init_std=self.init_std,
            label_smoothing=self.label_smoothing,
            logits_budget=self.logits_budget,
            device=device,
        )


@dataclass
class OptimizerConfig:
    """How backbone and head are updated; the head only in the rows of a step."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which optimizer, for backbone and head alike."""
    lr: float = 0.1
    """Largest learning rate of the schedule, for a whole batch."""
    head_lr_factor: float = 1.0
    """The head's learning rate over the backbone's."""
    momentum: float = 0.9
    """Momentum of sgd (0 to 1)."""
    weight_decay: float = 5e-4
    """Weight decay a step, for all parameters."""

    def build(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """(the class, its options for the backbone)."""
        if self.name == "adamw":
            return torch.optim.AdamW, {"lr": self.lr, "weight_decay": self.weight_decay}
        return torch.optim.SGD, {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


@dataclass
class ScheduleConfig:
    """The learning rate over a run, step by step."""

    shape: Literal["cosine", "polynomial", "constant"] = "cosine"
    """How it falls to zero after warm-up, or constant."""
    power: float = 2.0
    """Exponent of polynomial."""
    warmup_epochs: float = 1.0
    """Epochs over which it first rises linearly from zero; fractions count."""


@dataclass
class TrainConfig:
    """The run itself."""

    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 256
    """Images an optimizer step, over all ranks and micro-batches together."""
    accumulation: int = 1
    """Micro-batches that a step's batch is computed in, to save memory."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient of backbone and head together; null for no clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of matrix products; fp16 needs CUDA."""
    cpu: bool = False
    """Train on the CPU though there is another device."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; the last epoch always leaves one."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""


@dataclass
class EvaluationConfig:
    """Verification and identification after training."""

    batch_size: int = 512
    """Images a forward over all ranks."""
    tile: int = 2048
    """Side of the tiles in which pairs are compared, in images."""


@dataclass
class RunConfig:
    """A training run."""

    seed: int = 0
    """Of initial weights, draws, order and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """UserError for values that no run can have."""
        at_least = {
            "train.epochs": (self.train.epochs, 1),
            "train.batch_size": (self.train.batch_size, 1),
            "train.accumulation": (self.train.accumulation, 1),
            "train.checkpoint_every": (self.train.checkpoint_every, 1),
            "train.keep_last": (self.train.keep_last, 1),
            "evaluation.batch_size": (self.evaluation.batch_size, 1),
            "evaluation.tile": (self.evaluation.tile, 1),
            "output.log_every": (self.output.log_every, 1),
            "backbone.embedding_size": (self.backbone.embedding_size, 1),
            "optimizer.lr": (self.optimizer.lr, 0),
            "optimizer.weight_decay": (self.optimizer.weight_decay, 0),
            "schedule.warmup_epochs": (self.schedule.warmup_epochs, 0),
            "schedule.power": (self.schedule.power, 0),
            "optimizer.head_lr_factor": (self.optimizer.head_lr_factor, 0),
            "seed": (self.seed, 0),
        }
        for name, (value, least) in at_least.items():
            if not value >= least:
                raise UserError(f"--{name} is {value}; give at least {least}")
        if self.seed >= 2**62:
            raise UserError(f"--seed is {self.seed}; give a number below 2**62")
        if self.train.clip_norm is not None and not self.train.clip_norm > 0:
            raise UserError(f"--train.clip_norm is {self.train.clip_norm}; give a norm above 0, or null for no clipping")
        if self.train.batch_size % self.train.accumulation:
            raise UserError(
                f"--train.batch_size {self.train.batch_size} is no multiple of --train.accumulation {self.train.accumulation}; "
                "micro-batches must be of one size"
            )
        if self.train.mixed_precision == "fp16" and (self.train.cpu or not torch.cuda.is_available()):
            raise UserError("--train.mixed_precision fp16 needs CUDA; use bf16 on a CPU")
        try:  # what head, optimizer and trackers themselves refuse
            self.head.build(2, 2, self.seed, torch.device("meta"))
            optimizer_class, options = self.optimizer.build()
            optimizer_class([torch.zeros(1)], **options)
        except ValueError as error:
            raise UserError(f"--head or --optimizer: {error}") from error
        known = [str(each) for each in LoggerType]
        unknown = [name for name in self.output.trackers if name not in known]
        if unknown:
            raise UserError(f"--output.trackers names {', '.join(unknown)}; choose among {', '.join(known)}")


def add_config(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--config` and every field of RunConfig."""
    parser.add_argument("--config", action="config", help="YAML file of settings; the command line overrides it")
    parser.add_class_arguments(RunConfig)


def to_config(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> RunConfig:
    """The settings that `arguments` name, checked."""
    parsed = parser.instantiate_classes(parser.parse_args(arguments))
    config = RunConfig(**{name: getattr(parsed, name) for name in RunConfig.__dataclass_fields__})
    config.check()
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as YAML."""
    import yaml

    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def flat(config: RunConfig) -> dict[str, Any]:
    """The settings by their dotted names, as on the command line."""
    out: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        else:
            out[name] = value

    walk(asdict(config), "")
    return out


def check_resumes(now: RunConfig, before: RunConfig, folder: str) -> None:
    """UserError if `now` would go on with a run that was something else."""
    mine, theirs = flat(now), flat(before)
    for name in mine:
        if mine[name] != theirs[name] and not name.startswith(FREE_ON_RESUME):
            raise UserError(
                f"{folder} was run with {name} = {theirs[name]!r}, and this asks for {mine[name]!r}; "
                "leave that out to resume, or start a new run with another --output.folder"
            )
