"""What a run is: typed settings with units, read from defaults, then a YAML file, then the command line.

Settings of data and augmentation live beside the code that they steer; the rest is here. `--help` shows every field with the text under
it. Unknown keys and wrong types are refused by name. The resolved settings are saved as `config.yaml` in the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import torch.distributed as dist
from accelerate.utils import LoggerType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from partial_fc.centers import CenterLoss
from partial_fc.head import PartialFC
from partial_fc.margins.adaptive import AdaFace, AdaptiveMargin, CurricularFace, ElasticFace, MagFace, SphereFace2
from partial_fc.margins.base import Margin
from partial_fc.margins.fixed import ArcFace, CombinedMargin, CosFace, NormFace, SphereFace
from partial_fc.margins.variants import Softmax, SubCenterArcFace
from partial_fc.training.backbones import build_backbone
from partial_fc.training.backbones.weights import load_weights
from partial_fc.training.data import DataConfig
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.errors import UserError
from partial_fc.training.optimizers import OptimizerConfig
from partial_fc.training.schedules import HeadScheduleConfig, ScheduleConfig
from partial_fc.training.settings_file import use_safe_loader

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# what a resumed run may have otherwise than the run that it goes on with: nothing that changes its numbers
FREE_ON_RESUME = (
    "output.",
    "backbone.gradient_checkpointing",
    "data.folder",  # it may have moved; what lies there is compared (RunFolder.check_data)
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
    *(
        f"evaluation.{name}"
        for name in ("batch_size", "tile", "verification", "templates", "identification", "retrieval")
    ),
    *(f"evaluation.{name}" for name in ("align", "label_pattern", "camera_pattern", "every", "every_steps")),
)


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
    """Its name (`partial-fc backbones` lists them with their sizes), or timm:NAME, or hf:FOLDER of a transformers model."""
    embedding_size: int = 128
    """Width of the embeddings, in numbers."""
    weights: str | None = None
    """Weights to start from: a state dict by torch.save, such as the field's backbone.pth, safetensors, or a folder of transformers;
    drawn if not given."""
    dropout: float = 0.0
    """Probability (0 to 1) with which a number before the last layer is left out in training."""
    gradient_checkpointing: bool = False
    """Keep the inputs of blocks alone and compute the blocks again in the backward: less memory, a third more time, the same numbers."""
    channels_last: bool = False
    """Give convolutions their images as [n, H, W, C] in memory, which is faster on GPUs with half precision."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        if not 0 <= self.dropout < 1:
            raise UserError(f"--backbone.dropout is {self.dropout}; give a probability from 0, and below 1")

    def check_weights(self) -> None:
        """UserError if weights to start from are not there; a run that is resumed needs them no more."""
        if self.weights is not None and not Path(self.weights).exists():
            raise UserError(
                f"--backbone.weights: there is no file {self.weights}; give a state dict by torch.save, or safetensors"
            )

    def build(self, image_shape: tuple[int, int, int], weights: str | None = None) -> nn.Module:
        """The backbone for images of `image_shape` (C, H, W), as these settings say, with the weights of a file if one is given."""
        backbone = build_backbone(
            self.name,
            image_shape=image_shape,
            embedding_size=self.embedding_size,
            dropout=self.dropout,
            gradient_checkpointing=self.gradient_checkpointing,
            channels_last=self.channels_last,
        )
        if weights is not None:
            load_weights(backbone, weights)
        return backbone


