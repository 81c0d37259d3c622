"""What a run tells of its steps: a row of history.jsonl, and the same to its trackers.

every so many steps    step, epoch, learning rate, losses, the head's metrics, norm of the gradient, share of time that went by waiting
an evaluation          step, epoch, "set/figure"
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from partial_fc import PartialFC
from partial_fc.shards import local_part
from partial_fc.training.config import RunConfig, flat
from partial_fc.training.micro_batches import Progress
from partial_fc.training.run import RunFolder

LOGGED_AS = {"CurricularFace": "curricular"}  # others by their name in lower case


class StepLog:
    """The log of the run of `config`; `progress` says which step it is. Every rank logs, the first one writes."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, accelerator: Accelerator, progress: Progress, steps_per_epoch: int
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.progress, self.steps_per_epoch = progress, steps_per_epoch
        self._waited, self._since = 0.0, time.monotonic()

    def begin(self) -> None:
        """Open the trackers, and count time from now on."""
        self.accelerator.init_trackers(
            "tensorboard", config={k: v if v is not None else "none" for k, v in _scalars(self.config).items()}
        )
        self._waited, self._since = self.progress.waited, time.monotonic()

    def is_due(self, step: int) -> bool:
        return step == 1 or step % self.config.output.log_every == 0

    def step(self, losses: dict[str, Tensor], norm: Tensor | None, head: PartialFC, learning_rate: float) -> None:
        """The newest step, if it is due: what was minimised, the norm of the gradient (None: not clipped), what the head has measured."""
        if not self.is_due(self.progress.step):
            return
        measured = {
            **losses,
            **head.metrics,
            **self._margin_state(head),
            **({} if norm is None else {"grad_norm": norm}),
        }
        values = torch.stack([value.float() for value in measured.values()]).tolist()  # one wait for the device
        self._write(
            {
                "learning_rate": learning_rate,
                "skipped_steps": head.skips,
                "data_wait": self._data_wait(),
                **dict(zip(measured, values, strict=True)),
            }
        )

    def figures(self, figures: dict[str, float]) -> None:
        """Those of an evaluation after the newest step."""
        self._write(figures)

    def _write(self, row: dict[str, float]) -> None:
        step, epoch = self.progress.step, self.progress.step / self.steps_per_epoch
        if self.accelerator.is_main_process:
            self.folder.append_history({"step": step, "epoch": epoch, **row})
        self.accelerator.log({"epoch": epoch, **row}, step=step)

    def _data_wait(self) -> float:
        """The share of the time since the last logged step in which this rank waited for its loader."""
        waited, since, now = self._waited, self._since, time.monotonic()
        self._waited, self._since = self.progress.waited, now
        return round((self.progress.waited - waited) / max(now - since, 1e-9), 4)

    def _margin_state(self, head: PartialFC) -> dict[str, Tensor]:
        """Single numbers that move with the margin, under its name: curricular_t, adaface_mean, adaface_std, sphereface2_offset."""
        margin = self.config.head.margin.name
        name_of_margin = LOGGED_AS.get(margin, margin.lower())
        found = {
            n: local_part(value.detach())
            for n, value in (*head.margin.named_buffers(), *head.margin.named_parameters())
        }
        return {f"{name_of_margin}_{name}": value.reshape(()) for name, value in found.items() if value.numel() == 1}


def _scalars(config: RunConfig) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str | bool | None) else str(value)
        for name, value in flat(config).items()
    }
