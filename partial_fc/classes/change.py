"""Change the classes of a loss during training: add, remove and merge them, or start them from class means.

    expand     adds classes C..C'-1: drawn, given, or the means of their samples; old ids stay as they are
    remap      mapping [C]: the new id of each old class, -1 to drop it; classes with the same new id are merged
               every rank validates the arguments, and all raise the first error before anything has changed
               rows (moves.py)  weight, then bias, then each optimizer state: one tensor at a time, to the shards of C'
               parameters       stay the same objects, so optimizers keep working
               tables           class weights, hard negatives, and margins with a value per class
    init_from_embeddings       rows become class means over a whole data set, streamed; each rank sums its own classes

The optimizer state of a row moves with it. New rows start with the state of a row that never had a gradient. No rank
ever holds the whole matrix.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from partial_fc.batch.building import digest_of_values
from partial_fc.classes.class_means import (
    ROW_BLOCK,
    Batches,
    NewRows,
    new_rows_from_means,
    row_blocks,
    row_shape,
    weight_rows,
)
from partial_fc.classes.interface import Change, Changeable
from partial_fc.classes.mapping import ClassMoves, Mapped, class_moves, validate_mapping
from partial_fc.classes.moves import move_rows
from partial_fc.distributed.given import as_whole
from partial_fc.distributed.inside_torch import check_can_be_given, give_tensor, tells_graphs
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.shards import ClassShards, local_part
from partial_fc.distributed.texts import gather_texts
from partial_fc.margins.base import Margin
from partial_fc.optim.moves import is_row_state
from partial_fc.optim.optimizer_class import initial_state
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import MASTER
from partial_fc.sampling import mix
from partial_fc.tiers.initial import initial_rows

Merge = Literal["mean", "first"]
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
Result = TypeVar("Result")

FRESH_ROWS = 0x66726573  # key of these draws; must never change, or a seed would give other rows


# ---------------------------------------------------------------------------------------------------- expand and remap


@torch.inference_mode(False)  # rows made in it could not be trained
@torch.no_grad()
def expand(
    loss: Changeable,
    new_classes: int,
    init: str | Tensor | Batches,
    optimizers: Optimizers,
    margin: Margin | None,
    class_weights: Any,
) -> None:
    """See `ChangeableLoss.expand`."""
    before = loss.num_classes
    check_reachable(loss)
    loss.class_rows.catch_up()
    given, new_classes = new_classes, as_whole(new_classes) or 0

    def prepare() -> tuple[_PreparedChange, dict[str, Any]]:
        if new_classes < 1:
            raise ValueError(f"new_classes must be an int of at least 1, not {given!r}")
        _check_init(init, (new_classes, *row_shape(loss)))
        change = Change(ClassMoves.identity(before), before + new_classes, new_classes, margin, class_weights)
        prepared, facts = _prepare(loss, change, optimizers)
        if isinstance(init, Tensor):
            kind: Any = digest_of_values(init)
        else:
            kind = "fresh" if isinstance(init, str) else "batches"
        return prepared, {"the call": "expand", "new_classes": new_classes, "init": kind, **facts}

    prepared = _prepare_on_every_rank(loss, prepare)
    rows = _fresh_rows(loss)
    if isinstance(init, Tensor):
        rows = _given_rows(init.detach(), before)
    elif not isinstance(init, str):
        rows = new_rows_from_means(loss, init, loss.class_rows.shards.resized(prepared.change.num_classes), rows)
    _apply_change(loss, prepared, rows)


@torch.inference_mode(False)
@torch.no_grad()
def remap(
    loss: Changeable, mapping: Mapped, merge: str, weights: Any, optimizers: Optimizers, margin: Margin | None
) -> None:
    """See `ChangeableLoss.remap`."""
    check_reachable(loss)
    loss.class_rows.catch_up()

    def prepare() -> tuple[_PreparedChange, dict[str, Any]]:
        ids = validate_mapping(mapping, loss.num_classes)
        moves = class_moves(ids, merge, weights)
        if len(row_shape(loss)) > 1 and moves.share is not None:
            raise ValueError(
                f'merge="mean" needs one center per class, but this {type(loss).__name__} has {row_shape(loss)[0]}: '
                'centers of different classes have no common order; use merge="first"'
            )
        prepared, facts = _prepare(loss, Change(moves, int(ids.max()) + 1, margin=margin, mapping=ids), optimizers)
        weights_digest = None if weights is None else digest_of_values(torch.as_tensor(weights, device="cpu"))
        arguments = {"the call": "remap", "mapping": digest_of_values(ids), "merge": merge, "weights": weights_digest}
        return prepared, {**arguments, **facts}

    _apply_change(loss, _prepare_on_every_rank(loss, prepare), None)


@dataclass(frozen=True)
class _PreparedChange:
    """A validated change.

    optimizers: those that hold a parameter, each with `rows_of_state` of every parameter by name.
    apply_tables: a function that replaces class weights and margin.
    """

    change: Change
    optimizers: list[tuple[torch.optim.Optimizer, dict[str, dict[str, float]]]]
    apply_tables: Callable[[], None]


def _prepare(loss: Changeable, change: Change, optimizers: Optimizers) -> tuple[_PreparedChange, dict[str, Any]]:
    """Return (the validated change, values that must be the same on all ranks, by their name in an error message)."""
    pending = loss.pending_work()
    if pending:
        raise RuntimeError(f"{pending}; they belong to the classes before the change")
    if not tells_graphs(_held_by_a_graph):
        raise RuntimeError(
            f"torch {torch.__version__} does not tell whether a loss still holds the rows of before the change, so "
            "classes cannot be changed with it; use a version that docs/versions.md lists, or build a new head and "
            "load a checkpoint into it"
        )
    for name, parameter in loss.class_rows.parameters.items():
        check_can_be_given(name, parameter)
        if _held_by_a_graph(parameter):
            raise RuntimeError(
                f"{name} is still held by the autograd graph of a loss: call backward() on the loss or delete it "
                "before changing classes"
            )
    held = []
    for optimizer in _optimizers_of(loss, optimizers):
        held.append((optimizer, {name: rows_of_state(optimizer, p) for name, p in loss.class_rows.parameters.items()}))
    apply_tables = loss.prepare_tables(change)
    states = [
        [type(optimizer).__name__, {name: list(rows) for name, rows in fills.items()}] for optimizer, fills in held
    ]
    weights = change.class_weights
    facts = {
        "margin": None if change.margin is None else _digest_of_margin(change.margin),
        "class_weights": None if weights is None else digest_of_values(torch.as_tensor(weights, device="cpu")),
        "the state of the optimizers": states,
        "the number of changes before": loss.class_changes,
    }
    return _PreparedChange(change, held, apply_tables), facts


def _held_by_a_graph(parameter: Tensor) -> bool:
    return parameter._use_count() > 2  # type: ignore[attr-defined]  # itself and AccumulateGrad


def _optimizers_of(loss: Changeable, given: Optimizers) -> list[torch.optim.Optimizer]:
    """Return the loss's own `RowOptimizer` and the given ones, each once. ValueError if one lacks its parameters."""
    found: list[torch.optim.Optimizer] = (
        [] if loss.class_rows.live_optimizer is None else [loss.class_rows.live_optimizer]
    )
    own = {id(p) for p in loss.class_rows.parameters.values()}
    for optimizer in [given] if isinstance(given, torch.optim.Optimizer) else list(given):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be torch optimizers, not {type(optimizer).__name__}")
        if isinstance(optimizer, RowOptimizer):
            fits = optimizer.class_rows is loss.class_rows
        else:
            fits = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        if not fits:
            raise ValueError(
                f"optimizers holds a {type(optimizer).__name__} that does not hold the parameters "
                f"of this {type(loss).__name__}"
            )
        if not any(optimizer is other for other in found):
            found.append(optimizer)
    return found