# margin -> (what builds it, the settings of HeadConfig that it takes: name of its argument)
MARGINS: dict[str, tuple[Callable[..., Margin], dict[str, str]]] = {
    "softmax": (Softmax, {}),
    "normface": (NormFace, {"scale": "scale"}),
    "sphereface": (SphereFace, {"scale": "scale", "m": "margin"}),
    "cosface": (CosFace, {"scale": "scale", "m": "margin"}),
    "arcface": (ArcFace, {"scale": "scale", "m": "margin"}),
    "combined": (CombinedMargin, {"scale": "scale", "m1": "m1", "m2": "m2", "m3": "m3"}),
    "subcenter": (SubCenterArcFace, {"scale": "scale", "m": "margin", "centers": "centers"}),
    "curricular": (CurricularFace, {"scale": "scale", "m": "margin", "statistics_momentum": "momentum"}),
    "adaface": (AdaFace, {"scale": "scale", "m": "margin", "h": "h", "statistics_momentum": "momentum"}),
    "magface": (
        MagFace,
        {"scale": "scale", "l_a": "l_a", "u_a": "u_a", "l_m": "l_m", "u_m": "u_m", "lambda_g": "penalty_weight"},
    ),
    "elastic_arc": (
        partial(ElasticFace, kind="arc"),
        {"scale": "scale", "m": "margin", "sigma": "deviation", "plus": "plus"},
    ),
    "elastic_cos": (
        partial(ElasticFace, kind="cos"),
        {"scale": "scale", "m": "margin", "sigma": "deviation", "plus": "plus"},
    ),
    "adaptive": (AdaptiveMargin, {"scale": "scale", "l_m": "smallest", "u_m": "largest"}),
    "sphereface2": (SphereFace2, {"scale": "scale", "m": "margin", "t": "t", "balance": "balance"}),
}
MARGIN_SETTINGS = sorted({name for _, settings in MARGINS.values() for name in settings})


