"""The evaluations of a run: verification, identification and protocols with its backbone, at most once per step.

step, epochs  ── is_due ──>  evaluate now?
backbone      ── evaluate_sets, run_tasks ──>  evaluations of data sets, results of protocols
              ── figures ──>  {"set/figure": value}, for the log and for the choice of the best checkpoint
"""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator

from partial_fc.training.all_ranks import run_on_all
from partial_fc.training.config import RunConfig
from partial_fc.training.data import DataSplits
from partial_fc.training.engine import Engine
from partial_fc.training.evaluation import Evaluation
from partial_fc.training.interval import check_metric, figures_of, is_due
from partial_fc.training.micro_batches import Progress
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.task_files import open_tasks
from partial_fc.training.results import evaluate_sets, run_tasks
from partial_fc.training.run import RunFolder


class RunEvaluation:
    """The evaluation sets and protocols of a run, and the newest figures. Every rank must make the same calls.

    Raises UserError, the same on every rank, for files that cannot be read, and for settings that do not fit them.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSplits,
        accelerator: Accelerator,
        folder: RunFolder,
        progress: Progress,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.sets = data.evaluation
        self.accelerator = accelerator
        self.folder = folder
        self.progress = progress
        self.asked_to_stop = asked_to_stop
        self.tasks = run_on_all(
            lambda: open_tasks(config.evaluation, data.train.image_shape, config.data.on_error), accelerator
        )
        check_metric(config.evaluation, list(self.sets), self.tasks)
        self._step = -1  # of the figures below; -1 before the first evaluation
        self._evaluations: list[Evaluation] = []
        self._results: list[Result] = []

    def is_due(self, epochs: int | None, last: bool) -> bool:
        """Return whether to evaluate after the current step; arguments as of `interval.is_due`."""
        return not self.is_current and is_due(self.config.evaluation, self.progress.step, epochs, last)

    @property
    def is_current(self) -> bool:
        """Whether the newest figures are those of the current step."""
        return self._step == self.progress.step

    @property
    def figures(self) -> dict[str, float]:
        """The newest figures, as "set/figure"."""
        return figures_of(self._evaluations, self._results)

    @property
    def results(self) -> list[Result]:
        """The newest results of the protocols that the settings name."""
        return self._results

    def measure(self, engine: Engine, *, pictures: bool) -> list[Evaluation]:
        """Return the figures of the data sets; evaluate the backbone unless the newest figures are of this step.

        pictures: save the hardest pairs for the report. Raises Preempted on every rank if one was asked to stop.
        """
        if not self.is_current:
            backbone = engine.whole_backbone()
            run = (self.accelerator, self.config, self.folder, self.asked_to_stop)
            evaluations = evaluate_sets(backbone, self.sets, *run, pictures=pictures)
            results = run_tasks(backbone, self.tasks, *run, pictures=pictures)
            self._step = self.progress.step
            self._evaluations = evaluations
            self._results = results
            self.progress.evaluated = self._step
        return self._evaluations
