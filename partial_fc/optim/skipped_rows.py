"""Deferred dense updates: a row that a step did not select is brought to where the dense optimizer would have it when
it is next looked at.

    forward   up_to_date(rows)  copies of the rows that it selects, after the steps that they missed: an entry of a
                                table each
    step      of_update(rows)   the same copies, for the update
              note_step         what the step does to a row without a gradient, found once for all rows, on the host
                                (moves.py); `done` of the rows that had one is the number of steps
    readers   catch_up()        whoever reads or writes rows outside a step brings all up to date, once (catching_up.py)

So a sampled run is that of a dense optimizer whose gradient is zero where a row was not selected, at the cost of the
selected rows. It is the same to rounding wherever rows are brought up to date in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import local_part
from partial_fc.optim import catching_up
from partial_fc.optim.forms import FormOf, Update
from partial_fc.optim.kernel_moves import take_by_kernels
from partial_fc.optim.moves import Probe, is_row_state
from partial_fc.optim.oldest import forget_oldest
from partial_fc.optim.stored_rows import MASTER

if TYPE_CHECKING:
    from partial_fc.rows import ClassRows

BLOCK_BYTES = 1 << 20  # of one temporary: several stay in the cache of a CPU
BLOCK_BYTES_ELSEWHERE = 64 << 20  # larger ones were the peak of memory at low sample rates
TAKEN_BYTES = 1 << 30  # of rows and their state between forward and update


class SkippedRows:
    """The steps that the rows of one loss have missed.

    steps: how many were counted since all rows were up to date. done: `[C_local]` int32, how many of them each has had.
    first: how many the tables begin with (oldest.py). parameters: by name, those that a step has moved.
    """

    def __init__(
        self, rows: ClassRows, cls: type[torch.optim.Optimizer], options: Mapping[str, Any], form_of: FormOf
    ) -> None:
        self.rows = rows
        self.cls = cls
        self.form_of = form_of
        self.form = form_of(cls, options)
        self.options = dict(options)  # at the last step
        self.seen: list[tuple[int, int]] = []  # the parameters' memory, after the last step
        self.forget()

    def forget(self) -> None:
        """Take all rows as they are."""
        if self.rows.store is not None:
            self.rows.store.note(None)
        self.steps = self.first = 0
        self.done: Tensor | None = None
        self.parameters: dict[str, _Parameter] = {}
        self.tables: dict[str, Tensor] = {}  # of the parameters, on the device of the rows
        self.taken: tuple[Tensor, dict[str, dict[str, Tensor]]] | None = None

    def check(self, options: Mapping[str, Any], states: Mapping[Any, Any]) -> None:
        """Raise ValueError if options were set with which nobody knows what a step does to a row without gradient.

        states: of the optimizer. Where they, or the kinds of the options, are no longer those that the tables describe,
        all rows make their steps now, before anything moves.
        """
        same = all(states.get(each.parameter) is each.state for each in self.parameters.values())
        if any(value is not self.options.get(name) for name, value in options.items()):
            same = catching_up.are_of_same_kind(self, options) and same
            self.options = dict(options)
        if not same:
            self.rows.catch_up()

    def note_step(self, options: Mapping[str, Any], updates: Mapping[str, Update], selected: Tensor | None) -> None:
        """A step was taken. updates: of the parameters that had a gradient, by name; selected: local rows `[S]`."""
        if not all(name in self.parameters and self.parameters[name].is_of(u) for name, u in updates.items()):
            if self.steps:
                self.rows.catch_up()
            self.begin(options, updates)
        effects = {name: self.parameters[name].moves.find(self.parameters[name].probe, options) for name in updates}
        self.seen = self.versions()
        if any(self.parameters[name].moves.changes_rows(effect) for name, effect in effects.items()):
            for name, each in self.parameters.items():
                each.moves.extend(effects.get(name))
            self.steps += 1
            self.tables = {}
        if not self.steps:
            return  # rows without a gradient stand still
        if self.done is None:
            local = local_part(self.rows.main.detach())
            self.done = torch.zeros(len(local), dtype=torch.int32, device=local.device)
        if selected is not None:  # they have made all their steps, and this one
            self.done.index_fill_(0, selected, self.steps)
        if self.steps - self.first >= self.form.MOST:
            forget_oldest(self)

    def begin(self, options: Mapping[str, Any], updates: Mapping[str, Update]) -> None:
        """Describe the steps of these parameters from here on."""
        self.parameters = {n: _Parameter(self, u, Probe(self.cls, options, u.before)) for n, u in updates.items()}

    def catch_up(self, index: Tensor | None = None) -> None:
        """Bring the local rows `index`, or all, to where the dense optimizer would have them now."""
        if self.some_are_behind():
            catching_up.write_moved(self, index)

    @torch.no_grad()
    def up_to_date(self, index: Tensor) -> dict[str, Tensor] | None:
        """Return by parameter the local rows `index [S]` as they are now; None where the memory has them so.

        The forward computes with them, and the update steps this very memory, so that nothing is written to the shard
        before it. Where they are large they are written to it at once.
        """
        self.taken = None
        if not self.some_are_behind():
            return None
        if len(index) * sum(each.row_bytes for each in self.parameters.values()) > TAKEN_BYTES:
            self.catch_up(index)
            self.taken = index, {}
            return None
        copies = {name: each.new_rows(index) for name, each in self.parameters.items()}
        directions = None if self.rows.kernels is None else take_by_kernels(self, index, copies)
        for a, b in self.blocks(len(index)) if directions is None else ():
            self.move(index[a:b], {name: [each[a:b] for each in tensors] for name, tensors in copies.items()})
        named = {n: dict(zip(("", *self.parameters[n].moves.keys), c, strict=True)) for n, c in copies.items()}
        self.taken = index, named
        of = self.rows.parameters
        rows = {n: named[n][""] if n in named else local_part(p.detach()).index_select(0, index) for n, p in of.items()}
        return {name: current.to(of[name].dtype) for name, current in rows.items()} | (directions or {})

    def of_update(self, selected: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """Return by parameter what the forward of these rows took: rows, under "", and their state. {} if they are of
        several forwards, or of another: then they are brought up to date in memory."""
        taken, self.taken = self.taken, None
        if taken is not None and taken[0] is selected and self.some_are_behind():
            return taken[1]
        self.catch_up(selected)
        return {}

    def some_are_behind(self) -> bool:
        """Return whether rows may have missed steps; rows that somebody else wrote are taken as they are."""
        if self.steps and self.seen != self.versions():
            catching_up.warn_of_writes(self.rows)
            self.forget()
        return self.steps > 0

    def move(self, index: Tensor, outs: dict[str, list[Tensor]]) -> None:
        """Write to `outs`, by parameter, its rows `index [S]` and their state after the steps that they have missed."""
        for name, tensors in outs.items():
            of = self.parameters[name]
            flat = [out.view(len(index), math.prod(out.shape[1:])) for out in tensors]
            pairs = zip(of.tensors(), flat, strict=True)
            given = [each.index_select(0, index).view_as(out).to(of.dtype) for each, out in pairs]
            of.moves.move(given, self.coefficients(name, index), flat)

    def coefficients(self, name: str, index: Tensor) -> Tensor:
        """Return the entries `[S, n]` of a parameter's table for the local rows `index [S]`."""
        assert self.done is not None
        if name not in self.tables:
            self.tables[name] = self.parameters[name].table(self.rows.home)
        place = self.done.index_select(0, index)
        return self.tables[name].index_select(0, place.sub_(self.first) if self.first else place)

    def blocks(self, count: int) -> Iterator[tuple[int, int]]:
        most = BLOCK_BYTES if self.rows.home.type == "cpu" else BLOCK_BYTES_ELSEWHERE
        size = max(1, most // (4 * math.prod(self.rows.main.shape[1:])))
        return ((a, min(a + size, count)) for a in range(0, count, size))

    def versions(self) -> list[tuple[int, int]]:
        """Return addresses and versions of rows and state: they change when somebody else writes."""
        state = (tensor for each in self.parameters.values() for tensor in each.tensors())
        local = [local_part(tensor.detach()) for tensor in (*self.rows.parameters.values(), *state)]
        return [(each.data_ptr(), each._version) for each in local]  # noqa: SLF001


class _Parameter:
    """One parameter of the loss, its state, and what the steps that were counted do to a row of it."""

    def __init__(self, of: SkippedRows, update: Update, probe: Probe) -> None:
        self.parameter, self.state, self.probe = update.parameter, update.state, probe
        self.dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        self.of = of
        self.moves = of.form(self._keys(update))

    def is_of(self, update: Update) -> bool:
        return self.state is update.state and self.moves.keys == self._keys(update)

    def _keys(self, update: Update) -> tuple[str, ...]:
        """Return the row state of a parameter that its steps move, but for its float32 weights."""
        optional = {k for k, option in self.of.form.OF_OPTION.items() if not self.of.options.get(option)}
        found = (key for key, value in update.state.items() if is_row_state(value, update.parameter))
        return tuple(sorted(key for key in found if key != MASTER and key not in optional))

    def table(self, device: torch.device) -> Tensor:
        return self.moves.coefficients().to(self.dtype).to(device, non_blocking=True)

    def tensors(self) -> list[Tensor]:
        """Return the rows that move, float32 ones where there are, and their state."""
        rows = self.state.get(MASTER, self.parameter)
        return [local_part(t.detach()) for t in (rows, *(self.state[key] for key in self.moves.keys))]

    @property
    def row_bytes(self) -> int:
        return sum(math.prod(t.shape[1:]) for t in self.tensors()) * self.dtype.itemsize

    def new_rows(self, index: Tensor) -> list[Tensor]:
        """Return memory for the rows `index` and for each piece of their state."""
        return [t.new_empty(len(index), *t.shape[1:], dtype=self.dtype) for t in self.tensors()]
