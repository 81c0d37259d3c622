"""The optimizers of a run: any torch.optim.Optimizer for the backbone, one that treats rows apart for the head.

    optimizer           the backbone's: a class of torch.optim or of more_optimizers.py by name, your own by import path
    head_optimizer      the head's; null for the backbone's, with lr * head_lr_factor, in a RowOptimizer
    head_skipped_rows   what that does to rows that a step did not select; null for what RowOptimizer does by itself

Where the backbone's cannot update rows one block at a time (LARS, LAMB) or looks ahead, its class says what the head
gets instead: `for_head(arguments) -> (class, arguments)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import register_type
from torch import Tensor, nn

from partial_fc.head import PartialFC
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import SkippedRowsChoice
from partial_fc.training.class_settings import ClassSettings
from partial_fc.training.errors import UserError, check_at_least

MORE = "partial_fc.training.more_optimizers"
OF_TORCH = (
    "SGD", "Adam", "AdamW", "RAdam", "NAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "Adafactor",
)  # fmt: skip
OF_MORE = ("LARS", "LAMB", "LookaheadSGD", "LookaheadAdamW", "Ranger", "AdaBelief", "Yogi")


def _no_tensor(text: str) -> Tensor:
    raise ValueError("a setting cannot be a tensor")


# torch takes tensors for some arguments that are numbers; jsonargparse would look for subclasses of Tensor
register_type(Tensor, deserializer=_no_tensor, fail_already_registered=False)


@dataclass
class OptimizerSettings(ClassSettings):
    """An optimizer: of torch.optim or more_optimizers.py by its name, or a subclass of torch.optim.Optimizer by its
    import path."""

    base = torch.optim.Optimizer
    names = {
        **{name: f"torch.optim.{name}" for name in OF_TORCH if hasattr(torch.optim, name)},
        **{name: f"{MORE}.{name}" for name in OF_MORE},
        "RowWiseAdagrad": "partial_fc.optim.row_wise.RowWiseAdagrad",
    }
    skip = frozenset({"params"})
    packages = {"torch_optimizer": "torch-optimizer: pip install 'partial_fc[optimizers]'"}


def default_optimizer() -> OptimizerSettings:
    """Return the optimizer of a run that names none."""
    return OptimizerSettings("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})


@dataclass
class Optimizers:
    """The optimizers of a run; see the top of this file."""

    optimizer: OptimizerSettings
    head_optimizer: OptimizerSettings | None
    head_lr_factor: float
    head_skipped_rows: SkippedRowsChoice | None = None

    def check(self) -> None:
        """UserError for values that no run can have, or a package that is not installed."""
        check_at_least("head_lr_factor", self.head_lr_factor, 0)
        if self.head_optimizer is not None and self.head_lr_factor != 1:
            raise UserError(
                f"--head_lr_factor is {self.head_lr_factor}, which has no effect with --head_optimizer; "
                "leave it out, and give --head_optimizer.lr"
            )
        stand_in = nn.Parameter(torch.zeros(1, device="cpu"))
        built = self.build([stand_in])
        closure = inspect.signature(type(built).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"--optimizer {self.optimizer.name} needs a closure in each step, which training does not give"
            )
        self.build_head(PartialFC(2, 2, sample_rate=0.5, device=torch.device("meta")))

    def check_device(self, device: torch.device) -> None:
        """UserError for options that the optimizers cannot have on the device of a run."""
        for option, settings in (("optimizer", self.optimizer), ("head_optimizer", self.head_optimizer)):
            if settings is not None and device.type == "cpu" and settings.init_args.get("capturable"):
                raise UserError(f"--{option}.capturable is for a GPU, and this run is on the CPU; leave it out")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the backbone's optimizer over its parameters; UserError for values out of range."""
        built: torch.optim.Optimizer = self.optimizer.build("optimizer", list(parameters))
        return built

    def head_class(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return (the class of the head's optimizer, its arguments)."""
        if self.head_optimizer is not None:
            cls = self.head_optimizer.load(self.head_optimizer.class_path, "head_optimizer")
            return cls, self.head_optimizer.arguments("head_optimizer")
        cls = self.optimizer.load(self.optimizer.class_path, "optimizer")
        arguments = self.optimizer.arguments("optimizer")
        complete = {**self.optimizer.all_arguments("optimizer"), **arguments}
        if hasattr(cls, "for_head"):
            cls, arguments = cls.for_head(complete)
        if "lr" in complete:
            arguments = {**arguments, "lr": complete["lr"] * self.head_lr_factor}
        elif self.head_lr_factor != 1:
            raise UserError(f"--head_lr_factor: {cls.__name__} has no argument lr; give --head_optimizer")
        return cls, arguments

    def build_head(self, head: PartialFC) -> RowOptimizer:
        """Return the head's optimizer; UserError for a class that cannot update rows one block at a time."""
        cls, options = self.head_class()
        if self.head_skipped_rows is not None:
            options = {**options, "skipped_rows": self.head_skipped_rows}
        if head.weight.dtype == torch.bfloat16:
            options = {**options, "low_precision": "stochastic"}
        try:
            return RowOptimizer(cls, head, **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"--{self._of_head} {cls.__name__}, of the head: {error}") from error

    @property
    def _of_head(self) -> str:
        return "optimizer" if self.head_optimizer is None else "head_optimizer"
