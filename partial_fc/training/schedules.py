"""The learning rate over a run: warm-up, then a curve; the same for backbone and head, or one each.

optimizer step -> factor of the largest learning rate; t: time (steps, or whole epochs); W: warm-up; T: the whole run

warm-up      (t + 1) / W                             while t < W
constant     1
cosine       f + (1 - f) (1 - cos(pi u)) / 2         u = 1 - (t - W) / (T - W), the rest; f: the final factor
polynomial   f + (1 - f) u^power
step         drop^(t // every)                       every: in epochs
multistep    drop^(number of milestones passed)       milestones: in epochs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from partial_fc.training.errors import UserError

Shape = Literal["cosine", "polynomial", "constant", "step", "multistep"]


@dataclass
class ScheduleConfig:
    """The learning rate over a run, step by step."""

    shape: Shape = "cosine"
    """How it falls after warm-up: to zero (cosine, polynomial), by drops (step, multistep), or constant."""
    power: float = 2.0
    """Exponent of polynomial."""
    warmup_epochs: float | None = None
    """Epochs over which it first rises linearly from zero; fractions count. If not given, one, and at most a tenth of
    the run."""
    by: Literal["step", "epoch"] = "step"
    """Whether it changes with every optimizer step, or only from epoch to epoch."""
    final: float = 0.0
    """Learning rate at the end of cosine and polynomial, as a share of the largest (0 to 1)."""
    drop: float = 0.1
    """Factor of each drop of step and multistep."""
    every: float | None = None
    """Epochs between two drops; required by step, for step only."""
    milestones: list[float] | None = None
    """Epochs after which it drops, ascending; required by multistep, for multistep only."""

    def warmup(self, epochs: int) -> float:
        """Return the epochs of warm-up in a run of `epochs`; a whole number if the rate changes by epochs."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        chosen = min(1.0, epochs / 10)
        return chosen if self.by == "step" else round(chosen)

    def check(self, epochs: int, name: str = "schedule") -> None:
        """UserError for values that no schedule of a run of `epochs` can have. name: of the settings, for messages."""
        for setting, least in (("power", 0.0), ("warmup_epochs", 0.0), ("final", 0.0), ("drop", 0.0)):
            value = getattr(self, setting)
            if value is not None and not value >= least:
                raise UserError(f"--{name}.{setting} is {value}; give at least {least:g}")
        if self.warmup(epochs) >= epochs:
            raise UserError(
                f"--{name}.warmup_epochs is {self.warmup(epochs):g} of {epochs}, so that the learning rate would "
                "rise until the run ends; give fewer, or null for what suits the run"
            )
        if self.final > 1:
            raise UserError(f"--{name}.final is {self.final}; give a share of at most 1")
        for setting, shape in (("every", "step"), ("milestones", "multistep")):
            value = getattr(self, setting)
            if value is not None and self.shape != shape:
                raise UserError(
                    f"--{name}.{setting} is {value}, which has no effect with --{name}.shape {self.shape} (it is for "
                    f"{shape}); leave it out, or give null if a file sets it"
                )
            if not value and self.shape == shape:
                raise UserError(f"--{name}.shape {shape} needs --{name}.{setting}, in epochs")
        if self.every is not None and not self.every > 0:
            raise UserError(f"--{name}.every is {self.every}; give a number of epochs above 0")
        times = self.milestones or []
        if any(not b > a for a, b in zip([0.0, *times], times, strict=False)):
            raise UserError(f"--{name}.milestones are {times}; give epochs above 0, each later than the one before")
        whole = [self.warmup(epochs), *([] if self.every is None else [self.every]), *times]
        if self.by == "epoch" and any(each != round(each) for each in whole):
            raise UserError(f"--{name}.by is epoch, so that warmup_epochs, every and milestones must be whole epochs")


@dataclass
class HeadScheduleConfig:
    """The head's learning rate over a run, if it differs from the backbone's; docs/optimizers.md says when."""

    shape: Shape | None = None
    """As schedule.shape, for the head; the backbone's if not given."""
    power: float | None = None
    """As schedule.power, for the head; the backbone's if not given."""
    warmup_epochs: float | None = None
    """As schedule.warmup_epochs, for the head; the backbone's if not given."""
    by: Literal["step", "epoch"] | None = None
    """As schedule.by, for the head; the backbone's if not given."""
    final: float | None = None
    """As schedule.final, for the head; the backbone's if not given."""
    drop: float | None = None
    """As schedule.drop, for the head; the backbone's if not given."""
    every: float | None = None
    """As schedule.every, for the head; the backbone's if not given."""
    milestones: list[float] | None = None
    """As schedule.milestones, for the head; the backbone's if not given."""

    def over(self, backbone: ScheduleConfig) -> ScheduleConfig:
        """Return the head's schedule: settings of `backbone` where none are given here, without its drops if the shape
        differs."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if given.get("shape", backbone.shape) != backbone.shape:
            given = {"every": None, "milestones": None, **given}
        return replace(backbone, **given)


def learning_rate_factor(config: ScheduleConfig, steps_per_epoch: int, epochs: int) -> Callable[[int], float]:
    """Return a function of the optimizer step: the factor of the largest learning rate."""
    per_epoch = steps_per_epoch if config.by == "step" else 1
    warmup, total = round(config.warmup(epochs) * per_epoch), per_epoch * epochs
    drops = [round(each * per_epoch) for each in config.milestones or []]
    every = max(1, round((config.every or 0) * per_epoch))

    def factor(step: int) -> float:
        t = step if config.by == "step" else step // steps_per_epoch
        if t < warmup:
            return (t + 1) / warmup
        if config.shape == "constant":
            return 1.0
        if config.shape == "step":
            return float(config.drop ** (t // every))
        if config.shape == "multistep":
            return float(config.drop ** sum(t >= each for each in drops))
        left = max(0.0, 1 - (t - warmup) / max(1, total - warmup))
        curve = float(left**config.power) if config.shape == "polynomial" else 0.5 * (1 - math.cos(math.pi * left))
        return config.final + (1 - config.final) * curve

    return factor


def build_schedules(
    backbone: ScheduleConfig,
    head: HeadScheduleConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    steps_per_epoch: int,
    epochs: int,
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """Return schedulers of the backbone's and the head's optimizer, to step after every optimizer step."""
    factors = [learning_rate_factor(config, steps_per_epoch, epochs) for config in (backbone, head.over(backbone))]
    return [torch.optim.lr_scheduler.LambdaLR(each, factor) for each, factor in zip(optimizers, factors, strict=True)]
