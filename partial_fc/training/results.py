"""From a trained backbone to figures: embeddings of whole data sets over all ranks, verification, plots, the report.

images [n, C, H, W] of this rank's part   ── backbone ──>  embeddings [n_local, D]   ── gather ──>  [n, D] on every rank
all pairs, tiles dealt to the ranks       ── sum ──>       one Evaluation a data set
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import partial_fc
from partial_fc import gather, load_checkpoint, naming_the_missing
from partial_fc.training.backbones import build_backbone
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.data.loader import BatchLoader, rank_loader
from partial_fc.training.errors import Preempted, UserError
from partial_fc.training.evaluation import Evaluation, evaluate_embeddings
from partial_fc.training.interval import during_training, split_history
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import Task, Verification
from partial_fc.training.report.hardest import note_hardest, note_pairs
from partial_fc.training.report.report import write_report
from partial_fc.training.run import RunFolder
from partial_fc.training.settings_parser import plain_settings, with_arguments_beside

Returned = TypeVar("Returned")


def evaluate_sets(
    backbone: nn.Module,
    sets: dict[str, IdentityDataset],
    accelerator: Accelerator,
    config: RunConfig,
    folder: RunFolder,
    asked_to_stop: Callable[[], bool] = lambda: False,
    *,
    pictures: bool = True,
) -> list[Evaluation]:
    """Verification and identification on each data set; every rank must call it. Unreadable images are noted in the folder.

    asked_to_stop: whether this rank was; all ranks then raise Preempted when a data set has been read. pictures: leave the hardest pairs in
    the folder, for the report.
    """
    results = []
    for name, dataset in sets.items():
        embeddings, indices = embed_images(
            backbone, dataset, name, accelerator, config, folder, asked_to_stop=asked_to_stop
        )
        labels = dataset.labels[indices]
        results.append(
            evaluate_embeddings(
                embeddings,
                labels,
                name=name,
                **sharing(accelerator, config.evaluation.tile),
            )
        )
        if pictures:
            note_hardest(folder.path, name, dataset, (embeddings, labels, indices), config.evaluation.tile, accelerator)
    return results


def run_tasks(
    backbone: nn.Module,
    tasks: Sequence[Task],
    accelerator: Accelerator,
    config: RunConfig,
    folder: RunFolder,
    asked_to_stop: Callable[[], bool] = lambda: False,
    *,
    pictures: bool = True,
) -> list[Result]:
    """Every protocol's figures; every rank must call it. Unreadable images are noted in the folder.

    asked_to_stop, pictures: as of evaluate_sets; pictures are of the pairs that verification lists.
    """

    def embed(dataset: IdentityDataset, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        return embed_images(
            backbone, dataset, name, accelerator, config, folder, flip=flip, asked_to_stop=asked_to_stop
        )

    results = [
        task.measure(embed, **sharing(accelerator, config.evaluation.tile), device=accelerator.device) for task in tasks
    ]
    for task, result in zip(tasks, results, strict=True):
        if pictures and isinstance(task, Verification) and accelerator.is_main_process:
            note_pairs(folder.path, task.name, task.images, result.hardest)
    return results


def sharing(accelerator: Accelerator, tile: int) -> dict[str, Any]:
    """How the work of an evaluation is shared by the ranks: arguments of its function."""
    return {
        "tile": tile,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "reduce": lambda part: sum_ranks(part, accelerator),
        "progress": accelerator.is_main_process,
    }


def once_through(dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig) -> BatchLoader:
    """This rank's part of all images, each once, in their order and as they are."""
    return rank_loader(
        dataset, config.data, accelerator, batch_size=config.evaluation.batch_size, shuffle=False, drop_last=False
    )


def embed_images(
    backbone: nn.Module,
    dataset: IdentityDataset,
    name: str,
    accelerator: Accelerator,
    config: RunConfig,
    folder: RunFolder,
    *,
    flip: bool = False,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """(embeddings `[n, D]`, positions `[n]` in the data set) of all readable images, on every rank, on the CPU, in its order.

    flip: each is the sum of the embeddings of the image and of its mirror image. Unreadable images are noted in the folder.
    """
    loader = once_through(dataset, accelerator, config)
    device = accelerator.device
    parts: list[Tensor] = [torch.empty(0, config.backbone.embedding_size)]
    indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    message = None
    backbone.eval()
    try:
        bar = tqdm(
            total=len(loader),
            desc=f"embedding {name}",
            unit="batch",
            disable=not accelerator.is_main_process,
            mininterval=0.5,
        )
        with torch.no_grad(), closing(loader.iterate()) as batches, bar:
            for batch in batches:
                bar.update()
                if asked_to_stop():
                    break
                folder.note_unreadable(batch.unreadable)
                if len(batch.labels):
                    images = batch.images.to(device, non_blocking=batch.images.is_pinned())
                    with accelerator.autocast():
                        embeddings = backbone(images).float()
                        if flip:
                            embeddings = embeddings + backbone(images.flip(3)).float()
                    parts.append(embeddings.cpu())
                    indices.append(batch.indices)
    except UserError as error:
        message = str(error)
    raise_together(message, accelerator, asked_to_stop())
    everyone = gather(torch.cat(parts).to(device), torch.cat(indices).to(device))
    order = everyone.labels.argsort()
    return everyone.embeddings[order].cpu(), everyone.labels[order].cpu()


def together(action: Callable[[], Returned], accelerator: Accelerator) -> Returned:
    """What `action` returns here; the first rank's UserError on every rank; every rank must call it."""
    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    raise_together(message, accelerator)
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], object], accelerator: Accelerator) -> None:
    """Do something in one process; its UserError is raised in all; every rank must call it."""
    together(lambda: action() if accelerator.is_main_process else None, accelerator)


