"""Whose rows are in a state dict? In a group `load_state_dict` of a loss and of its optimizer is a collective.

    a DTensor from state_dict()     marked with the rows that it has, also in a file: they must be this rank's
    a DTensor without a mark        a copy (cpu(), clone()): the state's own `rows` must be this rank's; what torch's
                                    distributed checkpoints have put on ranks is this rank's
    a plain tensor [C, ...]         every rank takes its rows

If one rank cannot load, no rank does, and all raise the same error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc.distributed.callers import callers
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.shards import is_own_mesh
from partial_fc.distributed.texts import gather_texts
from partial_fc.optim.protocol import STATE_DICTS
from partial_fc.rows import ClassRows

Value = TypeVar("Value")

MASTER = "master_weight"  # state of this package's own, beside that of the wrapped class
COUNT = "rounding_step"
MARK = "partial_fc_rows"  # attribute of a DTensor in a state dict
WAY = (
    "state_dict() on one rank has the rows of that rank alone. Save by save_checkpoint on every rank, which loads at "
    "any number of ranks; class weights from elsewhere come by import_weights"
)


def own_rows(rows: ClassRows) -> dict[str, int]:
    """Return whose rows a state has: class ids [lo, hi), and which rank of how many owns them."""
    shards = rows.shards
    return {"lo": shards.lo, "hi": shards.hi, "rank": shards.ranks.rank, "world": shards.ranks.world}


def marked(rows: ClassRows, value: Value) -> Value:
    """Return a value of a state dict; a DTensor is marked with the rows that it has here."""
    if isinstance(value, DTensor):
        setattr(value, MARK, own_rows(rows))
    return value


def stated_rows(rows: ClassRows) -> dict[str, int] | None:
    """Return what a state says about its rows; None to torch.distributed.checkpoint, which brings each rank its own."""
    by_torch = any(frame.f_globals.get("__name__") == STATE_DICTS for frame in callers())
    return None if by_torch else own_rows(rows)


def row_problem(rows: ClassRows, name: str, value: Any, shape: Iterable[int], state: Any) -> str:
    """Return why a stored tensor cannot be loaded as rows of this rank; "" if it can.

    shape: `[C, ...]`. state: where `stated_rows` stands under "rows", if it stands anywhere.
    """
    shape = tuple(shape)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return f"{name} is {found} in it, and {list(shape)} here{_partial(rows, value, shape)}"
    if not isinstance(value, DTensor):
        return ""
    stored = getattr(value, MARK, None)
    if stored is None:
        says = isinstance(state, Mapping) and "rows" in state
        stored = state["rows"] if says else None
        if says and stored is None and is_own_mesh(value.device_mesh):
            return ""
    if stored is None:
        return f"it does not say which rows of {name} it has. {WAY}"
    mine = own_rows(rows)
    if all(stored.get(key) == mine[key] for key in ("lo", "hi", "world")):
        return ""
    return (
        f"its {name} has the classes {stored['lo']} to {stored['hi'] - 1}, as rank {stored['rank']} of "
        f"{stored['world']} saved them; this rank owns {mine['lo']} to {mine['hi'] - 1}, as rank {mine['rank']} of "
        f"{mine['world']}. {WAY}"
    )


def _partial(rows: ClassRows, value: Any, shape: tuple[int, ...]) -> str:
    """Return what to do about a plain tensor of some of the rows."""
    if not isinstance(value, Tensor) or tuple(value.shape[1:]) != shape[1:] or rows.shards.ranks.world == 1:
        return ""
    if len(value) > shape[0]:
        return f": build the head for {len(value)} classes, load, then call remap()"
    return f": give all {shape[0]} rows to every rank. {WAY}"


def taken(rows: ClassRows, value: Tensor) -> Tensor:
    """Return the stored tensor `[C, ...]` as this rank holds it: a DTensor of its own rows where there is a group."""
    if rows.shards.mesh is None and not isinstance(value, DTensor):
        return value
    if isinstance(value, DTensor):
        return rows.shards.wrap(value.to_local())
    return rows.shards.wrap(value[rows.shards.lo : rows.shards.hi])


def agree_to_load(
    rows: ClassRows, what: str, problem: str, absent: Iterable[str] = (), more: Iterable[str] = ()
) -> tuple[set[str], set[str]]:
    """Return the keys that are absent, and those that are too many, on any rank; a collective where there is a group.

    Raises ValueError on every rank if any has a problem.
    """
    ranks, everyone = rows.shards.ranks, [(problem, sorted(absent), sorted(more))]
    if ranks.group is not None and rows.device.type != "meta":
        mine = everyone[0]
        if any(unusual for (unusual,) in meet("load_state_dict", ranks, rows.device, (any(map(bool, mine)),))):
            everyone = [tuple(json.loads(text)) for text in gather_texts(json.dumps(mine), ranks, rows.device)]
    problems, lacking, having = zip(*everyone, strict=True)
    flat = next((flat for flat, each in enumerate(problems) if each), None)
    if flat is not None:
        who = "" if len(set(problems)) == 1 else f"{ranks.name(flat)}: "
        raise ValueError(f"{who}{what} cannot be loaded: {problems[flat]}")
    return set().union(*lacking), set().union(*having)
