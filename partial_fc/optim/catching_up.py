"""What steps need not do about rows that have missed some: bring all of them up to date, and notice what cannot go on.

write_moved      rows make their steps in memory, in blocks, for whoever reads or writes them outside a step
are_of_same_kind options that were set in the middle of a run
warn_of_writes   rows that somebody else has written
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partial_fc.distributed.ranks import local_part
from partial_fc.errors import log
from partial_fc.optim.kernel_moves import moved_by_kernel
from partial_fc.optim.rounding import round_at_random
from partial_fc.optim.stored_rows import COUNT, MASTER
from partial_fc.sampling import mix

if TYPE_CHECKING:
    from partial_fc.rows import ClassRows


@torch.no_grad()
def write_moved(behind: Any, index: Tensor | None) -> None:
    """Bring the local rows `index`, or all, of a `SkippedRows` to where the dense optimizer would have them now."""
    done, rows = behind.done, behind.rows
    assert done is not None
    for a, b in behind.blocks(len(done) if index is None else len(index)):
        part = torch.arange(a, b, device=done.device) if index is None else index[a:b]
        if done.device.type == "cpu":  # elsewhere the host would wait for how many are left
            part = part[done.index_select(0, part) < behind.steps]
        moved = {name: each.new_rows(part) for name, each in behind.parameters.items()}
        if rows.kernels is None or not moved_by_kernel(behind, part, moved):
            behind.move(part, moved)
        for name, values in moved.items():
            _put(rows, behind.parameters[name], part, values)
        del moved, values  # before the next block has its own
        done.index_fill_(0, part, behind.steps)
    if index is None:
        behind.forget()


def _put(class_rows: ClassRows, of: Any, index: Tensor, values: list[Tensor]) -> None:
    """Write rows and their state. of: their parameter, with what its rows have missed."""
    tensors, rows = of.tensors(), values[0]
    if MASTER in of.state:
        tensors, values = [*tensors, local_part(of.parameter.detach())], [*values, rows]
    elif COUNT in of.state:
        ids = class_rows.shards.lo + index
        values = [round_at_random(rows, ids, mix(class_rows.seed, of.state[COUNT], 1)), *values[1:]]
    for tensor, value in zip(tensors, values, strict=True):
        # not a version of the parameter: a forward whose backward is to come has its own rows up to date already
        tensor.data.index_copy_(0, index, value.to(tensor.dtype))


def put_frozen(
    behind: Any, index: Tensor | None, taken: Mapping[str, Mapping[str, Tensor]], moved: Mapping[str, Any]
) -> None:
    """Write rows that were taken of parameters which were not moved, because they are frozen: the steps that they have
    missed are from before."""
    assert index is not None
    for name in taken.keys() - moved.keys():
        _put(behind.rows, behind.parameters[name], index, [*taken[name].values()])


def are_of_same_kind(behind: Any, options: Mapping[str, Any]) -> bool:
    """Return whether those are zero, or the same choice, that were before; ValueError if nobody knows what a step with
    them does to a row without gradient."""
    kinds, before = _kinds(options), _kinds(behind.options)
    for option in behind.form.OF_OPTION.values() if behind.parameters else ():
        if kinds.get(option) and not before.get(option):
            raise ValueError(
                f"{option} of {behind.cls.__name__} was switched on in a run, but its state is not from the steps "
                "before: leave it as it was, or build another RowOptimizer"
            )
    if kinds != before and behind.form_of(behind.cls, options) is not behind.form:
        changed = {name: options[name] for name, kind in kinds.items() if kind != before.get(name)}
        raise ValueError(f"options of {behind.cls.__name__} were changed to another kind of update: {changed}")
    return kinds == before


def _kinds(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name which options are zero, and which choice others are; a rate may be anything."""
    return {k: _kind(v) for k, v in options.items() if k not in ("params", "lr", "initial_lr", "max_lr", "min_lr")}


def _kind(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return "tensor"
    return bool(value) if isinstance(value, int | float) else value


def warn_of_writes(rows: ClassRows) -> None:
    log.warning(
        "rows of a %s, or their optimizer state, were written between steps, without RowOptimizer.catch_up() before: "
        "they are taken as they are, and steps that rows had missed until then are lost",
        rows.owner,
    )
