"""What one loss knows about the training step in progress: its losses, whether it was checked, whether it is skipped.

forward     begin_forward        starts a new training step if the last one is finished
backward    hook of the loss     adds the forward's losses to the step
check       nonfinite/step_check reads the losses; the step is checked and finished, and skipped if it is bad
update      end                  gradients were used or cleared: the next forward or backward starts a new step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from partial_fc.batch.backward_pass import MOST, BackwardPass, add_up
from partial_fc.batch.exchange import GlobalBatch

Validate = Literal["always", "first", "never"]
OnNonfinite = Literal["raise", "skip", "log"]

DEFAULT_MAX_SKIPS = 20


class StepRecord:
    """One training step: all backward passes since the gradients were last cleared, used or checked.

    A bad forward whose backward never runs skips only itself.
    """

    def __init__(self, validate: Validate, on_nonfinite: OnNonfinite, max_skips: int | None) -> None:
        self.validate: Validate = validate
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.max_skips = max_skips
        self.skips = 0  # steps skipped in all
        self.skips_in_a_row = 0
        self.reason = ""  # why the last one was skipped
        self.bad_forward = False  # the last training forward had bad embeddings
        self.bad_step = False  # the step has a bad forward whose backward has run, or was checked and is bad
        self.finished = True  # the next forward or backward begins a new step
        self.gradients_gone = True  # its gradients were used or cleared, whether it was skipped or not
        self.checked = True  # all losses and gradients of the step were checked
        self.in_skips = False  # the skipped step is in `skips`
        self.ever_checked = False
        self.backwards: list[BackwardPass] = []
        self.statistics: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []  # where each stands, it, a copy before
        self.gradients: dict[int, int] = {}  # of all rows after a skipped forward: their versions, by their addresses
        self.untrained = ""  # why an update would leave rows where they are (nonfinite/wiring.py)
        self.half_unscaled = ""  # which gradients a GradScaler has not unscaled (nonfinite/scalers.py)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has gradients of its own, and groups cannot be copied
        return {**vars(self), "backwards": [], "statistics": []}

    @property
    def skipped(self) -> bool:
        return self.bad_forward or self.bad_step

    @property
    def watches(self) -> bool:
        """Whether losses and gradients of this step are checked."""
        first = self.validate == "first" and not self.ever_checked
        return self.on_nonfinite != "log" and (self.validate == "always" or first)

    @property
    def unchecked(self) -> bool:
        """Whether an update has to check losses and gradients first, because nothing has."""
        return bool(self.untrained or (self.watches and not self.checked)) and not self.skipped

    def begin_forward(self, no_gradients: bool) -> bool:
        """Begin a training forward; return whether it follows a skipped step. no_gradients: none to accumulate to."""
        new_step = no_gradients or self.finished
        after_skip = new_step and self.bad_step
        if new_step and not self.skipped:
            self.skips_in_a_row = 0
        if new_step:
            self._new_step()
        self.bad_forward = False
        self.in_skips = self.in_skips and self.bad_step
        return after_skip

    def _new_step(self) -> None:
        self.statistics = self.statistics if self.bad_step else []  # of an unchecked one: `forget_notes` puts them back
        self.bad_step, self.finished, self.gradients_gone, self.backwards = False, False, False, []

    def hook(self, losses: Tensor, batch: GlobalBatch, ignore_index: int) -> Callable[[Tensor], None]:
        """Return a hook for the loss: when its backward runs, the forward becomes a part of the step."""
        slim = replace(batch, embeddings=batch.embeddings.new_empty(0))  # only labels and places outlive the backward

        def on_backward(grad: Tensor) -> None:
            self.join_step()
            if len(self.backwards) == MOST:
                add_up(self.backwards)
            self.backwards.append(BackwardPass(losses, grad, slim, ignore_index))

        return on_backward

    def join_step(self) -> None:
        """A backward runs: its forward becomes part of the step."""
        if self.finished:  # it was checked, or gradients were cleared, between forward and backward
            self._new_step()
        self.checked = False

    def end(self) -> None:
        """Gradients were cleared or used."""
        self.finished, self.gradients_gone, self.untrained = True, True, ""

    def mark_checked(self) -> None:
        """All losses and gradients of the step were checked: it is finished."""
        self.checked = self.finished = self.ever_checked = True
        self.backwards, self.statistics = [], []

    def remember(self, places: Iterable[tuple[dict[str, Any], str]]) -> None:
        """Note running statistics before the first forward of a step moves them: a bad step puts them back."""
        self.statistics = self.statistics or [(b, n, b[n], b[n].clone()) for b, n in places]
