"""Settings of the losses: the sharded head with its margin, and center loss."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from partial_fc import margins
from partial_fc.centers import CenterLoss
from partial_fc.classes.hard_negatives import Search
from partial_fc.classes.head_state import SamplingCorrection
from partial_fc.head import PartialFC
from partial_fc.kernels.choice import KernelsMode
from partial_fc.margins.base import Margin
from partial_fc.tiers.kinds import Storage
from partial_fc.training.class_settings import ClassSettings
from partial_fc.training.errors import UserError
from partial_fc.training.margin_schedule import MarginScheduleConfig
from partial_fc.training.saved import checkpoint_in, heads_in
from partial_fc.weights.rank_paths import in_folder

COUNTS = "class_counts"


@dataclass
class MarginSettings(ClassSettings):
    """A margin: one of partial_fc.margins by its name, or a subclass of Margin by its import path."""

    base = Margin
    names = {
        name: f"partial_fc.margins.{name}"
        for name in margins.__all__
        if issubclass(getattr(margins, name), Margin) and name != "Margin"
    }
    skip = frozenset({COUNTS})

    def build_margin(self, class_counts: Tensor, option: str = "head.margin") -> Margin:
        """Return the margin; UserError, naming `option`, for arguments that it refuses.

        class_counts: number of training images of each class `[C]`, for margins that take an argument of that name.
        """
        cls = self.load(self.class_path, option)
        counts = {COUNTS: class_counts} if _takes(cls, COUNTS) and COUNTS not in self.init_args else {}
        built: Margin = self.build(option, **counts)
        return built

    def with_arguments(self, option: str, **arguments: Any) -> MarginSettings:
        """Return the same margin with other arguments. UserError, naming `option`, for those that it does not take."""
        unknown = [name for name in arguments if name not in self.takes(self.class_path, option)]
        if unknown:
            raise UserError(f"--{option}: {self.name} has no argument {', '.join(unknown)}; leave it out")
        return MarginSettings(self.class_path, {**self.init_args, **arguments})


@dataclass
class StorageSettings(ClassSettings):
    """Where class weights and optimizer state are: HostRows or FileRows."""

    base = Storage
    names = {name: f"partial_fc.tiers.kinds.{name}" for name in ("HostRows", "FileRows")}


def _takes(cls: type, argument: str) -> bool:
    """Return whether the constructor of a class takes an argument, itself or in **options for the class above."""
    for each in cls.__mro__:
        if "__init__" in vars(each):
            parameters = inspect.signature(each.__init__).parameters  # type: ignore[misc]
            if argument in parameters:
                return True
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                return False
    return False


@dataclass
class HeadConfig:
    """The sharded classification head."""

    margin: MarginSettings = field(default_factory=lambda: MarginSettings("ArcFace"))
    """The margin, with its arguments after it: --head.margin AdaFace --head.margin.h 0.33. docs/losses.md says what
    each is for, --head.margin.help AdaFace what it takes."""
    margin_schedule: MarginScheduleConfig = field(default_factory=MarginScheduleConfig)
    sample_rate: float = 1.0
    """Share of all classes drawn as negatives each step (0 to 1); 1 is the exact softmax."""
    sample_block: int = 1
    """How many identities with consecutive numbers are drawn together, if sample_rate is below 1: a disk reads blocks
    of rows many times faster than single rows."""
    storage: StorageSettings | None = None
    """Where class weights and the state of their optimizer are: HostRows for host memory of which only what was used is
    taken, FileRows with a folder for files (--head.storage FileRows --head.storage.folder FOLDER); null for memory of
    the device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the class weights. bfloat16 takes half the memory, or disk; their optimizer then rounds at random, in
    proportion, so that updates below the resolution of bfloat16 are not lost. Its state stays in float32."""
    interclass_filter: float | None = None
    """Cosine beyond which another class is taken for the sample's own under a second label, and is skipped; null to
    skip none."""
    inter_topk: int = 0
    """How many of the other classes that are nearest to a sample count as nearer than they are; 0 for none."""
    inter_topk_penalty: float = 0.06
    """By how much: an angle in radians (0 to pi)."""
    hard_negatives: int = 0
    """How many nearest classes of each class of a batch take part in its step beside those drawn, with a sample_rate
    below 1; 0 for none."""
    hard_negatives_every: int = 1000
    """Forwards (micro-batches) of training between two searches for the nearest classes of all classes."""
    hard_negatives_search: Search = "exact"
    """How they are searched: exact, or by faiss on the CPU, which takes far less work with millions of classes and
    finds most of them."""
    sampling_correction: SamplingCorrection = "none"
    """What makes up for classes that are not drawn, if sample_rate is below 1: importance lets a drawn class count for
    C/w classes, so that the softmax's denominator has the mean of that over all; none as in the Partial FC papers."""
    init_std: float = 0.01
    """Standard deviation of the initial class weights."""
    weights: str | None = None
    """Class weights to start from: a run or a checkpoint of this project, a safetensors file, or a folder of files of
    each rank; drawn if not given."""
    label_smoothing: float = 0.0
    """Share of the target spread over all selected classes (0 to 1)."""
    logits_budget: int | None = None
    """Bytes of logits that a rank may keep for backward; beyond, they are computed again. 1 GiB if not given."""
    kernels: KernelsMode = "auto"
    """Kernels in Triton for the head: auto for those that serve, on a card; off for plain PyTorch; interpret for tests
    on a CPU. docs/kernels.md says which serve what."""
    replicas: int = 1
    """Copies of the class weights, each split over the ranks divided by this; the number of nodes keeps embeddings and
    logits within a node."""

    def check(self) -> None:
        """UserError for values that no head can have."""
        if self.replicas < 1:
            raise UserError(f"--head.replicas is {self.replicas}; give at least 1")
        margin = self.margin.build_margin(torch.ones(2))
        self.margin_schedule.check()
        self.margin_schedule.build(self.margin.build_margin(torch.ones(2)), steps_per_epoch=1000)
        try:
            self.build_storage()
            classes, device = max(2, self.hard_negatives + 1, self.sample_block), torch.device("meta")
            PartialFC(2, classes, margin, self.sample_rate, device=device, **self._options)
        # a RuntimeError is that of a triton that cannot interpret
        except (TypeError, ValueError, ModuleNotFoundError, RuntimeError) as error:
            raise UserError(f"--head: {error}") from error

    def weights_source(self, path: str) -> Path:
        """Return what to import class weights from: the checkpoint that `path` is or holds, else the path itself.

        Raises UserError for a path that is nothing to import from.
        """
        source = Path(path)
        if not source.exists():
            raise UserError(
                f"--head.weights: there is no {path}; give a run or a checkpoint of this project, a safetensors file, "
                "or a folder of rank files"
            )
        checkpoint = checkpoint_in(source)
        if checkpoint is None:
            if source.is_dir():
                _check_rank_files(source)
            return source
        names = heads_in(checkpoint)
        if "head" not in names:
            raise UserError(
                f"--head.weights: {checkpoint} has no class weights named head; it has "
                f"{', '.join(names) or 'none'}: write those of one name to a file, partial-fc export {checkpoint} "
                "FILE.safetensors --name NAME, and give that"
            )
        return checkpoint

    def build_mesh(self, device: torch.device) -> DeviceMesh | None:
        """Return the mesh (replicas, ranks of a replica), each replica on neighbouring ranks; None for one replica."""
        if self.replicas == 1:
            return None
        world = dist.get_world_size() if dist.is_initialized() else 1
        shard, rest = divmod(world, self.replicas)
        if rest:
            raise UserError(
                f"--head.replicas {self.replicas} does not divide the {world} ranks; "
                "give a divisor, such as the number of nodes"
            )
        return init_device_mesh(device.type, (self.replicas, shard), mesh_dim_names=("replicate", "shard"))

    def build(
        self, embedding_size: int, class_counts: Tensor, seed: int, device: torch.device, **policy: Any
    ) -> PartialFC:
        """Return the head of len(class_counts) classes. policy: `TrainConfig.policy`. ValueError for values out of
        range, UserError for more hard negatives than there are other classes."""
        self.check_classes(len(class_counts))
        return PartialFC(
            embedding_size,
            len(class_counts),
            self.margin.build_margin(class_counts),
            self.sample_rate,
            group=self.build_mesh(device),
            seed=seed,
            device=device,
            storage=self.build_storage(),
            **self._options,
            **policy,
        )

    def check_classes(self, number: int) -> None:
        """UserError for settings that a head of so many classes cannot have."""
        if self.hard_negatives and self.hard_negatives >= number:
            raise UserError(
                f"--head.hard_negatives is {self.hard_negatives}; with {number} identities it can be at most "
                f"{number - 1}"
            )
        if self.sample_block > number:
            raise UserError(f"--head.sample_block is {self.sample_block}; with {number} identities it can be no more")

    def build_storage(self) -> Storage | None:
        """Return where rows are to be; None for memory of the device."""
        return None if self.storage is None else self.storage.build("head.storage")

    @property
    def _options(self) -> dict[str, Any]:
        hard = "hard_negatives", "hard_negatives_every", "hard_negatives_search"
        nearest = "inter_topk", "inter_topk_penalty"
        more = "label_smoothing", "interclass_filter", "sampling_correction", "logits_budget", "kernels"
        names = "sample_block", "init_std", *more, *nearest, *hard
        return {"dtype": getattr(torch, self.dtype), **{name: getattr(self, name) for name in names}}


def _check_rank_files(folder: Path) -> None:
    try:
        in_folder(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"--head.weights: {folder} is neither a run nor a checkpoint of this project; {error}"
        ) from error
    except ValueError as error:
        raise UserError(f"--head.weights: {error}") from error


@dataclass
class CenterConfig:
    """Center loss beside the head: half the squared distance of an embedding to the center of its class."""

    weight: float = 0.0
    """What it is multiplied with before it is added to the head's loss; 0 for no center loss."""
    alpha: float = 0.5
    """How far centers move towards the embeddings of a step (0 to 1)."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"--center.weight is {self.weight}; give a number of at least 0")
        try:
            self.build(2, 2, 0, torch.device("meta"))
        except ValueError as error:
            raise UserError(f"--center: {error}") from error

    def build(
        self, embedding_size: int, num_classes: int, seed: int, device: torch.device, **policy: Any
    ) -> CenterLoss | None:
        """Return the loss, or None if its weight is 0. policy: `TrainConfig.policy`."""
        if not self.weight:
            return None
        return CenterLoss(embedding_size, num_classes, alpha=self.alpha, seed=seed, device=device, **policy)