@dataclass
class HeadConfig:
    """The sharded classification head."""

    margin: Literal[
        "softmax",
        "normface",
        "sphereface",
        "cosface",
        "arcface",
        "combined",
        "subcenter",
        "curricular",
        "adaface",
        "magface",
        "elastic_arc",
        "elastic_cos",
        "adaptive",
        "sphereface2",
    ] = "arcface"
    """Which margin; docs/losses.md says what each is for. A setting that the chosen one does not take is refused."""
    m: float | None = None
    """The margin of those that have one: radians, a cosine (cosface, elastic_cos, sphereface2) or a factor (sphereface); the paper's if
    not given."""
    m1: float = 1.0
    """Factor of the target angle; combined only."""
    m2: float = 0.5
    """Added to the target angle, in radians; combined only."""
    m3: float = 0.0
    """Taken from the target cosine; combined only."""
    scale: float | None = None
    """Factor s of the cosines, of all margins but softmax; 64 if not given, 40 of sphereface2."""
    centers: int | None = None
    """Rows that a class has; subcenter only, 3 if not given."""
    l_a: float | None = None
    """Length of an embedding that gets the margin l_m; magface only, 10 if not given."""
    u_a: float | None = None
    """Length of an embedding that gets the margin u_m; magface only, 110 if not given."""
    l_m: float | None = None
    """Smallest margin in radians: 0.45 of magface (short embeddings), 0.05 of adaptive (the most frequent class) if not given."""
    u_m: float | None = None
    """Largest margin in radians: 0.8 of magface (long embeddings), 0.5 of adaptive (the rarest class) if not given."""
    lambda_g: float | None = None
    """Weight of the penalty on short embeddings; magface only, 35 if not given."""
    h: float | None = None
    """Concentration of the embeddings' lengths; adaface only, 0.333 if not given."""
    statistics_momentum: float | None = None
    """Weight of a new batch in running statistics (0 to 1): t of curricular, mean and deviation of adaface; 0.01 if not given."""
    sigma: float | None = None
    """Standard deviation of the drawn margins; elastic_arc and elastic_cos only, 0.0125 if not given."""
    plus: bool = False
    """Give the largest drawn margins to the samples farthest from their class (ElasticFace+); elastic_arc and elastic_cos only."""
    t: float | None = None
    """Exponent of the similarities, at least 1; sphereface2 only, 3 if not given."""
    balance: float | None = None
    """Share of the own class in the loss (0 to 1), the rest being that of all others; sphereface2 only, 0.7 if not given."""
    sample_rate: float = 1.0
    """Share of all classes drawn as negatives each step (0 to 1); 1 is the exact softmax."""
    interclass_filter: float | None = None
    """Cosine beyond which another class is taken for the sample's own under a second label, and left out; without it, none is."""
    init_std: float = 0.01
    """Standard deviation of the initial class weights."""
    weights: str | None = None
    """Class weights to start from: a safetensors file, a checkpoint, or a folder of files of each rank; drawn if not given."""
    label_smoothing: float = 0.0
    """Share of the target spread over all selected classes (0 to 1)."""
    logits_budget: int | None = None
    """Bytes of logits a rank may keep for backward; beyond, they are computed again. 1 GiB if not given."""
    replicas: int = 1
    """Copies of the class weights, each split over the ranks divided by this; as many as nodes keeps embeddings and logits in a node."""

    def check(self) -> None:
        """UserError for a setting that the margin does not take, or a number of replicas that is none."""
        if self.replicas < 1:
            raise UserError(f"--head.replicas is {self.replicas}; give at least 1")
        takes, defaults = MARGINS[self.margin][1], HeadConfig()
        for name in MARGIN_SETTINGS:
            value, default = getattr(self, name), getattr(defaults, name)
            if name not in takes and value != default:
                others = [margin for margin, (_, settings) in MARGINS.items() if name in settings]
                known = "every other margin" if len(others) == len(MARGINS) - 1 else ", ".join(others)
                back = "null" if default is None else default
                raise UserError(
                    f"--head.{name} is {value}, which has no effect with --head.margin {self.margin} (it is for {known}); "
                    f"leave it out, or give {back} if a file sets it"
                )

    def check_weights(self) -> None:
        """UserError if class weights to start from are not there; a run that is resumed needs them no more."""
        if self.weights is not None and not Path(self.weights).exists():
            raise UserError(
                f"--head.weights: there is no {self.weights}; give a safetensors file, a checkpoint or a folder of rank files"
            )

    def build_margin(self, class_counts: Tensor) -> Margin:
        """The margin that these settings name, the paper's values where they name none; ValueError for values out of range.

        class_counts: training images of each class `[C]`, for margins that depend on them.
        """
        build, takes = MARGINS[self.margin]
        given = {argument: getattr(self, name) for name, argument in takes.items()}
        if self.margin == "adaptive":
            given["class_counts"] = class_counts
        return build(**{argument: value for argument, value in given.items() if value is not None})

    def build_mesh(self, device: torch.device) -> DeviceMesh | None:
        """The mesh (replicas, ranks of a replica) of the process group: neighbouring ranks hold a copy together. None for one copy."""
        if self.replicas == 1:
            return None
        world = dist.get_world_size() if dist.is_initialized() else 1
        shard, rest = divmod(world, self.replicas)
        if rest:
            raise UserError(
                f"--head.replicas {self.replicas} does not divide the {world} ranks; give a divisor, such as the number of nodes"
            )
        return init_device_mesh(device.type, (self.replicas, shard), mesh_dim_names=("replicate", "shard"))

    def build(
        self, embedding_size: int, class_counts: Tensor, seed: int, device: torch.device, **policy: Any
    ) -> PartialFC:
        """The head of len(class_counts) classes; ValueError for values out of range. policy: `TrainConfig.policy`."""
        return PartialFC(
            embedding_size,
            len(class_counts),
            self.build_margin(class_counts),
            self.sample_rate,
            group=self.build_mesh(device),
            seed=seed,
            init_std=self.init_std,
            label_smoothing=self.label_smoothing,
            interclass_filter=self.interclass_filter,
            logits_budget=self.logits_budget,
            device=device,
            **policy,
        )