def _apply_change(loss: Changeable, prepared: _PreparedChange, rows: NewRows | None) -> None:
    """Apply a change one tensor at a time, so that at most one tensor exists twice. rows: rows of the added classes."""
    change, before = prepared.change, loss.class_rows.shards
    after = before.resized(change.num_classes)

    store = loss.class_rows.store
    store = None if store is None else store.resized(after.lo, after.local)

    def moved(of: str, local: Tensor, new: NewRows | float) -> Tensor:
        """Return the local rows of the new shard; `new` fills the added classes. of: its name in a store."""
        out = None if store is None else store.new(of, tuple(local.shape[1:]), local.dtype, None)
        out = move_rows(local, change.moves, before, after, out)
        first = max(after.lo, change.num_classes - change.added)
        if callable(new):
            _write_rows(out, after.lo, first, after.hi, new)
        else:
            out[first - after.lo :] = new
        return out

    parameters = loss.class_rows.parameters
    for k, (name, parameter) in enumerate(parameters.items()):
        new: NewRows | float = rows if rows is not None and k == 0 else 0.0  # a new bias is 0
        changed = nn.Parameter(
            after.wrap(moved(name, local_part(parameter.detach()), new)), requires_grad=parameter.requires_grad
        )
        give_tensor(parameter, changed)
        del changed
        for i, (optimizer, fills) in enumerate(prepared.optimizers):
            for key, fill in fills[name].items():
                state = optimizer.state[parameter]
                of = f"{name}/{key}" if isinstance(optimizer, RowOptimizer) else f"{name}/{key} of {i}"
                state[key] = after.wrap(moved(of, local_part(state[key]), new if key == MASTER else fill))
                if key == MASTER:
                    _round_merged(local_part(parameter.detach()), local_part(state[key]), change.moves, after)
    prepared.apply_tables()
    loss.class_rows.store = store
    loss.adopt(dict(parameters), after)


def _round_merged(weight: Tensor, master: Tensor, moves: ClassMoves, shards: ClassShards) -> None:
    """Set merged weights to the rounded float32 master weights, from which the next optimizer step starts.

    The mean of rounded weights would differ.
    """
    for ids in moves.merged_into(shards.lo, shards.hi).split(ROW_BLOCK):
        rows = (ids - shards.lo).to(weight.device)
        weight.index_copy_(0, rows, master.index_select(0, rows).to(weight.dtype))


