"""The log of a run's steps: rows of history.jsonl, which also go to the trackers.

every so many steps    step, epoch, learning rate, losses, the head's metrics, gradient norm, share of time waiting;
                       under sampling, the rows of a rank and what put them there
each evaluation        step, epoch, "set/figure"
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from partial_fc import PartialFC
from partial_fc.distributed.shards import local_part
from partial_fc.training.config import RunConfig, flat
from partial_fc.training.files import naming
from partial_fc.training.micro_batches import Progress
from partial_fc.training.run import RunFolder

LOGGED_AS = {"CurricularFace": "curricular"}  # others by their name in lower case


class StepLog:
    """The log of a run. `progress` has the number of the step. Every rank calls it; the main process writes."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, accelerator: Accelerator, progress: Progress, steps_per_epoch: int
    ) -> None:
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.progress = progress
        self.steps_per_epoch = steps_per_epoch
        self._waited = 0.0  # progress.waited at the last logged step
        self._rows_waited = 0.0  # the same of the head's storage
        self._since = time.monotonic()  # time of the last logged step

    def begin(self) -> None:
        """Open the trackers, and start measuring time."""
        self.accelerator.init_trackers(
            "tensorboard", config={k: v if v is not None else "none" for k, v in _scalars(self.config).items()}
        )
        self._waited = self.progress.waited
        self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether `step` is logged."""
        return step == 1 or step % self.config.output.log_every == 0

    def step(self, losses: dict[str, Tensor], norm: Tensor | None, head: PartialFC, learning_rate: float) -> None:
        """Log the newest step, if it is due: losses, gradient norm (None if not clipped), the metrics of the head."""
        if not self.is_due(self.progress.step):
            return
        measured = {
            **losses,
            **head.metrics,
            **self._margin_state(head),
            **self._selected(head),
            **({} if norm is None else {"grad_norm": norm}),
        }
        values = torch.stack(
            [value.float() for value in measured.values()]
        ).tolist()  # a single transfer from the device
        self._write(
            {
                "learning_rate": learning_rate,
                "skipped_steps": head.skips,
                **self._waits(head),
                **self._scheduled(head),
                **dict(zip(measured, values, strict=True)),
            }
        )

    def figures(self, figures: dict[str, float]) -> None:
        """Log the figures of an evaluation after the newest step."""
        self._write(figures)

    def _write(self, row: dict[str, float]) -> None:
        step = self.progress.step
        epoch = step / self.steps_per_epoch
        if self.accelerator.is_main_process:
            self.folder.append_history({"step": step, "epoch": epoch, **row})
        with naming(self.folder.path):  # a tracker that writes there does not say which file
            self.accelerator.log({"epoch": epoch, **row}, step=step)

    def _waits(self, head: PartialFC) -> dict[str, float]:
        """Return the share of the time since the last logged step that this rank has waited for its loader, and, where
        rows are in a storage, for its rows."""
        now, store = time.monotonic(), head.class_rows.store
        passed = max(now - self._since, 1e-9)
        shares = {"data_wait": round((self.progress.waited - self._waited) / passed, 4)}
        self._waited, self._since = self.progress.waited, now
        if store is not None:
            shares["row_wait"] = round((store.waited - self._rows_waited) / passed, 4)
            self._rows_waited = store.waited
        return shares

    def _scheduled(self, head: PartialFC) -> dict[str, float]:
        """Return the argument of the margin that a schedule moves, as head_margin: its value for the next step."""
        schedule = self.config.head.margin_schedule
        if schedule.start is None:
            return {}
        return {f"head_{schedule.argument}": float(getattr(head.margin, schedule.argument))}

    def _selected(self, head: PartialFC) -> dict[str, Tensor]:
        """Return the rows of the last forward of a sampled head, a mean over the ranks, and how many of them were
        drawn, were labels of the batch, or were hard negatives, as shares. A collective."""
        if head.sample_rate == 1:
            return {}
        counts = head.selected_counts
        rows, *parts = self.accelerator.reduce(torch.stack(list(counts.values())).float(), "mean")
        shares = {f"{name}_share": part / rows for name, part in zip(list(counts)[1:], parts, strict=True)}
        return {"selected_rows": rows, **shares}

    def _margin_state(self, head: PartialFC) -> dict[str, Tensor]:
        """Return the scalars of the margin's state: curricular_t, adaface_mean, adaface_std, sphereface2_offset."""
        margin = self.config.head.margin.name
        name_of_margin = LOGGED_AS.get(margin, margin.lower())
        found = {
            n: local_part(value.detach())
            for n, value in (*head.margin.named_buffers(), *head.margin.named_parameters())
        }
        return {f"{name_of_margin}_{name}": value.reshape(()) for name, value in found.items() if value.numel() == 1}


def _scalars(config: RunConfig) -> dict[str, Any]:
    """Return the settings by their dotted names, as values that trackers accept."""
    return {
        name: value if isinstance(value, int | float | str | bool | None) else str(value)
        for name, value in flat(config).items()
    }
