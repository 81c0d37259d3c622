"""Optimizers of the backbone that torch does not have: of the package torch-optimizer, with its mistakes corrected.

    LARS, LAMB                              the step of a parameter is scaled by its norm; for large batches
    LookaheadSGD, LookaheadAdamW, Ranger    slow weights follow the optimizer's every few steps; Ranger's is RAdam
    AdaBelief, Yogi                         Adam with other second moments

The norm of a class matrix is spread over ranks, and under sampling most of its rows take no part in a step. So each
class says which optimizer the head gets instead: `for_head(arguments) -> (class, arguments)`. An optimizer of your own
may have this method, too.

Papers: LARS 1708.03888, LAMB 1904.00962, Lookahead 1907.08610, RAdam 1908.03265, AdaBelief 2010.07468; Yogi is NeurIPS
2018 (Zaheer et al.); Ranger is RAdam and Lookahead (L. Wright, 2019).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_optimizer
from torch import nn

SLOW = "slow_param"
Parameters = Iterable[nn.Parameter]
ForHead = tuple[type[torch.optim.Optimizer], dict[str, Any]]


class LARS(torch_optimizer.LARS):  # type: ignore[misc]
    """SGD with momentum whose steps are scaled by the length of each parameter over that of its gradient.

    Args:
        lr: learning rate
        momentum: momentum (0 to 1)
        weight_decay: weight decay, above 0: without it no step is scaled
        trust_coefficient: length of a step over the length of the parameter, at a learning rate of 1
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust_coefficient: float = 0.001,
    ) -> None:
        if not weight_decay:
            raise ValueError("no step is scaled without weight decay; give weight_decay above 0")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient is {trust_coefficient}; give a number above 0")
        options: dict[str, Any] = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, lr=lr, **options)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return SGD: the same without the norms."""
        return torch.optim.SGD, {name: arguments[name] for name in ("lr", "momentum", "weight_decay")}


class LAMB(torch_optimizer.Lamb):  # type: ignore[misc]
    """AdamW whose step has the length of the parameter.

    Args:
        lr: learning rate
        betas: weights of the old values in the running means of the gradient and of its square
        eps: added to the denominator
        weight_decay: decoupled weight decay
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return AdamW: the same without the norms."""
        return torch.optim.AdamW, {name: arguments[name] for name in ("lr", "betas", "weight_decay")}


class AdaBelief(torch_optimizer.AdaBelief):  # type: ignore[misc]
    """AdamW that divides by how far the gradient is from its running mean.

    torch-optimizer's without decoupled weight decay adds it to the gradients themselves.

    Args:
        lr: learning rate
        betas: weights of the old values in the running means
        eps: added to the denominator
        weight_decay: decoupled weight decay
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=True)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return AdamW."""
        return torch.optim.AdamW, {name: arguments[name] for name in ("lr", "betas", "weight_decay")}


class Yogi(torch_optimizer.Yogi):  # type: ignore[misc]
    """Adam whose second moment changes by steps of limited size.

    Args:
        lr: learning rate
        betas: weights of the old values in the running means
        eps: added to the denominator
        weight_decay: weight decay, added to the gradient
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return Adam."""
        return torch.optim.Adam, {name: arguments[name] for name in ("lr", "betas", "weight_decay")}


# ---------------------------------------------------------------------------------------------------- Lookahead


class Lookahead(torch_optimizer.Lookahead):  # type: ignore[misc]
    """Lookahead over another optimizer, corrected.

    In torch-optimizer, `state_dict()` raises, because the class has no hooks; after `load_state_dict()` it has groups
    of its own, so that a schedule changes a learning rate that nothing uses; and slow weights begin after the first
    step, not with the initial weights as in the paper.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lookahead_steps: int, lookahead_alpha: float) -> None:
        if lookahead_steps < 1:
            raise ValueError(f"lookahead_steps is {lookahead_steps}; give at least 1")
        if not 0 < lookahead_alpha <= 1:
            raise ValueError(f"lookahead_alpha is {lookahead_alpha}; give a share in (0, 1]")
        torch.optim.Optimizer.__init__(self, [p for group in optimizer.param_groups for p in group["params"]], {})
        super().__init__(optimizer, k=lookahead_steps, alpha=lookahead_alpha)
        for group in self.param_groups:
            group["counter"] = 1  # slow weights move when it is 0: after step k, 2k, ...

    def _parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order of a state dict."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if not self.state:
            for parameter in self._parameters():
                self.state[parameter][SLOW] = parameter.detach().clone()
        with torch.enable_grad():  # for the closure
            return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        inside = self.optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {i: dict(values) for i, values in inside["state"].items()}
        for i, parameter in enumerate(self._parameters()):
            if parameter in self.state:
                state.setdefault(i, {})[SLOW] = self.state[parameter][SLOW]
        return {"state": state, "param_groups": inside["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inside = {i: {k: v for k, v in values.items() if k != SLOW} for i, values in state_dict["state"].items()}
        inside = {i: values for i, values in inside.items() if values}
        self.optimizer.load_state_dict({"state": inside, "param_groups": state_dict["param_groups"]})
        self.param_groups = self.optimizer.param_groups
        self.fast_state = self.optimizer.state
        self.state = defaultdict(dict)
        for i, parameter in enumerate(self._parameters()):
            if SLOW in state_dict["state"].get(i, {}):
                self.state[parameter][SLOW] = state_dict["state"][i][SLOW].to(parameter, copy=True)


class LookaheadSGD(Lookahead):
    """SGD with slow weights that follow every few steps.

    Args:
        lr: learning rate
        momentum: momentum (0 to 1)
        weight_decay: weight decay, added to the gradient
        lookahead_steps: steps after which the slow weights move
        lookahead_alpha: how far the slow weights then move to the fast ones (0 to 1)
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lookahead_steps: int = 5,
        lookahead_alpha: float = 0.5,
    ) -> None:
        inside = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(inside, lookahead_steps, lookahead_alpha)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return SGD."""
        return torch.optim.SGD, {name: arguments[name] for name in ("lr", "momentum", "weight_decay")}


class LookaheadAdamW(Lookahead):
    """AdamW with slow weights that follow every few steps.

    Args:
        lr: learning rate
        betas: weights of the old values in the running means of the gradient and of its square
        eps: added to the denominator
        weight_decay: decoupled weight decay
        lookahead_steps: steps after which the slow weights move
        lookahead_alpha: how far the slow weights then move to the fast ones (0 to 1)
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        lookahead_steps: int = 5,
        lookahead_alpha: float = 0.5,
    ) -> None:
        options: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        inside = torch.optim.AdamW(params, lr=lr, **options)
        super().__init__(inside, lookahead_steps, lookahead_alpha)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return AdamW."""
        return torch.optim.AdamW, {name: arguments[name] for name in ("lr", "betas", "eps", "weight_decay")}


class Ranger(Lookahead):
    """RAdam with decoupled weight decay and slow weights that follow every few steps.

    torch-optimizer's own Ranger calls tensor functions in a form that torch has deprecated, and keeps a buffer beside
    its state.

    Args:
        lr: learning rate
        betas: weights of the old values in the running means of the gradient and of its square
        eps: added to the denominator
        weight_decay: decoupled weight decay
        lookahead_steps: steps after which the slow weights move
        lookahead_alpha: how far the slow weights then move to the fast ones (0 to 1)
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        lookahead_steps: int = 6,
        lookahead_alpha: float = 0.5,
    ) -> None:
        options: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        inside = torch.optim.RAdam(params, lr=lr, decoupled_weight_decay=True, **options)
        super().__init__(inside, lookahead_steps, lookahead_alpha)

    @staticmethod
    def for_head(arguments: Mapping[str, Any]) -> ForHead:
        """Return RAdam with its own betas."""
        options = {"lr": arguments["lr"], "weight_decay": arguments["weight_decay"]}
        return torch.optim.RAdam, {**options, "decoupled_weight_decay": True}
