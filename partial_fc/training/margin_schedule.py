"""The margin over a run: from a start value to the one that the settings of the margin give it.

--head.margin CosFace --head.margin.margin 0.2
--head.margin_schedule.start 0 --head.margin_schedule.begin_epochs 2 --head.margin_schedule.end_epochs 8
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from partial_fc import Margin, MarginSchedule, PartialFC
from partial_fc.loop.margin_schedule import Shape
from partial_fc.training.errors import UserError


@dataclass
class MarginScheduleConfig:
    """The margin over a run, optimizer step by optimizer step; docs/margins.md has the formulas."""

    start: float | None = None
    """Value at the start of the run; it ends at the one that head.margin has. Null for a margin that does not move."""
    argument: str = "margin"
    """Which argument of head.margin moves: margin, scale, m2, ..."""
    shape: Shape = "linear"
    """How it moves: linear, exponential (fast at first, as in WeSpeaker), step (at milestones), or harmonic (1/value
    linearly, as SphereFace's annealing)."""
    begin_epochs: float = 0.0
    """Epochs after which it begins to move; fractions count."""
    end_epochs: float | None = None
    """Epochs after which it is at its end; required by all but step."""
    milestones: list[float] | None = None
    """Epochs after each of which it moves by one equal part, ascending; required by step, for step only."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        name = "--head.margin_schedule"
        if self.start is None:
            for each in fields(self):
                if getattr(self, each.name) != each.default:
                    raise UserError(
                        f"{name}.{each.name} is {getattr(self, each.name)}, which has no effect without {name}.start; "
                        "give the value that the margin begins with"
                    )
            return
        times = self.milestones or []
        if self.shape == "step":
            if not times or any(not b > a for a, b in zip([0.0, *times], times, strict=False)):
                raise UserError(
                    f"{name}.milestones are {self.milestones}; {name}.shape step needs epochs above 0, each later than "
                    "the one before"
                )
            if self.end_epochs is not None or self.begin_epochs:
                raise UserError(
                    f"{name}.begin_epochs and end_epochs have no effect with {name}.shape step; leave them out"
                )
            return
        if self.milestones is not None:
            raise UserError(f"{name}.milestones have no effect with {name}.shape {self.shape}; leave them out")
        if not self.begin_epochs >= 0 or self.end_epochs is None or not self.end_epochs > self.begin_epochs:
            raise UserError(
                f"{name}.begin_epochs is {self.begin_epochs} and {name}.end_epochs {self.end_epochs}; give at least 0, "
                "and a larger number of epochs"
            )

    def check_epochs(self, epochs: int) -> None:
        """UserError if the margin would not reach its end in a run of `epochs`."""
        last = max([self.end_epochs or 0.0, *(self.milestones or [])])
        if self.start is not None and last > epochs:
            raise UserError(
                f"--head.margin_schedule reaches its end after {last:g} epochs, and the run has {epochs}; give fewer"
            )

    def build(self, head: PartialFC | Margin, steps_per_epoch: int) -> MarginSchedule | None:
        """Return the schedule of a newly built head or margin, None without a start. UserError for refused values."""
        if self.start is None:
            return None
        margin = head if isinstance(head, Margin) else head.margin
        try:
            return MarginSchedule(
                head,
                start=self.start,
                end=getattr(margin, self.argument, self.start),
                shape=self.shape,
                argument=self.argument,
                **self._steps(steps_per_epoch),
            )
        except ValueError as error:
            raise UserError(f"--head.margin_schedule: {error}") from error

    def _steps(self, steps_per_epoch: int) -> dict[str, Any]:
        if self.shape == "step":
            return {"milestones": [max(1, round(each * steps_per_epoch)) for each in self.milestones or []]}
        begin = round(self.begin_epochs * steps_per_epoch)
        return {"begin_step": begin, "end_step": max(begin + 1, round((self.end_epochs or 0) * steps_per_epoch))}
