"""What changes of classes need of a loss. `loss.ChangeableLoss` has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from partial_fc.classes.moves import Moves
from partial_fc.margins.base import Margin
from partial_fc.rows import ClassRows
from partial_fc.shards import ClassShards


@dataclass(frozen=True)
class Change:
    """What the classes are to become: `num_classes` of them, the last `added` of them new, the others from old ones."""

    moves: Moves
    num_classes: int
    added: int = 0
    margin: Margin | None = None
    class_weights: Tensor | None = None


class Changeable(Protocol):
    """A loss whose classes may change. class_changes: how often they did. init_std: of drawn rows."""

    num_classes: int
    embedding_size: int
    seed: int
    init_std: float
    ignore_index: int
    class_changes: int

    @property
    def on_nonfinite(self) -> str: ...

    @property
    def class_rows(self) -> ClassRows: ...

    @property
    def normalizes(self) -> bool:
        """Whether only the direction of a row counts."""

    def pending_work(self) -> str:
        """Return what must be finished before classes change, and how; "" if nothing."""

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        """Check what else is per class for the new classes; call the result when the rows have moved."""

    def adopt(self, parameters: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Take the parameters of the new classes."""
