"""Steps that rows have missed, in a checkpoint: rows as they are, and what they are to make up for.

saved(behind)       how many steps each row has had `[C]`, and the tables of its parameters (moves.py)
restore(rows, ...)  a run goes on with them: the same numbers, bit for bit, as if it had not been interrupted
make_up(...)        rows of such a checkpoint and their state as they would be, for whoever takes them alone
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from partial_fc.checkpoint.parts import MADE_UP
from partial_fc.distributed.ranks import local_part
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.forms import Moves
from partial_fc.optim.moves import LinearMoves
from partial_fc.optim.skipped_rows import SkippedRows
from partial_fc.optim.stored_rows import MASTER
from partial_fc.rows import ClassRows

FORMS: dict[str, type[Moves]] = {form.__name__: form for form in (LinearMoves, AdamMoves)}


def saved(behind: SkippedRows | None) -> dict[str, Any] | None:
    """Return what the rows of a loss have missed, for a state dict; None if nothing."""
    if behind is None or not behind.steps or behind.done is None:
        return None
    places = list(behind.rows.parameters)
    parameters = {
        name: {
            "place": places.index(name),
            "keys": list(each.moves.keys),
            "table": each.moves.table.clone(),  # type: ignore[attr-defined]
            "scalars": dict(each.probe.scalars),
            "known": each.probe.known,
        }
        for name, each in behind.parameters.items()
    }
    return {
        "form": behind.form.__name__,
        "steps": behind.steps,
        "first": behind.first,
        "done": behind.rows.shards.wrap(behind.done),
        "parameters": parameters,
    }


def restore(
    behind: SkippedRows, state: Mapping[str, Any], options: Mapping[str, Any], states: Mapping[str, dict[str, Any]]
) -> None:
    """Go on with what was saved. states: of the optimizer, by the name of the parameter, loaded already."""
    rows = behind.rows
    updates = {}
    for name, each in state["parameters"].items():
        parameter = rows.parameters[name]
        updates[name] = SimpleNamespace(parameter=parameter, state=states[name], before=each["scalars"])
    behind.begin(options, updates)
    for name, each in state["parameters"].items():
        behind.parameters[name].moves.load(each["table"])
        behind.parameters[name].probe.scalars = dict(each["scalars"])
        behind.parameters[name].probe.known = each["known"]
    behind.steps, behind.first = state["steps"], state["first"]
    behind.done = local_part(state["done"]).to(rows.home)
    behind.seen = behind.versions()


def problem_of(rows: ClassRows, state: Any) -> str:
    """Return why what was saved is damaged, or belongs to another class of optimizer; "" if it does not. Tensors may be
    placeholders."""
    try:
        form, steps, first, parameters = FORMS[state["form"]], state["steps"], state["first"], state["parameters"]
        assert rows.behind is None or rows.behind.form is form, f"they are of another class of optimizer ({form})"
        assert isinstance(steps, int) and isinstance(first, int) and 0 <= first <= steps, "its counts"
        assert parameters.keys() <= rows.parameters.keys() and state["done"] is not None, f"it has {[*parameters]}"
        for each in parameters.values():
            assert isinstance(each["keys"], list) and isinstance(each["scalars"], dict), "its state"
            table, moves = each["table"], form(tuple(each["keys"]))
            assert isinstance(table, Tensor | dict), "its table"
            if isinstance(table, Tensor):
                assert moves.has_form(list(table.shape), steps - first + 1), f"its table of {list(table.shape)}"
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"the steps that its rows have missed are damaged: {error}"
    return ""


def make_up(state: Mapping[str, Any], name: str, values: Mapping[str, Tensor], done: Tensor) -> dict[str, Tensor]:
    """Return rows `[n, ...]` of the parameter `name`, under "", and their state by key, after the steps that they have
    missed. values: they as they were saved, with float32 weights where there are. done: `[n]`."""
    each = state["parameters"].get(name)
    if each is None:
        return dict(values)
    moves = FORMS[state["form"]](tuple(each["keys"]))
    moves.load(each["table"])
    rows = values.get(MASTER, values[""])
    dtype = torch.promote_types(rows.dtype, torch.float32)
    coefficients = moves.coefficients().to(dtype).index_select(0, done - state["first"])
    given = [tensor.flatten(1).to(dtype) for tensor in (rows, *(values[key] for key in moves.keys))]
    moved = [torch.empty_like(each) for each in given]
    moves.move(given, coefficients, moved)
    named = zip(("", *moves.keys), moved, strict=True)
    found = {key: value.view_as(values[key]).to(values[key].dtype) for key, value in named}
    return {**values, **found, **({MASTER: moved[0].view_as(rows).to(rows.dtype)} if MASTER in values else {})}


MADE_UP.append(make_up)  # checkpoints know nothing of optimizers