def _write_rows(out: Tensor, lo: int, first: int, end: int, rows: NewRows) -> None:
    """Write the rows of class ids [first, end) into `out`, whose first row is that of id `lo`, block by block."""
    for a, b in row_blocks(first, end):
        out[a - lo : b - lo] = rows(a, b).to(out.device, out.dtype)


def _given_rows(vectors: Tensor, first: int) -> NewRows:
    return lambda a, b: vectors[a - first : b - first]


def _fresh_rows(loss: Changeable) -> NewRows:
    """Return new rows, drawn like the initial ones but with another key for each change of classes."""
    seed = mix(loss.seed, FRESH_ROWS, loss.class_changes)
    return lambda a, b: initial_rows(a, b, row_shape(loss), std=loss.init_std, seed=seed)


# ---------------------------------------------------------------------------------------------------- checks


def check_reachable(loss: Changeable) -> None:
    loss.class_rows.check_group()
    if weight_rows(loss).device.type == "meta":
        raise RuntimeError(
            f"this {type(loss).__name__} is on the meta device and has no rows; "
            "call to_empty() and reset_parameters() first"
        )


def _check_init(init: Any, shape: tuple[int, ...]) -> None:
    if isinstance(init, Tensor):
        if init.shape != shape or not init.is_floating_point():
            raise ValueError(
                f"an init tensor must hold floating-point vectors {list(shape)}, not {list(init.shape)} {init.dtype}"
            )
        bad = (~init.detach().isfinite()).reshape(len(init), -1).any(1).nonzero()
        if len(bad):
            raise ValueError(f"init[{int(bad[0])}] holds a NaN or infinity")
    elif isinstance(init, str) and init != "fresh":
        raise ValueError(f'init must be "fresh", a tensor of vectors, or batches of (embeddings, labels), not {init!r}')
    elif not isinstance(init, Iterable):
        raise TypeError(
            f'init must be "fresh", a tensor of vectors, or batches of (embeddings, labels), not {type(init).__name__}'
        )


def _prepare_on_every_rank(loss: Changeable, prepare: Callable[[], tuple[Result, dict[str, Any]]]) -> Result:
    """Return the result of `prepare` on this rank.

    If it fails anywhere, raise the first failed rank's error on every rank. If the values that it returns in addition
    differ between ranks, raise ValueError on every rank.
    """
    ranks, device = loss.class_rows.shards.ranks, weight_rows(loss).device
    kinds = {kind.__name__: kind for kind in (ValueError, RuntimeError, TypeError)}
    result, failure = None, None
    mine: dict[str, Any] = {}
    try:
        result, mine = prepare()
    except tuple(kinds.values()) as error:
        failure = error
        mine = {"error": next(name for name, kind in kinds.items() if isinstance(error, kind)), "text": str(error)}
    meet("a change of classes", ranks, device)
    everyone = [json.loads(text) for text in gather_texts(json.dumps(mine), ranks, device)]
    failed = [flat for flat, each in enumerate(everyone) if "error" in each]
    if failed:
        first = everyone[failed[0]]
        where = "" if len(failed) == len(everyone) else f"{ranks.name(failed[0])}: "
        raise kinds[first["error"]](where + first["text"]) from failure
    for flat, each in enumerate(everyone):
        for name, value in everyone[0].items():
            if each.get(name) != value:
                raise ValueError(
                    f"ranks disagree: {name} differs between {ranks.name(0)} and {ranks.name(flat)}; "
                    "pass the same on every rank"
                )
    assert result is not None
    return result


def _digest_of_margin(margin: Margin) -> list[Any]:
    return [margin.describe(), [digest_of_values(b) for b in margin.buffers()]]


# ---------------------------------------------------------------------------------------------------- optimizer state


def rows_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, float]:
    """Return the keys of state with one row per row of `parameter`, and its value for a row that never had a gradient.

    Works for a `RowOptimizer` and others. The value of MASTER, the float32 weights, is NaN: its rows are those of the
    weight. Raises ValueError if the optimizer holds state that is neither by row nor one number.
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    shape, local = parameter.shape, local_part(parameter.detach())
    by_row = []
    for key, value in state.items():
        if is_row_state(value, parameter) and is_row_state(local_part(value), local):
            by_row.append(key)
        elif isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{type(optimizer).__name__} holds {key} {list(value.shape)} for a parameter {list(shape)}: it has no "
                "row per class, so it cannot follow a change of classes; build the optimizer anew after the change"
            )
    if not by_row:
        return {}
    if isinstance(optimizer, RowOptimizer):
        fill = optimizer.initial_state
    else:
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        accepted = inspect.signature(type(optimizer)).parameters
        options = {k: v for k, v in group.items() if k in accepted and k != "params"}
        fill = initial_state(type(optimizer), options)
    return {key: math.nan if key == MASTER else fill.get(key, 0.0) for key in sorted(by_row)}