def claim_output(out: RunFolder, accelerator: Accelerator) -> None:
    """Make a folder for results; UserError on every rank if it is in use or cannot be made; every rank must call it."""

    def claim() -> None:
        try:
            out.check_free()
            out.path.mkdir(parents=True, exist_ok=True)
        except UserError as error:
            raise UserError(str(error).split("; choose")[0] + "; choose another --output") from error

    on_main(claim, accelerator)


def raise_together(message: str | None, accelerator: Accelerator, stop: bool = False) -> None:
    """Raise the first rank's message as UserError on every rank, if any rank has one, else Preempted if any is to stop.

    Every rank must call it.
    """
    told: list[tuple[str | None, bool]] = [(message, stop)]
    if accelerator.num_processes > 1:
        told *= accelerator.num_processes
        with naming_the_missing("an agreement of all ranks"):
            dist.all_gather_object(told, (message, stop))
    first = next((m for m, _ in told if m is not None), None)
    if first is not None:
        raise UserError(first)
    if any(each for _, each in told):
        raise Preempted("stopped as asked, all steps being trained and saved")


def sum_ranks(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum of a tensor over ranks, on the CPU, on every rank."""
    if accelerator.num_processes == 1:
        return tensor
    total = tensor.to(accelerator.device)
    with naming_the_missing("the sum of the evaluation's counts"):
        dist.all_reduce(total)
    return total.cpu()


def write_results(
    folder: RunFolder,
    title: str,
    evaluations: list[Evaluation],
    figures: dict[str, Any],
    config: RunConfig | None,
    environment: dict[str, str],
    history: list[dict[str, float]],
    results: Sequence[Result] = (),
) -> Path:
    """metrics.json, curves.json, plots/ and report.html; the path of the last. results: of other protocols. config: None without a run."""
    from partial_fc.training.report.plots import (  # matplotlib takes half a second
        plot_cmc,
        plot_dir,
        plot_histograms,
        plot_roc,
        plot_training,
    )

    plots = folder.path / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {
        "evaluations": [e.to_dict(curves=False) for e in evaluations],
        "protocols": [r.to_dict(curves=False) for r in results],
    }
    history, evaluated = split_history(history)
    if evaluated:
        metrics["during_training"] = during_training(evaluated, None if config is None else config.evaluation.best)
    metrics |= figures
    folder.write_metrics(metrics)
    folder.write_curves([*(each.to_dict() for each in evaluations), *(each.to_dict() for each in results)])
    pairs: list[Evaluation | Result] = [*evaluations, *(each for each in results if "roc" in each.curves)]
    if pairs:
        plot_roc(plots / "roc.png", pairs)
        plot_histograms(plots / "histograms.png", pairs)
    for name, plot in (("dir", plot_dir), ("cmc", plot_cmc)):
        drawn = [each for each in results if name in each.curves]
        if drawn:
            plot(plots / f"{name}.png", drawn)
    if history:
        plot_training(plots / "training.png", history)
    return write_report(
        folder.path,
        title=title,
        metrics=metrics,
        config={} if config is None else with_arguments_beside(plain_settings(config)),
        environment=environment,
        history=history,
    )


def describe_environment(accelerator: Accelerator) -> dict[str, str]:
    return {
        "ranks": f"{accelerator.num_processes} on {accelerator.device.type}",
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "threads a rank": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else platform.machine(),
    }


def load_backbone(
    folder: RunFolder, config: RunConfig, image_shape: tuple[int, int, int], checkpoint: Path | None = None
) -> nn.Module:
    """The backbone of a run's checkpoint, the newest if none is given; UserError if there is none or it does not fit such images."""
    checkpoint = checkpoint or folder.find_checkpoint()
    backbone = build_backbone(
        config.backbone.name, image_shape=image_shape, embedding_size=config.backbone.embedding_size
    )
    try:
        load_checkpoint(checkpoint, backbone=backbone)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"cannot load the backbone of {folder.path} for images of shape {image_shape}: {error}"
        ) from error
    return backbone
