"""A training run on Accelerate: backbone in an engine, head sharded over the same ranks, checkpoints, evaluation, report.

loader       this rank's part of a global micro-batch [n, C, H, W], labels [n]
backbone     embeddings [n, D]                            (DDP, FSDP2 or DeepSpeed averages its gradients: engine.py)
head         the loss of the global micro-batch            (PartialFC; its rows are this rank's)
center       center loss of the same, if it has a weight   (CenterLoss, on the exchange of the head)
each step    one gradient norm over backbone and head, both optimizers, both schedules, the centers
each epoch   a checkpoint (or every so many steps), from which the run goes on exactly
at the end   embeddings of identities never trained on, verification and identification, plots, one HTML page
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from partial_fc import RandomState, gather, import_weights
from partial_fc.shards import local_part
from partial_fc.training.backbones import build_backbone
from partial_fc.training.config import RunConfig, flat, save_config
from partial_fc.training.data import DataSplits, open_data
from partial_fc.training.engine import make_accelerator, make_engine
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.loader import Batch, BatchLoader, choose_workers
from partial_fc.training.results import describe_environment, evaluate_sets, raise_together, write_results
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.schedules import build_schedules


class Progress:
    """How far a run is; part of its checkpoints.

    epoch: epochs that are complete. step: optimizer steps. batches, taken: micro-batches of the epoch that were read, and of them those
    that were trained on. left_out: micro-batches that were not, in all epochs. seconds: of training. waited: those of them that went by
    waiting for the loader of the first rank.
    """

    def __init__(self) -> None:
        self.epoch, self.step, self.batches, self.taken, self.left_out, self.seconds, self.waited = 0, 0, 0, 0, 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """One run of `config` in `config.output.folder`; with `resume`, from the newest checkpoint in it."""

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        self.config, self.folder = config, RunFolder(config.output.folder)
        self.accelerator = make_accelerator(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.on_main(self.folder.check_run if resume else self.folder.check_free)
        self.data: DataSplits = open_data(config.data, config.seed)
        self.data.check_evaluation()
        if config.train.batch_size < 2 * self.world * config.train.accumulation:
            raise UserError(
                f"--train.batch_size {config.train.batch_size} leaves fewer than two images for each of {self.world} ranks and "
                f"{config.train.accumulation} micro-batches, and batch statistics need two; give at least "
                f"{2 * self.world * config.train.accumulation}"
            )
        self.loader = self._loader()
        self.steps_per_epoch = len(self.loader) // config.train.accumulation
        if not self.steps_per_epoch:
            raise UserError(f"{len(self.data.train)} training images make no batch of {config.train.batch_size}; lower --train.batch_size")
        self._build()
        self.progress, self._since, self._logged = Progress(), time.monotonic(), (0.0, time.monotonic())
        self.checkpointer = self.folder.checkpointer(keep_last=config.train.keep_last, asynchronous=config.train.asynchronous_checkpoints)
        if resume:
            self._resume()
        else:
            self._start()
            self.on_main(self._claim)

    def _build(self) -> None:
        config, device = self.config, self.accelerator.device
        width, identities = config.backbone.embedding_size, self.data.train.num_identities
        self.head = config.head.build(width, torch.bincount(self.data.train.labels, minlength=identities), config.seed, device)
        self.center = config.center.build(width, identities, config.seed, device)
        self.head_optimizer = config.optimizer.build_head(self.head)
        torch.manual_seed(config.seed)  # the backbone's initial weights, alike on all ranks; and what they draw until the first epoch
        self.engine = make_engine(
            self.accelerator,
            partial(build_backbone, config.backbone.name, image_shape=self.data.train.image_shape, embedding_size=width),
            lambda backbone: config.optimizer.build(backbone.parameters()),
            self.head,
            self.head_optimizer,
            config.train,
        )
        optimizers = (self.engine.optimizer, self.head_optimizer)
        self.schedules = build_schedules(config.schedule, config.head_schedule, optimizers, self.steps_per_epoch, config.train.epochs)

    def _start(self) -> None:
        """Class weights that the settings name."""
        if self.config.head.weights is None:
            return
        try:
            import_weights(self.config.head.weights, self.head)
        except (OSError, ValueError) as error:
            raise UserError(f"--head.weights: {error}") from error

    def _claim(self) -> None:
        """Take the run folder, last of all: a mistake in the settings leaves no folder behind."""
        self.folder.claim()
        save_config(self.config, self.folder.path / CONFIG)
        self._note_data()

    def _note_data(self) -> None:
        """Note what the data are, or compare them with what they were when the run began; and samples of them that are damaged."""
        self.folder.check_data(self.data.fingerprint())
        self.folder.note_unreadable([name for each in (self.data.train, *self.data.evaluation.values()) for name in each.left_out])

    def _loader(self) -> BatchLoader:
        config, cuda = self.config, self.accelerator.device.type == "cuda"
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        chosen = choose_workers(self.data.train, ranks, cuda) if config.data.workers is None else config.data.workers
        return BatchLoader(
            self.data.train,
            batch_size=config.train.batch_size // config.train.accumulation,
            rank=self.rank,
            world=self.world,
            seed=config.seed,
            augment=config.augment,
            workers=chosen,
            prefetch=config.data.prefetch,
            pin=cuda,
            on_error=config.data.on_error,
        )

    # ------------------------------------------------------------------------------------------------ agreement

    def on_main(self, action: Callable[[], Any]) -> None:
        """Do something in one process; its UserError is raised in all."""
        message = None
        if self.main:
            try:
                action()
            except UserError as error:
                message = str(error)
        raise_together(message, self.accelerator)

    def together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches that all ranks can use. A rank's UserError is raised on all; a micro-batch of which some rank could read
        fewer than two images (batch statistics need two) is left out by all, and counted."""
        while True:
            batch, message = None, None
            began = time.monotonic()
            try:
                batch = next(batches, None)
            except UserError as error:
                message = str(error)
            self.progress.waited += time.monotonic() - began
            count = -2 if message else -1 if batch is None else len(batch.labels)
            if self.world > 1:
                agreed = torch.tensor([count], device=self.accelerator.device)
                dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
                count = int(agreed)
            if count == -2:
                raise_together(message, self.accelerator)
            if batch is None or count == -1:
                return
            self.folder.note_unreadable(batch.unreadable)
            self.progress.batches += 1
            if count >= 2:
                self.progress.taken += 1
                yield batch
            else:
                self.progress.left_out += 1

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """All epochs that are left."""
        config = self.config
        self.accelerator.init_trackers("tensorboard", config={k: v if v is not None else "none" for k, v in _scalars(config).items()})
        total = self.steps_per_epoch * config.train.epochs
        bar = tqdm(total=total, initial=self.progress.step, unit="step", desc="training", disable=not self.main, mininterval=0.5)
        self._since = time.monotonic()
        self._logged = (self.progress.waited, self._since)
        with bar:
            for epoch in range(self.progress.epoch, config.train.epochs):
                self._epoch(epoch, bar)
                self.progress.epoch, self.progress.batches, self.progress.taken = epoch + 1, 0, 0
                if (epoch + 1) % config.train.checkpoint_every == 0 or epoch + 1 == config.train.epochs:
                    self._save()
        self.checkpointer.wait()

    def _epoch(self, epoch: int, bar: Any) -> None:
        """What is left of an epoch: from the batch on at which a resumed run was saved."""
        micro_batches = self.steps_per_epoch * self.config.train.accumulation
        self.loader.set_epoch(epoch)
        self.engine.model.train()
        self.head.train()
        batches = self.together(self.loader.iterate(self.progress.batches))
        while self.progress.taken < micro_batches and (batch := next(batches, None)) is not None:
            self.head.collect_metrics = self._is_logged(self.progress.step + 1)
            with self.engine.accumulate():
                losses, last = self._forward_backward(batch.to(self.accelerator.device))
                if last:
                    norm = self._step()
                    self.progress.step += 1
                    self._log(losses, norm)
                    bar.update()
                    if self.progress.step % self.config.output.log_every == 0:
                        bar.set_postfix(epoch=epoch + 1, loss=f"{float(losses['loss']):.3f}")
                    every = self.config.train.checkpoint_steps
                    if every is not None and self.progress.step % every == 0 and self.progress.taken < micro_batches:
                        self._save()

    def _forward_backward(self, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """(what was minimised, `loss`, and the part of it that is center loss, before its weight; whether a step is due)."""
        with self.engine.autocast():
            embeddings = self.engine.model(batch.images)
            if self.center is None:
                losses = {"loss": self.head(embeddings, batch.labels)}
            else:
                everyone = gather(embeddings, batch.labels)
                distance = self.center(everyone)
                losses = {"loss": self.head(everyone) + self.config.center.weight * distance, "center_loss": distance}
        last = self.engine.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}, last

    def _step(self) -> Tensor | None:
        """One optimizer step of backbone, head, centers and schedules; the norm of the gradient if it is clipped."""
        norm = self.engine.step()
        if self.center is not None and not self.engine.skipped:
            self.center.step()  # what a skipped step has noted counts in the next one
        for schedule in self.schedules:
            schedule.step()
        return norm

    def _is_logged(self, step: int) -> bool:
        return step == 1 or step % self.config.output.log_every == 0

    def _log(self, losses: dict[str, Tensor], norm: Tensor | None) -> None:
        step = self.progress.step
        if not self._is_logged(step):
            return
        measured = {**losses, **self.head.metrics, **self._margin_state(), **({} if norm is None else {"grad_norm": norm})}
        values = torch.stack([value.float() for value in measured.values()]).tolist()  # one wait for the device
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "learning_rate": float(self.schedules[0].get_last_lr()[0]),
            "data_wait": self._data_wait(),
            **dict(zip(measured, values, strict=True)),
        }
        if self.main:
            self.folder.append_history(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def _data_wait(self) -> float:
        """The share of the time since the last logged step in which this rank waited for its loader."""
        (waited, since), now = self._logged, time.monotonic()
        self._logged = (self.progress.waited, now)
        return round((self.progress.waited - waited) / max(now - since, 1e-9), 4)

    def _margin_state(self) -> dict[str, Tensor]:
        """Single numbers that move with the margin, under its name: curricular_t, adaface_mean, adaface_std, sphereface2_offset."""
        margin = self.head.margin
        found = {name: local_part(value.detach()) for name, value in (*margin.named_buffers(), *margin.named_parameters())}
        return {f"{self.config.head.margin}_{name}": value.reshape(()) for name, value in found.items() if value.numel() == 1}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _named(self) -> dict[str, Any]:
        named = {
            **self.engine.named(),
            "head": self.head,
            "head_optimizer": self.head_optimizer,
            "schedule": self.schedules[0],
            "head_schedule": self.schedules[1],
            "progress": self.progress,
            "random": RandomState(),
        }
        return named if self.center is None else {**named, "center": self.center}

    def _save(self) -> None:
        self.engine.agree_on_buffers()
        now = time.monotonic()
        self.progress.seconds, self._since = self.progress.seconds + now - self._since, now
        self.checkpointer.save(self.progress.step, **self._named())

    def _resume(self) -> None:
        self.checkpointer.claim()
        try:
            self.checkpointer.load(**self._named())
            self.accelerator.print(f"resuming after epoch {self.progress.epoch}, step {self.progress.step}")
        except FileNotFoundError:
            self.accelerator.print(f"{self.folder.path} has no checkpoint yet: starting from the beginning")
        except ValueError as error:
            raise UserError(f"cannot resume: {error}") from error
        self.on_main(lambda: self.folder.rewind_history(self.progress.step))
        self.on_main(self._note_data)

    # ------------------------------------------------------------------------------------------------ results

    def evaluate(self) -> list[Evaluation]:
        """Verification and identification on every set of identities that were not trained on."""
        return evaluate_sets(self.engine.whole_backbone(), self.data.evaluation, self.accelerator, self.config, self.folder)

    def write_results(self, evaluations: list[Evaluation]) -> Path | None:
        """metrics.json, plots and the report, by one process; the report's path there."""
        self.accelerator.wait_for_everyone()
        if not self.main:
            return None
        training = {
            "seconds": round(self.progress.seconds, 1),
            "images_per_second": round(self.progress.step * self.config.train.batch_size / max(self.progress.seconds, 1e-9), 1),
            "data_wait": round(self.progress.waited / max(self.progress.seconds, 1e-9), 4),
            "steps": self.progress.step,
            "identities": self.data.train.num_identities,
            "images": len(self.data.train),
            "unreadable_images": len(self.folder.unreadable()),
            "left_out_batches": self.progress.left_out,
        }
        losses = self.config.head.margin if self.center is None else f"{self.config.head.margin} and center loss"
        title = f"{self.config.backbone.name} with {losses} on {self.data.train.num_identities:,} identities"
        environment = {"engine": self.engine.name, **describe_environment(self.accelerator)}
        return write_results(self.folder, title, evaluations, {"training": training}, self.config, environment, self.folder.history())

    def close(self) -> None:
        """Leave the process group in order; without it gloo aborts now and then at exit."""
        self.accelerator.wait_for_everyone()
        self.engine.close()
        self.accelerator.end_training()


def _scalars(config: RunConfig) -> dict[str, Any]:
    return {name: value if isinstance(value, int | float | str | bool | None) else str(value) for name, value in flat(config).items()}
