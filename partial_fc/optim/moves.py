"""What a step does to a row without a gradient, as numbers for all rows.

    linear     (weight, row state) becomes M (weight, row state): SGD with all its options; RMSprop, Adagrad and
               Adadelta without decay
    as Adam    the moments become β1 m and β2 v, the weight D w − a m / (q √v + ε): see adam_moves.py

What many steps do to a row then depends on the row only through its own numbers: a table with one entry for each step
at which a row may have stopped serves all rows (skipped_rows.py). It is on the host, in float64. Which form a class has
is found by trying it (optimizer_class.py), and so are the numbers of each step.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from partial_fc.optim.protocol import step_quietly

KERNELS = ("capturable", "fused")  # options that some devices have and others have not


class Probe:
    """An optimizer of the class on rows of one number each, without gradients, stepped along with the real one.

    scalars: scalar state, such as Adam's step, before the first step that it is to follow.
    """

    def __init__(
        self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any], scalars: Mapping[str, Any]
    ) -> None:
        self.accepted = inspect.signature(cls).parameters.keys() - {*KERNELS, "foreach", "params"}
        given = {k: on_cpu(v) for k, v in options.items() if k in self.accepted}
        self.optimizer = step_quietly(cls([_column([0.0])], **given))
        built = self.optimizer.state[self.optimizer.param_groups[0]["params"][0]]  # by the constructor
        self.scalars = {k: on_cpu(v) for k, v in (scalars or built).items() if not isinstance(v, Tensor) or not v.ndim}
        self.known = bool(scalars or built)

    def step(self, options: Mapping[str, Any], weights: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, under "", and row state after a step of rows with these `weights [n]` and row state `[n]`."""
        parameter = _column(weights)
        parameter.grad = torch.zeros_like(parameter)
        group = self.optimizer.param_groups[0]
        group.update({k: on_cpu(v) for k, v in options.items() if k in self.accepted})
        group["params"] = [parameter]
        self.optimizer.state.clear()
        if self.known or state:
            scalars = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.scalars.items()}
            self.optimizer.state[parameter] = {**scalars, **{k: _column(v).detach() for k, v in state.items()}}
        self.optimizer.step()
        after = self.optimizer.state[parameter]
        self.scalars = {k: v for k, v in after.items() if not is_row_state(v, parameter)}
        self.known = True
        rows = {k: v.detach().view(-1) for k, v in after.items() if is_row_state(v, parameter)}
        return {"": parameter.detach().view(-1), **rows}


def _column(numbers: Any) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(numbers, dtype=torch.float64, device="cpu").reshape(-1, 1).clone())


class LinearMoves:
    """`Moves` of forms.py, which says what each method is for. A row is multiplied by a matrix `[1 + keys, 1 + keys]` a
    step: what the step makes of the unit vectors, each of them a row of the probe."""

    MOST = 1 << 14
    OF_OPTION: ClassVar[Mapping[str, str]] = {}

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.identity = torch.eye(1 + len(keys), dtype=torch.float64, device="cpu")
        self.table = self.identity[:, None]  # [to, start, from]

    def has_form(self, shape: list[int], entries: int) -> bool:
        return shape == [len(self.identity), entries, len(self.identity)]

    def load(self, table: Tensor) -> None:
        self.table = table

    def find(self, probe: Probe, options: Mapping[str, Any]) -> Tensor:
        state = {key: self.identity[i + 1] for i, key in enumerate(self.keys)} if probe.known else {}
        after = probe.step(options, self.identity[0], state)
        return torch.stack([after[""], *(after.get(key, torch.zeros_like(after[""])) for key in self.keys)])

    def extend(self, step: Tensor | None) -> None:
        table = self.table if step is None else (step @ self.table.flatten(1)).view_as(self.table)
        self.table = torch.cat((table, self.identity[:, None]), 1)

    def changes_rows(self, step: Tensor) -> bool:
        return not torch.equal(step, self.identity)

    def coefficients(self) -> Tensor:
        # for `move`, which comes after it
        self.ones = (self.table == 1).all(1).tolist()  # [to][from]; without decay half of the work is none
        self.zeros = (self.table == 0).all(1).tolist()
        return self.table.transpose(0, 1).flatten(1)

    def move(self, values: list[Tensor], coefficients: Tensor, outs: list[Tensor]) -> None:
        size = len(values)
        for to, out in enumerate(outs):
            factors = [coefficients[:, to * size + source, None] for source in range(size)]
            total = values[to] if self.ones[to][to] else torch.mul(values[to], factors[to], out=out)
            for source in range(size):
                if source != to and not self.zeros[to][source]:
                    total = torch.addcmul(total, values[source], factors[source], out=out)
            if total is not out:
                out.copy_(total)


def is_row_state(value: Any, block: Tensor) -> bool:
    """Return whether a piece of state has a row for each row of a block: as wide, or of one number."""
    alike = isinstance(value, Tensor) and 0 < value.ndim == block.ndim and len(value) == len(block)
    return alike and all(a in (1, b) for a, b in zip(value.shape, block.shape, strict=True))


def on_cpu(value: Any) -> Any:
    """Return an option with its tensors, such as a learning rate, on the CPU."""
    if isinstance(value, tuple | list):
        return type(value)(map(on_cpu, value))
    return value.detach().cpu() if isinstance(value, Tensor) else value
