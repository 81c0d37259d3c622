"""From a trained backbone to figures: embeddings of whole data sets over all ranks, verification, plots, the report.

images [n, C, H, W] of this rank's part   ── backbone ──>  embeddings [n_local, D]   ── gather ──>  [n, D] on every rank
all pairs, tiles dealt to the ranks       ── sum ──>       one Evaluation a data set
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import partial_fc
from partial_fc import gather, load_checkpoint
from partial_fc.training.backbones import build_backbone
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation, evaluate_embeddings
from partial_fc.training.hardest import note_hardest
from partial_fc.training.loader import BatchLoader
from partial_fc.training.plots import plot_histograms, plot_roc, plot_training
from partial_fc.training.report import write_report
from partial_fc.training.run import RunFolder


def evaluate_sets(
    backbone: nn.Module, sets: dict[str, IdentityDataset], accelerator: Accelerator, config: RunConfig, folder: RunFolder
) -> list[Evaluation]:
    """Verification and identification on each data set; every rank must call it. Unreadable images are noted in the folder."""
    results = []
    for name, dataset in sets.items():
        embeddings, labels, indices = _embed(backbone, dataset, name, accelerator, config, folder)
        results.append(
            evaluate_embeddings(
                embeddings,
                labels,
                name=name,
                tile=config.evaluation.tile,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                reduce=lambda counts: _sum(counts, accelerator),
                progress=accelerator.is_main_process,
            )
        )
        note_hardest(folder.path, name, dataset, (embeddings, labels, indices), config.evaluation.tile, accelerator)
    return results


def _embed(
    backbone: nn.Module, dataset: IdentityDataset, name: str, accelerator: Accelerator, config: RunConfig, folder: RunFolder
) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings `[n, D]`, labels `[n]`, indices `[n]`) of readable images, on every rank, on the CPU, in the set's order."""
    loader = BatchLoader(
        dataset,
        batch_size=config.evaluation.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        shuffle=False,
        drop_last=False,
        workers=config.data.workers,
        on_error=config.data.on_error,
    )
    device = accelerator.device
    parts: list[Tensor] = [torch.empty(0, config.backbone.embedding_size)]
    indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    message = None
    backbone.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(loader, desc=f"embedding {name}", unit="batch", disable=not accelerator.is_main_process, mininterval=0.5):
                folder.note_unreadable(batch.unreadable)
                if len(batch.labels):
                    with accelerator.autocast():
                        parts.append(backbone(batch.images.to(device)).float().cpu())
                    indices.append(batch.indices)
    except UserError as error:
        message = str(error)
    raise_together(message, accelerator)
    everyone = gather(torch.cat(parts).to(device), torch.cat(indices).to(device))
    order = everyone.labels.argsort()
    places = everyone.labels[order].cpu()
    return everyone.embeddings[order].cpu(), dataset.labels[places], places


def raise_together(message: str | None, accelerator: Accelerator) -> None:
    """Raise the first rank's message as UserError on every rank, if any rank has one; every rank must call it."""
    messages = [message]
    if accelerator.num_processes > 1:
        messages = [None] * accelerator.num_processes
        dist.all_gather_object(messages, message)
    first = next((m for m in messages if m is not None), None)
    if first is not None:
        raise UserError(first)


def _sum(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    if accelerator.num_processes == 1:
        return tensor
    total = tensor.to(accelerator.device)
    dist.all_reduce(total)
    return total.cpu()


def write_results(
    folder: RunFolder,
    title: str,
    evaluations: list[Evaluation],
    figures: dict[str, Any],
    config: RunConfig,
    environment: dict[str, str],
    history: list[dict[str, float]],
) -> Path:
    """metrics.json, curves.json, plots/ and report.html; the path of the last."""
    plots = folder.path / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    metrics = {"evaluations": [e.to_dict(curves=False) for e in evaluations], **figures}
    folder.write_metrics(metrics)
    folder.write_curves([e.to_dict() for e in evaluations])
    if evaluations:
        plot_roc(plots / "roc.png", evaluations)
        plot_histograms(plots / "histograms.png", evaluations)
    if history:
        plot_training(plots / "training.png", history)
    return write_report(folder.path, title=title, metrics=metrics, config=asdict(config), environment=environment, history=history)


def describe_environment(accelerator: Accelerator) -> dict[str, str]:
    return {
        "ranks": f"{accelerator.num_processes} on {accelerator.device.type}",
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "threads a rank": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else platform.machine(),
    }


def load_backbone(folder: RunFolder, config: RunConfig, image_shape: tuple[int, int, int]) -> nn.Module:
    """The backbone of a run's newest checkpoint; UserError if there is none or it does not fit images of that shape."""
    checkpoint = folder.newest_checkpoint()
    if checkpoint is None:
        raise UserError(f"{folder.path} has no complete checkpoint; train it first")
    backbone = build_backbone(config.backbone.name, image_shape=image_shape, embedding_size=config.backbone.embedding_size)
    try:
        load_checkpoint(checkpoint, backbone=backbone)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"cannot load the backbone of {folder.path} for images of shape {image_shape}: {error}") from error
    return backbone
