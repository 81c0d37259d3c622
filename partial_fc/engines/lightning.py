"""Lightning modules with heads inside: `HeadStrategy`, a DDPStrategy in which DDP ignores the heads.

class Recogniser(LightningModule):
    configure_model         build the head here, because the process group exists by then
    training_step           return self.head(self.backbone(images), labels)
    configure_optimizers    return JointOptimizer(an optimizer of self.backbone.parameters(), a RowOptimizer of
                            self.head); for manual optimization a list of optimizers, RowOptimizers among them
    configure_gradient_clipping
                            clip_grad_norm_(self.backbone.parameters(), self.head, max_norm=gradient_clip_val)

Trainer(strategy=HeadStrategy(), ...)

what a DDPStrategy does                    what HeadStrategy changes
wraps the module in DDP                    DDP ignores the heads' parameters and buffers
writes FILE.ckpt from the main process     without the heads; all ranks write them to FILE.ckpt.heads, which any number
                                           of ranks can read; both have the token of their save
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from partial_fc import checkpoint
from partial_fc.engines.ddp import ignore_heads
from partial_fc.engines.heads import head_parameters, heads_of, without_heads
from partial_fc.engines.joint import JointOptimizer, parameters_of
from partial_fc.engines.needs import need, need_methods
from partial_fc.engines.same_save import NAME, Token, token_of, torn
from partial_fc.optim.row_optimizer import RowOptimizer

need("lightning", "2.6")

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.core.optimizer import LightningOptimizer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

SUFFIX = ".heads"  # added to the name of a checkpoint file, for the folder of the heads
KEY = "partial_fc_save_token"  # within the file


class HeadStrategy(DDPStrategy):
    """A `DDPStrategy` for modules with heads; it takes the same arguments.

    The optimizers of heads are `RowOptimizer`s, in a `JointOptimizer` or by themselves. Checkpoints need a folder that
    all ranks can see, and every rank must call Trainer.save_checkpoint, as Lightning requires anyway.

    Raises ValueError for a module without heads; for another optimizer with rows of a head, whose state one rank would
    save; for a checkpoint with rows of a head in it, such as those of EMAWeightAveraging; and, when it is loaded, for a
    FILE.ckpt and a FILE.ckpt.heads that are not of the same save.
    """

    strategy_name = "partial_fc"

    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        if not heads_of(self.lightning_module):
            raise ValueError(
                f"there is no PartialFC or CenterLoss in this {type(self.lightning_module).__name__}; "
                'build it in configure_model(), or use strategy="ddp"'
            )
        ignore_heads(self.lightning_module)
        super().setup(trainer)
        rows = {id(p) for p in head_parameters(self.lightning_module)}
        for optimizer in self.optimizers:
            if not isinstance(optimizer, RowOptimizer) and any(id(p) in rows for p in parameters_of(optimizer)):
                own = optimizer.optimizer if isinstance(optimizer, JointOptimizer) else optimizer
                raise ValueError(
                    f"configure_optimizers returned a {type(own).__name__} with rows of a head, whose state could not "
                    "be resumed: leave the head's parameters out, and return JointOptimizer(an optimizer of the "
                    "backbone, RowOptimizer(torch.optim.SGD, head, ...))"
                )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return without_heads(self.lightning_module)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # a place among optimizer_states; the rows' state is beside the file
        return {} if isinstance(_plain(optimizer), RowOptimizer) else super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        found = _rows_in(checkpoint)
        if found:
            raise ValueError(
                f"the checkpoint has rows of a head in {found}, of which the main process would save its own alone. "
                "An average of weights (EMAWeightAveraging) must be of the backbone: keep it of self.backbone yourself"
            )
        optimizers = self._head_optimizers() if "optimizer_states" in checkpoint else {}
        token = Token()
        # the heads first: a file that is still the one of an earlier save has another token
        _save(f"{os.fspath(filepath)}{SUFFIX}", {**self._heads(), **optimizers, NAME: token})
        super().save_checkpoint({**checkpoint, KEY: token.value}, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = os.fspath(checkpoint_path)
        if os.path.islink(path):  # ModelCheckpoint(save_last="link"): the folder is beside the file that it names
            path = os.path.realpath(path)
        self._loaded = f"{path}{SUFFIX}"
        loaded = super().load_checkpoint(checkpoint_path, weights_only)
        if token_of(self._loaded) != loaded.get(KEY, ""):
            raise torn(self._loaded, path)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        result = self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=False)
        prefixes = tuple(f"{name}." for name in heads_of(self.lightning_module))
        missing = [name for name in result.missing_keys if not name.startswith(prefixes)]
        if strict and (missing or result.unexpected_keys):
            unexpected = result.unexpected_keys
            raise RuntimeError(f"checkpoint and module do not match: missing keys {missing}, unexpected {unexpected}")
        _load(self._loaded, self._heads())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        everyone = self.optimizers
        kept = [(o, s) for o, s in zip(everyone, states, strict=False) if not isinstance(o, RowOptimizer)]
        self.optimizers = [o for o, _ in kept]
        try:
            super().load_optimizer_state_dict({**checkpoint, "optimizer_states": [state for _, state in kept]})
        finally:
            self.optimizers = everyone
        _load(self._loaded, self._head_optimizers())

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(f"{os.fspath(filepath)}{SUFFIX}", ignore_errors=True)

    def _heads(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {f"head.{name}": head for name, head in heads_of(self.lightning_module).items()}

    def _head_optimizers(self) -> dict[str, Any]:
        joint = [optimizer for optimizer in self.optimizers if isinstance(optimizer, JointOptimizer)]
        alone = [optimizer for optimizer in self.optimizers if isinstance(optimizer, RowOptimizer)]
        return {
            **{f"optimizer.{i}.{k}": head for i, each in enumerate(joint) for k, head in enumerate(each.heads)},
            **{f"rows.{i}": each for i, each in enumerate(alone)},
        }


need_methods("lightning", DDPStrategy, HeadStrategy, "_heads", "_head_optimizers")


def _plain(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _rows_in(value: Any, path: str = "") -> str:
    """Return where a checkpoint has a tensor that is split over the ranks, "" if nowhere."""
    if isinstance(value, DTensor):
        return path
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (_rows_in(part, f"{path}[{key!r}]") for key, part in parts)), "")


# `checkpoint` is an argument in the methods above
def _save(folder: str, named: dict[str, Any]) -> None:
    checkpoint.save_checkpoint(folder, **named)


def _load(folder: str, named: dict[str, Any]) -> None:
    checkpoint.load_checkpoint(folder, **named)
