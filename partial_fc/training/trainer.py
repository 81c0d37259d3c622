"""A training run on Accelerate: backbone in an engine, head sharded over the same ranks, checkpoints, evaluation, report.

loader       this rank's part of a global micro-batch [n, C, H, W], labels [n]
backbone     embeddings [n, D]                            (DDP, FSDP2 or DeepSpeed averages its gradients: engine.py)
head         the loss of the global micro-batch            (PartialFC; its rows are this rank's)
center       center loss of the same, if it has a weight   (CenterLoss, on the exchange of the head)
each step    one gradient norm over backbone and head, both optimizers, both schedules, the centers
each epoch   a checkpoint (or every so many steps), from which the run goes on exactly; before it, if asked for, an evaluation
at the end   embeddings of identities never trained on, verification and identification, plots, one HTML page
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from partial_fc import DivergenceWatch, PreemptionGuard, RandomState, gather, import_weights, naming_the_missing
from partial_fc.training.backbones.counts import count_backbone
from partial_fc.training.config import RunConfig, save_config
from partial_fc.training.data import DataSplits, open_data
from partial_fc.training.data.labels import LABELS, LabelMap
from partial_fc.training.data.loader import Batch, BatchLoader, rank_loader
from partial_fc.training.engine import make_accelerator, make_engine
from partial_fc.training.errors import Preempted, UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.faults import Faults
from partial_fc.training.interval import check_metric, direction, figures_of, is_due, undisturbed
from partial_fc.training.micro_batches import MicroBatches, Progress
from partial_fc.training.mixing import ExtraHeads, MixedIdentities, mixed, sampler_of
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tasks import open_tasks
from partial_fc.training.ranks import launcher_is_gone
from partial_fc.training.report.hardest import note_confusions
from partial_fc.training.results import describe_environment, evaluate_sets, on_main, run_tasks, together, write_results
from partial_fc.training.run import DATA, UNREADABLE, RunFolder
from partial_fc.training.schedules import build_schedules
from partial_fc.training.step_log import StepLog


class Trainer:
    """One run of `config` in `config.output.folder`; with `resume`, from the newest checkpoint in it.

    guard: what notes signals, entered by the caller. When any rank was asked to stop, train() saves at the end of the step and raises
    Preempted on all; evaluate() raises it when a data set has been read.
    """

    def __init__(self, config: RunConfig, resume: bool = False, guard: PreemptionGuard | None = None) -> None:
        self.config, self.folder = config, RunFolder(config.output.folder)
        self.accelerator = make_accelerator(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.guard, self.faults = guard or PreemptionGuard(), Faults.of_environment(self.rank)
        self.on_main(self.folder.check_run if resume else self.folder.check_free)
        self.data: DataSplits = open_data(config.data, config.seed)
        self.data.check_evaluation()
        self.tasks = together(lambda: open_tasks(config.evaluation, self.data.train.image_shape), self.accelerator)
        check_metric(config.evaluation, list(self.data.evaluation), self.tasks)
        self.main_set, self.data.train = self.data.train, mixed(config, self.data.train)
        if config.train.batch_size < 2 * self.world * config.train.accumulation:
            raise UserError(
                f"--train.batch_size {config.train.batch_size} leaves fewer than two images for each of {self.world} ranks and "
                f"{config.train.accumulation} micro-batches, and batch statistics need two; give at least "
                f"{2 * self.world * config.train.accumulation}"
            )
        self.loader = self._loader()
        self.steps_per_epoch = len(self.loader) // config.train.accumulation
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(self.data.train)} training images make no batch of {config.train.batch_size}; lower --train.batch_size"
            )
        self._build(resume)
        self.progress, self._since = Progress(), time.monotonic()
        self._saved = -1  # the step of the newest checkpoint
        self.micro_batches = MicroBatches(
            self.loader,
            config.train.accumulation,
            self.progress,
            self.accelerator,
            self.folder,
            self.faults,
            self._asked_to_stop,
        )
        self.log = StepLog(config, self.folder, self.accelerator, self.progress, self.steps_per_epoch)
        self._evaluated: tuple[int, list[Evaluation], list[Result]] | None = (
            None  # the newest evaluation, and after which step it was
        )
        self.checkpointer = self.folder.checkpointer(
            keep_last=config.train.keep_last,
            keep_best=int(config.evaluation.best is not None),
            asynchronous=config.train.asynchronous_checkpoints,
            best=direction(config.evaluation.best),
            timeout=config.train.timeout,
        )
        if resume:
            self._resume()
        else:
            self._start()
            self.on_main(self._claim)

    def _build(self, resume: bool) -> None:
        config, device = self.config, self.accelerator.device
        width, identities = config.backbone.embedding_size, self.main_set.num_identities
        counts, policy = torch.bincount(self.main_set.labels, minlength=identities), config.train.policy
        self.head = config.head.build(width, counts, config.seed, device, **policy)
        self.extra = (
            ExtraHeads(config, self.data.train, device) if isinstance(self.data.train, MixedIdentities) else None
        )
        self.center = config.center.build(width, identities, config.seed, device, **policy)
        optimizers = config.optimizers
        self.head_optimizer = optimizers.build_head(self.head)
        torch.manual_seed(
            config.seed
        )  # the backbone's initial weights, alike on all ranks; and what they draw until the first epoch
        self._first: nn.Module | None = self._start_backbone(None if resume else config.backbone.weights)
        self.engine = make_engine(
            self.accelerator,
            self._backbone,
            lambda backbone: optimizers.build(backbone.parameters()),
            self.head,
            self.head_optimizer,
            config.train,
        )
        self.engine.beside = [] if self.center is None else [self.center]
        # what DeepSpeed's optimizers hold are shards, under names that do not say so
        whole = [] if self.engine.name.startswith("DeepSpeed") else [self.engine.optimizer]
        heads = [] if self.extra is None else self.extra.heads.values()
        watched = (self.engine.model, self.head, *heads, *self.engine.beside, *whole)
        self.watch = DivergenceWatch(*watched, every=config.train.watch_every) if config.train.watch_every else None
        self.schedules = build_schedules(
            config.schedule,
            config.head_schedule,
            (self.engine.optimizer, self.head_optimizer),
            self.steps_per_epoch,
            config.train.epochs,
        )
        if self.extra is not None:
            self.engine.add_heads(self.extra.heads.values(), self.extra.optimizers.values())
            self.schedules += self.extra.schedules(self.schedules[1])

    def _start_backbone(self, weights: str | None) -> nn.Module:
        """The backbone with the weights that it starts from, on every rank or on none; it is counted, too."""
        shape = self.data.train.image_shape
        built = together(lambda: self.config.backbone.build(shape, weights), self.accelerator)
        self.counts = count_backbone(built, shape)
        return built

    def _backbone(self) -> nn.Module:
        """The backbone to train, and then others like it, for weights of their own."""
        first, self._first = self._first, None
        return self.config.backbone.build(self.data.train.image_shape) if first is None else first

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
        self.folder.claim(self._write_settings)

    def _write_settings(self, path: Path) -> None:
        """What says what the run is: its data, and at `path`, last, its settings."""
        self._write_data()
        save_config(self.config, path)

    def _write_data(self) -> None:
        """The labels of its classes, and what the data are; what a start that was killed has left of either is gone."""
        for name, label_map in (self.extra.data.label_maps if self.extra is not None else {}).items():
            label_map.write(self.folder.path / f"labels_{name}.csv")
        (self.data.label_map or LabelMap.of(self.main_set.identity_names, self.main_set.labels)).write(
            self.folder.path / LABELS
        )
        for name in (DATA, UNREADABLE):
            (self.folder.path / name).unlink(missing_ok=True)
        self._note_data()

    def _note_data(self) -> None:
        """Note what the data are, or compare them with what they were when the run began; and samples of them that are damaged."""
        self.folder.check_data(self.data.fingerprint())
        self.folder.note_unreadable(
            [name for each in (self.data.train, *self.data.evaluation.values()) for name in each.left_out]
        )

    def _loader(self) -> BatchLoader:
        config = self.config
        return rank_loader(
            self.data.train,
            config.data,
            self.accelerator,
            batch_size=config.micro_batch,
            sampler=sampler_of(config, self.data.train),
            seed=config.seed,
            augment=config.augment,
        )

    # ------------------------------------------------------------------------------------------------ agreement

    def on_main(self, action: Callable[[], Any]) -> None:
        """Do something in one process; its UserError is raised in all."""
        on_main(action, self.accelerator)

    def _asked_to_stop(self) -> bool:
        """Whether this rank was: by a signal, or because its launcher has gone."""
        return self.guard.noted is not None or launcher_is_gone()

    def _leave(self) -> None:
        """Save, unless the newest checkpoint is of this step, and raise Preempted; all ranks have agreed to."""
        if self._saved != self.progress.step:
            self._save()
        self.checkpointer.wait()
        why = (
            self.guard.noted.name
            if self.guard.noted
            else "its launcher has gone"
            if launcher_is_gone()
            else "asked on another rank"
        )
        raise Preempted(
            f"stopped after step {self.progress.step} ({why}), which is saved; --resume {self.folder.path}, or the same command with "
            "--start_or_resume, goes on"
        )

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """All epochs that are left; Preempted if a rank was asked to stop."""
        config = self.config
        self.log.begin()
        self.accelerator.print(f"backbone {config.backbone.name}: {self.counts}")
        total = self.steps_per_epoch * config.train.epochs
        taken, count = self.steps_per_epoch * config.train.batch_size, len(self.data.train)
        if taken < count:
            self.accelerator.print(
                f"an epoch takes {taken:,} of {count:,} images, in whole steps, and leaves out others each time"
            )
        bar = tqdm(
            total=total,
            initial=self.progress.step,
            unit="step",
            desc="training",
            disable=not self.main,
            mininterval=0.5,
        )
        self._since = time.monotonic()
        with bar:
            if (
                self.progress.step and self.progress.evaluated != self.progress.step
            ):  # an evaluation that was due may have been stopped
                epochs = None if self.progress.batches else self.progress.epoch
                self._evaluate_and_save(False, epochs=epochs, last=epochs == config.train.epochs)
            for epoch in range(self.progress.epoch, config.train.epochs):
                with naming_the_missing(f"a step of epoch {epoch + 1}"):  # in the reductions of the backbone's engine
                    self._epoch(epoch, bar)
                if self.micro_batches.stopping:
                    self._leave()
                self.progress.end_epoch()
                last = epoch + 1 == config.train.epochs
                self._evaluate_and_save(
                    last or (epoch + 1) % config.train.checkpoint_every == 0, epochs=epoch + 1, last=last
                )
        self.checkpointer.wait()

    def _epoch(self, epoch: int, bar: Any) -> None:
        """What is left of an epoch: from the batch on at which a resumed run was saved."""
        self.loader.set_epoch(epoch)
        self.micro_batches.begin_epoch()
        self.engine.model.train()
        self.head.train()
        if self.extra is not None:
            self.extra.train()
        # closed however the epoch ends: a traceback would keep processes that load images waiting for it
        with closing(self.loader.iterate(self.progress.batches)) as own:
            self._steps(self.micro_batches.steps(own), epoch, bar)
        if not self.micro_batches.stopping and (epoch == 0 or not self.progress.taken):
            warning = self.micro_batches.check_readable()
            if warning is not None:
                self.accelerator.print(warning)

    def _steps(self, steps: Iterator[list[Batch]], epoch: int, bar: Any) -> None:
        every, accumulation = self.config.train.checkpoint_steps, self.config.train.accumulation
        for whole in steps:
            self.head.collect_metrics = self.log.is_due(self.progress.step + 1)
            for batch in whole:
                with self.engine.accumulate():
                    losses, last = self._forward_backward(batch.to(self.accelerator.device))
                    norm = self._step() if last else None
            self.progress.step += 1
            self.log.step(losses, norm, self.head, float(self.schedules[0].get_last_lr()[0]))
            bar.update()
            if self.progress.step % self.config.output.log_every == 0:
                bar.set_postfix(epoch=epoch + 1, loss=f"{float(losses['loss']):.3f}")
            if (
                self.progress.taken < self.steps_per_epoch * accumulation
            ):  # what is due at the end of an epoch is done there
                self._evaluate_and_save(every is not None and self.progress.step % every == 0)

    def _forward_backward(self, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """(what was minimised, `loss`, and the part of it that is center loss, before its weight; whether a step is due)."""
        with self.engine.autocast():
            embeddings = self.engine.model(batch.images)
            self.faults.at("forward", self.progress.step + 1)
            self.faults.when_backward_reaches(embeddings, self.progress.step + 1)
            if self.extra is not None:
                losses = self.extra.losses(
                    self.head, gather(embeddings, self.extra.labels(batch.labels, self.head.ignore_index))
                )
            elif self.center is None:
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
        self.faults.at("optimizer", self.progress.step + 1)
        if self.center is not None:
            self.center.step()  # only forgets what it has noted, if the step was left out
        for schedule in self.schedules:
            schedule.step()
        if self.watch is not None:
            self.watch.step(self.progress.step + 1)
        return norm

    # ------------------------------------------------------------------------------------------------ evaluation and checkpoints

    def _evaluate_and_save(self, save: bool, *, epochs: int | None = None, last: bool = False) -> None:
        """What is due after a step: an evaluation, and then (so that a resumed run has both) a checkpoint, if `save` or for a figure."""
        step, settings, metric = self.progress.step, self.config.evaluation, None
        if is_due(settings, step, epochs, last) and (self._evaluated is None or self._evaluated[0] != step):
            before = time.monotonic()
            try:
                with undisturbed(self.engine.model):
                    figures = figures_of(*self._measure(pictures=last))
            except Preempted:
                self._leave()  # the resumed run evaluates first
            self.log.figures(figures)
            self._since += time.monotonic() - before  # seconds are of training
            save = save or settings.best is not None
        if settings.best is not None and self._evaluated is not None and self._evaluated[0] == step:
            metric = figures_of(*self._evaluated[1:]).get(settings.best)
        if save:
            self._save(metric)

    def _measure(self, *, pictures: bool) -> tuple[list[Evaluation], list[Result]]:
        """All figures of the backbone as it is now; computed once a step."""
        if self._evaluated is None or self._evaluated[0] != self.progress.step:
            backbone, settings = self.engine.whole_backbone(), (self.accelerator, self.config, self.folder)
            evaluations = evaluate_sets(
                backbone, self.data.evaluation, *settings, self._asked_to_stop, pictures=pictures
            )
            results = run_tasks(backbone, self.tasks, *settings, self._asked_to_stop, pictures=pictures)
            self._evaluated, self.progress.evaluated = (self.progress.step, evaluations, results), self.progress.step
        return self._evaluated[1:]

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
        if self.extra is not None:
            named.update(self.extra.named())
        return named if self.center is None else {**named, "center": self.center}

    def _save(self, metric: float | None = None) -> None:
        self.engine.agree_on_buffers()
        now = time.monotonic()
        self.progress.seconds, self._since = self.progress.seconds + now - self._since, now
        self.faults.when_written(self.progress.step)
        self.checkpointer.save(self.progress.step, metric=metric, **self._named())
        self._saved = self.progress.step

    def _resume(self) -> None:
        self.checkpointer.claim()
        try:
            self._saved = self.checkpointer.load(**self._named())
            self.accelerator.print(f"resuming after epoch {self.progress.epoch}, step {self.progress.step}")
        except FileNotFoundError:
            self.accelerator.print(f"{self.folder.path} has no checkpoint yet: starting from the beginning")
            self.on_main(self._write_data)  # nothing was trained on what they were
        except ValueError as error:
            raise UserError(f"cannot resume: {error}") from error
        self.on_main(self._note_data)
        self.on_main(lambda: self.folder.note_place(self.config.data.folder))
        self.on_main(self._rewind)

    def _rewind(self) -> None:
        again = self.folder.rewind_history(self.progress.step)
        if again:
            self.accelerator.print(f"{again} steps that were logged after it are computed again")

    # ------------------------------------------------------------------------------------------------ results

    def evaluate(self) -> list[Evaluation]:
        """Verification and identification on every set of identities that were not trained on; then `results` has other protocols'."""
        self.faults.at("evaluation", self.progress.step)
        found = self._measure(pictures=True)[0]
        note_confusions(self.folder.path, self.head, self.main_set, self.accelerator)
        return found

    @property
    def results(self) -> list[Result]:
        """Figures of the protocols that the settings name, of the newest evaluation."""
        return [] if self._evaluated is None else self._evaluated[2]

    def write_results(self, evaluations: list[Evaluation]) -> Path | None:
        """metrics.json, plots and the report, by one process; the report's path there."""
        self.accelerator.wait_for_everyone()
        if not self.main:
            return None
        training = {
            "backbone_parameters": self.counts.parameters,
            "backbone_operations_an_image": self.counts.operations,
            "seconds": round(self.progress.seconds, 1),
            "images_per_second": round(
                self.progress.step * self.config.train.batch_size / max(self.progress.seconds, 1e-9), 1
            ),
            "data_wait": round(self.progress.waited / max(self.progress.seconds, 1e-9), 4),
            "steps": self.progress.step,
            "identities": self.data.train.num_identities,
            "images": len(self.data.train),
            "images_an_epoch": self.steps_per_epoch * self.config.train.batch_size,
            "unreadable_images": len(self.folder.unreadable()),
            "left_out_batches": self.progress.left_out,
            "skipped_steps": self.head.skips,
        }
        losses = self.config.head.margin.name + ("" if self.center is None else " and center loss")
        title = f"{self.config.backbone.name} with {losses} on {self.data.train.num_identities:,} identities"
        backbone = f"{self.config.backbone.name}, {self.counts}"
        environment = {"engine": self.engine.name, "backbone": backbone, **describe_environment(self.accelerator)}
        return write_results(
            self.folder,
            title,
            evaluations,
            {"training": training},
            self.config,
            environment,
            self.folder.history(),
            self.results,
        )

    def close(self) -> None:
        """Leave the process group in order; without it gloo aborts now and then at exit."""
        self.accelerator.wait_for_everyone()
        self.engine.close()
        self.accelerator.end_training()
