"""From a trained backbone to results: embeddings of whole data sets, figures, plots, the report.

this rank's images [n_local, C, H, W]   ── backbone ──>  embeddings [n_local, D]   ── gather ──>  [n, D] on every rank
all pairs, in tiles split over ranks    ── sum ──>       one Evaluation per data set
all figures                             ── main process ──>  metrics.json, curves.json, plots/, report.html
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import partial_fc
from partial_fc import gather, load_checkpoint, naming_the_missing
from partial_fc.checkpoint.manifest import remove_tree
from partial_fc.training.all_ranks import raise_on_all, run_on_main, sum_ranks
from partial_fc.training.backbones import build_backbone
from partial_fc.training.backbones.mirrored import embeddings_of
from partial_fc.training.config import RunConfig
from partial_fc.training.data import IdentityDataset
from partial_fc.training.data.loader import BatchLoader, rank_loader
from partial_fc.training.errors import UserError, words
from partial_fc.training.evaluation import Evaluation, evaluate_embeddings
from partial_fc.training.interval import during_training, split_history
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import Task, Verification
from partial_fc.training.report.hardest import note_hardest, note_pairs
from partial_fc.training.report.report import write_report
from partial_fc.training.run import RunFolder
from partial_fc.training.settings_parser import plain_settings, with_arguments_beside

BLOCK = 1 << 16  # embeddings of a rank that travel at a time


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
    """Return verification and identification figures of each data set. Every rank must call it.

    asked_to_stop: whether this rank was asked to stop; if any was, all ranks raise Preempted after the data set at
    hand.
    pictures: save the hardest pairs in the folder, for the report. Unreadable images are recorded in the folder.
    """
    results = []
    for name, dataset in sets.items():
        embeddings, indices = embed_images(
            backbone, dataset, name, accelerator, config, folder, asked_to_stop=asked_to_stop
        )
        labels = dataset.labels[indices]
        work = split_work(accelerator, config.evaluation.tile)
        results.append(evaluate_embeddings(embeddings, labels, name=name, **work, device=accelerator.device))
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
    """Return the figures of each protocol. Every rank must call it.

    asked_to_stop: as for evaluate_sets. pictures: save the hardest of the pairs that verification lists. Unreadable
    images are recorded in the folder.
    """

    def embed(dataset: IdentityDataset, name: str, flip: bool) -> tuple[Tensor, Tensor]:
        if dataset.skipped:
            run_on_main(lambda: folder.record_unreadable(list(dataset.skipped)), accelerator)
        return embed_images(
            backbone, dataset, name, accelerator, config, folder, flip=flip, asked_to_stop=asked_to_stop
        )

    work = split_work(accelerator, config.evaluation.tile)
    results = [task.measure(embed, **work, device=accelerator.device) for task in tasks]
    for task, result in zip(tasks, results, strict=True):
        if pictures and isinstance(task, Verification):
            run_on_main(partial(note_pairs, folder.path, task.name, task.images, result.hardest), accelerator)
    return results


def split_work(accelerator: Accelerator, tile: int) -> dict[str, Any]:
    """Return the arguments of an evaluation function that split its work over the ranks."""
    return {
        "tile": tile,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "reduce": lambda part: sum_ranks(part, accelerator),
        "progress": accelerator.is_main_process,
    }


def evaluation_loader(dataset: IdentityDataset, accelerator: Accelerator, config: RunConfig) -> BatchLoader:
    """Return a loader of this rank's part of the data set: every image once, in order, not augmented."""
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
    """Return (embeddings `[n, D]`, positions in the data set `[n]`) of all readable images, on the CPU of every rank.

    They are in the order of the data set. flip: add the embedding of the mirror image to that of the image.
    Unreadable images are recorded in the folder.
    """
    loader = evaluation_loader(dataset, accelerator, config)
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
                try:
                    folder.record_unreadable(batch.unreadable)
                except OSError as error:  # of this rank's disk: the others take it up below
                    raise UserError(words(error)) from error
                if len(batch.labels):
                    images = batch.images.to(device, non_blocking=batch.images.is_pinned())
                    with accelerator.autocast():
                        embeddings = embeddings_of(backbone, images, flip)
                    parts.append(embeddings.cpu())
                    indices.append(batch.indices)
    except UserError as error:
        message = str(error)
    raise_on_all(message, accelerator, asked_to_stop())
    return gather_rows(torch.cat(parts), torch.cat(indices), accelerator)


def gather_rows(embeddings: Tensor, positions: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return all ranks' embeddings `[n, D]` and positions `[n]`, in the order of positions, on the CPU of every rank.

    They travel in blocks, so that a device never holds those of a whole data set.
    """
    device, longest = accelerator.device, torch.tensor(len(positions), device=accelerator.device)
    if accelerator.num_processes > 1:
        with naming_the_missing("the count of embeddings"):
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    parts, places = [], []
    for start in range(0, max(int(longest), 1), BLOCK):
        here = slice(start, start + BLOCK)
        batch = gather(embeddings[here].to(device), positions[here].to(device))  # positions in the place of labels
        parts.append(batch.embeddings.cpu())
        places.append(batch.labels.cpu())
    order = torch.cat(places).argsort()
    return torch.cat(parts)[order], torch.cat(places)[order]


def claim_output(out: RunFolder, accelerator: Accelerator) -> None:
    """Make a folder for results. Every rank must call it.

    Raises UserError on every rank if the folder is in use or cannot be made.
    """

    def claim() -> None:
        try:
            out.check_free()
            out.path.mkdir(parents=True, exist_ok=True)
        except UserError as error:
            raise UserError(str(error).split("; choose")[0] + "; choose another --output") from error

    run_on_main(claim, accelerator)


@contextmanager
def output_folder(out: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Claim a folder for results as `claim_output` does; after an error it is removed with what was written to it.

    Every rank must enter it.
    """
    claim_output(out, accelerator)
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):  # raised on all ranks; the others may be waiting elsewhere after any other one
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove_tree(out.path)
        raise


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
    """Write metrics.json, curves.json, plots/ and report.html into the folder; return the path of report.html.

    evaluations: of data sets; results: of the other protocols. figures: further entries of metrics.json. config: the
    settings of the run; None if the embeddings come from a file. history: rows of history.jsonl.
    """
    from partial_fc.training.report.plots import (  # matplotlib takes half a second to import
        plot_cmc,
        plot_dir,
        plot_histograms,
        plot_roc,
    )
    from partial_fc.training.report.training_plots import plot_training

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
    """Return the ranks, devices and versions, for the report."""
    return {
        "ranks": f"{accelerator.num_processes} on {accelerator.device.type}",
        "partial_fc": partial_fc.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "threads per rank": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(accelerator.device)
        if accelerator.device.type == "cuda"
        else platform.machine(),
    }


def load_backbone(
    folder: RunFolder, config: RunConfig, image_shape: tuple[int, int, int], checkpoint: Path | None = None
) -> nn.Module:
    """Return the backbone of a run's checkpoint, by default the newest one.

    Raises UserError if there is no checkpoint, or if its backbone does not fit images of `image_shape` (C, H, W).
    """
    checkpoint = checkpoint or folder.find_checkpoint()
    backbone = build_backbone(
        config.backbone.name,
        image_shape=image_shape,
        embedding_size=config.backbone.embedding_size,
        normalize_input=config.backbone.normalize_input,
    )
    try:
        load_checkpoint(checkpoint, backbone=backbone)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"cannot load the backbone of {folder.path} for images of shape {image_shape}: {error}"
        ) from error
    return backbone
