"""Lightning modules with heads inside: `HeadStrategy`, a DDPStrategy in which DDP ignores the heads.

class Recogniser(LightningModule):
    configure_model         build the head here, because the process group exists by then
    training_step           return self.head(self.backbone(images), labels)
    configure_optimizers    return JointOptimizer(an optimizer of self.backbone.parameters(), a RowOptimizer of
                            self.head)
    configure_gradient_clipping
                            clip_grad_norm_(self.backbone.parameters(), self.head, max_norm=gradient_clip_val)

Trainer(strategy=HeadStrategy(), ...)

what a DDPStrategy does                    what HeadStrategy changes
wraps the module in DDP                    DDP ignores the heads' parameters and buffers
writes FILE.ckpt from the main process     without the heads; all ranks write them to FILE.ckpt.heads, which any number
                                           of ranks can read
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from partial_fc import checkpoint
from partial_fc.engines.ddp import ignore_heads
from partial_fc.engines.heads import heads_of, without_heads
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.needs import need, need_methods

need("lightning", "2.6")

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

SUFFIX = ".heads"  # added to the name of a checkpoint file, for the folder of the heads


class HeadStrategy(DDPStrategy):
    """A `DDPStrategy` for modules with heads; it takes the same arguments.

    `configure_optimizers` must return a `JointOptimizer`. Checkpoints need a folder that all ranks can see, and every
    rank must call Trainer.save_checkpoint, as Lightning requires anyway.
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

    # ------------------------------------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return without_heads(self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        optimizers = self._head_optimizers() if "optimizer_states" in checkpoint else {}
        _save(f"{os.fspath(filepath)}{SUFFIX}", {**self._heads(), **optimizers})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._loaded = f"{os.fspath(checkpoint_path)}{SUFFIX}"
        return super().load_checkpoint(checkpoint_path, weights_only)

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
        super().load_optimizer_state_dict(checkpoint)
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
        return {
            f"optimizer.{i}.{k}": head for i, optimizer in enumerate(joint) for k, head in enumerate(optimizer.heads)
        }


need_methods("lightning", DDPStrategy, HeadStrategy, "_heads", "_head_optimizers")


# `checkpoint` is an argument in the methods above
def _save(folder: str, named: dict[str, Any]) -> None:
    checkpoint.save_checkpoint(folder, **named)


def _load(folder: str, named: dict[str, Any]) -> None:
    checkpoint.load_checkpoint(folder, **named)
