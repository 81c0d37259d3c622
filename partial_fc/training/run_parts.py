"""The parts that a run trains, built from its settings: backbone, heads, center loss, optimizers, schedules.

backbone       in an engine: DDP, FSDP2 or DeepSpeed; the same initial weights on every rank
head           PartialFC over the classes of the run's data set; its rows are sharded over the ranks
extra          one more head for each further data set of data.mix
center         CenterLoss, if it has a weight
watch          DivergenceWatch, which compares the ranks, if train.watch_every is set
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from partial_fc import CenterLoss, DivergenceWatch, MarginSchedule, PartialFC, RowOptimizer
from partial_fc.training.all_ranks import run_on_all, run_on_main_for_all
from partial_fc.training.backbones.counts import Counts, count_backbone
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.engine import Engine, Trained, make_engine
from partial_fc.training.errors import UserError
from partial_fc.training.micro_batches import MIN_IMAGES
from partial_fc.training.mixing import MAIN, ExtraHeads, MixedIdentities, sampler_of
from partial_fc.training.run_data import SAME_DATA, check_classes
from partial_fc.training.saved import CONFIG, checkpoint_in
from partial_fc.training.schedules import build_schedules
from partial_fc.weights.single_file import OtherShape, open_weights


@dataclass
class RunParts:
    """The trained parts of a run."""

    head: PartialFC
    head_optimizer: RowOptimizer
    extra: ExtraHeads | None
    center: CenterLoss | None
    engine: Engine
    counts: Counts
    """Parameters and operations of the backbone."""
    schedules: list[LambdaLR]
    """Of the backbone, the head, and the extra heads."""
    margin_schedules: dict[str, MarginSchedule]
    """Of the heads whose margin moves, by their names in checkpoints."""
    watch: DivergenceWatch | None


def check_sizes(
    config: RunConfig, main_set: IdentityDataset, train: IdentityDataset, world: int, device: torch.device
) -> None:
    """UserError for settings that this data set, so many ranks or this device cannot have; before anything is built.

    main_set, train: as of `build_parts`.
    """
    least = MIN_IMAGES * world * config.train.accumulation
    if config.train.batch_size < least:
        raise UserError(
            f"--train.batch_size {config.train.batch_size} leaves fewer than {MIN_IMAGES} images for each of "
            f"{world} ranks and {config.train.accumulation} micro-batches, which batch normalisation needs; "
            f"give at least {least}"
        )
    if sampler_of(config, train).length // config.micro_batch < config.train.accumulation:
        raise UserError(
            f"{len(train)} training images are fewer than one batch of {config.train.batch_size}; lower "
            "--train.batch_size"
        )
    extra = [each for name, each in train.sets.items() if name != MAIN] if isinstance(train, MixedIdentities) else []
    for each in (main_set, *extra):
        config.head.check_classes(each.num_identities)
    config.optimizers.check_device(device)


def build_parts(
    config: RunConfig,
    main_set: IdentityDataset,
    train: IdentityDataset,
    accelerator: Accelerator,
    steps_per_epoch: int,
    resume: bool,
) -> RunParts:
    """Build the parts of a run. Every rank must call it.

    main_set: the run's own data set. train: what is trained on, main_set or a mixture with others. With `resume` the
    backbone does not load the weights that the settings name, because a checkpoint replaces them.
    """
    device = accelerator.device
    width = config.backbone.embedding_size
    identities = main_set.num_identities
    images = torch.bincount(main_set.labels, minlength=identities)  # of each class
    policy = config.train.policy
    head = config.head.build(width, images, config.seed, device, **policy)
    extra = ExtraHeads(config, train, device) if isinstance(train, MixedIdentities) else None
    storage = config.head.build_storage()
    center = config.center.build(width, identities, config.seed, device, storage=storage, **policy)
    optimizers = config.optimizers
    head_optimizer = optimizers.build_head(head)

    # the same initial weights of the backbone on all ranks, and the same random numbers until the first epoch
    torch.manual_seed(config.seed)
    shape = train.image_shape
    named = None if resume else config.backbone.weights
    weights = None if named is None else run_on_main_for_all(lambda: str(checkpoint_in(named) or named), accelerator)
    backbone = run_on_all(lambda: config.backbone.build(shape, weights, accelerator.print), accelerator)
    counts = count_backbone(backbone, shape)
    trained = Trained(
        build=_first_then_new(backbone, config, shape),
        optimizer=lambda module: optimizers.build(module.parameters()),
        head=head,
        head_optimizer=head_optimizer,
    )
    del backbone
    engine = make_engine(accelerator, trained, config.train)
    engine.center_losses = [] if center is None else [center]
    schedules = build_schedules(
        config.schedule, config.head_schedule, (engine.optimizer, head_optimizer), steps_per_epoch, config.train.epochs
    )
    watch = _watch(config, engine, head, extra)
    if extra is not None:
        engine.add_heads(extra.heads.values(), extra.optimizers.values())
        schedules += extra.schedules(schedules[1])
    margin_schedules = _margin_schedules(config, head, extra, steps_per_epoch)
    return RunParts(head, head_optimizer, extra, center, engine, counts, schedules, margin_schedules, watch)


def head_without_memory(config: RunConfig, main_set: IdentityDataset) -> PartialFC:
    """Return the head of the settings, as far as shapes go."""
    images = torch.bincount(main_set.labels, minlength=main_set.num_identities)
    margin = config.head.margin.build_margin(images)
    return PartialFC(config.backbone.embedding_size, len(images), margin, device="meta")


def checked_weights(config: RunConfig, head: PartialFC, identities: Sequence[str]) -> str | None:
    """Return what to import class weights from, as the settings name it; None if they name nothing. Reads no rows.

    identities: of the classes of this run. Raises UserError unless the weights fit the head, and are of the same
    identities, which the folder of a run tells. Not a collective.
    """
    if config.head.weights is None:
        return None
    source = config.head.weights_source(config.head.weights)
    try:
        open_weights(source, head, None)
    except OtherShape as error:
        data = config.data
        advice = "give the --backbone.embedding_size and the margin's --head.margin.centers of the weights"
        if error.other_classes:
            advice = (
                "the classes are those of the data set, less what --data.holdout_identities "
                f"({data.holdout_identities} here), --data.min_images ({data.min_images}) and --data.identities "
                f"({data.identities}) leave out: give the data and the settings that the weights were trained with"
            )
        raise UserError(f"--head.weights: {error.problem}; {advice}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--head.weights: {error}") from error
    if (source.parent.parent / CONFIG).is_file():
        instead = (
            f"{SAME_DATA}, or leave --head.weights out (if they are the same under other names: partial-fc export "
            f"{config.head.weights} FILE.safetensors, and give that)"
        )
        try:
            check_classes(source.parent.parent, identities, "this run", instead)
        except UserError as error:
            raise UserError(f"--head.weights: {error}") from error
    return str(source)


def _margin_schedules(
    config: RunConfig, head: PartialFC, extra: ExtraHeads | None, steps_per_epoch: int
) -> dict[str, MarginSchedule]:
    """Return a schedule for the margin of each head, if the settings ask for one; each ends at the head's own value."""
    heads = {"": head, **{f"_{name}": each for name, each in (extra.heads if extra else {}).items()}}
    built = {name: config.head.margin_schedule.build(each, steps_per_epoch) for name, each in heads.items()}
    return {f"margin_schedule{name}": each for name, each in built.items() if each is not None}


def _first_then_new(backbone: nn.Module, config: RunConfig, shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    """Return a function that returns `backbone` on its first call and a new one, with other weights, on later calls."""
    first = [backbone]

    def build() -> nn.Module:
        return first.pop() if first else config.backbone.build(shape)

    return build


def _watch(config: RunConfig, engine: Engine, head: PartialFC, extra: ExtraHeads | None) -> DivergenceWatch | None:
    """Return the comparison of ranks that the settings ask for."""
    if not config.train.watch_every:
        return None
    # DeepSpeed's optimizers hold sharded state under names that do not show it, so that it cannot be compared
    optimizers = [] if engine.name.startswith("DeepSpeed") else [engine.optimizer]
    extra_heads = [] if extra is None else extra.heads.values()
    watched = (engine.model, head, *extra_heads, *engine.center_losses, *optimizers)
    return DivergenceWatch(*watched, every=config.train.watch_every)
