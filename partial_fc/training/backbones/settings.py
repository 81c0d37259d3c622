"""Settings of the backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from partial_fc.training.backbones import build_backbone
from partial_fc.training.backbones.weights import load_weights
from partial_fc.training.errors import UserError, check_at_least


@dataclass
class BackboneConfig:
    """The network that makes embeddings."""

    name: str = "small"
    """Its name (`partial-fc backbones` lists them with their sizes), or timm:NAME, or hf:FOLDER of a transformers
    model."""
    embedding_size: int = 128
    """Width of the embeddings, in numbers."""
    weights: str | None = None
    """Weights to start from: a run or a checkpoint of this project, a state dict by torch.save, such as the field's
    backbone.pth, safetensors, or a folder of transformers; drawn if not given."""
    dropout: float = 0.0
    """Probability (0 to 1) of setting a number before the last layer to zero in training."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of blocks and compute the blocks again in the backward: less memory, a third more time, the
    same numbers."""
    channels_last: bool = False
    """Give convolutions their images as [n, H, W, C] in memory, which is faster on GPUs with half precision."""
    normalize_input: bool = False
    """For timm: and hf: models: give them images with the mean and standard deviation of their own configuration, as
    their pretrained weights expect, in place of [-1, 1]."""

    def check(self) -> None:
        """UserError for values that no run can have."""
        check_at_least("backbone.embedding_size", self.embedding_size, 1)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--backbone.dropout is {self.dropout}; give a probability from 0, and below 1")

    def check_weights(self) -> None:
        """UserError if the file of weights to start from does not exist; a resumed run does not need it."""
        if self.weights is not None and not Path(self.weights).exists():
            raise UserError(
                f"--backbone.weights: there is no file {self.weights}; give a run or a checkpoint of this project, a "
                "state dict by torch.save, or safetensors"
            )

    def build(
        self,
        image_shape: tuple[int, int, int],
        weights: str | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> nn.Module:
        """Return the backbone for images of `image_shape` (C, H, W), with the weights of a file if one is given.

        tell: gets a line about what was loaded.
        """
        backbone = build_backbone(
            self.name,
            image_shape=image_shape,
            embedding_size=self.embedding_size,
            dropout=self.dropout,
            gradient_checkpointing=self.gradient_checkpointing,
            channels_last=self.channels_last,
            normalize_input=self.normalize_input,
        )
        if weights is not None:
            tell(load_weights(backbone, weights))
        return backbone
