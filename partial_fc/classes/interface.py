"""The interface that changes of classes need of a loss. `ChangeableLoss` (loss.py) implements it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from partial_fc.classes.mapping import ClassMoves
from partial_fc.distributed.shards import ClassShards
from partial_fc.margins.base import Margin
from partial_fc.rows import ClassRows


@dataclass(frozen=True)
class Change:
    """The classes after a change: `num_classes`, of which the last `added` are new and the others follow `moves`.

    mapping: `[C]` int64 on the CPU, the new id of each old class, −1 where it is gone; None where all keep theirs.
    """

    moves: ClassMoves
    num_classes: int
    added: int = 0
    margin: Margin | None = None
    class_weights: Tensor | None = None
    mapping: Tensor | None = None


class Changeable(Protocol):
    """A loss whose classes can change. class_changes: number of changes so far. init_std: deviation of drawn rows."""

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
        """Return what must be finished before classes change, and how; "" if nothing is pending."""

    def prepare_tables(self, change: Change) -> Callable[[], None]:
        """Check class weights and margin for the new classes; call the result after the rows have moved."""

    def adopt(self, parameters: dict[str, nn.Parameter], shards: ClassShards) -> None:
        """Hold the parameters of the new classes."""


def check_loss(given: Any, call: str) -> None:
    """TypeError, with the call as it is to be written, unless `given` has class rows."""
    if not isinstance(getattr(given, "class_rows", None), ClassRows):
        raise TypeError(f"{call} takes a PartialFC or CenterLoss there, not {type(given).__name__}")
