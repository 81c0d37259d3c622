"""Optimizers by name: any of these for the backbone, one that treats rows apart for the head.

    name              backbone [all of its parameters]             head, if head_name does not say (RowOptimizer)
    sgd, adam, adamw, radam   torch's                              the same
    lars, lamb        torch-optimizer's: steps scaled by the       sgd, adamw: what they are without that
                      norm of each parameter (large batches)
    lookahead_sgd, lookahead_adamw, ranger (over radam)            sgd, adamw, radam: what they look ahead of
    adabelief, yogi   torch-optimizer's                            adamw, adam

The norm of a class matrix is spread over ranks, and under sampling most of it is not there, so that norm-based steps are for the backbone.
torch-optimizer is imported when one of its names is used. Papers: LARS 1708.03888, LAMB 1904.00962, Lookahead 1907.08610, RAdam 1908.03265,
AdaBelief 2010.07468; Yogi is NeurIPS 2018 (Zaheer et al.); Ranger is RAdam and Lookahead (L. Wright, 2019).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partial_fc.head import PartialFC
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.training.errors import UserError

Name = Literal[
    "sgd", "adam", "adamw", "radam", "lars", "lamb", "lookahead_sgd", "lookahead_adamw", "ranger", "adabelief", "yogi"
]  # fmt: skip
HeadName = Literal["sgd", "adam", "adamw", "radam"]

HEAD_OF: dict[str, HeadName] = {
    "lars": "sgd",
    "lamb": "adamw",
    "lookahead_sgd": "sgd",
    "lookahead_adamw": "adamw",
    "ranger": "radam",
    "adabelief": "adamw",
    "yogi": "adam",
}
WITH_MOMENTUM = ("sgd", "lars", "lookahead_sgd")
LOOKING_AHEAD = {"lookahead_sgd": 5, "lookahead_adamw": 5, "ranger": 6}  # steps of the papers
SLOW = "slow_param"
MISSING = "--optimizer.name {name} needs the package torch-optimizer: pip install 'partial_fc[optimizers]'"


@dataclass
class OptimizerConfig:
    """How backbone and head are updated; the head only in the rows of a step."""

    name: Name = "sgd"
    """Which optimizer; docs/optimizers.md says what each is for. The head has the same, or the one beneath it, see head_name."""
    lr: float = 0.1
    """Largest learning rate of the schedule, for a whole batch."""
    head_lr_factor: float = 1.0
    """The head's learning rate over the backbone's."""
    momentum: float = 0.9
    """Momentum (0 to 1) of sgd, lars and lookahead_sgd."""
    weight_decay: float = 5e-4
    """Weight decay a step, for all parameters."""
    head_name: HeadName | None = None
    """Which optimizer for the head, one that treats rows apart; if not given: the backbone's, or what that is without norms of whole
    parameters and without looking ahead."""
    trust_coefficient: float | None = None
    """What a step is long, over the length of the parameter; lars only, 0.001 if not given."""
    lookahead_steps: int | None = None
    """Steps after which the slow weights move; lookahead_sgd, lookahead_adamw (5 if not given) and ranger (6) only."""
    lookahead_alpha: float | None = None
    """How far the slow weights then move to the fast ones (0 to 1); lookahead_sgd, lookahead_adamw and ranger only, 0.5 if not given."""

    @property
    def of_head(self) -> HeadName:
        """The name of the head's optimizer."""
        return self.head_name or HEAD_OF.get(self.name) or self.name  # type: ignore[return-value]

    def check(self) -> None:
        """UserError for values that no run can have, or a package that is not there."""
        takes = {
            "trust_coefficient": ("lars",),
            "lookahead_steps": tuple(LOOKING_AHEAD),
            "lookahead_alpha": tuple(LOOKING_AHEAD),
        }
        for setting, names in takes.items():
            value = getattr(self, setting)
            if value is not None and self.name not in names:
                raise UserError(
                    f"--optimizer.{setting} is {value}, which has no effect with --optimizer.name {self.name} "
                    f"(it is for {', '.join(names)}); leave it out, or give null if a file sets it"
                )
        if self.name == "lars" and not self.weight_decay:
            raise UserError(
                "--optimizer.name lars scales no step without weight decay; give --optimizer.weight_decay above 0"
            )
        if self.trust_coefficient is not None and not self.trust_coefficient > 0:
            raise UserError(f"--optimizer.trust_coefficient is {self.trust_coefficient}; give a number above 0")
        if self.lookahead_steps is not None and self.lookahead_steps < 1:
            raise UserError(f"--optimizer.lookahead_steps is {self.lookahead_steps}; give at least 1")
        if self.lookahead_alpha is not None and not 0 < self.lookahead_alpha <= 1:
            raise UserError(f"--optimizer.lookahead_alpha is {self.lookahead_alpha}; give a share in (0, 1]")
        stand_in = nn.Parameter(torch.zeros(1, device="cpu"))
        try:  # what the classes themselves refuse
            self.build([stand_in])
            cls, options = self.head_class()
            cls([stand_in], **options)
        except ValueError as error:
            raise UserError(f"--optimizer: {error}") from error

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The backbone's optimizer over its parameters; UserError if its package is missing, ValueError for values out of range."""
        given = list(parameters)
        if self.name in ("sgd", "adam", "adamw", "radam"):
            cls, options = self._torchs(self.name)
            return cls(given, **options)
        if self.name in LOOKING_AHEAD:
            inside, options = self._torchs(HEAD_OF[self.name])
            if self.name == "ranger":
                options.update(betas=(0.95, 0.999), eps=1e-5)
            steps, alpha = self.lookahead_steps or LOOKING_AHEAD[self.name], self.lookahead_alpha
            return _lookahead()(inside(given, **options), k=steps, alpha=0.5 if alpha is None else alpha)
        package = _package(self.name)
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.name == "lars":
            trust = 0.001 if self.trust_coefficient is None else self.trust_coefficient
            return package.LARS(given, momentum=self.momentum, trust_coefficient=trust, **common)
        if self.name == "adabelief":  # coupled decay would be added to the gradients themselves
            return package.AdaBelief(given, weight_decouple=True, **common)
        return {"lamb": package.Lamb, "yogi": package.Yogi}[self.name](given, **common)

    def head_class(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """(the class of the head's optimizer, its options, with the head's learning rate)."""
        cls, options = self._torchs(self.of_head)
        return cls, {**options, "lr": self.lr * self.head_lr_factor}

    def build_head(self, head: PartialFC) -> RowOptimizer:
        """The head's optimizer."""
        cls, options = self.head_class()
        return RowOptimizer(cls, head, **options)

    def _torchs(self, name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if name == "sgd":
            return torch.optim.SGD, {**options, "momentum": self.momentum}
        if name == "radam":
            return torch.optim.RAdam, {**options, "decoupled_weight_decay": True}
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name], options


def _package(name: str) -> ModuleType:
    try:
        import torch_optimizer
    except ModuleNotFoundError as error:
        raise UserError(MISSING.format(name=name)) from error
    return torch_optimizer


@functools.cache
def _lookahead() -> Callable[..., torch.optim.Optimizer]:
    """torch-optimizer's Lookahead, mended.

    As it is there: `state_dict()` raises, as it has no hooks; after `load_state_dict()` it has groups of its own, so that a schedule moves
    a learning rate that nothing uses; and slow weights begin after the first step, not with the initial weights as in the paper.
    """
    theirs = _package("lookahead").Lookahead

    class Lookahead(theirs):  # type: ignore[misc,valid-type]
        def __init__(self, optimizer: torch.optim.Optimizer, k: int, alpha: float) -> None:
            torch.optim.Optimizer.__init__(self, [p for group in optimizer.param_groups for p in group["params"]], {})
            super().__init__(optimizer, k=k, alpha=alpha)
            for group in self.param_groups:
                group["counter"] = 1  # slow weights move when it is 0: after step k, 2k, ...

        def _parameters(self) -> list[nn.Parameter]:
            """In the order in which a state dict counts them."""
            return [p for group in self.param_groups for p in group["params"]]

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
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
            self.param_groups, self.fast_state = self.optimizer.param_groups, self.optimizer.state
            self.state: defaultdict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
            for i, parameter in enumerate(self._parameters()):
                if SLOW in state_dict["state"].get(i, {}):
                    self.state[parameter][SLOW] = state_dict["state"][i][SLOW].to(parameter, copy=True)

    return Lookahead
