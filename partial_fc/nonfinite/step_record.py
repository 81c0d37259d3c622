"""What one head knows of the training step that is being made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from partial_fc.batch import GlobalBatch
from partial_fc.errors import NonFiniteError
from partial_fc.rows import ShardedRows

DEFAULT_MAX_SKIPS = 20


MOST = 64  # backwards of a step whose losses are kept apart


@dataclass
class _Backward:
    """A forward whose backward has run in this step: losses [N] of the replica's batch, or the reduced loss; d objective / d loss."""

    losses: Tensor
    grad: Tensor
    batch: GlobalBatch


class StepRecord:
    """What one head or center loss knows of the step that is being made, or that was made last.

    A step is the backwards since gradients were last cleared, stepped with or judged; a bad forward whose backward never runs is left
    out alone. skips: steps left out in all; in_a_row: without a good one in between; last: why, in words.
    """

    def __init__(self, max_skips: int | None) -> None:
        self.max_skips = max_skips
        self.skips, self.in_a_row, self.last = 0, 0, ""
        self.bad_forward = False  # the last training forward
        self.bad_step = False  # a forward whose backward has run, or what was judged
        self.over = True  # whether the next forward or backward begins a new step
        self.judged = True  # whether all there is was looked at
        self.counted = False  # the bad step is in `skips`
        self.looked = False  # any step was judged yet
        self.backwards: list[_Backward] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "backwards": []}  # a copy's gradients are others, and groups cannot be copied

    @property
    def skipped(self) -> bool:
        return self.bad_forward or self.bad_step

    def begin(self, over: bool) -> bool:
        """A training forward begins; whether it follows a step that was left out. over: there are no gradients that it could add to."""
        over = over or self.over
        left_out = over and self.bad_step
        if over and not self.skipped:
            self.in_a_row = 0
        if over:
            self._anew()
        self.bad_forward = False
        self.counted = self.counted and self.bad_step
        return left_out

    def _anew(self) -> None:
        self.bad_step, self.over, self.backwards = False, False, []

    def note(self, losses: Tensor, batch: GlobalBatch) -> Callable[[Tensor], None]:
        """A hook of the loss: its backward makes the forward a part of the step."""

        named = replace(batch, embeddings=batch.embeddings.new_empty(0))  # labels and places alone outlive the backward

        def backward(grad: Tensor) -> None:
            self._part()
            if len(self.backwards) == MOST:  # of so many the first is not told apart any more
                first, second = self.backwards[0], self.backwards.pop(1)
                first.losses, first.grad = (
                    first.losses.sum() + second.losses.sum(),
                    first.grad.sum() + second.grad.sum(),
                )
            self.backwards.append(_Backward(losses, grad, named))

        return backward

    def note_bad(self) -> Callable[[Tensor], None]:
        """The same of a forward that is left out."""

        def backward(grad: Tensor) -> None:
            self._part()
            self.bad_step = True

        return backward

    def _part(self) -> None:
        if self.over:  # gradients were cleared between forward and backward
            self._anew()
        self.judged = False

    def end(self) -> None:
        """Gradients were cleared or used."""
        self.over = True

    def leave_out(self, why: str) -> None:
        """Count the step as skipped, once. NonFiniteError if there were too many in a row."""
        self.last = why
        if self.counted:
            return
        self.counted = True
        self.skips, self.in_a_row = self.skips + 1, self.in_a_row + 1
        if self.max_skips is not None and self.in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were not finite, and max_skips is {self.max_skips}; the last: {why}. "
                "Lower the learning rate, or go on from a checkpoint before"
            )

    def conclude(self) -> None:
        self.judged, self.over, self.looked, self.backwards = True, True, True, []


class Watched(Protocol):
    """A `PartialFC` or `CenterLoss`."""

    on_nonfinite: Any
    _record: StepRecord
    _rows: ShardedRows

    @property
    def skipped(self) -> bool: ...

    @property
    def _watches(self) -> bool: ...
