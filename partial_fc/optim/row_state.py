"""The state of a `RowOptimizer`: how it is built, allocated, saved and loaded.

Row state (momentum, moments) has the shape of its parameter, so it is a DTensor `[C, ...]` where there is a group, and
a checkpoint loads at any world size. Everything else is scalar state.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partial_fc.batch.status import HALF
from partial_fc.checkpoint.increments import MISSED
from partial_fc.distributed.ranks import local_part
from partial_fc.errors import log
from partial_fc.optim import saved_steps
from partial_fc.optim.moves import is_row_state
from partial_fc.optim.optimizer_class import (
    LowPrecision,
    check_arguments,
    check_kernels,
    checked_form,
    construct,
    initial_state,
    trial,
)
from partial_fc.optim.protocol import (
    OneGroup,
    check_options,
    checked_groups,
    settle,
    with_loading_hooks,
    with_saving_hooks,
)
from partial_fc.optim.skipped_rows import SkippedRows
from partial_fc.optim.stored_rows import COUNT as COUNT
from partial_fc.optim.stored_rows import MASTER as MASTER
from partial_fc.optim.stored_rows import agree_to_load, marked, row_problem, stated_rows, taken
from partial_fc.optim.two_optimizers import watch
from partial_fc.rows import ClassRows, HasClassRows, UpdateRows
from partial_fc.tiers.store import Initial, RowStore

SkippedRowsChoice = Literal["dense", "still"]


class RowState(OneGroup):
    """Base of `RowOptimizer`: everything about state but the step.

    class_rows: what it moves. inner: the wrapped class, on stand-ins. initial_state: row state of a row that never had
    a gradient, by key. built: what the constructor of the class puts into the state of each parameter, for no rows.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        head: HasClassRows,
        *,
        update_in_backward: bool = False,
        low_precision: LowPrecision | None = None,
        skipped_rows: SkippedRowsChoice | None = None,
        **options: Any,
    ) -> None:
        """Take the class rows of a head.

        Args:
            update_in_backward: move rows inside backward, tile by tile, so that no gradient of the whole weight exists;
                for sample_rate=1.0. step() is called as usual and does nothing more. Whatever needs the whole gradient
                first (clipping, accumulation over micro-batches, a GradScaler) raises RuntimeError.
            skipped_rows: what becomes of rows that a step does not select (sample_rate below 1). "dense", the default
                where the class allows it: before a row is used again it makes the steps that it has missed, by its
                momentum and decay, as if the class had stepped all rows (skipped_rows.py). "still": it keeps weight and
                state bit for bit, as with SparseAdam.
            low_precision: for weights in bfloat16 or float16, whose updates are often below their resolution: "master"
                keeps float32 weights in the state; "stochastic" rounds at random in proportion, keyed by seed, step and
                class id (bfloat16 only).
        """
        rows = check_arguments(optimizer_class, head, update_in_backward, low_precision, options)
        self.class_rows = rows
        self.initial_state = initial_state(optimizer_class, options)  # row state of a row that never had a gradient
        self.inner = construct(optimizer_class, rows.everything, options)  # the class itself, stepped on blocks of rows
        self.built = [dict(self.inner.state[p]) for p in self.inner.param_groups[0]["params"]]  # by its constructor
        self.update_in_backward = update_in_backward
        self._low_precision = low_precision
        self.written: tuple[int, list[int]] | None = None  # what tells that somebody else has written weights
        self.moved_in_backward = False  # a backward has moved the rows since the last step()
        super().__init__(list(rows.trainable), self.inner.defaults)
        self.param_groups[0]["params"] = rows.trainable  # this very list, which backward changes in place
        self._skipped_rows = skipped_rows_of(optimizer_class, rows, skipped_rows, self.param_groups[0])
        settle(rows)  # by the optimizer before this one
        if rows.store is not None:
            rows.store.forget(kept={*rows.parameters})
        rows.optimizer = weakref.ref(self)
        self.follow_skipped_rows()
        if not rows.sampled:
            watch(self)

    def _set_low_precision(self, value: Any) -> None:
        if value != self.low_precision:
            raise ValueError(
                f"low_precision is {self.low_precision!r} since this optimizer was built, and its state is made for "
                f"that; build a RowOptimizer with low_precision={value!r}"
            )

    low_precision: LowPrecision | None = property(attrgetter("_low_precision"), _set_low_precision)  # type: ignore[assignment]

    @property
    def skipped_rows(self) -> SkippedRowsChoice:
        """What becomes of rows that a step does not select; may be set between steps, on every rank alike."""
        return self._skipped_rows

    @skipped_rows.setter
    def skipped_rows(self, choice: SkippedRowsChoice | None) -> None:
        self._skipped_rows = skipped_rows_of(type(self.inner), self.class_rows, choice, self.param_groups[0])
        settle(self.class_rows)
        self.follow_skipped_rows()

    def follow_skipped_rows(self) -> None:
        """Begin to note what rows miss from here on."""
        rows, behind = self.class_rows, None
        if self.skipped_rows == "dense" and rows.sampled:
            behind = SkippedRows(rows, type(self.inner), self.param_groups[0], checked_form)
        rows.behind = behind

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.catch_up()
        copied = super().__deepcopy__(memo)
        copied.follow_skipped_rows()
        return copied

    def catch_up(self) -> None:
        """Bring all rows, and their state, to where the dense optimizer would have them now (skipped_rows="dense").

        Whatever this package reads or writes does it by itself: state dicts, checkpoints, exports, queries, evaluation,
        changes of classes. Call it before other code reads or writes rows: `head.weight.full_tensor()`, averages of
        weights, your own initial rows. It costs a pass over the rows, and nothing if no step was missed.
        """
        self.class_rows.catch_up()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes a GradScaler call step() in any case and say so: what cannot work is then refused, not ignored."""
        return self.update_in_backward or bool(self.class_rows.record.untrained)

    def update_for_forward(self) -> Callable[[], UpdateRows]:
        """Return how the backward of a forward begins its update (update_in_backward); RuntimeError under float16."""
        kind = self.class_rows.device.type
        if self.class_rows.sampled:
            raise RuntimeError("update_in_backward is for sample_rate=1.0, and this head is sampled: build it so")
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise RuntimeError(
                "update_in_backward cannot be joined with float16, which needs a GradScaler; use bfloat16"
            )
        return self.begin_update_in_backward

    def begin_update_in_backward(self) -> UpdateRows:
        """Begin a step inside backward; call the result with local rows a to b and their gradients, each row once."""
        raise NotImplementedError

    def begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Put into the state of a parameter, and return, what the constructor of the class puts there."""
        place = next(i for i, p in enumerate(self.class_rows.everything) if p is parameter)
        none = local_part(parameter.detach())[:0]
        begun = {}
        for key, value in self.built[place].items():
            if is_row_state(value, none):
                dtype = self._state_dtype(parameter) if value.is_floating_point() else value.dtype
                begun[key] = self.allocate(parameter, dtype, key, value.shape[1:])
            else:
                begun[key] = self._fitted(copy.deepcopy(value), parameter)
        self.state[parameter].update(begun)
        return begun

    def allocate(
        self, parameter: nn.Parameter, dtype: torch.dtype, key: str, row_shape: torch.Size | None = None
    ) -> Tensor:
        """Return new row state of a parameter. row_shape: that of the parameter, unless it is given."""
        local = local_part(parameter.detach())
        row_shape = local.shape[1:] if row_shape is None else row_shape
        if self.class_rows.store is not None and not self._is_shared(parameter):
            made = self._allocate_in_store(self.class_rows.store, parameter, dtype, key, tuple(row_shape))
            return self._wrap(parameter, made)
        if key == MASTER:
            return self._wrap(parameter, local.float())
        value = self.initial_state.get(key, 0.0)
        return self._wrap(parameter, local.new_full((len(local), *row_shape), value, dtype=dtype))

    def _allocate_in_store(
        self, store: RowStore, parameter: nn.Parameter, dtype: torch.dtype, key: str, shape: tuple[int, ...]
    ) -> Tensor:
        name = next(name for name, p in self.class_rows.parameters.items() if p is parameter)
        if key != MASTER:
            return store.new(f"{name}/{key}", shape, dtype, Initial(fill=self.initial_state.get(key, 0.0)))
        made = store.new(f"{name}/{key}", shape, dtype, store.tensors[name].initial)
        store.follow(f"{name}/{key}", local_part(parameter.detach()))
        return made

    def _in_store(self, value: Any, parameter: nn.Parameter, key: str) -> Any:
        """Return a piece of loaded state where the rows' memory is: copied, unless it is there."""
        store = self.class_rows.store
        if store is None or not isinstance(value, Tensor) or not value.ndim or self._is_shared(parameter):
            return value
        if any(rows.tensor.data_ptr() == local_part(value).data_ptr() for rows in store.tensors.values()):
            return value
        made = self.allocate(parameter, value.dtype, key, value.shape[1:])
        local_part(made).copy_(local_part(value))
        return made

    def _wrap(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """Return `local` as a DTensor that is split as the parameter is."""
        rows = self.class_rows
        if self._is_shared(parameter):
            return rows.shards.wrap_shared(local)
        return marked(rows, rows.shards.wrap(local))

    @with_saving_hooks
    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; row state as DTensors `[C, ...]` where there is a group. "rows" says whose they
        are, "class" which optimizer's: before the first step there is no state to tell it by."""
        rows, parameters = self.class_rows, self.class_rows.everything
        rows.catch_up()
        state = {
            i: {key: marked(rows, value) for key, value in self.state[p].items()}
            for i, p in enumerate(parameters)
            if p in self.state
        }
        group = {**self.param_groups[0], "params": list(range(len(parameters)))}
        found = {"state": state, "param_groups": [group], "rows": stated_rows(rows), "class": type(self.inner).__name__}
        missed = saved_steps.saved(rows.behind) if rows.as_they_are else None
        return found if missed is None else {**found, MISSED: missed}

    def state_template(self) -> dict[str, Any]:
        """Return a state dict with all state allocated, for `load_checkpoint` to read into before the first step."""
        template = self.state_dict()
        for i, parameter in enumerate(self.class_rows.everything):
            if i in template["state"]:
                continue
            moved, state = self._tried(parameter)
            template["state"][i] = {
                key: self.allocate(parameter, value.dtype, key, value.shape[1:])
                if is_row_state(value, moved)
                else value
                for key, value in state.items()
            }
            if self._has_masters(parameter):
                template["state"][i][MASTER] = self.allocate(parameter, torch.float32, MASTER)
        return template

    def _tried(self, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Any]]:
        """Return (one row of a parameter, its state) after a step."""
        row = torch.zeros(1, *parameter.shape[1:], dtype=self._state_dtype(parameter), device="cpu")
        tried = trial(type(self.inner), self._options(), row, [row])
        return tried.parameter, tried.state

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict belongs to another class of optimizer; its tensors are not looked at."""
        own, name = self._options(), type(self.inner).__name__
        stored = checked_groups(state, len(self.class_rows.everything))["param_groups"][0]
        theirs = state.get("class", name)  # states of 0.1.0, and of plain torch optimizers, do not say it
        if theirs != name:
            raise ValueError(
                f"it is the state of another optimizer: of {theirs}, and {name} is built here; build "
                f"RowOptimizer(torch.optim.{theirs}, ...), or go on with {name} from new state by not loading it"
            )
        if MISSED in state and (problem := saved_steps.problem_of(self.class_rows, state[MISSED])):
            raise ValueError(problem)
        check_options(stored)
        check_kernels(stored, self.class_rows)
        # a stored tensor, such as a learning rate, is a placeholder in a skeleton
        options = {**own, **{k: v for k, v in stored.items() if not isinstance(v, dict)}}
        accepted = {k: v for k, v in options.items() if k in own and k != "foreach"}
        if self.class_rows.behind is not None:
            checked_form(type(self.inner), accepted)
        row = torch.zeros(1, 1, device="cpu")
        known = {MASTER, COUNT}
        for each in (accepted, own):  # options of the run may have been others before
            known |= trial(type(self.inner), each, row, [row]).state.keys()
        for of_parameter in state["state"].values():
            unknown = sorted(set(of_parameter) - known)
            if unknown:
                raise ValueError(
                    f"it is the state of another optimizer: it has {', '.join(unknown)}, which {name} as built "
                    "here has not"
                )

    @with_loading_hooks
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load options and state: this rank's rows of it, of this class and of this head's shape, else ValueError.

        A collective where there is a group: if one rank cannot load, all raise the same error.
        """
        parameters = self.class_rows.everything
        agree_to_load(self.class_rows, "this state of a RowOptimizer", self._problem_of_state(state_dict))
        state_dict = checked_groups(state_dict, len(parameters))
        self.class_rows.catch_up()
        self.param_groups[0].update({k: v for k, v in state_dict["param_groups"][0].items() if k != "params"})
        self.state.clear()
        for i, state in state_dict["state"].items():
            parameter = parameters[int(i)]
            self.state[parameter] = {
                key: self._in_store(self._fitted(value, parameter), parameter, key)
                for key, value in state.items()
                if key != MASTER or self._has_masters(parameter)
            }
        self.written = written(self.class_rows)
        self.follow_skipped_rows()
        if MISSED in state_dict:
            self._miss(state_dict[MISSED])

    def _miss(self, missed: dict[str, Any]) -> None:
        """Take up steps that rows have missed; rows that are to stand still from here on make them now."""
        rows = self.class_rows
        behind = rows.behind or SkippedRows(rows, type(self.inner), self.param_groups[0], checked_form)
        states = {name: self.state[parameter] for name, parameter in rows.parameters.items()}
        saved_steps.restore(behind, missed, self.param_groups[0], states)
        if rows.behind is None:
            if rows.store is not None:
                rows.store.ready(None)
            behind.catch_up()

    def _problem_of_state(self, state_dict: dict[str, Any]) -> str:
        """Return why a state dict cannot be loaded; "" if it can."""
        parameters = self.class_rows.everything
        try:
            state_dict = checked_groups(state_dict, len(parameters))
            self.check_state(state_dict)
        except ValueError as error:
            return str(error)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            return f"it is no state of a RowOptimizer ({type(error).__name__}: {error})"
        for i, state in state_dict["state"].items():
            parameter = parameters[int(i)]
            if self._is_shared(parameter):
                continue
            moved, tried = self._tried(parameter)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    row = tried[key] if is_row_state(tried.get(key), moved) else moved
                    shape = (parameter.shape[0], *row.shape[1:])
                    problem = row_problem(self.class_rows, key, value, shape, state_dict)
                    if problem:
                        return problem
        return ""

    def _is_shared(self, parameter: nn.Parameter) -> bool:
        return any(parameter is shared for shared in self.class_rows.shared.values())

    def follow_parameters(self) -> None:
        """Take state to the device and dtype of its parameter, which was moved or cast; not to the meta device."""
        for parameter in self.class_rows.everything:
            if parameter not in self.state or local_part(parameter.detach()).device.type == "meta":
                continue
            state = self.state[parameter]
            if parameter.dtype not in HALF:  # it would be older than the weights where they become half again
                state.pop(MASTER, None)
            state.update({key: self._fitted(value, parameter) for key, value in state.items()})

    def _fitted(self, value: Any, parameter: nn.Parameter) -> Any:
        """Return a piece of state on the device and in the dtype that the class expects; the same object where it is
        so."""
        if not isinstance(value, Tensor):
            return value
        weight = local_part(parameter.detach())
        if value.ndim:
            if not self._is_shared(parameter):
                value = taken(self.class_rows, value)
            local = local_part(value)
            dtype = self._state_dtype(parameter) if local.is_floating_point() else local.dtype
            fitted = local.to(weight.device, dtype)
            return value if fitted is local else self._wrap(parameter, fitted)
        # fused and capturable kernels read the step on the device
        options = self.param_groups[0]
        return value.to(weight.device) if options.get("fused") or options.get("capturable") else value

    def _has_masters(self, parameter: nn.Parameter) -> bool:
        """Whether steps move float32 weights of a parameter. Others would stay behind, and come back for its own."""
        return self.low_precision == "master" and parameter.dtype in HALF

    def _state_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32 if self.low_precision and parameter.dtype in HALF else parameter.dtype

    def _options(self) -> dict[str, Any]:
        accepted = inspect.signature(type(self.inner)).parameters
        return {k: v for k, v in self.inner.defaults.items() if k in accepted}


def written(rows: ClassRows) -> tuple[int, list[int]]:
    """Return what changes when somebody writes to the weights; in a group where this package does."""
    return rows.writes, [local_part(p.detach())._version for p in rows.parameters.values()]  # noqa: SLF001


def skipped_rows_of(
    cls: type[torch.optim.Optimizer], rows: ClassRows, choice: SkippedRowsChoice | None, options: dict[str, Any]
) -> SkippedRowsChoice:
    """Return what is to happen to rows that a step does not select; "dense" if nothing was chosen and it can be."""
    if choice not in (None, "dense", "still"):
        raise ValueError(f'skipped_rows must be "dense" or "still", not {choice!r}')
    if choice == "dense" or (choice is None and rows.sampled):
        try:
            checked_form(cls, options)
        except ValueError as error:
            if choice == "dense":
                raise
            log.warning("rows that a step does not select stand still: %s", error)
            return "still"
    return choice or "dense"
