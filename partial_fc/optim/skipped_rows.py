"""Deferred dense updates: a row that a step did not select is brought to where the dense optimizer would have it when
it is next looked at.

    step      count           what it does to a row without a gradient, found once for all rows, on the host
                              (moves.py); `done` of the rows that had one is the number of steps
    forward   take(rows)      the rows that it selects are copied and get the steps that they missed: an entry of a
                              table each; the update takes the same copies
    readers   catch_up()      whoever reads or writes rows outside a step brings all of them up to date, once

So a sampled run is that of a dense optimizer whose gradient is zero where a row was not selected, at the cost of the
selected rows. It is the same to rounding wherever rows are brought up to date in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partial_fc.distributed.dtensors import local_part
from partial_fc.errors import log
from partial_fc.optim.forms import FormOf, Moves, Update
from partial_fc.optim.kernel_moves import TAKEN_DIRECTIONS, directions_memory, moved_by_kernel
from partial_fc.optim.moves import Probe, is_row_state
from partial_fc.optim.oldest import forget_oldest
from partial_fc.optim.rounding import round_at_random
from partial_fc.optim.stored_rows import COUNT, MASTER
from partial_fc.sampling import mix

if TYPE_CHECKING:
    from partial_fc.rows import ClassRows

BLOCK_BYTES = 1 << 20  # of one temporary: several stay in the cache of a CPU
BLOCK_BYTES_ELSEWHERE = 64 << 20  # so many of them are the peak of many a step at a low rate
TAKEN_BYTES = 1 << 30  # of rows and their state between forward and update


class SkippedRows:
    """The steps that the rows of one loss have missed.

    steps: how many were counted since all rows were up to date. done: `[C_local]` int32, how many of them each has had.
    first: how many the tables begin with (oldest.py).
    """

    def __init__(
        self, rows: ClassRows, cls: type[torch.optim.Optimizer], options: Mapping[str, Any], form_of: FormOf
    ) -> None:
        self.rows = rows
        self.cls = cls
        self.form_of = form_of
        self.form = form_of(cls, options)
        self.kinds = _kinds(options)
        self.steps = self.first = 0
        self.done: Tensor | None = None
        self.parameters: dict[str, _Behind] = {}
        self.tables: list[Tensor] = []  # of the parameters, on the device of the rows
        self.taken: tuple[Tensor, dict[str, dict[str, Tensor]]] | None = None
        self.seen: list[tuple[int, int]] = []  # the parameters' memory, after the last step

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if options were set with which nobody knows what a step does to a row without gradient."""
        kinds = _kinds(options)
        if kinds != self.kinds and self.form_of(self.cls, options) is not self.form:
            changed = {name: options[name] for name, kind in kinds.items() if kind != self.kinds.get(name)}
            raise ValueError(f"options of {self.cls.__name__} were changed to another kind of update: {changed}")
        self.kinds = kinds

    def count(self, options: Mapping[str, Any], updates: Mapping[str, Update], selected: Tensor | None) -> None:
        """A step was taken. updates: of the parameters that had a gradient, by name; selected: local rows `[S]`."""
        if not all(name in self.parameters and self.parameters[name].is_of(u) for name, u in updates.items()):
            if self.steps:
                self.rows.catch_up()
            self.begin(options, updates)
        steps = {name: self.parameters[name].moves.find(self.parameters[name].probe, options) for name in updates}
        self.seen = self.memory()
        if not any(self.parameters[name].moves.moves(step) for name, step in steps.items()):
            return  # rows without a gradient stand still
        for name, behind in self.parameters.items():
            behind.moves.extend(steps.get(name))
        self.steps += 1
        self.tables = []
        if self.done is None:
            local = local_part(self.rows.main.detach())
            self.done = torch.zeros(len(local), dtype=torch.int32, device=local.device)
        if selected is not None:
            self.done.index_fill_(0, selected, self.steps)
        if self.steps - self.first >= self.form.MOST:
            forget_oldest(self)

    def begin(self, options: Mapping[str, Any], updates: Mapping[str, Update]) -> None:
        """Describe the steps of these parameters from here on."""
        self.parameters = {n: _Behind(self, u, Probe(self.cls, options, u.before)) for n, u in updates.items()}

    @torch.no_grad()
    def catch_up(self, index: Tensor | None = None) -> None:
        """Bring the local rows `index`, or all, to where the dense optimizer would have them now."""
        if not self.some_are_behind():
            return
        assert self.done is not None
        for a, b in self._blocks(len(self.done) if index is None else len(index)):
            part = torch.arange(a, b, device=self.done.device) if index is None else index[a:b]
            if self.done.device.type == "cpu":  # elsewhere the host would wait for how many are left
                part = part[self.done.index_select(0, part) < self.steps]
            for behind, moved in zip(self.parameters.values(), self._moved(part), strict=True):
                behind.put(part, moved)
            del moved  # before the next block has its own
            self.done.index_fill_(0, part, self.steps)
        if index is None:
            self.forget()

    @torch.no_grad()
    def take(self, index: Tensor) -> dict[str, Tensor] | None:
        """Return by parameter the local rows `index [S]` as they are now; None where the memory has them so.

        They stay at hand for the update, so that nothing is written before it. Where they are large they are written.
        """
        self.taken = None
        if not self.some_are_behind():
            return None
        if sum(each.nbytes(len(index)) for each in self.parameters.values()) > TAKEN_BYTES:
            self.catch_up(index)
            self.taken = index, {}
            return None
        blocks = list(self._blocks(len(index)))
        if len(blocks) == 1 and self.rows.kernels is None:
            values = self._moved(index)
        else:
            values = memory = [each.memory(len(index)) for each in self.parameters.values()]
            for a, b in blocks:
                values = self._moved(index[a:b], [[tensor[a:b] for tensor in tensors] for tensors in memory])
            values = [whole[: len(part)] for whole, part in zip(memory, values, strict=True)]
        named = {
            n: dict(zip(("", *b.moves.keys, *TAKEN_DIRECTIONS), v, strict=False))
            for (n, b), v in zip(self.parameters.items(), values, strict=True)
        }
        directions = {key: each.pop(key) for each in named.values() for key in TAKEN_DIRECTIONS if key in each}
        self.taken = index, named
        of = self.rows.parameters
        rows = {n: named[n][""] if n in named else local_part(p.detach()).index_select(0, index) for n, p in of.items()}
        return {name: current.to(of[name].dtype) for name, current in rows.items()} | directions

    def of_update(self, selected: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """Return by parameter what the forward of these rows took: rows, under "", and their state. Nothing, if that
        was another forward; then the memory has them."""
        taken, self.taken = self.taken, None
        if taken is not None and taken[0] is selected and self.some_are_behind():
            return taken[1]
        self.catch_up(selected)
        return {}

    def some_are_behind(self) -> bool:
        """Return whether rows may have missed steps. If somebody else wrote rows they are taken as they are, with a
        warning."""
        if self.steps and self.seen != self.memory():
            log.warning(
                "rows of a %s were written between steps, without RowOptimizer.catch_up() before: they are taken as "
                "they are, and steps that rows had missed until then are lost",
                self.rows.owner,
            )
            self.forget()
        return self.steps > 0

    def _moved(self, index: Tensor, outs: list[list[Tensor]] | None = None) -> list[list[Tensor]]:
        """Return for each parameter its rows `index [S]` and their state after the steps that they have missed, in the
        memory `outs` if there is any."""
        assert self.done is not None
        self.tables = self.tables or [each.table(self.rows.home) for each in self.parameters.values()]
        place = self.done.index_select(0, index).sub_(self.first) if self.first else self.done.index_select(0, index)
        memory: Sequence[list[Tensor] | None] = outs or [None] * len(self.tables)
        each = zip(self.parameters.values(), self.tables, memory, strict=True)
        return [behind.moved(index, table.index_select(0, place), out) for behind, table, out in each]

    def _blocks(self, count: int) -> Iterator[tuple[int, int]]:
        most = BLOCK_BYTES if self.rows.home.type == "cpu" else BLOCK_BYTES_ELSEWHERE
        size = max(1, most // (4 * math.prod(self.rows.main.shape[1:])))
        for a in range(0, count, size):
            yield a, min(a + size, count)

    def forget(self) -> None:
        """Take all rows as they are."""
        if self.rows.store is not None:
            self.rows.store.note(None)
        self.steps, self.first, self.done, self.tables, self.parameters, self.taken = 0, 0, None, [], {}, None

    def memory(self) -> list[tuple[int, int]]:
        """Return what changes when somebody else writes rows."""
        local = (local_part(p.detach()) for p in self.rows.parameters.values())
        return [(each.data_ptr(), each._version) for each in local]  # noqa: SLF001


class _Behind:
    """One parameter of the loss, its state, and what the steps that were counted do to a row of it."""

    def __init__(self, of: SkippedRows, update: Update, probe: Probe) -> None:
        self.rows = of.rows
        self.parameter = update.parameter
        self.state = update.state
        self.moves: Moves = of.form(row_keys(update))
        self.probe = probe

    def is_of(self, update: Update) -> bool:
        return self.state is update.state and self.moves.keys == row_keys(update)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def table(self, device: torch.device) -> Tensor:
        return self.moves.coefficients().to(self.dtype).to(device, non_blocking=True)

    def nbytes(self, count: int) -> int:
        """Return the size of `memory(count)`."""
        return count * sum(math.prod(t.shape[1:]) for t in self._tensors()) * self.dtype.itemsize

    def memory(self, count: int) -> list[Tensor]:
        """Return memory for so many rows, and for each piece of their state."""
        rows = [t.new_empty(count, *t.shape[1:], dtype=self.dtype) for t in self._tensors()]
        return rows if self.rows.kernels is None else rows + directions_memory(self.rows, self.parameter, count)

    def moved(self, index: Tensor, coefficients: Tensor, outs: list[Tensor] | None) -> list[Tensor]:
        """Return the local rows `index [S]` and their state after the steps of their entries in the table `[S, n]`."""
        tensors = self._tensors()
        sizes = [(len(index), math.prod(t.shape[1:])) for t in tensors]
        if self.rows.kernels is not None:
            taken = moved_by_kernel(self.rows, self.moves, tensors, index, coefficients, outs)
            if taken is not None:
                return taken
        values = [t.index_select(0, index).view(s).to(coefficients.dtype) for t, s in zip(tensors, sizes, strict=True)]
        memory = [None] * len(values) if outs is None else [o.view(s) for o, s in zip(outs, sizes, strict=False)]
        found = self.moves.move(values, coefficients, memory)
        return [each.view(-1, *t.shape[1:]) for each, t in zip(found, tensors, strict=True)]

    def put(self, index: Tensor, values: list[Tensor]) -> None:
        """Write rows and their state."""
        tensors, rows = self._tensors(), values[0]
        if MASTER in self.state:
            tensors, values = [*tensors, local_part(self.parameter.detach())], [*values, rows]
        elif COUNT in self.state:
            rows = round_at_random(rows, self.rows.shards.lo + index, mix(self.rows.seed, self.state[COUNT], 1))
            values = [rows, *values[1:]]
        for tensor, value in zip(tensors, values, strict=True):
            # not a version of the parameter: a forward whose backward is to come has its own rows up to date already
            tensor.data.index_copy_(0, index, value.to(tensor.dtype))

    def _tensors(self) -> list[Tensor]:
        """Return the rows that move, float32 ones where there are, and their state."""
        rows = self.state.get(MASTER, self.parameter)
        return [local_part(t.detach()) for t in (rows, *(self.state[key] for key in self.moves.keys))]


def row_keys(update: Update) -> tuple[str, ...]:
    """Return the row state of a parameter but for its float32 weights."""
    found = (key for key, value in update.state.items() if is_row_state(value, update.parameter))
    return tuple(sorted(key for key in found if key != MASTER))


def _kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name which options are zero, and which choice others are; a rate may be anything."""
    return {k: _kind(v) for k, v in options.items() if k not in ("params", "lr", "initial_lr", "max_lr", "min_lr")}


def _kind(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return "tensor"
    return bool(value) if isinstance(value, int | float) else value