@dataclass
class CenterConfig:
    """Center loss beside the head: half the squared distance of an embedding, at its own length, to the center of its class."""

    weight: float = 0.0
    """What it is multiplied with before it is added to the head's loss; 0 for no center loss."""
    alpha: float = 0.5
    """How far centers move to the embeddings of a step (0 to 1)."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"--center.weight is {self.weight}; give a number of at least 0")
        if not self.weight and self.alpha != CenterConfig.alpha:
            raise UserError(
                f"--center.alpha is {self.alpha}, which has no effect while --center.weight is 0; leave it out"
            )

    def build(
        self, embedding_size: int, num_classes: int, seed: int, device: torch.device, **policy: Any
    ) -> CenterLoss | None:
        """The loss, or None where its weight is 0; ValueError for values out of range. policy: `TrainConfig.policy`."""
        return (
            CenterLoss(embedding_size, num_classes, alpha=self.alpha, seed=seed, device=device, **policy)
            if self.weight
            else None
        )


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
    deepspeed: str | None = None
    """JSON file of a DeepSpeed configuration (ZeRO stage, offload), unless the launcher names an engine; null for DDP."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; the last epoch always leaves one."""
    checkpoint_steps: int | None = None
    """Optimizer steps between two checkpoints within an epoch, besides those at the ends of epochs; null for none."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints while training goes on; takes CPU memory of the size of a rank's weights and optimizer state."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    on_nonfinite: Literal["raise", "skip", "log"] = "raise"
    """What a NaN or infinity in embeddings, loss or gradient does: raise ends the run, skip leaves the step out, log goes on."""
    max_skips: int | None = 20
    """Steps in a row that may be skipped before the run ends after all; null for any number."""
    watch_every: int = 0
    """Steps between two looks at whether all ranks still hold the same backbone, optimizer and margin; 0 for none."""
    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""

    @property
    def policy(self) -> dict[str, Any]:
        """What losses are told of non-finite numbers."""
        return {"on_nonfinite": self.on_nonfinite, "max_skips": self.max_skips}


@dataclass
class EvaluationConfig:
    """Verification, identification and retrieval, after training and during it."""

    batch_size: int = 512
    """Images a forward over all ranks."""
    tile: int = 2048
    """Side of the tiles in which pairs are compared, in images."""
    verification: list[str] = field(default_factory=list)
    """Files of image pairs (`lfw.bin`, `cfp_fp.bin`, ...) to verify, each under its name without the ending."""
    templates: str | None = None
    """Folder of a template protocol (IJB-B, IJB-C): images/, *face_tid_mid.txt, *template_pair_label.txt; null for none."""
    align: bool = True
    """Align the faces of `templates` by the points of its *name_5pts_score.txt, if there is one; false if its images are aligned."""
    identification: str | None = None
    """Folder with gallery/ and probes/, and distractors/ if there are any, of identity sub-folders; null for none."""
    retrieval: str | None = None
    """Folder with query/ and gallery/ or bounding_box_test/: identity sub-folders, or files that `label_pattern` is for; null for none."""
    label_pattern: str | None = None
    """Regular expression that finds the identity in a file's name, for a retrieval folder without sub-folders."""
    camera_pattern: str | None = None
    """Regular expression that finds the camera in a file's name; retrieval then passes over the query's own camera."""
    flip: bool = True
    """Verify with the sum of the embeddings of an image and of its mirror image, as is usual for faces."""
    every: int | None = None
    """Epochs between two evaluations during training; null for none but that at the end."""
    every_steps: int | None = None
    """Optimizer steps between two evaluations during training, within epochs too; null for none."""
    best: str | None = None
    """Figure whose best checkpoint is kept besides the newest: lfw/accuracy, holdout/tar@1e-3, ...; null for none."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        for name in ("every", "every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--evaluation.{name} is {value}; give at least 1, or null for none")
        if self.best is not None and self.every is None and self.every_steps is None:
            raise UserError(
                f"--evaluation.best {self.best} needs evaluations during training; give --evaluation.every as well"
            )


@dataclass
class RunConfig:
    """A training run."""

    seed: int = 0
    """Of initial weights, draws, order and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    center: CenterConfig = field(default_factory=CenterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    head_schedule: HeadScheduleConfig = field(default_factory=HeadScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def micro_batch(self) -> int:
        """Images of a global micro-batch."""
        return self.train.batch_size // self.train.accumulation

    def check(self) -> None:
        """UserError for values that no run can have."""
        at_least = {
            "train.epochs": (self.train.epochs, 1),
            "train.batch_size": (self.train.batch_size, 1),
            "train.accumulation": (self.train.accumulation, 1),
            "train.checkpoint_every": (self.train.checkpoint_every, 1),
            "train.keep_last": (self.train.keep_last, 1),
            "train.watch_every": (self.train.watch_every, 0),
            "evaluation.batch_size": (self.evaluation.batch_size, 1),
            "evaluation.tile": (self.evaluation.tile, 1),
            "output.log_every": (self.output.log_every, 1),
            "backbone.embedding_size": (self.backbone.embedding_size, 1),
            "optimizer.lr": (self.optimizer.lr, 0),
            "optimizer.weight_decay": (self.optimizer.weight_decay, 0),
            "optimizer.head_lr_factor": (self.optimizer.head_lr_factor, 0),
            "seed": (self.seed, 0),
        }
        for name, (value, least) in at_least.items():
            if not value >= least:
                raise UserError(f"--{name} is {value}; give at least {least}")
        if self.train.max_skips is not None and self.train.max_skips < 0:
            raise UserError(f"--train.max_skips is {self.train.max_skips}; give at least 0, or null for any number")
        if self.train.checkpoint_steps is not None and self.train.checkpoint_steps < 1:
            raise UserError(
                f"--train.checkpoint_steps is {self.train.checkpoint_steps}; give at least 1, or null for none"
            )
        if self.seed >= 2**62:
            raise UserError(f"--seed is {self.seed}; give a number below 2**62")
        if self.train.clip_norm is not None and not self.train.clip_norm > 0:
            raise UserError(
                f"--train.clip_norm is {self.train.clip_norm}; give a norm above 0, or null for no clipping"
            )
        if self.train.batch_size % self.train.accumulation:
            raise UserError(
                f"--train.batch_size {self.train.batch_size} is no multiple of --train.accumulation {self.train.accumulation}; "
                "micro-batches must be of one size"
            )
        if self.train.deepspeed is not None and not Path(self.train.deepspeed).is_file():
            raise UserError(
                f"--train.deepspeed {self.train.deepspeed} does not exist; give a JSON file of a DeepSpeed configuration"
            )
        if self.train.mixed_precision == "fp16" and (self.train.cpu or not torch.cuda.is_available()):
            raise UserError("--train.mixed_precision fp16 needs CUDA; use bf16 on a CPU")
        self.backbone.check()
        self.head.check()
        self.center.check()
        if self.head.replicas > 1 and self.center.weight:
            raise UserError(
                f"--head.replicas is {self.head.replicas}, but center loss is split over all ranks; "
                "give --center.weight 0 or --head.replicas 1"
            )
        self.evaluation.check()
        if self.data.mix and (self.center.weight or self.head.replicas > 1 or self.train.deepspeed):
            raise UserError(
                "--data.mix cannot be joined with center loss, --head.replicas or DeepSpeed; leave one of them out"
            )
        self.optimizer.check()
        self.schedule.check(self.train.epochs)
        self.head_schedule.over(self.schedule).check(self.train.epochs, "head_schedule")
        try:  # what head and center loss themselves refuse
            replace(self.head, replicas=1).build(2, torch.ones(2), self.seed, torch.device("meta"))
            self.center.build(2, 2, self.seed, torch.device("meta"))
        except ValueError as error:
            raise UserError(f"--head or --center: {error}") from error
        known = [str(each) for each in LoggerType]
        unknown = [name for name in self.output.trackers if name not in known]
        if unknown:
            raise UserError(f"--output.trackers names {', '.join(unknown)}; choose among {', '.join(known)}")


def add_config(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--config` and every field of RunConfig."""
    use_safe_loader(parser, [f.name for f in fields(RunConfig) if f.default_factory is not MISSING])
    parser.add_argument("--config", action="config", help="YAML file of settings; the command line overrides it")
    parser.add_class_arguments(RunConfig)


def to_config(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> RunConfig:
    """The settings that `arguments` name, checked."""
    try:
        parsed = parser.instantiate_classes(parser.parse_args(arguments))
    except jsonargparse.ArgumentError as error:
        if "parsing config" in str(error) and "--config" in arguments[:-1]:  # the message does not say which file
            raise UserError(f"{arguments[arguments.index('--config') + 1]}: {error}") from error
        raise
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
