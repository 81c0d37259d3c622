"""Deferred dense updates: a row that a step did not select is brought to where the dense optimizer would have it when
it is next looked at.

    step      count           what it does to a row without a gradient, found once for all rows, on the host
                              (no_gradient.py); `done` of the rows that had one is the number of steps
    forward   catch_up(rows)  the rows that it selects first get the steps that they missed: an entry of a table each
    readers   catch_up()      whoever reads or writes rows outside a step brings all of them up to date, once

So a sampled run is that of a dense optimizer whose gradient is zero where a row was not selected, at the cost of the
selected rows. It is the same to rounding wherever rows are brought up to date in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from partial_fc.distributed.dtensors import local_part
from partial_fc.errors import log
from partial_fc.optim.no_gradient import Moves, Probe, form_of
from partial_fc.optim.rounding import round_at_random
from partial_fc.optim.stored_rows import COUNT, MASTER
from partial_fc.sampling import mix

if TYPE_CHECKING:
    from partial_fc.rows import ClassRows

BLOCK_BYTES = 1 << 20  # of one temporary: several stay in the cache of a CPU
BLOCK_BYTES_ELSEWHERE = 256 << 20


class Update(Protocol):
    """What a step did to a parameter. before: the state before it, with this scalar state."""

    @property
    def parameter(self) -> Tensor: ...

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def before(self) -> dict[str, Any]: ...


class SkippedRows:
    """The steps that the rows of one loss have missed.

    steps: how many were counted. floor: all rows have had so many. done: `[C_local]` int32, how many each has had where
    that is more.
    """

    def __init__(self, rows: ClassRows, cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
        self.rows = rows
        self.cls = cls
        self.form = checked_form(cls, options)
        self.kinds = _kinds(options)
        self.steps = self.floor = 0
        self.done: Tensor | None = None
        self.parameters: dict[str, _Behind] = {}
        self.tables: list[Tensor] = []  # of the parameters, on the device of the rows
        self.seen: list[tuple[int, int]] = []  # the parameters' memory, after the last step

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if options were set with which nobody knows what a step does to a row without gradient."""
        kinds = _kinds(options)
        if kinds != self.kinds and checked_form(self.cls, options) is not self.form:
            raise ValueError(f"options of {self.cls.__name__} were changed to another kind of update: {dict(options)}")
        self.kinds = kinds

    def count(self, options: Mapping[str, Any], updates: Mapping[str, Update], selected: Tensor | None) -> None:
        """A step was taken. updates: of the parameters that had a gradient, by name; selected: local rows `[S]`."""
        if not all(name in self.parameters and self.parameters[name].is_of(u) for name, u in updates.items()):
            self.catch_up()
            self.forget()
            self.parameters = {
                name: _Behind(self.rows, self.form, u, Probe(self.cls, options, u.before))
                for name, u in updates.items()
            }
        steps = {name: self.parameters[name].moves.find(self.parameters[name].probe, options) for name in updates}
        self.seen = self._memory()
        if not any(self.parameters[name].moves.moves(step) for name, step in steps.items()):
            return  # rows without a gradient stand still
        for name, behind in self.parameters.items():
            behind.moves.extend(steps.get(name))
        self.steps += 1
        self.tables = []
        if self.done is None or self.done.shape != (self.rows.shards.local,) or self.done.device != self.rows.device:
            self.done = torch.full((self.rows.shards.local,), self.floor, dtype=torch.int32, device=self.rows.device)
        if selected is not None:
            self.done.index_fill_(0, selected, self.steps)
        if self.steps - self.floor >= self.form.MOST:
            self.catch_up()

    @torch.no_grad()
    def catch_up(self, index: Tensor | None = None) -> None:
        """Bring the local rows `index`, or all, to where the dense optimizer would have them now."""
        if self.steps == self.floor:
            return
        if self.seen != self._memory():
            log.warning(
                "rows of a %s were written between steps, without RowOptimizer.catch_up() before: they are taken as "
                "they are, and steps that rows had missed until then are lost",
                self.rows.owner,
            )
            self.forget()
            return
        assert self.done is not None
        self.tables = self.tables or [each.table(self.rows.device) for each in self.parameters.values()]
        most = BLOCK_BYTES if self.done.device.type == "cpu" else BLOCK_BYTES_ELSEWHERE
        size = max(1, most // (4 * math.prod(self.rows.main.shape[1:])))
        for start in range(0, len(self.done) if index is None else len(index), size):
            if index is None:
                part = torch.arange(start, min(start + size, len(self.done)), device=self.done.device)
            else:
                part = index[start : start + size]
            done = self.done.index_select(0, part)
            if done.device.type == "cpu":  # elsewhere the host would wait for how many are left
                part, done = part[done < self.steps], done[done < self.steps]
            place = done.sub_(self.floor).clamp_(min=0)
            for behind, table in zip(self.parameters.values(), self.tables, strict=True):
                behind.apply(part, table.index_select(0, place))
            self.done.index_fill_(0, part, self.steps)
        if index is None:
            self.forget()

    def forget(self) -> None:
        """Take all rows as they are."""
        self.floor, self.tables, self.parameters = self.steps, [], {}

    def _memory(self) -> list[tuple[int, int]]:
        """Return what changes when somebody else writes rows."""
        local = (local_part(p.detach()) for p in self.rows.parameters.values())
        return [(each.data_ptr(), each._version) for each in local]  # noqa: SLF001


class _Behind:
    """One parameter of the loss, its state, and what the steps since the floor do to a row of it."""

    def __init__(self, rows: ClassRows, form: type[Moves], update: Update, probe: Probe) -> None:
        self.rows = rows
        self.parameter = update.parameter
        self.state = update.state
        self.moves = form(row_keys(update))
        self.probe = probe

    def is_of(self, update: Update) -> bool:
        return self.state is update.state and self.moves.keys == row_keys(update)

    def table(self, device: torch.device) -> Tensor:
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        return self.moves.coefficients().to(dtype).to(device, non_blocking=True)

    def apply(self, index: Tensor, coefficients: Tensor) -> None:
        """Move the local rows `index [S]` and their state. coefficients: `[S, n]` of their entries in the table."""
        # not a version of the parameter: a forward whose backward is to come has its own rows up to date already
        weight = local_part(self.parameter.detach()).data
        stored = [local_part(self.state[key]) for key in self.moves.keys]
        source = local_part(self.state[MASTER]) if MASTER in self.state else weight
        size = len(index), math.prod(weight.shape[1:])
        values = [t.index_select(0, index).view(size).to(coefficients.dtype) for t in (source, *stored)]
        moved, *states = self.moves.move(values, coefficients)
        moved = moved.view(-1, *weight.shape[1:])
        if source is not weight:
            source.index_copy_(0, index, moved)
        elif COUNT in self.state:
            key = mix(self.rows.seed, self.state[COUNT], 1)
            moved = round_at_random(moved, self.rows.shards.lo + index, key)
        weight.index_copy_(0, index, moved.to(weight.dtype))
        for tensor, value in zip(stored, states, strict=True):
            tensor.index_copy_(0, index, value.view(-1, *tensor.shape[1:]).to(tensor.dtype))


def row_keys(update: Update) -> tuple[str, ...]:
    """Return the row state of a parameter but for its float32 weights."""
    shape = update.parameter.shape
    found = (k for k, v in update.state.items() if isinstance(v, Tensor) and v.ndim and v.shape == shape)
    return tuple(sorted(key for key in found if key != MASTER))


def checked_form(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> type[Moves]:
    """Return the form of what a step does to a row without a gradient; ValueError if it has none."""
    form = form_of(cls, {k: v for k, v in options.items() if k != "params"})
    if form is None:
        raise ValueError(
            f'skipped_rows="dense" needs an optimizer that does the same to all rows without a gradient, or moves them '
            f"as Adam does: SGD, AdamW, Adam, NAdam, or RMSprop, Adagrad and Adadelta without weight_decay. "
            f"{cls.__name__} with these options does neither"
            + (": decay through the gradient enters its state. Use decoupled decay (AdamW)" if decays(options) else "")
            + ', or skipped_rows="still", which leaves rows where they are until they are selected again'
        )
    return form


def decays(options: Mapping[str, Any]) -> bool:
    return bool(options.get("weight_decay")) and not options.get("decoupled_weight_decay")


def _kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name which options are zero, and which choice others are; a rate may be anything."""
    return {k: _kind(v) for k, v in options.items() if k not in ("params", "lr", "initial_lr", "max_lr", "min_lr")}


def _kind(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return "tensor"
    return bool(value) if isinstance(value, int | float) else value
