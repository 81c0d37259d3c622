"""What the steps that rows have missed are described by: the form of a step without a gradient, and a step taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from partial_fc.optim.moves import Probe


class Moves(Protocol):
    """What the steps since a start do, for every start that a row may have.

    keys: row state that takes part. Entry i is for rows that stopped i steps after the first start. MOST: so many
    steps are kept; the table is worked on at every step. OF_OPTION: options without which a step leaves a key alone.
    """

    MOST: int
    OF_OPTION: ClassVar[Mapping[str, str]]
    keys: tuple[str, ...]

    def __init__(self, keys: tuple[str, ...]) -> None: ...

    def has_form(self, shape: list[int], entries: int) -> bool:
        """Return whether a stored table of this shape may be one with so many entries."""

    def load(self, table: Tensor) -> None:
        """Go on with a stored table. ValueError if it is damaged."""

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        """Return what one more step does: numbers for `extend`."""

    def extend(self, step: Tensor | None) -> None:
        """Add a step to the table; None for one that leaves the parameter alone."""

    def changes_rows(self, step: Tensor) -> bool:
        """Return whether a step does anything."""

    def coefficients(self) -> Tensor:
        """Return the table for `move`, `[1 + steps, n]` in float64; the last entry changes nothing."""

    def move(self, values: list[Tensor], coefficients: Tensor, outs: list[Tensor]) -> None:
        """Write to `outs` weights and state `[S, D]` after the steps. coefficients: `[S, n]`, the row of each."""


FormOf = Callable[[type[torch.optim.Optimizer], Mapping[str, Any]], type[Moves]]  # ValueError if there is none


class Update(Protocol):
    """What a step did to a parameter. before: the state before it, with this scalar state."""

    @property
    def parameter(self) -> Tensor: ...

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def before(self) -> dict[str, Any]: ...
