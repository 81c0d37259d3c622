"""A training run on Accelerate: backbone in an engine, sharded head, checkpoints, evaluation, report.

loader       this rank's part of a global micro-batch: images [n, C, H, W], labels [n]
backbone     embeddings [n, D]                              (DDP, FSDP2 or DeepSpeed averages its gradients: engine.py)
head         loss of the global micro-batch                 (PartialFC, sharded over the ranks)
center       center loss of the same, if it has a weight    (CenterLoss, on the batch that was gathered for the head)
each step    one gradient norm over backbone and head; the optimizers, the schedules and the centers
each epoch   a checkpoint (or every so many steps), which the run resumes from exactly; before it an evaluation, if due
at the end   evaluation on identities that were not trained on, plots, one HTML page
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from partial_fc import PreemptionGuard, RandomState, gather, import_weights, naming_the_missing
from partial_fc.training.all_ranks import run_on_all, run_on_main, run_on_main_for_all
from partial_fc.training.config import RunConfig, save_config
from partial_fc.training.data import DataSplits, open_data
from partial_fc.training.data.labels import LABELS, LabelMap
from partial_fc.training.data.loader import Batch, BatchLoader, rank_loader
from partial_fc.training.engine import make_accelerator
from partial_fc.training.errors import Preempted, UserError
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.faults import Faults
from partial_fc.training.interval import check_best, direction, undisturbed
from partial_fc.training.micro_batches import MicroBatches, Progress
from partial_fc.training.mixing import mixed, sampler_of
from partial_fc.training.protocols.result import Result
from partial_fc.training.ranks import device_line, launcher_has_exited
from partial_fc.training.report.hardest import note_confusions
from partial_fc.training.results import describe_environment, write_results
from partial_fc.training.run import DATA, UNREADABLE, RunFolder
from partial_fc.training.run_data import held_out_of_weights
from partial_fc.training.run_evaluation import RunEvaluation
from partial_fc.training.run_parts import build_parts, check_sizes, checked_weights
from partial_fc.training.shared_folder import check_same_start, check_shared
from partial_fc.training.step_log import StepLog


class Trainer:
    """One run of `config` in `config.output.folder`; with `resume`, from the newest checkpoint in it.

    guard: records signals; the caller has entered it. If any rank was asked to stop, train() saves after the current
    step and raises Preempted on all ranks; evaluate() raises it after the current data set.
    """

    def __init__(self, config: RunConfig, resume: bool = False, guard: PreemptionGuard | None = None) -> None:
        self.config = config
        self.folder = RunFolder(config.output.folder)
        self.accelerator = make_accelerator(config)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.guard = guard or PreemptionGuard()
        self.faults = Faults.of_environment(self.rank)
        self.progress = Progress()
        check_same_start(self.folder.path, resume, self.accelerator)
        self.on_main(self.folder.check_run if resume else self.folder.check_free)
        if resume:
            check_shared(self.folder.path, self.accelerator)
        self.on_main(config.output.check_trackers)
        self.data: DataSplits = open_data(config.data, config.seed)
        self.main_set = self.data.train
        self.data.train = mixed(config, self.main_set)
        if resume:  # before all that depends on the number of images and identities
            self.on_main(self._check_resumed_data)
        self.data.check_evaluation()
        self.evaluation = RunEvaluation(
            config, self.data, self.accelerator, self.folder, self.progress, self._asked_to_stop
        )
        if not resume:  # an older run may have such a figure
            check_best(config.evaluation, self.data.evaluation)
        check_sizes(config, self.main_set, self.data.train, self.world, self.accelerator.device)
        self.loader = self._loader()
        self.steps_per_epoch = len(self.loader) // config.train.accumulation
        parts = build_parts(config, self.main_set, self.data.train, self.accelerator, self.steps_per_epoch, resume)
        self.head = parts.head
        self.head_optimizer = parts.head_optimizer
        self.extra = parts.extra
        self.center = parts.center
        self.engine = parts.engine
        self.counts = parts.counts
        self.schedules = parts.schedules
        self.margin_schedules = parts.margin_schedules
        self.watch = parts.watch
        self._since = time.monotonic()  # progress.seconds counts the time up to here
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
        self.checkpointer = self.folder.checkpointer(
            keep_last=config.train.keep_last,
            keep_best=int(config.evaluation.best is not None),
            asynchronous=config.train.asynchronous_checkpoints,
            best=direction(config.evaluation.best),
            timeout=config.train.timeout,
        )
        self.on_main(self.log.trackers.prepare)
        if resume:
            self._resume()
        else:
            self._import_class_weights()
            warning = run_on_main_for_all(lambda: held_out_of_weights(config, self.data), self.accelerator)
            if warning is not None:
                self.accelerator.print(warning)
            self.take_folder()  # last, so that a mistake in the settings leaves no folder behind

    def _import_class_weights(self) -> None:
        """Load the class weights that the settings name."""
        # of the first rank: a run that still saves may show each rank another checkpoint
        names = self.main_set.identity_names
        source = run_on_main_for_all(lambda: checked_weights(self.config, self.head, names), self.accelerator)
        if source is None:
            return
        try:
            import_weights(source, self.head)
            if self.head.hard_negatives:
                self.head.refresh_hard_negatives()  # the rows are worth a search before training moves them
        except (OSError, ValueError) as error:
            raise UserError(f"--head.weights: {error}") from error

    def take_folder(self) -> None:
        """Make the run folder, which all ranks must see."""
        self.on_main(self.claim_folder)
        check_shared(self.folder.path, self.accelerator)

    def claim_folder(self) -> None:
        """Make the run folder, with the records of the data and the settings, and start the trackers; called on the
        main process."""
        self.folder.claim(self._write_settings)

    def _write_settings(self, path: Path) -> None:
        self._write_data_records()
        self.log.open_trackers(resumed=False)  # one that fails leaves a folder that is still free
        save_config(self.config, path)

    def _write_data_records(self) -> None:
        """Write the labels and the fingerprint of the data; files that a killed start has left are overwritten."""
        label_maps = {} if self.extra is None else self.extra.data.label_maps
        for name, label_map in label_maps.items():
            label_map.write(self.folder.path / f"labels_{name}.csv")
        main_map = self.data.label_map or LabelMap.of(self.main_set.identity_names, self.main_set.labels)
        main_map.write(self.folder.path / LABELS)
        for name in (DATA, UNREADABLE):
            (self.folder.path / name).unlink(missing_ok=True)
        self._check_data()

    def _check_data(self) -> None:
        """Save the fingerprint of the data, or compare it with the saved one; record damaged samples."""
        self.folder.check_data(self.data.fingerprint())
        sets = (self.data.train, *self.data.evaluation.values())
        self.folder.record_unreadable([name for each in sets for name in each.skipped])

    def _check_resumed_data(self) -> None:
        """Compare the data with those of the run, unless nothing was trained on them yet."""
        if self.folder.newest_checkpoint() is not None:
            self._check_data()

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

    # ------------------------------------------------------------------------------------------------ stopping

    def on_main(self, action: Callable[[], Any]) -> None:
        """Run `action` on the main process; its UserError is raised on every rank."""
        run_on_main(action, self.accelerator)

    def _asked_to_stop(self) -> bool:
        """Return whether this rank was asked to stop: by a signal, or because its launcher has exited."""
        return self.guard.noted is not None or launcher_has_exited()

    def _save_and_stop(self) -> None:
        """Save, unless this step is saved already, and raise Preempted. Every rank calls it."""
        if self._saved != self.progress.step:
            self._save()
        self.checkpointer.wait()
        if self.guard.noted:
            why = self.guard.noted.name
        elif launcher_has_exited():
            why = "its launcher has exited"
        else:
            why = "requested on another rank"
        raise Preempted(
            f"stopped after step {self.progress.step} ({why}), which is saved; continue with --resume "
            f"{self.folder.path}, or with the same command and --start_or_resume"
        )

    # ------------------------------------------------------------------------------------------------ training

    def train(self) -> None:
        """Train the remaining epochs. Raises Preempted on every rank if one was asked to stop."""
        config = self.config
        run_on_all(self.log.begin, self.accelerator)
        self.accelerator.print(device_line(config.train.cpu))
        self.accelerator.print(f"backbone {config.backbone.name}: {self.counts}")
        self.accelerator.print(f"augmentation: {config.augment}")
        for note in self.data.train.notes:
            self.accelerator.print(f"note: {note}")
        total = self.steps_per_epoch * config.train.epochs
        used = self.steps_per_epoch * config.train.batch_size
        count = len(self.data.train)
        if used < count:
            text = f"an epoch uses {used:,} of {count:,} images, in complete steps; each epoch leaves out others"
            drawn = self.loader.sampler.length  # other samplers than shuffled draw fewer than there are, by design
            if drawn - used > drawn / 10:
                text += (
                    f" (a step takes {config.train.batch_size:,}, and {drawn - used:,} are left over; a smaller "
                    "--train.batch_size leaves out fewer)"
                )
            self.accelerator.print(text)
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
            # the run may have been stopped during an evaluation that was due
            if self.progress.step and self.progress.evaluated != self.progress.step:
                epochs = None if self.progress.batches else self.progress.epoch
                self._evaluate_and_save(False, epochs=epochs, last=epochs == config.train.epochs)
            for epoch in range(self.progress.epoch, config.train.epochs):
                with naming_the_missing(f"a step of epoch {epoch + 1}"):  # for the collectives of the backbone's engine
                    self._train_epoch(epoch, bar)
                self.micro_batches.raise_failure()
                if self.micro_batches.stopping:
                    self._save_and_stop()
                self.progress.end_epoch()
                last = epoch + 1 == config.train.epochs
                save = last or (epoch + 1) % config.train.checkpoint_every == 0
                self._evaluate_and_save(save, epochs=epoch + 1, last=last)
        self.checkpointer.wait()

    def _train_epoch(self, epoch: int, bar: Any) -> None:
        """Train the rest of an epoch: a resumed run starts at the batch where it was saved."""
        self.loader.set_epoch(epoch)
        self.micro_batches.begin_epoch()
        self.engine.model.train()
        self.head.train()
        if self.extra is not None:
            self.extra.train()
        # closed even after an error: its traceback would otherwise keep the worker processes of the loader alive
        with closing(self.loader.iterate(self.progress.batches)) as batches:
            self._train_steps(self.micro_batches.steps(batches), epoch, bar)
        if not self.micro_batches.stopping and (epoch == 0 or not self.progress.taken):
            warning = self.micro_batches.check_readable()
            if warning is not None:
                self.accelerator.print(warning)

    def _train_steps(self, steps: Iterator[list[Batch]], epoch: int, bar: Any) -> None:
        every = self.config.train.checkpoint_steps
        micro_batches_per_epoch = self.steps_per_epoch * self.config.train.accumulation
        for micro_batches in steps:
            self.head.collect_metrics = self.log.is_due(self.progress.step + 1)
            for batch in micro_batches:
                with self.engine.accumulate():
                    losses, last = self._forward_backward(batch.to(self.accelerator.device))
                    norm = self._step() if last else None
            self.progress.step += 1
            try:
                self.log.step(losses, norm, self.head, float(self.schedules[0].get_last_lr()[0]))
            except OSError as error:  # of the main process; the others hear of it with the next micro-batch
                self.micro_batches.fail(error)
            bar.update()
            if self.progress.step % self.config.output.log_every == 0:
                bar.set_postfix(epoch=epoch + 1, loss=f"{float(losses['loss']):.3f}")
            if self.progress.taken < micro_batches_per_epoch:  # train() saves at the end of an epoch
                self._evaluate_and_save(every is not None and self.progress.step % every == 0)

    def _forward_backward(self, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """Return (losses, whether a step is due). `loss` is the minimised sum; the others are its unweighted parts."""
        with self.engine.autocast():
            embeddings = self.engine.model(batch.images)
            self.faults.at("forward", self.progress.step + 1)
            self.faults.when_backward_reaches(embeddings, self.progress.step + 1)
            if self.extra is not None:
                labels = self.extra.labels(batch.labels, self.head.ignore_index)
                losses = self.extra.losses(self.head, gather(embeddings, labels))
            elif self.center is None:
                losses = {"loss": self.head(embeddings, batch.labels)}
            else:
                global_batch = gather(embeddings, batch.labels)
                center_loss = self.center(global_batch)
                loss = self.head(global_batch) + self.config.center.weight * center_loss
                losses = {"loss": loss, "center_loss": center_loss}
        last = self.engine.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}, last

    def _step(self) -> Tensor | None:
        """Update backbone, head, centers and learning rates; return the gradient norm if it is clipped."""
        norm = self.engine.step()
        self.faults.at("optimizer", self.progress.step + 1)
        if self.center is not None:
            self.center.step()  # if the step was skipped, it only discards what it has collected
        schedules: list[Any] = [*self.schedules, *self.margin_schedules.values()]
        for schedule in schedules:
            schedule.step()
        if self.watch is not None:
            self.watch.step(self.progress.step + 1)
        return norm

    # ------------------------------------------------------------------------------------- evaluation and checkpoints

    def _evaluate_and_save(self, save: bool, *, epochs: int | None = None, last: bool = False) -> None:
        """After a step, evaluate if that is due, then save if `save` is set or the evaluation may have been the best.

        The checkpoint comes last, so that it contains the evaluation. epochs, last: as of `interval.is_due`.
        """
        best = self.config.evaluation.best
        if self.evaluation.is_due(epochs, last):
            before = time.monotonic()
            try:
                with undisturbed(self.engine.model):
                    self.evaluation.measure(self.engine, pictures=last)
            except Preempted:
                self._save_and_stop()  # the resumed run evaluates first
            run_on_all(lambda: self.log.figures(self.evaluation.figures), self.accelerator)
            self._since += time.monotonic() - before  # progress.seconds does not count evaluations
            save = save or best is not None
        if save:
            self.micro_batches.raise_failure()  # a run that goes on from here would lack what could not be written
            figures = self.evaluation.figures if self.evaluation.is_current else {}
            self._save(None if best is None else figures.get(best))

    def _checkpoint_parts(self) -> dict[str, Any]:
        """Return everything that a checkpoint holds, by its name there."""
        named = {
            **self.engine.named(),
            "head": self.head,
            "head_optimizer": self.head_optimizer,
            "schedule": self.schedules[0],
            "head_schedule": self.schedules[1],
            **self.margin_schedules,
            "progress": self.progress,
            "random": RandomState(),
        }
        if self.extra is not None:
            named.update(self.extra.named())
        return named if self.center is None else {**named, "center": self.center}

    def _save(self, metric: float | None = None) -> None:
        self.engine.broadcast_buffers()
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now
        self.faults.when_written(self.progress.step)
        self.checkpointer.save(self.progress.step, metric=metric, **self._checkpoint_parts())
        self._saved = self.progress.step

    def _resume(self) -> None:
        self.checkpointer.claim()
        # of the first rank, whose word all act on: a folder that is shared may show others less
        if run_on_main_for_all(lambda: max(self.checkpointer.steps(), default=0), self.accelerator):
            self.engine.rebuild_buckets(self.data.train.image_shape)
        try:
            self._saved = self.checkpointer.load(**self._checkpoint_parts())
            self.accelerator.print(f"resuming after epoch {self.progress.epoch}, step {self.progress.step}")
        except FileNotFoundError:
            self.accelerator.print(f"{self.folder.path} has no checkpoint yet: starting from the beginning")
            self.on_main(self._write_data_records)  # the data may have changed: nothing was trained on them yet
        except ValueError as error:
            raise UserError(f"cannot resume: {error}") from error
        self.on_main(self._check_data)
        self.on_main(lambda: self.folder.update_data_folder(self.config.data.folder))
        self.on_main(lambda: self.log.open_trackers(resumed=True))
        self.on_main(self._rewind_history)

    def _rewind_history(self) -> None:
        repeated = self.folder.rewind_history(self.progress.step)
        if repeated:
            self.accelerator.print(f"{repeated} steps that were logged after it are computed again")

    # ------------------------------------------------------------------------------------------------ results

    def evaluate(self) -> list[Evaluation]:
        """Return the figures of each evaluation set; `results` has those of other protocols."""
        self.faults.at("evaluation", self.progress.step)
        evaluations = self.evaluation.measure(self.engine, pictures=True)
        note_confusions(self.folder.path, self.head, self.main_set, self.accelerator)
        return evaluations

    @property
    def results(self) -> list[Result]:
        """The results of the protocols that the settings name, of the newest evaluation."""
        return self.evaluation.results

    def write_results(self, evaluations: list[Evaluation]) -> Path | None:
        """Write metrics.json, plots and the report on the main process; return the path of the report there.

        Every rank must call it. UserError on every rank if they cannot be written.
        """
        return run_on_all(lambda: self._write_results(evaluations) if self.main else None, self.accelerator)

    def _write_results(self, evaluations: list[Evaluation]) -> Path:
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
        report = write_results(
            self.folder,
            title,
            evaluations,
            {"training": training},
            self.config,
            environment,
            self.folder.history(),
            self.results,
        )
        self.log.results(report)
        return report

    def close(self, stopped: bool = False) -> None:
        """Destroy the process group in order; otherwise gloo sometimes aborts at exit. Then close the trackers, for
        which other ranks do not wait. stopped: the run was asked to stop."""
        self.accelerator.wait_for_everyone()
        self.engine.close()
        self.accelerator.end_training()
        self.log.trackers.close("KILLED" if stopped else "FINISHED")
