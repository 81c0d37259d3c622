"""A margin, or another argument of a margin, that moves during training, as recipes of speaker recognition have it.

    schedule = MarginSchedule(head, start=0.0, end=0.2, begin_step=20_000, end_step=40_000)
    each step     loss.backward(); optimizer.step(); schedule.step()

The value is a function of the number of steps alone, so that it is the same on every rank and after a resumption.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

from partial_fc.distributed.given import as_whole, real, whole
from partial_fc.margins.arguments import argument_now, change_argument, check_argument
from partial_fc.margins.base import Margin
from partial_fc.sharded_module import check_choice

Shape = Literal["linear", "exponential", "step", "harmonic"]

LEFT = 1e-3 / (1 + 1e-6)  # of the way, at the end of "exponential", before it is set to its end


class HasMargin(Protocol):
    """A `PartialFC`."""

    margin: Margin


class MarginSchedule:
    """Moves an argument of a head's margin from `start` to `end`. Call `step()` after each optimizer step.

    After t steps, with u = (t − begin_step) / (end_step − begin_step), the argument is

        start + (end − start) · ratio      ratio = u                                     linear
                                                   1 − (10⁻³ / (1 + 10⁻⁶))^u             exponential
                                                   passed milestones / all milestones    step

    and for "harmonic" 1 / (1/start + (1/end − 1/start) · u), as the λ of SphereFace falls: λ₀ / (1 + γ t), with γ =
    (λ₀/λ_min − 1) / end_step.
    It is `start` up to begin_step and `end` from end_step on. "exponential" is that of WeSpeaker's `MarginScheduler`
    (increase_type "exp", wespeaker/utils/schedulers.py; arXiv 2210.17016): it rises fast at first, and jumps over the
    last thousandth of the way. The same holds for a `start` above `end`.

    Constructing it sets the margin to `start`. Setting an argument validates it and keeps the margin's running
    statistics. A forward and its backward use the value of the forward. A checkpoint of the head has the value that the
    margin had; save the schedule beside it: `save_checkpoint(path, head=head, margin_schedule=schedule)`. To begin a
    schedule on a head that is loaded, construct it after loading.

    Args:
        head: a `PartialFC`, or a margin. If the head is given another margin, the next step() moves that one.
        start: value at the start.
        end: value at the end.
        begin_step: steps after which it begins to move.
        end_step: steps after which it is at its end, more than begin_step; for all shapes but "step".
        shape: how it moves.
        milestones: steps after which it moves by one equal part of the way, ascending; for "step".
        argument: which argument of the margin's constructor moves: "margin", "scale", "m1", ...

    Steps may be optimizer steps or epochs: what matters is when step() is called. Raises ValueError for values that the
    margin refuses.
    """

    def __init__(
        self,
        head: HasMargin | Margin,
        *,
        start: float,
        end: float,
        begin_step: int = 0,
        end_step: int | None = None,
        shape: Shape = "linear",
        milestones: Sequence[int] | None = None,
        argument: str = "margin",
    ) -> None:
        if not isinstance(head, Margin) and not isinstance(getattr(head, "margin", None), Margin):
            raise TypeError(f"a MarginSchedule takes a PartialFC or a margin, not {type(head).__name__}")
        check_choice("shape", shape, ("linear", "exponential", "step", "harmonic"))
        self.head = head
        self.argument = argument
        self.shape: Shape = shape
        self.start, self.end = real("start", start), real("end", end)
        self.begin_step = whole("begin_step", begin_step, least=0)
        self.end_step = None if end_step is None else whole("end_step", end_step)
        self.milestones = [whole("a milestone", each, least=1) for each in milestones or ()]
        self._check_steps()
        if shape == "harmonic" and not (self.start > 0 and self.end > 0):
            raise ValueError(f'shape="harmonic" needs a start and an end above 0, not {self.start} and {self.end}')
        for value in (self.start, self.end):
            check_argument(self._margin, argument, value)
        self.steps = 0
        self._apply()

    def _check_steps(self) -> None:
        if self.shape == "step":
            times = self.milestones
            if not times or any(b <= a for a, b in pairwise(times)):
                raise ValueError(f'shape="step" needs milestones, steps in ascending order, not {times}')
            if self.end_step is not None or self.begin_step:
                raise ValueError(
                    'begin_step and end_step are for the other shapes; shape="step" moves at its milestones'
                )
            return
        if self.milestones:
            raise ValueError(f'milestones are for shape="step", not for shape="{self.shape}"')
        if self.end_step is None or self.end_step <= self.begin_step:
            raise ValueError(
                f'shape="{self.shape}" needs an end_step above begin_step, {self.begin_step}, not {self.end_step}'
            )

    @property
    def _margin(self) -> Margin:
        return self.head if isinstance(self.head, Margin) else self.head.margin

    @property
    def value(self) -> float:
        """The value of the argument after the steps so far."""
        return self.value_after(self.steps)

    def value_after(self, steps: int) -> float:
        """Return the value of the argument after a number of steps."""
        if self.shape == "step":
            ratio = sum(steps >= each for each in self.milestones) / len(self.milestones)
        else:
            assert self.end_step is not None
            u = (steps - self.begin_step) / (self.end_step - self.begin_step)
            ratio = min(max(u, 0.0), 1.0)
            if self.shape == "exponential" and ratio < 1:
                ratio = 1 - LEFT**ratio
            if self.shape == "harmonic" and ratio < 1:  # the share of the way at which 1/value has gone `ratio` of its
                ratio = self.start * ratio / (self.end + (self.start - self.end) * ratio)
        return self.end if ratio == 1 else self.start + (self.end - self.start) * ratio

    def step(self) -> None:
        """Count a step, and set the argument. Every rank calls it alike; it communicates nothing."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        if argument_now(self._margin, self.argument) != self.value:
            change_argument(self._margin, self.argument, self.value)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps; all else is given at construction."""
        return {"steps": self.steps}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if it is not a state of a schedule."""
        steps = as_whole(state.get("steps")) if isinstance(state, dict) else None
        if steps is None or steps < 0:
            raise ValueError(f"a MarginSchedule's state holds its number of steps, not {state!r}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the steps of `state_dict`, and set the argument accordingly."""
        self.check_state(state_dict)
        self.steps = int(state_dict["steps"])
        self._apply()
