"""Optimizers that touch only the rows that have a gradient, and one gradient norm over replicated and sharded parameters.

`RowOptimizer` runs any `torch.optim` class whose update treats rows apart. For a block of rows it gathers their weights and state, lets
the class take its step on them as on a small dense parameter, and puts both back:

    sampled      rows [S] of the step: weight[rows], state[rows]  ──  class.step()  ──>  weight[rows], state[rows]
    all rows     row blocks of the shard, as views: no temporary of the shard's size

Rows without a gradient keep weight and state bit for bit: no decay, no momentum (as SparseAdam does). Scalar state, as Adam's step,
counts optimizer steps.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from partial_fc.nonfinite import judge as nonfinite
from partial_fc.nonfinite.step_record import StepRecord
from partial_fc.optim.optimizer_class import (
    _check_rows_apart,
    _construct,
    _fused_moves,
    _initial_state,
    _is_row_state,
    _trial,
)
from partial_fc.rows import ShardedRows
from partial_fc.sampling import keyed_below, mix
from partial_fc.shards import local_part

BLOCK_BYTES = 8 << 20
HALF = (torch.bfloat16, torch.float16)
MASTER, COUNT = "master_weight", "rounding_step"  # state of this module's own, beside that of the wrapped class

LowPrecision = Literal["master", "stochastic"]


class HasRows(Protocol):
    """What a `RowOptimizer` can train: a `PartialFC`, a `CenterLoss`."""

    seed: int
    on_nonfinite: Any
    _rows: ShardedRows
    _record: StepRecord

    @property
    def skipped(self) -> bool: ...

    @property
    def _watches(self) -> bool: ...


class RowOptimizer(torch.optim.Optimizer):
    """`optimizer_class` over the sharded rows of a head: `RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)`.

    update_in_backward: move the rows of a tile as soon as its gradient is known, inside backward, so that no gradient of the whole weight
        exists; for sample_rate=1.0. step() is called as ever and does nothing more. It cannot be joined with what needs the whole
        gradient first: clipping, accumulation over micro-batches, a GradScaler; each raises RuntimeError.
    low_precision: for weights in bfloat16 or float16, whose steps are often below their resolution: "master" keeps float32 weights in
        the state, "stochastic" rounds up or down at random in proportion, keyed by seed, step and class id (bfloat16 only).

    A `torch.optim.Optimizer`: schedulers, `GradScaler` and `zero_grad` work as with any other. Under sampling `param_groups` holds a
    compact carrier whose gradient is that of the selected rows. State is allocated once, at the first step, for the shard.

    Raises ValueError for a class whose update of a row depends on other rows (LAMB, LARS, Shampoo, Muon, Adafactor, L-BFGS): those
    rows are on other ranks, or not selected.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        head: HasRows,
        *,
        update_in_backward: bool = False,
        low_precision: LowPrecision | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(
                f"optimizer_class must be a torch.optim.Optimizer class such as torch.optim.SGD, not {optimizer_class!r}"
            )
        if not isinstance(getattr(head, "_rows", None), ShardedRows):
            raise TypeError(f"a RowOptimizer trains a PartialFC, not {type(head).__name__}")
        if update_in_backward and head._rows.sampled:
            raise ValueError(
                "update_in_backward is for sample_rate=1.0; a sampled head has no gradient of the whole weight to save"
            )
        if low_precision not in (None, "master", "stochastic"):
            raise ValueError(f'low_precision must be None, "master" or "stochastic", not {low_precision!r}')
        if low_precision == "stochastic" and any(p.dtype == torch.float16 for p in head._rows.parameters.values()):
            raise ValueError('low_precision="stochastic" rounds to bfloat16, and the weights are float16; use "master"')
        _check_rows_apart(optimizer_class, options)
        self._head, self._sharded = head, head._rows
        self._fill = _initial_state(optimizer_class, options)
        self._inner = _construct(optimizer_class, self._sharded.everything, options)
        self.update_in_backward, self.low_precision = update_in_backward, low_precision
        self._applied = False  # update_in_backward: a backward has moved the rows since the last step()
        super().__init__(list(self._sharded.trainable), self._inner.defaults)
        self.param_groups[0]["params"] = self._sharded.trainable  # the very list, which backward changes in place
        self._sharded.optimizer = weakref.ref(self)
        # with it a GradScaler calls step() in any case and says so, so that what cannot work is refused and not passed over
        self._step_supports_amp_scaling = update_in_backward

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them which rows had one. They cannot be zeros: there would be no telling of which rows."""
        self._sharded.clear()
        self._head._record.end()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient; nothing in a step that is to be left out (`head.skipped`).

        If neither `clip_grad_norm_` nor `check_gradients` was called, the rows' gradients and the loss are judged here, as there.
        """
        loss = None
        if self._sharded.live_optimizer not in (None, self):
            raise RuntimeError(
                "another RowOptimizer was built for this head after this one, and both would move its rows; "
                "keep one, and build it again only where nothing steps the old one"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.update_in_backward:
            if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
                raise RuntimeError(
                    "update_in_backward cannot be joined with a GradScaler: rows moved before their gradient was unscaled"
                )
            self._applied = False
        head, sharded = self._head, self._sharded
        if head._watches and not head._record.judged and not head.skipped:
            nonfinite.judge([head], [])
        head._record.end()
        if head.skipped:
            return loss
        with record_function("partial_fc::update"):
            for parameter in sharded.shared.values():
                if parameter.grad is not None:
                    _OneStep(self, parameter).update(None, 0, len(parameter), local_part(parameter.grad))
            grads = (
                []
                if self.update_in_backward
                else [local_part(c.grad) if c.grad is not None else None for c in sharded.carriers]
            )
            if any(g is not None for g in grads):
                sharded.stepped = True
                one_step = self._start_step()
                rows = sharded.rows if sharded.sampled else None
                for k, grad in enumerate(grads):
                    if grad is not None:
                        for a, b in _blocks(len(grad), grad):
                            one_step[k].update(None if rows is None else rows[a:b], a, b, grad[a:b])
        return loss

    def _start_step(self) -> list[_OneStep]:
        return [_OneStep(self, parameter) for parameter in self._sharded.parameters.values()]

    def in_backward(self) -> Callable[[int, int, list[Tensor]], None]:
        """Begin a step inside backward: call the result with rows a to b of the shard and their gradients, each row once."""
        if self._applied:
            raise RuntimeError(
                "update_in_backward cannot be joined with accumulation over micro-batches: call step() after every backward, "
                "or build the RowOptimizer without update_in_backward"
            )
        self._applied = True
        head = self._head
        if head._watches and not self._judge_before(head):
            return lambda a, b, grads: None
        steps = self._start_step()

        def update(a: int, b: int, grads: list[Tensor]) -> None:
            with record_function("partial_fc::update"), torch.no_grad():
                for step, grad in zip(steps, grads, strict=True):
                    step.update(None, a, b, grad)

        return update

    def _judge_before(self, head: HasRows) -> bool:
        """Whether rows may move inside backward, as far as their loss and its gradient tell: theirs is not known yet."""
        grads = [backward.grad for backward in head._record.backwards]
        flags = nonfinite.local_flags([head], [nonfinite.not_finite(grad) for grad in grads])
        return nonfinite.decide([head], nonfinite.over_all(flags, [head]), [])

    def _allocate(self, parameter: nn.Parameter, dtype: torch.dtype, key: str) -> Tensor:
        if key == MASTER:
            return self._wrap(parameter, local_part(parameter.detach()).float())
        fill = self._fill.get(key, 0.0)
        return self._wrap(parameter, torch.full_like(local_part(parameter.detach()), fill, dtype=dtype))

    def _wrap(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """State of a parameter, split as it is."""
        shards = self._sharded.shards
        return (
            shards.wrap_shared(local)
            if any(parameter is p for p in self._sharded.shared.values())
            else shards.wrap(local)
        )

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; row state as DTensors `[C, ...]` where there is a group."""
        state = {i: dict(self.state[p]) for i, p in enumerate(self._sharded.everything) if p in self.state}
        return {
            "state": state,
            "param_groups": [{**self.param_groups[0], "params": list(range(len(self._sharded.everything)))}],
        }

    def state_template(self) -> dict[str, Any]:
        """A state dict with all state allocated, for `load_checkpoint` to read into before the first step."""
        template = self.state_dict()
        for i, parameter in enumerate(self._sharded.everything):
            if i not in template["state"]:
                trial = _trial(
                    type(self._inner),
                    self._options(),
                    torch.zeros(1, 1, dtype=self._state_dtype(parameter), device="cpu"),
                    steps=1,
                )
                template["state"][i] = {
                    key: self._allocate(parameter, value.dtype, key) if _is_row_state(value, trial[0]) else value
                    for key, value in trial[1].items()
                }
                if self.low_precision == "master":
                    template["state"][i][MASTER] = self._allocate(parameter, torch.float32, MASTER)
        return template

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state dict is that of another class of optimizer; tensors in it are not looked at."""
        options = {**self._options(), **state["param_groups"][0]}
        accepted = {
            k: v for k, v in options.items() if k in self._options() and k not in ("fused", "foreach", "capturable")
        }
        mine = {MASTER, COUNT, *_trial(type(self._inner), accepted, torch.zeros(1, 1, device="cpu"), steps=1)[1]}
        for of_parameter in state["state"].values():
            unknown = sorted(set(of_parameter) - mine)
            if unknown:
                name = type(self._inner).__name__
                raise ValueError(
                    f"it is the state of another optimizer: it has {', '.join(unknown)}, which {name} as built here has not"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take options and state; the row state must be of this class and of this head's shape, else ValueError."""
        self.check_state(state_dict)
        parameters = self._sharded.everything
        for i, state in state_dict["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameters[int(i)].shape:
                    expected = list(parameters[int(i)].shape)
                    raise ValueError(
                        f"optimizer state {key} is {list(value.shape)}, the head's parameter is {expected}"
                    )
        self.param_groups[0].update({k: v for k, v in state_dict["param_groups"][0].items() if k != "params"})
        self.state.clear()
        for i, state in state_dict["state"].items():
            parameter = parameters[int(i)]
            self.state[parameter] = {key: self._fitted(value, parameter) for key, value in state.items()}

    def _fitted(self, value: Any, parameter: nn.Parameter) -> Any:
        """A piece of state on the device, and row state in the dtype, that the class expects; as it is where it is so already."""
        if not isinstance(value, Tensor):
            return value
        weight = local_part(parameter.detach())
        if value.ndim:
            local = local_part(value)
            fitted = local.to(weight.device, self._state_dtype(parameter) if local.is_floating_point() else local.dtype)
            return value if fitted is local else self._wrap(parameter, fitted)
        # fused and capturable kernels read the step on the device
        options = self.param_groups[0]
        return value.to(weight.device) if options.get("fused") or options.get("capturable") else value

    def _state_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32 if self.low_precision and parameter.dtype in HALF else parameter.dtype

    def _options(self) -> dict[str, Any]:
        accepted = inspect.signature(type(self._inner)).parameters
        return {k: v for k, v in self._inner.defaults.items() if k in accepted}


class _OneStep:
    """One step of one parameter, block of rows by block of rows: scalar state starts from the same value in every block."""

    def __init__(self, optimizer: RowOptimizer, parameter: nn.Parameter) -> None:
        self.optimizer, self.parameter = optimizer, parameter
        self.weight = local_part(parameter.detach())
        self.state = optimizer.state[parameter]
        self.wide = optimizer.low_precision if self.weight.dtype in HALF else None
        if self.wide == "master" and MASTER not in self.state:
            self.state[MASTER] = optimizer._allocate(parameter, torch.float32, MASTER)
        self.before = dict(self.state)
        group = optimizer._inner.param_groups[0]
        group.update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
        if group.get("fused") and not self.wide and self.weight.dtype in HALF and self.weight.device.type == "cpu":
            group["fused"] = _fused_moves(type(optimizer._inner), self.weight.dtype)  # type: ignore[arg-type]
        if self.wide == "stochastic":
            self.state[COUNT] = self.state.get(COUNT, 0) + 1

    def update(self, index: Tensor | None, a: int, b: int, grad: Tensor) -> None:
        """Step the rows `index`, or a to b, by `grad`; in the state's place if they are a view of it."""
        inner, source = self.optimizer._inner, self.weight
        if self.wide == "master":
            source = local_part(self.state[MASTER])
        rows = _take(source, index, a, b)
        block = nn.Parameter(rows.float() if self.wide else rows)
        block.grad = grad.to(block.dtype)
        inner.param_groups[0]["params"] = [block]
        inner.state.clear()
        known = {k: v for k, v in self.before.items() if k not in (MASTER, COUNT)}
        if known:
            inner.state[block] = {k: _of_rows(v, index, a, b) for k, v in known.items()}
        inner.step()
        self._put_back(block.detach(), index, a, b)
        for key, value in inner.state[block].items():
            if not _is_row_state(value, block):
                self.state[key] = value
                continue
            if key not in self.state:
                self.state[key] = self.optimizer._allocate(self.parameter, value.dtype, key)
            _put(local_part(self.state[key]), value, index, a, b)
        inner.state.clear()
        inner.param_groups[0]["params"] = []

    def _put_back(self, block: Tensor, index: Tensor | None, a: int, b: int) -> None:
        if self.wide == "master":
            _put(local_part(self.state[MASTER]), block, index, a, b)
        if self.wide == "stochastic":
            shards = self.optimizer._sharded.shards
            ids = shards.lo + (torch.arange(a, b, device=block.device) if index is None else index)
            block = _round_at_random(block, ids, mix(self.optimizer._head.seed, self.state[COUNT]))
        _put(self.weight, block.to(self.weight.dtype), index, a, b)


def _round_at_random(values: Tensor, ids: Tensor, key: int) -> Tensor:
    """float32 rows `[n, ...]` on bfloat16's grid, up or down with the probability that keeps the mean; keyed by row id and place.

    bfloat16 is the upper half of a float32: a uniform 16-bit number is added to the lower half, which is then cut off.
    """
    flat = values.reshape(len(values), math.prod(values.shape[1:]))  # -1 says nothing where there are no rows
    places = ids[:, None] * flat.shape[1] + torch.arange(flat.shape[1], device=values.device)
    noise = keyed_below(places, key, 1 << 16).int()
    rounded = (flat.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(flat.isfinite(), rounded.view(torch.float32), flat).view(values.shape)


def rows_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, float]:
    """Which state of a sharded parameter has a row for each of its rows, and what it holds for a row that never had a gradient.

    Of this module's optimizer or another. MASTER, the weights in float32, is among them with NaN: its rows are those of the weight.
    Raises ValueError if the optimizer holds anything that is neither that nor one number.
    """
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    shape, local = parameter.shape, local_part(parameter.detach()).shape
    by_row = []
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape and local_part(value).shape == local:
            by_row.append(key)
        elif isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{type(optimizer).__name__} holds {key} {list(value.shape)} for a parameter {list(shape)}: it has no row for each class, "
                "so it cannot follow when classes change; build the optimizer anew after the change"
            )
    if not by_row:
        return {}
    if isinstance(optimizer, RowOptimizer):
        fill = optimizer._fill
    else:
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        accepted = inspect.signature(type(optimizer)).parameters
        fill = _initial_state(type(optimizer), {k: v for k, v in group.items() if k in accepted and k != "params"})
    return {key: math.nan if key == MASTER else fill.get(key, 0.0) for key in sorted(by_row)}


def _blocks(count: int, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Row blocks of bounded size; one empty block where there are no rows, so that scalar state moves on as on other ranks."""
    size = max(1, BLOCK_BYTES // max(1, weight[:1].nbytes if len(weight) else 1))
    for a in range(0, max(count, 1), size):
        yield a, min(a + size, count)


def _take(tensor: Tensor, index: Tensor | None, a: int, b: int) -> Tensor:
    return tensor[a:b] if index is None else tensor.index_select(0, index)


def _put(tensor: Tensor, values: Tensor, index: Tensor | None, a: int, b: int) -> None:
    if index is not None:
        tensor.index_copy_(0, index, values)
    elif tensor[a:b].data_ptr() != values.data_ptr():  # else the class worked in place, on a view
        tensor[a:b] = values


def _of_rows(value: Any, index: Tensor | None, a: int, b: int) -> Any:
    """State for a block: the rows of row state; a copy of scalar state, which every block's step moves on by one."""
    if isinstance(value, Tensor) and value.ndim:
        return _take(local_part(value), index, a, b)
    return value.clone() if isinstance(value, Tensor) else value
