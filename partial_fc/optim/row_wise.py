"""`RowWiseAdagrad`: Adagrad with one number for each row.

    sum_i += mean over the row of g²        w_i −= lr · g_i / (√sum_i + ε)

A row of D numbers has one of state, where momentum has D and Adam 2·D. Adagrad: Duchi, Hazan, Singer, JMLR 12 (2011);
with one rate for all of a class's weights: Gupta, Bengio, Weston: Training Highly Multiclass Classifiers, JMLR 15
(2014). Embedding tables are trained with it as "exact row-wise Adagrad" (TorchRec).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from partial_fc.distributed.given import real

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad whose state is one number a row: `RowOptimizer(RowWiseAdagrad, head, lr=0.05)`.

    A row is the last dimension of a parameter `[..., D]`; a parameter `[n]` has rows of one number. The state "sum" has
    the shape `[..., 1]`. It is an optimizer like those of torch, and needs no `RowOptimizer` elsewhere.

    Args:
        lr: learning rate, at least 0.
        eps: ε, added to the root.
        initial_accumulator_value: of "sum".
        weight_decay: λ ≥ 0; w is multiplied by 1 − lr·λ first, as in AdamW, so that decay does not enter the sum.

    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        given = {"lr": lr, "eps": eps, "initial_accumulator_value": initial_accumulator_value}
        options = {name: real(name, value) for name, value in {**given, "weight_decay": weight_decay}.items()}
        for name, value in options.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} of RowWiseAdagrad must be at least 0, not {value}")
        super().__init__(params, options)
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter, group)

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        shape = (*parameter.shape[:-1], 1) if parameter.ndim > 1 else parameter.shape
        self.state[parameter]["sum"] = parameter.detach().new_full(shape, group["initial_accumulator_value"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:  # of a group that was added
            self._begin(parameter, group)
        square = grad.square()
        total = self.state[parameter]["sum"].add_(square.mean(-1, keepdim=True) if parameter.ndim > 1 else square)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(grad, total.sqrt().add_(group["eps"]), value=-group["lr"])
