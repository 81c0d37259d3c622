"""Backbones by name: images float [n, C, H, W] in [-1, 1] -> embeddings float [n, D].

    iresnet.py, mobilefacenet.py, vit.py, small.py    the networks
    outside.py      models of timm and transformers: names that begin with `timm:` and `hf:`
    weights.py      initial weights from a file or folder
    counts.py       parameters and operations of a backbone
    precision.py, recompute.py    what the networks share: a float32 output stage, gradient checkpointing

All modules of this package are imported with it and register their backbones on import. To add a backbone, add a file:

    @register("mine")
    def mine(*, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...

`image_shape` is (C, H, W); the module returns `embedding_size` numbers per image. Two optional attributes of the
module make more settings available: `dropout`, an nn.Dropout before the last layer, and
`set_grad_checkpointing(enable)`, which makes it recompute its blocks in the backward pass (the models of timm have
the same method).
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from partial_fc.training.backbones.recompute import keep_statistics
from partial_fc.training.errors import UserError


class Builder(Protocol):
    """The type of what is registered: a function or class that builds a backbone."""

    def __call__(self, *, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...


BuilderT = TypeVar("BuilderT", bound=Builder)
Prefixed = Callable[[str, tuple[int, int, int], int], nn.Module]

BACKBONES: dict[str, Builder] = {}
PREFIXES: dict[str, Prefixed] = {}
"""Prefix of a name, such as "timm:" -> function that builds from (rest of the name, image_shape, embedding_size)."""


def register(name: str) -> Callable[[BuilderT], BuilderT]:
    """Decorator that registers a builder as `name`. Raises ValueError if the name is taken."""

    def add(builder: BuilderT) -> BuilderT:
        if name in BACKBONES:
            raise ValueError(f"the backbone name {name!r} is already registered, by {BACKBONES[name]!r}")
        BACKBONES[name] = builder
        return builder

    return add


def build_backbone(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    embedding_size: int,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    normalize_input: bool = False,
) -> nn.Module:
    """Build the backbone `name` for images of `image_shape` (C, H, W), with `embedding_size` outputs per image.

    Args:
        name: one of the registered names, or `timm:NAME` or `hf:NAME`; `partial-fc backbones` lists them.
        image_shape: (C, H, W) of the images.
        embedding_size: D, numbers of an embedding.
        dropout: probability of the dropout before the last layer.
        gradient_checkpointing: store only the inputs of blocks and recompute the blocks in the backward pass. Gradients
            are the same, memory is less; batch statistics count a batch once.
        channels_last: give the images to convolutions as [n, H, W, C] in memory, which is faster on GPUs. Weights keep
            their layout, so every engine and checkpoint accepts them.
        normalize_input: give a model of timm or transformers its images with the mean and standard deviation that its
            own configuration names, in place of [-1, 1]. They are buffers of the module, saved with its weights.

    Raises UserError for an unknown name, for sizes that are not positive, and for options that the backbone does not
    have.
    """
    if embedding_size < 1:
        raise UserError(f"the embedding size is {embedding_size}; give at least 1")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"the image shape is {tuple(image_shape)}; give (channels, height, width), each at least 1")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
        backbone = PREFIXES[prefix](name.removeprefix(prefix), image_shape, embedding_size)
    elif name in BACKBONES:
        backbone = BACKBONES[name](image_shape=image_shape, embedding_size=embedding_size)
    else:
        others = "".join(f", {prefix}NAME" for prefix in sorted(PREFIXES))
        raise UserError(f"unknown backbone {name!r}; choose one of: {', '.join(sorted(BACKBONES))}{others}")
    _apply_options(backbone, name, dropout, gradient_checkpointing, channels_last)
    if normalize_input:
        if not hasattr(backbone, "normalize_input"):
            raise UserError(
                f"the backbone {name!r} takes images in [-1, 1] as they are; leave --backbone.normalize_input out"
            )
        backbone.normalize_input(image_shape[0])  # type: ignore[operator]
    return backbone


def _apply_options(
    backbone: nn.Module, name: str, dropout: float, gradient_checkpointing: bool, channels_last: bool
) -> None:
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}; give a probability of at least 0 and less than 1")
    if dropout:
        layer = getattr(backbone, "dropout", None)
        if not isinstance(layer, nn.Dropout):
            raise UserError(f"the backbone {name!r} has no dropout; leave --backbone.dropout out")
        layer.p = dropout
    if gradient_checkpointing:
        enable = getattr(backbone, "set_grad_checkpointing", None)
        if enable is None:
            raise UserError(
                f"the backbone {name!r} has no gradient checkpointing; leave --backbone.gradient_checkpointing out"
            )
        enable(True)
        keep_statistics(backbone)
    if channels_last:
        backbone.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
