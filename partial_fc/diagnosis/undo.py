"""Training steps without a trace: everything that they change is copied before and restored afterwards.

weights, buffers, gradients     copied to CPU memory, restored in place
optimizers                      state (in place; new entries removed), options of groups, flags; also of an optimizer
                                inside another
heads                           rows and carriers, the count that keys the next draw, the results of the last forward
modules                         their own Python attributes, train() or eval()
random number generators        of this process: Python, NumPy, torch on the CPU and the current GPU
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.checkpoint.random_state import restore_random_state, take_random_state
from partial_fc.distributed.shards import local_part
from partial_fc.sharded import ShardedLoss


class Undo:
    """Context manager that restores modules, optimizers and random number generators at its end.

    Takes CPU memory of the size of this rank's weights, gradients and optimizer state.

    modules: all modules that run.
    wrappers: those of them that belong to an engine, whose Python attributes are not restored.
    """

    def __init__(
        self, modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], wrappers: Iterable[nn.Module]
    ) -> None:
        engines = {id(each) for each in wrappers}
        self.modules = list({id(m): m for root in modules for m in root.modules()}.values())
        self.optimizers = [inside for each in optimizers for inside in chain(each)]
        self.heads = [m for m in self.modules if isinstance(m, ShardedLoss)]
        self.own = [m for m in self.modules if id(m) not in engines]

    def __enter__(self) -> Undo:
        self.random = take_random_state()
        for head in self.heads:
            head.class_rows.catch_up()
        self.training = [(m, m.training) for m in self.modules]
        tensors = {
            id(t): t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        self.tensors = [(t, _copy(t)) for t in tensors.values()]
        self.grads = [(t, t.grad, _copy(t.grad)) for t in tensors.values() if t.is_leaf and t.grad is not None]
        self.leaves = [t for t in tensors.values() if t.is_leaf]
        self.buffers = [(m, dict(m._buffers)) for m in self.modules]
        rows = [head.class_rows for head in self.heads]
        records = [each.record for each in rows]
        self.attributes = [(thing, dict(vars(thing))) for thing in (*self.own, *rows, *records, *self.optimizers)]
        self.carriers = [(r, list(r.trainable), [(c, c.grad) for c in r.trainable]) for r in rows]
        self.groups = [
            (g, {k: copy.deepcopy(v) for k, v in g.items() if k != "params"})
            for o in self.optimizers
            for g in o.param_groups
        ]
        self.states = [(o, {p: _with_copies(values) for p, values in o.state.items()}) for o in self.optimizers]
        self.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            self.clear()
            for thing, before in self.attributes:
                for name in set(vars(thing)) - set(before):
                    del vars(thing)[name]
                vars(thing).update(before)
            for module, buffers in self.buffers:
                module._buffers.clear()
                module._buffers.update(buffers)
            for tensor, value in self.tensors:
                _set(tensor, value)
            for head in self.heads:
                if head.class_rows.behind is not None:
                    head.class_rows.behind.forget()
            for leaf, grad, of_grad in self.grads:
                _set(grad, of_grad)
                leaf.grad = grad
            for rows, trainable, carried in self.carriers:
                rows.trainable[:] = trainable
                for carrier, row_grad in carried:
                    carrier.grad = row_grad
            for optimizer, states in self.states:
                _restore_state(optimizer, states)
            for group, options in self.groups:
                for name in set(group) - set(options) - {"params"}:
                    del group[name]
                group.update(options)
        for module, training in self.training:
            module.training = training
        restore_random_state(self.random)

    def clear(self) -> None:
        """Remove all gradients without changing their tensors."""
        for tensor in self.leaves:
            tensor.grad = None
        for head in self.heads:
            head.zero_grad()

    def rewind(self) -> None:
        """Restore the draws and margins of the heads, but not weights and optimizers."""
        buffers = {id(b) for head in self.heads for b in head.buffers()}
        for head in self.heads:
            before, record = (
                next(before for thing, before in self.attributes if thing is each)
                for each in (head, head.class_rows.record)
            )
            vars(head).update({name: before[name] for name in ("forward_count",) if name in before})
            vars(head.class_rows.record).update(record)
        with torch.no_grad():
            for tensor, value in self.tensors:
                if id(tensor) in buffers:
                    _set(tensor, value)

    def changed(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether any of these parameters has changed on this rank."""
        wanted = {id(p) for p in parameters}
        return any(
            id(t) in wanted and not torch.equal(local_part(t.detach()).cpu(), value) for t, value in self.tensors
        )


def chain(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those inside it (Lookahead's, Accelerate's)."""
    inside = getattr(optimizer, "optimizer", None)
    return [optimizer, *(chain(inside) if isinstance(inside, torch.optim.Optimizer) else [])]


def _copy(tensor: Tensor) -> Tensor:
    local = local_part(tensor.detach())
    return local.clone() if local.device.type == "meta" else local.to("cpu", copy=True)


def _set(tensor: Tensor, value: Tensor) -> None:
    local = local_part(tensor.detach())
    if local.device.type != "meta":
        local.copy_(value)


def _with_copies(values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return for each name the value itself and a copy of its content."""
    return {k: (v, _copy(v) if isinstance(v, Tensor) else copy.deepcopy(v)) for k, v in values.items()}


def _restore_state(optimizer: torch.optim.Optimizer, states: dict[Any, dict[str, tuple[Any, Any]]]) -> None:
    for parameter in [p for p in optimizer.state if p not in states]:
        del optimizer.state[parameter]
    for parameter, values in states.items():
        optimizer.state[parameter].clear()
        for name, (value, before) in values.items():
            if isinstance(value, Tensor):
                _set(value, before)
            optimizer.state[parameter][name] = value if isinstance(value, Tensor) else before
