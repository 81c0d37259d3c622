"""`Progress`: the epoch and the step of a training loop, as an object that checkpoints take."""

from __future__ import annotations

import operator
from typing import Any


class Progress:
    """How far a loop has come: `save_checkpoint(path, head=head, progress=progress)`, with the rest of the run.

    Count in it, and go on from it after `load_checkpoint`: `progress.epoch += 1`. It must be equal on all ranks.

    Args:
        epoch: a whole number; what it counts is up to the loop.
        step: likewise.

    load_state_dict raises ValueError for a state without them.
    """

    def __init__(self, epoch: int = 0, step: int = 0) -> None:
        self.epoch = operator.index(epoch)
        self.step = operator.index(step)

    def __repr__(self) -> str:
        return f"Progress(epoch={self.epoch}, step={self.step})"

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": operator.index(self.epoch), "step": operator.index(self.step)}

    def check_state(self, state: Any) -> None:
        """Raise ValueError unless it has an epoch and a step."""
        counts = [state.get(name) for name in ("epoch", "step")] if isinstance(state, dict) else [None]
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("it is no progress of a loop: it has no epoch and step that are whole numbers")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state(state_dict)
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
